"""The tasks of Gymnasium-Robotics against the library itself: what the vector holds, rewards, ends, states."""

import enum
import subprocess
import sys
import types

import gymnasium
import jax
import jax.numpy as jnp
import jax.random as jr
import mujoco
import numpy as np
import pytest

from eqgen.envs.catalog import ROBOTICS_IDS, make
from eqgen.evaluation import rollout_returns


try:
    from eqgen.envs import robotics
except ImportError:
    robotics = None
needs_library = pytest.mark.skipif(robotics is None, reason="gymnasium-robotics is not installed")

MAZES = (
    "PointMaze_UMaze-v3 PointMaze_LargeDense-v3 AntMaze_UMaze-v4 AntMaze_Medium_Diverse_GRDense-v5".split()
)
KITCHENS = "FrankaKitchen-v1 FrankaKitchen_Partial-v1 FrankaKitchen_Mixed-v1".split()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """MuJoCo writes its warnings to a file in the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def opened():
    """Environments of the catalog, as many as asked for, closed at the end."""
    envs = []

    def open_one(name, num_envs, seed):
        envs.append(make(f"robotics/{name}").make(num_envs, seed))
        return envs[-1]

    yield open_one
    for env in envs:
        env.close()


def actions(num_steps, envs, seed=0):
    shape = num_steps, envs.num_envs, envs.action_dim
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def run(envs, actions):
    """Everything that stepping returns, stacked over time."""
    return jax.tree.map(lambda *x: np.stack(x), *[envs.step(action) for action in actions])


def assert_bitwise_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def simulator(vector_env):
    """The task inside the first environment of a `HostVectorEnv`."""
    return vector_env._envs[0].unwrapped


# --- Without the library ---


@pytest.mark.parametrize("name", ["robotics/PointMaze_UMaze-v3", "robotics/NoSuchTask-v0"])
def test_without_the_library_the_error_names_the_remedy(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)  # an import of it fails
    monkeypatch.delitem(sys.modules, "eqgen.envs.robotics", raising=False)
    with pytest.raises(ImportError, match=r'robotics/ need.*pip install "eqgen\[offline\]"'):
        make(name)


# --- All tasks ---


@needs_library
@pytest.mark.parametrize("name", ROBOTICS_IDS)
def test_every_task_of_the_catalog_can_be_made(name):
    env = make(f"robotics/{name}")
    assert env.name == f"robotics/{name}" and len(env.obs_shape) == 1
    theirs = gymnasium.registry["FrankaKitchen-v1" if name in KITCHENS else name]
    assert env.max_steps == theirs.max_episode_steps


@needs_library
def test_unknown_tasks_get_the_nearest_names():
    with pytest.raises(ValueError, match="'robotics/PointMaze_Umaze-v3'.*robotics/PointMaze_UMaze-v3"):
        make("robotics/PointMaze_Umaze-v3")
    with pytest.raises(ValueError, match="no environment 'robotics/AntMaze_UMaze-v3'"):
        make("robotics/AntMaze_UMaze-v3")


@needs_library
def test_a_process_that_never_imported_the_module_finds_the_tasks():
    gymnasium_id = make("robotics/PointMaze_UMaze-v3").gymnasium_id
    code = f"import gymnasium; print(gymnasium.make({gymnasium_id!r}).observation_space.shape)"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "(6,)"


@needs_library
@pytest.mark.parametrize("name", [*MAZES, "FrankaKitchen_Partial-v1"])
def test_the_seed_decides_everything_and_a_restored_state_goes_on_bitwise(name, opened):
    """Running on past the time limit equals rebuilding all from the state in between and running on: all
    randomness (goals, starts, sensor noise) is in the generator that `HostVectorEnv` keeps."""
    whole, resumed = opened(name, 2, 7), opened(name, 2, 99)
    limit = whole.max_steps
    halfway = limit // 2 + 3
    acts = actions(limit + 5, whole)
    assert not np.array_equal(whole.reset(), resumed.reset())
    first, _ = run(whole, acts[:halfway])
    state = whole.get_state()
    rest = run(whole, acts[halfway:])
    np.testing.assert_array_equal(resumed.set_state(state), first[-1])
    assert_bitwise_equal(run(resumed, acts[halfway:]), rest)
    assert_bitwise_equal(resumed.get_state(), whole.get_state())

    again = opened(name, 1, 7)
    np.testing.assert_array_equal(again.reset(), whole.reset()[:1])
    # Random actions do not solve the tasks of these seeds, so time ends the first episode, and only time.
    truncated = rest[1].truncated
    assert truncated.sum() == 2 and truncated[limit - 1 - halfway].all() and not rest[1].terminated.any()
    # The next episode has another goal or start (the kitchen: other noise).
    np.testing.assert_array_equal(again.step(acts[0, :1])[0], first[0, :1])
    assert not np.array_equal(rest[0][limit - 1 - halfway], whole.reset())


# --- Mazes ---


def theirs(name, envs):
    """The library's own environment, begun as the first of `envs`."""
    env = gymnasium.make(name)
    obs, info = env.reset(seed=envs.seeds[0])
    return env, obs, info


