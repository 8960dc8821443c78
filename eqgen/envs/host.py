"""Gymnasium tasks on the host: MuJoCo's C engine, several environments stepped one after the other.

On a CPU the C engine is far faster than MJX, so it is the default for MuJoCo tasks. Nothing here is traced by
JAX: a training loop steps a `HostVectorEnv` with NumPy arrays between two compiled calls.

One after the other is kept because it is the simplest, and what beats it does not return what training needs.
By benchmarks/host.py, in steps per second of 5 and of 25 HalfCheetahs and Hoppers on two cores: Gymnasium's
SyncVectorEnv makes 0.90 to 0.99 of the steps, a pool of threads over the environments of all seeds 0.56 to
0.91, and 1.24 of 25 Hoppers, AsyncVectorEnv 0.25 to 0.56. MuJoCo's own threads (`mujoco.rollout`) make up to
2.4 times as many, but states alone: observations, rewards and ends would have to be written anew for every
task. The simulator takes 4 % of the time of training at 2x256, and training can hide it
(`OnlineSettings(acting="overlap")`).

An environment that ends is reset in the same step (Gymnasium's default would spend the next step on it, and
that step would enter replay as a transition that never happened). Observations are passed on as they are;
that they are finite is for the loop to check.

A state is kept as what produced it: the random generator at the start of the episode and the actions since.
Restoring it retraces the episode, which works for every task whose randomness is Gymnasium's `np_random`, and
gives back all of MuJoCo's state, warm starts and derived quantities included (some rewards read these).
"""

import warnings
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import equinox as eqx
import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.utils import seeding
from jaxtyping import Float32, Num, UInt8

from eqgen.envs.base import EnvironmentFailedError
from eqgen.types import TimeStep


def check_mujoco_versions(mujoco_version: str, mjx_version: str) -> None:
    """MJX promises the physics of the MuJoCo release with the same number only.

    **Raises:** `ImportError` when the minor versions differ.
    """
    if mujoco_version.split(".")[:2] != mjx_version.split(".")[:2]:
        raise ImportError(
            f"mujoco {mujoco_version} and mujoco-mjx {mjx_version} do not belong together. "
            f'Remedy: pip install "mujoco=={mjx_version}" "mujoco-mjx=={mjx_version}"'
        )


try:
    check_mujoco_versions(version("mujoco"), version("mujoco-mjx"))
except PackageNotFoundError:  # the C engine needs no MJX
    pass


class HostEnv(eqx.Module):
    """What a task looks like, and how to make environments of it; holds no simulator."""

    name: str
    """The name in the catalog."""
    gymnasium_id: str
    obs_shape: tuple[int, ...]
    action_dim: int
    max_steps: int
    """Steps after which an episode is truncated."""
    steps_per_second: int
    """How many steps make a second of simulated time."""

    def __init__(self, gymnasium_id: str):
        """**Arguments:** `gymnasium_id`, such as `"HalfCheetah-v5"`: any task that `HostVectorEnv` takes."""
        env = _make(gymnasium_id)
        self.name = f"{'mujoco' if _is_mujoco(env) else 'gymnasium'}/{gymnasium_id}"
        self.gymnasium_id = gymnasium_id
        self.obs_shape, self.action_dim, self.max_steps = _sizes(env)
        self.steps_per_second = env.metadata.get("render_fps", 25)
        env.close()

    def make(self, num_envs: int, seed: int, *, render: bool = False) -> "HostVectorEnv":
        """`num_envs` environments of this task; the arguments are those of `HostVectorEnv`."""
        return HostVectorEnv(self.gymnasium_id, num_envs, seed, render=render)


