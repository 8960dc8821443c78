"""Runs the experiments of the papers again, and says how each stands.

    python paper_figures/reproduce.py som                     everything of a paper, at the `cpu` size
    python paper_figures/reproduce.py nclql --rows N3 N4      some of its rows
    python paper_figures/reproduce.py som --preset paper      the size for a GPU; `smoke` takes seconds a command
    python paper_figures/reproduce.py som --list              the commands, one a line, and nothing is run
    python paper_figures/reproduce.py readme                  README.md from rows.toml and the committed results

Everything happens in `runs/reproduce/<preset>`, in a copy of the scripts without the committed results, which are
not touched: new ones lie there in `paper_figures/<paper>/results`, and the figures drawn from them beside those.
The same command goes on where an earlier one stopped. Commands run side by side, one a core (`--jobs`), each with
one thread.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numbers_beside

from eqgen.files import replacing


HERE = Path(__file__).resolve().parent
PAPERS: dict[str, dict[str, Any]] = tomllib.loads((HERE / "rows.toml").read_text())
PRESETS = ("smoke", "cpu", "paper")
STATUSES = ("reproduced", "reproduced at CPU scale", "disagrees", "open", "cannot")


# --- The commands ---


def alternatives(text: str) -> list[str]:
    """`a-{b,c}` as `a-b` and `a-c`; of several braces every combination."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(combination) for combination in itertools.product(*choices)]


def commands(paper: str, preset: str, rows: Sequence[str] = ()) -> list[list[str]]:
    """What the preset runs of a paper, or of some of its rows: each command once, as words.

    **Raises:** `ValueError` for a row that the paper does not have.
    """
    known = {row["id"]: row for row in PAPERS[paper]["rows"]}
    if unknown := [row for row in rows if row not in known]:
        raise ValueError(f"{paper} has no row {', '.join(unknown)}; it has {', '.join(known)}.")
    texts = [text for row in rows or known for text in known[row].get(preset, ())]
    return [shlex.split(text) for text in dict.fromkeys(itertools.chain(*map(alternatives, texts)))]


