"""Studies: what a paper's `run.py` trains, and the small result files that its figures read.

A study is one environment at one size, a few agents, the seeds that are reported. Each (study, agent) is one run
directory, where an interrupted run goes on, and one file `<study>_<agent>.json`: settings, versions, hardware, and
the evaluations of every seed. Other seeds of the same, run later or elsewhere, are files beside it, named
`<study>_<agent>_seeds-1-2.json`; whoever reads the curve gets them all.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eqgen import experiments
from eqgen.algorithms.base import AbstractAgent, Size
from eqgen.files import is_number, parse_json, replacing
from eqgen.runs import Run
from eqgen.sessions import ExperimentError
from eqgen.training import OnlineSettings


@dataclasses.dataclass(frozen=True)
class Study:
    """One environment at one size, the agents compared on it, the seeds reported."""

    env: str
    size: Size
    seeds: tuple[int, ...]
    agents: Mapping[str, AbstractAgent]
    loop: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `OnlineSettings` that differ from the size's preset."""
    common: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of every agent that differ from its size's."""
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """For an agent's name, fields that differ from all of that: what an ablation changes."""

    @property
    def settings(self) -> OnlineSettings:
        return dataclasses.replace(OnlineSettings.preset(self.size, self.env), **self.loop)

    def agent(self, name: str) -> AbstractAgent:
        """The agent as it is trained, with the fields of the study's size."""
        changes = {**self.common, **self.changes.get(name, {})}
        return dataclasses.replace(self.agents[name].resized(self.size), **changes)

    def ablation(
        self, agent: AbstractAgent, changes: Mapping[str, Mapping[str, Any]], **fields: Any
    ) -> "Study":
        """This study with variants of one agent: for each name, the fields it changes.

        **Arguments:** `fields`: other fields of the study that differ, such as `seeds`.
        """
        agents = dict.fromkeys(changes, agent)
        return dataclasses.replace(self, agents=agents, changes=changes, **fields)


def online_studies(agents: Mapping[str, AbstractAgent]) -> dict[str, Study]:
    """The studies that all papers on online learning share, so that their curves may stand in one figure."""
    short: dict[str, Any] = dict(loop=dict(eval_every=1_000, eval_episodes=20), common=dict(hidden=(64, 64)))
    return {
        "pendulum-cpu": Study("gymnax/Pendulum-v1", "cpu", (0, 1, 2, 3, 4), agents, **short),
        "halfcheetah-cpu": Study("mujoco/HalfCheetah-v5", "cpu", (0,), agents),
        "hopper-cpu": Study("mujoco/Hopper-v5", "cpu", (0,), agents),
        "walker2d-cpu": Study("mujoco/Walker2d-v5", "cpu", (0,), agents),
        "pendulum-smoke": Study("gymnax/Pendulum-v1", "smoke", (0, 1), agents),
    } | {
        f"{task.lower()}-paper": Study(f"mujoco/{task}-v5", "paper", (0, 1, 2, 3, 4), agents)
        for task in ("HalfCheetah", "Hopper", "Walker2d", "Ant", "Humanoid", "Swimmer")
    }


def run_study(
    study: Study, name: str, agent: str, *, folder: Path, results: Path, seeds: Sequence[int] = ()
) -> Path:
    """Trains one agent of the study called `name`, or goes on where it stopped, and writes its result file.

    **Arguments:**

    - `folder`: the run directory is made in it.
    - `results`: the result file is written into it.
    - `seeds`: other seeds than the study's, for a run and a result file of their own.
    """
    label = "_".join([name, agent] + (["-".join(map(str, ("seeds", *seeds)))] if seeds else []))
    out = Path(folder) / label
    if (out / "settings.json").exists():
        finished = experiments.resume(out)
    else:
        finished = experiments.train(
            study.agent(agent), study.env, study.settings, seeds=tuple(seeds) or study.seeds, out=out
        )
    return write_result(finished, Path(results) / f"{label}.json")


