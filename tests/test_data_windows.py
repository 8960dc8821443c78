"""Windows against index sets written out by hand and against padded arrays; normalisers; memory."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.data import windows as w
from eqgen.data.episodes import DataError, from_flat, transitions
from eqgen.data.normalizer import Normalizer


def episodes_of(rewards, *, terminated=(), truncated=(), streams=None, final=None):
    """Row i has observation (i, 10 i) and action -i - 1."""
    n = len(rewards)
    i = np.arange(n, dtype=np.float32)
    flags = np.zeros((2, n), bool)
    flags[0, list(terminated)] = flags[1, list(truncated)] = True
    final = None if final is None else np.asarray(final, np.float32)
    return from_flat(
        np.stack([i, 10 * i], axis=1),
        -i[:, None] - 1,
        np.asarray(rewards, np.float32),
        *flags,
        streams=streams,
        final_observations=final,
    )


def index_set(windows):
    return list(zip(windows.first.tolist(), windows.last.tolist()))


# --- Mazes (T5) ---

STREAM = [0, 0, 1, 1, 0, 0, 0, 1, 0, 0]


def test_maze_segments_end_with_the_first_reward():
    windows = w.maze2d_windows(episodes_of(STREAM, streams=[0, 10]), horizon=3, stride=2)
    assert index_set(windows) == [(0, 2), (1, 2), (2, 2), (4, 7), (5, 7), (6, 7), (7, 7)]
    steps = np.array([2, 1, 0, 3, 2, 1, 0])
    np.testing.assert_allclose(windows.label, 1 - 2 * steps / 3, atol=1e-6)
    assert windows.bounds == (-3.0, 0.0)
    assert (windows.weight == 1).all()


def test_rows_repeat_the_last_state_and_act_no_more():
    episodes = episodes_of(STREAM, streams=[0, 10])
    windows = w.maze2d_windows(episodes, horizon=3, stride=2)
    assert windows.rows(np.array([0, 1, 3])).tolist() == [[0, 2, 2], [1, 2, 2], [4, 6, 7]]
    window = windows.take(episodes, np.array([0, 3]))
    assert window.states[..., 0].tolist() == [[0, 2, 2], [4, 6, 7]]
    assert window.actions[..., 0].tolist() == [[-1, -3, 0], [-5, -7, 0]]


def test_maze_segments_do_not_cross_streams():
    windows = w.maze2d_windows(episodes_of(STREAM, streams=[0, 5, 10]), horizon=2, stride=1)
    assert index_set(windows) == [(0, 2), (1, 2), (2, 2), (5, 7), (6, 7), (7, 7)]


def test_long_segments_keep_their_end():
    windows = w.maze2d_windows(episodes_of(STREAM, streams=[0, 10]), horizon=2, stride=1, longest=2)
    assert index_set(windows) == [(1, 2), (2, 2), (6, 7), (7, 7)]
    assert windows.bounds == (-1.0, 0.0)


def test_windows_may_run_on_past_the_goal():
    episodes = episodes_of(STREAM, streams=[0, 10])
    windows, stopped = (w.maze2d_windows(episodes, horizon=3, stride=2, run_on=x) for x in (True, False))
    assert (windows.first == stopped.first).all() and (windows.label == stopped.label).all()
    assert windows.rows(np.array([3, 6])).tolist() == [[4, 6, 8], [7, 9, 9]]


def test_maze_policy_takes_the_whole_stream_in_blocks():
    windows = w.maze2d_policy_windows(episodes_of(STREAM, streams=[0, 5, 10]), horizon=2, stride=1, block=4)
    lasts = [3, 3, 3, 3, 4, 8, 8, 8, 8, 9]
    assert index_set(windows) == list(enumerate(lasts))


def test_antmaze_stops_at_the_first_success_of_an_episode():
    rewards = [0, 0, 1, 0, 1] + [0] * 5 + [1, 0, 0, 0, 0]
    episodes = episodes_of(rewards, terminated=[2, 4, 10], truncated=[4, 9, 14], streams=[0, 5, 10, 15])
    windows = w.antmaze_windows(episodes, horizon=3, stride=2)
    assert index_set(windows) == [(0, 2), (1, 2), (2, 2), (10, 10)]
    assert windows.label.tolist() == [-1, 0, 1, 1]
    policy = w.antmaze_policy_windows(episodes, horizon=3, stride=2)
    assert index_set(policy) == index_set(windows) + [(5, 9)]  # of the failure only what fits: rows 5, 7, 9


def test_a_set_without_success_is_refused():
    with pytest.raises(DataError, match="never reaches its goal"):
        w.maze2d_windows(episodes_of([0, 0, 0]))


def test_rebase_moves_the_first_position_to_the_origin():
    states = jnp.arange(24.0).reshape(2, 3, 4)
    moved = w.rebase(states)
    assert (moved[:, 0, :2] == 0).all() and (moved[..., 2:] == states[..., 2:]).all()
    np.testing.assert_array_equal(
        moved[:, 1:, :2] - moved[:, :-1, :2], states[:, 1:, :2] - states[:, :-1, :2]
    )


# --- Kitchen and locomotion: against arrays padded in full ---


def ragged(lengths, seed=0):
    rng = np.random.default_rng(seed)
    ends = np.cumsum(lengths) - 1
    return episodes_of(rng.integers(0, 4, sum(lengths)), terminated=ends[::2], truncated=ends[1::2])


def padded_labels(reward_rows, length, discount):
    """Each row of rewards summed backwards in full, all entries mapped to [-1, 1] together."""
    returns = np.array(
        [
            [sum(discount ** (j - i) * row[j] for j in range(i, length)) for i in range(length)]
            for row in reward_rows
        ]
    )
    return 2 * (returns - returns.min()) / (returns.max() - returns.min()) - 1


def test_mujoco_windows_fit_and_are_weighted():
    lengths, length, horizon = [7, 12, 3, 9], 12, 4
    episodes = ragged(lengths)
    windows = w.mujoco_windows(episodes, horizon=horizon, length=length, discount=0.9)
    rows, expected, starts = [], [], np.cumsum([0, *lengths])
    for e, n in enumerate(lengths):
        reward = episodes.rewards[starts[e] : starts[e] + n].astype(float)
        if e % 2 == 0:
            reward[-1] = -100
        rows.append([*reward, *[0.0] * (length - n)])
    labels = padded_labels(rows, length, 0.9)
    for e, n in enumerate(lengths):
        expected += [(starts[e] + k, starts[e] + n - 1, labels[e, k]) for k in range(n - horizon + 1)]
    assert index_set(windows) == [(a, b) for a, b, _ in expected]
    np.testing.assert_allclose(windows.label, [v for *_, v in expected], atol=1e-6)
    np.testing.assert_allclose(windows.weight, np.exp(2 * (windows.label - 1)), rtol=1e-6)
    assert windows.weight.min() >= np.exp(-4) - 1e-6 and windows.weight.max() <= 1


def test_kitchen_windows_go_on_to_the_limit():
    lengths, length, horizon, stride = [7, 10, 3], 10, 3, 2
    episodes = ragged(lengths)
    windows = w.kitchen_windows(episodes, horizon=horizon, stride=stride, length=length, discount=0.9)
    starts = np.cumsum([0, *lengths])
    rewards = [episodes.rewards[a : a + n].astype(float) for a, n in zip(starts, lengths)]
    labels = padded_labels([[*r, *[r[-1]] * (length - len(r))] for r in rewards], length, 0.9)
    expected = [
        (starts[e] + k, starts[e] + n - 1, labels[e, k])
        for e, n in enumerate(lengths)
        for k in range(min(n - 1, length - (horizon - 1) * stride - 1) + 1)
    ]
    assert index_set(windows) == [(a, b) for a, b, _ in expected]
    np.testing.assert_allclose(windows.label, [v for *_, v in expected], atol=1e-6)


def test_episodes_beyond_the_limit_and_windows_beyond_episodes_are_refused():
    with pytest.raises(DataError, match="has 12 steps; windows are made for at most 10"):
        w.mujoco_windows(ragged([12]), length=10)
    with pytest.raises(DataError, match="No window of 9 states, 2 steps apart"):
        w.mujoco_windows(ragged([12]), horizon=9, stride=2)
    with pytest.raises(ValueError, match="horizon is 1"):
        w.maze2d_policy_windows(ragged([12]), horizon=1)


def test_reward_scale_is_that_of_returns():
    episodes = episodes_of([1, 2, 3, 4], truncated=[1, 3])
    assert w.reward_scale(episodes) == 1000 / (7 - 3)


# --- Gathering ---


def test_device_and_host_gather_the_same():
    episodes = ragged([20, 30])
    windows = w.mujoco_windows(episodes, horizon=4, stride=3)
    i = np.arange(len(windows))
    on_host = windows.take(episodes, i)
    device = jax.device_put((episodes, windows))
    take = jax.jit(lambda data, index, i: index.take(data, i))
    on_device = take(*device, jnp.asarray(i))
    one_by_one = jax.jit(jax.vmap(lambda i: device[1].take(device[0], i)))(jnp.asarray(i))
    for other in (on_device, one_by_one):
        jax.tree.map(np.testing.assert_array_equal, on_host, other)


def test_sampling_is_uniform_over_windows():
    episodes = ragged([20])
    windows = jax.device_put(w.mujoco_windows(episodes, horizon=4))
    first = windows.sample(jax.device_put(episodes), 17_000, key=jr.key(0)).states[:, 0, 0]
    counts = np.bincount(np.asarray(first, int), minlength=20)
    assert (counts[17:] == 0).all()
    # Five standard deviations of a count of mean 1000.
    assert (abs(counts[:17] - 1000) < 5 * np.sqrt(1000)).all()


# --- Transitions ---


def test_transitions_without_final_observations_drop_what_is_unknown():
    episodes = episodes_of(range(6), terminated=[1], truncated=[3])
    view = transitions(episodes)
    assert view.rows.tolist() == [0, 1, 2, 4]  # 3 was truncated, after 5 the data end
    taken = view.take(np.arange(4))
    assert taken.next_obs[:, 0].tolist() == [1, 1, 3, 5]
    assert taken.terminated.tolist() == [False, True, False, False]


def test_transitions_with_final_observations_keep_all():
    episodes = episodes_of(range(6), terminated=[1], truncated=[3], final=[[7, 7], [8, 8], [9, 9]])
    device = jax.device_put(transitions(episodes))
    taken = jax.jit(lambda v: v.take(jnp.arange(6)))(device)
    assert taken.next_obs[:, 0].tolist() == [1, 7, 3, 8, 5, 9]
    assert transitions(episodes, drop_truncated=True).rows.tolist() == [0, 1, 2, 4, 5]


def test_a_truncated_step_within_a_stream_has_the_next_row_as_its_future():
    episodes = episodes_of(range(6), truncated=[2], streams=[0, 6])
    assert transitions(episodes).take(np.array([2])).next_obs[0, 0] == 3


# --- Normaliser ---


def test_constant_dimensions_become_zero_and_come_back():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(3, 2, (1000, 2)), np.full((1000, 2), [0.37, 1e4])], axis=1)
    rows = rows.astype(np.float32)
    normalise = Normalizer.fit(rows, rows_at_once=300)
    z = normalise(jnp.asarray(rows))
    assert normalise.std[2:].tolist() == [1, 1]
    assert (z[:, 2:] == 0).all()
    np.testing.assert_allclose(z[:, :2].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(z[:, :2].std(0), 1, atol=1e-5)
    np.testing.assert_allclose(normalise.inverse(z), rows, rtol=1e-6, atol=1e-6)


def test_statistics_are_of_double_precision():
    rows = (1e4 + np.random.default_rng(1).normal(size=(10_000, 1))).astype(np.float32)
    exact = rows.astype(np.float64)
    normalise = Normalizer.fit(rows, rows_at_once=64)
    np.testing.assert_allclose(normalise.mean, exact.mean(0), rtol=1e-7)
    np.testing.assert_allclose(normalise.std, exact.std(0), rtol=1e-6)


# --- Memory ---

GATHER = """
import json, resource, sys
import numpy as np
from eqgen.data import d4rl, windows
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
before = peak()
episodes = d4rl.load(sys.argv[1], memory_map=True)
index = windows.maze2d_policy_windows(episodes)
for i in np.array_split(np.random.default_rng(0).permutation(len(index))[:200_000], 100):
    batch = index.take(episodes, i)
print(json.dumps({"mb": peak() - before, "windows": len(index), "horizon": batch.states.shape[1]}))
"""


def test_windows_are_gathered_without_copies_of_the_set(tmp_path):
    from eqgen.data import d4rl

    n = 1_000_000
    i = np.arange(n, dtype=np.float32)
    none = np.zeros(n, bool)
    episodes = from_flat(np.stack([i] * 8, 1), i[:, None], i, none, none, streams=[0, n])
    d4rl.save(tmp_path / "large.hdf5", episodes, resets="never")
    done = subprocess.run(
        [sys.executable, "-c", GATHER, str(tmp_path / "large.hdf5")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["windows"] == n and found["horizon"] == 32
    materialised = n * 32 * 8 * 4 / 1e6  # 1024 MB
    # The file has 40 MB, the index 16 MB; making it takes some 64-bit arrays of a number per row.
    assert found["mb"] < materialised / 4, found
