"""What is written about eqgen: no dead links, examples that run and keep the laws, pages that are built."""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import jax
import jax.random as jr
import numpy as np
import pytest

from eqgen import cli, experiments, sweeps
from eqgen.hyperparameters import from_json, to_json
from eqgen.runs import Run
from eqgen.sweeps import complete
from test_repository import ROOT, repository_files


CONTRIBUTING, CLUSTERS = ROOT / "CONTRIBUTING.md", ROOT / "docs" / "clusters.md"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```', flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """The code blocks of a page in one language: title ("" if it has none) and code."""
    found = BLOCK.findall(page.read_text())
    return [(title, code) for name, title, code in found if name == language]


# --- Links ---


def headings(text: str) -> set[str]:
    """The anchors of a page, as GitHub and the built pages make them."""
    anchors = set()
    for line in re.findall(r"^#+ (.*)$", without_code(text), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", line.strip().lower()).replace(" ", "-")
        anchors.add(next(s for i in range(100) if (s := f"{slug}-{i}" if i else slug) not in anchors))
    return anchors


def without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)


def markdown_pages() -> dict[Path, str]:
    """Every page of the repository by its path; of a notebook, what its source says."""
    pages = {path: path.read_text() for path in repository_files() if path.suffix == ".md"}
    for source in ROOT.glob("notebooks/src/*.py"):
        text = "\n".join(re.findall(r"^#(?: (.*))?$", source.read_text(), flags=re.MULTILINE))
        pages[ROOT / "notebooks" / f"{source.stem}.ipynb"] = text
    return pages


def test_links_lead_somewhere():
    pages, dead, checked = markdown_pages(), [], 0
    assert {ROOT / "README.md", CONTRIBUTING, CLUSTERS} <= pages.keys()
    for path, text in pages.items():
        prose = re.sub(r"`[^`\n]*`", "", without_code(text))
        targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r"^\[[^\]]+\]: (\S+)", prose, re.M)
        for target in targets:
            if re.match(r"[a-z]+:", target):  # elsewhere; there is no network here
                continue
            name, _, anchor = target.partition("#")
            file = (path.parent / name).resolve() if name else path
            exists = file.exists() and file.is_relative_to(ROOT)
            if not exists or (anchor and anchor not in headings(file.read_text())):
                dead.append(f"{path.relative_to(ROOT)}: {target}")
            checked += 1
    assert not dead
    assert checked > 20


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/clusters.md"])
def test_pages_name_make_targets_and_tests_that_exist(page):
    text, makefile = (ROOT / page).read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", text, flags=re.MULTILINE)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }
    made = {title for title, _ in blocks(ROOT / page, "python")}
    for name in re.findall(r"\b(?:tests|eqgen|notebooks|paper_figures|benchmarks)/[\w/]+\.py\b", text):
        assert (ROOT / name).exists() or name in made, name


