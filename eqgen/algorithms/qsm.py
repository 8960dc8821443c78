"""QSM: Q-score matching.

Psenka, Escontrela, Abbeel and Ma, "Learning a Diffusion Model Policy from Rewards via Q-Score Matching",
arXiv 2312.11752 (2023): the policy is what the diffusion da = Psi(s, a) dt + noise ends in, and wherever its
score Psi is not aligned with the action gradient of its Q, aligning it raises Q. So Psi, a network, regresses on
alpha grad_a Q at actions from replay. Only the network is differentiated, never a chain.

Notation (paper symbol = name here; the chain begins with noise and ends in the action):

    Psi(s, a) = actor      Q = critics      alpha = inverse_temperature      N = num_candidates

[P] the paper's abstract and digests of its theory (we have not seen its full text), [C] its authors' public code,
[L] the code of SDAC's authors (Ma et al., arXiv 2502.00361), where QSM is a baseline, [I] inferred here, [T] tested
here.

Temperature: the score matched is that of exp(alpha Q) / Z, so 1 / alpha is a temperature, in units of
`reward_scale` times return. Rewards are as they are [C, L]. With alpha = 1 [L] that is nearly greedy where returns
are in the hundreds; [C] has alpha = 50 for rewards in [0, 1].

Differs from the paper and its code in:
- The form. The theory has a score of state and action, without a time, and Langevin dynamics [P]; `QSM` is that,
  with the chains of [L]. What [C] runs matches a noise predictor at noised actions, for 5 steps of DDPM:
  `DenoisingQSM`.
- [C] matches the predicted noise with -alpha grad Q(s, a_t), which lacks the sigma_t between noise and score: a
  policy colder at small t than at large t. Here the factor is in.
- Q is the mean over the critics [C]. [L] takes the gradient of the smaller one, with a question mark.
- [C] clips a_t to the box at every step and adds noise of variance beta_t; `DenoisingQSM` clips the denoised
  action and has the posterior variance, as the other diffusion policies here. Widths and learning rates are those
  of [L].
- Langevin steps begin as large as the box and end with noise of deviation 0.22 [L]. They follow exp(alpha Q) where
  its logarithm bends by less than about one per step size; beyond, chains leap from face to face of the box, and
  the choice of the best of N by the critics is what acts [I]. On Pendulum with N = 4, returns of -200 to
  -130 after 6,800 updates; `DenoisingQSM` has -220 to -160 after 5,800 [T].
"""

from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PyTree

from eqgen.algorithms.actor_critic import AbstractActorCritic, AbstractDiffusionAgent, Actions, Observations
from eqgen.networks.policies import ActionScore
from eqgen.samplers import clip_to_box, langevin
from eqgen.timesteps.times import DiffusionChain
from eqgen.types import Metrics


def soft_policy_score(
    critics: PyTree, obs: Observations, actions: Actions, inverse_temperature: float
) -> Actions:
    """alpha grad_a Q(s, a), the score of exp(alpha Q), where Q is the mean over the critics [C]."""
    q = lambda a, s: inverse_temperature * jnp.mean(critics(s, a))
    return jax.vmap(jax.grad(q))(actions, obs)


def check_temperature(inverse_temperature: float) -> None:
    """**Raises:** `ValueError` unless it is positive."""
    if not inverse_temperature > 0:
        raise ValueError(
            f"inverse_temperature is {inverse_temperature}; it must be positive (a small one is nearly uniform)."
        )


def matching(prediction: Actions, target: Actions) -> tuple[Float[Array, ""], Metrics]:
    """The mean squared error, and how far the two point the same way."""
    loss = jnp.mean((prediction - target) ** 2)
    length = jnp.linalg.norm(target, axis=-1)
    products = jnp.sum(prediction * target, axis=-1)
    cosine = products / jnp.maximum(length * jnp.linalg.norm(prediction, axis=-1), 1e-12)
    return loss, {"actor/loss": loss, "actor/cosine": jnp.mean(cosine), "actor/target_norm": jnp.mean(length)}


class QSM(AbstractActorCritic):
    """Hyperparameters and methods of Q-score matching with Langevin dynamics."""

    inverse_temperature: float = 1.0
    """alpha > 0, per unit of `reward_scale` times return [L]."""
    num_steps: int = 20
    """Langevin steps of a chain [L]."""
    first_step_size: float = 1.0
    """eta of a chain's first step; they fall linearly, to that over `num_steps` in the last [L]."""
    exploration: Literal["annealed", "constant", "none"] = "none"
    """None needed, as chains end with noise [L]."""
    reward_scale: float = 1.0  # [L], as the next two
    policy_delay: int = 1
    activation: str = "relu"

    sizes = {
        "smoke": dict(hidden=(32, 32), num_steps=3, num_candidates=2, num_eval_candidates=2),
        "cpu": dict(hidden=(256, 256), num_candidates=8, num_eval_candidates=8),
        "paper": dict(),
    }
    reports = ("loss", "cosine", "target_norm")

    def __check_init__(self):
        check_temperature(self.inverse_temperature)
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; a chain takes at least 1.")
        if not self.first_step_size > 0:
            raise ValueError(f"first_step_size is {self.first_step_size}; it must be positive.")

    @property
    def step_sizes(self) -> Float[Array, " steps"]:
        """eta of each Langevin step."""
        return self.first_step_size * (1 - jnp.arange(self.num_steps) / self.num_steps)

    def make_actor(self, obs_size, action_size, *, key):
        return ActionScore(obs_size, action_size, self.hidden, self.activation, key=key)

    def sample(self, actor, critics, obs, *, key):
        """The end of a chain from N(0, I)."""
        start_key, chain_key = jr.split(key)
        start = jr.normal(start_key, (actor.action_size,))
        return langevin(actor.at(obs), start, self.step_sizes, project=clip_to_box(), key=chain_key)[0]

    def actor_loss(self, actor, state, batch, next_actions, *, key):
        target = soft_policy_score(state.critics, batch.obs, batch.action, self.inverse_temperature)
        return matching(jax.vmap(actor)(batch.action, batch.obs), target)


class DenoisingQSM(AbstractDiffusionAgent):
    """The form of the paper's own code: a noise predictor, matched at noised actions."""

    inverse_temperature: float = 50.0
    """alpha > 0, per unit of `reward_scale` times return [C]."""
    chain: DiffusionChain = DiffusionChain(5, betas="vp", beta_range=(1e-4, 0.01))
    """Its steps; rates from 0.1 to 10 [C]."""
    num_candidates: int = 1
    """The policy is not improved upon by a choice [C]."""
    num_eval_candidates: int = 1
    exploration: Literal["annealed", "constant", "none"] = "constant"
    exploration_std: float = 0.1
    """Of the noise on actions, in units of the box [-1, 1], those of the TD target too [C]."""
    reward_scale: float = 1.0  # [C], as the next
    policy_delay: int = 1

    sizes = {"smoke": dict(hidden=(32, 32)), "cpu": dict(hidden=(256, 256)), "paper": dict()}
    evaluation_policy = (
        "stochastic: best of num_eval_candidates samples (one by default), no exploration noise"
    )
    reports = ("loss", "cosine", "target_norm")

    def __check_init__(self):
        check_temperature(self.inverse_temperature)

    def actor_loss(self, actor, state, batch, next_actions, *, key):
        a_t, steps, _, sigma_t = self.noised(batch.action, key=key)
        score = soft_policy_score(state.critics, batch.obs, a_t, self.inverse_temperature)
        return matching(jax.vmap(actor)(a_t, steps, batch.obs), -sigma_t[:, None] * score)
