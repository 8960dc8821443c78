"""The rows of the papers: every command is one that its script takes, and the page says what the files say."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).resolve().parent.parent / "paper_figures"


@pytest.fixture(scope="module")
def reproduce():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("reproduce", FOLDER / "reproduce.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


def test_braces_stand_for_every_combination(reproduce):
    assert reproduce.alternatives("run") == ["run"]
    assert reproduce.alternatives("{a,b}-{1,2} x") == ["a-1 x", "a-2 x", "b-1 x", "b-2 x"]


def test_page_is_up_to_date(reproduce):
    remedy = "run `python paper_figures/reproduce.py readme`"
    assert reproduce.readme() == (FOLDER / "README.md").read_text(), remedy


def test_rows_name_what_there_is(reproduce):
    for paper, about in reproduce.PAPERS.items():
        ids = [row["id"] for row in about["rows"]]
        assert len(set(ids)) == len(ids), paper
        known = "id shows smoke cpu paper results figures tables status note published ours".split()
        for row in about["rows"]:
            assert row.keys() <= set(known), row["id"]
            assert {"shows", "results", "note"} <= row.keys(), row["id"]
            for figure in row.get("figures", ()):
                if reproduce.last_run(row)[1]:
                    assert (FOLDER / f"{figure}.png").exists(), (row["id"], figure)
            assert all((FOLDER / f"{table}.md").exists() for table in row.get("tables", ())), row["id"]


def test_every_figure_and_every_result_has_a_row(reproduce):
    rows = [row for about in reproduce.PAPERS.values() for row in about["rows"]]
    drawn = {FOLDER / f"{name}.png" for row in rows for name in row.get("figures", ())}
    assert set(FOLDER.glob("*/*.png")) <= drawn
    used = {path for row in rows for path in reproduce.result_files(row)}
    assert set(FOLDER.glob("*/results/*.json")) <= used


@pytest.mark.parametrize("preset", ["smoke", "cpu", "paper"])
def test_commands_name_studies_and_agents_that_there_are(reproduce, preset):
    """What a `run.py` would train is looked up in its own tables; the other scripts are asked for their help."""
    asked = {}
    for paper in reproduce.PAPERS:
        for words in reproduce.commands(paper, preset):
            if words[0] == "eqgen":
                continue
            folder = FOLDER.parent if words[0].startswith("benchmarks/") else FOLDER
            assert (folder / words[0]).is_file(), words
            if words[0].endswith("run.py") or words[0].endswith("mazes.py"):
                script = asked.setdefault(words[0], load(FOLDER / words[0]))
                study = script.STUDIES[words[1]]
                only = words[words.index("--only") + 1 :] if "--only" in words else []
                assert set(only) <= set(getattr(study, "agents", ())), words
                if "adaptive" in words[0]:
                    assert set(words[2:]) <= set(study.samplers), words


def load(path):
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}_again", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_unknown_rows_and_presets_are_refused(reproduce, capsys):
    for argv, message in (
        (["som", "--rows", "S99"], "som has no row S99; it has S1"),
        (["prior_guidance", "--rows", "P2"], "P2 has no command at the cpu preset"),
        (["som", "--jobs", "0"], "--jobs is 0"),
    ):
        with pytest.raises(SystemExit):
            reproduce.main(argv)
        assert message in capsys.readouterr().err


def test_list_is_one_command_a_line(reproduce, capsys):
    assert reproduce.main(["som", "--rows", "S6", "--list"]) == 0
    assert capsys.readouterr().out == "som/estimator.py samples\n"


def test_a_command_that_fails_is_named_and_the_others_run(reproduce, tmp_path, capsys):
    folder = reproduce.prepared("smoke", tmp_path)
    good, bad = ["som/run.py"], ["som/run.py", "no-such-study"]
    assert reproduce.run_all([bad, good], folder, workers=2) == [bad]
    out = capsys.readouterr().out
    assert "FAILED" in out and "done: som/run.py" in out
    assert "invalid choice: 'no-such-study'" in (folder / "logs" / "som_run.py_no-such-study.txt").read_text()


def test_committed_results_are_not_copied(reproduce, tmp_path):
    folder = reproduce.prepared("cpu", tmp_path)
    assert (folder / "paper_figures" / "som" / "run.py").is_file()
    assert not list(folder.rglob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("paper", ["som", "nclql", "prior_guidance", "adaptive_timesteps"])
def test_everything_runs_in_smoke_form(paper, tmp_path):
    command = [sys.executable, str(FOLDER / "reproduce.py"), paper, "--preset", "smoke", "--jobs", "2"]
    done = subprocess.run([*command, "--root", str(tmp_path)], capture_output=True, text=True)
    logs = {path.name: path.read_text()[-2000:] for path in tmp_path.rglob("logs/*.txt")}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    assert list(tmp_path.rglob("results/*.json"))
