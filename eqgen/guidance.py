"""Guidance: five ways to get good plans out of a diffusion model of plans, behind one call.

A *planner* models plans, the states (s_0, ..., s_{H-1}) that follow a given s_0, by a diffusion; from a *latent*,
the noise of the H - 1 states to come, it decodes one plan. A *scheme* is a function
`scheme(planner, state, obs, key=key)` that returns a plan from `obs`:

| scheme            | what it does                                                 | source                    |
|-------------------|--------------------------------------------------------------|---------------------------|
| `Unconditional()` | decodes N(0, I): the plans of the data                       |                           |
| `MCSS(K)`         | of K such plans, the one of most value                       | Lu et al. (2025)          |
| `CG(w)`           | adds the gradient of a value of noised plans to every step   | Janner et al. (2022)      |
| `CFG(w, target)`  | mixes predictions with and without a label, the return asked | Ajay et al. (2023)        |
| `Prior()`         | decodes the mode or a sample of the planner's prior          | Ki et al. (2025)          |

The prior of a planner alone is N(0, I), so `Prior()` decodes the latent 0 there; Prior Guidance replaces it by a
learned one. Everything is in the units of the networks (z-scores). All schemes share the decoder, `decode_plan`,
and the draws of noise: with the same key, `MCSS(1)`, `CG(0)`, and `CFG(0, y)` return the plan of `Unconditional()`,
and the candidates of `MCSS(K)` are the first K of any larger K.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, Scalar

from eqgen.parameterizations import converted
from eqgen.samplers import ddim, dpm_solver_pp_2m
from eqgen.schedules import AbstractNoiseSchedule


Obs = Float[Array, " obs"]
Plan = Float[Array, "horizon obs"]
Latent = Float[Array, "future obs"]
Noise = Callable[[Plan, Scalar], Plan]
"""The noise in a noised plan at a time."""

Solver = Literal["ddim", "dpm_solver_pp_2m"]
_SOLVERS = {"ddim": ddim, "dpm_solver_pp_2m": dpm_solver_pp_2m}


def decode_plan(
    noise: Noise,
    obs: Obs,
    latent: Latent,
    ts: Float[Array, " times"],
    schedule: AbstractNoiseSchedule,
    solver: Solver = "ddim",
) -> Plan:
    """g(z; s): the plan from `obs` that a deterministic solver makes of a latent; its row 0 is `obs`, to the bit.

    **Arguments:**

    - `noise`: the noise in a noised plan whose row 0 is clean.
    - `latent`: the other rows at time `ts[0]`.
    - `ts`: falling times. The plan is the state at the last of them, which is not quite 0.
    """
    clamp = lambda x: x.at[0].set(obs)
    denoise = converted(noise, schedule, source="eps", target="x0")
    start = jnp.concatenate([obs[None], latent])
    return _SOLVERS[solver](denoise, start, ts, schedule, project=clamp)[0]


class AbstractPlanner(eqx.Module):
    """What schemes ask of a planner. `state` holds its parameters."""

    # A checker takes an AbstractVar for a field, the first of every subclass, also where a property overrides it.
    if TYPE_CHECKING:

        @property
        def schedule(self) -> AbstractNoiseSchedule: ...

        @property
        def t_min(self) -> float: ...

    else:
        schedule: eqx.AbstractVar[AbstractNoiseSchedule]
        t_min: eqx.AbstractVar[float]

    @abstractmethod
    def latent_shape(self, state: Any) -> tuple[int, int]:
        """(H - 1, the length of an observation)."""

    @abstractmethod
    def decode(
        self, state: Any, obs: Obs, latent: Latent, noise: Noise | None = None, num_steps: int | None = None
    ) -> Plan:
        """g(z; s), with another prediction of the noise or another number of steps than the planner's own."""

    @abstractmethod
    def noise(self, state: Any, x: Plan, t: Scalar, label: Scalar | None = None) -> Plan:
        """The noise in a noised plan; None is no label."""

    @abstractmethod
    def value(self, state: Any, plan: Plan) -> Scalar:
        """V, the value of a plan."""

    @abstractmethod
    def noised_value(self, state: Any, x: Plan, t: Scalar) -> Scalar:
        """J, the value expected of the plan of which `x` is the noised form at time `t`."""

    @abstractmethod
    def latent(self, state: Any, obs: Obs, *, key: Key[Array, ""] | None) -> Latent:
        """A latent from the prior of the plans from `obs`; without a key its mode."""


class AbstractGuidance(eqx.Module):
    """A way to get a plan."""

    @abstractmethod
    def __call__(self, planner: AbstractPlanner, state: Any, obs: Obs, *, key: Key[Array, ""]) -> Plan:
        """A plan from `obs`."""


def standard_latents(
    planner: AbstractPlanner, state: Any, number: int, temperature: float = 1.0, *, key: Key[Array, ""]
) -> Float[Array, "number future obs"]:
    """Draws from N(0, temperature^2 I); with the same key the first ones of any larger number."""
    draw = lambda i: jr.normal(jr.fold_in(key, i), planner.latent_shape(state))
    return temperature * jax.vmap(draw)(jnp.arange(number))


