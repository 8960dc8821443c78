"""Diffusion planner: plans by a diffusion over future states, actions by inverse dynamics.

Lu, Han, Shen and Li, "What Makes a Good Diffusion Planner for Decision Making?", arXiv 2503.00535 (2025), whose
planner, Diffusion Veteran, is also the one that Prior Guidance (arXiv 2505.10881) steers. A diffusion transformer
models the states that follow a given one, a few steps apart; a critic values plans; a small diffusion over actions
says how to get to a plan's second state. `eqgen.guidance` has the ways to get a good plan out of it: the paper's
own (`MCSS`), those of Diffuser (Janner et al. 2022, arXiv 2205.09991: `CG`) and of Decision Diffuser (Ajay et al.
2023, arXiv 2211.15657: `CFG`), for which fields below train what they need.

Notation (paper or code symbol = name here; t = 0 is the plan, t = 1 is noise, as in the code):

    tau = plan, states        H = horizon (the windows')    m = stride (the windows')    eps_theta = denoiser
    C = critic                V_eta = critic (of states)    J_xi = classifier            M = what is clamped: row 0
    v = label                 w_b = weight                  x_t = noised states          I_omega = inverse_dynamics

Where each choice comes from: [C] the released code of Prior Guidance and Diffusion Veteran, [3P] CleanDiffuser, [I]
inferred here, [T] measured by us. Windows of the data, with what horizon and stride, are `eqgen.data.windows`'s.

Differs from the released code in:
- One update trains all parts on the same step counter; there they are separate runs [C]. `critic_updates` then
  stops the critic where the code takes its checkpoint.
- The sinusoid of the noise level in the inverse dynamics keeps all its frequencies; there all but one are 0 [C].
- Labels lie in [-1, 1] for classifier-free guidance too; there in [0, 1] [C].
- Options that are off by default: another solver and grid, debiased averages, MLP inverse dynamics, a target state
  without velocity, the U-Net [3P], weights of the plan's first step.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, Scalar

from eqgen.algorithms.base import AbstractPlanLearner, Trained, averaging_rate
from eqgen.data.normalizer import Normalizer
from eqgen.data.planning import PlannerBatch
from eqgen.data.windows import Window
from eqgen.guidance import (
    MCSS,
    AbstractGuidance,
    Obs,
    Plan,
    Solver,
    decode_plan,
)
from eqgen.losses import td_target
from eqgen.networks.critics import StateValue
from eqgen.networks.inverse_dynamics import ActionDenoiser
from eqgen.networks.mlp import MLP
from eqgen.networks.temporal import DiT1D, HorizonCritic
from eqgen.networks.unet import HalfUNet1D, UNet1D
from eqgen.samplers import ddpm, log_snr_grid, uniform_grid
from eqgen.schedules import AbstractNoiseSchedule, VPCosine, VPLinear
from eqgen.timesteps.adaptive import AdaptiveTimesteps
from eqgen.timesteps.base import AbstractTimestepSampler, Draw
from eqgen.timesteps.heuristics import StaticTimesteps
from eqgen.timesteps.times import ContinuousTimes
from eqgen.timesteps.weightings import BoundWeight
from eqgen.tree import filter_cond, shared
from eqgen.types import Transition


States = Float[Array, "batch horizon obs"]
Labels = Float[Array, " batch"]
Action = Float[Array, " act"]


class PlannerState(eqx.Module):
    """Everything that evolves, and the shapes and units of what is planned."""

    denoiser: Trained
    timesteps: PyTree
    critic: Trained
    classifier: Trained | None
    inverse_dynamics: Trained
    normalizer: Normalizer
    horizon: int = eqx.field(static=True)
    obs_size: int = eqx.field(static=True)
    action_size: int = eqx.field(static=True)
    step: Int[Array, ""]


class DiffusionPlanner(AbstractPlanLearner):
    """Hyperparameters and methods of the planner. The defaults are those of Maze2D."""

    # The model of plans
    schedule: AbstractNoiseSchedule = VPLinear(0.1, 20.0)  # pyright: ignore[reportIncompatibleMethodOverride]  # a field does
    t_min: float = 1e-3  # pyright: ignore[reportIncompatibleMethodOverride]  # a field does
    network: Literal["dit", "unet"] = "dit"
    width: int = 256
    depth: int = 2
    num_heads: int = 4
    unet_width: int = 32
    conditional: bool = False
    """Whether the denoiser is given labels, which `CFG` needs."""
    label_dropout: float = 0.25
    """Share of labels that training leaves out [3P]."""
    timesteps: AbstractTimestepSampler | None = None
    """Which times the denoiser is trained at, and with what weight (`eqgen.timesteps`); its times are
    `ContinuousTimes(schedule, t_min)`. None: uniform in [t_min, 1] [C]."""
    first_step_weight: float = 1.0
    """Weight of the plan's second state, the one acted on, in the loss: 1 [C]; 10 in Decision Diffuser [3P]."""
    # Decoding
    solver: Solver = "ddim"
    grid: Literal["uniform", "log_snr"] = "uniform"
    num_steps: int = 20
    guidance: AbstractGuidance = MCSS(50)
    # The value of plans
    plan_value: Literal["critic", "mean_of_states", "sum_of_states"] = "critic"
    """C(tau) of the whole plan, or the mean (Prior Guidance [C]) or sum (Diffusion Veteran [C]) of V_eta over the
    states to come."""
    critic_depth: int = 2
    critic_updates: int = 200_000
    """After so many updates C stays as it is [C]."""
    value_hidden: tuple[int, ...] = (256, 256)
    discount: float = 0.997
    """gamma of V_eta, whose rewards come scaled (`eqgen.data.windows.reward_scale`)."""
    tau: float = 0.005
    classifier: bool = False
    """Whether J, the value of noised plans, is trained, which `CG` needs."""
    # Inverse dynamics
    inverse_dynamics: Literal["diffusion", "mlp"] = "diffusion"
    rebase: bool = True
    """Whether positions (the first two numbers) count from the state that is left."""
    target_state: Literal["full", "xy"] = "full"
    """What is told of the state aimed at. With "full" and windows that repeat the last state, a plan near the goal
    says to be at its border, moving, and agents stall there; "xy" leaves the velocity out [T]."""
    action_levels: int = 10
    action_temperature: float = 0.5
    """Scales the noise an action starts from, and nothing else [C]."""
    action_hidden: tuple[int, ...] = (256, 256, 256)
    # Optimisation
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    critic_learning_rate: float = 3e-4
    classifier_learning_rate: float = 2e-4
    action_learning_rate: float = 3e-4
    action_weight_decay: float = 1e-4
    total_updates: int = 1_000_000
    """Over which learning rates fall to 0 along a cosine."""
    average: float = 0.9999
    """Decay of the denoiser's and the classifier's moving averages."""
    action_average: float = 0.995
    debias: bool = False
    """Whether averages forget where they began. Without, they are useless in runs shorter than a few
    1 / (1 - decay); with, they are weighted means of what training went through."""

    sizes = {
        "smoke": dict(
            width=16,
            depth=1,
            num_heads=2,
            unet_width=8,
            num_steps=3,
            guidance=MCSS(2),
            critic_depth=1,
            value_hidden=(16,),
            action_levels=3,
            action_hidden=(16,),
            total_updates=100,
        ),
        "cpu": dict(
            width=32,
            num_heads=2,
            unet_width=8,
            value_hidden=(128, 128),
            action_hidden=(128, 128),
            critic_updates=10_000,
            learning_rate=1e-3,
            critic_learning_rate=1e-3,
            action_learning_rate=1e-3,
            total_updates=10_000,
            average=0.999,
            debias=True,
        ),
        "paper": dict(),
    }

    def __check_init__(self):
        for name in ("num_steps", "action_levels", "total_updates"):
            if getattr(self, name) < 2:
                raise ValueError(f"DiffusionPlanner({name}={getattr(self, name)}); at least 2 are needed.")
        for name in ("average", "action_average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"DiffusionPlanner({name}={getattr(self, name)}) must lie in [0, 1).")
        ours, given = self.sampler_of_times.times, ContinuousTimes(self.schedule, self.t_min)
        if not isinstance(ours, ContinuousTimes) or dataclasses.replace(ours, resolution=100) != given:
            raise ValueError(
                f"DiffusionPlanner(timesteps=...): its times are {ours}; the planner's are ContinuousTimes of its "
                f"schedule {self.schedule} from t_min={self.t_min} to 1."
            )

    @classmethod
    def profiles(cls) -> Mapping[str, Self]:
        """By family of tasks [C]; "adaptive": the default with learned timesteps, rewarded by the bound; and
        "corrected": the default with another decoder and debiased averages.

        Ten steps of DPM-Solver++(2M) equal in the log-SNR give plans of N(0, sd^2) a deviation that is off by 3.5,
        3.3 and .8 per cent for sd = 1, .5 and .1; the default's twenty of DDIM equal in t by 8.7, 13 and 44 [T].
        """
        locomotion: dict[str, Any] = dict(num_heads=8, plan_value="mean_of_states", rebase=False)
        return {
            "default": cls(),
            "maze2d": cls(),
            "antmaze": cls(depth=8),
            "kitchen": cls(rebase=False),
            "mujoco": cls(**locomotion),
            "adaptive": cls(timesteps=_adaptive_timesteps()),
            "corrected": cls(solver="dpm_solver_pp_2m", grid="log_snr", num_steps=10, debias=True),
        }

    # --- Planning ---

    def latent_shape(self, state):
        return state.horizon - 1, state.obs_size

    def times(self, num_steps: int | None = None) -> Float[Array, " times"]:
        """The decoder's grid, from 1 to `t_min`."""
        num_steps = num_steps or self.num_steps
        if self.grid == "uniform":
            return uniform_grid(num_steps, 1.0, self.t_min)
        return log_snr_grid(num_steps, self.schedule, 1.0, self.t_min)

    def decode(self, state, obs, latent, noise=None, num_steps=None):
        noise = noise or (lambda x, t: self.noise(state, x, t))
        return decode_plan(noise, obs, latent, self.times(num_steps), self.schedule, self.solver)

    def noise(self, state, x, t, label=None):
        if label is not None and not self.conditional:
            raise ValueError(
                "This planner was trained without labels: CFG needs DiffusionPlanner(conditional=True)."
            )
        return state.denoiser.average(x, t, label)

    def value(self, state, plan):
        critic = state.critic.online
        if self.plan_value == "critic":
            return critic(plan)
        values = jax.vmap(critic)(plan[1:])
        return jnp.mean(values) if self.plan_value == "mean_of_states" else jnp.sum(values)

    def noised_value(self, state, x, t):
        if state.classifier is None:
            raise ValueError(
                "This planner has no J: CG needs one trained with DiffusionPlanner(classifier=True)."
            )
        return state.classifier.average(x, t)

    def latent(self, state, obs, *, key):
        shape = self.latent_shape(state)
        return jnp.zeros(shape) if key is None else jr.normal(key, shape)

    # --- Acting ---

    def act(self, state: PlannerState, obs: Obs, *, key: Key[Array, ""]) -> Action:
        """The action in [-1, 1]^d at an observation of the environment: the first step of a new plan."""
        plan_key, action_key = jr.split(key)
        plan = self.plan(state, obs, key=plan_key)
        return self.action_towards(state, plan[0], plan[1], key=action_key)

    def plan(
        self, state: PlannerState, obs: Obs, *, key: Key[Array, ""], guidance: AbstractGuidance | None = None
    ) -> Plan:
        """A plan from an observation of the environment, as z-scores (`state.normalizer.inverse` undoes them)."""
        return (guidance or self.guidance)(self, state, state.normalizer(obs), key=key)

    def action_towards(self, state: PlannerState, obs: Obs, target: Obs, *, key: Key[Array, ""]) -> Action:
        """The action that leads from one state towards another, both as z-scores."""
        network = state.inverse_dynamics.average
        here, there = self.endpoints(obs, target)
        if self.inverse_dynamics == "mlp":
            return jnp.tanh(network(here, there))

        def denoise(a, t):
            level = (t - self.t_min) / (1 - self.t_min) * (self.action_levels - 1)
            eps, alpha, sigma = network(a, level, here, there), _COSINE.alpha(t), _COSINE.sigma(t)
            return jnp.clip((a - sigma * eps) / alpha, -1, 1)

        start_key, key = jr.split(key)
        start = self.action_temperature * jr.normal(start_key, (state.action_size,))
        ts = uniform_grid(self.action_levels - 1, 1.0, self.t_min)
        return jnp.clip(ddpm(denoise, start, ts, _COSINE, key=key)[0], -1, 1)

    def endpoints(self, obs: Obs, target: Obs) -> tuple[Obs, Float[Array, " target"]]:
        """What inverse dynamics sees of the two states."""
        if self.rebase:
            obs, target = obs.at[:2].set(0), target.at[:2].add(-obs[:2])
        return obs, target[:2] if self.target_state == "xy" else target

    # --- Losses ---

    @property
    def sampler_of_times(self) -> AbstractTimestepSampler:
        """`timesteps`, or the uniform sampler that None stands for."""
        if self.timesteps is not None:
            return self.timesteps
        return StaticTimesteps(ContinuousTimes(self.schedule, self.t_min))

    def plan_objective(
        self, denoiser: Any, example: tuple[Plan, Scalar, Scalar], t: Scalar, key: Key[Array, ""]
    ) -> Scalar:
        """w_b mean W_h (1 - M_h) (eps_theta(x_t, t) - eps)^2 for (states, label, w_b), x_t with its row 0 clean;
        row 0 counts as a 0."""
        eps_key, drop_key = jr.split(key)
        x_0, label, weight = example
        eps = jr.normal(eps_key, x_0.shape)
        x_t = self.schedule.perturb(x_0, eps, t).at[0].set(x_0[0])
        kept = jr.bernoulli(drop_key, 1 - self.label_dropout).astype(x_0.dtype)
        predicted = denoiser(x_t, t, label, kept) if self.conditional else denoiser(x_t, t)
        row_weight = jnp.ones((len(x_0), 1)).at[0].set(0).at[1].set(self.first_step_weight)
        return weight * jnp.mean(row_weight * (predicted - eps) ** 2)

    def plan_loss(
        self, denoiser: Any, examples: tuple[States, Labels, Labels], draw: Draw, *, key: Key[Array, ""]
    ) -> tuple[Scalar, Labels]:
        """The mean of `plan_objective` at the times of `draw`, times its weights, and the objectives."""
        keys = jr.split(key, len(draw.t))
        losses = jax.vmap(partial(self.plan_objective, denoiser))(examples, draw.t, keys)
        return jnp.mean(draw.weight * losses), losses

    def critic_loss(self, critic: HorizonCritic, states: States, label: Labels) -> Float[Array, ""]:
        """(C(tau) - v)^2: v is the return of the data, nothing is bootstrapped."""
        return jnp.mean((jax.vmap(critic)(states) - label) ** 2)

    def state_value_loss(self, critic: StateValue, target: Any, batch: Transition) -> Float[Array, ""]:
        """(V_eta(s) - r - gamma (1 - terminated) V_eta-(s'))^2: the value of the policy that made the data."""
        y = td_target(batch, jax.vmap(target)(batch.next_obs), discount=self.discount)
        return jnp.mean((jax.vmap(critic)(batch.obs) - y) ** 2)

    def classifier_loss(
        self, classifier: Any, states: States, label: Labels, *, key: Key[Array, ""]
    ) -> Float[Array, ""]:
        """(J_xi(x_t, t) - v)^2, whose minimum is E[v | x_t]."""
        t_key, eps_key = jr.split(key)
        t = jr.uniform(t_key, label.shape, minval=self.t_min, maxval=1.0)
        x_t = jax.vmap(self.schedule.perturb)(states, jr.normal(eps_key, states.shape), t)
        return jnp.mean((jax.vmap(classifier)(x_t.at[:, 0].set(states[:, 0]), t) - label) ** 2)

    def action_loss(
        self,
        network: Any,
        states: States,
        actions: Float[Array, "batch act"],
        *,
        key: Key[Array, ""],
    ) -> Float[Array, ""]:
        """(I_omega(a_t, t, s_0, s_1) - eps)^2 at a random level; the MLP's is (tanh I - a)^2."""
        here, there = jax.vmap(self.endpoints)(states[:, 0], states[:, 1])
        if self.inverse_dynamics == "mlp":
            return jnp.mean((jnp.tanh(jax.vmap(network)(here, there)) - actions) ** 2)
        level_key, eps_key = jr.split(key)
        level = jr.randint(level_key, (len(actions),), 0, self.action_levels)
        t = uniform_grid(self.action_levels - 1, self.t_min, 1.0)[level]
        eps = jr.normal(eps_key, actions.shape)
        noised = jax.vmap(_COSINE.perturb)(actions, eps, t)
        return jnp.mean((jax.vmap(network)(noised, level.astype(float), here, there) - eps) ** 2)

    # --- Update ---

    def cosine(self, learning_rate: float) -> optax.Schedule:
        """From `learning_rate` to 0 over `total_updates`."""
        return optax.cosine_decay_schedule(learning_rate, self.total_updates)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The denoiser's."""
        return optax.adamw(self.cosine(self.learning_rate), weight_decay=self.weight_decay)

    @property
    def critic_optimizer(self) -> optax.GradientTransformation:
        """The rate falls for C and is constant for V_eta [C]."""
        rate = self.critic_learning_rate
        return optax.adam(self.cosine(rate) if self.plan_value == "critic" else rate)

    @property
    def classifier_optimizer(self) -> optax.GradientTransformation:
        """J's [3P]."""
        return optax.adamw(self.classifier_learning_rate, weight_decay=1e-4)

    @property
    def action_optimizer(self) -> optax.GradientTransformation:
        """The inverse dynamics'."""
        return optax.adamw(self.cosine(self.action_learning_rate), weight_decay=self.action_weight_decay)

    def update(self, state, batch, *, key):
        """One update of every part. `batch`: windows in the units of the environment, or a `PlannerBatch`."""
        batch = batch if isinstance(batch, PlannerBatch) else PlannerBatch(batch, batch)
        plan_key, classifier_key, action_key = jr.split(key, 3)
        states, label = state.normalizer(batch.plans.states), batch.plans.label
        slow = averaging_rate(self.average, state.step, debias=self.debias)

        t_key, noise_key, look_key = jr.split(plan_key, 3)
        sampler, examples = self.sampler_of_times, (states, label, batch.plans.weight)
        draw = sampler.sample(state.timesteps, len(states), x=examples, key=t_key)
        denoiser, (loss, losses) = state.denoiser.step(
            self.optimizer, self.plan_loss, examples, draw, key=noise_key, rate=slow, has_aux=True
        )
        timesteps = sampler.update(
            state.timesteps,
            draw,
            losses,
            before=state.denoiser.online,
            after=denoiser.online,
            x=examples,
            objective=self.plan_objective,
            key=look_key,
        )
        metrics = {"plan/loss": loss} | sampler.metrics(timesteps)
        critic, metrics["critic/loss"] = self.update_critic(state, batch, states)
        classifier = state.classifier
        if classifier is not None:
            classifier, metrics["classifier/loss"] = classifier.step(
                self.classifier_optimizer, self.classifier_loss, states, label, key=classifier_key, rate=slow
            )
        inverse_dynamics, metrics["action/loss"] = state.inverse_dynamics.step(
            self.action_optimizer,
            self.action_loss,
            state.normalizer(batch.actions.states[:, :2]),
            batch.actions.actions[:, 0],
            key=action_key,
            rate=averaging_rate(self.action_average, state.step, debias=self.debias),
        )
        state = dataclasses.replace(
            state,
            denoiser=denoiser,
            timesteps=timesteps,
            critic=critic,
            classifier=classifier,
            inverse_dynamics=inverse_dynamics,
            step=state.step + 1,
        )
        return state, metrics

    def update_critic(
        self, state: PlannerState, batch: PlannerBatch, states: States
    ) -> tuple[Trained, Float[Array, ""]]:
        """C's step, while it has any left, or V_eta's."""
        if self.plan_value == "critic":
            learn = lambda critic: critic.step(
                self.critic_optimizer, self.critic_loss, states, batch.plans.label, rate=0.0
            )
            keep = lambda critic: (critic, self.critic_loss(critic.online, states, batch.plans.label))
            return filter_cond(shared(state.step) < self.critic_updates, learn, keep, state.critic)
        if batch.transitions is None:
            raise ValueError(
                f"plan_value={self.plan_value!r} learns V(s) from transitions, which the batch lacks: pass "
                "PlannerBatch(plans, actions, transitions), or choose plan_value='critic'."
            )
        normalized = lambda t: (state.normalizer(t.obs), state.normalizer(t.next_obs))
        transitions = eqx.tree_at(
            lambda t: (t.obs, t.next_obs), batch.transitions, normalized(batch.transitions)
        )
        return state.critic.step(
            self.critic_optimizer, self.state_value_loss, state.critic.average, transitions, rate=self.tau
        )

    # --- Initial state ---

    def init(self, example, *, key, normalizer: Normalizer | None = None):
        """A fresh state. `example` is one `Window`; `normalizer` that of the data, by default none."""
        (horizon, obs_size), action_size = example.states.shape, example.actions.shape[-1]
        keys = jr.split(key, 5)
        if self.network == "dit":
            denoiser = DiT1D(
                obs_size, self.width, self.depth, self.num_heads, conditional=self.conditional, key=keys[0]
            )
        else:
            denoiser = UNet1D(obs_size, self.unet_width, conditional=self.conditional, key=keys[0])
        if self.plan_value == "critic":
            critic = HorizonCritic(obs_size, self.width, self.critic_depth, self.num_heads, key=keys[1])
        else:
            critic = StateValue(obs_size, self.value_hidden, key=keys[1])
        classifier = HalfUNet1D(horizon, obs_size, self.unet_width, key=keys[2]) if self.classifier else None
        sizes = (obs_size, 2 if self.target_state == "xy" else obs_size)
        if self.inverse_dynamics == "mlp":
            inverse_dynamics = MLP(sizes, action_size, self.action_hidden, "relu", key=keys[3])
        else:
            inverse_dynamics = ActionDenoiser(action_size, sizes, self.action_hidden, key=keys[3])
        return self.from_networks(
            example,
            denoiser,
            critic,
            inverse_dynamics,
            classifier=classifier,
            normalizer=normalizer,
            key=keys[4],
        )

    def from_networks(
        self,
        example: Window,
        denoiser: Any,
        critic: Any,
        inverse_dynamics: Any,
        *,
        classifier: Any = None,
        normalizer: Normalizer | None = None,
        key: Key[Array, ""] | None = None,
    ) -> PlannerState:
        """A fresh state around networks of your own: `denoiser(x, t)` (if `conditional`, with a label and whether
        it is kept), `critic(plan)` or `critic(obs)`, `inverse_dynamics(action, level, obs, target)` or, as an MLP,
        `(obs, target)`, and `classifier(x, t)`. `key` is for the network of a timestep sampler,
        where that has one.

        **Raises:** `ValueError` when the example is no window of at least two vectors.
        """
        if example.states.ndim != 2 or len(example.states) < 2 or example.actions.ndim != 2:
            raise ValueError(
                f"The states have shape {example.states.shape} and the actions {example.actions.shape}; a planner "
                "takes one window, two or more vectors of each: (horizon, obs) and (horizon, act)."
            )
        horizon, obs_size = example.states.shape
        seen = (example.states, example.label, example.weight)
        timesteps_key = jr.key(0) if key is None else key
        return PlannerState(
            denoiser=Trained.begin(denoiser, self.optimizer),
            timesteps=self.sampler_of_times.init(seen, key=timesteps_key),
            critic=Trained.begin(critic, self.critic_optimizer, averaged=self.plan_value != "critic"),
            classifier=None if classifier is None else Trained.begin(classifier, self.classifier_optimizer),
            inverse_dynamics=Trained.begin(inverse_dynamics, self.action_optimizer),
            normalizer=normalizer or Normalizer(jnp.zeros(obs_size), jnp.ones(obs_size)),
            horizon=horizon,
            obs_size=obs_size,
            action_size=example.actions.shape[-1],
            step=jnp.zeros((), jnp.int32),
        )


def _adaptive_timesteps():
    times = ContinuousTimes(VPLinear(0.1, 20.0))
    return AdaptiveTimesteps(times, reward=BoundWeight(), sweep=50, reward_batch=32)


_COSINE = VPCosine()
