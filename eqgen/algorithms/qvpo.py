"""QVPO: Q-weighted variational policy optimisation.

Ding, Hu, Zhang, Ren, Zhang, Yu, Wang and Shi, "Diffusion-based Reinforcement Learning via Q-weighted Variational
Policy Optimization", arXiv 2405.16173 (2024): the denoising loss, which bounds a likelihood, becomes a bound of
the policy's value when each action of the policy weighs in by a positive function of its Q. Of several draws at a
state the best is learned, with its advantage over their mean as the weight. Uniform actions with smaller weights
keep the policy wide, as an entropy term does. Since a diffusion is wide anyway, the best of a few draws acts.

Notation (paper symbol = name here; t = 0 is the action, as in the paper):

    epsilon_theta(a_t, s, t) = actor      omega_eq = weights ("qadv")       N_d = num_train_samples
    Q = critics                           omega_ent = entropy_weight        N_e = num_uniform_samples
    T = chain.num_steps                   K_b = num_candidates              K_t = num_target_candidates

[P] the paper's abstract and digests of it (we have not seen its full text), [C] its authors' public code, [L] the
code of SDAC's authors (Ma et al., arXiv 2502.00361), where QVPO is a baseline, [I] inferred here, [T] tested here.

Differs from the paper and its code in:
- Of the ways in [C] to turn Q into weights only "qadv" is here, its default: A cut at 0, which never cuts the
  best.
- The entropy weight falls by updates, in [C] by steps of an environment, of which it makes one per update.
- Actor and critics learn from the same batch; [C] draws two.
- Its learning was followed for 9,800 updates only, at the authors' rates, which are for a million: Pendulum, N_d =
  16, from -1400 to -170 for one seed, to -600 for two, all still rising (`benchmarks/results/pendulum`) [T].
- [L] is another algorithm: it repeats and shuffles observations as one flat array, which mixes their entries,
  pairs uniform actions with weights of other states, weighs by Q itself and only where Q > 1, and has a derivative
  through the sampler in the weights. In flow-rl's version uniform actions lie in [0, 1) instead of the box. Here
  neither.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from eqgen.algorithms.actor_critic import AbstractDiffusionAgent, Actions, ActorCriticState, Observations
from eqgen.timesteps.times import DiffusionChain
from eqgen.tree import vmap_in_blocks


class QVPO(AbstractDiffusionAgent):
    """Hyperparameters and methods of QVPO."""

    num_train_samples: int = 64
    """N_d, draws of the policy at each state of the batch, of which the best is learned [C]."""
    num_uniform_samples: int = 10
    """N_e, uniform actions at each state of the batch [C]; 0 for no entropy term."""
    entropy_weight: float = 0.02
    """omega_ent at the beginning: the weight of a uniform action, relative to that of its state's best [C]."""
    final_entropy_weight: float = 0.002
    """Below which it does not fall [C]."""
    entropy_decay_updates: int = 1_000_000
    """Updates in which it would fall linearly to 0: those of a whole run, which are so many in [C]."""
    num_candidates: int = 4
    """K_b: the behaviour's action is the best of so many draws [C]."""
    num_target_candidates: int | None = 4
    """K_t, for the next action of the TD target [C]."""
    bootstrap_with: Literal["online", "target"] = "target"
    """That action is drawn by the target actor and chosen by the target critics [C]."""
    exploration: Literal["annealed", "constant", "none"] = "none"
    """The policy's own spread explores [C]."""
    reward_scale: float = 1.0  # [C], as the next five
    policy_delay: int = 1
    actor_learning_rate: float = 1e-4
    final_actor_learning_rate: float = 1e-4
    max_grad_norm: float = 2.0
    chain: DiffusionChain = DiffusionChain(20, betas="cosine")

    sizes = {
        "smoke": dict(
            hidden=(32, 32),
            chain=DiffusionChain(3, betas="cosine"),
            num_train_samples=4,
            num_candidates=2,
            num_target_candidates=2,
            num_eval_candidates=2,
        ),
        "cpu": dict(hidden=(256, 256), num_train_samples=16, num_eval_candidates=8),
        "paper": dict(),
    }
    reports = ("loss", "advantage", "entropy_weight")

    def __check_init__(self):
        if self.num_train_samples < 2:
            raise ValueError(
                f"num_train_samples is {self.num_train_samples}; an advantage over other samples takes at least 2."
            )

    def omega(self, state: ActorCriticState) -> Float[Array, ""]:
        """omega_ent now."""
        share_left = 1 - state.step / self.entropy_decay_updates
        return jnp.maximum(self.entropy_weight * share_left, self.final_entropy_weight)

    def best_sample(
        self, state: ActorCriticState, obs: Observations, *, keys: Key[Array, " batch"]
    ) -> tuple[Actions, Float[Array, " batch"]]:
        """For each observation the best of N_d draws of the policy, and its advantage over their mean."""

        def one(obs, key):
            draw = lambda key: self.sample(state.actor, state.critics, obs, key=key)
            actions = jax.vmap(draw)(jr.split(key, self.num_train_samples))
            q = jax.vmap(lambda action: self.q_value(state.critics, obs, action))(actions)
            best = jnp.argmax(q)
            return actions[best], jnp.maximum(q[best] - jnp.mean(q), 0)

        return vmap_in_blocks(one, obs, keys, rows_each=self.num_train_samples)

    def actor_loss(self, actor, state, batch, next_actions, *, key):
        sample_key, uniform_key, loss_key = jr.split(key, 3)
        actions, weights = self.best_sample(state, batch.obs, keys=jr.split(sample_key, len(batch.obs)))
        omega = self.omega(state)
        repeat = lambda x: jnp.repeat(x, self.num_uniform_samples, axis=0)
        shape = (len(actions) * self.num_uniform_samples, actions.shape[1])
        loss = self.denoising_loss(
            actor,
            jnp.concatenate([batch.obs, repeat(batch.obs)]),
            jnp.concatenate([actions, jr.uniform(uniform_key, shape, minval=-1.0, maxval=1.0)]),
            jnp.concatenate([weights, omega * repeat(weights)]),
            key=loss_key,
        )
        values = (loss, jnp.mean(weights), omega)
        return loss, {f"actor/{name}": value for name, value in zip(self.reports, values, strict=True)}
