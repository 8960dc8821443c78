"""Prior Guidance: a learned prior over the latents of a frozen diffusion planner.

Ki, Oh, Shim and Lee, "Prior-Guided Diffusion Planning for Offline Reinforcement Learning", arXiv 2505.10881 (2025).
The planner's decoder g maps latents z ~ N(0, I) to plans like those of the data. Prior Guidance leaves it as it is
and replaces N(0, I) by a prior p_psi(z | s) that has its mass where plans are good:

    max_psi E_s [ E_{z ~ p_psi(. | s)} V(g(z; s)) - alpha D(p_psi(. | s) || N(0, I)) ].

If g is a bijection, D between latents is D between plans, so this is behaviour-regularised planning, whose optimum
over all distributions, for the KL divergence, is p*(z | s) ~ N(z; 0, I) exp(V(g(z; s)) / alpha). Nothing is
propagated back through the denoiser: a latent value V-bar(s, z) is regressed on V(g(z; s)), and the prior ascends
V-bar. One plan costs one decoding, without candidates.

Notation (paper or code symbol = name here):

    g_theta(z; s) = planner.decode    V = planner.value            V-bar_phi = latent_value    p_psi = prior
    phi-, psi- = .average of these    alpha = divergence_weight    D = divergence              c = squash
    u = the prior's draw              z = c tanh(u), the latent    tau = tau

Where each choice comes from: [C] the released code, [I] inferred here, [T] measured by us. The objective is the
abstract's; the body of the paper and its results we have not seen.

`PriorGuidance()` is the released code [C]. `PriorGuidance.corrected()` decodes in training as it does in acting,
with an accurate solver; leaves out the squash, with which a divergence of 0 is not the behaviour (2 tanh of N(0, 1)
is .34 nats from N(0, 1) in each number); and stands on a planner with debiased averages [I].

Differs from the released code in:
- The prior begins near N(0, I) [I].
- The chi-square divergence is implemented; there its branch has no loss [C].
- Mixture and flow priors [I], whose KL divergence is a Monte Carlo estimate; a mixture is dead code there [C].
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key

from eqgen.algorithms.base import AbstractPlanLearner, Size, Trained
from eqgen.algorithms.planner import Action, DiffusionPlanner
from eqgen.data.normalizer import Normalizer
from eqgen.guidance import AbstractGuidance, Latent, Obs, Plan, Prior
from eqgen.networks.priors import FlowPrior, GaussianPrior, MixturePrior
from eqgen.networks.temporal import HorizonCritic


Batch = Float[Array, "batch obs"]


def gaussian_kl(mean: Float[Array, "*d"], log_std: Float[Array, "*d"]) -> Float[Array, "*d"]:
    """KL(N(mu, sigma^2) || N(0, 1)) = (mu^2 + sigma^2 - 1 - ln sigma^2) / 2, of each number."""
    return 0.5 * (mean**2 + jnp.expm1(2 * log_std)) - log_std


def gaussian_log_chi_square(mean: Float[Array, "*d"], log_std: Float[Array, "*d"]) -> Float[Array, "*d"]:
    """ln(1 + chi^2(N(mu, sigma^2) || N(0, 1))) = mu^2 / (2 - sigma^2) - ln(sigma^2 (2 - sigma^2)) / 2.

    Of each number; those of independent ones add up. It is also their Renyi divergence of order 2. NaN unless
    sigma^2 < 2.
    """
    rest = 2 - jnp.exp(2 * log_std)
    return mean**2 / rest - log_std - 0.5 * jnp.log(rest)


class PriorGuidanceState(eqx.Module):
    """Everything that evolves, and the planner, which does not. Averages are the Polyak copies."""

    planner: Any
    prior: Trained
    latent_value: Trained
    step: Int[Array, ""]

    @property
    def normalizer(self) -> Normalizer:
        """The planner's."""
        return self.planner.normalizer


