"""Probe environments: the smallest tasks on which a critic can be wrong in one particular way.

Each isolates one thing a critic must get right and knows its optimal Q in closed form, so a failure names
the fault. Observations and actions are one-dimensional. In the order in which to debug:

| probe | reward | a critic that fails it |
|---|---|---|
| constant | 1 | cannot regress, or bootstraps beyond termination |
| observation | the observation, -1 or 1 | does not see observations, or they are misaligned with rewards |
| delayed | 1 at the second of two steps | does not bootstrap, or discounts wrongly |
| action | -(a - 1/2)^2 | does not see actions, or they are misaligned |
| both | -(a - s/2)^2 for observation s | does not combine the two |
| truncation | 1 for ever, cut off every 5 steps | takes a time limit for an end |
"""

from abc import abstractmethod
from typing import Any, Literal

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from eqgen.envs.base import AbstractEnv
from eqgen.types import TimeStep


class AbstractProbe(AbstractEnv):
    """An environment whose optimal Q is known."""

    @abstractmethod
    def true_q(
        self, obs: Float[Array, " 1"], action: Float[Array, " 1"], *, discount: float
    ) -> Float[Array, ""]:
        """The optimal action value."""


class OneStepProbe(AbstractProbe):
    """Ends with its first step, so Q is the reward, a function of what the step may depend on."""

    name: str
    depends_on: Literal["nothing", "observation", "action", "both"]
    obs_shape: tuple[int, ...] = (1,)
    action_dim: int = 1
    max_steps: int = 1

    def reset(self, *, key: Key[Array, ""]) -> tuple[Float[Array, " 1"], Float[Array, " 1"]]:
        seen = self.depends_on in ("observation", "both")
        obs = jr.rademacher(key, (1,), float) if seen else jnp.zeros(1)
        return obs, obs

    def step(
        self, state: Float[Array, " 1"], action: Float[Array, " 1"], *, key: Key[Array, ""]
    ) -> tuple[Any, TimeStep]:
        reward = self.true_q(state, jnp.clip(action, -1, 1), discount=1.0)
        return state, TimeStep(state, reward, terminated=jnp.array(True), truncated=jnp.array(False))

    def true_q(
        self, obs: Float[Array, " 1"], action: Float[Array, " 1"], *, discount: float
    ) -> Float[Array, ""]:
        match self.depends_on:
            case "nothing":
                return jnp.ones(())
            case "observation":
                return obs[0]
            case "action":
                return -((action[0] - 0.5) ** 2)
            case "both":
                return -((action[0] - 0.5 * obs[0]) ** 2)


class DelayedProbe(AbstractProbe):
    """Two steps, observed as 0 and 1; only the second is rewarded: Q(0, .) = discount, Q(1, .) = 1."""

    name: str = "probe/delayed"
    obs_shape: tuple[int, ...] = (1,)
    action_dim: int = 1
    max_steps: int = 2

    def reset(self, *, key: Key[Array, ""]) -> tuple[Float[Array, " 1"], Float[Array, " 1"]]:
        return jnp.zeros(1), jnp.zeros(1)

    def step(
        self, state: Float[Array, " 1"], action: Float[Array, " 1"], *, key: Key[Array, ""]
    ) -> tuple[Any, TimeStep]:
        outcome = TimeStep(state + 1, state[0], terminated=state[0] > 0, truncated=jnp.array(False))
        return state + 1, outcome

    def true_q(
        self, obs: Float[Array, " 1"], action: Float[Array, " 1"], *, discount: float
    ) -> Float[Array, ""]:
        return jnp.where(obs[0] > 0, 1.0, discount)


class TruncationProbe(AbstractProbe):
    """Reward 1 for ever; the clock alone ends its episodes: Q = 1 / (1 - discount)."""

    name: str = "probe/truncation"
    obs_shape: tuple[int, ...] = (1,)
    action_dim: int = 1
    max_steps: int = 5

    def reset(self, *, key: Key[Array, ""]) -> tuple[Int[Array, ""], Float[Array, " 1"]]:
        return jnp.zeros((), jnp.int32), jnp.zeros(1)

    def step(
        self, state: Int[Array, ""], action: Float[Array, " 1"], *, key: Key[Array, ""]
    ) -> tuple[Any, TimeStep]:
        step = state + 1
        outcome = TimeStep(
            jnp.zeros(1), jnp.ones(()), terminated=jnp.array(False), truncated=step >= self.max_steps
        )
        return step, outcome

    def true_q(
        self, obs: Float[Array, " 1"], action: Float[Array, " 1"], *, discount: float
    ) -> Float[Array, ""]:
        return jnp.full((), 1 / (1 - discount))


PROBES = {
    "constant": lambda: OneStepProbe("probe/constant", depends_on="nothing"),
    "observation": lambda: OneStepProbe("probe/observation", depends_on="observation"),
    "delayed": DelayedProbe,
    "action": lambda: OneStepProbe("probe/action", depends_on="action"),
    "both": lambda: OneStepProbe("probe/both", depends_on="both"),
    "truncation": TruncationProbe,
}
"""The constructors by catalog name."""
