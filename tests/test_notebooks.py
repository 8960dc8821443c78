"""The rules of notebooks/README.md, held over every committed pair; slow: every source runs, small and in full."""

import ast
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


jupytext = pytest.importorskip("jupytext", reason="pip install -e '.[notebooks]'")
import nbformat  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SOURCES = sorted((FOLDER / "src").glob("*.py"))
SMOKE = re.compile(r"^(?P<name>\w+) = .*?  # smoke: (?P<value>.+)$", flags=re.MULTILINE)
# A folder of some machine, as a file name in a warning shows it, or an address in memory.
MACHINE = re.compile(r"/home/|/root/|/tmp/|/Users/|/work/|/opt/|/usr/|/var/|site-packages|[A-Z]:\\| at 0x")

spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

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
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    assert path.stat().st_size <= 500_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert not [out for out in cell.outputs if out.output_type == "error"]
        for output in cell.outputs:
            assert build.WIDGET not in output.get("data", {}), "a widget, which has random ids"
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


def run_source(code: str, script: Path, **env: str) -> None:
    script.write_text(code)
    before = sorted(FOLDER.iterdir())
    env |= os.environ | {"MPLBACKEND": "agg", "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    run = subprocess.run([sys.executable, script], cwd=FOLDER, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert sorted(FOLDER.iterdir()) == before, "the notebook left files behind"


ENDS = """
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
from eqgen import interactive

def ends(draw, _explore=interactive.explore, **choices):
    _explore(draw, **choices)
    for name, values in choices.items():
        for value in (values[0], values[-1]):
            figure = draw(**{name: value})
            assert isinstance(figure, Figure)
            plt.close(figure)

interactive.explore = ends
"""


@pytest.mark.slow
@each_source
def test_source_runs_with_smoke_values(source, tmp_path):
    """With every slider at both of its ends."""
    quick = dict(JAX_DISABLE_MOST_OPTIMIZATIONS="1")  # most of it compiles
    run_source(ENDS + smoke_source(source), tmp_path / source.name, **quick)


@pytest.mark.slow
@each_source
def test_source_runs_with_its_own_values(source, tmp_path):
    """With the claims, which are `assert`s."""
    run_source(source.read_text(), tmp_path / source.name)


def test_smoke_source_replaces_values_and_drops_claims(tmp_path):
    source = tmp_path / "00_example.py"
    source.write_text(
        '# %% tags=["parameters"]\nseed = 0\nwidth = (256, 256)  # smoke: (8, 8)\n\n'
        '# %%\nprint(width)\n\n# %% tags=["claims"]\nassert width == (256, 256)\nassert True\n'
    )
    code = smoke_source(source)
    assert "width = (8, 8)\n" in code and "seed = 0" in code and "print(width)" in code
    assert "assert" not in code


def setup_cell(source: Path) -> str:
    first = next(cell for cell in jupytext.read(source).cells if cell.cell_type == "code")
    assert first.metadata.get("tags") == ["setup"]
    return first.source


@each_source
def test_first_cell_is_the_same_in_all(source):
    assert setup_cell(source) == setup_cell(SOURCES[0])


BACKEND = """
import zipfile

def write(folder, name, files):
    info = {"METADATA": "Metadata-Version: 2.1\\nName: eqgen\\nVersion: 0\\nProvides-Extra: images\\n",
            "WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n", "RECORD": ""}
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        for path, text in files.items() | {(f"eqgen-0.dist-info/{key}", text) for key, text in info.items()}:
            wheel.writestr(path, text)
    return name

def build_editable(folder, *_):
    import os
    return write(folder, "eqgen-0-py3-none-any.whl", {"eqgen.pth": os.getcwd()})
"""


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_first_cell_installs_where_eqgen_is_not(tmp_path):
    """In a fresh environment, a small package in place of eqgen, without a network."""
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    venv.create(python.parent.parent, with_pip=True)
    origin = tmp_path / "origin"
    for path, text in {
        "eqgen/__init__.py": "",
        "notebooks/01.py": "",
        "backend.py": BACKEND,
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    }.items():
        (origin / path).parent.mkdir(parents=True, exist_ok=True)
        (origin / path).write_text(textwrap.dedent(text))
    git = ["git", "-C", origin, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)

    def run(code, folder, **variables):
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "EQGEN_SOURCE")}
        env = kept | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | variables
        return subprocess.run([python, "-c", code], cwd=folder, env=env, capture_output=True, text=True)

    cell = setup_cell(SOURCES[0])
    where = "\nimport eqgen; print(eqgen.__file__)"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    nothing = run(cell, elsewhere)
    assert "Set os.environ['EQGEN_SOURCE']" in nothing.stderr and not list(elsewhere.iterdir())

    cloned = run(cell + where, elsewhere, EQGEN_SOURCE=origin.as_uri())
    assert cloned.stdout.strip() == str(elsewhere / "eqgen-checkout" / "eqgen" / "__init__.py"), cloned.stderr
    again = run(where, tmp_path)  # another process, without the cell
    assert again.stdout == cloned.stdout, again.stderr

    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "eqgen"], check=True)
    beside = run(cell + where, origin / "notebooks")
    assert beside.stdout.strip() == str(origin / "eqgen" / "__init__.py"), beside.stderr
    offline = run(cell, origin / "notebooks", PATH="")  # all is there: neither pip nor git is called
    assert offline.returncode == 0, offline.stderr


