"""SOM: score-based one-step MeanFlow policy optimisation.

Kim, Ki, Ahn and Lee, "Score-Based One-step MeanFlow Policy Optimization", arXiv 2605.23365 (2026). An
off-policy actor-critic whose policy is a MeanFlow: one network evaluation turns noise into an action. There
are no samples of the target policy to regress on, so the velocity field comes from the critic: Boltzmann
density of Q, Monte Carlo estimate of its noised score, probability-flow ODE, MeanFlow identity.

Notation (paper symbol = name here; t = 0 is the action, t = 1 is noise, as in the paper):

    u_theta(a_t, r, t, s) = actor          Q_phi = critics               alpha = inverse_temperature
    mu_t, sigma_t = noise_schedule         a_0^k = proposals             K = num_score_samples
    S(a_t, t) = score                      v_t = velocity                w = score_weight
    N = num_candidates                     c_r = reward_scale            beta(t) = noise_schedule.beta

Where each choice comes from: [P] the paper's abstract and introduction, [S] secondary sources, [3P] a
third-party implementation that cites the paper's equations and tables, [L] code of the same authors' earlier
papers, [I] inferred here, [T] measured by us on a toy. We have not seen the paper's full text or its code.

Differs from the paper, as far as we know it, in:
- The estimator (field `estimator`). "gradient" is the paper's [3P]; "truncated" draws its proposals from the
  kernel restricted to the action box and never asks the critic about actions outside it [I]; "denoising" is
  the gradient-free form on unrestricted proposals [I].
- The velocity (field `score_mode`). The paper normalises S to unit length and scales it by w = 25 [3P]; "raw"
  is the plain probability-flow ODE, in its cancellation-free posterior-mean form [I].
- The scale of Q (field `q_normalization`). The paper divides by the deviation over the batch [3P], most of
  which is between states and says nothing about actions; "advantage" leaves that part out [I].
- A tenth of the training intervals (r, t) starts at r = 0 and a tenth ends at t = 1, so that the one interval
  used to act, (0, 1), is trained on [I, T].
- The weight of the regression (field `loss_power`).
- The regression target may also be the integrated ODE itself (field `target`) [I].
- Actions are clipped to the box, not squashed by tanh, which would change the density Q was asked about [I].
`SOM.paper()` and `SOM.safe()` set the first three and the weight.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key, Scalar

from eqgen import meanflow, samplers, scores
from eqgen.algorithms.base import AbstractAgent, gradient_step, vector_sizes
from eqgen.exploration import AnnealedNoise, NoiseState, add_noise
from eqgen.losses import critic_loss, td_target
from eqgen.networks.critics import QEnsemble
from eqgen.networks.policies import MeanVelocity
from eqgen.parameterizations import convert
from eqgen.schedules import AbstractNoiseSchedule, VPLinear
from eqgen.tree import filter_cond, polyak, shared, tree_copy, vmap_in_blocks
from eqgen.types import Metrics, Transition


Q = Callable[[Float[Array, " obs"], Float[Array, " act"]], Float[Array, ""]]
Observations = Float[Array, "batch obs"]
Actions = Float[Array, "batch act"]
Times = Float[Array, " batch"]


class SOMState(eqx.Module):
    """Everything that evolves. `actor_metrics` is the report of the last actor update."""

    actor: MeanVelocity
    target_actor: MeanVelocity
    critics: QEnsemble
    target_critics: QEnsemble
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    noise: NoiseState
    actor_metrics: Metrics
    step: Int[Array, ""]


class SOM(AbstractAgent):
    """Hyperparameters and methods of SOM."""

    # The velocity target
    noise_schedule: AbstractNoiseSchedule = VPLinear(0.1, 20.0)  # [3P] beta_min, beta_max
    inverse_temperature: float = 5.0
    """alpha: the target policy is proportional to exp(alpha Q), with Q normalised as below."""
    q_normalization: Literal["batch", "advantage", "group", "none"] = "advantage"
    """What the deviation of Q that it is divided by is taken over: all proposals of the batch [3P]; the same
    after subtracting each (s, a_t)'s own mean, so that the spread of values between states does not count [I];
    the proposals of one (s, a_t) [I]; or nothing."""
    q_reduction: Literal["min", "mean"] = "min"
    """How the online critics' values become one inside the estimator and when candidates are compared."""
    estimator: Literal["gradient", "denoising", "truncated"] = "truncated"
    num_score_samples: int = 100
    """K, proposals per score estimate [3P]."""
    score_mode: Literal["unit", "clip", "raw"] = "raw"
    """S / |S| times `score_weight` [3P], |S| capped at `score_clip`, or S as it is."""
    score_weight: float = 25.0
    score_clip: float = 100.0
    a0_source: Literal["replay", "policy", "mix"] = "replay"
    """Whose actions are noised: the batch's [3P], the policy's own [L], or half of each."""
    # MeanFlow regression
    target: Literal["identity", "ode"] = "identity"
    """The MeanFlow identity by one jvp [P], or the ODE integrated from t to r with diffrax [I]."""
    ode_solver: Literal["euler", "heun", "tsit5"] = "heun"
    ode_steps: int = 8
    """Fixed steps of the solver; 0 takes adaptive steps to `ode_tolerance`."""
    ode_tolerance: float = 1e-3
    time_distribution: Literal["uniform", "logit-normal"] = "uniform"
    flow_ratio: float = 0.5
    """Share of intervals with r = t, plain flow matching: 0.25 [3P], 0.75 in the MeanFlow paper, 0.5 [I, T]."""
    endpoint_fraction: float = 0.1
    t_min: float = 1e-3
    loss_power: float = 0.5
    """p of the adaptive weight: 1 in the MeanFlow paper and [3P]. With raw velocities 1/2 needs a fraction of
    the updates: 0.08 against 0.9 from the exact flow map of a Gaussian after some thousand [T]."""
    loss_constant: float = 1e-3
    loss_reduction: Literal["mean", "sum"] = "mean"
    # Acting
    num_candidates: int = 32
    """N while training: behaviour and the TD target's next action [I, L]."""
    num_eval_candidates: int = 32
    generation_steps: int = 1
    act_with: Literal["actor", "target_actor"] = "actor"
    exploration: Literal["annealed", "constant", "none"] = "annealed"
    """Gaussian noise on the chosen action: as `noise` says [L], always of `exploration_std`, or none."""
    exploration_std: float = 0.1
    noise: AnnealedNoise = AnnealedNoise()
    # Critics and optimisation
    discount: float = 0.99
    reward_scale: float = 0.2
    """c_r, what rewards are multiplied by before they reach the critics [L]."""
    tau: float = 0.005
    policy_delay: int = 2
    """Updates of the critics per update of the actor and of the target networks [L]."""
    noisy_target_action: bool = True
    """Whether the TD target's next action carries exploration noise, as in [L]."""
    critic_learning_rate: float = 3e-4
    actor_learning_rate: float = 3e-4
    final_actor_learning_rate: float = 3e-5
    decay_start: int = 25_000
    decay_updates: int = 50_000
    max_grad_norm: float = 0.0
    """Global-norm clipping of the actor's gradient; 0 for none."""
    hidden: tuple[int, ...] = (256, 256, 256)
    activation: str = "mish"

    sizes = {
        "smoke": dict(hidden=(32, 32), num_score_samples=8, num_candidates=2, num_eval_candidates=2),
        "cpu": dict(hidden=(256, 256), num_score_samples=32, num_candidates=8, num_eval_candidates=8),
        "paper": dict(),
    }
    evaluation_policy = "stochastic: best of num_eval_candidates samples, no exploration noise"

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """The paper's estimator and velocity, as far as known [3P]: gradient form, unit-norm score, w = 25."""
        fields: dict[str, Any] = dict(estimator="gradient", q_normalization="batch", inverse_temperature=1.0)
        return cls(**(fields | {"score_mode": "unit", "score_weight": 25.0, "loss_power": 1.0} | overrides))

    @classmethod
    def safe(cls, **overrides: Any) -> Self:
        """Box-aware estimator and the unscaled probability-flow velocity [I]; alpha is a plain temperature."""
        fields: dict[str, Any] = dict(
            estimator="truncated", q_normalization="advantage", inverse_temperature=5.0
        )
        return cls(**(fields | {"score_mode": "raw", "loss_power": 0.5} | overrides))

    @classmethod
    def profiles(cls) -> Mapping[str, Self]:
        return {"default": cls(), "paper": cls.paper(), "safe": cls.safe()}

    # --- Acting ---

    def q_value(
        self, critics: QEnsemble, obs: Float[Array, " obs"], action: Float[Array, " act"]
    ) -> Float[Array, ""]:
        """One value from the ensemble, by `q_reduction`."""
        values = critics(obs, action)
        return jnp.min(values) if self.q_reduction == "min" else jnp.mean(values)

    def generate(
        self, actor: MeanVelocity, obs: Float[Array, " obs"], noise: Float[Array, " act"]
    ) -> Float[Array, " act"]:
        """The flow's image of `noise`, before clipping: epsilon - u(epsilon, 0, 1, s) in one step."""
        grid = samplers.uniform_grid(self.generation_steps)
        return samplers.meanflow(lambda a, r, t: actor(a, r, t, obs), noise, grid)[0]

    def best_of_n(
        self,
        actor: MeanVelocity,
        critics: QEnsemble,
        obs: Float[Array, " obs"],
        num_candidates: int,
        *,
        key: Key[Array, ""],
    ) -> Float[Array, " act"]:
        """Of `num_candidates` samples, clipped to the box, the one that the online critics value most [S]."""
        noise = jr.normal(key, (num_candidates, actor.action_size))
        actions = jnp.clip(jax.vmap(lambda eps: self.generate(actor, obs, eps))(noise), -1, 1)
        if num_candidates == 1:
            return actions[0]
        values = jax.vmap(lambda action: self.q_value(critics, obs, action))(actions)
        return actions[jnp.argmax(values)]

    def act(self, state, obs, *, key, explore):
        candidate_key, noise_key = jr.split(key)
        num_candidates = self.num_candidates if explore else self.num_eval_candidates
        actor = getattr(state, self.act_with)
        action = self.best_of_n(actor, state.critics, obs, num_candidates, key=candidate_key)
        return add_noise(action, self.noise_std(state), key=noise_key) if explore else action

    def noise_std(self, state: SOMState) -> Scalar:
        """Standard deviation of the exploration noise."""
        if self.exploration == "annealed":
            return self.noise.std(state.noise)
        return jnp.array(self.exploration_std if self.exploration == "constant" else 0.0)

    # --- The actor's target: from the critic to a velocity ---

    def velocity(
        self, q: Q, obs: Observations, a_t: Actions, t: Times, *, key: Key[Array, ""]
    ) -> tuple[Actions, Metrics]:
        """v_t of a batch under the Boltzmann densities of q(s, .) (Eq. 5 and 8 [3P]).

        **Returns:** the velocities, and the mean effective number of proposals.
        """
        schedule, gradient = self.noise_schedule, self.estimator == "gradient"
        alpha_t, sigma_t = jax.vmap(schedule.alpha)(t), jax.vmap(schedule.sigma)(t)
        propose = scores.truncated_proposals if self.estimator == "truncated" else scores.normal_proposals

        def evaluate(s, a_t, alpha_t, sigma_t, key):
            a_0 = propose(a_t, alpha_t, sigma_t, num_samples=self.num_score_samples, key=key)
            q_s = partial(q, s)
            return a_0, jax.vmap(jax.value_and_grad(q_s) if gradient else q_s)(a_0)

        keys = jr.split(key, t.size)
        rows = (obs, a_t, alpha_t, sigma_t, keys)
        a_0, values = vmap_in_blocks(evaluate, *rows, rows_each=self.num_score_samples)
        if gradient:
            values, gradients = values
            log_weights, scale = self.log_weights(values)
            evidence = (log_weights, scale * gradients)
        else:
            evidence = (self.log_weights(values)[0], a_0)
        combine = scores.combine_gradients if gradient else scores.combine_values
        estimate = jax.vmap(combine)(*evidence, a_t, alpha_t, sigma_t)
        v = jax.vmap(self.rescaled_flow)(estimate, a_t, t)
        return v, {"actor/effective_samples": jnp.mean(estimate.effective_samples)}

    def log_weights(
        self, values: Float[Array, "batch K"]
    ) -> tuple[Float[Array, "batch K"], Float[Array, "#batch 1 1"]]:
        """alpha Q-hat, and its derivative in Q. The deviation is a constant (a gradient through the statistics
        would cancel the mean of the score); the mean subtracted is the row's, which the softmax ignores."""
        centred = values - jnp.mean(values, axis=1, keepdims=True)
        match self.q_normalization:
            case "none":
                std = jnp.ones((1, 1))
            case "batch":
                std = jnp.std(values, keepdims=True)
            case "advantage":
                std = jnp.sqrt(jnp.mean(centred**2, keepdims=True))
            case "group":
                std = jnp.std(values, axis=1, keepdims=True)
        scale = self.inverse_temperature / (std + 1e-6)
        return scale * centred, scale[..., None]

    def rescaled_flow(
        self, estimate: scores.ScoreEstimate, a_t: Float[Array, " act"], t: Float[Array, ""]
    ) -> Float[Array, " act"]:
        """The probability-flow velocity f a_t - g^2 S / 2 with S rescaled by `score_mode`; for the VP schedule
        -beta(t) (a_t + S) / 2 (Eq. 8 [3P])."""
        schedule = self.noise_schedule
        if self.score_mode == "raw":
            return convert(estimate.posterior_mean, a_t, t, schedule, source="x0", target="velocity")
        norm = jnp.sqrt(jnp.sum(estimate.score**2))
        unit = self.score_weight / (norm + 1e-6)
        scale = unit if self.score_mode == "unit" else jnp.minimum(1.0, self.score_clip / (norm + 1e-6))
        return schedule.drift(t) * a_t - 0.5 * schedule.diffusion_squared(t) * scale * estimate.score

    def interval(self, *, key: Key[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """One training interval (r, t)."""
        if self.time_distribution == "logit-normal":
            r, t = meanflow.sample_logit_normal_interval(key=key, flow_ratio=self.flow_ratio)
            return jnp.minimum(r, jnp.maximum(t, self.t_min)), jnp.maximum(t, self.t_min)
        return meanflow.sample_uniform_interval(
            key=key,
            t_min=self.t_min,
            t_max=1 - self.t_min,
            flow_ratio=self.flow_ratio,
            endpoint_fraction=self.endpoint_fraction,
        )

    def regression_target(
        self, q: Q, obs: Observations, a_t: Actions, r: Times, t: Times, *, key: Key[Array, ""]
    ) -> tuple[Actions, Actions | None, Metrics]:
        """The instantaneous velocity v_t and, with `target="ode"`, the average velocity over [r, t].

        The ODE is solved for the whole batch at once, each row on its own interval scaled to [0, 1], with the
        same proposal noise all along the path, so that the solver sees a smooth field.
        """
        field = lambda a, t: self.velocity(q, obs, a, t, key=key)
        v, metrics = field(a_t, t)
        if self.target == "identity":
            return v, None, metrics
        import diffrax  # here, because only this option needs it, and the module is to import light

        from eqgen.ode import flow_map

        solvers = {"euler": diffrax.Euler, "heun": diffrax.Heun, "tsit5": diffrax.Tsit5}
        span = r - t
        scaled = lambda a, s: span[:, None] * field(a, jnp.maximum(t + s * span, self.t_min))[0]
        a_r = flow_map(
            scaled,
            a_t,
            0.0,
            1.0,
            solver=solvers[self.ode_solver](),
            num_steps=self.ode_steps or None,
            rtol=self.ode_tolerance,
            atol=self.ode_tolerance,
            throw=False,  # a failed solve gives NaN, which stops the run and names the loss
        )[0]
        return v, jax.vmap(meanflow.average_velocity)(a_t, a_r, r, t, v), metrics

    def actor_loss(
        self,
        actor: MeanVelocity,
        obs: Observations,
        a_t: Actions,
        r: Times,
        t: Times,
        v: Actions,
        average: Actions | None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """MeanFlow regression with adaptive weights, onto `average` if it is given, else by the identity."""

        def one(obs, a_t, r, t, v, average):
            u_theta = lambda a, r, t: actor(a, r, t, obs)
            if average is None:
                u, u_target = meanflow.meanflow_target(u_theta, a_t, r, t, v)
            else:
                u, u_target = u_theta(a_t, r, t), average
            error = u - u_target
            weighting: dict[str, Any] = dict(
                power=self.loss_power, c=self.loss_constant, reduction=self.loss_reduction
            )
            return meanflow.adaptive_loss(error, **weighting), jnp.mean(error**2)

        loss, squared = jax.vmap(one)(obs, a_t, r, t, v, average)
        metrics = {
            "actor/loss": jnp.mean(loss),
            "actor/squared_error": jnp.mean(squared),
            "actor/velocity_norm": jnp.mean(jnp.sqrt(jnp.sum(v**2, axis=-1))),
        }
        return metrics["actor/loss"], metrics

    # --- Updates ---

    @property
    def actor_optimizer(self) -> optax.GradientTransformation:
        """Adam with a linear decay, counted in actor updates."""
        schedule = optax.linear_schedule(
            self.actor_learning_rate,
            self.final_actor_learning_rate,
            transition_steps=self.decay_updates // self.policy_delay,
            transition_begin=self.decay_start // self.policy_delay,
        )
        clip = optax.clip_by_global_norm(self.max_grad_norm) if self.max_grad_norm > 0 else optax.identity()
        return optax.chain(clip, optax.adam(schedule))

    def update_actor(
        self,
        actor: MeanVelocity,
        opt_state: optax.OptState,
        q: Q,
        obs: Observations,
        actions: Actions,
        *,
        key: Key[Array, ""],
    ) -> tuple[MeanVelocity, optax.OptState, Metrics]:
        """One actor step towards the Boltzmann policy of any `q(s, a)`; `actions` are the replayed ones."""
        interval_key, noise_key, source_key, target_key = jr.split(key, 4)
        r, t = jax.vmap(lambda k: self.interval(key=k))(jr.split(interval_key, len(actions)))
        a_0 = self.clean_actions(actor, obs, actions, key=source_key)
        a_t = jax.vmap(self.noise_schedule.perturb)(a_0, jr.normal(noise_key, actions.shape), t)
        v, average, target_metrics = self.regression_target(q, obs, a_t, r, t, key=target_key)
        grad_fn = eqx.filter_grad(self.actor_loss, has_aux=True)
        grads, metrics = grad_fn(actor, obs, a_t, r, t, v, average)
        actor, opt_state = gradient_step(self.actor_optimizer, actor, opt_state, grads)
        return actor, opt_state, metrics | target_metrics

    def clean_actions(self, actor, obs, actions, *, key):
        """The a_0 that are noised, by `a0_source`."""
        if self.a0_source == "replay":
            return actions
        noise_key, mix_key = jr.split(key)
        generate = lambda s, eps: jnp.clip(self.generate(actor, s, eps), -1, 1)
        own = jax.vmap(generate)(obs, jr.normal(noise_key, actions.shape))
        if self.a0_source == "policy":
            return own
        return jnp.where(jr.bernoulli(mix_key, shape=(len(actions), 1)), own, actions)

    def bellman_target(
        self, state: SOMState, batch: Transition, *, key: Key[Array, ""]
    ) -> Float[Array, " batch"]:
        """y = c_r r + gamma (1 - terminated) min_j Q_target_j(s', a') [L]."""

        def one(next_obs, key):
            action_key, noise_key = jr.split(key)
            action = self.best_of_n(
                getattr(state, self.act_with), state.critics, next_obs, self.num_candidates, key=action_key
            )
            if self.noisy_target_action:
                action = add_noise(action, self.noise_std(state), key=noise_key)
            return jnp.min(state.target_critics(next_obs, action))

        keys = jr.split(key, len(batch.reward))
        next_q = vmap_in_blocks(one, batch.next_obs, keys, rows_each=self.num_candidates)
        return td_target(batch, next_q, discount=self.discount, reward_scale=self.reward_scale)

    def update(self, state, batch, *, key):
        target_key, actor_key = jr.split(key)
        y = self.bellman_target(state, batch, key=target_key)
        grads, metrics = eqx.filter_grad(critic_loss, has_aux=True)(state.critics, batch, y)
        optimizer = optax.adam(self.critic_learning_rate)
        critics, critic_opt = gradient_step(optimizer, state.critics, state.critic_opt, grads)
        noise = self.noise.update(state.noise, state.step)
        state = dataclasses.replace(state, critics=critics, critic_opt=critic_opt, noise=noise)
        due = shared(state.step) % self.policy_delay == 0
        state = filter_cond(due, partial(self.delayed_update, batch=batch, key=actor_key), lambda s: s, state)
        state = dataclasses.replace(state, step=state.step + 1)
        return state, metrics | state.actor_metrics | {"noise_std": self.noise_std(state)}

    def delayed_update(self, state: SOMState, *, batch: Transition, key: Key[Array, ""]) -> SOMState:
        """The actor's step, then the target networks'."""
        q = partial(self.q_value, state.critics)
        actor, actor_opt, metrics = self.update_actor(
            state.actor, state.actor_opt, q, batch.obs, batch.action, key=key
        )
        return dataclasses.replace(
            state,
            actor=actor,
            actor_opt=actor_opt,
            actor_metrics=metrics,
            target_actor=polyak(state.target_actor, actor, self.tau),
            target_critics=polyak(state.target_critics, state.critics, self.tau),
        )

    # --- Initial state ---

    def init(self, example, *, key):
        obs_size, action_size = vector_sizes(example)
        actor_key, critic_key = jr.split(key)
        actor = MeanVelocity(obs_size, action_size, self.hidden, self.activation, key=actor_key)
        critics = QEnsemble(obs_size, action_size, self.hidden, self.activation, key=critic_key)
        return self.from_networks(actor, critics)

    def from_networks(self, actor: Any, critics: Any) -> SOMState:
        """A fresh state around networks of your own: `actor(a, r, t, obs)` with an attribute `action_size`,
        and `critics(obs, action)` that returns one value per member."""
        names = ("loss", "squared_error", "velocity_norm", "effective_samples")
        return SOMState(
            actor=actor,
            target_actor=tree_copy(actor),
            critics=critics,
            target_critics=tree_copy(critics),
            actor_opt=self.actor_optimizer.init(eqx.filter(actor, eqx.is_inexact_array)),
            critic_opt=optax.adam(self.critic_learning_rate).init(eqx.filter(critics, eqx.is_inexact_array)),
            noise=self.noise.init(),
            actor_metrics={f"actor/{name}": jnp.zeros(()) for name in names},
            step=jnp.zeros((), jnp.int32),
        )
