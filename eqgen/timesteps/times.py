"""The times a model is trained at: T steps of a chain, an interval of a noise schedule, or pairs r <= t.

A timestep sampler draws u in the unit cube and leaves it to the times what u stands for, so that one sampler
serves every kind of model:

| times             | one draw `t`            | coordinates | cells                              |
|-------------------|-------------------------|-------------|------------------------------------|
| `DiffusionChain`  | an int32 in 0, ..., T-1 | 1           | its T steps                        |
| `ContinuousTimes` | a float in [low, high]  | 1           | equal parts of the interval        |
| `FlowIntervals`   | a pair (r, t), r <= t   | 2           | parts of t by parts of r / t       |

Cells are what tables are made of: probabilities, histograms, running statistics of the loss, the sweep of the
adaptive sampler. A cell is known by one index, in row-major order of the coordinates.
"""

from abc import abstractmethod
from functools import lru_cache, reduce
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Scalar, ScalarLike, Shaped

from eqgen.schedules import AbstractNoiseSchedule, LinearFlow


class AbstractTimes(eqx.Module):
    """A set of times, its cells, and the map from the unit cube to it.

    All methods are elementwise: a batch of `n` draws is `[n]`, or `[n, 2]` for pairs. `schedule` has the levels
    over time in [0, 1].
    """

    # A checker takes an AbstractVar for a field, the first of every subclass, also where a property overrides it.
    if TYPE_CHECKING:

        @property
        def schedule(self) -> AbstractNoiseSchedule: ...

    else:
        schedule: eqx.AbstractVar[AbstractNoiseSchedule]

    @property
    @abstractmethod
    def cells(self) -> tuple[int, ...]:
        """The number of cells along each coordinate of the unit cube."""

    @property
    def num_cells(self) -> int:
        """The number of all cells."""
        return prod(self.cells)

    @abstractmethod
    def edges(self) -> tuple[Float[Array, " _edges"], ...]:
        """The borders of the cells in each coordinate, from 0 to 1."""

    @abstractmethod
    def from_unit(self, u: Float[Array, "*n dims"]) -> Shaped[Array, "*_t"]:
        """The time that a point of the unit cube stands for."""

    @abstractmethod
    def cell(self, t: Shaped[Array, "*t"]) -> Int[Array, "*_cell"]:
        """The index of the cell that a time lies in."""

    @abstractmethod
    def time(self, t: Shaped[Array, "*t"]) -> Float[Array, "*_level"]:
        """The time on `schedule` (the later one of a pair)."""

    @abstractmethod
    def alpha(self, t: Shaped[Array, "*t"]) -> Float[Array, "*_level"]:
        """The factor of the data at the noise level of `t` (that of the later time of a pair)."""

    @abstractmethod
    def sigma(self, t: Shaped[Array, "*t"]) -> Float[Array, "*_level"]:
        """The standard deviation of the noise at the noise level of `t`."""

    @abstractmethod
    def kl_weight(self, t: Shaped[Array, "*t"]) -> Float[Array, "*_level"]:
        """What makes `|eps - eps_hat|^2` the term of the variational bound at `t`, in nats."""

    def snr(self, t: Shaped[Array, "*t"]) -> Float[Array, "*_level"]:
        """The signal-to-noise ratio `(alpha / sigma)^2`."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def points(self) -> Shaped[Array, " cells *_pair"]:
        """One time of every cell, its middle."""
        middles = [(edges[1:] + edges[:-1]) / 2 for edges in self.edges()]
        grid = jnp.meshgrid(*middles, indexing="ij")
        return self.from_unit(jnp.stack([x.ravel() for x in grid], axis=-1))

    def masses(self, cdfs: tuple[Float[Array, "*n _edges"], ...]) -> Float[Array, "*n cells"]:
        """The probabilities of the cells under independent coordinates whose distribution functions have the
        values `cdfs` at `edges()`."""
        outer = lambda p, q: (p[..., :, None] * q[..., None, :]).reshape(*p.shape[:-1], -1)
        return reduce(outer, [jnp.diff(cdf, axis=-1) for cdf in cdfs])


# --- Discrete time ---


Betas = Literal["linear", "quad", "cosine", "vp"]


class ChainTables(NamedTuple):
    """A chain's coefficients by step, in double precision; ab is the running product of 1 - beta."""

    beta: np.ndarray
    alpha_bar: np.ndarray
    posterior_variance: np.ndarray  # v_t = beta_t (1 - ab_{t-1}) / (1 - ab_t), with v_0 := v_1


