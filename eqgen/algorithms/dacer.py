"""DACER: diffusion actor-critic with entropy regulator.

Wang, Wang, Jiang, Zou, Liu, Song, Wang, Xiao, Wu, Duan and Li, "Diffusion Actor-Critic with Entropy Regulator",
arXiv 2405.15177 (2024): the reverse chain of a diffusion is the policy, and its network ascends Q at the action, by
the derivative through all steps of the chain. Noise on that action explores. Its size is regulated: by a target for
the entropy of the noisy action, which a Gaussian mixture that is fitted to samples measures now and then.

Notation (paper symbol = name here; t = 0 is the action, as in the paper):

    epsilon_theta(a_t, s, t) = actor     Q = critics                    T = chain.num_steps
    lambda alpha = noise.std             H bar = noise.target_entropy   H hat = memory (both per dimension)
    N = num_entropy_samples              K = num_modes

[P] the paper's abstract, [S] a summary of the paper (we have not seen its full text), [C] its authors' public code,
[L] the code of SDAC's authors (Ma et al., arXiv 2502.00361), where DACER is a baseline, [I] inferred here, [T]
tested here.

Differs from the paper and its code in:
- The critics: the frame's twin critics, regressed by squared errors, as in the paper's own equations [S] and one
  variant in [L]. [C] has the distributional critics of DSAC, which learn a deviation beside each mean.
- The entropy estimate: pure JAX, a fixed number of steps (`eqgen.entropy`). [C] calls scikit-learn on the host. For
  one Gaussian the method's 200 samples and 3 modes are off by 0.57 nats in 1 or 2 dimensions, -1.7 in 17 [T].
- lambda is no field, since Adam in log(alpha) does not see it: lambda alpha begins at `noise.initial_std`, which is
  0.1 x 3 [C]; for HalfCheetah and Humanoid lambda is 0.15 [C], so `noise=AnnealedNoise(0.45, -0.9, 10_000, 3e-2)`.
- Steps of the chain have the posterior variance, as in [C]; the paper's equation has beta_t [S].
- Evaluation draws from the policy, without the noise; [C] does so by a key that it computes from the observation.
- [L] takes other betas, starts chains from half of N(0, I), and has the learning rates of the profile
  "common-rates"; by default all is as in [C].

Pendulum, nets of 2 x 64, one seed, 10,000 updates: a return of -590 by the rates of [C] and -120 by those of [L],
the latter above -250 after 7,000 updates [T]. The rates of [C] are meant for some million updates.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, PyTree

from eqgen.algorithms.actor_critic import AbstractDiffusionAgent, ActorCriticState, Observations
from eqgen.entropy import mixture_entropy
from eqgen.exploration import AnnealedNoise
from eqgen.timesteps.times import DiffusionChain
from eqgen.tree import filter_cond, shared, vmap_in_blocks


class DACER(AbstractDiffusionAgent):
    """Hyperparameters and methods of DACER. `exploration="annealed"` is the regulated noise."""

    noise: AnnealedNoise = AnnealedNoise(0.3, target_entropy=-0.9, period=10_000, learning_rate=3e-2)
    """lambda alpha at the beginning, the target in nats per dimension, the updates from one estimate of the entropy
    to the next, and Adam's rate in log(alpha) [C, S]."""
    num_entropy_samples: int = 200
    """N, actions per observation of the batch [C, S]."""
    num_modes: int = 3
    """K, Gaussians in the mixture [C, S]."""
    num_candidates: int = 1
    """The policy is not improved upon by a choice [C]."""
    num_eval_candidates: int = 1
    critic_learning_rate: float = 1e-4  # [C], as the next two: no decay
    actor_learning_rate: float = 1e-4
    final_actor_learning_rate: float = 1e-4
    chain: DiffusionChain = DiffusionChain(20, betas="vp", beta_range=(1e-4, 0.01))
    """Its steps; rates from 0.1 to 10 [C]."""

    sizes = {
        "smoke": dict(hidden=(32, 32), chain=DiffusionChain(3, betas="cosine"), num_entropy_samples=8),
        "cpu": dict(hidden=(256, 256)),
        "paper": dict(),
    }
    evaluation_policy = (
        "stochastic: best of num_eval_candidates samples (one by default), no exploration noise"
    )
    reports = ("loss", "entropy")

    @classmethod
    def profiles(cls) -> Mapping[str, Self]:
        """The authors' learning rates ("default"), and those by which [L] compares it with other methods."""
        rates: dict[str, Any] = dict(
            critic_learning_rate=3e-4, actor_learning_rate=3e-4, final_actor_learning_rate=3e-5
        )
        return {"default": cls(), "common-rates": cls(**rates)}

    def noisy_sample(
        self, actor: PyTree, state: ActorCriticState, obs: Float[Array, " obs"], *, key: Key[Array, ""]
    ) -> Float[Array, " act"]:
        """One action with its exploration noise."""
        sample_key, noise_key = jr.split(key)
        action = self.sample(actor, state.critics, obs, key=sample_key)
        return self.explore(state, action, key=noise_key)

    def actor_loss(self, actor, state, batch, next_actions, *, key):
        """-min_j Q_j at noisy actions [C], down the chain; where the box clips an action its derivative is 0."""

        def value(obs, key):
            return self.q_value(state.critics, obs, self.noisy_sample(actor, state, obs, key=key))

        loss = -jnp.mean(jax.vmap(value)(batch.obs, jr.split(key, len(batch.obs))))
        return loss, {"actor/loss": loss, "actor/entropy": state.memory}

    def adapt(self, state, batch, *, key):
        """At the first update and every `noise.period` later the entropy is estimated and the noise moves [C]."""
        due = shared(state.step) % self.noise.period == 0
        return filter_cond(due, partial(self.regulated, obs=batch.obs, key=key), lambda state: state, state)

    def regulated(
        self, state: ActorCriticState, *, obs: Observations, key: Key[Array, ""]
    ) -> ActorCriticState:
        """The state after one estimate of the entropy and one step of the noise."""
        entropy = self.entropy(state, obs, key=key)
        return dataclasses.replace(state, noise=self.noise.corrected(state.noise, entropy), memory=entropy)

    def entropy(self, state: ActorCriticState, obs: Observations, *, key: Key[Array, ""]) -> Float[Array, ""]:
        """The mean over observations of the noisy policy's entropy, in nats per dimension."""

        def one(obs, key):
            draw_key, fit_key = jr.split(key)
            draw = lambda key: self.noisy_sample(state.actor, state, obs, key=key)
            actions = jax.vmap(draw)(jr.split(draw_key, self.num_entropy_samples))
            return mixture_entropy(actions, self.num_modes, key=fit_key) / actions.shape[1]

        keys = jr.split(key, len(obs))
        return jnp.mean(vmap_in_blocks(one, obs, keys, rows_each=self.num_entropy_samples))

    def initial_memory(self, obs_size, action_size, *, key):
        return jnp.zeros(())
