"""LQL and NC-LQL: soft policies sampled from the critic by Langevin dynamics, without an actor.

Ki, Ahn, Kim and Lee, "Direct Soft-Policy Sampling via Langevin Dynamics", arXiv 2602.07873 (2026). The soft policy
pi_w(a|s) = exp(w Q(s, a)) / Z needs no network: its score is w grad_a Q. `LQL` follows it with plain Langevin
dynamics. `NCLQL` adds a noise level to the critic and anneals: Q(s, a, l) is coarse at l = 0 and sharp at
l = L - 1, the "clean" level, which alone is trained by temporal differences.

Notation (paper symbol = name here):

    Q_i = critics             Q-bar_i = target_critics      w = inverse_temperature     L = num_levels
    sigma_l = sigmas          eta_l = step_sizes            T = steps_per_level         P = num_particles
    K = num_steps (LQL)       epsilon = step_size (LQL)     tau = tau                   gamma = discount

Where each choice comes from: [C] the code released with the paper, [P] the paper's abstract and digests of it,
[I] inferred here, [T] measured by us. We have not seen the body of the paper; its hyperparameters are not known.

`NCLQL(mode="reference")`, the default, is the released algorithm to the letter [C]: gradient of the sum of the
online critics, normalised per sample; two Adam steps an update through one optimiser state; replayed actions
perturbed without clipping; mean of the online critics, before the first of the two steps, as the target of the
noised levels. Its normalisation makes the sampler blind to the scale of Q: w is a ratio of drift to noise, not a
temperature, and modes are visited alike whatever their weight [T].

`NCLQL(mode="boltzmann")` samples exp(w Q) [I]: gradient of the mean of the critics, as it is, and steps in units
of the level's variance, so that w is an inverse temperature. With the released code's budget of 20 steps the chain
is not at its end: the shares of four modes are off by a total variation of .14 to .20, and by .02 to
.04 with `steps_per_level=50` [T].

Differs from the released code in:
- One stack of critics and one optimiser state for it; the two are independent all the same.
- Evaluation draws its noise from a key; the code hashes the observation (field `evaluation_key`).
- Options that are off by default: `joint_loss`, `level_weights`, `temperature="spread"` [I]. The last one lets w
  follow the scale of rewards (on Pendulum, from 150 to 250-330, 70 and 3-6 for rewards times 0.02, 0.2 and 2), but
  returns were no better than with w = 150 at any of these scales (paper_figures/nclql/fig_temperature.py) [T].
LQL is not in the released code. Its equations are the paper's [P]; its number and size of steps, start and
clipping follow NC-LQL's [I].
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key

from eqgen.algorithms.base import AbstractAgent, gradient_step, vector_sizes
from eqgen.losses import critic_loss, squared_error, td_target
from eqgen.networks.critics import NoiseConditionedQEnsemble, QEnsemble
from eqgen.samplers import annealed_langevin, clip_to_box, geometric_levels, langevin
from eqgen.tree import polyak, tree_copy
from eqgen.types import Metrics, Transition


Critics = Any  # a QEnsemble, a NoiseConditionedQEnsemble, or something with the same methods
CleanCritics = Callable[[Float[Array, " obs"], Float[Array, " act"]], Float[Array, " size"]]

_SPREAD_ROWS = 32  # states of a batch whose spread of actions is measured


class LangevinState(eqx.Module):
    """Everything that evolves."""

    critics: Critics
    target_critics: Critics
    opt_state: optax.OptState
    log_inverse_temperature: Float[Array, ""]
    action_size: int = eqx.field(static=True)
    step: Int[Array, ""]


class AbstractLangevinAgent(AbstractAgent):
    """What the two algorithms share: act by a chain on Q, learn Q by temporal differences from such actions."""

    temperature: eqx.AbstractVar[Literal["fixed", "spread"]]
    target_spread: eqx.AbstractVar[float]
    temperature_learning_rate: eqx.AbstractVar[float]
    num_particles: eqx.AbstractVar[int]
    evaluation_key: eqx.AbstractVar[Literal["given", "observation"]]
    discount: eqx.AbstractVar[float]
    reward_scale: eqx.AbstractVar[float]
    tau: eqx.AbstractVar[float]
    learning_rate: eqx.AbstractVar[float]

    evaluation_policy = "stochastic: the sampler that also collects the data"

    def __check_init__(self):
        if self.num_particles < 1:
            raise ValueError(f"num_particles is {self.num_particles}; an action takes at least 1.")
        if not self.initial_inverse_temperature > 0:
            raise ValueError(
                f"inverse_temperature is {self.initial_inverse_temperature}; it must be positive (a small one is "
                "nearly uniform)."
            )
        if not self.target_spread > 0:
            raise ValueError(f"target_spread is {self.target_spread}; a standard deviation must be positive.")

    # --- What differs ---

    @abstractmethod
    def chain(
        self,
        critics: Critics,
        inverse_temperature: Float[Array, ""],
        obs: Float[Array, " obs"],
        start: Float[Array, " act"],
        *,
        key: Key[Array, ""],
    ) -> tuple[Float[Array, " act"], Float[Array, "steps act"]]:
        """The end of a Langevin chain from `start` under the critics at `obs`, and its path."""

    @abstractmethod
    def clean(self, critics: Critics) -> CleanCritics:
        """The critics of actions without noise."""

    @abstractmethod
    def fit(
        self, state: LangevinState, batch: Transition, target: Float[Array, " batch"], *, key: Key[Array, ""]
    ) -> tuple[Critics, optax.OptState, Metrics]:
        """The critics after their step, or steps, towards the temporal-difference target."""

    @property
    @abstractmethod
    def initial_inverse_temperature(self) -> float:
        """w at the beginning."""

    # --- Acting ---

    def sample(
        self, state: LangevinState, obs: Float[Array, " obs"], *, key: Key[Array, ""]
    ) -> Float[Array, " act"]:
        """One action: the end of a chain from a uniform start; of several chains, the one that min_i Q_i of
        the online critics values most [C]."""
        w = jnp.exp(state.log_inverse_temperature)

        def particle(key):
            start_key, chain_key = jr.split(key)
            start = jr.uniform(start_key, (state.action_size,), minval=-1.0, maxval=1.0)
            return self.chain(state.critics, w, obs, start, key=chain_key)[0]

        if self.num_particles == 1:
            return particle(key)
        actions = jax.vmap(particle)(jr.split(key, self.num_particles))
        critics = self.clean(state.critics)
        values = jax.vmap(lambda action: jnp.min(critics(obs, action)))(actions)
        return actions[jnp.argmax(values)]

    def act(self, state, obs, *, key, explore):
        if self.evaluation_key == "observation" and not explore:
            bits = jax.lax.bitcast_convert_type(
                (jnp.mean(obs) * jnp.std(obs)).astype(jnp.float32), jnp.uint32
            )
            key = jr.key(bits)
        return self.sample(state, obs, key=key)

    # --- Updates ---

    def update(self, state, batch, *, key):
        action_key, spread_key, fit_key = jr.split(key, 3)
        action_keys = jr.split(action_key, len(batch.reward))
        next_actions = jax.vmap(lambda s, k: self.sample(state, s, key=k))(batch.next_obs, action_keys)
        target_critics = self.clean(state.target_critics)
        next_q = jax.vmap(lambda s, a: jnp.min(target_critics(s, a)))(batch.next_obs, next_actions)
        y = td_target(batch, next_q, discount=self.discount, reward_scale=self.reward_scale)
        critics, opt_state, metrics = self.fit(state, batch, y, key=fit_key)
        log_w = state.log_inverse_temperature
        if self.temperature == "spread":
            spread = self.spread(state, batch.next_obs, next_actions, key=spread_key)
            log_w += self.temperature_learning_rate * jnp.log(spread / self.target_spread)
            metrics["action_spread"] = spread
        metrics |= {
            "inverse_temperature": jnp.exp(log_w),
            "saturation": jnp.mean(jnp.abs(next_actions) == 1.0),
        }
        target_critics = polyak(state.target_critics, critics, self.tau)
        step = state.step + 1
        return LangevinState(critics, target_critics, opt_state, log_w, state.action_size, step), metrics

    def spread(self, state, obs, actions, *, key) -> Float[Array, ""]:
        """The policy's standard deviation per state and dimension, from a second action for a few states."""
        rows = min(_SPREAD_ROWS, len(obs))
        again = jax.vmap(lambda s, k: self.sample(state, s, key=k))(obs[:rows], jr.split(key, rows))
        return jnp.sqrt(jnp.mean((again - actions[:rows]) ** 2) / 2 + 1e-12)

    # --- Initial state ---

    def from_networks(self, critics: Critics, action_size: int) -> LangevinState:
        """A fresh state around critics of your own, with the methods of those that `init` makes."""
        return LangevinState(
            critics=critics,
            target_critics=tree_copy(critics),
            opt_state=optax.adam(self.learning_rate).init(eqx.filter(critics, eqx.is_inexact_array)),
            log_inverse_temperature=jnp.log(jnp.array(self.initial_inverse_temperature, float)),
            action_size=action_size,
            step=jnp.zeros((), jnp.int32),
        )


