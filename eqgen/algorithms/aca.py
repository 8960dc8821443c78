"""ACA: actor-critic without an actor; a noise-level critic denoises actions.

Ki, Ahn, Kim and Lee, "Actor-Critic without Actor", arXiv 2509.21022 (2025). A critic Q(s, a_t, t) of noised
actions takes the place of the actor: in the reverse process of a diffusion, its gradient in a_t is the prediction
of the noise. At t = 0, the clean action, the critic learns by temporal differences; at other levels it regresses on
its own value of the clean action.

Notation (paper symbol = name here; t = 0 is the action, as in the paper):

    Q_phi(s, a_t, t) = critics        w = guidance_weight         T = chain.num_steps
    sigma_t = guidance_stds           K = num_particles           c_r = reward_scale

[P] the paper's abstract and introduction, [S] public reviews of it, [C] its public code, [I] inferred here, [T]
tested here. We have not seen the paper's equations.

The noise prediction is -w sigma_t g / |g|, g the gradient of the sum of the critics and sigma_t the standard
deviation of the reverse step [C]. The norm of g does not count: with w = 50 the denoised action is moved along g by
0.6 in the last step but one, by 22 half-way, by 20,000 in the first, and then cut to the box [T]. In the last step
sigma_t is 0: it asks the critics nothing and clips what is left.

Differs from the paper and its code in:
- The clean level (field `clean_level`). Counting t = 0 for clean actions and 1, ..., T for noised ones, as the
  paper does [S], the critic has T + 1 levels. [C] counts the noised ones from 0, so that its level 0 learns the
  values both of clean actions and of actions with noise of deviation 0.09. No gradient is asked of either.
- The chosen action is cut to the box after the exploration noise, also in the target; [C] leaves it outside, and
  adds noise only if there is more than one particle.
- Evaluation draws its noise from a key; [C] hashes the observation.
- One stack of critics and one optimiser state for it; the two are independent all the same.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from eqgen.algorithms.base import AbstractAgent, gradient_step, vector_sizes
from eqgen.exploration import AnnealedNoise, NoiseState, add_noise
from eqgen.losses import squared_error, td_target
from eqgen.networks.critics import NoiseConditionedQEnsemble
from eqgen.samplers import ddpm, uniform_grid
from eqgen.timesteps.times import DiffusionChain
from eqgen.tree import filter_cond, polyak, shared, tree_copy, vmap_in_blocks
from eqgen.types import Metrics, Transition


class ACAState(eqx.Module):
    """Everything that evolves. `noised_loss` is the report of the last step on the noised levels."""

    critics: NoiseConditionedQEnsemble
    target_critics: NoiseConditionedQEnsemble
    opt_state: optax.OptState
    noise: NoiseState
    noised_loss: Float[Array, ""]
    action_size: int = eqx.field(static=True)
    step: Int[Array, ""]


class ACA(AbstractAgent):
    """Hyperparameters and methods of ACA."""

    # The sampler
    chain: DiffusionChain = DiffusionChain(20, betas="cosine")
    """The steps of the diffusion [C]."""
    guidance_weight: float = 50.0
    """w; 60 for Humanoid [C]."""
    num_particles: int = 32
    """Chains per action, of which the one that min_j Q_j of the clean level values most is taken [C]."""
    clean_level: Literal["own", "shared"] = "own"
    """Whether clean actions have a level of their own [P], or that of the first step of the chain [C]."""
    # Learning
    noised_delay: int = 2
    """Steps on the temporal difference per step on the noised levels [C]."""
    discount: float = 0.99
    """gamma, in [0, 1)."""
    reward_scale: float = 0.2
    """c_r, what rewards are multiplied by before they reach the critics [C]."""
    tau: float = 0.005
    """Share of the online critics that enters the target critics at each update [C]."""
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-4
    decay_start: int = 25_000
    """The step of the optimiser, which takes one or two an update, at which its rate begins to fall [C]."""
    decay_steps: int = 50_000
    """How many steps it takes to fall [C]."""
    noise: AnnealedNoise = AnnealedNoise()
    """Exploration noise on the chosen action; also on that of the target [C]."""
    hidden: tuple[int, ...] = (256, 256, 256)
    activation: str = "mish"

    sizes = {
        "smoke": dict(hidden=(32, 32), chain=DiffusionChain(3, betas="cosine"), num_particles=2),
        "cpu": dict(hidden=(256, 256), num_particles=8),
        "paper": dict(),
    }
    evaluation_policy = "stochastic: best of num_particles chains, no exploration noise"

    def __check_init__(self):
        for name in ("num_particles", "noised_delay"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")

    @property
    def num_levels(self) -> int:
        """Levels of the critic: that of the chain's step k is `num_levels - num_steps + k`, the clean one is 0."""
        return self.chain.num_steps + (1 if self.clean_level == "own" else 0)

    # --- Acting ---

    @property
    def guidance_stds(self) -> Float[Array, " steps"]:
        """sigma_t: the deviations of the steps of the reverse process; that of its last step, k = 0, is 0."""
        beta, alpha_bar, _ = self.chain.tables
        before = np.append(1.0, alpha_bar[:-1])
        return jnp.asarray(np.sqrt(beta * (1 - before) / (1 - alpha_bar)), float)

    def denoised(
        self,
        q: Callable[[Float[Array, " act"], Float[Array, "size width"]], Float[Array, " size"]],
        shares: Float[Array, "steps size width"],
        start: Float[Array, " act"],
        *,
        key: Key[Array, ""],
    ) -> Float[Array, " act"]:
        """The end of a reverse process guided by the critics.

        **Arguments:**

        - `q`: the values of a noised action and a row of `shares`, as `critics.at(obs)` makes them.
        - `shares`: what each step's level adds to the first layer of the critics.
        - `start`: a draw of N(0, I).
        """
        schedule, stds, num_steps = self.chain.schedule, self.guidance_stds, self.chain.num_steps

        def denoise(x, t):
            step = jnp.round(t * num_steps).astype(jnp.int32) - 1
            gradient = jax.grad(lambda a: jnp.sum(q(a, shares[step])))(x)
            unit = gradient / (jnp.sqrt(jnp.sum(gradient**2)) + 1e-8)
            eps = -self.guidance_weight * stds[step] * unit
            return jnp.clip((x - schedule.sigma(t) * eps) / schedule.alpha(t), -1, 1)

        x = ddpm(denoise, start, uniform_grid(num_steps)[:-1], schedule, key=key)[0]
        return jnp.clip(x / schedule.alpha(1 / num_steps), -1, 1)  # the last step, where sigma_t is 0

    def sample(
        self, state: ACAState, obs: Float[Array, "batch obs"], *, keys: Key[Array, " batch"]
    ) -> Float[Array, "batch act"]:
        """For each observation the best of the particles."""
        shares, clean = state.critics.level_shares(), state.critics.at_level(0)
        shares = shares[-self.chain.num_steps :]

        def one(obs, key):
            q, shape = state.critics.at(obs), (self.num_particles, state.action_size)
            start_key, chain_key = jr.split(key)
            particle = lambda start, key: self.denoised(q, shares, start, key=key)
            actions = jax.vmap(particle)(jr.normal(start_key, shape), jr.split(chain_key, self.num_particles))
            return actions[jnp.argmax(jax.vmap(lambda action: jnp.min(clean(obs, action)))(actions))]

        return vmap_in_blocks(one, obs, keys, rows_each=self.num_particles)

    def act(self, state, obs, *, key, explore):
        sample_key, noise_key = jr.split(key)
        action = self.sample(state, obs[None], keys=sample_key[None])[0]
        return add_noise(action, self.noise.std(state.noise), key=noise_key) if explore else action

    # --- Learning ---

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam with a linear decay, counted in its own steps."""
        rates = (self.learning_rate, self.final_learning_rate)
        return optax.adam(optax.linear_schedule(*rates, self.decay_steps, self.decay_start))

    def next_values(
        self, state: ACAState, next_obs: Float[Array, "batch obs"], *, key: Key[Array, ""]
    ) -> Float[Array, " batch"]:
        """min_j Q_target_j(s', a', 0), a' as the behaviour would act."""
        sample_keys, noise_keys = jr.split(key, (2, len(next_obs)))
        noisy = lambda action, key: add_noise(action, self.noise.std(state.noise), key=key)
        actions = jax.vmap(noisy)(self.sample(state, next_obs, keys=sample_keys), noise_keys)
        return jnp.min(jax.vmap(state.target_critics.at_level(0))(next_obs, actions), axis=1)

    def clean_loss(
        self, critics: NoiseConditionedQEnsemble, batch: Transition, target: Float[Array, " batch"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Temporal differences at the clean level."""
        return squared_error(jax.vmap(critics.at_level(0))(batch.obs, batch.action), target)

    def noised_loss(
        self, critics: NoiseConditionedQEnsemble, batch: Transition, *, key: Key[Array, ""]
    ) -> Float[Array, ""]:
        """Regression of Q(s, a_t, t), t a random step of the chain, on the mean of the critics' clean values."""
        step_key, noise_key = jr.split(key)
        steps = jr.randint(step_key, (len(batch.action),), 0, self.chain.num_steps)
        eps = jr.normal(noise_key, batch.action.shape)
        noised = jax.vmap(self.chain.perturb)(batch.action, eps, steps)
        target = jnp.mean(jax.vmap(critics.at_level(0))(batch.obs, batch.action), axis=1)
        embeddings = critics.embeddings()[-self.chain.num_steps :]
        q = jax.vmap(critics)(batch.obs, noised, embeddings[steps])
        return squared_error(q, jax.lax.stop_gradient(target))[0]

    def noised_step(self, state: ACAState, *, batch: Transition, key: Key[Array, ""]) -> ACAState:
        """The state after a step on the noised levels."""
        loss, grads = eqx.filter_value_and_grad(self.noised_loss)(state.critics, batch, key=key)
        critics, opt_state = gradient_step(self.optimizer, state.critics, state.opt_state, grads)
        return dataclasses.replace(state, critics=critics, opt_state=opt_state, noised_loss=loss)

    def update(self, state, batch, *, key):
        value_key, noised_key = jr.split(key)
        next_values = self.next_values(state, batch.next_obs, key=value_key)
        y = td_target(batch, next_values, discount=self.discount, reward_scale=self.reward_scale)
        grads, metrics = eqx.filter_grad(self.clean_loss, has_aux=True)(state.critics, batch, y)
        critics, opt_state = gradient_step(self.optimizer, state.critics, state.opt_state, grads)
        state = dataclasses.replace(state, critics=critics, opt_state=opt_state)
        noised = partial(self.noised_step, batch=batch, key=noised_key)
        due = shared(state.step) % self.noised_delay == 0
        state = noised(state) if self.noised_delay == 1 else filter_cond(due, noised, lambda s: s, state)
        state = dataclasses.replace(
            state,
            target_critics=polyak(state.target_critics, state.critics, self.tau),
            noise=self.noise.update(state.noise, state.step),
            step=state.step + 1,
        )
        metrics |= {"critic/noised_loss": state.noised_loss, "noise_std": self.noise.std(state.noise)}
        return state, metrics

    # --- Initial state ---

    def init(self, example, *, key):
        obs_size, action_size = vector_sizes(example)
        shape = (obs_size, action_size, self.num_levels, self.hidden, self.activation)
        return self.from_networks(NoiseConditionedQEnsemble(*shape, key=key), action_size)

    def from_networks(self, critics: Any, action_size: int) -> ACAState:
        """A fresh state around critics of your own, with the methods of those that `init` makes."""
        return ACAState(
            critics=critics,
            target_critics=tree_copy(critics),
            opt_state=self.optimizer.init(eqx.filter(critics, eqx.is_inexact_array)),
            noise=self.noise.init(),
            noised_loss=jnp.zeros(()),
            action_size=action_size,
            step=jnp.zeros((), jnp.int32),
        )
