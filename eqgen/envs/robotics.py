"""The mazes and the kitchen of Gymnasium-Robotics, with one vector as their observation.

`make("robotics/PointMaze_UMaze-v3")` and so on; they need the extra `offline`. They are for evaluating planners
and offline policies: `HostVectorEnv` steps them as it does Gymnasium's own tasks, exact states included.
`PointMaze_UMazeDense-v3` and the like have the reward exp(-distance) instead of [distance <= 0.45].

    task                 observation: what is where                                one step   time limit
    PointMaze_*-v3       [0:2] position, [2:4] velocity, [4:6] goal                0.01 s     300, 600, 800, 300
    AntMaze_*-v4         [0:2] position, [2:15] other joint positions,             0.05 s     700, 1000, 1000, 700
                         [15:29] velocities, [29:31] goal
    AntMaze_*-v5         [0:29] as in v4, [29:107] contact forces, [107:109] goal  0.05 s     700, 1000, 1000, 700
    FrankaKitchen*-v1    [0:9] joint positions of the robot, [9:18] velocities,    0.08 s     280
                         [18:39] positions of the objects, [39:59] velocities,
                         [59:89] goal
    (The time limits are those of UMaze, Medium, Large, Open.)

**Mazes.** Of both the position comes first and the goal last (`goal_distance`). Goal and start are drawn anew at
each reset. The point stays in its episode when it has arrived, as Gymnasium-Robotics registers it: the return is
the number of steps within reach of the goal, as in D4RL's maze2d, and it is positive if and only if the goal was
reached. The ant's episode ends there (`continuing_task=False`, which is not how it is registered), so that its
return is 1 for success and 0 for failure, as in D4RL's antmaze. With the dense reward it goes on: that reward is
positive, and whoever ended the episode would lose the rest of it. The coordinates are not D4RL's (here the maze is
centred at the origin and y points up its rows), so policies learnt from D4RL's files do not carry over.

**Kitchen.** The reward is the number of tasks completed for the first time, the episode ends when all are.
`FrankaKitchen-v1` has all seven, `FrankaKitchen_Partial-v1` and `FrankaKitchen_Mixed-v1` the four of D4RL's
datasets of these names. The goal is D4RL's: the 30 joint positions wanted, zero where nothing is. D4RL's
observation of 60 has no velocities: it is `obs[..., KITCHEN_AS_IN_D4RL]`, but for its larger sensor noise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from gymnasium.utils import RecordConstructorArgs, seeding
from jaxtyping import Float, Num

from eqgen.envs.host import HostEnv


try:
    import gymnasium_robotics  # pyright: ignore[reportMissingImports]  # an extra
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'The tasks of robotics/ need gymnasium-robotics. Remedy: pip install "eqgen[offline]"'
    ) from error
gymnasium.register_envs(gymnasium_robotics)

GOAL_RADIUS = 0.45
"""A maze's goal is reached at this distance (the documentation of Gymnasium-Robotics says 0.5)."""

KITCHEN_TASKS = {
    "FrankaKitchen-v1": (
        "bottom burner",
        "top burner",
        "light switch",
        "slide cabinet",
        "hinge cabinet",
        "microwave",
        "kettle",
    ),
    "FrankaKitchen_Partial-v1": ("microwave", "kettle", "light switch", "slide cabinet"),
    "FrankaKitchen_Mixed-v1": ("microwave", "kettle", "bottom burner", "light switch"),
}

KITCHEN_AS_IN_D4RL = np.r_[0:9, 18:39, 59:89]
"""Which 60 of the 89 numbers D4RL's kitchen shows: joint positions of robot and objects, goal."""


def robotics_env(name: str) -> HostEnv:
    """The task `robotics/<name>`.

    **Raises:** `ValueError` when there is none.
    """
    if f"robotics/{name}" not in gymnasium.registry:
        raise ValueError(f"There is no environment 'robotics/{name}'.")
    # With the module's name in front, Gymnasium finds the task also in a process that has not imported it.
    env = HostEnv(f"{__name__}:robotics/{name}")
    return eqx.tree_at(lambda env: env.name, env, f"robotics/{name}")


def goal_distance(obs: Num[np.ndarray, "*batch obs"]) -> Num[np.ndarray, "*batch"]:
    """How far from its goal a maze's observation is; a success is at most `GOAL_RADIUS`."""
    return np.asarray(np.linalg.norm(obs[..., :2] - obs[..., -2:], axis=-1))


class MazeVector(gymnasium.ObservationWrapper, RecordConstructorArgs):
    """Strings together the entries `keys` of a maze's observation."""

    def __init__(self, env: gymnasium.Env, keys: Sequence[str]):
        RecordConstructorArgs.__init__(self, keys=keys)
        super().__init__(env)
        self.keys = keys
        spaces: Any = env.observation_space
        size = sum(spaces[key].shape[0] for key in keys)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)
        maze: Any = env.unwrapped
        simulator = getattr(maze, "point_env", None) or maze.ant_env
        self.metadata = {**env.metadata, "render_fps": round(1 / simulator.dt)}  # both declare 50
        Path(maze.tmp_xml_file_path).unlink(missing_ok=True)  # compiled by now, and otherwise left behind

    def observation(self, observation: dict[str, np.ndarray]) -> Float[np.ndarray, " obs"]:
        return np.concatenate([observation[key] for key in self.keys])


