"""MaxEntDP: maximum-entropy reinforcement learning with a diffusion policy.

Dong, Cheng and Zhang, "Maximum Entropy Reinforcement Learning with Diffusion Policy", arXiv 2502.11612 (2025): soft
actor-critic whose policy is a diffusion. The policy exp(Q / beta) / Z is learnt by Q-weighted noise estimation: the
noise in an action a_t is a mean over clean actions that a_t may have come from, weighted by exp(Q / beta). The soft
value needs log pi(a|s), which is an integral over noise levels of the network's squared error.

Notation (paper symbol = name here; t = 0 is the action, as in the paper):

    epsilon_phi(a_t, s, t) = actor     Q_theta = critics               beta = temperature
    K = num_proposals                  N = num_log_prob_samples        T = chain.num_steps
    sigma(alpha_t) = alpha_bar         M = num_eval_candidates         (alpha_t is the paper's log-SNR)

[P] the paper's abstract (we have not seen its full text), [C] its authors' public code, [I] inferred here, [T]
tested here.

Beside SDAC (arXiv 2502.00361), which learns the same policy from the same identity:
- the critics' target is soft: it has -beta log pi, where SDAC has hard values of the best of N actions;
- beta is constant, where SDAC's temperature is tied to an annealed exploration noise; no noise is added to actions;
- the clean actions are drawn inside the box, where SDAC draws them anywhere and clips those that the critics see;
- the actions that are noised are replayed ones, where SDAC draws them from the policy; and Q is that of the target
  critics;
- one action is drawn to act by, and the best of M only when the policy is evaluated.

The log-probability is [C], from d log pi / d log-SNR (Kong et al., "Information-theoretic diffusion", 2023),

    log pi(a|s) = -d/2 log(2 pi e) + sum_k (ab_{k-1} - ab_k) / (2 ab_k (1 - ab_k)) (ab_k d - E|eps - eps_hat|^2),

a Riemann sum with the integrand at the noisier end of each interval, whose integral of ab_k d is exact only for
many steps. With 20 of them it knows no small scales: for a Gaussian of standard deviation 0.4, 0.2, 0.1, 0.05 the
entropy comes out 0.05, 0.18, 0.41, 0.82 nats per dimension too high, even with the exact noise [T].

Differs from the paper and its code in:
- The levels: T steps of the cosine chain, for the network, for sampling and for the integral. [C] trains at all
  times from 1e-3 to 0.9946, and samples and integrates at 20 equally spaced ones of them.
- The network: the frame's, with Mish everywhere and the step in a sinusoid. [C] has ReLU in the critics, and gives
  the actor Fourier features of the log-SNR through a network of their own.
- Steps of the chain have the posterior variance; [C] has the larger beta_t.
- Proposals in the box: `scores.truncated_proposals`. [C] uses `jax.random.truncated_normal` and puts clipped normal
  noise where that gives NaN; where it puts infinities or the wrong edge is left.
- The actor's rate falls linearly over the 2e6 updates in which [C] has half a cosine.
- The M actions are compared by the online critics, as everywhere in the frame; by the target critics in [C].

Pendulum, nets of 2 x 64, N = 4: after 9,800 updates one of three seeds returns -130, the others -560 and -520 and
still rising (`benchmarks/results/pendulum`). That rewards are not scaled, so that the critics have values in the
hundreds to learn, may be what makes it slow [I].
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from eqgen import scores
from eqgen.algorithms.actor_critic import AbstractDiffusionAgent, Actions, Observations
from eqgen.timesteps.times import DiffusionChain
from eqgen.tree import vmap_in_blocks


class MaxEntDP(AbstractDiffusionAgent):
    """Hyperparameters and methods of MaxEntDP."""

    temperature: float = 0.1
    """beta, in units of `reward_scale` times return [C]: HalfCheetah 0.2, Humanoid 0.02, Ant and Hopper 0.05,
    Walker2d and Swimmer 0.01 [C]."""
    num_proposals: int = 500
    """K, clean actions per noised action [C]."""
    num_log_prob_samples: int = 50
    """N, noises per step in the estimate of log pi [C]."""
    num_candidates: int = 1
    """One: log pi is that of a single draw [C]."""
    num_eval_candidates: int = 10
    """M [C]."""
    exploration: Literal["annealed", "constant", "none"] = "none"
    noisy_target_action: bool = False
    reward_scale: float = 1.0  # [C], as all that follows
    policy_delay: int = 1
    final_actor_learning_rate: float = 0.0
    decay_start: int = 0
    decay_updates: int = 2_000_000
    hidden: tuple[int, ...] = (256, 256)
    chain: DiffusionChain = DiffusionChain(20, betas="cosine")

    sizes = {
        "smoke": dict(
            hidden=(32, 32),
            chain=DiffusionChain(3, betas="cosine"),
            num_proposals=8,
            num_log_prob_samples=2,
            num_eval_candidates=2,
        ),
        "cpu": dict(num_proposals=64, num_log_prob_samples=8),
        "paper": dict(),
    }
    reports = ("loss", "effective_samples")

    # --- The policy ---

    def noise_target(
        self,
        critics: PyTree,
        obs: Float[Array, " obs"],
        a_t: Float[Array, " act"],
        alpha_t: Float[Array, ""],
        sigma_t: Float[Array, ""],
        *,
        key: Key[Array, ""],
    ) -> tuple[Float[Array, " act"], Float[Array, ""]]:
        """The noise in a_t under the policy exp(Q / beta) / Z on the box, and the effective number of proposals."""
        log_density = lambda action: self.q_value(critics, obs, action) / self.temperature
        level: dict[str, Any] = dict(alpha_t=alpha_t, sigma_t=sigma_t, num_samples=self.num_proposals)
        estimate = scores.truncated_score(log_density, a_t, **level, key=key)
        return -sigma_t * estimate.score, estimate.effective_samples

    def actor_loss(self, actor, state, batch, next_actions, *, key):
        noise_key, proposal_key = jr.split(key)
        a_t, steps, alpha_t, sigma_t = self.noised(batch.action, key=noise_key)
        target = lambda *row: self.noise_target(state.target_critics, *row[:-1], key=row[-1])
        rows = (batch.obs, a_t, alpha_t, sigma_t, jr.split(proposal_key, len(a_t)))
        eps, effective = vmap_in_blocks(target, *rows, rows_each=self.num_proposals)
        loss = jnp.mean((jax.vmap(actor)(a_t, steps, batch.obs) - jax.lax.stop_gradient(eps)) ** 2)
        return loss, {"actor/loss": loss, "actor/effective_samples": jnp.mean(effective)}

    # --- Its soft value ---

    def next_values(self, state, next_obs, *, key):
        """min_j Q_target_j(s', a') - beta log pi(a'|s'), and the actions a', one for each s'."""
        action_key, log_prob_key = jr.split(key)
        values, actions = super().next_values(state, next_obs, key=action_key)
        name = "target_actor" if self.bootstrap_with == "target" else self.act_with
        log_probs = self.log_prob(getattr(state, name), next_obs, actions, key=log_prob_key)
        return values - self.temperature * log_probs, actions

    def log_prob(
        self, actor: PyTree, obs: Observations, actions: Actions, *, key: Key[Array, ""]
    ) -> Float[Array, " batch"]:
        """The estimate of log pi(a|s) in the file's head, with the denoised actions clipped to the box [C].

        The squared error of the noise is ab / (1 - ab) times that of the denoised action, which is computed here:
        at the noisiest steps the former is a difference of almost equal numbers, weighted by hundreds.
        """
        alpha_bar = self.chain.tables.alpha_bar
        gain = (np.append(1.0, alpha_bar[:-1]) - alpha_bar) / (2 * (1 - alpha_bar))
        cost = jnp.asarray(gain / (1 - alpha_bar), actions.dtype)
        steps, shares = self.chain.points(), actor.step_shares()
        highest = actions.shape[-1] * (float(np.sum(gain)) - 0.5 * np.log(2 * np.pi * np.e))

        def one(obs, action, key):
            predict = actor.at(obs)

            def error(step, share, key):
                alpha, sigma = self.chain.alpha(step), self.chain.sigma(step)
                a_t = alpha * action[None] + sigma * jr.normal(key, (self.num_log_prob_samples, action.size))
                denoised = (a_t - sigma * jax.vmap(predict, in_axes=(0, None))(a_t, share)) / alpha
                return jnp.mean(jnp.sum((jnp.clip(denoised, -1, 1) - action[None]) ** 2, axis=-1))

            errors = jax.vmap(error)(steps, shares, jr.split(key, self.chain.num_steps))
            return highest - jnp.sum(cost * errors)

        keys = jr.split(key, len(actions))
        return vmap_in_blocks(
            one, obs, actions, keys, rows_each=self.chain.num_steps * self.num_log_prob_samples
        )
