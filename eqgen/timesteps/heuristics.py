"""Timestep samplers with a fixed rule: a law and a weight, or statistics of the loss or its gradient.

The heuristics of the literature are combinations of three axes, the law of t, the weight of the loss, and SpeeD's
pairing:

    StaticTimesteps(chain)                                             uniform (DDPM)
    StaticTimesteps(times, low_discrepancy=True)                       uniform, evenly spread in every batch (VDM)
    StaticTimesteps(chain, weighting=P2())                             P2
    StaticTimesteps(chain, weighting=MinSNR(prediction="v"))           Min-SNR-5, for a network that predicts v
    StaticTimesteps(chain, weighting=SoftMinSNR())                     soft Min-SNR
    StaticTimesteps(times, law=LogNormal(), weighting=EDM())           EDM
    StaticTimesteps(times, law=LogitNormal())                          stable diffusion 3
    StaticTimesteps(chain, Speed(), SpeedWeight(), SpeedPairs())       SpeeD
    StaticTimesteps(chain, law=Beta())                                 static Beta
    SecondMomentTimesteps(chain)                                       Improved DDPM
    VarianceTimesteps(chain)                                           by gradient variance, a negative control
"""

from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from eqgen.timesteps.base import (
    AbstractTimestepSampler,
    Draw,
    Objective,
    look_or_keep,
    required,
    unit_points,
)
from eqgen.timesteps.laws import AbstractLaw, SpeedPairs, Uniform, draw_from_cells
from eqgen.timesteps.times import AbstractTimes
from eqgen.timesteps.weightings import AbstractWeighting, BoundWeight, Constant


