"""Every figure can be drawn from the committed results; slow: every experiment runs in its smoke form."""

import importlib.util
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from eqgen.studies import run_study


FOLDER = Path(__file__).resolve().parent.parent / "paper_figures"
FIGURES = sorted(FOLDER.glob("*/fig*.py"))
TABLES = sorted(FOLDER.glob("*/table_*.py"))
EXPERIMENTS = [FOLDER / name / "run.py" for name in ("som", "nclql")]


def load(path: Path):
    """The script as a module, which may import what lies beside it."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(path: Path, folder: Path) -> Path:
    """Draws the script's figure into the folder, as it should; returns the picture."""
    written = load(path).draw(out=folder / "figure")
    plt.close("all")
    assert {file.suffix for file in written} == {".pdf", ".png"}
    assert all(file.parent == folder and file.stat().st_size > 2_000 for file in written)
    return folder / "figure.png"


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_figure_is_that_of_committed_results(path, tmp_path):
    """Not to the last pixel, which fonts decide."""
    committed = path.parent / f"{path.stem.removeprefix('fig_')}.png"
    new, old = (
        np.asarray(Image.open(file).convert("RGB"), float) for file in (drawn(path, tmp_path), committed)
    )
    assert new.shape == old.shape and np.mean(np.abs(new - old)) < 0.5, f"run: python {path}"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_table_is_that_of_committed_results(path, tmp_path):
    (written,) = load(path).write(out=tmp_path / "table.md")
    committed = path.parent / f"{path.stem.removeprefix('table_')}.md"
    assert written.read_text() == committed.read_text(), f"run: python {path}"


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.parent.name)
def test_experiment_runs_in_smoke_form(path, tmp_path):
    studies = {name: study for name, study in load(path).STUDIES.items() if name.endswith("-smoke")}
    assert studies
    for name, study in studies.items():
        result = run_study(study, name, next(iter(study.agents)), folder=tmp_path, results=tmp_path)
        assert json.loads(result.read_text())["records"]


@pytest.mark.slow
def test_timestep_samplers_are_compared_in_smoke_form(tmp_path):
    script = load(FOLDER / "adaptive_timesteps" / "run.py")
    study = script.STUDIES["ring-smoke"]
    for sampler in study.samplers:
        content = json.loads(script.run(study, sampler, tmp_path / f"{sampler}.json").read_text())
        assert content["steps"] == [0, 2, 4] and len(content["bound"][0]) == len(study.seeds)
        assert content["samples"]["mmd2"]["held_out"] is not None
