"""Windows of trajectories for planners, as rows to gather: a dataset of any size costs 16 bytes per window.

A window is the states at rows k, k + m, ..., k + (H - 1) m (horizon H, stride m) with their actions, the normalised
return of its first state, and a weight. Which rows begin a window, where the states of a window stop changing, and
how returns become labels differ by family of tasks. The rules are those of Diffusion Veteran's and Prior Guidance's
code (arXiv 2505.10881), which states them nowhere else.

| function | windows begin at | beyond the end | label before the map to [-1, 1] |
|---|---|---|---|
| `maze2d_windows` | rows of segments that reach the goal | last state repeats | -(steps to the goal) |
| `maze2d_policy_windows` | all rows, in blocks of 800 | last state of the block repeats | none |
| `antmaze_windows` | rows before the first success of an episode | last state repeats | -(steps to the goal) |
| `antmaze_policy_windows` | these, and unsuccessful episodes | as above; none there | none |
| `kitchen_windows` | those whose window fits into 280 steps | last state, reward repeat | discounted return |
| `mujoco_windows` | those whose window fits into the episode | none | the same, a fall rewarded by -100 |

Labels are normalised after padding, over all entries that the reference has in memory, the padded ones included.
"""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key

from eqgen.data.episodes import AnyArray, DataError, Episodes, need_rewards


class Window(eqx.Module):
    """Windows as a planner takes them (`*b` of them)."""

    states: Float[Array, "*b horizon obs"]
    actions: Float[Array, "*b horizon act"]
    label: Float[Array, "*b"]
    weight: Float[Array, "*b"]


class Windows(eqx.Module):
    """n windows of a set by their rows. `jax.device_put` takes it to the device, like `Episodes`."""

    first: Int[AnyArray, " n"]
    """The row of the first state."""
    last: Int[AnyArray, " n"]
    """The row whose state is repeated from there on, with actions of zero."""
    label: Float[AnyArray, " n"]
    weight: Float[AnyArray, " n"]
    horizon: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)
    bounds: tuple[float, float] = eqx.field(static=True, default=(-1.0, 1.0))
    """The returns that became the labels -1 and 1."""

    def __len__(self) -> int:
        return len(self.first)

    def rows(self, i: Int[AnyArray, "*b"]) -> Int[AnyArray, "*b horizon"]:
        """The rows of the states of windows number `i`."""
        xp = self.first.__array_namespace__()
        return xp.minimum(self._unclipped(xp, i), self.last[i][..., None])

    def _unclipped(self, xp, i):
        first = self.first[i][..., None]
        steps = (self.stride * xp.arange(self.horizon)).astype(first.dtype)
        return first + steps.reshape((1,) * (first.ndim - 1) + steps.shape)

    def take(self, episodes: Episodes, i: Int[AnyArray, "*b"]) -> Window:
        """Windows number `i`, gathered from the set that they were made for.

        With both on the device it may be jitted and scanned; with both in NumPy (memory-mapped files) only the
        rows that are needed are read.
        """
        xp = self.first.__array_namespace__()
        rows = self.rows(i)
        inside = (self._unclipped(xp, i) <= self.last[i][..., None])[..., None]
        actions = xp.where(inside, episodes.actions[rows], xp.float32(0))
        out = episodes.observations[rows], actions, self.label[i], self.weight[i]
        return Window(*map(jnp.asarray, out))

    def sample(self, episodes: Episodes, n: int, *, key: Key[Array, ""]) -> Window:
        """`n` windows drawn uniformly with replacement."""
        return self.take(episodes, jr.randint(key, (n,), 0, len(self)))


def rebase(states: Float[Array, "*b horizon obs"]) -> Float[Array, "*b horizon obs"]:
    """States whose first two numbers count from those of the first state (in whatever units they have).

    For the inverse dynamics of mazes, in training and acting alike.
    """
    origin = states[..., :1, :2]
    return states.at[..., :2].add(-origin)


def behaviour_weights(label: Float[AnyArray, " n"], temperature: float = 2.0) -> Float[AnyArray, " n"]:
    """exp(temperature (v - 1)) of labels v in [-1, 1]: in [e^-4, 1], not renormalised."""
    return np.exp(temperature * (label - 1))


# --- Mazes ---


