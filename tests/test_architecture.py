"""The layers: imports go strictly down, never sideways between algorithms, and heavy imports stay rare."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import eqgen


ROOT = Path(__file__).resolve().parent.parent
# Lowest first: a module imports from the lines above its own. "package." stands for all modules of a package,
# which may also import one another. A new module has to be entered.
LAYERS = [
    {"types", "tree", "devices", "files", "hyperparameters", "provenance"},
    {"schedules"},
    {"parameterizations"},
    {"samplers", "ode", "scores", "entropy", "meanflow", "losses", "exploration", "networks."},
    {"envs.", "timesteps.", "guidance", "metrics"},
    {"data."},
    {"algorithms."},
    {"checkpoint", "evaluation", "loops", "costs"},
    {"runs", "training", "offline", "plotting", "interactive", "rendering"},
    {"sessions"},
    {"experiments"},
    {"studies", "collection", "planning", "reporting", "deployment"},
    {"comparison", "sweeps"},
    {"benchmark"},
    {"cli"},
    {"__main__"},
]
# What an algorithm may import of its own package: the bases, and the planner, since a method such as Prior
# Guidance is learned on top of a frozen one. That is what it is about, not a helper that it shares with it.
FOUNDATIONS = {"algorithms.base", "algorithms.actor_critic", "algorithms.planner"}
# The modules that are about a heavy package; all others load none.
WEIGHTY_MODULES = {
    "ode",
    "data.d4rl",
    "data.formats",
    "data.hdf5",
    "data.minari",
    "envs.gymnax",
    "envs.host",
    "envs.mjx.base",
    "envs.mjx.tasks",
    "envs.robotics",
    "plotting",
    "interactive",
    "rendering",
    "sessions",
    "experiments",
    "studies",
    "deployment",
    "reporting",
    "sweeps",
    "collection",
    "planning",
    "comparison",
    "benchmark",
    "cli",
    "__main__",
}
HEAVY = (
    "diffrax gymnax gymnasium mujoco flax brax matplotlib PIL imageio h5py pandas sklearn tqdm tyro".split()
)

MODULES = {
    info.name.removeprefix("eqgen."): Path(info.module_finder.path, f"{info.name.split('.')[-1]}.py")
    for info in pkgutil.walk_packages(eqgen.__path__, "eqgen.")
    if not info.ispkg
}


def rank(module: str) -> int:
    """The number of the module's layer."""
    entry = module if "." not in module else module.split(".")[0] + "."
    found = [number for number, layer in enumerate(LAYERS) if entry in layer]
    assert found, f"eqgen.{module} has no layer: enter it in LAYERS"
    return found[0]


def imports(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """All (module, names taken from it) that a file imports, at any depth."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module, tuple(alias.name for alias in node.names)))
    return found


def eqgen_modules(path: Path) -> set[str]:
    """The eqgen modules that a file imports, without the leading "eqgen."."""
    found = set()
    for module, names in imports(path):
        candidates = [module, *(f"{module}.{name}" for name in names)]
        found |= {name.removeprefix("eqgen.") for name in candidates}
    return found & MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    package, layer = module.split(".")[0] if "." in module else "", rank(module)
    for other in eqgen_modules(MODULES[module]):
        same_package = package and other.startswith(package + ".")
        if package == "algorithms" and same_package:
            assert other in FOUNDATIONS, f"eqgen.{module} imports its sibling eqgen.{other}"
            assert module not in FOUNDATIONS or other == "algorithms.base"
        else:
            assert rank(other) < layer or same_package, f"eqgen.{module} imports eqgen.{other}"
        if layer < rank("experiments") and package != "algorithms" and other.startswith("algorithms."):
            assert other == "algorithms.base", f"eqgen.{module} knows the algorithm eqgen.{other}"


def test_init_files_are_empty():
    for path in (ROOT / "eqgen").glob("*/**/__init__.py"):
        assert not path.read_text().strip(), f"{path} re-exports"


OUTSIDE = sorted(
    path for folder in ("notebooks", "paper_figures", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")
)


@pytest.mark.parametrize("path", [*MODULES.values(), *OUTSIDE], ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_are_public(path):
    for module, names in imports(path):
        assert module.split(".")[0] not in ("tests", "helpers", "notebooks", "paper_figures", "benchmarks")
        if module.split(".")[0] == "eqgen":
            private = [part for part in [*module.split("."), *names] if part.startswith("_")]
            assert private in ([], ["__version__"]), f"{path} imports {module} {names}"


def loaded_by(code: str) -> set[str]:
    """The top-level packages that are in memory after `code` in a fresh interpreter."""
    code += "\nimport sys; print('\\n'.join({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_package_itself_loads_nothing():
    assert not loaded_by("import eqgen") & {"jax", "jaxlib", "equinox", "optax", "numpy", *HEAVY}


def test_modules_load_nothing_heavy():
    light = MODULES.keys() - WEIGHTY_MODULES
    assert not loaded_by("\n".join(f"import eqgen.{module}" for module in light)) & set(HEAVY)
