"""Environments by name: `make("gymnax/Pendulum-v1")`, `make("mujoco/HalfCheetah-v5")`, `make("toy/ring")`.

The part before the slash says what steps them; only that back-end is imported, and only when one is made. A module
of your own in this folder, `cart.py` with `ENVIRONMENTS = {"default": Cart}`, is the family `cart/`.
"""

import ast
import difflib
import importlib
from pathlib import Path
from typing import Any

import eqgen.envs


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

ROBOTICS_IDS = (
    *(
        f"{agent}_{maze}{reward}-{release}"
        for agent, release in (("PointMaze", "v3"), ("AntMaze", "v5"), ("AntMaze", "v4"))
        for maze in ("UMaze", "Medium", "Large", "Open")
        for reward in ("", "Dense")
    ),
    *(f"FrankaKitchen{tasks}-v1" for tasks in ("", "_Partial", "_Mixed")),
)
"""Tasks of Gymnasium-Robotics, which the extra `offline` installs."""

MJX_IDS = tuple(
    f"{task}-{release}"
    for release in ("v5", "v4")
    for task in (
        "HalfCheetah",
        "Swimmer",
        "Hopper",
        "Walker2d",
        "Ant",
        "Humanoid",
        "InvertedPendulum",
        "InvertedDoublePendulum",
        "Reacher",
        "Pusher",
    )
    if f"{task}-{release}" in MUJOCO_IDS
)
"""Those of them that are here on MJX too."""

MAZE_NAMES = ("umaze", "medium", "large")
TOY_NAMES = ("ring", "moons", "broad-sharp", "mixture")
PROBE_NAMES = ("constant", "observation", "delayed", "action", "both", "truncation")


def own_families() -> dict[str, tuple[str, ...]]:
    """The keys of `ENVIRONMENTS` in the modules of this folder, by module; read, and nothing imported."""
    found = {}
    for path in sorted(path for folder in eqgen.envs.__path__ for path in Path(folder).glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            match node:
                case ast.Assign(targets=[ast.Name("ENVIRONMENTS")], value=ast.Dict(keys=keys)):
                    found[path.stem] = tuple(ast.literal_eval(key) for key in keys if key)
    return found


def available() -> tuple[str, ...]:
    """The names that are known to work. `make` also takes what was registered with gymnax or Gymnasium since,
    as `gymnax/<id>` and `gymnasium/<id>`, if it is continuous."""
    families = {
        "gymnax": GYMNAX_IDS,
        "mujoco": MUJOCO_IDS,
        "mjx": MJX_IDS,
        "robotics": ROBOTICS_IDS,
        "maze2d": MAZE_NAMES,
        "toy": TOY_NAMES,
        "probe": PROBE_NAMES,
        **own_families(),
    }
    return tuple(f"{family}/{name}" for family, names in families.items() for name in names)


def make(name: str) -> Any:
    """The environment of this name.

    **Returns:** an `AbstractEnv`, or for `mujoco/`, `robotics/` and `gymnasium/` a `HostEnv`, whose `make`
    gives the environments themselves.

    **Raises:** `ValueError` when there is none that eqgen can use; it lists the nearest names.
    `ImportError` when the extra that it needs is not installed; it names the remedy.
    """
    family, _, rest = name.partition("/")
    try:
        match family:
            case "toy" if name in available():
                from eqgen.envs.toys import TOYS

                return TOYS[rest]()
            case "mjx" if rest:
                from eqgen.envs.mjx.tasks import make_mjx

                return make_mjx(rest)
            case "maze2d" if name in available():
                from eqgen.envs.maze import MAZES

                return MAZES[rest]()
            case "probe" if name in available():
                from eqgen.envs.probes import PROBES

                return PROBES[rest]()
            case "gymnax" if rest:
                from eqgen.envs.gymnax import GymnaxEnv

                return GymnaxEnv(rest)
            case "robotics" if rest:
                from eqgen.envs.robotics import robotics_env

                return robotics_env(rest)
            case "mujoco" | "gymnasium" if rest:
                from eqgen.envs.host import HostEnv

                return HostEnv(rest)
            case _ if rest in own_families().get(family, ()):
                return importlib.import_module(f"eqgen.envs.{family}").ENVIRONMENTS[rest]()
            case _:
                raise ValueError(f"There is no environment {name!r}.")
    except ValueError as error:
        near = _nearest(family, rest or name)
        hint = f"Nearest: {', '.join(near)}." if near else "eqgen.envs.catalog.available() lists them."
        raise ValueError(f"{error} {hint}") from error


def _nearest(family: str, rest: str) -> list[str]:
    """The names like this one, by the part after the slash, those of its family first; failing that, its family."""
    part = lambda name: name.partition("/")[2].lower()
    known, wanted = sorted(available(), key=lambda name: not name.startswith(f"{family}/")), rest.lower()
    contained = [name for name in known if len(wanted) > 2 and wanted in part(name)]
    order = difflib.get_close_matches(wanted, {part(name): None for name in known}, n=4, cutoff=0.7)
    close = [name for match in order for name in known if part(name) == match]
    return list(dict.fromkeys(contained + close))[:6] or [n for n in known if n.startswith(f"{family}/")]