def prepared(preset: str, root: Path) -> Path:
    """The folder that a preset is run in, with the scripts of this checkout as they are now."""
    out = root / preset
    for folder in ("paper_figures", "benchmarks"):
        for script in (HERE.parent / folder).rglob("*.py"):
            copy = out / folder / script.relative_to(HERE.parent / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(script, copy)
            (copy.parent / "results").mkdir(exist_ok=True)
    return out


def arguments(words: list[str], folder: Path) -> list[str]:
    """A command of `rows.toml` as the system is given it: this interpreter, and the script where it was copied."""
    if words[0] == "eqgen":
        return [sys.executable, "-m", *words]
    script = words[0] if words[0].startswith("benchmarks/") else f"paper_figures/{words[0]}"
    return [sys.executable, str(folder / script), *words[1:]]


def run_all(jobs: list[list[str]], folder: Path, workers: int) -> list[list[str]]:
    """Runs commands side by side, each into a log; **returns** those that failed."""
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    environment = dict(os.environ)
    if workers > 1:  # as many threads as cores in each would only be in one another's way
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    # Python looks beside the script for what it imports, and here for eqgen if that is not installed.
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE.parent), environment.get("PYTHONPATH")])
    )

    def run(words: list[str]) -> int:
        log = logs / (re.sub(r"[^\w.=-]+", "_", " ".join(words)) + ".txt")
        with log.open("a") as file:
            done = subprocess.run(
                arguments(words, folder), cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        print(f"{'done' if done.returncode == 0 else f'FAILED ({log})'}: {' '.join(words)}", flush=True)
        return done.returncode

    with ThreadPoolExecutor(workers) as pool:
        return [words for words, code in zip(jobs, pool.map(run, jobs)) if code]


def draw(paper: str, folder: Path) -> None:
    """Draws those figures, and writes those tables, of a paper for which there are results in the folder."""
    scripts = (folder / "paper_figures" / paper).glob("*.py")
    for script in sorted(path for path in scripts if path.name.startswith(("fig_", "table_"))):
        done = subprocess.run([sys.executable, str(script)], cwd=folder, capture_output=True, text=True)
        reason = (done.stderr.strip().splitlines() or [""])[-1]
        print(done.stdout.strip() if done.returncode == 0 else f"not drawn: {script.name}: {reason}")


# --- The README ---


def result_files(row: dict[str, Any]) -> list[Path]:
    """The committed result files of a row."""
    patterns = itertools.chain(*map(alternatives, row["results"]))
    return sorted({path for pattern in patterns for path in (HERE / pattern).parent.glob(Path(pattern).name)})


def sessions(content: Any) -> list[dict[str, Any]]:
    """What ran where: every record of provenance in a result file of whatever kind."""
    if isinstance(content, dict) and {"backend", "packages"} <= content.keys():
        return [content]
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [session for each in inner for session in sessions(each)]


def seconds(content: dict[str, Any]) -> float:
    """How long the runs of a result file took, as far as it says."""
    if "training_seconds" in content:
        spent = content["training_seconds"]
        return spent["wall"] if isinstance(spent, dict) else spent
    clocks = [record.get("wall_time", 0.0) for record in content.get("records", [])]
    runs = [
        max((record.get("wall_time", 0.0) for record in run["records"]), default=0.0)
        for run in content.get("runs", {}).values()
    ]
    return max(clocks, default=0.0) + sum(runs)


def machine(session: dict[str, Any]) -> str:
    """The processor and its cores, or the accelerator."""
    if session["backend"] != "cpu":
        return session["device"]
    return f"{session['cpu']}, {session['cores']} core{'s' if session['cores'] > 1 else ''}"


def last_run(row: dict[str, Any]) -> tuple[str, str]:
    """The presets that a row's results are of, and hardware and time: both empty if there are none."""
    contents = [json.loads(path.read_text()) for path in result_files(row)]
    finished = [content for content in contents if content.get("status") != "open"]
    if not finished:
        return "", ""
    ran = [session for content in finished for session in sessions(content)]
    hardware = sorted({machine(session) for session in ran})
    names = [path.name for path in result_files(row)]
    presets = [preset for preset in ("cpu", "paper") if any(f"-{preset}_" in name for name in names)]
    hours = sum(map(seconds, finished)) / 3600
    spent = (
        "" if hours == 0 else f"; {hours:.1f} h in all" if hours >= 0.1 else f"; {60 * hours:.0f} min in all"
    )
    return ", ".join(presets) or "cpu", "; ".join(hardware) + spent


def cell(text: str) -> str:
    """Text as a cell of a table may hold it."""
    return " ".join(text.split()).replace("|", "\\|")


def table(paper: str) -> str:
    """The rows of a paper, as Markdown."""
    lines = [
        "| row | shows | command | preset | hardware, time | status | ours | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in PAPERS[paper]["rows"]:
        preset, hardware = last_run(row)
        status = row.get("status", "open")
        if row["results"] and not hardware:  # nobody has run it yet
            status = "open"
        if status not in STATUSES:
            raise ValueError(f"{row['id']} has status {status!r}; it must be one of {', '.join(STATUSES)}.")
        drawn = [name for name in row.get("figures", ()) if (HERE / f"{name}.png").exists()]
        pictures = [f"[{Path(name).name}]({name}.png)" for name in drawn]
        pictures += [f"[{Path(name).name}, in numbers]({name}.md)" for name in row.get("tables", ())]
        shows = row["shows"] + (f": {', '.join(pictures)}" if pictures else "")
        command = f"`make reproduce PAPER={paper} ROWS={row['id']}`" if row.get("cpu") else ""
        ours = getattr(numbers_beside, row["ours"])(HERE) if "ours" in row else ""
        told = f"**{status}**. {row['note']}"
        cells = (row["id"], shows, command, preset, hardware, told, ours, row.get("published", ""))
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def readme() -> str:
    """The whole page."""
    intro = (HERE / "intro.md").read_text().strip()
    papers = [f"## {paper['title']}\n\n{paper['source']}\n\n{table(name)}" for name, paper in PAPERS.items()]
    return "\n\n".join([intro, *papers]) + "\n"


# --- The command line ---


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Runs the experiments of a paper again; `readme` writes README.md."
    )
    parser.add_argument("paper", choices=[*PAPERS, "readme"])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--rows", nargs="+", default=(), help="some of its rows, as S1 S4")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="commands at a time")
    parser.add_argument("--root", type=Path, default=Path("runs/reproduce"), help="where it happens")
    parser.add_argument("--list", action="store_true", help="the commands, without running them")
    args = parser.parse_args(argv)
    if args.paper == "readme":
        with replacing(HERE / "README.md") as temporary:
            temporary.write_text(readme())
        return 0
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; it must be at least 1.")
    try:
        jobs = commands(args.paper, args.preset, args.rows)
    except ValueError as error:
        parser.error(str(error))
    if not jobs:
        parser.error(f"{' '.join(args.rows) or args.paper} has no command at the {args.preset} preset.")
    if args.list:
        print(*map(shlex.join, jobs), sep="\n")
        return 0
    folder = prepared(args.preset, args.root.resolve())
    failed = run_all(jobs, folder, args.jobs)
    draw(args.paper, folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