class Unconditional(AbstractGuidance):
    """The planner as it is: a plan like those of the data.

    **Arguments:**

    - `draw`: "fresh" noise at every decision; one draw "held" over all of them (number `held`); or "zero".
    - `temperature`: of the noise.
    """

    draw: Literal["fresh", "held", "zero"] = "fresh"
    held: int = 0
    temperature: float = 1.0

    def __check_init__(self):
        if self.draw not in ("fresh", "held", "zero"):
            raise ValueError(f"Unconditional(draw={self.draw!r}); choose 'fresh', 'held' or 'zero'.")

    def __call__(self, planner, state, obs, *, key):
        key = jr.key(self.held) if self.draw == "held" else key
        temperature = 0.0 if self.draw == "zero" else self.temperature
        (latent,) = standard_latents(planner, state, 1, temperature, key=key)
        return planner.decode(state, obs, latent)


class MCSS(AbstractGuidance):
    """Monte Carlo sample selection: of `num_candidates` plans the one of most value."""

    num_candidates: int = 50
    temperature: float = 1.0

    def __check_init__(self):
        _check_candidates(self)

    def __call__(self, planner, state, obs, *, key):
        latents = standard_latents(planner, state, self.num_candidates, self.temperature, key=key)
        plans = jax.vmap(lambda z: planner.decode(state, obs, z))(latents)
        return _best(plans, lambda plan: planner.value(state, plan))


class CG(AbstractGuidance):
    """Classifier guidance: eps - w sigma_t grad J(x_t, t) in place of eps.

    With w J = log E[exp(w V) | x_t] this samples the plans of the data tilted by exp(w V); what is learned,
    J = E[V | x_t], is that to first order in w.

    **Arguments:**

    - `weight`: w.
    - `num_candidates`: of several plans the one of largest J is returned.
    """

    weight: float = 0.1
    num_candidates: int = 1
    temperature: float = 1.0

    def __check_init__(self):
        _check_candidates(self)

    def __call__(self, planner, state, obs, *, key):
        def noise(x, t):
            ascent = jax.grad(lambda x: planner.noised_value(state, x, t))(x)
            return planner.noise(state, x, t) - self.weight * planner.schedule.sigma(t) * ascent

        latents = standard_latents(planner, state, self.num_candidates, self.temperature, key=key)
        plans = jax.vmap(lambda z: planner.decode(state, obs, z, noise))(latents)
        return _best(plans, lambda plan: planner.noised_value(state, plan, jnp.asarray(planner.t_min)))


class CFG(AbstractGuidance):
    """Classifier-free guidance: w eps(x_t, t, target) + (1 - w) eps(x_t, t) in place of eps.

    **Arguments:**

    - `weight`: w; 0 ignores the label, 1 is the conditional model, more exaggerates.
    - `target`: the label that is asked for, in the units of the labels the planner was trained with.
    """

    weight: float = 1.2
    target: float = 1.0
    temperature: float = 1.0

    def __call__(self, planner, state, obs, *, key):
        label = jnp.asarray(self.target, obs.dtype)

        def noise(x, t):
            with_label, without = planner.noise(state, x, t, label), planner.noise(state, x, t)
            return self.weight * with_label + (1 - self.weight) * without

        (latent,) = standard_latents(planner, state, 1, self.temperature, key=key)
        return planner.decode(state, obs, latent, noise)


class Prior(AbstractGuidance):
    """The mode of the planner's prior over latents, or a sample of it: one plan, and it is good if the prior is."""

    sample: bool = False

    def __call__(self, planner, state, obs, *, key):
        return planner.decode(state, obs, planner.latent(state, obs, key=key if self.sample else None))


def _best(plans: Float[Array, "number horizon obs"], value: Callable[[Plan], Scalar]) -> Plan:
    return plans[0] if len(plans) == 1 else plans[jnp.argmax(jax.vmap(value)(plans))]


def _check_candidates(scheme: Any) -> None:
    if scheme.num_candidates < 1:
        raise ValueError(f"num_candidates is {scheme.num_candidates}; a plan takes at least 1.")


SCHEMES: dict[str, AbstractGuidance] = {
    "unconditional": Unconditional(),
    "held": Unconditional("held"),
    "zero": Unconditional("zero"),
    "mcss": MCSS(),
    "cg": CG(),
    "cfg": CFG(),
    "prior": Prior(),
    "prior-sampled": Prior(sample=True),
}
"""By name, with default parameters."""


def scheme(text: str) -> AbstractGuidance:
    """The scheme that a text names, with the parameters of its class after colons: "mcss:16", "cfg:1.2:0.9".

    **Raises:** `ValueError` when there is no such scheme, or it takes no such parameters.
    """
    name, *given = text.split(":")
    if name not in SCHEMES:
        raise ValueError(f"There is no scheme {name!r}. Choose one of {', '.join(SCHEMES)}.")
    default = SCHEMES[name]
    fields = [field for field in dataclasses.fields(default) if field.type in (int, float)]
    fields = [] if name in ("held", "zero") else fields
    try:
        if len(given) > len(fields):
            raise ValueError
        values = {field.name: cast(type, field.type)(value) for field, value in zip(fields, given)}
    except ValueError:
        takes = ":".join([name, *(field.name.upper() for field in fields)])
        raise ValueError(f"{text!r} cannot be read; the form is {takes}, numbers, from the left.") from None
    return dataclasses.replace(default, **values)