def test_index_is_up_to_date():
    readme = (FOLDER / "README.md").read_text()
    assert build.indexed(readme) == readme, "run: python notebooks/build.py --index"
    names = {path.stem for path in SOURCES}
    assert {path.stem for path in (FOLDER / "thumbnails").iterdir()} == names >= build.measured().keys()
    for entry in build.measured().values():
        assert entry["cpu_seconds"] > 0 and entry["cpu"] and entry["cores"] > 0


@each_source
def test_thumbnail_is_of_the_tagged_cell(source):
    path = FOLDER / "thumbnails" / f"{source.stem}.png"
    made = Image.open(
        io.BytesIO(build.thumbnail(nbformat.read(FOLDER / f"{source.stem}.ipynb", as_version=4)))
    )
    kept = Image.open(path)
    assert path.stat().st_size < 30_000 and kept.size == made.size
    difference = np.asarray(kept.convert("RGB"), float) - np.asarray(made.convert("RGB"), float)
    assert np.abs(difference).mean() < 1  # another version of Pillow may choose other colours


@each_source
def test_needs_are_extras_and_notebooks_that_exist(source):
    title, sentence, needs = build.described(source)
    assert 3 < len(title) < 60 and 30 < len(sentence) < 250 and "\n" not in title
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"`(\w+)`", needs)) <= extras.keys()
    assert ("images" in needs) == ("eqgen.data import images" in source.read_text())
    numbers, own = re.findall(r"\b\d\d\b", needs), source.name[:2]
    assert set(numbers) <= {path.name[:2] for path in SOURCES} - {own}
    assert numbers or "extra" in needs or needs == "nothing"


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_lab_takes_the_kernel_of_its_own_environment(tmp_path):
    """Though there are others of the same name, in the user's folder and in JUPYTER_PATH."""
    for folder in ("user", "path"):
        spec = tmp_path / folder / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps({"argv": ["other"], "display_name": "other", "language": "python"}))
    planted = {"JUPYTER_DATA_DIR": str(tmp_path / "user"), "JUPYTER_PATH": str(tmp_path / "path")}
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "JUPYTER"))} | planted

    dry = subprocess.run(["make", "-n", "lab"], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    (line,) = [line for line in dry.stdout.splitlines() if "jupyter lab" in line]
    settings = dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)

    def kernel(env):
        command = [sys.executable, "-m", "jupyter_client.kernelspecapp", "list", "--json"]
        listed = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        return Path(json.loads(listed)["kernelspecs"]["python3"]["resource_dir"])

    assert kernel(env).is_relative_to(tmp_path)  # it does matter
    assert kernel(env | settings).is_relative_to(sys.prefix)
