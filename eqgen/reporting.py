"""Looking at runs: one page of HTML that opens offline, and a view in the terminal that follows a run.

A page holds the curves of each task, a table of all runs, in what their settings differ, and the clips that were
made of them (`eqgen render`). Pictures and clips are inside the file; it loads nothing and runs no script.
"""

import base64
import html
import io
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eqgen.experiments import first_loss
from eqgen.files import is_number, replacing
from eqgen.runs import Run, RunError
from eqgen.sessions import ExperimentError, name_seeds


CLIPS = {".gif": "image/gif", ".mp4": "video/mp4"}
LARGEST_CLIP = 20_000_000
"""Bytes; a larger clip is named instead of shown."""
BARS = "▁▂▃▄▅▆▇█"


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The runs at these paths and below them, by path.

    **Raises:** `ExperimentError` when there is none.
    """
    folders = [Path(path) for path in paths]
    found = {file.parent for folder in folders for file in folder.rglob("settings.json")}
    if not found:
        raise ExperimentError(f"There is no run in {', '.join(map(str, folders))}.")
    return [_opened(path) for path in sorted(found)]


def _opened(path: str | Path) -> Run:
    """The run, if its settings have what is shown of them."""
    run = Run.open(path)
    try:
        seeds, total = run.settings["seeds"], total_steps(run)
        good = (
            isinstance(run.settings["algorithm"], str) and seeds and all(type(seed) is int for seed in seeds)
        )
        good = good and type(total) is int and 0 < total < 2**63
    except (LookupError, TypeError):
        good = False
    if not good:
        raise RunError(f"{run.path / 'settings.json'} has no algorithm, no seeds, or no number of steps.")
    return run


def total_steps(run: Run) -> int:
    """The step at which training ends, on the run's clock."""
    if run.clock == "env_step":
        return run.settings["settings"]["total_steps"]
    return run.settings["learner"]["fields"]["total_updates"]


def judged_by(run: Run) -> str | None:
    """The metric that says how a run does: the return of evaluations, else its first loss, else nothing yet."""
    evaluated = any("eval/return" in record for record in run.metrics())
    return "eval/return" if evaluated else first_loss(run)


# --- The page ---


def write_report(paths: Iterable[str | Path], out: str | Path) -> Path:
    """Writes the page of all runs at and below some paths.

    **Raises:** `ExperimentError` when there is no run.
    """
    runs = find_runs(paths)
    names = _short_names(runs)
    sections = [
        "<h1>Runs</h1>",
        _table(runs, names),
        *(_curves(task, group, names) for task, group in _by_task(runs).items()),
        _differences(runs, names),
        _clips(runs, names),
    ]
    page = _PAGE.format(style=_STYLE, body="\n".join(section for section in sections if section))
    with replacing(Path(out)) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(out)


