"""What planners are trained on: windows of a set, for each part of a planner, drawn together.

Which windows, and in which units, depends on the family of the set, as in Diffusion Veteran's and Prior Guidance's
code (`eqgen.data.windows`); horizons and strides are theirs, too.
"""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Key

from eqgen.data.episodes import DataError, Episodes, Transitions, need_rewards, transitions
from eqgen.data.windows import (
    Window,
    Windows,
    antmaze_policy_windows,
    antmaze_windows,
    kitchen_windows,
    maze2d_policy_windows,
    maze2d_windows,
    mujoco_windows,
    reward_scale,
)
from eqgen.types import Transition


Family = Literal["maze2d", "antmaze", "kitchen", "mujoco"]


class PlannerBatch(eqx.Module):
    """A batch whose parts learn from different data; a batch of `Window`s alone serves all."""

    plans: Window
    """For the denoiser, the critic and the classifier."""
    actions: Window
    """For the inverse dynamics, which reads the first two states and the first action."""
    transitions: Transition | None = None
    """For V_eta, where the value of a plan is that of its states."""


@dataclasses.dataclass(frozen=True)
class WindowSettings:
    """How windows are cut from a set."""

    family: Family
    horizon: int
    """States of a plan."""
    stride: int
    """Steps from one of them to the next."""

    def __post_init__(self):
        if self.horizon < 2 or self.stride < 1:
            raise DataError(
                f"horizon is {self.horizon} and stride {self.stride}; at least 2 and 1 are needed."
            )

    @classmethod
    def of(cls, family: Family, *, horizon: int | None = None, stride: int | None = None) -> "WindowSettings":
        """The reference's, by family, but for what is given."""
        usual = {"maze2d": (32, 15), "antmaze": (40, 25), "kitchen": (32, 4), "mujoco": (4, 1)}[family]
        return cls(family, usual[0] if horizon is None else horizon, usual[1] if stride is None else stride)


class Plans(eqx.Module):
    """Windows of a set, to draw from."""

    episodes: Episodes
    windows: Windows

    def sample(self, n: int, *, key: Key[Array, ""]) -> Window:
        """`n` windows drawn uniformly with replacement."""
        return self.windows.sample(self.episodes, n, key=key)


class PlanningData(eqx.Module):
    """All that the parts of a planner learn from, on the device."""

    plans: Plans
    actions: Plans
    transitions: Transitions | None

    def sample(self, n: int, *, key: Key[Array, ""]) -> PlannerBatch:
        """`n` of each, drawn separately."""
        plan_key, action_key, transition_key = jr.split(key, 3)
        return PlannerBatch(
            self.plans.sample(n, key=plan_key),
            self.actions.sample(n, key=action_key),
            None if self.transitions is None else self.transitions.sample(n, key=transition_key),
        )


def planning_data(episodes: Episodes, settings: WindowSettings, *, state_values: bool) -> PlanningData:
    """The data of a planner, on the device.

    **Arguments:** `state_values`: whether plans are valued by V(s), which learns from transitions; their rewards
    are scaled (`reward_scale`), and steps at which an episode was cut off are left out.

    **Raises:** `DataError` when the set does not suit the family.
    """
    cut = dict(horizon=settings.horizon, stride=settings.stride)
    make_plans, make_actions = {
        "maze2d": (maze2d_windows, maze2d_policy_windows),
        "antmaze": (antmaze_windows, antmaze_policy_windows),
        "kitchen": (kitchen_windows, kitchen_windows),
        "mujoco": (mujoco_windows, mujoco_windows),
    }[settings.family]
    plans = make_plans(episodes, **cut)
    actions = plans if make_actions is make_plans else make_actions(episodes, **cut)
    steps = None
    if state_values:
        scaled = need_rewards(episodes) * jnp.float32(reward_scale(episodes))
        episodes = eqx.tree_at(lambda e: e.rewards, episodes, scaled)
        steps = transitions(episodes, drop_truncated=True)
    episodes, plans, actions, steps = jax.device_put((episodes, plans, actions, steps))
    if steps is not None:
        steps = Transitions(episodes, steps.rows)  # the same arrays, not a copy of them
    return PlanningData(Plans(episodes, plans), Plans(episodes, actions), steps)


def family_of(name: str) -> Family:
    """The family of a set, told by its name ("eqgen/maze2d-umaze", "antmaze-large-play-v2", ...).

    **Raises:** `DataError` when the name tells none.
    """
    short = name.rsplit("/", 1)[-1].lower()
    starts: dict[str, Family] = {"maze2d": "maze2d", "antmaze": "antmaze", "kitchen": "kitchen"}
    starts |= {task: "mujoco" for task in ("halfcheetah", "hopper", "walker2d", "ant-")}
    for start, family in starts.items():
        if short.startswith(start):
            return family
    raise DataError(
        f"The name {name!r} tells no family of tasks. Say which: maze2d, antmaze, kitchen or mujoco."
    )
