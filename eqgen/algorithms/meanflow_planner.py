"""MeanFlow planner: a trained diffusion planner distilled into one whose plans cost one network evaluation.

Geng, Deng, Bai, Kolter and He, "Mean Flows for One-step Generative Modeling", arXiv 2505.13447 (2025), applied to
plans [I]. The decoder of a diffusion planner follows the probability flow dx/dt = v(x, t) from noise (t = 1) to a
plan (t = 0). Its average velocity u(x, r, t) over [r, t] obeys the MeanFlow identity (`eqgen.meanflow`), by which
a network learns it from the teacher's v alone, without solving the flow. A plan is then z - u(z, 0, 1), and its
latent what it was: `PriorGuidance(planner=MeanFlowPlanner(...))` learns a prior on top.

Notation (paper symbol = name here):

    u_theta = mean_velocity    v = velocity (the teacher's)    r, t = the interval    e = latent

Differs from the paper in:
- The velocity is a trained planner's, where the paper has the conditional one of each pair of data and noise [I].
- The path is the teacher's (variance preserving), where the paper's is straight [I].
- Row 0 of a plan, the state it begins at, stands still: both velocities are 0 there [I].
- Intervals are SOM's, a tenth of which reach either end [I]; see `meanflow.sample_uniform_interval`. Any timestep
  sampler can take their place, also one that learns (`timesteps`); its look-ahead reward counts the squared error.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, Scalar

from eqgen import meanflow, samplers
from eqgen.algorithms.base import AbstractPlanLearner, Size, Trained, averaging_rate
from eqgen.algorithms.planner import Action, DiffusionPlanner, PlannerState, States
from eqgen.data.normalizer import Normalizer
from eqgen.guidance import AbstractGuidance, Obs, Plan, Unconditional
from eqgen.meanflow import Interval
from eqgen.networks.temporal import MeanVelocityDiT1D
from eqgen.parameterizations import convert
from eqgen.timesteps.base import AbstractTimestepSampler, Draw
from eqgen.timesteps.times import FlowIntervals
from eqgen.types import Metrics


class MeanFlowPlannerState(eqx.Module):
    """The teacher, which stays as it is, and what learns from it."""

    teacher: PlannerState
    mean_velocity: Trained
    timesteps: PyTree
    """What a timestep sampler carries along; None without one."""
    step: Int[Array, ""]

    @property
    def normalizer(self) -> Normalizer:
        """The teacher's."""
        return self.teacher.normalizer