@needs_library
@pytest.mark.parametrize("name", MAZES)
def test_a_maze_shows_the_librarys_entries_and_pays_its_rewards(name, opened):
    envs = opened(name, 1, 3)
    reference, entries, _ = theirs(name, envs)
    got = envs.reset()[0]
    acts = actions(100, envs)
    for action in [None, *acts[:, 0]]:
        if action is not None:
            timestep = envs.step(action[None])[1]
            got = timestep.obs[0]
            entries, reward, _, _, info = reference.step(action)
            np.testing.assert_array_equal(timestep.reward[0], np.float32(reward))
            assert (robotics.goal_distance(got) <= robotics.GOAL_RADIUS) == info["success"]
        np.testing.assert_array_equal(got[:2], entries["achieved_goal"].astype(np.float32))
        np.testing.assert_array_equal(got[-2:], entries["desired_goal"].astype(np.float32))
        np.testing.assert_array_equal(got[-2:], simulator(envs).goal.astype(np.float32))
        skip = 0 if name.startswith("Point") else 2
        np.testing.assert_array_equal(got[skip:-2], entries["observation"].astype(np.float32))
    reference.close()


@needs_library
@pytest.mark.parametrize("name", MAZES)
def test_rewards_are_of_the_distance_and_ends_are_as_documented(name, opened):
    """Goals are moved to known distances; only the ant's sparse task ends at its goal."""
    envs = opened(name, 1, 0)
    sparse, episodic = "Dense" not in name, name == "AntMaze_UMaze-v4"
    distances = [3.0, 1.0, 0.6, 0.46, 0.44, 0.1]
    ends = []
    for distance in distances:
        envs.reset()
        task = simulator(envs)
        task.goal = task.data.qpos[:2] + distance * np.array([0.6, -0.8])
        _, timestep = envs.step(np.zeros((1, envs.action_dim)))
        actual = robotics.goal_distance(timestep.obs)[0]
        np.testing.assert_allclose(actual, distance, atol=0.02)  # one step of motion
        expected = float(actual <= 0.45) if sparse else np.exp(-actual)
        np.testing.assert_allclose(timestep.reward[0], expected, rtol=1e-5)
        assert not timestep.truncated[0]
        ends.append(bool(timestep.terminated[0]))
    assert ends == [episodic and distance < 0.45 for distance in distances]


@needs_library
@pytest.mark.parametrize("name, seconds", [("PointMaze_UMaze-v3", 0.01), ("AntMaze_UMaze-v5", 0.05)])
def test_steps_per_second_are_those_of_the_simulation(name, seconds, opened):
    envs = opened(name, 1, 0)
    envs.reset()
    before = simulator(envs).data.time
    envs.step(np.zeros((1, envs.action_dim)))
    np.testing.assert_allclose(simulator(envs).data.time - before, seconds, rtol=1e-9)
    assert make(f"robotics/{name}").steps_per_second == round(1 / seconds)


@needs_library
def test_making_a_maze_leaves_no_file(tmp_path, monkeypatch, opened):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    opened("PointMaze_UMaze-v3", 2, 0)
    assert not list(tmp_path.iterdir())


@needs_library
def test_a_planner_in_the_open_maze_scores_under_the_evaluation_protocol():
    """A proportional-derivative controller, at most 7 cells from the goal, gets there within 4 seconds."""
    env = make("robotics/PointMaze_Open-v3")
    steer = lambda obs, key: jnp.clip(10 * (obs[4:] - obs[:2]) - obs[2:4], -1, 1)
    returns, lengths = rollout_returns(steer, env, 4, key=jr.key(0))
    assert (lengths == env.max_steps).all() and (returns > 0).all() and (returns < env.max_steps).all()


# --- Kitchen ---


@needs_library
@pytest.mark.parametrize("name", KITCHENS)
def test_the_kitchens_vector_holds_joints_and_goal(name, opened):
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES

    envs = opened(name, 1, 0)
    envs.reset()
    obs = run(envs, actions(20, envs))[0][-1, 0]
    assert obs.shape == (89,)
    data = simulator(envs).data
    joints, velocities = obs[np.r_[0:9, 18:39]], obs[np.r_[9:18, 39:59]]
    # The sensors' noise: at most 0.01 of amplitudes of up to 0.1 in positions and velocities.
    np.testing.assert_allclose(joints, data.qpos, atol=1.1e-3)
    np.testing.assert_allclose(velocities, data.qvel, atol=1.1e-3)
    wanted = np.zeros(30, np.float32)
    for task in robotics.KITCHEN_TASKS[name]:
        wanted[OBS_ELEMENT_INDICES[task]] = OBS_ELEMENT_GOALS[task]
    np.testing.assert_array_equal(obs[59:], wanted)
    np.testing.assert_array_equal(obs[robotics.KITCHEN_AS_IN_D4RL], np.concatenate([joints, wanted]))