@lru_cache
def _chain_tables(num_steps: int, betas: Betas, beta_range: tuple[float, float], s: float) -> ChainTables:
    low, high = (min(beta * 1000 / num_steps, 0.999) for beta in beta_range)
    match betas:
        case "linear":
            beta = np.linspace(low, high, num_steps)
        case "quad":
            beta = np.linspace(low**0.5, high**0.5, num_steps) ** 2
        case "cosine":
            f = np.cos((np.arange(num_steps + 1) / num_steps + s) / (1 + s) * np.pi / 2) ** 2
            beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
        case "vp":
            low, high = (1000 * beta for beta in beta_range)
            times = np.arange(num_steps + 1) / num_steps
            beta = -np.expm1(-np.diff(low * times + 0.5 * (high - low) * times**2))
        case _:
            raise ValueError(f"betas={betas!r} is not supported; choose 'linear', 'quad', 'cosine' or 'vp'.")
    alpha_bar = np.cumprod(1 - beta)
    before = np.append(1.0, alpha_bar[:-1])
    variance = beta * (1 - before) / (1 - alpha_bar)
    variance[0] = variance[1]
    return ChainTables(beta, alpha_bar, variance)


class ChainSchedule(AbstractNoiseSchedule):
    """The levels of a chain as a schedule: its step k is the time (k + 1) / T, and time 0 is the data.

    Between the steps it stands still, so it has no derivatives. `chain` is a `DiffusionChain`.
    """

    chain: "DiffusionChain"

    def alpha(self, t: ScalarLike) -> Scalar:
        return _look_up(np.sqrt(np.append(1.0, self.chain.tables.alpha_bar)), self._level(t))

    def sigma(self, t: ScalarLike) -> Scalar:
        return _look_up(np.sqrt(np.append(0.0, 1 - self.chain.tables.alpha_bar)), self._level(t))

    def time_of_log_snr(self, log_snr: ScalarLike) -> Scalar:
        """The time of the step whose log-SNR is nearest."""
        alpha_bar = self.chain.tables.alpha_bar
        steps = jnp.asarray(np.log(alpha_bar) - np.log1p(-alpha_bar), jnp.result_type(float))
        return (jnp.argmin(jnp.abs(steps - log_snr)) + 1) / self.chain.num_steps

    def d_alpha(self, t: ScalarLike) -> Scalar:
        raise ValueError(
            "A chain of steps has no derivative in t: choose ContinuousTimes, or 'eps', 'x0', 'v'."
        )

    def d_sigma(self, t: ScalarLike) -> Scalar:
        return self.d_alpha(t)

    def _level(self, t):
        return jnp.round(jnp.asarray(t) * self.chain.num_steps).astype(jnp.int32)


