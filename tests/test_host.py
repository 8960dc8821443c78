"""The host environments against Gymnasium itself: what a step returns, seeds, states to go on from."""

import contextlib

import gymnasium
import jax
import numpy as np
import pytest

from eqgen.envs.base import example_transition
from eqgen.envs.catalog import MUJOCO_IDS, make
from eqgen.envs.host import HostEnv, HostVectorEnv, check_mujoco_versions


# Tasks that end early (Hopper), that only time ends (Reacher), whose bounds are not [-1, 1] (Humanoid), whose
# reward reads what the engine derived in the previous step (Ant, Humanoid), one without MuJoCo (Pendulum).
TASKS = "HalfCheetah-v5 Hopper-v5 Ant-v5 Humanoid-v5 Reacher-v5 HalfCheetah-v4 Pendulum-v1".split()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """MuJoCo writes its warnings to a file in the working directory."""
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def opened(*envs):
    try:
        yield envs if len(envs) > 1 else envs[0]
    finally:
        for env in envs:
            env.close()


def rescaled(task):
    """Gymnasium's own environment, with Gymnasium's own rescaling of actions."""
    return gymnasium.wrappers.RescaleAction(gymnasium.make(task), np.float32(-1), np.float32(1))


def actions(num_steps, num_envs, action_dim, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (num_steps, num_envs, action_dim)).astype(np.float32)


def run(envs, actions):
    """Everything that stepping returns, stacked over time."""
    steps = [envs.step(action) for action in actions]
    return jax.tree.map(lambda *x: np.stack(x), *steps)


def assert_bitwise_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("task", TASKS)
def test_steps_as_gymnasium_does_and_keeps_the_final_observation(task):
    with opened(HostVectorEnv(task, 2, seed=3)) as envs, opened(rescaled(task)) as reference:
        acts = actions(300, 2, envs.action_dim)
        first = envs.reset()
        acted_on, timestep = run(envs, acts)
        # Other bounds than [-1, 1] may be met by another rounding of the last bit, which contacts amplify.
        exact = np.all(reference.unwrapped.action_space.high == 1)
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-3}

        obs, _ = reference.reset(seed=envs.seeds[1])
        np.testing.assert_array_equal(first[1], obs.astype(np.float32))
        ends = 0
        for t, action in enumerate(acts[:, 1]):
            obs, reward, terminated, truncated, _ = reference.step(action)
            np.testing.assert_allclose(timestep.obs[t, 1], obs.astype(np.float32), **tolerance)
            np.testing.assert_allclose(timestep.reward[t, 1], np.float32(reward), **tolerance)
            assert timestep.terminated[t, 1] == terminated and timestep.truncated[t, 1] == truncated
            if terminated or truncated:
                obs, _ = reference.reset()
                ends += 1
            np.testing.assert_allclose(acted_on[t, 1], obs.astype(np.float32), **tolerance)
        assert ends > 0 or task.startswith(("HalfCheetah", "Ant"))


def test_returns_batches_of_records_as_the_learner_expects():
    env = make("mujoco/Hopper-v5")
    assert (env.name, env.obs_shape, env.action_dim, env.max_steps) == ("mujoco/Hopper-v5", (11,), 3, 1000)
    example = example_transition(env.obs_shape, env.action_dim)
    with opened(env.make(3, seed=0)) as envs:
        obs = envs.reset()
        acted_on, timestep = envs.step(actions(1, 3, 3)[0])
        pairs = [(obs, example.obs), (acted_on, example.obs), (timestep.obs, example.obs)]
        for name in ("reward", "terminated", "truncated"):
            pairs.append((getattr(timestep, name), getattr(example, name)))
        for got, like in pairs:
            assert isinstance(got, np.ndarray) and got.dtype == like.dtype and got.shape == (3, *like.shape)
        # Each call returns arrays of its own: JAX may still be reading the last ones.
        before = jax.tree.map(np.copy, (obs, acted_on, timestep))
        run(envs, actions(50, 3, 3))
        assert_bitwise_equal(before, (obs, acted_on, timestep))


def test_actions_beyond_the_bounds_are_the_bounds():
    with opened(HostVectorEnv("Hopper-v5", 1, seed=0), HostVectorEnv("Hopper-v5", 1, seed=0)) as (one, other):
        one.reset(), other.reset()
        assert_bitwise_equal(one.step(np.full((1, 3), 5.0)), other.step(np.ones((1, 3), np.float32)))