@needs_library
@pytest.mark.parametrize("name", KITCHENS)
def test_the_kitchen_pays_each_task_once_and_ends_with_the_last(name, opened):
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES

    envs = opened(name, 1, 0)
    envs.reset()
    robot, still = simulator(envs).robot_env, np.zeros((1, 9))
    assert envs.step(still)[1].reward[0] == 0  # nothing is done at the start
    rewards, ends = [], []
    for task in robotics.KITCHEN_TASKS[name]:
        for _ in range(2):
            qpos = robot.data.qpos.copy()
            qpos[OBS_ELEMENT_INDICES[task]] = OBS_ELEMENT_GOALS[task]
            robot.set_state(qpos, np.zeros_like(robot.data.qvel))
            _, timestep = envs.step(still)
            rewards.append(timestep.reward[0])
            ends.append(bool(timestep.terminated[0]))
            if ends[-1]:
                break
    num_tasks = len(robotics.KITCHEN_TASKS[name])
    assert rewards == [1.0, 0.0] * (num_tasks - 1) + [1.0]
    assert ends == [False] * (2 * num_tasks - 2) + [True]


@needs_library
def test_the_kitchen_begins_as_the_library_seeds_it(opened):
    """Sharing the generator changes no draw: the first episode is that of `reset(seed)` on `KitchenEnv`."""
    envs = opened("FrankaKitchen-v1", 1, 5)
    reference = robotics.make_kitchen()
    entries, _ = reference.reset(seed=envs.seeds[0])
    np.testing.assert_array_equal(envs.reset()[0, :59], entries["observation"].astype(np.float32))
    for action in actions(30, envs)[:, 0]:
        entries, *_ = reference.step(action)
        got = envs.step(action[None])[0][0]
        np.testing.assert_array_equal(got[:59], entries["observation"].astype(np.float32))
    reference.close()

    # Gymnasium's own way of seeding leads to the same.
    env = gymnasium.make(envs.gymnasium_id)
    one, _ = env.reset(seed=envs.seeds[0])
    np.testing.assert_array_equal(one.astype(np.float32), envs.reset()[0])
    env.close()


@pytest.fixture
def their_modules(monkeypatch):
    """The library's modules for joints and for the kitchen's robot, unpatched until the end of the test."""
    from gymnasium_robotics.envs.franka_kitchen import franka_env
    from gymnasium_robotics.utils import mujoco_utils

    monkeypatch.setattr(franka_env, "robot_get_obs", mujoco_utils.robot_get_obs)
    return mujoco_utils, franka_env


def with_plain_enums(monkeypatch, mujoco_utils):
    """Lets `mujoco_utils` see joint types that compare as integers do, which is what upstream's mending does."""
    members = {kind: int(value) for kind, value in mujoco.mjtJoint.__members__.items()}
    mended = types.SimpleNamespace(**{**vars(mujoco), "mjtJoint": enum.IntEnum("mjtJoint", members)})
    monkeypatch.setattr(mujoco_utils, "mujoco", mended)


@needs_library
def test_the_defect_is_how_enums_compare_with_numpy_integers():
    one, hinge = np.int32(3), mujoco.mjtJoint.mjJNT_HINGE
    assert one == hinge and int(one) in (hinge,)
    if not hinge == one:
        assert one not in (hinge,)
    else:
        assert not robotics.joints_are_unreadable()


@needs_library
def test_the_kitchen_is_mended_only_where_it_is_broken(monkeypatch, their_modules):
    mujoco_utils, franka_env = their_modules
    own = mujoco_utils.robot_get_obs
    make("robotics/PointMaze_UMaze-v3"), make("robotics/AntMaze_UMaze-v5")
    assert franka_env.robot_get_obs is own

    broken = robotics.joints_are_unreadable()
    robotics.make_kitchen().close()
    assert franka_env.robot_get_obs is (robotics.robot_state if broken else own)
    assert mujoco_utils.robot_get_obs is own

    franka_env.robot_get_obs = own
    with_plain_enums(monkeypatch, mujoco_utils)
    assert not robotics.joints_are_unreadable()
    robotics.make_kitchen().close()
    assert franka_env.robot_get_obs is own


@needs_library
def test_the_mended_reading_is_the_librarys_own(monkeypatch, their_modules):
    mujoco_utils, _ = their_modules
    kitchen = robotics.make_kitchen()
    kitchen.reset(seed=0)
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 9)):
        kitchen.step(action)
    with_plain_enums(monkeypatch, mujoco_utils)
    arguments = kitchen.model, kitchen.data, kitchen.robot_env.model_names.joint_names
    for got, expected in zip(robotics.robot_state(*arguments), mujoco_utils.robot_get_obs(*arguments)):
        np.testing.assert_array_equal(got, expected)
        got += 1.0  # upstream adds noise in place: it must be a copy
    np.testing.assert_array_equal(mujoco_utils.robot_get_obs(*arguments)[1], expected)
    kitchen.close()
