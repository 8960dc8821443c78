"""Continuous-action environments of gymnax, in pure JAX.

gymnax's own `step` resets by itself; this adapter uses the parts below it, so that `step` never resets and
`terminated` and `truncated` (gymnax's time limit) stay apart.
"""

import functools
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from eqgen.envs.base import AbstractEnv
from eqgen.envs.catalog import GYMNAX_IDS
from eqgen.types import TimeStep


def check_gymnax_version(found: str | None) -> None:
    """**Raises:** `ImportError` when gymnax is missing (None) or older than 1.0.1.

    Before, `step` returned five values and hid time limits in `done`. Resolvers fall back to such a release
    when another package wants gymnasium 1.4 or newer.
    """
    if found is None or tuple(map(int, re.findall(r"\d+", found)[:3])) < (1, 0, 1):
        state = "is not installed" if found is None else f"{found} is too old"
        raise ImportError(f'gymnax {state}. Remedy: pip install "gymnax>=1.0.1,<2" "gymnasium<1.4" six')


try:
    check_gymnax_version(version("gymnax"))
except PackageNotFoundError:
    check_gymnax_version(None)

import gymnax
from gymnax.environments.spaces import Box


@functools.cache
def _make(gymnax_id: str) -> tuple[Any, Any]:
    """gymnax's environment and its parameters: one object per name, so that compiled functions are shared."""
    return gymnax.make(gymnax_id)


class GymnaxEnv(AbstractEnv):
    """A gymnax environment with its default parameters."""

    name: str
    obs_shape: tuple[int, ...]
    action_dim: int
    max_steps: int
    middle: tuple[float, ...]
    """The centre of the action bounds, and below half their width: action 1 is the upper bound."""
    half_range: tuple[float, ...]
    _env: Any = eqx.field(static=True, repr=False)
    _params: Any = eqx.field(static=True, repr=False)

    def __init__(self, gymnax_id: str):
        """**Arguments:** `gymnax_id`, such as `"Pendulum-v1"`.

        **Raises:** `ValueError` when gymnax has no such environment or its actions are discrete.
        """
        if gymnax_id not in gymnax.registered_envs:
            raise ValueError(f"gymnax has no environment {gymnax_id!r}.")
        env, params = _make(gymnax_id)
        space = env.action_space(params)
        if not isinstance(space, Box):
            raise ValueError(
                f"gymnax's {gymnax_id} has the actions {space}, eqgen's algorithms need continuous ones, as "
                f"{', '.join(GYMNAX_IDS)} have."
            )
        self._env, self._params = env, params
        self.name = f"gymnax/{gymnax_id}"
        self.obs_shape = jax.eval_shape(lambda: self.reset(key=jax.random.key(0)))[1].shape
        self.action_dim = space.shape[0]
        self.max_steps = int(params.max_steps_in_episode)
        low, high = (np.broadcast_to(bound, space.shape) for bound in (space.low, space.high))
        self.middle = tuple(((high + low) / 2).tolist())
        self.half_range = tuple(((high - low) / 2).tolist())

    def reset(self, *, key: Key[Array, ""]) -> tuple[Any, Float[Array, "*obs"]]:
        with jax.numpy_rank_promotion("allow"):
            obs, state = self._env.reset_env(key, self._params)
        return _strong(state), _strong(obs)

    def step(self, state: Any, action: Float[Array, " act"], *, key: Key[Array, ""]) -> tuple[Any, TimeStep]:
        action = jnp.array(self.middle) + jnp.array(self.half_range) * jnp.clip(action, -1, 1)
        with jax.numpy_rank_promotion("allow"):
            obs, state, reward, terminated, _ = self._env.step_env(key, state, action, self._params)
            truncated = self._env.is_truncated(state, self._params)
        outcome = TimeStep(
            _strong(obs),
            jnp.asarray(reward, jnp.result_type(float)),
            jnp.asarray(terminated),
            jnp.asarray(truncated),
        )
        return _strong(state), outcome


def _strong(tree: Any) -> Any:
    """Arrays of fixed dtypes: gymnax's first states hold Python numbers and weak types, its later ones none,
    and a scan wants them equal."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.result_type(x)), tree)
