"""Generated maze sets: what the controller does, how targets change, and the scores that belong to them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.data import d4rl, formats, mazes, windows
from eqgen.data.reference import D4RL, Scale, d4rl_score, mean_score
from eqgen.envs.maze import MAZES


@pytest.fixture(scope="module")
def umaze():
    """The set that `eqgen data make maze2d-umaze --size 50000` writes, before it is written."""
    return mazes.make("maze2d", "umaze", size=50_000, seed=3)


@eqx.filter_jit
def steps(maze, observations, actions):
    def one(obs, action):
        state = maze.start(obs[:2], obs[2:])[0]
        return maze.step(state, action, key=jr.key(0))[1].obs

    return jax.vmap(one)(observations, actions)


def test_rows_are_steps_of_the_environment(umaze):
    data, maze = umaze["episodes"], MAZES["umaze"]()
    assert len(data) == 50_000 and (np.diff(data.streams) == 5000).all()
    rows = np.setdiff1d(np.arange(len(data)), data.streams[1:] - 1)
    following = steps(maze, jnp.asarray(data.observations[rows]), jnp.asarray(data.actions[rows]))
    np.testing.assert_allclose(following, data.observations[rows + 1], atol=1e-5)
    assert np.abs(data.actions).max() == 1  # noise of 0.5 is clipped


def test_targets_change_where_they_were_reached_or_given_up(umaze):
    data, goal = umaze["episodes"], umaze["infos"]["goal"]
    changes = np.flatnonzero((goal[1:] != goal[:-1]).any(axis=1))
    inside = np.setdiff1d(np.flatnonzero(data.truncated), data.streams[1:] - 1)
    np.testing.assert_array_equal(np.setdiff1d(changes, data.streams[1:] - 1), inside)
    at_cell = np.round(goal[inside])  # targets are cells, shifted by up to 0.1
    assert (np.abs(goal - np.round(goal)) <= 0.1 + 1e-6).all()
    distance = np.linalg.norm(data.observations[inside, :2] - at_cell, axis=1)
    lengths = data.lengths[np.isin(data.starts[1:] - 1, inside)]
    assert ((distance < 0.1) | (lengths == 301)).all() and (distance < 0.1).mean() > 0.99
    assert len(np.unique(np.round(goal), axis=0)) == len(MAZES["umaze"]().cells)


def test_rewards_are_those_of_the_fixed_goal_at_the_current_state(umaze):
    data = umaze["episodes"]
    near = np.linalg.norm(data.observations[:, :2] - np.array([1.0, 1.0]), axis=1) <= 0.5
    np.testing.assert_array_equal(data.rewards, near.astype(np.float32))
    assert not data.terminated.any()


def test_statistics_are_those_of_an_independent_simulation(umaze):
    # A NumPy simulation of D4RL's script: 12.4 thousand targets per million steps, 8.4 % of steps rewarded. In
    # 50 000 steps there are about 620 targets, whose lengths have a standard deviation of half their mean.
    data = umaze["episodes"]
    per_million = 1e6 * data.num_episodes / len(data)
    assert per_million == pytest.approx(12_400, rel=0.08)
    # The goal is visited about 150 times.
    assert data.rewards.mean() == pytest.approx(0.084, rel=0.3)


def test_seeds_decide(umaze):
    again, other = (mazes.collect_maze2d(MAZES["umaze"](), size=50_000, seed=s)[0] for s in (3, 4))
    np.testing.assert_array_equal(again.observations, umaze["episodes"].observations)
    assert (other.observations[0] != again.observations[0]).any()


def test_the_file_says_how_it_was_made(umaze, tmp_path):
    path = tmp_path / "umaze.hdf5"
    d4rl.save(path, **umaze)
    read = d4rl.load(path)
    for field in ("observations", "actions", "rewards", "truncated", "starts", "streams"):
        np.testing.assert_array_equal(getattr(read, field), getattr(umaze["episodes"], field))
    assert read.name == "eqgen/maze2d-umaze" and read.scale == umaze["episodes"].scale
    about = formats.summary(path)
    assert "seed 3" in about["made with"] and "noise 0.5" in about["made with"]
    assert "verified" in about["checksum"] and about["streams"] == 10
    index = windows.maze2d_windows(read)
    assert 0 < len(index) < len(read) and index.label.min() == -1 and index.label.max() == 1


def test_navigate_has_episodes_of_one_length_and_goals_at_junctions():
    maze = MAZES["medium"]()
    data, goal = mazes.collect_navigate(maze, size=2002, seed=0)
    assert data.lengths.tolist() == [1001, 1001] and data.streams.tolist() == data.starts.tolist()
    ends = np.flatnonzero(data.truncated)
    assert ends.tolist() == [1000, 2001]
    free = {tuple(cell) for cell in np.asarray(maze.cells, int)}
    for i, j in np.unique(np.round(goal).astype(int), axis=0):
        ways = [(i + a, j + b) in free for a, b in ((-1, 0), (1, 0), (0, -1), (0, 1))]
        assert ways not in ([True, True, False, False], [False, False, True, True])
    assert len(np.unique(goal, axis=0)) > 6  # a new one after each success


def test_sizes_and_kinds_are_checked():
    with pytest.raises(ValueError, match="size is 0"):
        mazes.collect_maze2d(MAZES["umaze"](), size=0)
    with pytest.raises(ValueError, match="kind is 'ant'"):
        mazes.make("ant", "umaze")


# --- Scores (T19) ---

TABLE = {
    "maze2d-umaze-v1": (23.85, 161.86),
    "maze2d-medium-v1": (13.13, 277.39),
    "maze2d-large-v1": (6.7, 273.99),
    "maze2d-umaze-dense-v1": (68.537689, 193.662856),
    "maze2d-medium-dense-v1": (44.264742, 297.455255),
    "maze2d-large-dense-v1": (30.569041, 303.485738),
    "maze2d-eval-umaze-v1": (36.63, 141.4),
    "maze2d-eval-medium-v1": (13.07, 204.93),
    "maze2d-eval-large-v1": (16.4, 302.22),
    "maze2d-open-v0": (0.01, 20.66),
    "halfcheetah-medium-expert-v2": (-280.178953, 12135.0),
    "hopper-medium-replay-v2": (-20.272305, 3234.3),
    "walker2d-random-v2": (1.629008, 4592.3),
    "ant-expert-v2": (-325.6, 3879.7),
    "antmaze-large-diverse-v2": (0, 1),
    "kitchen-mixed-v0": (0, 4),
}


@pytest.mark.parametrize("name", TABLE)
def test_d4rl_scores_go_there_and_back(name):
    low, high = TABLE[name]
    returns = np.array([low, high, (low + high) / 2, 2 * high])
    scores = d4rl_score(name, returns)
    # The table rounds to six decimals.
    np.testing.assert_allclose(scores[:3], [0, 100, 50], atol=1e-5)
    np.testing.assert_allclose(D4RL[name].returns(scores), returns, atol=1e-9)
    assert D4RL[name].source.startswith("d4rl/")


def test_own_sets_have_scores_of_their_own(umaze):
    scale = umaze["episodes"].scale
    # 200 episodes of the independent simulation: 220.7 for the controller, 27.8 +- 3.8 for random actions.
    assert scale.high == pytest.approx(220.7, rel=0.05) and scale.low == pytest.approx(27.8, abs=3 * 3.8)
    assert scale.origin == "eqgen" and scale.score(scale.high) == 100


def test_scales_of_different_origin_are_not_mixed(umaze):
    own, theirs = umaze["episodes"].scale, D4RL["maze2d-umaze-v1"]
    with pytest.raises(
        ValueError, match="no common scale of eqgen/maze2d-umaze on eqgen's and maze2d-umaze-v1 on D4RL's"
    ):
        mean_score([(own, np.ones(3)), (theirs, np.ones(3))])
    with pytest.raises(ValueError, match="eqgen/maze2d-umaze was made by eqgen"):
        d4rl_score("eqgen/maze2d-umaze", 1.0)
    with pytest.raises(ValueError, match="no reference for 'maze2d-tiny-v1'. It has: maze2d-umaze-v1"):
        d4rl_score("maze2d-tiny-v1", 1.0)
    halves = [(D4RL["kitchen-mixed-v0"], np.array([2, 2, 2])), (D4RL["antmaze-umaze-v2"], np.array([1]))]
    assert mean_score(halves) == 75
    with pytest.raises(ValueError, match="are no scale"):
        Scale("x", 1.0, 1.0, "eqgen", "")