class StaticTimesteps(AbstractTimestepSampler):
    """A law that never changes. The state is None.

    **Arguments:**

    - `times`: what is drawn from.
    - `law`, `weighting`: how often a time is drawn, and how much its loss then counts.
    - `pairing`: SpeeD's, or None.
    - `low_discrepancy`: spread every batch evenly over the law instead of drawing independently.
    """

    times: AbstractTimes
    law: AbstractLaw = Uniform()
    weighting: AbstractWeighting = Constant()
    pairing: SpeedPairs | None = None
    low_discrepancy: bool = False

    def init(self, example: PyTree = None, *, key: Key[Array, ""]) -> None:
        return None

    def sample(self, state: None, n: int, *, x: PyTree = None, key: Key[Array, ""]) -> Draw:
        drawn = n if self.pairing is None else n - n // 2
        dims = len(self.times.cells)
        points = unit_points(drawn, dims, low_discrepancy=self.low_discrepancy, key=key)
        t = self.law.draw(points, self.times)
        if self.pairing is not None:
            t = jnp.concatenate([t, self.pairing.partner(t[: n // 2], self.times)])
        return Draw(t, self.weighting(t, self.times))

    def update(
        self,
        state: None,
        draw: Draw,
        losses: Float[Array, " n"] | None = None,
        *,
        before: PyTree = None,
        after: PyTree = None,
        x: PyTree = None,
        objective: Objective | None = None,
        key: Key[Array, ""] | None = None,
        look: bool | None = None,
    ) -> None:
        return None

    def probabilities(self, state: None, x: PyTree = None) -> Float[Array, " cells"]:
        drawn = self.law.probabilities(self.times)
        if self.pairing is None:
            return drawn
        points = self.times.points()
        partners = self.times.cell(self.pairing.partner(points, self.times))
        return (drawn + jax.ops.segment_sum(drawn, partners, len(drawn))) / 2


class SecondMomentState(eqx.Module):
    """The last losses of every cell (in a ring) and how many each cell has had."""

    history: Float[Array, "cells length"]
    counts: Int[Array, " cells"]


class SecondMomentTimesteps(AbstractTimestepSampler):
    """Improved DDPM's importance sampler: p_t by the root mean square of the last losses at t.

    Nichol & Dhariwal (2021), section 3.3, `LossSecondMomentResampler` of their code. The weight 1 / (cells p_t)
    keeps the objective what it is under uniform times, E[1 / (cells p_t)] = 1, and only lowers its variance.
    Uniform until every cell has had `length` losses.

    **Arguments:**

    - `weighting`: of the objective whose variance is to fall; the bound, as in the paper.
    - `length`: the losses remembered by cell.
    - `uniform_share`: how much of a uniform law is mixed in.
    """

    times: AbstractTimes
    weighting: AbstractWeighting = BoundWeight()
    length: int = 10
    uniform_share: float = 0.001

    def init(self, example: PyTree = None, *, key: Key[Array, ""]) -> SecondMomentState:
        cells = self.times.num_cells
        return SecondMomentState(jnp.zeros((cells, self.length)), jnp.zeros(cells, jnp.int32))

    def sample(self, state: SecondMomentState, n: int, *, x: PyTree = None, key: Key[Array, ""]) -> Draw:
        probabilities = self.probabilities(state)
        points = unit_points(n, len(self.times.cells), low_discrepancy=False, key=key)
        t = draw_from_cells(probabilities, points, self.times)
        importance = _widths(self.times) / probabilities
        return Draw(t, self.weighting(t, self.times) * importance[self.times.cell(t)])

    def update(
        self,
        state: SecondMomentState,
        draw: Draw,
        losses: Float[Array, " n"] | None = None,
        *,
        before: PyTree = None,
        after: PyTree = None,
        x: PyTree = None,
        objective: Objective | None = None,
        key: Key[Array, ""] | None = None,
        look: bool | None = None,
    ) -> SecondMomentState:
        required(losses=losses)
        assert losses is not None
        cell, cells = self.times.cell(draw.t), self.times.num_cells
        weighted = self.weighting(draw.t, self.times) * losses
        # The place of each loss among the batch's losses of its cell, so that all are written at once.
        same = cell[:, None] == cell[None, :]
        rank = jnp.sum(jnp.tril(same, -1), axis=1)
        added = jnp.sum(same, axis=1)
        slot = (state.counts[cell] + rank) % self.length
        # Of more than `length` losses in a cell the last ones stay; the others go nowhere.
        row = jnp.where(added - rank > self.length, cells, cell)
        history = state.history.at[row, slot].set(weighted, mode="drop")
        return SecondMomentState(history, state.counts.at[cell].add(1))

    def probabilities(self, state: SecondMomentState, x: PyTree = None) -> Float[Array, " cells"]:
        uniform = _widths(self.times)
        root = jnp.sqrt(jnp.mean(state.history**2, axis=1)) * uniform
        total = jnp.sum(root)
        learned = jnp.where(total > 0, root / jnp.where(total > 0, total, 1.0), uniform)
        mixed = (1 - self.uniform_share) * learned + self.uniform_share * uniform
        return jnp.where(jnp.all(state.counts >= self.length), mixed, uniform)


class VarianceState(eqx.Module):
    """The gradient variance last measured, by cell, and the number of steps."""

    variance: Float[Array, " cells"]
    step: Int[Array, ""]


class VarianceTimesteps(AbstractTimestepSampler):
    """p_t proportional to the variance of the loss's gradient at t: the negative control of the adaptive sampler.

    Kim et al. (2024), table 4: it makes training worse, since times share their parameters. The variance is
    measured every `period` steps and interpolated in between cells; the loss is left unweighted. Uniform at first.

    **Arguments:**

    - `weighting`: of the loss.
    - `measure_every`: the period.
    - `sweep`: the number of times at which the variance is measured, evenly spread over the cells.
    - `num_examples`: how many examples of the batch the measurement uses.
    """

    times: AbstractTimes
    weighting: AbstractWeighting = Constant()
    measure_every: int = 1000
    sweep: int = 20
    num_examples: int = 64

    def __check_init__(self):
        if len(self.times.cells) > 1 and self.sweep < self.times.num_cells:
            raise ValueError(
                f"sweep={self.sweep}: pairs of times are not interpolated; measure at all cells."
            )

    @property
    def period(self) -> int:
        return self.measure_every

    def init(self, example: PyTree = None, *, key: Key[Array, ""]) -> VarianceState:
        return VarianceState(jnp.ones(self.times.num_cells), jnp.zeros((), jnp.int32))

    def sample(self, state: VarianceState, n: int, *, x: PyTree = None, key: Key[Array, ""]) -> Draw:
        points = unit_points(n, len(self.times.cells), low_discrepancy=False, key=key)
        t = draw_from_cells(self.probabilities(state), points, self.times)
        return Draw(t, self.weighting(t, self.times))

    def update(
        self,
        state: VarianceState,
        draw: Draw,
        losses: Float[Array, " n"] | None = None,
        *,
        before: PyTree = None,
        after: PyTree = None,
        x: PyTree = None,
        objective: Objective | None = None,
        key: Key[Array, ""] | None = None,
        look: bool | None = None,
    ) -> VarianceState:
        required(after=after, x=x, objective=objective, key=key)
        objective = cast(Objective, objective)

        def measure(state, model, x, key):
            swept = swept_cells(self.times, self.sweep)
            some = jax.tree.map(lambda x: x[: self.num_examples], x)
            measured = gradient_variance(objective, model, some, self.times.points()[swept], key=key)
            variance = jnp.interp(jnp.arange(self.times.num_cells), jnp.asarray(swept), measured)
            return VarianceState(variance, state.step)

        state = look_or_keep(look, state.step, self.period, measure, state, after, x, key)
        return VarianceState(state.variance, state.step + 1)

    def probabilities(self, state: VarianceState, x: PyTree = None) -> Float[Array, " cells"]:
        masses = state.variance * _widths(self.times)
        return masses / jnp.sum(masses)


def swept_cells(times: AbstractTimes, sweep: int | None) -> Int[np.ndarray, " swept"]:
    """`sweep` cells evenly spread over all, the first and the last included; all of them for None."""
    if sweep is None or sweep >= times.num_cells:
        return np.arange(times.num_cells)
    if sweep < 2:
        raise ValueError(f"sweep={sweep}: at least the first and the last cell are swept.")
    return np.round(np.linspace(0, times.num_cells - 1, sweep)).astype(int)


def gradient_variance(
    objective: Objective,
    model: PyTree,
    x: PyTree,
    ts: Shaped[Array, " times *_pair"],
    *,
    block: int | None = None,
    key: Key[Array, ""],
) -> Float[Array, " times"]:
    """tr Cov of the gradient of `objective(model, x, t, .)` over examples and noise, at every time of `ts`.

    The unbiased estimate from one gradient for each example. All times see the same noise.

    **Arguments:**

    - `x`: a batch of at least two examples.
    - `block`: how many gradients are held in memory at once; it divides the batch. None holds all.
    """
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(arrays)
    n = jax.tree.leaves(x)[0].shape[0]
    block = n if block is None else block
    if n < 2 or n % block:
        raise ValueError(f"{n} examples in blocks of {block}: use at least 2, and a block that divides them.")
    grouped = lambda tree: jax.tree.map(lambda x: x.reshape(n // block, block, *x.shape[1:]), tree)
    groups = grouped(x), grouped(jr.split(key, n))

    def gradient(t, x, key):
        return jax.grad(lambda flat: objective(eqx.combine(unravel(flat), static), x, t, key))(flat)

    def at(t):
        # Chan's update of mean and squared deviations, which does not cancel as a difference of squares does.
        def add(carry, group):
            mean, deviation, count = carry
            g = jax.vmap(lambda x, key: gradient(t, x, key))(*group)
            centre = jnp.mean(g, axis=0)
            total = count + block
            gap = jnp.sum((centre - mean) ** 2) * count * block / total
            deviation = deviation + jnp.sum((g - centre[None]) ** 2) + gap
            return (mean + (centre - mean) * block / total, deviation, total), None

        start = jnp.zeros_like(flat), jnp.zeros((), flat.dtype), 0
        (_, deviation, _), _ = jax.lax.scan(add, start, groups)
        return deviation / (n - 1)

    return jax.lax.map(at, ts)


def _widths(times):
    """The probabilities of the cells under uniform times."""
    return Uniform().probabilities(times)
