"""Environments by name: `make("gymnax/Pendulum-v1")`, `make("mujoco/HalfCheetah-v5")`, `make("toy/ring")`.

The part before the slash says what steps them; only that back-end is imported, and only when one is made.
"""

import difflib
from typing import Any


GYMNAX_IDS = (
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "Reacher-misc",
    "Swimmer-misc",
    "PointRobot-misc",
)
"""gymnax's environments with continuous actions."""

MUJOCO_IDS = tuple(
    f"{task}-{release}"
    for release in ("v5", "v4")
    for task in (
        "HalfCheetah",
        "Hopper",
        "Walker2d",
        "Ant",
        "Humanoid",
        "HumanoidStandup",
        "Swimmer",
        "Reacher",
        "Pusher",
        "InvertedPendulum",
        "InvertedDoublePendulum",
    )
    if (task, release) != ("Pusher", "v4")  # needs a MuJoCo before 3
)
"""Gymnasium's MuJoCo tasks."""

TOY_NAMES = ("ring", "moons", "broad-sharp", "mixture")
PROBE_NAMES = ("constant", "observation", "delayed", "action", "both", "truncation")


def available() -> tuple[str, ...]:
    """All names that `make` takes; `gymnasium/<id>` further makes any continuous task known to Gymnasium."""
    families = {"gymnax": GYMNAX_IDS, "mujoco": MUJOCO_IDS, "toy": TOY_NAMES, "probe": PROBE_NAMES}
    return tuple(f"{family}/{name}" for family, names in families.items() for name in names)


def make(name: str) -> Any:
    """The environment of this name.

    **Returns:** an `AbstractEnv`, or for `mujoco/` and `gymnasium/` a `HostEnv`, whose `make` gives the
    environments themselves.

    **Raises:** `ValueError` when there is none; it lists the nearest names.
    """
    family, _, rest = name.partition("/")
    if name not in available() and not (family == "gymnasium" and rest):
        _raise_unknown(name)
    match family:
        case "gymnax":
            from eqgen.envs.gymnax import GymnaxEnv

            return GymnaxEnv(rest)
        case "toy":
            from eqgen.envs.toys import make_toy

            return make_toy(rest)
        case "probe":
            from eqgen.envs.probes import make_probe

            return make_probe(rest)
        case _:
            from eqgen.envs.host import HostEnv

            return HostEnv(rest)


def _raise_unknown(name: str) -> None:
    names = available()
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    near += [n for n in names if n not in near and name.lower() in n.lower()]
    if not near:
        near = [n for n in names if n.partition("/")[0] == name.partition("/")[0]] or list(names)
    raise ValueError(f"There is no environment {name!r}. Nearest: {', '.join(near)}.")
