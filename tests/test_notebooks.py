"""The rules of notebooks/README.md, held over every committed pair; slow: every source runs when small."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


jupytext = pytest.importorskip("jupytext", reason="pip install -e '.[notebooks]'")
import nbformat  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SOURCES = sorted((FOLDER / "src").glob("*.py"))
SMOKE = re.compile(r"^(?P<name>\w+) = .*?  # smoke: (?P<value>.+)$", flags=re.MULTILINE)
# A folder of some machine, as a file name in a warning shows it, or an address in memory.
MACHINE = re.compile(r"/home/|/root/|/tmp/|/Users/|/work/|/opt/|/usr/|/var/|site-packages|[A-Z]:\\| at 0x")

each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def smoke_source(source: Path) -> str:
    """The source with the smoke values of its `parameters` cell and without its `claims` cells."""
    notebook = jupytext.read(source)
    for cell in tagged(notebook, "parameters"):
        cell.source = SMOKE.sub(r"\g<name> = \g<value>", cell.source)
    notebook.cells = [cell for cell in notebook.cells if cell not in tagged(notebook, "claims")]
    return jupytext.writes(notebook, fmt="py:percent")


def test_every_notebook_has_a_source():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in SOURCES}


@each_source
def test_pair_is_in_step(source):
    text, executed = jupytext.read(source), nbformat.read(FOLDER / f"{source.stem}.ipynb", as_version=4)
    content = lambda nb: [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in nb.cells]
    assert content(executed) == content(text), f"run: make notebooks ONLY={source.stem}"


@each_source
def test_outputs_are_those_of_one_clean_run(source):
    path = FOLDER / f"{source.stem}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size <= 500_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert not [out for out in cell.outputs if out.output_type == "error"]
        for output in cell.outputs:
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not MACHINE.search(text), f"an output shows a path or an address: {text}"


@each_source
def test_parameters_and_claims(source):
    notebook = jupytext.read(source)
    (cell,) = tagged(notebook, "parameters")
    names = []
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name), ast.unparse(node)
        ast.literal_eval(node.value)
        names.append(node.targets[0].id)
    for match in SMOKE.finditer(cell.source):
        assert match["name"] in names
        ast.literal_eval(match["value"])
    claims = tagged(notebook, "claims")
    assert sum(line.startswith("assert") for c in claims for line in c.source.splitlines()) >= 2


@pytest.mark.slow
@each_source
def test_source_runs_with_smoke_values(source, tmp_path):
    script = tmp_path / source.name
    script.write_text(smoke_source(source))
    before = sorted(FOLDER.iterdir())
    env = os.environ | {"MPLBACKEND": "agg", "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    run = subprocess.run([sys.executable, script], cwd=FOLDER, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert sorted(FOLDER.iterdir()) == before, "the notebook left files behind"


def test_smoke_source_replaces_values_and_drops_claims(tmp_path):
    source = tmp_path / "00_example.py"
    source.write_text(
        '# %% tags=["parameters"]\nseed = 0\nwidth = (256, 256)  # smoke: (8, 8)\n\n'
        '# %%\nprint(width)\n\n# %% tags=["claims"]\nassert width == (256, 256)\nassert True\n'
    )
    code = smoke_source(source)
    assert "width = (8, 8)\n" in code and "seed = 0" in code and "print(width)" in code
    assert "assert" not in code