def test_the_seed_decides_everything_and_the_number_of_environments_nothing():
    numbers_and_seeds = (3, 0), (3, 0), (2, 0), (3, 1)
    with opened(*[HostVectorEnv("Hopper-v5", n, seed) for n, seed in numbers_and_seeds]) as envs:
        first = [env.reset() for env in envs]
        np.testing.assert_array_equal(first[0], first[1])
        np.testing.assert_array_equal(first[0][:2], first[2])
        rows = np.concatenate([first[0], first[3]])
        assert len(np.unique(rows, axis=0)) == 6
        acts = actions(120, 3, 3)
        path = run(envs[0], acts)
        assert_bitwise_equal(path, run(envs[1], acts))
        assert path[1].terminated.sum() > 3  # later episodes, which the generators began, included
        np.testing.assert_array_equal(envs[0].reset(), first[0])


@pytest.mark.parametrize("task", TASKS)
def test_a_restored_state_goes_on_bitwise(task):
    """Running 2n steps equals running n, rebuilding everything from the state, running n."""
    with opened(HostVectorEnv(task, 2, seed=7), HostVectorEnv(task, 2, seed=99)) as (whole, resumed):
        acts = actions(160, 2, whole.action_dim)
        whole.reset()
        halfway, _ = run(whole, acts[:90])
        state = whole.get_state()
        saved = jax.tree.map(np.copy, state)
        rest = run(whole, acts[90:])
        assert_bitwise_equal(state, saved)  # it is a copy, not a view of what goes on

        np.testing.assert_array_equal(resumed.set_state(state), halfway[-1])
        assert_bitwise_equal(resumed.get_state(), state)
        assert_bitwise_equal(run(resumed, acts[90:]), rest)
        assert_bitwise_equal(resumed.get_state(), whole.get_state())


def test_a_state_survives_jax_arrays_and_has_fixed_shapes():
    with opened(HostVectorEnv("Hopper-v5", 2, seed=0), HostVectorEnv("Hopper-v5", 2, seed=1)) as (one, other):
        one.reset()
        shapes = jax.tree.map(np.shape, one.get_state())
        run(one, actions(70, 2, 3))
        state = one.get_state()
        assert jax.tree.map(np.shape, state) == shapes
        other.set_state(jax.tree.map(jax.numpy.asarray, state))
        assert_bitwise_equal(run(other, actions(50, 2, 3, seed=1)), run(one, actions(50, 2, 3, seed=1)))


def test_a_state_that_cannot_be_retraced_is_reported():
    with opened(HostVectorEnv("Hopper-v5", 1, seed=0), HostVectorEnv("Hopper-v5", 2, seed=0)) as (env, wider):
        with pytest.raises(RuntimeError, match="before its first reset"):
            env.get_state()
        env.reset()
        run(env, actions(5, 1, 3))
        state = env.get_state()
        with pytest.raises(ValueError, match=r"\(1, 10\).*2 environments needs \(2, 10\)"):
            wider.set_state(state)
        state["obs"] = state["obs"] + np.float32(1e-3)
        with pytest.warns(RuntimeWarning, match="environment 0 did not retrace"):
            obs = env.set_state(state)
        np.testing.assert_allclose(obs, state["obs"] - 1e-3, atol=1e-5)


@pytest.mark.parametrize("task", MUJOCO_IDS)
def test_every_task_of_the_catalog_can_be_made(task):
    env = HostEnv(task)
    assert env.name == f"mujoco/{task}" and env.max_steps > 0 and len(env.obs_shape) == 1


def test_unsuitable_tasks_are_refused_by_name():
    gymnasium.register("eqgen-test/Endless-v0", entry_point="gymnasium.envs.classic_control:PendulumEnv")
    for task, message in (
        ("CartPole-v1", r"CartPole-v1 has the action space Discrete"),
        ("HalfCheetah-v3", "HalfCheetah-v3"),
        ("NoSuchTask-v0", "NoSuchTask-v0"),
        ("eqgen-test/Endless-v0", "no time limit"),
    ):
        with pytest.raises(ValueError, match=message):
            HostEnv(task)


def test_making_tasks_leaves_no_log_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    HostEnv("HalfCheetah-v5")  # whose XML file MuJoCo complains about
    assert not list(tmp_path.iterdir())


def test_mujoco_and_mjx_must_have_the_same_minor_version():
    check_mujoco_versions("3.17.0", "3.17.1")
    with pytest.raises(ImportError, match=r'4.0.0 and mujoco-mjx 3.17.0.*pip install "mujoco==3.17.0"'):
        check_mujoco_versions("4.0.0", "3.17.0")
