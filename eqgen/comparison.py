"""What the rows of a benchmark say together: scores, intervals, a table and a figure. Nothing is run here.

The final return of a seed is the mean of its evaluations in the last tenth of training. A score is
(return - random) / (best - random): random is the uniform policy's mean return, best the highest mean final return
among the algorithms in the table. So 1 is the best of this comparison, and scores change with the company: they
compare neither with those of other tables nor with the SOM paper's 0.887, whose formula is not known to us. Over
tasks and seeds together there is the interquartile mean, with an interval as in `eqgen.evaluation` (random and best
count as known), but only for algorithms that finished every task: a mean over the rest would be one of other tasks.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eqgen import studies
from eqgen.evaluation import bootstrap_interval, iqm
from eqgen.files import is_number, parse_json, replacing, write_json
from eqgen.sessions import ExperimentError, name_seeds


Row = dict[str, Any]
"""What `eqgen.benchmark` writes for one algorithm on one task; see there."""


def read_rows(folder: str | Path) -> dict[Path, Row]:
    """The rows in a benchmark's folder by their files, sorted by task and algorithm."""
    rows = {}
    for path in Path(folder, "rows").glob("*.json"):
        try:
            _check_row(row := parse_json(path.read_bytes()))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ExperimentError(f"{path} is damaged: {error}. Delete it and run the suite again.") from None
        rows[path] = row
    return dict(sorted(rows.items(), key=lambda item: (item[1]["env"], item[1]["algorithm"])))


def _check_row(row: Row) -> None:
    """**Raises:** `ValueError`, `TypeError`, `LookupError` or `AttributeError` when a file holds no row."""

    def check(good, what):
        if not good:
            raise ValueError(f"it is no row: {what}")

    for name in ("suite", "preset", "algorithm", "env", "status"):
        check(isinstance(row[name], str), f"{name} is {row[name]!r}")
    seeds, total = row["settings"]["seeds"], row["settings"]["settings"]["total_steps"]
    check(seeds and all(type(seed) is int for seed in seeds), f"seeds are {seeds!r}")
    check(is_number(total) and total > 0, f"total_steps is {total!r}")
    for last in row.get("provenance", [])[-1:]:
        texts = (last[key] for key in ("eqgen", "python", "cpu", "backend", "device"))
        check(all(isinstance(text, str) for text in texts), "its provenance is incomplete")
        check(isinstance(last["commit"], str | type(None)), "its provenance has no commit")
        check(last["packages"]["jax"] and last["cores"] and last["devices"], "its provenance is incomplete")
    for record in row.get("records", []):
        numbers = record["updates"], record["eval/return"]
        check(all(map(is_number, numbers)), "a record holds no numbers")
    if row["status"] == "finished":
        check(row["records"] and row["provenance"], "it is finished and has no records or no provenance")
        final = row["final_return"]
        check(len(final) == len(seeds) and all(map(is_number, final)), f"final_return is {final!r}")
        for name in _NUMBERS:
            unknown = name == "update_mb" and row[name] is None  # where JAX cannot tell
            check(unknown or is_number(row[name]), f"{name} is {row[name]!r}")


_NUMBERS = ("random_return", "train_seconds", "compile_cpu_s", "parameters", "update_mb", "process_mb")
_NUMBERS += ("update_cpu_ms", "update_wall_ms", "action_cpu_ms", "action_wall_ms")


def write_table(folder: str | Path) -> list[Path]:
    """Makes table.md, table.json and the figure `curves` from the rows in a benchmark's folder.

    **Returns:** the files written.

    **Raises:** `ExperimentError` when there are no rows.
    """
    folder, rows = Path(folder), read_rows(folder)
    if not rows:
        raise ExperimentError(f"{folder} holds no rows of a benchmark.")
    if len(found := {name_seeds(row["settings"]["seeds"]) for row in rows.values()}) > 1:
        raise ExperimentError(
            f"{folder} holds rows of {' and of '.join(sorted(found))}; they share no table."
        )
    summary = summarise(list(rows.values()))
    write_json(folder / "table.json", summary)
    with replacing(folder / "table.md") as temporary:
        temporary.write_text(markdown(list(rows.values()), summary))
    return [folder / "table.md", folder / "table.json", *_draw(rows, folder / "curves")]


