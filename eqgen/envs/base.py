"""The contract of environments that are pure JAX, and what is built on it alone.

An environment is an immutable module; its state is a PyTree. `step` never resets: `step_autoreset` does, and
hands back both the true next observation (in the `TimeStep`) and the one to act on. Actions are in [-1, 1]^d;
an environment with other bounds rescales and clips to them itself. Observations are handed on as they are;
that they are finite is for the loop to check.
"""

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from eqgen.tree import somewhere
from eqgen.types import TimeStep, Transition


class EnvironmentFailedError(RuntimeError):
    """An environment raised an exception; the message says which one, where and what."""


class AbstractEnv(eqx.Module):
    """A continuous-control task in pure JAX: vmappable over states, jittable, without side effects."""

    name: eqx.AbstractVar[str]
    obs_shape: eqx.AbstractVar[tuple[int, ...]]
    action_dim: eqx.AbstractVar[int]
    max_steps: eqx.AbstractVar[int]
    """Steps after which an episode is truncated."""

    @abstractmethod
    def reset(self, *, key: Key[Array, ""]) -> tuple[Any, Float[Array, "*obs"]]:
        """A first state and its observation."""

    @abstractmethod
    def step(self, state: Any, action: Float[Array, " act"], *, key: Key[Array, ""]) -> tuple[Any, TimeStep]:
        """The next state and what came of it; does not reset."""


def example_transition(obs_shape: tuple[int, ...], action_dim: int) -> Transition:
    """A transition of zeros, which tells algorithms and replay the shapes."""
    return Transition(
        obs=jnp.zeros(obs_shape),
        action=jnp.zeros(action_dim),
        reward=jnp.zeros(()),
        next_obs=jnp.zeros(obs_shape),
        terminated=jnp.array(False),
        truncated=jnp.array(False),
    )


def step_autoreset(
    env: AbstractEnv, state: Any, action: Float[Array, " act"], *, key: Key[Array, ""]
) -> tuple[Any, Float[Array, "*obs"], TimeStep]:
    """One step, and a reset if it ended the episode.

    Under `jax.vmap` resets are computed in steps in which any of the episodes ended, and skipped in all others.

    **Returns:** the state to go on from, the observation to act on next, and the step's own outcome, whose
    `obs` is the true next observation also when the episode ended.
    """
    step_key, reset_key = jr.split(key)
    # The barrier: else XLA may compute the observation twice, rounded differently, once to keep and once to go on.
    next_state, timestep = jax.lax.optimization_barrier(env.step(state, action, key=step_key))

    def begin_anew(key):
        pick = lambda fresh, old: jnp.where(timestep.done, fresh, old)
        return jax.tree.map(pick, env.reset(key=key), (next_state, timestep.obs))

    go_on = lambda key: (next_state, timestep.obs)
    state, obs = jax.lax.cond(somewhere(timestep.done), begin_anew, go_on, reset_key)
    return state, obs, timestep
