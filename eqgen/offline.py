"""Offline training as a generator: a learner and a fixed set of data, jitted chunks of updates.

As online (`eqgen.training`), all seeds of a run are stacked along a leading axis and vmapped, and randomness is a
function of (seed, update) alone, so that an interrupted run goes on exactly.
"""

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from eqgen.algorithms.base import AbstractOfflineLearner, Size
from eqgen.devices import spread_batches, spread_seeds, training_mesh
from eqgen.loops import INIT, TRAIN, NonFiniteError, run_key
from eqgen.tree import filter_fori_loop


@runtime_checkable
class Data(Protocol):
    """A PyTree of arrays on the device with a way to draw batches from it."""

    def sample(self, n: int, *, key: Key[Array, ""]) -> PyTree: ...


@dataclasses.dataclass(frozen=True)
class OfflineSettings:
    """How to train on a set. How many updates there are is the learner's `total_updates`, over which its learning
    rates fall."""

    batch_size: int = 128
    log_every: int = 500
    """Updates whose metrics are averaged into a record."""
    checkpoint_every: int = 2_500
    """0 saves at the end only."""

    def __post_init__(self):
        for name in ("batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.checkpoint_every < 0:
            raise ValueError(f"checkpoint_every is {self.checkpoint_every}; it must not be negative.")

    @classmethod
    def preset(cls, size: Size) -> Self:
        """The settings for an amount of computation."""
        if size == "smoke":
            return cls(batch_size=16, log_every=20, checkpoint_every=40)
        if size == "cpu":
            return cls(batch_size=64)
        return cls(log_every=5_000, checkpoint_every=10_000)


class OfflineState(eqx.Module):
    """All that a run needs to go on. The arrays of `learner` have a leading axis of seeds."""

    learner: PyTree
    update: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class OfflineProgress:
    """What the generator yields: the number of updates so far, one flat record per seed, the state."""

    step: int
    records: list[dict[str, Any]]
    state: OfflineState


def init_offline(make: Callable[..., PyTree], *args: PyTree, seeds: Sequence[int]) -> OfflineState:
    """The state of a run that has not begun; also the skeleton into which a checkpoint is read.

    **Arguments:** `make(*args, key=key)` gives the learner's state for one seed; arrays in `args` have a leading
    axis of seeds.
    """
    one = lambda seed, *args: make(*args, key=run_key(seed, INIT, 0))
    return OfflineState(eqx.filter_vmap(one)(jnp.asarray(seeds), *args), jnp.int32(0))


def train_offline(
    learner: AbstractOfflineLearner,
    data: Data,
    settings: OfflineSettings,
    *,
    seeds: Sequence[int],
    state: OfflineState,
) -> Generator[OfflineProgress, None, None]:
    """Trains one learner per seed and yields after every `log_every` and `checkpoint_every` updates.

    **Arguments:**

    - `learner`: with `total_updates`, after which training ends.
    - `data`: what batches are drawn from, the same for all seeds; `eqgen.data.planning` makes those of planners.
    - `state`: where to begin, from `init_offline`, or where to go on from, as `OfflineProgress.state` was.

    **Raises:** `NonFiniteError` when a metric is NaN or infinite; nothing is yielded for that chunk.
    """
    total, begun = learner.total_updates, time.perf_counter()
    mesh = training_mesh(len(seeds), settings.batch_size)
    state = OfflineState(spread_seeds(state.learner, mesh), state.update)
    while (first := int(state.update)) < total:
        everies = [every for every in (settings.log_every, settings.checkpoint_every) if every]
        stop = min(total, *((first // every + 1) * every for every in everies))
        kept = learner, data, settings.batch_size, mesh, jnp.asarray(seeds)
        learned, sums = _chunk(*kept, state.learner, state.update, jnp.int32(stop))
        sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
        state = OfflineState(learned, jnp.int32(stop))
        records = []
        for i, seed in enumerate(seeds):
            means = {name: float(value[i]) / (stop - first) for name, value in sums.items()}
            for name, value in means.items():
                if not np.isfinite(value):
                    raise NonFiniteError(f"The metric {name} of seed {seed} is {value} at update {stop}.")
            wall_time = time.perf_counter() - begun
            records.append({"seed": int(seed), "update": stop} | means | {"wall_time": wall_time})
        yield OfflineProgress(stop, records, state)


@eqx.filter_jit
def _chunk(learner, data, batch_size, mesh, seeds, states, start, stop):
    """Updates start..stop of all seeds, and the sums of their metrics."""

    def update(i, states):
        keys = jax.vmap(lambda seed: jr.split(run_key(seed, TRAIN, i)))(seeds)
        batches = eqx.filter_vmap(lambda key: data.sample(batch_size, key=key))(keys[:, 0])
        one = lambda state, batch, key: learner.update(state, batch, key=key)
        return eqx.filter_vmap(one)(states, spread_batches(batches, mesh), keys[:, 1])

    def body(i, carry):
        states, sums = carry
        states, metrics = update(i, states)
        return states, jax.tree.map(jnp.add, sums, metrics)

    shapes = eqx.filter_eval_shape(update, start, states)[1]
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return filter_fori_loop(start, stop, body, (states, sums))