def _short_names(runs: Sequence[Run]) -> dict[Path, str]:
    """Their paths below the folder that all are in."""
    parts = [run.path.resolve().parts for run in runs]
    common = 0
    while all(len(p) > common + 1 for p in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return {run.path: "/".join(p[common:]) for run, p in zip(runs, parts)}


def _by_task(runs):
    tasks = {}
    for run in runs:
        if (metric := judged_by(run)) is not None:
            tasks.setdefault((str(run.settings.get("env")), metric, run.clock), []).append(run)
    return tasks


def _table(runs, names):
    rows = []
    for run in runs:
        metric, records = judged_by(run), run.metrics()
        step = records[-1][run.clock] if records else 0
        value = "-"
        if metric is not None:
            last = run.curve(metric)[1][:, -1]
            value = f"{np.mean(last):.4g} ({np.min(last):.4g} to {np.max(last):.4g})"
        seeds = name_seeds(run.settings["seeds"])
        cells = names[run.path], run.settings["algorithm"], run.settings.get("env", "-"), seeds
        rows.append((*cells, f"{step} of {total_steps(run)}", metric or "-", value, _provenance(run)))
    header = (
        "run",
        "algorithm",
        "task",
        "seeds",
        "step",
        "metric",
        "last: mean (least to greatest)",
        "made with",
    )
    return _html_table(header, rows)


def _provenance(run):
    try:
        last = run.sessions()[-1]
        return f"eqgen {last['eqgen']} ({str(last['commit'] or 'no commit')[:9]}), {last['device']}"
    except (OSError, RunError, LookupError):
        return "-"


def _curves(task, runs, names):
    from eqgen import plotting

    env, metric, clock = task
    with plotting.style():
        fig, ax = plotting.subplots(width=plotting.TEXT_WIDTH, aspect=0.45)
        captions = {}
        for run in runs:
            steps, values = run.curve(metric)
            band = "range" if len(values) < 5 else "ci"
            captions[plotting.learning_curve(ax, steps, values, label=_plain(names[run.path]), band=band)] = (
                None
            )
        ax.set(xlabel="environment steps" if clock == "env_step" else "updates", ylabel=_plain(metric))
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        drawing = io.StringIO()
        fig.savefig(drawing, format="svg", bbox_inches="tight")
    import matplotlib.pyplot as plt

    plt.close(fig)
    svg = drawing.getvalue()
    return f"<h2>{html.escape(env)}</h2>{svg[svg.index('<svg') :]}<p>{html.escape('; '.join(captions))}</p>"


def _plain(text):
    """Not to be taken for a formula."""
    return text.replace("$", r"\$")


def _differences(runs, names):
    """The settings in which runs differ, a column for each run."""
    flat = {run.path: _flat(run.settings) for run in runs}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    absent = object()
    differ = [key for key in keys if len({repr(flat[run.path].get(key, absent)) for run in runs}) > 1]
    if not differ:
        return ""
    rows = [(key, *(_shown(flat[run.path].get(key, "-")) for run in runs)) for key in differ]
    return "<h2>In what the settings differ</h2>" + _html_table(
        ("", *(names[run.path] for run in runs)), rows
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        parts = [
            _flat(item, f"{name}.{key}" if name else key) for key, item in value.items() if key != "fields"
        ]
        parts += [_flat(value["fields"], name)] if "fields" in value else []
        return {key: item for part in parts for key, item in part.items()}
    return {name: value}


def _shown(value):
    return value if isinstance(value, str) else json.dumps(value)


def _clips(runs, names):
    shown = []
    for run in runs:
        for file in sorted(run.path.iterdir()):
            if (kind := CLIPS.get(file.suffix)) is None:
                continue
            title = html.escape(f"{names[run.path]}/{file.name}")
            if file.stat().st_size > LARGEST_CLIP:
                shown.append(
                    f"<figure><figcaption>{title} is too large to be shown here</figcaption></figure>"
                )
                continue
            source = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
            tag = (
                f'<img src="{source}" alt="{title}">'
                if kind.startswith("image")
                else f'<video src="{source}" controls loop></video>'
            )
            shown.append(f"<figure>{tag}<figcaption>{title}</figcaption></figure>")
    return "<h2>Clips</h2>" + "".join(shown) if shown else ""


def _html_table(header, rows):
    line = lambda tag, cells: "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{line('th', header)}</tr></thead><tbody>{body}</tbody></table>"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .3em .8em; border-bottom: 1px solid #ddd; white-space: nowrap; }
svg { max-width: 100%; height: auto; } figure { display: inline-block; margin: 0 1em 1em 0; }
figcaption { font-size: 13px; color: #666; }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Runs</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""


# --- The terminal ---


def watch(path: str | Path, *, every: float = 2.0, once: bool = False, file: Any = None) -> None:
    """Prints how a run stands whenever that has changed, until it is complete.

    **Arguments:**

    - `every`: seconds between looks.
    - `once`: looks once.
    - `file`: where to; standard output if None.

    **Raises:** `RunError` when there is no run.
    """
    file, shown = file or sys.stdout, None
    while True:
        run = _opened(path)
        text, done = status(run)
        if text != shown:
            # On a terminal the new lines take the place of the old ones.
            back = f"\x1b[{shown.count(chr(10)) + 1}F\x1b[J" if shown is not None and file.isatty() else ""
            print(back + text, file=file, flush=True)
            shown = text
        if once or done:
            return
        time.sleep(every)


def status(run: Run) -> tuple[str, bool]:
    """How a run stands, in a few lines, and whether it is complete."""
    total, metric = total_steps(run), judged_by(run)
    records = run.metrics()
    step = records[-1][run.clock] if records else 0
    title = (
        f"{run.settings['algorithm']} on {run.settings.get('env', '-')}, {name_seeds(run.settings['seeds'])}"
    )
    share = step / total
    filled = round(30 * share)
    clock = run.clock.replace("env_step", "environment step")
    lines = [title, f"{'█' * filled}{'·' * (30 - filled)} {clock} {step} of {total} ({share:.0%})"]
    if records:
        seconds = records[-1].get("wall_time", 0.0)
        seconds = seconds if is_number(seconds) else 0.0
        rest = f", about {_duration(seconds * (total - step) / step)} to go" if 0 < step < total else ""
        lines.append(f"{_duration(seconds)} so far{rest}")
    if metric is not None:
        try:
            _, values = run.curve(metric)
        except RunError:  # not all seeds have one yet
            return "\n".join(lines), False
        for seed, curve in zip(run.settings["seeds"], values):
            lines.append(f"  seed {seed:<4} {metric} {sparkline(curve)} {curve[-1]:.4g}")
    return "\n".join(lines), step >= total


def sparkline(values: np.ndarray, width: int = 40) -> str:
    """A curve as a row of bars, its last `width` values between the least and the greatest of them."""
    values = np.asarray(values, float)[-width:]
    low, high = values.min(), values.max()
    share = (values - low) / (high - low) if high > low else np.zeros(len(values))
    return "".join(BARS[round(7 * x)] for x in share)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )
