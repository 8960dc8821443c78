"""Laws of t, the other axis beside the loss weight.

Every law is known by its distribution function, so that a draw is the image of a uniform number and any law can
be drawn with low discrepancy. In a chain that is a step drawn from the law's probabilities; in continuous time it
is a quantile.

| law           | density                                             | source                              |
|---------------|-----------------------------------------------------|-------------------------------------|
| `Uniform`     | 1                                                   | Ho et al. (2020)                    |
| `LogitNormal` | u = sigmoid(m + s z), z normal                      | Esser et al. (2024), SD3            |
| `LogNormal`   | log(sigma / alpha) ~ N(m, s^2)                      | Karras et al. (2022), EDM           |
| `Beta`        | u ~ Beta(a, b)                                      | static form of the adaptive sampler |
| `Speed`       | k times denser before tau                           | Wang et al. (2024), SpeeD           |
| `Table`       | given by cell                                       |                                     |
"""

import dataclasses
from abc import abstractmethod
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import betainc, ndtr, ndtri
from jaxtyping import Array, Float, Int, Shaped

from eqgen.timesteps.times import AbstractTimes, ContinuousTimes, DiffusionChain
from eqgen.timesteps.weightings import before, noise_shares


class AbstractLaw(eqx.Module):
    """A probability law on a set of times."""

    @abstractmethod
    def probabilities(self, times: AbstractTimes) -> Float[Array, " cells"]:
        """The probabilities of the cells."""

    @abstractmethod
    def draw(self, uniform: Float[Array, "n dims"], times: AbstractTimes) -> Shaped[Array, " n *_pair"]:
        """The times that points of the unit cube map to; uniform points have the law as theirs."""