class DiffusionChain(AbstractTimes):
    """The steps t = 0, ..., T-1 of a DDPM: x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps (Ho et al., 2020).

    The bound's term is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) = c_t |eps - eps_hat|^2 with
    `c_t = beta_t^2 / (2 s_t^2 alpha_t (1 - ab_t))` (Kim et al. 2024, arXiv 2411.09998, Eq. 7), up to a constant
    where s_t^2 is not the posterior variance. The clipped last beta of "cosine" makes c_{T-1} = 500.

    **Arguments:**

    - `num_steps`: T.
    - `betas`: "linear", "quad" (linear in the root), "cosine" (Nichol & Dhariwal, 2021) or "vp", which has the
      levels of `VPLinear` at the times (t + 1) / T (DACER [C]).
    - `beta_range`: the first and last beta of the first two for T = 1000; scaled by 1000 / T and cut at 0.999
      for other T [I]. "vp" takes a thousandth of `VPLinear`'s rates.
    - `cosine_offset`: s of the cosine schedule.
    - `variance`: s_t^2, "small": the posterior variance v_t, or "large": beta_t (v_1 at t = 0).
    - `rounding`: how u becomes a step, "round": round(u (T - 1)), as the adaptive sampler's code has it [C], which
      gives the first and the last step half a cell; or "floor": floor(u T).
    """

    num_steps: int = 1000
    betas: Betas = "linear"
    beta_range: tuple[float, float] = (1e-4, 0.02)
    cosine_offset: float = 0.008
    variance: Literal["small", "large"] = "small"
    rounding: Literal["round", "floor"] = "round"

    def __check_init__(self):
        if self.num_steps < 2:
            raise ValueError(f"num_steps={self.num_steps}: a chain needs at least 2 steps.")
        for name, allowed in (("variance", ("small", "large")), ("rounding", ("round", "floor"))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r} is not supported; choose one of {allowed}.")
        _ = self.tables

    @property
    def tables(self) -> ChainTables:
        """Beta, ab and v by step, NumPy arrays in double precision."""
        return _chain_tables(self.num_steps, self.betas, self.beta_range, self.cosine_offset)

    @property
    def schedule(self) -> ChainSchedule:
        """The levels over [0, 1], what the samplers of `eqgen.samplers` take."""
        return ChainSchedule(self)

    @property
    def cells(self) -> tuple[int, ...]:
        return (self.num_steps,)

    def edges(self) -> tuple[Float[Array, " _edges"], ...]:
        if self.rounding == "floor":
            return (jnp.linspace(0.0, 1.0, self.num_steps + 1),)
        inner = (jnp.arange(1, self.num_steps) - 0.5) / (self.num_steps - 1)
        return (jnp.concatenate([jnp.zeros(1), inner, jnp.ones(1)]),)

    def from_unit(self, u: Float[Array, "*n 1"]) -> Int[Array, "*n"]:
        u = u[..., 0]
        scaled = u * self.num_steps if self.rounding == "floor" else jnp.round(u * (self.num_steps - 1))
        return jnp.clip(scaled.astype(jnp.int32), 0, self.num_steps - 1)

    def points(self) -> Int[Array, " cells"]:
        return jnp.arange(self.num_steps, dtype=jnp.int32)

    def cell(self, t: Int[Array, "*n"]) -> Int[Array, "*n"]:
        return t

    def time(self, t: Int[Array, "*n"]) -> Float[Array, "*n"]:
        return (t + 1) / self.num_steps

    def alpha(self, t: Int[Array, "*n"]) -> Float[Array, "*n"]:
        return _look_up(np.sqrt(self.tables.alpha_bar), t)

    def sigma(self, t: Int[Array, "*n"]) -> Float[Array, "*n"]:
        return _look_up(np.sqrt(1 - self.tables.alpha_bar), t)

    def perturb(
        self, x_0: Float[Array, "*x"], eps: Float[Array, "*x"], t: Int[Array, ""]
    ) -> Float[Array, "*x"]:
        """x_t of one example."""
        return self.alpha(t) * x_0 + self.sigma(t) * eps

    def reverse_variance(self) -> np.ndarray:
        """s_t^2 by step."""
        beta, _, posterior = self.tables
        return posterior if self.variance == "small" else np.append(posterior[1], beta[1:])

    @property
    def kl_weights(self) -> np.ndarray:
        """c_t by step."""
        beta, alpha_bar, _ = self.tables
        return beta**2 / (2 * self.reverse_variance() * (1 - beta) * (1 - alpha_bar))

    def kl_weight(self, t: Int[Array, "*n"]) -> Float[Array, "*n"]:
        return _look_up(self.kl_weights, t)


def _look_up(table: np.ndarray, t: Int[Array, "*n"]) -> Float[Array, "*n"]:
    return jnp.asarray(table, jnp.result_type(float))[t]


# --- Continuous time ---


