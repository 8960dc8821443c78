"""DPMD: diffusion policy mirror descent.

Ma, Chen, Wang, Li and Dai, "Efficient Online Reinforcement Learning for Diffusion Policy", arXiv 2502.00361 (2025):
the mirror-descent step pi_new(a|s) ~ pi_old(a|s) exp(Q(s, a) / lambda) is projected on diffusions by a denoising
loss on samples of pi_old, each weighted by exp(Q / lambda).

Notation (paper symbol = name here; t = 0 is the action, as in the paper):

    s_theta(a_t; s, t) = actor (as noise)   Q = critics            lambda = temperature
    T = chain.num_steps                     w = weights            N = num_candidates

[P] the paper, [C] its public code, [I] inferred here.

Differs from the paper and its code in:
- The critics' values are standardised before they are weighted. [C] subtracts mean / std where (q - mean) / std is
  meant, a missing bracket; here it is the latter, by running statistics of rate 1e-3 [C].
- The weights' mean over the batch is divided out (`normalize_weights`), which Adam hardly sees [I].
- States in which an episode ended, where no action is taken, have no weight [I].
- Sampling starts from N(0, I), where the chain ends; [C] halves it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from eqgen.algorithms.actor_critic import AbstractDiffusionAgent


class DPMD(AbstractDiffusionAgent):
    """Hyperparameters and methods of DPMD."""

    statistics_rate: float = 1e-3
    """How fast the running mean and deviation of Q follow the batches' [C]."""
    weight_clip: float = 3.0
    """Standardised values are cut at plus and minus this [C]."""
    normalize_weights: bool = True

    reports = ("loss", "weight_max", "temperature")

    def temperature(self, state):
        """lambda: 5 at the beginning, about 1 when the exploration noise is annealed, which it is tied to [C]."""
        return self.noise.std(state.noise) / 0.1

    def actor_loss(self, actor, state, batch, next_actions, *, key):
        q = jax.vmap(lambda s, a: self.q_value(state.critics, s, a))(batch.next_obs, next_actions)
        mean, std = state.memory
        standardised = jnp.clip((q - mean) / (std + 1e-6), -self.weight_clip, self.weight_clip)
        temperature = self.temperature(state)
        weights = jnp.where(batch.terminated, 0.0, jnp.exp(standardised / temperature))
        if self.normalize_weights:
            weights /= jnp.maximum(jnp.mean(weights), 1e-6)  # if no episode of the batch goes on
        loss = self.denoising_loss(actor, batch.next_obs, next_actions, weights, key=key)
        values = (loss, jnp.max(weights), temperature)
        return loss, {f"actor/{name}": value for name, value in zip(self.reports, values, strict=True)}

    def adapt(self, state, batch, *, key):
        state = super().adapt(state, batch, key=key)
        q = jax.vmap(lambda s, a: self.q_value(state.critics, s, a))(batch.obs, batch.action)
        follow = lambda old, new: old + self.statistics_rate * (new - old)
        memory = jax.tree.map(follow, state.memory, (jnp.mean(q), jnp.std(q)))
        return dataclasses.replace(state, memory=memory)

    def initial_memory(self, obs_size, action_size, *, key):
        return jnp.zeros(()), jnp.ones(())
