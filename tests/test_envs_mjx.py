"""MJX tasks against Gymnasium's, step by step. The small ones here; all of them, and laws of returns, when slow."""

import importlib.util
import sys
from pathlib import Path

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import mujoco
import numpy as np
import pytest
from mujoco import mjx
from scipy.stats import kstest

from eqgen.envs.base import step_autoreset
from eqgen.envs.catalog import make
from eqgen.envs.mjx import base
from eqgen.envs.mjx.base import AbstractMJXEnv
from eqgen.envs.mjx.tasks import TASKS, HalfCheetah, InvertedPendulum, Pusher, Reacher


@pytest.fixture(scope="module")
def parity():
    """The benchmark, whose measurements the tests judge."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    sys.path.insert(0, str(folder))  # for what it imports from beside itself
    try:
        spec = importlib.util.spec_from_file_location("parity", folder / "parity.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(folder))


SMALL = ("InvertedPendulum-v5",)
QUICK = ("InvertedPendulum", "Hopper", "Ant")
ALL = [f"{name}-v{version}" for name, task in TASKS.items() for version in task.versions]


# Pusher's 50 episodes take hours on a CPU; its trajectories are compared as all others'.
MEASURED = [name for name in ALL if name.endswith("v5") and name != "Pusher-v5"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SMALL else [pytest.mark.slow]) for name in ALL]
)
def test_trajectories_are_those_of_gymnasium(name, parity):
    row = parity.trajectories(name)
    assert row["steps_within"] >= parity.required(name) and row["terminations_equal"]
    assert row["obs_error"][0] < 1e-12
    # Random actions fell the pole, so that both rewards and ends were compared.
    assert not name.startswith("InvertedPendulum") or parity.required(name) == 100


@pytest.mark.slow
def test_the_humanoid_agrees_with_gymnasium_when_both_use_newtons_method(parity):
    row = parity.trajectories("Humanoid-v5", 10, same_solver=True)
    assert row["obs_error"][1] < 1e-10 and row["steps_within"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURED)
def test_returns_of_a_policy_have_the_same_law(name, parity):
    row = parity.distribution(name)
    # Nine tasks: at this level one of them is refused by chance in one of a hundred runs.
    assert row["ks_p"] > 0.001


def test_the_committed_table_is_inside_its_tolerances(parity):
    import json

    rows = json.loads((parity.RESULTS / "parity.json").read_text())["rows"]
    assert set(ALL) <= set(rows)
    for name, row in rows.items():
        assert row["steps_within"] >= parity.required(name) and row["terminations_equal"], name
        assert row.get("distribution", {"ks_p": 1.0})["ks_p"] > 0.001, name
    assert parity.table(rows).count("\n") == len(rows) + 1


CAPSULE = """<mujoco><option timestep="0.01"/><worldbody>
  <geom type="plane" size="5 5 1" friction="0.4"/>
  <body pos="0 0 0.4"><freejoint/><geom type="capsule" size="0.08 0.4" friction="0.4"/></body>
</worldbody></mujoco>"""


@pytest.mark.parametrize("tilt", [0.3, 1.2])
def test_capsules_touch_the_floor_as_in_the_c_engine(tilt):
    """Steeper and flatter than 60 degrees: MJX's own collider is right for the second only."""
    with jax.enable_x64(True):
        model = mujoco.MjModel.from_xml_string(CAPSULE)
        data = mujoco.MjData(model)
        turn, lean = np.zeros(4), np.zeros(4)
        mujoco.mju_axisAngle2Quat(turn, np.array([0.0, 0.0, 1.0]), 0.6)
        mujoco.mju_axisAngle2Quat(lean, np.array([1.0, 0.0, 0.0]), tilt)
        mujoco.mju_mulQuat(data.qpos[3:7], turn, lean)
        data.qpos[2] = 0.4 * np.cos(tilt) + 0.07
        data.qvel[:] = [1.5, -0.7, -0.5, 0.4, 0.2, -0.6]  # it slips: else the cone does not matter
        ours, on_device = mjx.put_model(model, impl="jax"), mjx.put_data(model, data, impl="jax")
        forward = lambda: jax.jit(lambda data: mjx.forward(ours, data))(on_device).qacc
        mujoco.mj_forward(model, data)
        assert data.ncon >= 1
        with base._mjx():
            mended = forward()
        with jax.numpy_rank_promotion("allow"):
            theirs = forward()
        np.testing.assert_allclose(mended, data.qacc, rtol=1e-8, atol=1e-8)
        assert (np.abs(theirs - data.qacc).max() < 1e-8) == (tilt > 1.05)


