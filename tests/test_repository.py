"""The repository as a whole: metadata that agree, files that are small, portable and safe to load."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import tomllib
import types
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import eqgen


ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PYTHONS = ("3.11", "3.12")
ALGORITHMS = sorted(
    path
    for path in ROOT.glob("eqgen/algorithms/*.py")
    if path.stem not in ("__init__", "base", "actor_critic")
)

MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:home|root|Users|work|opt|tmp|mnt)/\w")
REGISTRY = re.compile(
    # In pieces, so that this file is held to its own rule.
    r"--(?:extra-)?index" r"-url|--find" r"-links|python" r"hosted\.|(?:pypi|registry|mirror)\S*/" r"simple"
)
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(
        line
        for extra in ("notebooks", "figures", "images", "log", "dev")
        for line in PROJECT["optional-dependencies"][extra]
    ),
]


def arxiv_id(text: str) -> str:
    """The first arXiv number in a text."""
    return re.search(r"\d{4}\.\d{5}", text).group()


def repository_files() -> list[Path]:
    """Every file that is in the repository or would be with the next commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def test_files_are_small():
    too_large = [path for path in repository_files() if path.stat().st_size > 1_000_000]
    assert not too_large


def test_files_name_no_machine_and_no_registry():
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for pattern in (MACHINE_PATH, REGISTRY):
            found = pattern.search(text)
            assert not found, f"{path.relative_to(ROOT)}: {found.group()}"


def test_nothing_unpickles():
    for path in repository_files():
        if path.suffix != ".py" or path.name in ("test_data_formats.py", "fuzzing.py"):
            continue  # they write what must not be read
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & UNSAFE_MODULES, path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda path: path.stem)
def test_algorithm_says_what_it_is(path):
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    citation, _, rest = doc.partition("\nNotation")
    notation, _, differences = rest.partition("\nDiffers from")
    assert re.search(r"arXiv \d{4}\.\d{4,5} \(\d{4}\)", citation), "no citation before the notation"
    assert " = " in notation, "no notation table"
    assert "- " in differences, "no list of differences"


def test_versions_agree():
    assert PROJECT["version"] == eqgen.__version__
    assert f"version: {eqgen.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_citation_file_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license", "references"} <= citation.keys()
    assert citation["license"] == PROJECT["license"] == "MIT"
    sources = [*ALGORITHMS, ROOT / "eqgen" / "timesteps" / "adaptive.py"]
    cited = {arxiv_id(path.read_text()) for path in sources}
    assert {arxiv_id(reference["url"]) for reference in citation["references"]} == cited
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")


def pins(python: str) -> dict[str, str]:
    """Package -> exact version in constraints.txt under one Python."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if not requirement.marker or requirement.marker.evaluate({"python_version": python}):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==" and requirement.name not in found, line
            found[requirement.name] = specifier.version
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("line", REQUIREMENTS)
def test_constraints_satisfy_the_ranges(line, python):
    requirement = Requirement(line)
    assert requirement.specifier.contains(pins(python)[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("python", PYTHONS)
def test_mjx_and_mujoco_have_the_same_minor_version(python):
    minor = lambda name: pins(python)[name].split(".")[:2]
    assert minor("mujoco") == minor("mujoco-mjx")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_readme_names_make_targets_that_exist():
    text = "\n".join(code_blocks("sh")) + "".join(re.findall(r"`[^`\n]+`", README))
    named = set(re.findall(r"(?<!eqgen data )\bmake ([a-z]+)", text))
    assert named <= set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE))


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda path: path.stem)
def test_readme_lists_every_algorithm(path):
    assert f"| `{path.stem}` |" in README and f"arxiv.org/abs/{arxiv_id(path.read_text())}" in README


def test_readme_lists_every_module():
    rows = set(
        re.findall(r"`([a-z]+/?)`", "\n".join(re.findall(r"^\| `.*?` \|", README, flags=re.MULTILINE)))
    )
    modules = {path.stem for path in ROOT.glob("eqgen/[a-z]*.py")}
    packages = {f"{path.parent.name}/" for path in ROOT.glob("eqgen/*/__init__.py")}
    assert modules | packages <= rows


def test_readme_links_exist():
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_targets_are_listed():
    shown = make()
    targets = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)[0].split()
    assert [line.split()[1] for line in shown.splitlines()] == targets


def make(*arguments: str) -> str:
    """What make prints; as if it were not itself run by make."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--silent", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


def eqgen_commands() -> list[str]:
    """Every command line that begins with `eqgen` in the README, and in what `make demo` would run."""
    demo = make("--dry-run", "demo") if shutil.which("make") else ""
    found = re.findall(r"^eqgen .*$", "\n".join(code_blocks("sh")), flags=re.MULTILINE)
    return found + re.findall(r"\beqgen (?:train|resume|plot|render) [^;\n]*", demo)


@pytest.mark.parametrize("line", eqgen_commands())
def test_commands_parse(line, monkeypatch):
    from eqgen import cli, deployment, experiments, planning, reporting

    monkeypatch.setattr(planning, "is_planning", lambda run: "planner" in str(run))
    results = {"algorithm": "", "env": "", "env_step": 0, "policy": "", "seeds": []}
    answers = {"train": None, "resume": None, "evaluate": results, "plot": [], "render": ("", [0.0])}
    for name, answer in answers.items():
        monkeypatch.setattr(experiments, name, lambda *args, _answer=answer, **kwargs: _answer)
    for name in ("train", "train_on_planner", "resume", "evaluate"):
        answer = answers.get(name)
        monkeypatch.setattr(planning, name, lambda *args, _answer=answer, **kwargs: _answer)
    for module, name in ((reporting, "write_report"), (reporting, "watch"), (deployment, "export_policy")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: "")
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0


def test_readme_examples_run(capsys):
    """As one session, in which later examples use what earlier ones made."""
    session = types.ModuleType("readme")
    for number, code in enumerate(code_blocks("python")):
        exec(compile(code, f"README.md, example {number}", "exec"), vars(session))
    mean, std = (float(word) for word in capsys.readouterr().out.split()[:2])
    assert (
        abs(mean - 3) < 0.06 and abs(std - 0.5) < 0.05
    )  # 2,000 numbers: four standard errors; 50 steps of DDIM
    assert jnp.all(jnp.abs(session.action - 0.5) < 0.5) and session.path.shape == (201, 2)
    # p_0 is nearly N(0.3, 0.1^2): the score of its noising points from 0 towards alpha times 0.3.
    assert jnp.all(session.estimate.score > 0)
    assert jnp.isfinite(session.loss) and session.batch["obs"].shape == (4, 3)
    assert session.draw.t.shape == (128,)
