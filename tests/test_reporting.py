"""Looking at runs: a page that needs nothing besides itself, and a view in the terminal."""

import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from eqgen import cli, reporting
from eqgen.runs import Run
from eqgen.sessions import ExperimentError


SETTINGS = {
    "algorithm": "SAC",
    "env": "probe/both",
    "seeds": [0, 1],
    "settings": {"total_steps": 40, "batch_size": 8},
    "agent": {"class": "eqgen.algorithms.sac.SAC", "fields": {"discount": 0.9, "hidden": [8, 8]}},
}


def make_run(
    path, steps=(0, 20, 40), *, discount=0.9, algorithm="SAC", values=lambda seed, step: seed - step / 10
):
    agent = SETTINGS["agent"] | {"fields": SETTINGS["agent"]["fields"] | {"discount": discount}}
    with Run.create(path, SETTINGS | {"agent": agent, "algorithm": algorithm}) as run:
        for step in steps:
            records = [{"seed": s, "env_step": step, "wall_time": step / 2} for s in (0, 1)]
            run.log([r | {"eval/return": values(r["seed"], step)} for r in records])
    return path


class Page(HTMLParser):
    """The cells of the tables, and whatever a browser would load or run."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.loads, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br", "path", "use", "rect", "link"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith(("data:", "#")):
                self.loads.append(value)
        if tag in ("script", "link", "iframe"):
            self.loads.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_page_holds_all_runs_below_a_folder_and_loads_nothing(tmp_path, capsys):
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "deep" / "b", steps=(0, 20), discount=0.95, algorithm="<TD3>")
    (tmp_path / "runs" / "a" / "policy.gif").write_bytes(b"GIF89a")
    out = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    text = out.read_text()
    page = Page(text)
    assert page.open == [] and page.loads == []
    assert {"a", "deep/b", "<TD3>", "40 of 40", "20 of 40", "seeds 0, 1"} <= set(page.cells)
    assert "-3.5 (-4 to -3)" in page.cells  # seeds 0 and 1 at step 40: -4 and -3
    assert {"agent.discount", "0.9", "0.95", "algorithm"} <= set(page.cells)
    assert "agent.hidden" not in page.cells and "settings.batch_size" not in page.cells
    assert "data:image/gif;base64,R0lGODlh" in text and text.count("<svg") == 1


def test_a_run_of_a_planner_counts_updates_and_is_judged_by_its_loss(tmp_path):
    settings = SETTINGS | {"clock": "update", "settings": {"batch_size": 8}, "algorithm": "DiffusionPlanner"}
    settings["learner"] = {
        "class": "eqgen.algorithms.planner.DiffusionPlanner",
        "fields": {"total_updates": 4},
    }
    with Run.create(tmp_path / "a", settings) as run:
        for step in (2, 4):
            common = {"update": step, "wall_time": 1.0, "plan/loss": 2.0 / step}
            run.log([{"seed": seed} | common for seed in (0, 1)])
    cells = Page(reporting.write_report([tmp_path], tmp_path / "page.html").read_text()).cells
    assert {"4 of 4", "plan/loss", "0.5 (0.5 to 0.5)"} <= set(cells)
    text, done = reporting.status(Run.open(tmp_path / "a"))
    assert "update 4 of 4 (100%)" in text and done


def test_page_of_one_run_names_no_differences(tmp_path):
    make_run(tmp_path / "a", steps=())
    text = reporting.write_report([tmp_path], tmp_path / "page.html").read_text()
    assert "0 of 40" in text and "<svg" not in text and "differ" not in text


def test_clips_that_would_swell_the_page_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "LARGEST_CLIP", 3)
    make_run(tmp_path / "a")
    (tmp_path / "a" / "policy.mp4").write_bytes(b"1234")
    text = reporting.write_report([tmp_path], tmp_path / "page.html").read_text()
    assert "policy.mp4 is too large" in text and "<video" not in text


def test_no_run_is_an_error_of_one_line(tmp_path, capsys):
    with pytest.raises(ExperimentError, match="There is no run in"):
        reporting.write_report([tmp_path], tmp_path / "page.html")
    assert cli.main(["watch", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_a_run_is_followed_until_it_is_complete(tmp_path, monkeypatch):
    path, out = make_run(tmp_path / "a", steps=(0, 20)), io.StringIO()

    def goes_on(seconds):
        assert seconds == 0.5
        if "20 of 40" in out.getvalue():
            with Run.open(path, write=True) as run:
                run.log([{"seed": s, "env_step": 40, "wall_time": 20.0, "eval/return": 1.0} for s in (0, 1)])

    monkeypatch.setattr(reporting, "time", SimpleNamespace(sleep=goes_on))
    reporting.watch(path, every=0.5, file=out)
    first, second = out.getvalue().split("SAC on probe/both, seeds 0, 1")[1:]
    assert "environment step 20 of 40 (50%)" in first and "10 s so far, about 10 s to go" in first
    assert "environment step 40 of 40 (100%)" in second and "to go" not in second


def test_sparkline_spans_the_last_values():
    assert reporting.sparkline(np.arange(8)) == reporting.BARS
    assert reporting.sparkline(np.array([9.0, 0.0, 1.0]), width=2) == "▁█"
    assert set(reporting.sparkline(np.ones(5))) == {"▁"}
    assert re.fullmatch("[▁-█]{40}", reporting.sparkline(np.sin(np.arange(100))))