class ContinuousTimes(AbstractTimes):
    """The times `low` <= t <= `high` of a noise schedule: EDM, flow matching, continuous-time diffusion.

    The bound's density is `-lambda'(t) / 2 |eps - eps_hat|^2`, lambda the log-SNR (Kingma et al. 2021).

    **Arguments:**

    - `schedule`: alpha and sigma.
    - `low`, `high`: what u = 0 and u = 1 stand for. Flow matching's log-SNR is infinite at both 0 and 1.
    - `resolution`: the number of cells.
    """

    schedule: AbstractNoiseSchedule  # pyright: ignore[reportIncompatibleMethodOverride]  # a field does
    low: float = 1e-3
    high: float = 1.0
    resolution: int = 100

    def __check_init__(self):
        _check_range(self.low, self.high)
        if self.resolution < 2:
            raise ValueError(f"resolution={self.resolution}: at least 2 cells are needed.")

    @property
    def cells(self) -> tuple[int, ...]:
        return (self.resolution,)

    def edges(self) -> tuple[Float[Array, " _edges"], ...]:
        return (jnp.linspace(0.0, 1.0, self.resolution + 1),)

    def from_unit(self, u: Float[Array, "*n 1"]) -> Float[Array, "*n"]:
        return self.low + u[..., 0] * (self.high - self.low)

    def to_unit(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The inverse of `from_unit`."""
        return (t - self.low) / (self.high - self.low)

    def cell(self, t: Float[Array, "*n"]) -> Int[Array, "*n"]:
        return _index(self.to_unit(t), self.resolution)

    def time(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return t

    def alpha(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return _each(self.schedule.alpha, t)

    def sigma(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return _each(self.schedule.sigma, t)

    def kl_weight(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return _each(lambda s: -0.5 * _d_log_snr(self.schedule, s), t)


class FlowIntervals(AbstractTimes):
    """The intervals 0 <= r <= t of MeanFlow, a share of them instants r = t.

    The first coordinate gives t; the second says instant if it is below `instants` and else, stretched over what
    remains, r / t. Uniform coordinates are SOM's law: t ~ U(low, high), r ~ U(0, t), r = t with that probability.

    **Arguments:**

    - `schedule`: alpha and sigma, taken at the later time t.
    - `low`, `high`: the range of t.
    - `instants`: the share of r = t under uniform coordinates, in [0, 1).
    - `resolution`: the parts of t, and the parts of the second coordinate: the instants and the others.
    """

    schedule: AbstractNoiseSchedule = LinearFlow()  # pyright: ignore[reportIncompatibleMethodOverride]  # a field does
    low: float = 1e-3
    high: float = 1 - 1e-3
    instants: float = 0.5
    resolution: tuple[int, int] = (20, 4)

    def __check_init__(self):
        _check_range(self.low, self.high)
        if not 0 < self.instants < 1:
            raise ValueError(f"instants={self.instants}: the share of r = t must lie in (0, 1).")
        if min(self.resolution) < 2:
            raise ValueError(f"resolution={self.resolution}: at least 2 parts each are needed.")

    @property
    def cells(self) -> tuple[int, ...]:
        return self.resolution

    def edges(self) -> tuple[Float[Array, " _edges"], ...]:
        later, gaps = self.resolution
        second = jnp.append(0.0, jnp.linspace(self.instants, 1.0, gaps))
        return jnp.linspace(0.0, 1.0, later + 1), second

    def from_unit(self, u: Float[Array, "*n 2"]) -> Float[Array, "*n 2"]:
        t = self.low + u[..., 0] * (self.high - self.low)
        ratio = (u[..., 1] - self.instants) / (1 - self.instants)
        return jnp.stack([jnp.where(ratio < 0, t, ratio * t), t], axis=-1)

    def cell(self, t: Float[Array, "*n 2"]) -> Int[Array, "*n"]:
        r, t = t[..., 0], t[..., 1]
        later = _index((t - self.low) / (self.high - self.low), self.resolution[0])
        gap = jnp.where(r == t, 0, 1 + _index(r / t, self.resolution[1] - 1))
        return later * self.resolution[1] + gap

    def time(self, t: Float[Array, "*n 2"]) -> Float[Array, "*n"]:
        return t[..., 1]

    def alpha(self, t: Float[Array, "*n 2"]) -> Float[Array, "*n"]:
        return _each(self.schedule.alpha, t[..., 1])

    def sigma(self, t: Float[Array, "*n 2"]) -> Float[Array, "*n"]:
        return _each(self.schedule.sigma, t[..., 1])

    def kl_weight(self, t: Float[Array, "*n 2"]) -> Float[Array, "*n"]:
        raise ValueError("The error of an average velocity is no term of a bound: give another weighting.")


def _check_range(low: float, high: float):
    if not 0 <= low < high:
        raise ValueError(f"low={low}, high={high}: times need 0 <= low < high.")


def _index(unit, size):
    return jnp.clip((unit * size).astype(jnp.int32), 0, size - 1)


def _each(fn, t):
    return jax.vmap(fn)(t.ravel()).reshape(t.shape)


def _d_log_snr(schedule, t):
    return jax.jvp(schedule.log_snr, (t,), (jnp.ones_like(t),))[1]
