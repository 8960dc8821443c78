"""Sets from agents' runs: every row is followed by what the environment made of it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from eqgen import collection, experiments
from eqgen.algorithms.sac import SAC
from eqgen.data import d4rl, formats
from eqgen.data.episodes import DataError, transitions
from eqgen.envs import catalog
from eqgen.training import OnlineSettings


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two environments whose replay has wrapped around in the middle of an iteration."""
    settings = OnlineSettings(
        total_steps=60,
        num_envs=2,
        warmup_steps=20,
        batch_size=8,
        buffer_capacity=41,
        log_every=20,
        eval_every=0,
        checkpoint_every=0,
    )
    out = tmp_path_factory.mktemp("collection") / "run"
    experiments.train(SAC().resized("smoke"), "maze2d/umaze", settings, seeds=[5], out=out, verbose=False)
    return out


def saved(folder, name, **options):
    """The set, by way of its file."""
    d4rl.save(folder / "set.hdf5", **collection.make(name, **options))
    return d4rl.load(folder / "set.hdf5")


def assert_chained(episodes):
    """Within an episode the next observation is that of the next row, and nothing else ends it."""
    taken = transitions(episodes).take(np.arange(len(episodes)))
    inner = np.setdiff1d(np.arange(len(episodes)), episodes.starts[1:] - 1)
    np.testing.assert_array_equal(taken.next_obs[inner], episodes.observations[inner + 1])
    assert ((taken.terminated | taken.truncated)[episodes.starts[1:] - 1]).all()
    assert episodes.final_observations.shape == (episodes.num_episodes, episodes.observations.shape[1])


def test_replay_is_sorted_into_its_environments(run, tmp_path):
    episodes = saved(tmp_path, "medium-replay", run=run)
    assert episodes.lengths.tolist() == [20, 20]  # of 41 records one is half an iteration
    assert_chained(episodes)
    # The ball moves by less than 0.06 a step; the other environment's is elsewhere.
    moved = np.abs(np.diff(episodes.observations[:, :2], axis=0)).max(axis=1)
    assert np.flatnonzero(moved > 0.06).tolist() == [19]


def test_medium_is_what_the_policy_does(run, tmp_path):
    episodes = saved(tmp_path, "medium", run=run, size=900, seed=1)
    assert len(episodes) == 900 and episodes.lengths.tolist() == [90] * 10
    assert_chained(episodes)
    assert episodes.name == "eqgen/maze2d-umaze-medium" and episodes.scale is None
    about = formats.summary(tmp_path / "set.hdf5")
    assert "'algorithm': 'SAC', 'env_step': 60, 'seed': 5" in about["made with"]


def test_random_actions_are_uniform():
    task = catalog.make("probe/both")
    episodes = collection.make("random", env="probe/both", size=1000)["episodes"]
    assert episodes.actions.shape == (1000, task.action_dim)
    # Five standard errors of the mean of 1000 uniform numbers.
    assert abs(episodes.actions.mean()) < 5 / np.sqrt(3 * 1000) and np.abs(episodes.actions).max() <= 1
    assert_chained(episodes)


def test_host_environments_are_rolled_out_too():
    episodes = collection.make("random", env="mujoco/InvertedPendulum-v5", size=200)["episodes"]
    assert episodes.terminated.any() and len(episodes) == 200
    assert_chained(episodes)
    again = collection.make("random", env="mujoco/InvertedPendulum-v5", size=200)["episodes"]
    np.testing.assert_array_equal(again.observations, episodes.observations)


def test_the_expert_sets_the_scale(run, monkeypatch):
    returns = iter([jnp.array([1.0, 3.0]), jnp.array([10.0, 14.0])])
    monkeypatch.setattr(collection, "rollout_returns", lambda *_, **__: (next(returns), None))
    episodes = collection.make("medium-expert", run=run, expert=run, size=40)["episodes"]
    assert len(episodes) == 40 and (episodes.scale.low, episodes.scale.high) == (2.0, 12.0)
    assert "SAC after 60 steps" in episodes.scale.source and "uniform actions" in episodes.scale.source


def test_medium_step_is_where_a_third_was_learned(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "settings.json").write_text("{}")
    returns = [-30, -31, -25, -19, -10, -1, 0]
    records = [{"seed": 0, "env_step": 10 * i, "eval/return": r} for i, r in enumerate(returns)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert collection.medium_step(folder) == 30  # where -20 = -30 + 30 / 3 is passed


def test_what_is_missing_is_named(run):
    for name, message in (
        ("random", "random needs --env"),
        ("medium", "medium needs --run"),
        ("medium-replay", "medium-replay needs --run"),
        ("maze2d-tiny", "There is no set 'maze2d-tiny'. Choose one of maze2d-umaze"),
    ):
        with pytest.raises(DataError, match=message):
            collection.make(name)
    with pytest.raises(DataError, match="medium-expert needs --expert"):
        collection.make("medium-expert", run=run)
    with pytest.raises(DataError, match="probe/bth"):
        collection.make("random", env="probe/bth")


@pytest.mark.parametrize(
    "name, unused",
    [
        ("maze2d-umaze", {"run": "runs/a"}),
        ("maze2d-large-navigate", {"env": "mujoco/Hopper-v5"}),
        ("random", {"env": "toy/ring", "noise": 0.1}),
        ("random", {"run": "runs/a"}),
        ("medium", {"run": "runs/a", "env": "toy/ring"}),
        ("medium-replay", {"run": "runs/a", "size": 10}),
    ],
)
def test_what_a_set_does_not_use_is_refused(name, unused):
    flag = list(unused)[-1]
    with pytest.raises(DataError, match=f"The set {name} does not use --{flag}"):
        collection.make(name, **unused)