class LQL(AbstractLangevinAgent):
    """Langevin Q-learning: a_k = clip(a_{k-1} + (epsilon / 2) w grad Q + sqrt(epsilon) z) [P, I]."""

    inverse_temperature: float = 60.0
    """w of exp(w Q), Q the mean of the critics; in units of 1 / (`reward_scale` times return)."""
    num_steps: int = 20
    """K, as many steps as NC-LQL takes [I]."""
    step_size: float = 0.01
    """epsilon. Stable where (epsilon / 2) w times the curvature of Q is below 2."""
    num_particles: int = 1
    """P chains an action, of which the best by min_i Q_i is taken."""
    temperature: Literal["fixed", "spread"] = "fixed"
    """"spread" adapts w until actions have `target_spread`; an extension [I]."""
    target_spread: float = 0.3
    """Standard deviation of actions per state and dimension, in units of the box [-1, 1]."""
    temperature_learning_rate: float = 1e-3
    evaluation_key: Literal["given", "observation"] = "given"
    discount: float = 0.99
    reward_scale: float = 0.2
    tau: float = 0.005
    """Share of the online critics that enters the target critics at each update."""
    learning_rate: float = 1e-4
    hidden: tuple[int, ...] = (256, 256, 256)
    activation: str = "mish"

    sizes = {
        "smoke": dict(hidden=(32, 32), num_steps=3),
        "cpu": dict(hidden=(256, 256)),
        "paper": dict(),
    }

    def __check_init__(self):
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; a chain takes at least 1.")
        if not self.step_size > 0:
            raise ValueError(f"step_size is {self.step_size}; it must be positive.")

    @property
    def initial_inverse_temperature(self):
        return self.inverse_temperature

    def chain(self, critics, inverse_temperature, obs, start, *, key):
        q = critics.at(obs)
        score = lambda a: inverse_temperature * jax.grad(lambda a: jnp.mean(q(a)))(a)
        step_sizes = jnp.full(self.num_steps, self.step_size)
        return langevin(score, start, step_sizes, project=clip_to_box(), key=key)

    def clean(self, critics):
        return critics

    def fit(self, state, batch, target, *, key):
        grads, metrics = eqx.filter_grad(critic_loss, has_aux=True)(state.critics, batch, target)
        optimizer = optax.adam(self.learning_rate)
        return *gradient_step(optimizer, state.critics, state.opt_state, grads), metrics

    def init(self, example, *, key):
        obs_size, action_size = vector_sizes(example)
        shape = (obs_size, action_size, self.hidden, self.activation, "truncated_normal")
        return self.from_networks(QEnsemble(*shape, key=key), action_size)