def final_returns(steps: np.ndarray, returns: np.ndarray, total_steps: int) -> list[float]:
    """By seed the mean of the evaluations in the last tenth of training; `returns` is (seeds, steps)."""
    return returns[:, steps >= 0.9 * total_steps].mean(axis=1).tolist()


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The scores.

    **Returns:** `tasks`: by environment `random`, `best`, and by algorithm the `mean` final return with its
    `interval` and the `scores` by seed (None where nothing beats the uniform policy, which leaves no scale);
    `overall`: by algorithm the `iqm` of its scores with its `interval`, or None if it has none on some task. The
    best algorithm is the first.
    """
    tasks: dict[str, Any] = {}
    overall: dict[str, Any] = {}
    for env in dict.fromkeys(row["env"] for row in rows):
        finished = [row for row in rows if row["env"] == env and row["status"] == "finished"]
        finished.sort(key=lambda row: np.mean(row["final_return"]), reverse=True)
        random: Any = finished[0]["random_return"] if finished else None
        best: Any = float(np.mean(finished[0]["final_return"])) if finished else None
        tasks[env] = {"random": random, "best": best, "algorithms": {}}
        for row in finished:
            final = np.array(row["final_return"])
            tasks[env]["algorithms"][row["algorithm"]] = {
                "mean": float(final.mean()),
                "interval": bootstrap_interval(final, np.mean),
                "scores": ((final - random) / (best - random)).tolist() if best > random else None,
            }
    for name in dict.fromkeys(row["algorithm"] for row in rows):
        scores = [task["algorithms"].get(name, {}).get("scores") for task in tasks.values()]
        table = None if None in scores else np.transpose(scores)  # (seeds, tasks)
        overall[name] = None if table is None else {"iqm": iqm(table), "interval": bootstrap_interval(table)}
    place = lambda item: -item[1]["iqm"] if item[1] else np.inf
    return {"tasks": tasks, "overall": dict(sorted(overall.items(), key=place))}


# --- The table, for reading ---


_COLUMNS = ("algorithm", "final return [95 %]", "score", "updates", "update ms", "action ms", "compile CPU-s")
_COLUMNS += ("parameters", "update MB", "process MB", "training s")

_NOTES = """\
Final return: the mean of a seed's evaluations in the last tenth of training, then over seeds, with its 95 %
bootstrap interval, which is too narrow for fewer than about five seeds. Score: 0 is the uniform policy, 1 the best
mean final return in this table; the interval over all tasks is stratified. Curves: the mean over seeds, and their
range. Update (of one seed; on-policy, of a whole rollout), action (of evaluation, on one observation):
CPU-milliseconds of all threads, in brackets by the clock, on random transitions. Update MB: arguments, results and
temporaries of an update. Process MB: the most at once in the session that ended training. Training: how long all
seeds took, side by side, with compilation and evaluations."""


def markdown(rows: Sequence[Row], summary: dict[str, Any]) -> str:
    """All tasks together, each task with all its rows, what failed or is open, and on what it was made."""
    first, tasks, at = rows[0], summary["tasks"], {(row["env"], row["algorithm"]): row for row in rows}
    unfinished = [row for row in rows if row["status"] != "finished"]
    title = f"# Suite {first['suite']}, preset {first['preset']}, {name_seeds(first['settings']['seeds'])}"
    count = lambda name: f"{sum(name in task['algorithms'] for task in tasks.values())} of {len(tasks)}"
    cells = [
        (name, _estimate(entry, "iqm", ".3f"), count(name)) for name, entry in summary["overall"].items()
    ]
    lines = [title, *_grid(("algorithm", "interquartile mean of scores [95 %]", "tasks finished"), cells)]
    if any(row.get("records") for row in rows):
        lines += ["", "![Learning curves](curves.png)"]
    for env, task in tasks.items():
        cells = [_cells(at[env, name], entry) for name, entry in task["algorithms"].items()]
        rest = ["-"] * (len(_COLUMNS) - 2)
        cells += [(row["algorithm"], row["status"], *rest) for row in unfinished if row["env"] == env]
        steps = next(row["settings"]["settings"]["total_steps"] for row in rows if row["env"] == env)
        about = f"{steps} environment steps of each seed."
        about += "" if task["random"] is None else f" The uniform policy's return: {task['random']:.1f}."
        lines += ["", f"## {env}", "", about, *_grid(_COLUMNS, cells)]
    lines += ["", "## Failed or open", ""] if unfinished else []
    for row in unfinished:
        error = f": {row['error']}" if "error" in row else ""
        lines.append(f"- {row['algorithm']} on {row['env']}: {row['status']}{error}")
    made_on = sorted({_made_on(row) for row in rows if "provenance" in row})
    return "\n".join([*lines, "", "## How to read it", "", _NOTES, "", *made_on]) + "\n"


def _cells(row: Row, entry: dict[str, Any]) -> tuple[Any, ...]:
    time = lambda what: f"{row[f'{what}_cpu_ms']:.3g} ({row[f'{what}_wall_ms']:.3g})"
    return (
        row["algorithm"],
        _estimate(entry, "mean", ".1f"),
        f"{np.mean(entry['scores']):.3f}" if entry["scores"] else "-",
        row["records"][-1]["updates"],
        time("update"),
        time("action"),
        f"{row['compile_cpu_s']:.1f}",
        row["parameters"],
        "-" if row["update_mb"] is None else f"{row['update_mb']:.3g}",
        f"{row['process_mb']:.0f}",
        f"{row['train_seconds']:.0f}",
    )


def _estimate(entry: dict[str, Any] | None, name: str, form: str) -> str:
    """A number with its interval, if there is one: that of a single seed is a point."""
    if entry is None:
        return "-"
    value, (low, high) = entry[name], entry["interval"]
    return f"{value:{form}} [{low:{form}}, {high:{form}}]" if low < high else f"{value:{form}}"


def _grid(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return ["", line(header), "|" + "---|" * len(header), *map(line, rows)]


def _made_on(row: Row) -> str:
    """Versions and hardware of a row's last session, in a line."""
    last = row["provenance"][-1]
    commit = last["commit"] or "no commit"
    changed = " with changes" if commit.endswith("+") else ""
    hardware = f"{last['cpu']} (cores: {last['cores']})"
    hardware += "" if last["backend"] == "cpu" else f", {last['devices']} x {last['device']}"
    threads = "one thread" if row.get("single_thread") else "several threads"
    return (
        f"Made with eqgen {last['eqgen']} ({commit[:9]}{changed}), JAX {last['packages']['jax']}, "
        f"Python {last['python']}, on {hardware}; costs measured on {threads}."
    )


# --- The figure ---


def _draw(rows: Mapping[Path, Row], path: Path) -> list[Path]:
    """Learning curves, a panel for each task, in which every row with evaluations has a line."""
    from eqgen import plotting

    panels: dict[str, dict[str, Path]] = {}
    for file, row in rows.items():
        if row.get("records"):
            panels.setdefault(row["env"], {})[row["algorithm"]] = file
    if not panels:
        return []
    dashes = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # 5, which shares no factor with 8 colours
    looks = zip(itertools.cycle(plotting.COLORS), itertools.cycle(dashes))
    names = sorted({row["algorithm"] for row in rows.values()})
    styles = {
        name: dict(color=color, linestyle=dash, band="range") for name, (color, dash) in zip(names, looks)
    }
    return studies.draw_curves(panels, styles, path)
