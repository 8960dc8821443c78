"""Offline data: episodes as flat arrays with the rows where they begin.

What every loader returns and every window is cut from. The arrays may lie in memory, on a device (`jax.device_put`
takes the whole PyTree) or in a memory-mapped file; nothing here copies them.
"""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from eqgen.data.reference import Scale
from eqgen.types import Transition


AnyArray = Array | np.ndarray


class DataError(ValueError):
    """A file or its content cannot be used as a dataset; the message says what is wrong and what to do."""


class Episodes(eqx.Module):
    """n rows of (observation, action, reward), in the order in which they happened.

    An *episode* ends where a row is terminated or truncated, and where a stream ends. A *stream* is a piece of one
    simulation: the state of a row is followed by that of the next row, whatever episodes it was cut into. Most sets
    are reset at every end of an episode, so the two are the same; D4RL's Maze2D is never reset.
    """

    observations: Float[AnyArray, "n obs"]
    actions: Float[AnyArray, "n act"]
    rewards: Float[AnyArray, " n"] | None
    """None where the data come without a task (OGBench)."""
    terminated: Bool[AnyArray, " n"]
    truncated: Bool[AnyArray, " n"]
    starts: Int[AnyArray, " bounds"]
    """Episode e is rows starts[e] .. starts[e + 1] - 1."""
    streams: Int[AnyArray, " stream_bounds"]
    """Stream s is rows streams[s] .. streams[s + 1] - 1."""
    final_observations: Float[AnyArray, "streams obs"] | None = None
    """What followed the last row of each stream, where that is known."""
    name: str = eqx.field(static=True, default="")
    scale: Scale | None = eqx.field(static=True, default=None)
    """The returns that score 0 and 100 for this set."""

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def num_episodes(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Rows per episode."""
        return np.diff(self.starts)

    def returns(self) -> np.ndarray:
        """The undiscounted return of each episode, in double precision."""
        return np.add.reduceat(np.asarray(need_rewards(self), np.float64), np.asarray(self.starts[:-1]))

    def stream_of(self, rows: Int[AnyArray, " *b"]) -> Int[AnyArray, " *b"]:
        """The stream in which each row lies."""
        xp = self.streams.__array_namespace__()
        return xp.searchsorted(self.streams, rows, side="right") - 1


def need_rewards(episodes: Episodes) -> Float[AnyArray, " n"]:
    """The rewards.

    **Raises:** `DataError` when the set has none.
    """
    if episodes.rewards is None:
        raise DataError(
            f"{episodes.name or 'This set'} has no rewards. Load it with the goal of a task (OGBench: "
            "`load(path, goal=(x, y), tolerance=...)`)."
        )
    return episodes.rewards


# --- From flat arrays ---


def from_flat(
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray | None,
    terminated: np.ndarray,
    truncated: np.ndarray,
    *,
    streams: Sequence[int] | np.ndarray | None = None,
    final_observations: np.ndarray | None = None,
    name: str = "",
    scale: Scale | None = None,
) -> Episodes:
    """Episodes of arrays that share their leading axis, checked.

    **Arguments:**

    - `streams`: the rows where simulations begin and, last, the number of rows. None: they begin with the
        episodes.
    - `final_observations`: what followed each stream.

    **Raises:** `DataError` for arrays without rows or of other shapes, and for numbers that are not finite.
    """
    arrays = {"observations": observations, "actions": actions, "rewards": rewards}
    arrays |= {"terminals": terminated, "timeouts": truncated}
    n = len(observations)
    if n == 0:
        raise DataError("observations has no rows. An empty set cannot be used.")
    if n >= 2**31:
        raise DataError(f"observations has {n} rows; rows are numbered by 32 bits. Split the set.")
    for key, array in arrays.items():
        if array is None:
            continue
        axes = 2 if key in ("observations", "actions") else 1
        if array.ndim != axes or 0 in array.shape:
            expected = "(rows, numbers)" if axes == 2 else "(rows,)"
            raise DataError(f"{key} has shape {array.shape}; {expected} is needed. Flatten what is nested.")
        if len(array) != n:
            raise DataError(
                f"{key} has {len(array)} rows and observations has {n}. Every row needs both: was the file cut?"
            )
    for key in ("observations", "actions", "rewards"):
        if arrays[key] is not None:
            check_finite(key, arrays[key])
    if final_observations is not None:
        check_finite("next_observations", final_observations)

    last = terminated | truncated
    if streams is not None:
        last[np.asarray(streams[1:]) - 1] = True
    last[-1] = True
    starts = np.concatenate([[0], np.flatnonzero(last) + 1]).astype(np.int32)
    streams = starts if streams is None else np.asarray(streams, np.int32)
    return Episodes(
        observations,
        actions,
        rewards,
        terminated,
        truncated,
        starts,
        streams,
        final_observations,
        name,
        scale,
    )


def check_finite(key: str, array: np.ndarray, rows_at_once: int = 2**18) -> None:
    """**Raises:** `DataError` naming the first row with NaN or infinity."""
    for begin in range(0, len(array), rows_at_once):
        good = np.isfinite(array[begin : begin + rows_at_once])
        if not good.all():
            row = begin + int(np.argmin(good.reshape(len(good), -1).all(axis=1)))
            raise DataError(
                f"{key} is {array[row]} in row {row}: not finite. Drop the episodes with such rows, or make the "
                "set anew."
            )


# --- Single steps ---


class Transitions(eqx.Module):
    """The steps of a dataset as `Transition`s, by index: replay that never changes."""

    episodes: Episodes
    rows: Int[AnyArray, " m"]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, i: Int[AnyArray, " *b"]) -> Transition:
        """The transitions of these numbers. Inside `jax.jit` the arrays must lie on the device."""
        data, rows = self.episodes, self.rows[i]
        xp = data.streams.__array_namespace__()
        stream = data.stream_of(rows)
        following = xp.minimum(rows + 1, data.streams[stream + 1] - 1)
        next_obs = data.observations[following]
        if data.final_observations is not None:
            ends = (rows + 1 == data.streams[stream + 1])[..., None]
            next_obs = xp.where(ends, data.final_observations[stream], next_obs)
        fields = data.observations[rows], data.actions[rows], need_rewards(data)[rows], next_obs
        return Transition(*map(jnp.asarray, (*fields, data.terminated[rows], data.truncated[rows])))

    def sample(self, n: int, *, key: Key[Array, ""]) -> Transition:
        """`n` transitions drawn uniformly with replacement."""
        return self.take(jr.randint(key, (n,), 0, len(self)))


def transitions(episodes: Episodes, *, drop_truncated: bool = False) -> Transitions:
    """The steps whose next observation is known, and the terminated ones, whose next observation does not matter
    (where it is not known, it is the observation itself).

    **Arguments:** `drop_truncated` also drops steps at which an episode was truncated, as D4RL's
    `qlearning_dataset` does.
    """
    keep = np.ones(len(episodes), bool)
    if episodes.final_observations is None:
        ends = np.asarray(episodes.streams[1:]) - 1
        keep[ends] = np.asarray(episodes.terminated)[ends]
    if drop_truncated:
        keep &= ~np.asarray(episodes.truncated)
    return Transitions(episodes, np.flatnonzero(keep).astype(np.int32))