class NCLQL(AbstractLangevinAgent):
    """Noise-conditioned Langevin Q-learning, in two modes; see the head of this file."""

    mode: Literal["reference", "boltzmann"] = "reference"
    """The released algorithm [C], or a sampler of exp(w Q) [I]."""
    # The sampler
    num_levels: int = 10
    """L, the clean level included."""
    steps_per_level: int = 2
    """T."""
    inverse_temperature: float | None = None
    """w. None: 500 in reference mode [C]; in Boltzmann mode 150, per unit of `reward_scale` times return [T]."""
    sigma_max: float | None = None
    """sigma_0, in units of the box [-1, 1]. None: 0.1 in reference mode [C], 0.5 in Boltzmann mode [T]."""
    sigma_min: float | None = None
    """sigma_{L-1}. None: 0.001 in reference mode [C], 0.02 in Boltzmann mode [T]."""
    step_ratio: float | None = None
    """eta_l / sigma_l^2. None: 100 in reference mode (the code's step_lr = 1e-4 over sigma_min^2 [C]), 0.3 in
    Boltzmann mode, about the largest that keeps the shape of a mode [T]."""
    num_particles: int = 1
    """P chains an action, of which the best by min_i Q_i is taken [C]."""
    temperature: Literal["fixed", "spread"] = "fixed"
    """"spread" adapts w until actions have `target_spread`; an extension of Boltzmann mode [I]."""
    target_spread: float = 0.3
    """Standard deviation of actions per state and dimension, in units of the box [-1, 1]."""
    temperature_learning_rate: float = 1e-3
    evaluation_key: Literal["given", "observation"] = "given"
    """Whose noise evaluation draws: the caller's, or one hashed from the observation as the code does [C]."""
    # Learning
    joint_loss: bool = False
    """One Adam step on the sum of the two losses instead of two steps, one after the other [I]."""
    level_weights: tuple[float, ...] | None = None
    """Weights of the noised levels 0, ..., L - 2 in their loss; None weighs all the same [C]."""
    discount: float = 0.99
    reward_scale: float = 0.2
    """What rewards are multiplied by before they reach the critics [C]."""
    tau: float = 0.005
    """Share of the online critics that enters the target critics at each update."""
    learning_rate: float = 1e-4
    hidden: tuple[int, ...] = (256, 256, 256)
    activation: str = "mish"

    sizes = {
        "smoke": dict(hidden=(32, 32), num_levels=3, steps_per_level=1),
        "cpu": dict(hidden=(256, 256)),
        "paper": dict(),
    }

    def __check_init__(self):
        if self.num_levels < 2:
            raise ValueError(
                f"num_levels is {self.num_levels}; it takes a noised and a clean level, 2 or more."
            )
        if self.steps_per_level < 1:
            raise ValueError(f"steps_per_level is {self.steps_per_level}; it must be at least 1.")
        low, high = self.sigma_range
        if not 0 < low < high:
            raise ValueError(f"sigma_min is {low} and sigma_max {high}; 0 < sigma_min < sigma_max is needed.")
        if self.step_ratio is not None and not self.step_ratio > 0:
            raise ValueError(f"step_ratio is {self.step_ratio}; it must be positive.")
        if self.mode == "reference" and self.temperature != "fixed":
            raise ValueError(
                f"temperature={self.temperature!r} needs mode='boltzmann': in reference mode the gradient is "
                "normalised and w is no temperature."
            )
        if self.level_weights is not None and len(self.level_weights) != self.num_levels - 1:
            raise ValueError(
                f"level_weights has {len(self.level_weights)} entries; the noised levels 0, ..., L - 2 are "
                f"{self.num_levels - 1}."
            )

    @classmethod
    def boltzmann(cls, **overrides: Any) -> Self:
        """The mode that samples exp(w Q) [I]."""
        overrides.setdefault("mode", "boltzmann")
        return cls(**overrides)

    @classmethod
    def profiles(cls) -> Mapping[str, Self]:
        return {"default": cls(), "reference": cls(), "boltzmann": cls.boltzmann()}

    # --- The noise ladder ---

    def _resolved(self, name, reference, boltzmann):
        given = getattr(self, name)
        return given if given is not None else (reference if self.mode == "reference" else boltzmann)

    @property
    def initial_inverse_temperature(self):
        return self._resolved("inverse_temperature", 500.0, 150.0)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """sigma_{L-1} and sigma_0."""
        return self._resolved("sigma_min", 0.001, 0.02), self._resolved("sigma_max", 0.1, 0.5)

    @property
    def sigmas(self) -> Float[Array, " levels"]:
        """Standard deviation of the noise at each level, coarse to fine."""
        sigma_min, sigma_max = self.sigma_range
        return geometric_levels(self.num_levels, sigma_max, sigma_min)

    @property
    def step_sizes(self) -> Float[Array, " levels"]:
        """eta_l."""
        return self._resolved("step_ratio", 100.0, 0.3) * self.sigmas**2

    # --- Sampling ---

    def chain(self, critics, inverse_temperature, obs, start, *, key):
        q = critics.at(obs)

        def drift(a, level_share):
            gradient = jax.grad(lambda a: jnp.sum(q(a, level_share)))(a)
            if self.mode == "boltzmann":
                return inverse_temperature / critics.size * gradient
            return inverse_temperature * gradient / (jnp.sqrt(jnp.sum(gradient**2)) + 1e-8)

        return annealed_langevin(
            drift,
            start,
            critics.level_shares(),
            self.step_sizes,
            steps_per_level=self.steps_per_level,
            project=clip_to_box(),
            key=key,
        )

    def clean(self, critics):
        return critics.at_level(self.num_levels - 1)

    # --- Learning ---

    def clean_loss(
        self, critics: Critics, batch: Transition, target: Float[Array, " batch"]
    ) -> tuple[Float[Array, ""], tuple[Metrics, Float[Array, " batch"]]]:
        """Temporal differences at the clean level; beside the metrics the mean over the critics, which the
        noised levels regress on."""
        q = jax.vmap(self.clean(critics))(batch.obs, batch.action)
        loss, metrics = squared_error(q, target)
        return loss, (metrics, jnp.mean(q, axis=1))

    def perturbed(
        self, actions: Float[Array, "batch act"], *, key: Key[Array, ""]
    ) -> tuple[Float[Array, "batch act"], Int[Array, " batch"]]:
        """Replayed actions with the noise of a level drawn from 0, ..., L - 2, not clipped, and the levels."""
        level_key, noise_key = jr.split(key)
        levels = jr.randint(level_key, (len(actions),), 0, self.num_levels - 1)
        return actions + self.sigmas[levels][:, None] * jr.normal(noise_key, actions.shape), levels

    def noised_loss(
        self,
        critics: Critics,
        obs: Float[Array, "batch obs"],
        noised: Float[Array, "batch act"],
        levels: Int[Array, " batch"],
        clean_q: Float[Array, " batch"],
    ) -> Float[Array, ""]:
        """Regression of Q(s, a + sigma_l z, l) on the clean value of a."""
        q = jax.vmap(critics)(obs, noised, critics.embeddings()[levels])
        squared = (q - jax.lax.stop_gradient(clean_q)[:, None]) ** 2
        if self.level_weights is not None:
            squared *= jnp.asarray(self.level_weights)[levels][:, None]
        return jnp.sum(jnp.mean(squared, axis=0))

    def fit(self, state, batch, target, *, key):
        optimizer = optax.adam(self.learning_rate)
        critics, opt_state = state.critics, state.opt_state
        noised, levels = self.perturbed(batch.action, key=key)
        grads, (metrics, clean_q) = eqx.filter_grad(self.clean_loss, has_aux=True)(critics, batch, target)
        if not self.joint_loss:
            critics, opt_state = gradient_step(optimizer, critics, opt_state, grads)
        loss_and_grad = eqx.filter_value_and_grad(self.noised_loss)
        noised_loss, noised_grads = loss_and_grad(critics, batch.obs, noised, levels, clean_q)
        if self.joint_loss:
            noised_grads = jax.tree.map(jnp.add, grads, noised_grads)
        critics, opt_state = gradient_step(optimizer, critics, opt_state, noised_grads)
        return critics, opt_state, metrics | {"critic/noised_loss": noised_loss}

    def init(self, example, *, key):
        obs_size, action_size = vector_sizes(example)
        shape = (obs_size, action_size, self.num_levels, self.hidden, self.activation)
        return self.from_networks(NoiseConditionedQEnsemble(*shape, key=key), action_size)