def maze2d_windows(
    episodes: Episodes, *, horizon: int = 32, stride: int = 15, longest: int = 800, run_on: bool = False
) -> Windows:
    """Windows of segments that reach the goal, for planner and critic.

    A segment runs from the first unrewarded row after leaving the goal (or of a stream) to the first rewarded one
    and keeps its last `longest` rows. Rewards are those of the data, 1 at the goal and 0 elsewhere.

    **Arguments:** `run_on`: windows go on past the goal to the end of the stream, where the reference repeats the
    state at which the goal was reached, moving as it is. Labels stay the same.
    """
    rewarded = np.asarray(need_rewards(episodes)) > 0
    streams = np.asarray(episodes.streams)
    entered = np.concatenate([[True], rewarded[:-1]])
    entered[streams[:-1]] = True
    return _goal_windows(episodes, np.flatnonzero(entered & ~rewarded), horizon, stride, longest, run_on)


def antmaze_windows(
    episodes: Episodes, *, horizon: int = 40, stride: int = 25, longest: int = 1001
) -> Windows:
    """Windows up to the first success of each stream that has one: between two timeouts, for AntMaze's files."""
    return _goal_windows(episodes, np.asarray(episodes.streams)[:-1], horizon, stride, longest, run_on=False)


def _goal_windows(episodes, begins, horizon, stride, longest, run_on):
    """Windows from each of `begins` to the next rewarded row, where that is in the same stream."""
    goals = np.flatnonzero(np.asarray(need_rewards(episodes)) > 0)
    stream_end = np.asarray(episodes.streams)[episodes.stream_of(begins) + 1]
    following = np.searchsorted(goals, begins)
    reached = np.append(goals, len(episodes))[following]
    success = reached < stream_end
    if not success.any():
        raise DataError(
            f"{episodes.name or 'The set'} never reaches its goal: no reward is above 0. Planner and critic need "
            "successes; relabel the rewards, or use windows for the policy."
        )
    end, stream_end = reached[success], stream_end[success]
    begin = np.maximum(begins[success], end - longest + 1)
    first, segment = _all_rows(begin, end + 1)
    to_goal = end[segment] - first
    # The padding, whose return is 0, is always among the entries that set the range.
    low = -float(to_goal.max())
    label = _affine(-to_goal, low, 0.0)
    last = stream_end[segment] - 1 if run_on else end[segment]
    return _windows(first, last, label, None, horizon, stride, (low, 0.0))


def maze2d_policy_windows(
    episodes: Episodes, *, horizon: int = 32, stride: int = 15, block: int = 800
) -> Windows:
    """Windows of the whole stream, for inverse dynamics: it is cut into blocks, and no window leaves its block.

    Without labels. `rebase` their states.
    """
    streams = np.asarray(episodes.streams)
    begins = np.concatenate([np.arange(a, b, block) for a, b in zip(streams, streams[1:])])
    ends = np.append(begins[1:], len(episodes))
    first, which = _all_rows(begins, ends)
    return _windows(first, ends[which] - 1, None, None, horizon, stride)


def antmaze_policy_windows(
    episodes: Episodes, *, horizon: int = 40, stride: int = 25, longest: int = 1001
) -> Windows:
    """Those of `antmaze_windows`, and of streams without success the windows that fit. Without labels."""
    streams = np.asarray(episodes.streams)
    success = np.add.reduceat(np.asarray(need_rewards(episodes)) > 0, streams[:-1], dtype=int) > 0
    first, which = _all_rows(streams[:-1][~success], streams[1:][~success] - (horizon - 1) * stride)
    last = streams[1:][~success][which] - 1
    if success.any():
        with_goal = antmaze_windows(episodes, horizon=horizon, stride=stride, longest=longest)
        first = np.concatenate([with_goal.first, first])
        last = np.concatenate([with_goal.last, last])
    return _windows(first, last, None, None, horizon, stride)


# --- Kitchen and locomotion ---