def test_actions_are_rescaled_to_the_actuators_and_clipped():
    env, space = Pusher(), gymnasium.make("Pusher-v5").action_space
    action = jnp.linspace(-1, 1, env.action_dim)
    middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2
    np.testing.assert_allclose(env.control(action), middle + half * np.asarray(action), rtol=1e-6)
    np.testing.assert_array_equal(env.control(7 * jnp.ones(env.action_dim)), space.high)


@pytest.mark.slow
def test_resets_have_gymnasiums_laws():
    """Each coordinate that varies against draws of Gymnasium itself, by Kolmogorov and Smirnov's test."""
    for env, name in ((Reacher(), "Reacher-v5"), (Pusher(), "Pusher-v5"), (HalfCheetah(), "HalfCheetah-v5")):
        keys = jr.split(jr.key(0), 2000)
        qpos, qvel = jax.vmap(lambda key, env=env: env.draw(key=key))(keys)
        host = gymnasium.make(name, disable_env_checker=True).unwrapped
        theirs = []
        for seed in range(400):
            host.reset(seed=seed)
            theirs.append(np.concatenate([host.data.qpos, host.data.qvel]))
        ours, theirs = np.concatenate([qpos, qvel], 1), np.array(theirs)
        for i in range(ours.shape[1]):
            if np.ptp(theirs[:, i]) == 0:
                np.testing.assert_allclose(ours[:, i], theirs[0, i], atol=1e-6)
            else:  # 50 coordinates in all: one in a thousand runs would refuse one
                assert kstest(ours[:, i], theirs[:, i]).pvalue > 2e-5, (name, i)


@pytest.mark.slow
def test_states_of_a_batch_are_small_and_reset_on_their_own():
    env = make("mjx/InvertedPendulum-v5")
    keys = jr.split(jr.key(0), 3)
    state, _ = jax.jit(jax.vmap(lambda key: env.reset(key=key)))(keys)
    where = lambda state: (state.qpos, state.elapsed)
    fallen = eqx.tree_at(where, state, (state.qpos.at[1, 1].set(0.5), state.elapsed + 4))
    step = jax.jit(jax.vmap(lambda s, k: step_autoreset(env, s, jnp.zeros(1), key=k)))
    after, obs, timestep = step(fallen, keys)
    np.testing.assert_array_equal(timestep.terminated, [False, True, False])
    np.testing.assert_array_equal(after.elapsed, [5, 0, 5])
    assert abs(timestep.obs[1, 1]) > 0.2 and abs(obs[1, 1]) < 0.011
    assert sum(x[0].size for x in jax.tree.leaves(state)) < 10


@pytest.mark.slow
def test_a_task_of_ones_own(tmp_path):
    file = tmp_path / "ball.xml"
    file.write_text(
        '<mujoco><option timestep="0.01"/><worldbody><body><joint name="x" type="slide" axis="1 0 0"/>'
        '<geom size="0.1"/></body></worldbody><actuator><motor joint="x" ctrlrange="-2 2"/></actuator></mujoco>'
    )

    class Ball(AbstractMJXEnv):
        xml, frame_skip, reset_noise = str(file), 3, 0.0

        def observe(self, data):
            return jnp.concatenate([data.qpos, data.qvel])

        def judge(self, before, data, control):
            return -jnp.abs(data.qpos[0]), jnp.abs(data.qpos[0]) > 1

    env = Ball()
    state, obs = env.reset(key=jr.key(0))
    state, timestep = jax.jit(lambda s: env.step(s, jnp.ones(1), key=jr.key(0)))(state)
    # Semi-implicit Euler from rest: after n steps of dt under acceleration a, v = n a dt, x = a dt^2 n (n + 1) / 2.
    acceleration = 2 / env.model.body_mass[1]
    np.testing.assert_allclose(timestep.obs, [acceleration * 1e-4 * 6, acceleration * 0.03], rtol=1e-5)
    assert (env.action_dim, env.obs_shape, env.dt) == (1, (2,), pytest.approx(0.03))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in TASKS]
)
def test_shapes_are_those_of_gymnasium(name):
    task = TASKS[name]
    for version in task.versions:
        env = task(version=version)
        host = make(f"mujoco/{name}-v{version}")
        assert (env.obs_shape, env.action_dim, env.max_steps) == (
            host.obs_shape,
            host.action_dim,
            host.max_steps,
        )


def test_a_version_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"InvertedPendulum has no version 3; choose one of \(4, 5\)"):
        InvertedPendulum(version=3)