class KitchenVector(gymnasium.Wrapper, RecordConstructorArgs):
    """The kitchen's observation and goal in one vector, all its randomness from `np_random`."""

    def __init__(self, env: gymnasium.Env):
        from gymnasium_robotics.envs.franka_kitchen import kitchen_env  # pyright: ignore[reportMissingImports]  # an extra

        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        kitchen: Any = env.unwrapped
        self._goal = np.zeros(kitchen.model.nq)
        for task, values in kitchen.goal.items():
            self._goal[kitchen_env.OBS_ELEMENT_INDICES[task]] = values
        spaces: Any = env.observation_space
        size = spaces["observation"].shape[0] + kitchen.model.nq
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        kitchen: Any = self.unwrapped
        if seed is not None:
            kitchen.np_random = seeding.np_random(seed)[0]
        # The noise of all sensors is drawn by the robot inside, from a generator of its own.
        kitchen.robot_env.np_random = kitchen.np_random
        observation, info = self.env.reset(options=options)
        return self._vector(observation), info

    def step(self, action: np.ndarray):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._vector(observation), reward, terminated, truncated, info

    def _vector(self, observation: dict) -> Float[np.ndarray, " obs"]:
        return np.concatenate([observation["observation"], self._goal])


# --- What makes the kitchen fail, and its remedy ---


def make_kitchen(**kwargs) -> gymnasium.Env:
    """Gymnasium-Robotics' `KitchenEnv`, mended where that is needed."""
    from gymnasium_robotics.envs.franka_kitchen import KitchenEnv, franka_env  # pyright: ignore[reportMissingImports]  # an extra

    if joints_are_unreadable():
        franka_env.robot_get_obs = robot_state
    return KitchenEnv(**kwargs)


def joints_are_unreadable() -> bool:
    """Whether Gymnasium-Robotics takes a hinge for no joint at all.

    `mujoco_utils.get_joint_qpos` asserts `joint_type in (mjJNT_HINGE, mjJNT_SLIDE)` with a NumPy integer on the
    left. Python asks each enum of the tuple whether it equals the integer; since MuJoCo 3.12 (pybind11 3.1) it
    denies that for NumPy's integers, while `integer == enum` is still true. Mended upstream by an `int(...)`
    (Gymnasium-Robotics, pull request 330), in no release up to 1.4.2; where it is, this is False.
    """
    from gymnasium_robotics.utils import mujoco_utils  # pyright: ignore[reportMissingImports]  # an extra

    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><body><joint name='hinge'/><geom size='1'/></body></worldbody></mujoco>"
    )
    try:
        mujoco_utils.get_joint_qpos(model, mujoco.MjData(model), "hinge")
    except AssertionError:
        return True
    return False


def robot_state(
    model: mujoco.MjModel, data: mujoco.MjData, joint_names: Sequence[str]
) -> tuple[Float[np.ndarray, " robot"], Float[np.ndarray, " robot"]]:
    """What `mujoco_utils.robot_get_obs` returns where it works: qpos and qvel of the joints "robot...", copied."""
    joints = [
        mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_JOINT, name)
        for name in joint_names
        if name.startswith("robot")
    ]
    return data.qpos[model.jnt_qposadr[joints]], data.qvel[model.jnt_dofadr[joints]]


# --- The registration with Gymnasium, under robotics/<id> ---


def _register(spec: EnvSpec, name: str, wrapper: WrapperSpec, **changes) -> None:
    gymnasium.register(
        f"robotics/{name}",
        entry_point=changes.pop("entry_point", spec.entry_point),
        max_episode_steps=spec.max_episode_steps,
        additional_wrappers=(wrapper,),
        kwargs={**spec.kwargs, **changes},
    )


def _maze_vector(*keys: str) -> WrapperSpec:
    return WrapperSpec("MazeVector", f"{__name__}:MazeVector", {"keys": keys})


for _spec in [gymnasium.registry[known] for known in gymnasium.registry]:
    if _spec.id.startswith("PointMaze_"):
        _register(_spec, _spec.id, _maze_vector("observation", "desired_goal"))
    # AntMaze v3 never pays its sparse reward and may start at the goal (Gymnasium-Robotics, issue 155).
    if _spec.id.startswith("AntMaze_") and _spec.version in (4, 5):
        _keys, _continuing = ("achieved_goal", "observation", "desired_goal"), "Dense-" in _spec.id
        _register(_spec, _spec.id, _maze_vector(*_keys), continuing_task=_continuing)
for _name, _tasks in KITCHEN_TASKS.items():
    _register(
        gymnasium.registry["FrankaKitchen-v1"],
        _name,
        WrapperSpec("KitchenVector", f"{__name__}:KitchenVector", {}),
        entry_point=f"{__name__}:make_kitchen",
        tasks_to_complete=list(_tasks),
    )
