"""Normalised scores: which returns count as 0 and as 100, and who says so.

A score belongs to its scale. D4RL's constants were measured in D4RL's environments; sets that eqgen made carry
constants measured in eqgen's. Scores on scales of different origin are not averaged or compared: `mean_score`
refuses.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import ArrayLike, Float, Num

from eqgen.envs.maze import REFERENCE_SCORES


@dataclasses.dataclass(frozen=True)
class Scale:
    """The mean returns that score 0 and 100 on a set."""

    name: str
    low: float
    high: float
    origin: Literal["D4RL", "eqgen"]
    source: str
    """Where or how the two returns were obtained."""

    def __post_init__(self):
        if not (np.isfinite([self.low, self.high]).all() and self.low < self.high):
            raise ValueError(
                f"{self.name}: the returns {self.low} and {self.high} are no scale; the first must be the lesser."
            )

    def score(self, returns: Num[ArrayLike, "*n"]) -> Float[ArrayLike, "*n"]:
        """100 (return - low) / (high - low), of undiscounted returns."""
        return 100 * (np.asarray(returns, np.float64) - self.low) / (self.high - self.low)

    def returns(self, scores: Num[ArrayLike, "*n"]) -> Float[ArrayLike, "*n"]:
        """The returns that have these scores."""
        return self.low + np.asarray(scores, np.float64) / 100 * (self.high - self.low)


def mean_score(scored: Sequence[tuple[Scale, Num[np.ndarray, "..."]]]) -> float:
    """The mean over sets of each set's mean score.

    **Arguments:** `scored`, pairs of a scale and returns measured in the environment it is of.

    **Raises:** `ValueError` when the scales are of different origin.
    """
    names = {origin: scale.name for scale, _ in scored for origin in [scale.origin]}
    if len(names) != 1:
        mixed = " and ".join(f"{name} on {origin}'s" for origin, name in names.items()) or "nothing"
        raise ValueError(
            f"There is no common scale of {mixed}. Average sets of one origin, or compare success and returns."
        )
    return float(np.mean([np.mean(scale.score(np.asarray(returns))) for scale, returns in scored]))


_INFOS = "d4rl/infos.py"
_MAZE_REWARD = f"{_INFOS}: 100 episodes of random actions, and of a waypoint controller that never plans anew"


def _d4rl() -> dict[str, Scale]:
    table = {
        f"{name.replace('2d/', '2d-')}-v1": (*bounds, _MAZE_REWARD)
        for name, bounds in REFERENCE_SCORES.items()
    }
    table |= {
        "maze2d-open-v0": (0.01, 20.66, _INFOS),
        "maze2d-umaze-dense-v1": (68.537689, 193.66285642381482, _INFOS),
        "maze2d-medium-dense-v1": (44.264742, 297.4552547777125, _INFOS),
        "maze2d-large-dense-v1": (30.569041, 303.4857382709002, _INFOS),
        # Not in infos.py: registered with the environments.
        "maze2d-eval-umaze-v1": (36.63, 141.4, "d4rl/pointmaze/__init__.py"),
        "maze2d-eval-medium-v1": (13.07, 204.93, "d4rl/pointmaze/__init__.py"),
        "maze2d-eval-large-v1": (16.4, 302.22, "d4rl/pointmaze/__init__.py"),
    }
    # The same for v0, v1 and v2: the environments are those of gym, with MuJoCo's C engine before release 2.2.
    locomotion = {
        "halfcheetah": (-280.178953, 12135.0),
        "hopper": (-20.272305, 3234.3),
        "walker2d": (1.629008, 4592.3),
        "ant": (-325.6, 3879.7),
    }
    policies = ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay")
    for task, bounds in locomotion.items():
        for policy in policies:
            for release in ("v0", "v1", "v2"):
                table[f"{task}-{policy}-{release}"] = (*bounds, _INFOS)
    antmazes = ["umaze", "umaze-diverse"]
    antmazes += [f"{maze}-{kind}" for maze in ("medium", "large") for kind in ("play", "diverse")]
    for maze in antmazes:
        for release in ("v0", "v1", "v2"):
            table[f"antmaze-{maze}-{release}"] = (0.0, 1.0, f"{_INFOS}: an episode's return is its success")
    for tasks in ("complete", "partial", "mixed"):
        table[f"kitchen-{tasks}-v0"] = (0.0, 4.0, f"{_INFOS}: the number of tasks")
    return {name: Scale(name, low, high, "D4RL", source) for name, (low, high, source) in table.items()}


D4RL: dict[str, Scale] = _d4rl()
"""D4RL's scales by the name of the set."""


def d4rl_score(name: str, returns: Num[ArrayLike, "*n"]) -> Float[ArrayLike, "*n"]:
    """D4RL's score of returns on one of D4RL's sets.

    **Raises:** `ValueError` for any other set, of eqgen's own above all.
    """
    if name.startswith("eqgen/"):
        raise ValueError(
            f"{name} was made by eqgen, and D4RL's constants are of other environments. Its own are "
            "`episodes.scale`, written into its file when it was made."
        )
    if name not in D4RL:
        family = [known for known in D4RL if known.split("-")[0] == name.split("-")[0]]
        raise ValueError(f"D4RL has no reference for {name!r}. It has: {', '.join(family or D4RL)}.")
    return D4RL[name].score(returns)