class HostVectorEnv:
    """`num_envs` environments of one Gymnasium task, each with a random generator of its own.

    Environment i is seeded from (`seed`, i), whatever `num_envs` is; `seeds` are the numbers that
    `gymnasium.Env.reset` would need. Every array that is returned is a new one.
    """

    def __init__(self, gymnasium_id: str, num_envs: int, seed: int, *, render: bool = False):
        """**Arguments:**

        - `gymnasium_id`: such as `"HalfCheetah-v5"`.
        - `num_envs`, `seed`: how many environments; an integer from 0 on which all their randomness depends.
        - `render`: whether `render` will be called.

        **Raises:** `ValueError` when the task is unknown, not continuous, or has no time limit.
        """
        self._envs: list[Any] = [
            _make(gymnasium_id, "rgb_array" if render else None) for _ in range(num_envs)
        ]
        self.seeds = tuple(
            int(np.random.SeedSequence((seed, i)).generate_state(1)[0]) for i in range(num_envs)
        )
        env = self._envs[0]
        self.gymnasium_id, self.num_envs = gymnasium_id, num_envs
        self.obs_shape, self.action_dim, self.max_steps = _sizes(env)
        low, high = env.action_space.low, env.action_space.high
        self._middle, self._half_range = (high + low) / 2, (high - low) / 2
        self._elapsed = np.zeros(num_envs, np.int32)
        self._rng = np.zeros((num_envs, 10), np.uint32)
        self._actions = np.zeros((num_envs, self.max_steps, self.action_dim), np.float32)
        self._obs: Any = None  # those to act on next, once there has been a reset

    def reset(self) -> Float32[np.ndarray, " n *obs"]:
        """Starts over: every call gives the first observations that belong to the seed."""
        for env, seed in zip(self._envs, self.seeds):
            env.unwrapped.np_random = seeding.np_random(seed)[0]
        self._obs = np.stack([self._begin_episode(i) for i in range(self.num_envs)])
        return self._obs.copy()

    def step(self, actions: Num[np.ndarray, "n act"]) -> tuple[Float32[np.ndarray, " n *obs"], TimeStep]:
        """One step of every environment, and a reset of those it ended.

        **Arguments:**

        - `actions`: in [-1, 1], which is where they are clipped to; rescaled to the bounds of the task.

        **Returns:** the observations to act on next, and the outcome as a `TimeStep` of NumPy arrays with a
        leading axis n, whose `obs` are the true next observations also where an episode ended.

        **Raises:** `EnvironmentFailedError` when one of them raises something; the vector is of no use any more.
        """
        actions = np.asarray(actions, np.float32).clip(-1, 1)
        scaled = self._middle + self._half_range * actions
        next_obs = np.empty((self.num_envs, *self.obs_shape), np.float32)
        rewards, terminations, truncations = [], [], []
        self._actions[np.arange(self.num_envs), self._elapsed] = actions
        self._elapsed += 1
        for i, env in enumerate(self._envs):
            with self._blaming(i, f"in step {self._elapsed[i]} of its episode"):
                next_obs[i], reward, terminated, truncated, _ = env.step(scaled[i])
                rewards.append(float(reward))
            terminations.append(terminated)
            truncations.append(truncated)
        self._obs = next_obs.copy()
        for i, (terminated, truncated) in enumerate(zip(terminations, truncations)):
            if terminated or truncated:
                self._obs[i] = self._begin_episode(i)
        # NumPy's arrays, so not by the constructor, which is annotated with JAX's.
        leaves = next_obs, np.array(rewards, np.float32), np.array(terminations), np.array(truncations)
        return self._obs.copy(), jax.tree.unflatten(_TIMESTEP, leaves)

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything that `set_state` needs, as arrays of fixed shapes.

        `rng` (n, 10) are the words of the generators when the current episodes began, `actions`
        (n, max_steps, act) and `elapsed` (n,) the actions since, `obs` (n, obs) the last observations. No
        dtype is wider than 32 bits, so that a trip through JAX arrays changes nothing.
        """
        if self._obs is None:
            raise RuntimeError("HostVectorEnv has no state before its first reset().")
        kept = {"rng": self._rng, "actions": self._actions, "elapsed": self._elapsed, "obs": self._obs}
        return {name: np.array(value) for name, value in kept.items()}

    def set_state(self, state: dict[str, np.ndarray | jax.Array]) -> Float32[np.ndarray, " n *obs"]:
        """Goes on from `state` to the last bit, and returns the observations to act on.

        Takes as long as stepping through the running episodes. Another processor or MuJoCo release may round
        differently; then a `RuntimeWarning` says so and the observations returned are the retraced ones.
        """
        state = {name: np.asarray(value) for name, value in state.items()}
        for name, now in (("rng", self._rng), ("actions", self._actions)):
            if state[name].shape != now.shape:
                raise ValueError(
                    f"{self.gymnasium_id}: state[{name!r}] has shape {state[name].shape}, this vector of "
                    f"{self.num_envs} environments needs {now.shape}: another task or number of environments?"
                )
        self._obs = state["obs"].copy()
        for i, env in enumerate(self._envs):
            _set_generator(env.unwrapped.np_random, np.asarray(state["rng"][i]))
            obs = self._begin_episode(i)
            with self._blaming(i, "as its episode was retraced"):
                for action in state["actions"][i, : state["elapsed"][i]]:
                    obs = env.step(self._middle + self._half_range * action)[0]
            self._actions[i], self._elapsed[i] = state["actions"][i], state["elapsed"][i]
            obs = np.asarray(obs, np.float32)
            if not np.array_equal(obs, self._obs[i], equal_nan=True):
                warnings.warn(
                    f"{self.gymnasium_id}: environment {i} did not retrace its episode to the last bit "
                    f"(off by {np.abs(obs - self._obs[i]).max():.1e}). It goes on from where it came out.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self._obs[i] = obs
        return self._obs.copy()

    def render(self) -> UInt8[np.ndarray, "n height width 3"]:
        """A picture of every environment as it is now."""
        return np.stack([env.render() for env in self._envs])

    def close(self) -> None:
        """Frees the simulators."""
        for env in self._envs:
            env.close()

    def _begin_episode(self, i: int) -> np.ndarray:
        """Resets one environment, remembering the generator it did so with."""
        env = self._envs[i]
        self._rng[i], self._elapsed[i] = _generator_words(env.unwrapped.np_random), 0
        self._actions[i] = 0
        with self._blaming(i, "as it was reset"):
            return np.asarray(env.reset()[0], np.float32)

    @contextmanager
    def _blaming(self, i: int, when: str):
        try:
            yield
        except Exception as error:
            raise EnvironmentFailedError(
                f"{self.gymnasium_id}: environment {i} (seed {self.seeds[i]}) raised {type(error).__name__} "
                f"{when}: {error}."
            ) from error


_TIMESTEP = jax.tree.structure(
    jax.eval_shape(lambda: TimeStep(jnp.zeros(1), jnp.zeros(()), jnp.array(False), jnp.array(False)))
)


@contextmanager
def _quiet():
    """Silences what is no concern of those who ask for a task by name: that a v4 task has a successor, and
    that its XML file uses old spellings (which MuJoCo also writes to a log file)."""
    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            yield
    finally:
        mujoco.set_mju_user_warning(previous)


def _make(gymnasium_id: str, render_mode: str | None = None) -> gymnasium.Env:
    """One environment, checked to be a continuous task of vectors with a time limit."""
    try:
        with _quiet():
            env = gymnasium.make(gymnasium_id, render_mode=render_mode, disable_env_checker=True)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"Gymnasium does not make {gymnasium_id!r}: {error}") from error
    act, obs = env.action_space, env.observation_space
    if not (isinstance(act, gymnasium.spaces.Box) and len(act.shape) == 1 and act.is_bounded()):
        raise ValueError(
            f"{gymnasium_id} has the action space {act}; eqgen's algorithms need a bounded box of vectors."
        )
    if not isinstance(obs, gymnasium.spaces.Box):
        raise ValueError(
            f"{gymnasium_id} has the observation space {obs}; eqgen needs a box. Register the task with a "
            "gymnasium.wrappers.FlattenObservation around it."
        )
    if env.spec is None or env.spec.max_episode_steps is None:
        raise ValueError(f"{gymnasium_id} has no time limit: register it with max_episode_steps=...")
    if render_mode and _is_mujoco(env):
        # Where there is no GPU, drawing takes four times as long with the default shadows and smoothing.
        quality = cast(Any, env.unwrapped).model.vis.quality
        quality.shadowsize, quality.offsamples = 1024, 0
    return env


def _sizes(env: Any) -> tuple[tuple[int, ...], int, int]:
    """The shape of an observation, the length of an action, the steps of an episode, which `_make` has checked."""
    return env.observation_space.shape, env.action_space.shape[0], env.spec.max_episode_steps


def _is_mujoco(env: gymnasium.Env) -> bool:
    return isinstance(env.unwrapped, MujocoEnv)


def _generator_words(generator: np.random.Generator) -> np.ndarray:
    """The state of a PCG64 generator (two 128-bit numbers, a spare half draw) as 10 words of 32 bits."""
    state = generator.bit_generator.state
    numbers = [state["state"]["state"], state["state"]["inc"]]
    words = [number >> 32 * i & 0xFFFFFFFF for number in numbers for i in range(4)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], np.uint32)


def _set_generator(generator: np.random.Generator, words: np.ndarray) -> None:
    """Puts a PCG64 generator into the state that `_generator_words` returned."""
    numbers = [int(word) for word in words]
    join = lambda part: sum(word << 32 * i for i, word in enumerate(part))
    generator.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": join(numbers[:4]), "inc": join(numbers[4:8])},
        "has_uint32": numbers[8],
        "uinteger": numbers[9],
    }