class PriorGuidance(AbstractPlanLearner):
    """Hyperparameters and methods of Prior Guidance. It is itself a planner: the one with the learned prior."""

    planner: AbstractPlanLearner = DiffusionPlanner()
    guidance: AbstractGuidance = Prior()
    """How it acts: decoding the prior's mode [C], or `Prior(sample=True)`."""
    num_train_steps: int | None = 5
    """Steps of the decodings that the latent value learns from [C]; None: as many as in acting. With N equal steps
    in t, DDIM shrinks N(0, 1) to a standard deviation of .68 (N = 5) and .91 (N = 20) [T]."""
    # The prior
    family: Literal["gaussian", "mixture", "flow"] = "gaussian"
    divergence: Literal["kl", "chi_square", "renyi"] = "kl"
    """KL [C], chi^2, or ln(1 + chi^2), which does not grow exponentially with the size of a state [I]."""
    divergence_weight: float = 1.0
    """alpha. D is that of a row of the latent, averaged over rows [C]: KL has the weight alpha / (H - 1) in all."""
    squash: float | None = 2.0
    """c: latents are c tanh of what the prior draws, whose divergence is penalised [C]; None: no squash."""
    normalize_value: bool = True
    """Whether V-bar is divided by its mean absolute value over the batch, as in TD3+BC [C]. The prior then does not
    depend on the scale of values, but does on where their zero is."""
    log_std_range: tuple[float, float] = (-5.0, 2.0)
    max_log_std: float = -0.5
    """Bounds log sigma instead where D is finite for sigma^2 < 2 only [C]; below .3466."""
    prior_hidden: int = 256
    num_components: int = 5
    flow_layers: int = 4
    # The latent value
    width: int = 256
    depth: int = 2
    num_heads: int = 4
    # Optimisation
    prior_learning_rate: float = 3e-4
    value_learning_rate: float = 3e-4
    total_updates: int = 1_000_000
    """Over which the learning rate of the latent value falls to 0 along a cosine; the prior's is constant [C]."""
    tau: float = 0.005

    sizes = {
        "smoke": dict(
            prior_hidden=16,
            num_components=2,
            flow_layers=2,
            width=16,
            depth=1,
            num_heads=2,
            total_updates=100,
        ),
        "cpu": dict(
            prior_hidden=64,
            width=32,
            num_heads=2,
            prior_learning_rate=1e-3,
            value_learning_rate=1e-3,
            total_updates=3_000,
        ),
        "paper": dict(),
    }

    def __check_init__(self):
        if self.family != "gaussian" and self.divergence != "kl":
            raise ValueError(
                f"family={self.family!r} has no closed form of divergence={self.divergence!r}; choose 'kl', or the "
                "Gaussian."
            )
        if not self.max_log_std < 0.5 * math.log(2):
            raise ValueError(f"max_log_std is {self.max_log_std}; beyond ln(2) / 2 chi-square is infinite.")
        if not self.divergence_weight >= 0:
            raise ValueError(f"divergence_weight is {self.divergence_weight}; it must not be negative.")
        if self.squash is not None and not self.squash > 0:
            raise ValueError(f"squash is {self.squash}; it must be positive, or None for no squash.")

    @classmethod
    def corrected(cls, **overrides: Any) -> Self:
        """One accurate decoder for training and acting, no squash, debiased averages of the planner [I]."""
        planner = DiffusionPlanner.profiles()["corrected"]
        settings: dict[str, Any] = dict(planner=planner, num_train_steps=None, squash=None)
        return cls(**(settings | overrides))

    @classmethod
    def profiles(cls) -> Mapping[str, Self]:
        """The released code by family of tasks [C], and "corrected"."""
        names = ("maze2d", "antmaze", "kitchen", "mujoco")
        by_family = {name: cls(planner=DiffusionPlanner.profiles()[name]) for name in names}
        by_family["mujoco"] = dataclasses.replace(by_family["mujoco"], num_heads=8)
        return {"default": cls(), "paper": cls()} | by_family | {"corrected": cls.corrected()}

    def resized(self, size: Size) -> Self:
        """With its planner."""
        return dataclasses.replace(self, **self.sizes[size], planner=self.planner.resized(size))

    # --- As a planner ---

    @property
    def schedule(self):
        return self.planner.schedule

    @property
    def t_min(self):
        return self.planner.t_min

    def latent_shape(self, state):
        return self.planner.latent_shape(state.planner)

    def decode(self, state, obs, latent, noise=None, num_steps=None):
        return self.planner.decode(state.planner, obs, latent, noise, num_steps)

    def noise(self, state, x, t, label=None):
        return self.planner.noise(state.planner, x, t, label)

    def value(self, state, plan):
        return self.planner.value(state.planner, plan)

    def noised_value(self, state, x, t):
        return self.planner.noised_value(state.planner, x, t)

    def latent(self, state, obs, *, key):
        prior = state.prior.average
        return self.squashed(self.mode(prior, obs) if key is None else self.draw(prior, obs, key=key))

    # --- Acting ---

    def plan(
        self,
        state: PriorGuidanceState,
        obs: Obs,
        *,
        key: Key[Array, ""],
        guidance: AbstractGuidance | None = None,
    ) -> Plan:
        """A plan from an observation of the environment, as z-scores."""
        return (guidance or self.guidance)(self, state, state.normalizer(obs), key=key)

    def act(self, state: PriorGuidanceState, obs: Obs, *, key: Key[Array, ""]) -> Action:
        """The action in [-1, 1]^d at an observation of the environment: the first step of a new plan."""
        plan_key, action_key = jr.split(key)
        plan = self.plan(state, obs, key=plan_key)
        return self.action_towards(state, plan[0], plan[1], key=action_key)

    def action_towards(
        self, state: PriorGuidanceState, obs: Obs, target: Obs, *, key: Key[Array, ""]
    ) -> Action:
        """The planner's inverse dynamics."""
        return self.planner.action_towards(state.planner, obs, target, key=key)

    # --- The prior ---

    def squashed(self, u: Float[Array, "*z"]) -> Float[Array, "*z"]:
        """z = c tanh(u)."""
        return u if self.squash is None else self.squash * jnp.tanh(u)

    def mode(self, prior: Any, obs: Obs) -> Latent:
        """The mean of the Gaussian, or of the mixture's likeliest component; the flow's image of 0."""
        match self.family:
            case "gaussian":
                return prior(obs)[0]
            case "mixture":
                log_weights, means, _ = prior(obs)
                return means[jnp.argmax(log_weights)]
            case "flow":
                return prior(obs, jnp.zeros((prior.num_rows, obs.size)))[0]

    def draw(self, prior: Any, obs: Obs, *, key: Key[Array, ""]) -> Latent:
        """A sample of the prior before the squash."""
        component_key, key = jr.split(key)
        draws, weights, _ = self.draws(prior, obs, key=key)
        if len(draws) == 1:
            return draws[0]
        return draws[jr.categorical(component_key, jnp.log(weights))]

    def draws(
        self, prior: Any, obs: Obs, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, "n future obs"], Float[Array, " n"], Float[Array, ""]]:
        """Reparameterised samples whose weighted mean is an expectation under the prior, with the weights, and the
        divergence of a row from N(0, I): in closed form for the Gaussian, else an estimate from these samples."""
        if self.family == "gaussian":
            mean, log_std = prior(obs)
            u = mean + jnp.exp(log_std) * jr.normal(key, mean.shape)
            of_number = gaussian_kl if self.divergence == "kl" else gaussian_log_chi_square
            of_row = jnp.sum(of_number(mean, log_std), axis=1)
            return (
                u[None],
                jnp.ones(1),
                jnp.mean(jnp.expm1(of_row) if self.divergence == "chi_square" else of_row),
            )

        log_normal = lambda x: -0.5 * jnp.sum(x**2, axis=(-2, -1))  # up to a constant, which cancels
        if self.family == "flow":
            noise = jr.normal(key, (prior.num_rows, obs.size))
            u, log_det = prior(obs, noise)
            log_ratio = log_normal(noise) - log_det - log_normal(u)
            return u[None], jnp.ones(1), log_ratio / prior.num_rows

        # One sample of each component: so the weights, too, get exact gradients.
        log_weights, means, log_stds = prior(obs)
        u = means + jnp.exp(log_stds) * jr.normal(key, means.shape)
        log_component = lambda x: (
            log_normal((x[None] - means) / jnp.exp(log_stds)) - jnp.sum(log_stds, (1, 2))
        )
        log_density = lambda x: jax.nn.logsumexp(log_weights + log_component(x))
        log_ratio = jax.vmap(log_density)(u) - log_normal(u)
        weights = jnp.exp(log_weights)
        return u, weights, jnp.sum(weights * log_ratio) / u.shape[1]

    # --- Losses ---

    def latent_values(self, latent_value: Any, obs: Obs, draws: Float[Array, "n future obs"]):
        """V-bar(s, z) of the latents z that draws become."""
        read = lambda u: latent_value(jnp.concatenate([obs[None], self.squashed(u)]))
        return jax.vmap(read)(draws)

    def latent_value_loss(
        self, latent_value: Any, obs: Batch, draws: Float[Array, "batch future obs"], target: Array
    ) -> Float[Array, ""]:
        """(V-bar(s, z) - V(g(z; s)))^2; the target is a number that was computed before."""
        values = jax.vmap(lambda s, u: self.latent_values(latent_value, s, u[None])[0])(obs, draws)
        return jnp.mean((values - target) ** 2)

    def prior_loss(
        self, prior: Any, latent_value: Any, obs: Batch, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """-lambda E V-bar(s, z) + alpha D, z reparameterised. The planner has no part in it."""

        def one(obs, key):
            draws, weights, divergence = self.draws(prior, obs, key=key)
            values = self.latent_values(latent_value, obs, draws)
            return jnp.sum(weights * values), jnp.sum(weights * jnp.abs(values)), divergence

        value, size, divergence = map(jnp.mean, jax.vmap(one)(obs, jr.split(key, len(obs))))
        scale = 1 / jax.lax.stop_gradient(size) if self.normalize_value else 1.0
        loss = -scale * value + self.divergence_weight * divergence
        return loss, {"prior/loss": loss, "prior/divergence": divergence, "prior/value": value}

    # --- Update ---

    @property
    def prior_optimizer(self) -> optax.GradientTransformation:
        """The prior's."""
        return optax.adam(self.prior_learning_rate)

    @property
    def value_optimizer(self) -> optax.GradientTransformation:
        """The latent value's."""
        return optax.adam(optax.cosine_decay_schedule(self.value_learning_rate, self.total_updates))

    def update(self, state, batch, *, key):
        """The latent value on draws of the Polyak prior, then the prior on the Polyak latent value."""
        draw_key, prior_key = jr.split(key)
        obs = state.normalizer(batch.states[:, 0])

        def decoded(obs, key):
            u = self.draw(state.prior.average, obs, key=key)
            plan = self.decode(state, obs, self.squashed(u), num_steps=self.num_train_steps)
            return u, self.value(state, plan)

        draws, target = jax.vmap(decoded)(obs, jr.split(draw_key, len(obs)))
        latent_value, loss = state.latent_value.step(
            self.value_optimizer, self.latent_value_loss, obs, draws, target, rate=self.tau
        )
        prior, metrics = self.update_prior(state.prior, latent_value.average, obs, key=prior_key)
        metrics |= {"latent_value/loss": loss, "latent_value/target": jnp.mean(target)}
        return PriorGuidanceState(state.planner, prior, latent_value, state.step + 1), metrics

    def update_prior(
        self, prior: Trained, latent_value: Any, obs: Batch, *, key: Key[Array, ""]
    ) -> tuple[Trained, dict[str, Float[Array, ""]]]:
        """One step of the prior, which needs no denoiser."""
        what = self.prior_optimizer, self.prior_loss, latent_value, obs
        prior, (_, metrics) = prior.step(*what, key=key, rate=self.tau, has_aux=True)
        return prior, metrics

    # --- Initial state ---

    def init(self, example, *, key, normalizer: Normalizer | None = None):
        """A fresh state on a fresh planner; `from_planner` takes one that is trained."""
        planner_key, key = jr.split(key)
        return self.from_planner(self.planner.init(example, key=planner_key, normalizer=normalizer), key=key)

    def from_planner(self, planner: Any, *, key: Key[Array, ""]) -> PriorGuidanceState:
        """A fresh prior and latent value on a trained planner's state, which from now on stays as it is."""
        num_rows, obs_size = self.planner.latent_shape(planner)
        prior_key, value_key = jr.split(key)
        shape, hidden = (obs_size, num_rows), self.prior_hidden
        match self.family:
            case "gaussian":
                bound = None if self.divergence == "kl" else self.max_log_std
                prior = GaussianPrior(*shape, hidden, self.log_std_range, bound, key=prior_key)
            case "mixture":
                prior = MixturePrior(*shape, hidden, self.num_components, self.log_std_range, key=prior_key)
            case "flow":
                prior = FlowPrior(*shape, hidden, self.flow_layers, key=prior_key)
        latent_value = HorizonCritic(obs_size, self.width, self.depth, self.num_heads, key=value_key)
        return self.from_networks(planner, prior, latent_value)

    def from_networks(self, planner: Any, prior: Any, latent_value: Any) -> PriorGuidanceState:
        """A fresh state around networks of your own: `prior` as `family` has it, `latent_value` of a latent whose
        row 0 is the state."""
        return PriorGuidanceState(
            planner=planner,
            prior=Trained.begin(prior, self.prior_optimizer),
            latent_value=Trained.begin(latent_value, self.value_optimizer),
            step=jnp.zeros((), jnp.int32),
        )