def write_result(run: Run, path: Path) -> Path:
    """The `result` of a run as one small file."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(result(run), indent=1) + "\n")
    return path


def result(run: Run) -> dict[str, Any]:
    """Settings, provenance and the evaluation records of a run."""
    return {
        "settings": run.settings,
        "provenance": run.sessions(),
        "records": [record for record in run.metrics() if "eval/return" in record],
    }


def read_result(path: str | Path) -> dict[str, Any]:
    """What is in a result file or a benchmark's row.

    **Raises:** `ExperimentError` when it is not JSON, or has no list of records that name their seed and step.
    """
    try:
        content = parse_json(Path(path).read_bytes())
        for record in content["records"]:
            for key in ("seed", "env_step"):
                if type(record[key]) is not int or not 0 <= record[key] < 2**63:
                    raise ValueError(f"{key} is {record[key]!r}")
    except (ValueError, TypeError, LookupError) as error:
        raise ExperimentError(f"{path} is damaged, or is no result: {error}. Make it again.") from error
    return content


def read_curve(path: Path, metric: str = "eval/return") -> tuple[np.ndarray, np.ndarray]:
    """The environment steps at which a result file and those of other seeds have the metric, and the metric as
    (seeds, steps). If some seeds went further than others, only what all have is returned.

    **Raises:** `ExperimentError` when a file is damaged, or there is no step at which all seeds have the metric.
    """
    values = {}
    for file in [Path(path), *sorted(Path(path).parent.glob(f"{Path(path).stem}_seeds-*.json"))]:
        for record in read_result(file)["records"]:
            if metric in record:
                if not is_number(record[metric]):
                    raise ExperimentError(f"{file} is damaged: {metric} is {record[metric]!r}, no number.")
                values[record["seed"], record["env_step"]] = record[metric]
    seeds = sorted({seed for seed, _ in values})
    steps = sorted({step for _, step in values if all((seed, step) in values for seed in seeds)})
    if not steps:
        raise ExperimentError(f"{path} has no {metric} at any step that all seeds have reached.")
    return np.array(steps), np.array([[values[seed, step] for step in steps] for seed in seeds])


def largest_size(results: Path) -> Size:
    """The largest size of which a folder has result files; "cpu" if it has none at all."""
    return "paper" if any(Path(results).glob("*-paper_*.json")) else "cpu"


def draw_curves(
    panels: Mapping[str, Mapping[str, Path]], looks: Mapping[str, Mapping[str, Any]], out: Path
) -> list[Path]:
    """Returns of evaluation episodes over environment steps, as PDF and PNG, three panels in a row, or four.

    **Arguments:**

    - `panels`: for each title, the result file of each label. A run that was stopped early ends early; one
        without a result file is left out, and so is a panel without any.
    - `looks`: for each label, in the order of the legend, how its line is drawn.

    **Returns:** the files written.

    **Raises:** `FileNotFoundError` when there is no result file at all.
    """
    from eqgen import plotting

    present = lambda files: {label: path for label, path in files.items() if path.exists()}
    panels = {title: found for title, files in panels.items() if (found := present(files))}
    if not panels:
        raise FileNotFoundError(f"There is no result to draw for {out}: make some with the run.py beside it.")
    with plotting.style():
        # Of many lines the legend needs the width of a page, even below a single panel.
        crowded = len({label for files in panels.values() for label in files}) > 8
        wide = len(panels) > 1 or crowded
        width = plotting.TEXT_WIDTH if wide else plotting.COLUMN_WIDTH
        columns = len(panels) if len(panels) <= 4 else 3
        grid = -(-len(panels) // columns), columns
        aspect = 0.55 if crowded and len(panels) == 1 else 0.95 if columns == 4 else 0.75
        fig, axes = plotting.subplots(*grid, width=width, aspect=aspect, squeeze=False)
        for ax in axes.flat[len(panels) :]:
            ax.remove()
        lines = {}
        for ax, (title, files) in zip(axes.flat, panels.items()):
            for label in (label for label in looks if label in files):
                steps, returns = read_curve(files[label])
                plotting.learning_curve(ax, steps / 1000, returns, label=label, **looks[label])
            lines |= {line.get_label(): line for line in ax.lines}
            ax.set(title=title, xlabel="thousand steps" if columns == 4 else "thousand environment steps")
        for ax in axes[:, 0]:
            ax.set_ylabel("evaluation return")
        shown = [label for label in looks if label in lines]
        columns = min(len(shown), 5 if wide else 2)
        fig.legend([lines[label] for label in shown], shown, loc="outside lower center", ncols=columns)
        return plotting.save(fig, out)


def draw_ablation(groups: Mapping[str, Mapping[str, Path]], out: Path) -> list[Path]:
    """How variants of an agent learn, one a line: the last return, and the mean over all evaluations, which says
    how soon it came. Dots are means over seeds, bars go from the worst seed to the best.

    **Arguments:** `groups`: for each name of a group, the result file of each label. What has none is left out.

    **Returns:** the files written, a column wide.

    **Raises:** `FileNotFoundError` when there is no result file at all.
    """
    from eqgen import plotting

    lines = [
        (group, label, read_curve(path)[1])
        for group, files in groups.items()
        for label, path in files.items()
        if path.exists()
    ]
    if not lines:
        raise FileNotFoundError(f"There is no result to draw for {out}: make some with the run.py beside it.")
    with plotting.style():
        height = 0.14 * len(lines) + 0.7
        fig, ax = plotting.subplots(width=plotting.COLUMN_WIDTH, aspect=height / plotting.COLUMN_WIDTH)
        measures = (
            (lambda r: r[:, -1], "last evaluation", "o"),
            (lambda r: r.mean(axis=1), "mean of all", "s"),
        )
        for number, (of, label, marker) in enumerate(measures):
            values = np.array([of(returns).mean() for *_, returns in lines])
            low = np.array([of(returns).min() for *_, returns in lines])
            high = np.array([of(returns).max() for *_, returns in lines])
            look = dict(color=plotting.COLORS[number], markersize=3, linewidth=0.8, label=label)
            y = np.arange(len(lines)) + 0.3 * number - 0.15
            ax.errorbar(values, y, xerr=[values - low, high - values], fmt=marker, **look)
        for line in range(1, len(lines)):
            if lines[line][0] != lines[line - 1][0]:
                ax.axhline(line - 0.5, color="0.75", linewidth=0.5)
        ax.set_yticks(range(len(lines)), [label for _, label, _ in lines])
        ax.set(xlabel="evaluation return", ylim=(len(lines) - 0.4, -0.6))
        ax.grid(axis="y", visible=False)
        ax.locator_params(axis="x", nbins=5, prune="both")  # a label at the end would stick out of the figure
        fig.legend(loc="outside upper center", ncols=2)
        return plotting.save(fig, out)


def main(studies: Mapping[str, Study], *, folder: Path, results: Path, argv: Sequence[str] | None = None):
    """The command line of a `run.py`: which study, which of its agents, or a list of what there is."""
    parser = argparse.ArgumentParser(
        description="Trains the agents of a study and keeps what the figures need."
    )
    parser.add_argument("study", nargs="?", choices=list(studies))
    parser.add_argument("--only", metavar="AGENT", nargs="+", help="some agents instead of all")
    parser.add_argument("--seeds", metavar="SEED", nargs="+", type=int, help="other seeds than the study's")
    args = parser.parse_args(argv)
    if args.study is None:
        for name, study in studies.items():
            names = ", ".join(study.agents)
            print(f"{name}: {study.env}, {study.settings.total_steps} steps, seeds {study.seeds}: {names}")
        return
    study = studies[args.study]
    for unknown in (agent for agent in args.only or () if agent not in study.agents):
        parser.error(f"{args.study} has no agent {unknown!r}; it has {', '.join(study.agents)}.")
    places: dict[str, Any] = dict(folder=folder, results=results, seeds=args.seeds or ())
    for agent in args.only or study.agents:
        print(run_study(study, args.study, agent, **places), flush=True)