def kitchen_windows(
    episodes: Episodes, *, horizon: int = 32, stride: int = 4, length: int = 280, discount: float = 0.997
) -> Windows:
    """Windows of demonstrations, continued to `length` steps by their last state, their last reward, no action."""
    starts, lengths = np.asarray(episodes.starts[:-1]), episodes.lengths
    rewards = _padded_rewards(episodes, length, repeat_last=True)
    returns, bounds = _discounted(rewards, discount)
    stop = np.minimum(lengths, length - (horizon - 1) * stride)
    first, episode = _all_rows(starts, starts + stop)
    label = _affine(returns[episode, first - starts[episode]], *bounds)
    return _windows(first, (starts + lengths)[episode] - 1, label, None, horizon, stride, bounds)


def mujoco_windows(
    episodes: Episodes,
    *,
    horizon: int = 4,
    stride: int = 1,
    length: int = 1000,
    discount: float = 0.997,
    terminal_reward: float = -100.0,
    weighted: bool = True,
) -> Windows:
    """Windows that lie within an episode, weighted by the return of their first state (`behaviour_weights`).

    Returns are those of episodes padded with zeros to `length` steps, whose terminal step, if there is one, is
    rewarded by `terminal_reward`.
    """
    starts, lengths = np.asarray(episodes.starts[:-1]), episodes.lengths
    rewards = _padded_rewards(episodes, length, repeat_last=False)
    ends = starts + lengths - 1
    fell = np.asarray(episodes.terminated)[ends]
    rewards[fell, lengths[fell] - 1] = terminal_reward
    returns, bounds = _discounted(rewards, discount)
    first, episode = _all_rows(starts, starts + lengths - (horizon - 1) * stride)
    label = _affine(returns[episode, first - starts[episode]], *bounds)
    weight = behaviour_weights(label) if weighted else None
    return _windows(first, ends[episode], label, weight, horizon, stride, bounds)


def reward_scale(episodes: Episodes) -> float:
    """1000 / (largest - least return of an episode): the factor on rewards in learning V of locomotion."""
    returns = episodes.returns()
    if returns.max() == returns.min():
        raise DataError(f"All {len(returns)} episodes have the return {returns[0]}: there is no scale.")
    return float(1000 / (returns.max() - returns.min()))


# --- What they share ---


def _all_rows(begins, ends):
    """All rows of the ranges begins[i] .. ends[i] - 1 and, for each row, its i. Empty ranges are left out."""
    lengths = np.maximum(ends - begins, 0)
    which = np.repeat(np.arange(len(begins)), lengths)
    offset = np.arange(len(which)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.asarray(begins)[which] + offset, which


def _padded_rewards(episodes, length, *, repeat_last):
    """The rewards of each episode in double precision, (episodes, length), padded."""
    starts, lengths = np.asarray(episodes.starts[:-1]), episodes.lengths
    if lengths.max() > length:
        raise DataError(
            f"An episode of {episodes.name or 'the set'} has {lengths.max()} steps; windows are made for at most "
            f"{length}. Pass length=..., the limit of the environment."
        )
    rewards = np.asarray(need_rewards(episodes))
    steps = np.arange(length)
    inside = steps < lengths[:, None]
    rows = starts[:, None] + np.minimum(steps, lengths[:, None] - 1)
    return np.where(inside | repeat_last, rewards[rows], 0.0).astype(np.float64)


def _discounted(rewards, discount):
    """Returns-to-go along the second axis, and the least and greatest of them."""
    returns = np.empty_like(rewards)
    running = np.zeros(len(rewards))
    for step in reversed(range(rewards.shape[1])):
        returns[:, step] = running = rewards[:, step] + discount * running
    return returns, (float(returns.min()), float(returns.max()))


def _affine(returns, low, high):
    """[low, high] mapped to [-1, 1]; 1 if all returns are the same."""
    return 2 * (returns - low) / (high - low) - 1 if high > low else np.ones(len(returns))


def _windows(first, last, label, weight, horizon, stride, bounds=(-1.0, 1.0)):
    if horizon < 2 or stride < 1:
        raise ValueError(f"horizon is {horizon} and stride {stride}; at least 2 and 1 are needed.")
    if len(first) == 0:
        raise DataError(
            f"No window of {horizon} states, {stride} steps apart, fits into an episode. Shorten horizon or stride."
        )
    fill = lambda x, default: np.full(len(first), default, np.float32) if x is None else x.astype(np.float32)
    return Windows(
        first.astype(np.int32),
        last.astype(np.int32),
        fill(label, 0.0),
        fill(weight, 1.0),
        horizon,
        stride,
        bounds,
    )