class MeanFlowPlanner(AbstractPlanLearner):
    """Hyperparameters and methods of the distilled planner."""

    teacher: DiffusionPlanner = DiffusionPlanner()
    guidance: AbstractGuidance = Unconditional()
    num_steps: int = 1
    """Network evaluations a plan."""
    # The network
    width: int = 256
    depth: int = 2
    num_heads: int = 4
    # MeanFlow
    flow_ratio: float = 0.5
    """Share of intervals with r = t."""
    endpoint_fraction: float = 0.1
    timesteps: AbstractTimestepSampler | None = None
    """Which intervals it learns at instead, and with what weights (`eqgen.timesteps`): `FlowIntervals` of the
    teacher's schedule from its `t_min` to 1. `flow_ratio` and `endpoint_fraction` then say nothing; no interval
    reaches r = 0 exactly."""
    loss_power: float = 0.5
    """p of the adaptive weight of the loss (`meanflow.adaptive_loss`); 1 in the paper."""
    loss_constant: float = 1e-3
    # Optimisation
    learning_rate: float = 2e-4
    total_updates: int = 1_000_000
    average: float = 0.9999
    """Decay of the moving average, which is debiased as the teacher's may be."""

    sizes = {
        "smoke": dict(width=16, depth=1, num_heads=2, total_updates=100),
        "cpu": dict(width=32, num_heads=2, learning_rate=1e-3, total_updates=10_000, average=0.999),
        "paper": dict(),
    }

    def __check_init__(self):
        if self.timesteps is None:
            return
        times = self.timesteps.times
        ours = isinstance(times, FlowIntervals) and (times.schedule, times.low, times.high)
        if ours != (self.schedule, self.t_min, 1.0):
            raise ValueError(
                f"MeanFlowPlanner(timesteps=...): its times are {times}; the planner's are FlowIntervals of its "
                f"teacher's schedule {self.schedule} from t_min={self.t_min} to 1."
            )

    def resized(self, size: Size) -> Self:
        """With its teacher."""
        return dataclasses.replace(self, **self.sizes[size], teacher=self.teacher.resized(size))

    # --- Planning ---

    @property
    def schedule(self):
        return self.teacher.schedule

    @property
    def t_min(self):
        return self.teacher.t_min

    def latent_shape(self, state):
        return self.teacher.latent_shape(state.teacher)

    def decode(self, state, obs, latent, noise=None, num_steps=None):
        if noise is not None:
            raise ValueError(
                "A MeanFlow planner predicts no noise that guidance could change: CG and CFG need its teacher."
            )
        start = jnp.concatenate([obs[None], latent])
        u = self.masked(state.mean_velocity.average)
        return samplers.meanflow(u, start, samplers.uniform_grid(num_steps or self.num_steps))[0]

    def masked(self, network: Any) -> Callable[[Plan, Scalar, Scalar], Plan]:
        """The average velocity, under which row 0 stands still."""
        return lambda x, r, t: network(x, r, t).at[0].set(0)

    def noise(self, state, x, t, label=None):
        return self.teacher.noise(state.teacher, x, t, label)

    def value(self, state, plan):
        return self.teacher.value(state.teacher, plan)

    def noised_value(self, state, x, t):
        return self.teacher.noised_value(state.teacher, x, t)

    def latent(self, state, obs, *, key):
        return self.teacher.latent(state.teacher, obs, key=key)

    # --- Acting ---

    def plan(
        self,
        state: MeanFlowPlannerState,
        obs: Obs,
        *,
        key: Key[Array, ""],
        guidance: AbstractGuidance | None = None,
    ) -> Plan:
        """A plan from an observation of the environment, as z-scores."""
        return (guidance or self.guidance)(self, state, state.normalizer(obs), key=key)

    def act(self, state: MeanFlowPlannerState, obs: Obs, *, key: Key[Array, ""]) -> Action:
        """The action in [-1, 1]^d at an observation of the environment: the first step of a new plan."""
        plan_key, action_key = jr.split(key)
        plan = self.plan(state, obs, key=plan_key)
        return self.action_towards(state, plan[0], plan[1], key=action_key)

    def action_towards(
        self, state: MeanFlowPlannerState, obs: Obs, target: Obs, *, key: Key[Array, ""]
    ) -> Action:
        """The teacher's inverse dynamics."""
        return self.teacher.action_towards(state.teacher, obs, target, key=key)

    # --- Learning ---

    def velocity(self, teacher: PlannerState, x_t: Plan, t: Scalar) -> Plan:
        """The teacher's probability flow, dx/dt at x_t."""
        eps = self.teacher.noise(teacher, x_t, t)
        return convert(eps, x_t, t, self.schedule, source="eps", target="velocity").at[0].set(0)

    def interval(self, *, key: Key[Array, ""]) -> Interval:
        """One (r, t) by `flow_ratio` and `endpoint_fraction`."""
        return meanflow.sample_uniform_interval(
            key=key, t_min=self.t_min, flow_ratio=self.flow_ratio, endpoint_fraction=self.endpoint_fraction
        )

    def interval_loss(
        self, network: Any, teacher: PlannerState, x_0: Plan, r: Scalar, t: Scalar, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The MeanFlow loss on one interval at a plan noised up to t, v being the teacher's."""
        x_t = self.schedule.perturb(x_0, jr.normal(key, x_0.shape), t).at[0].set(x_0[0])
        u = self.masked(network)
        return meanflow.meanflow_loss(
            lambda x, r, t: u(x.reshape(x_0.shape), r, t).ravel(),
            x_t.ravel(),
            r,
            t,
            self.velocity(teacher, x_t, t).ravel(),
            power=self.loss_power,
            c=self.loss_constant,
        )

    def flow_loss(
        self,
        network: Any,
        teacher: PlannerState,
        states: States,
        draw: Draw | None = None,
        *,
        key: Key[Array, ""],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, " batch"]]]:
        """The mean over plans of the data, at the intervals of `draw` with its weights, if it is given. The metrics
        are those of each plan."""

        def one(x_0, key, given):
            interval_key, eps_key = jr.split(key)
            r, t = self.interval(key=interval_key) if given is None else given
            return self.interval_loss(network, teacher, x_0, r, t, key=eps_key)

        keys, pairs = jr.split(key, len(states)), None if draw is None else (draw.t[:, 0], draw.t[:, 1])
        losses, metrics = jax.vmap(one)(states, keys, pairs)
        return jnp.mean(losses if draw is None else draw.weight * losses), metrics

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam with a rate that falls to 0 along a cosine."""
        return optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.total_updates))

    def update(self, state, batch, *, key):
        """One update on windows in the units of the environment, of which only the states are used."""
        states = state.normalizer(batch.states)
        rate = averaging_rate(self.average, state.step, debias=self.teacher.debias)
        draw, sampler, (t_key, look_key, key) = None, self.timesteps, (None, None, key)
        if sampler is not None:
            t_key, look_key, key = jr.split(key, 3)
            draw = sampler.sample(state.timesteps, len(states), x=states, key=t_key)
        mean_velocity, (loss, metrics) = state.mean_velocity.step(
            self.optimizer, self.flow_loss, state.teacher, states, draw, key=key, rate=rate, has_aux=True
        )
        timesteps = state.timesteps
        if sampler is not None and draw is not None:  # both or neither
            objective = lambda network, x_0, t, key: self.interval_loss(
                network, state.teacher, x_0, *t, key=key
            )[1]["meanflow_error"]
            timesteps = sampler.update(
                timesteps,
                draw,
                metrics["meanflow_error"],
                before=state.mean_velocity.online,
                after=mean_velocity.online,
                x=states,
                objective=objective,
                key=look_key,
            )
        metrics = {f"flow/{name}": jnp.mean(value) for name, value in metrics.items()} | {"flow/loss": loss}
        metrics |= {} if sampler is None else sampler.metrics(timesteps)
        return MeanFlowPlannerState(state.teacher, mean_velocity, timesteps, state.step + 1), metrics

    # --- Initial state ---

    def init(self, example, *, key, normalizer: Normalizer | None = None):
        """A fresh state under a fresh teacher; `from_teacher` takes one that is trained."""
        teacher_key, key = jr.split(key)
        return self.from_teacher(self.teacher.init(example, key=teacher_key, normalizer=normalizer), key=key)

    def from_teacher(self, teacher: PlannerState, *, key: Key[Array, ""]) -> MeanFlowPlannerState:
        """A fresh network under a trained teacher."""
        network_key, timesteps = key, None
        if self.timesteps is not None:
            network_key, timesteps_key = jr.split(key)
            example = jnp.zeros((teacher.horizon, teacher.obs_size))
            timesteps = self.timesteps.init(example, key=timesteps_key)
        network = MeanVelocityDiT1D(teacher.obs_size, self.width, self.depth, self.num_heads, key=network_key)
        return MeanFlowPlannerState(
            teacher, Trained.begin(network, self.optimizer), timesteps, step=jnp.zeros((), jnp.int32)
        )
