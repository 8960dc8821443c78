"""Nothing warns: not an import, not the command's help, not a small run. What does, fails in these processes."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import eqgen


ROOT = Path(__file__).resolve().parent.parent
# What it imports is an extra that need not be here, and warns itself: Gymnasium-Robotics of tasks it has renamed.
OTHERS = {"eqgen.envs.robotics"}
MODULES = [info.name for info in pkgutil.walk_packages(eqgen.__path__, "eqgen.") if info.name not in OTHERS]


def strictly(*arguments):
    """Runs Python with every warning an error; what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "jax")}
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "Warning" not in run.stderr, run.stderr
    return run.stdout


def test_imports_do_not_warn():
    loading = "\n".join(f"import {name}" for name in MODULES if name != "eqgen.__main__")
    assert strictly("-c", loading) == ""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "som", "--help"], ["list"]], ids=" ".join)
def test_help_does_not_warn(arguments):
    assert strictly("-m", "eqgen", *arguments)


def test_help_needs_no_docstrings():
    """Which `python -OO` drops."""
    assert "resume" in strictly("-OO", "-m", "eqgen", "--help")


def test_a_small_run_and_what_is_done_with_it_do_not_warn(tmp_path):
    flags = ["--env", "toy/ring", "--preset", "smoke", "--settings.total-steps", "120"]
    assert "into" in strictly("-m", "eqgen", "train", "sac", *flags, "--out", tmp_path / "run")
    assert "return" in strictly("-m", "eqgen", "evaluate", tmp_path / "run", "--episodes", "2")
    assert "learning_curve.png" in strictly("-m", "eqgen", "plot", tmp_path / "run")