class AbstractUnitLaw(AbstractLaw):
    """A law of independent, identical coordinates u, given by its distribution function and the inverse."""

    @abstractmethod
    def cdf(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The probability of [0, u]."""

    @abstractmethod
    def quantile(self, p: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The inverse of `cdf`."""

    def probabilities(self, times: AbstractTimes) -> Float[Array, " cells"]:
        return times.masses(tuple(self.cdf(edges) for edges in times.edges()))

    def draw(self, uniform: Float[Array, "n dims"], times: AbstractTimes) -> Shaped[Array, " n *_pair"]:
        return times.from_unit(self.quantile(uniform))


class Uniform(AbstractUnitLaw):
    """Every time equally often; every step of a chain, whatever its rounding."""

    def cdf(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return u

    def quantile(self, p: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return p

    def probabilities(self, times: AbstractTimes) -> Float[Array, " cells"]:
        return super().probabilities(_even(times))

    def draw(self, uniform: Float[Array, "n dims"], times: AbstractTimes) -> Shaped[Array, " n *_pair"]:
        return _even(times).from_unit(uniform)


def _even(times):
    """The same times with cells of equal width."""
    return dataclasses.replace(times, rounding="floor") if isinstance(times, DiffusionChain) else times


class LogitNormal(AbstractUnitLaw):
    """u = sigmoid(mean + std z): mid times most often (Esser et al., 2024, "rf/lognorm").

    Time runs from data to noise here; a mean above 0 prefers noise.
    """

    mean: float = 0.0
    std: float = 1.0

    def cdf(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return ndtr((jnp.log(u) - jnp.log1p(-u) - self.mean) / self.std)

    def quantile(self, p: Float[Array, "*n"]) -> Float[Array, "*n"]:
        logit = self.mean + self.std * ndtri(p)
        return 1 / (1 + jnp.exp(-logit))


class Beta(AbstractUnitLaw):
    """u ~ Beta(a, b). Beta(0.8, 1), the default, is the static law of OneTrainer's "B-TTDM" option [3P]."""

    a: float = 0.8
    b: float = 1.0

    def cdf(self, u: Float[Array, "*n"]) -> Float[Array, "*n"]:
        return betainc(self.a, self.b, u)

    def quantile(self, p: Float[Array, "*n"]) -> Float[Array, "*n"]:
        # Bisection: the inverse has no closed form unless a or b is 1. 24 halvings are float32's resolution.
        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            below = self.cdf(middle) < p
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = lax.fori_loop(0, 24, halve, (jnp.zeros_like(p), jnp.ones_like(p)))
        return (low + high) / 2


class AbstractCellLaw(AbstractLaw):
    """A law given by the probabilities of the cells; within a cell of continuous time it is uniform."""

    def draw(self, uniform: Float[Array, "n dims"], times: AbstractTimes) -> Shaped[Array, " n *_pair"]:
        return draw_from_cells(self.probabilities(times), uniform, times)


def draw_from_cells(
    probabilities: Float[Array, " cells"], uniform: Float[Array, "n dims"], times: AbstractTimes
) -> Shaped[Array, " n *_pair"]:
    """Times whose cells have the given probabilities, by inverting the distribution function over cells."""
    cdf = jnp.cumsum(probabilities)
    first = uniform[:, 0] * cdf[-1]
    # The last cell that has any mass is the last that can be hit, also when the sum rounds below `first`.
    cell = jnp.minimum(jnp.searchsorted(cdf, first, side="right"), jnp.searchsorted(cdf, cdf[-1]))
    if isinstance(times, DiffusionChain):
        return times.points()[cell]
    position = 1 - (cdf[cell] - first) / probabilities[cell]
    places = []
    for d, edges in enumerate(times.edges()):
        index = jnp.unravel_index(cell, times.cells)[d]
        share = jnp.clip(position, 0, 1) if d == 0 else uniform[:, d]
        places.append(edges[index] + share * (edges[index + 1] - edges[index]))
    return times.from_unit(jnp.stack(places, axis=-1))


class Table(AbstractCellLaw):
    """Probabilities proportional to `masses`, one for every cell."""

    masses: Float[Array, " cells"]

    def probabilities(self, times: AbstractTimes) -> Float[Array, " cells"]:
        if self.masses.shape != (times.num_cells,):
            raise ValueError(f"{self.masses.shape[0]} masses for {times.num_cells} cells of the times.")
        return self.masses / jnp.sum(self.masses)


class LogNormal(AbstractCellLaw):
    """log(sigma / alpha) ~ N(mean, std^2), cut off at the ends of the times (Karras et al., 2022).

    The defaults are EDM's, for data of standard deviation 0.5; add log(data_std / 0.5) to the mean for other data.
    In a chain p_t is the density times the step of log(sigma / alpha) [I].
    """

    mean: float = -1.2
    std: float = 1.2

    def probabilities(self, times: AbstractTimes) -> Float[Array, " cells"]:
        if isinstance(times, DiffusionChain):
            z = self._standardise(-0.5 * jnp.log(times.snr(times.points())))
            masses = jnp.exp(-0.5 * z**2) * cast(Array, jnp.gradient(z))
        else:
            edges = times.from_unit(_continuous(times, self).edges()[0][:, None])
            masses = jnp.diff(ndtr(self._standardise(-0.5 * jnp.log(times.snr(edges)))))
        return masses / jnp.sum(masses)

    def draw(self, uniform: Float[Array, "n dims"], times: AbstractTimes) -> Shaped[Array, " n *_pair"]:
        if isinstance(times, DiffusionChain):
            return super().draw(uniform, times)
        times = _continuous(times, self)
        low, high = ndtr(self._standardise(-0.5 * jnp.log(times.snr(jnp.array([times.low, times.high])))))
        log_sigma = self.mean + self.std * ndtri(low + uniform[:, 0] * (high - low))
        return jnp.clip(jax.vmap(times.schedule.time_of_log_snr)(-2 * log_sigma), times.low, times.high)

    def _standardise(self, log_sigma):
        return (log_sigma - self.mean) / self.std


def _continuous(times: AbstractTimes, law: eqx.Module) -> ContinuousTimes:
    if not isinstance(times, ContinuousTimes):
        raise ValueError(f"{type(law).__name__} is a law of single times, not of {type(times).__name__}.")
    return times


class Speed(AbstractCellLaw):
    """SpeeD's law: times before `boundary` are `ratio` times as frequent as those after (Wang et al., 2024).

    **Arguments:**

    - `ratio`: k; 2 in the repository's comparison on FFHQ, 5 the paper's default [I].
    - `boundary`: tau as a share of all cells (700 of 1000 steps).
    """

    ratio: float = 5.0
    boundary: float = 0.7

    def probabilities(self, times: AbstractTimes) -> Float[Array, " cells"]:
        masses = jnp.where(before(self.boundary, times), self.ratio, 1.0)
        return masses / jnp.sum(masses)


class SpeedPairs(eqx.Module):
    """SpeeD's pairing: the second half of a batch gets t' = |t - m| of the first half's times t.

    m is one past the first cell at which sqrt(1 - ab) grows by less than `threshold`, 1e-4 for 1000 cells (scaled
    for other numbers [I]): beyond it noise hardly changes. The repository pairs one draw fewer.
    """

    threshold: float = 1e-4

    def pivot(self, times: AbstractTimes) -> Int[Array, ""]:
        """m in cells."""
        growth = cast(Array, jnp.gradient(jnp.sqrt(noise_shares(times))))
        small = growth < self.threshold * 1000 / times.num_cells
        # Where nothing grows that slowly, all times are meaningful.
        return jnp.where(jnp.any(small), jnp.argmax(small) + 1, times.num_cells - 1)

    def partner(self, t: Shaped[Array, " n"], times: AbstractTimes) -> Shaped[Array, " n"]:
        """t' of every t."""
        pivot = jnp.minimum(self.pivot(times), times.num_cells - 1)
        if isinstance(times, DiffusionChain):
            return jnp.abs(t - pivot.astype(t.dtype))
        times = _continuous(times, self)
        u = jnp.abs(times.to_unit(t) - pivot / times.num_cells)
        return times.from_unit(u[:, None])