# --- CONTRIBUTING ---


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The files of CONTRIBUTING beside those of the repository, importable as if they were in it."""
    files = {
        title: code for title, code in blocks(CONTRIBUTING, "python") if title and not title.startswith("in ")
    }
    for title, code in files.items():
        (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / title).write_text(code)
        assert not (ROOT / title).exists(), f"{title} is in the repository: choose another example"
    modules = [title.removesuffix(".py").replace("/", ".") for title in files if title.startswith("eqgen/")]
    for package in {module.rpartition(".")[0] for module in modules}:
        module = importlib.import_module(package)
        folder = str(tmp_path / package.replace(".", "/"))
        monkeypatch.setattr(module, "__path__", [*module.__path__, folder])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [*modules, "slider"]:
        sys.modules.pop(name, None)


def test_examples_are_formatted(examples):
    """By the rules of the repository, the blocks of the session too."""
    shutil.copy(ROOT / "pyproject.toml", examples)
    shutil.rmtree(examples / ".ruff_cache", ignore_errors=True)
    session = [code for title, code in blocks(CONTRIBUTING, "python") if not title]
    for number, code in enumerate(session):
        (examples / f"session_{number}.py").write_text(code)
    ruff = [sys.executable, "-m", "ruff"]
    ours = 'lint.isort.known-first-party = ["eqgen"]'
    # Blocks of the session use names of those before.
    for command in (["check", "--ignore", "F821", "--config", ours], ["format", "--check", "--diff"]):
        run = subprocess.run([*ruff, *command, str(examples)], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


def contracts(*, slow: bool):
    """The tests of `test_contracts.py` that take a class; those that are slow for most, or the others."""
    module = importlib.import_module("test_contracts")
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_")}
    chosen = {}
    for name, test in tests.items():
        for mark in getattr(test, "pytestmark", []):
            if mark.name == "parametrize" and mark.args[0] == "cls":
                chosen[name] = test, mark.args[1] is module.some_by_default.mark.args[1]
    assert len(chosen) > 8
    return [test for test, is_slow in chosen.values() if is_slow == slow]


def hold_to_contracts(cls, folder, *, slow):
    for test in contracts(slow=slow):
        if "tmp_path" in test.__code__.co_varnames[: test.__code__.co_argcount]:
            test(cls, folder)
        else:
            test(cls)


def test_algorithm_keeps_the_contract(examples):
    repository, contract = (
        importlib.import_module("test_repository"),
        importlib.import_module("test_contracts"),
    )
    path = examples / "eqgen" / "algorithms" / "qtopt.py"
    repository.test_algorithm_says_what_it_is(path)
    (cls,) = [cls for cls in contract.learners() if cls.__name__ == "QTOpt"]  # found, as every file there
    hold_to_contracts(cls, examples, slow=False)


@pytest.mark.slow
def test_algorithm_keeps_the_slow_part_of_the_contract(examples):
    from eqgen.algorithms.qtopt import QTOpt

    hold_to_contracts(QTOpt, examples, slow=True)


def test_algorithm_passes_its_own_test(examples, getkey):
    vars(load(examples / "tests" / "test_qtopt.py"))["test_more_rounds_find_better_actions"](getkey)


@pytest.mark.parametrize("name", ["qtopt", pytest.param("slider", marks=pytest.mark.slow)])
def test_commands_train_the_examples(name, examples, capsys):
    """The `eqgen` lines of CONTRIBUTING as they stand."""
    lines = [line for _, code in blocks(CONTRIBUTING, "sh") for line in code.splitlines()]
    commands = [shlex.split(line) for line in lines if re.match(r"(PYTHONPATH=\. )?eqgen ", line)]
    assert len(commands) == 3
    for words in commands:
        if f"runs/{name}" in words:
            assert cli.main(words[words.index("eqgen") + 1 :]) == 0, capsys.readouterr().err
    run = Run.open(examples / "runs" / name)
    steps, returns = run.curve("eval/return")
    assert steps[-1] == 300 and returns.shape == (1, len(steps))
    if name == "qtopt":
        assert run.settings["agent"]["fields"]["num_rounds"] == 3


def test_environment_has_a_name_and_keeps_the_contract(examples, getkey):
    from eqgen.envs import catalog

    assert "cart/default" in catalog.available()
    contract = importlib.import_module("test_envs")
    contract.test_environment_keeps_its_contract("cart/default", getkey)


def test_samplers_keep_the_laws(examples, x64):
    laws = importlib.import_module("test_samplers")
    ((title, code),) = [block for block in blocks(CONTRIBUTING, "python") if block[0].startswith("in ")]
    assert title == "in tests/test_samplers.py"
    namespace = vars(laws) | {"DETERMINISTIC": {}}
    exec(compile(code, title, "exec"), namespace)
    (row,) = namespace["DETERMINISTIC"].values()
    laws.test_order_of_the_global_error(*row, None)


def test_timestep_sampler_keeps_the_objective_and_its_law(examples):
    from eqgen.timesteps.by_loss import LossTimesteps

    laws = importlib.import_module("test_timesteps")
    for times in (laws.TIMES["chain"], laws.TIMES["vp"]):
        sampler = LossTimesteps(times)
        assert from_json(to_json(sampler)) == sampler
        state = sampler.init(key=jr.key(0))
        uniform = np.asarray(sampler.probabilities(state))

        # Learned from losses that grow with t, from batches that reach every cell.
        @jax.jit
        def learn(state, key, times=times, sampler=sampler):
            draw = sampler.sample(state, 2000, key=key)
            return sampler.update(state, draw, 1.0 + times.cell(draw.t).astype(float)), None

        state, _ = jax.lax.scan(learn, state, jr.split(jr.key(1), 20))
        draw = sampler.sample(state, 20_000, key=jr.key(99))
        p = np.asarray(sampler.probabilities(state))
        ratio = p / uniform
        assert ratio[-1] > 2 * ratio[0]
        assert laws.chi_square(laws.histogram(times, draw.t), p) > 1e-3
        # E_p[weight f(t)] is E_uniform[f(t)] for every f, if it is for every cell.
        cells = np.asarray(times.cell(draw.t))
        np.testing.assert_allclose(draw.weight * p[cells], uniform[cells], rtol=1e-4)
        with pytest.raises(ValueError, match="losses"):
            sampler.update(state, draw)


@pytest.mark.slow
def test_session_runs(examples, capsys):
    """The blocks without a file name, one after the other."""
    session = types.ModuleType("session")
    for title, code in blocks(CONTRIBUTING, "python"):
        if not title:
            exec(compile(code, "CONTRIBUTING.md", "exec"), vars(session))
    assert re.search(
        r"^300 -?[\d.]+$", capsys.readouterr().out, flags=re.MULTILINE
    )  # the cart's last evaluation
    # Of a small model after 500 updates, not of the sampler, whose error is below 0.01.
    assert abs(session.samples.mean(0) - session.x.mean(0)).max() < 0.2
    assert abs(session.samples.std(0) - session.x.std(0)).max() < 0.2
    # A chain leaves its density as it is: 4.5 standard errors of a mean and of a variance.
    ends, n = session.ends[:, 0], len(session.ends)
    assert (session.ends != session.start).mean() > 0.9
    assert abs(ends.mean() - 1) < 4.5 * 0.5 / n**0.5
    assert abs(ends.var() - 0.25) < 4.5 * 0.25 * (2 / n) ** 0.5


def test_figure_is_drawn(examples, tmp_path):
    figures = importlib.import_module("test_figures")
    folder = examples / "paper_figures" / "som"
    (folder / "results").symlink_to(ROOT / "paper_figures" / "som" / "results")
    figures.drawn(folder / "fig_last_returns.py", tmp_path)


# --- Clusters ---


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """The files of the page on clusters, in the working directory."""
    for language in ("python", "toml", "sh"):
        for title, code in blocks(CLUSTERS, language):
            if title:
                (tmp_path / title).write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = """
preset = "smoke"
algorithms = ["sac"]
envs = ["probe/both"]
seeds = [0, 1]
seeds_together = false
[settings]
total_steps = TOTAL
warmup_steps = 20
batch_size = 8
log_every = 20
eval_every = 1000
checkpoint_every = 200
"""


def test_commands_of_the_page_parse(scripts, monkeypatch):
    repository = importlib.import_module("test_repository")
    monkeypatch.setattr(sweeps, "run_sweep", lambda *_, **__: [Path("sweep.toml")])
    code = "\n".join(code for _, code in blocks(CLUSTERS, "sh"))
    lines = re.findall(r"^(?:exec )?(eqgen .*)$", code, flags=re.MULTILINE)
    assert len(lines) == 11
    for line in lines:
        repository.test_commands_parse(line, monkeypatch)


def test_sweep_of_the_page_expands(scripts):
    runs = sweeps.Sweep.read("sweep.toml").runs()
    assert len(runs) == 2 * 3 * 2
    assert runs["som_gymnax-Pendulum-v1_discount=0.97_seed2"].settings.total_steps == 20_000


def test_scripts_of_the_page_are_well_formed(scripts):
    shell = sorted(scripts.glob("*.sbatch"))
    assert len(shell) == 2
    for script in shell:
        assert subprocess.run(["bash", "-n", script]).returncode == 0
    shutil.copy(ROOT / "pyproject.toml", scripts)
    ruff = [sys.executable, "-m", "ruff"]
    ours = 'lint.isort.known-first-party = ["eqgen"]'
    for command in (["check", "--config", ours], ["format", "--check", "--diff"]):
        run = subprocess.run([*ruff, *command, "."], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


def test_submit_makes_a_job_of_every_run_that_is_not_complete(scripts, monkeypatch):
    pytest.importorskip("submitit", reason="pip install submitit")
    (scripts / "sweep.toml").write_text(SMALL.replace("TOTAL", "40"))
    resumed = []
    monkeypatch.setattr(experiments, "resume", lambda path, verbose: resumed.append(Path(path).name))
    submit = load(scripts / "submit.py").submit
    names = list(sweeps.Sweep.read("sweep.toml").runs())
    for job in submit("sweep.toml", "runs/sweep", "debug"):
        job.result()
    assert resumed == names == ["sac_probe-both_seed0", "sac_probe-both_seed1"]
    done = Path("runs", "sweep", "runs", names[0], "checkpoints", "step_0000000040.eqx")
    done.parent.mkdir()
    done.touch()
    assert [job.result() for job in submit("sweep.toml", "runs/sweep", "debug")] == [None]
    assert resumed == [*names, names[1]]


@pytest.mark.slow
def test_job_that_is_preempted_goes_on_to_the_same_numbers(scripts):
    """By submitit's local executor, whose jobs are processes that it can pre-empt as SLURM does."""
    pytest.importorskip("submitit", reason="pip install submitit")
    (scripts / "sweep.toml").write_text(SMALL.replace("TOTAL", "4000"))
    jobs = load(scripts / "submit.py").submit("sweep.toml", "runs/jobs", "local")
    first = Path("runs", "jobs", "runs", "sac_probe-both_seed0")
    deadline = time.monotonic() + 300
    while not any(first.glob("checkpoints/*.eqx")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # What SLURM sends, to the process that holds the run.
    os.kill(int((first / ".lock").read_text()), signal.SIGUSR2)
    for job in jobs:
        job.result()
    sessions = json.loads((first / "provenance.json").read_text())
    assert len(sessions) == 3  # made, begun, gone on with
    command = [sys.executable, "-m", "eqgen", "sweep", "sweep.toml", "--out"]
    subprocess.run([*command, "runs/whole"], check=True, timeout=600)
    assert curves(Path("runs", "jobs")) == curves(Path("runs", "whole"))
    done = subprocess.run([*command, "runs/jobs"], check=True, timeout=600, capture_output=True, text=True)
    assert "| sac_probe-both_seed0 | finished | 4000 |" in done.stdout


def curves(out):
    """What the runs of a sweep logged, without the clock."""
    runs = {path.name: Run.open(path).metrics() for path in (out / "runs").iterdir()}
    return {
        name: [{key: value for key, value in record.items() if key != "wall_time"} for record in records]
        for name, records in runs.items()
    }


@pytest.mark.slow
def test_hosts_share_the_seeds(scripts):
    """Two processes that know of each other by jax.distributed: each its seeds, one figure, and once more."""
    script = (scripts / "hosts.py").read_text()
    smaller = 'ENV, SEEDS, SIZE = "probe/both", range(3), "smoke"'
    script, changed = re.subn(r"^ENV, SEEDS, SIZE = .*$", smaller, script, flags=re.MULTILINE)
    assert changed == 1
    (scripts / "hosts.py").write_text(script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    for _ in ("first", "again"):
        command = [sys.executable, "hosts.py", "runs/hosts", address, "2"]
        hosts = [subprocess.Popen([*command, str(i)], env=env) for i in range(2)]
        assert [host.wait(300) for host in hosts] == [0, 0]
        assert (scripts / "runs" / "hosts" / "curves.png").stat().st_size > 2_000
    for i, seeds in enumerate([[0, 2], [1]]):
        run = Run.open(scripts / "runs" / "hosts" / f"host-{i}-of-2")
        assert run.settings["seeds"] == seeds and complete(run.path)
        assert len(json.loads((run.path / "provenance.json").read_text())) == 2


def load(path: Path) -> types.ModuleType:
    """A file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- The built pages ---


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_what_builds_the_pages_is_pinned(python):
    repository = importlib.import_module("test_repository")
    for line in repository.PROJECT["optional-dependencies"]["docs"]:
        repository.test_constraints_satisfy_the_ranges(line, python)


class Links(HTMLParser):
    """What a page loads, what it links to, and the anchors that it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.loads, self.targets, self.anchors = set(), set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "a":
            self.targets.add(attributes.get("href"))
        elif tag in ("link", "script", "img", "iframe", "source", "video"):
            self.loads |= {attributes.get("href"), attributes.get("src")}
        self.anchors.add(attributes.get("id"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("docs") / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out]
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return {path: Links(path) for path in out.rglob("*.html") if path.name != "404.html"}


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere_and_link_to_what_is_there(site):
    assert len(site) > 100
    for path, page in site.items():
        for target in (page.loads | page.targets) - {None, ""}:
            if target.startswith(("http:", "https:")):
                assert target not in page.loads, f"{path}: {target}"
                continue
            if target.startswith("data:"):
                continue
            name, _, anchor = unquote(target).partition("#")
            file = (path.parent / name.partition("?")[0]).resolve() if name else path
            assert file.exists(), f"{path}: {target}"
            assert not anchor or anchor in site[file].anchors, f"{path}: {target}"
    styles = [path.read_text() for path in site_root(site).rglob("*.css")]
    assert styles and not any(re.search(r"(?:url\(|@import )['\"]?(?:https?:)?//", text) for text in styles)


@pytest.mark.slow
def test_every_public_name_has_its_place(site):
    """Functions and classes of all modules that are not private, with what they say about themselves."""
    found = 0
    for path in (ROOT / "eqgen").rglob("*.py"):
        if path.stem.startswith("_"):
            continue
        module = path.relative_to(ROOT).with_suffix("")
        page = site[site_root(site) / module.with_suffix(".html")]
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert f"{'.'.join(module.parts)}.{node.name}" in page.anchors
                found += 1
    assert found > 300


@pytest.mark.slow
def test_docstrings_are_read_as_they_are_written(site):
    """Arguments and what differs from a paper are lists, formulas of notebooks are formulas, types are links."""
    text = lambda name: (site_root(site) / name).read_text()
    samplers, som, notebook = (
        text(f"{name}.html")
        for name in ("eqgen/samplers", "eqgen/algorithms/som", "notebooks/02_som_on_a_bandit")
    )
    assert re.search(r"<strong>Arguments:</strong></p>\s*<ul>\s*<li>", samplers)
    assert re.search(r"Differs from the paper, as far as we know it, in:</p>\s*<ul>\s*<li>", som)
    assert 'href="schedules.html#eqgen.schedules.AbstractNoiseSchedule"' in samplers
    assert notebook.count("<math") > 20 and "02_som_on_a_bandit_files/" in notebook
    assert "**Arguments:**" not in re.sub(r"<details.*?</details>", "", samplers, flags=re.DOTALL)


def site_root(site):
    return next(
        path.parent for path in site if path.parent / "index.html" == path and path.parent.name == "site"
    )
