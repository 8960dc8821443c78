"""The numbers of `schemes`: every way to plan in every maze, with what it is worth and what it costs.

    python paper_figures/prior_guidance/table_schemes.py

Means over seeds (100 episodes each) and, where there are more than one, in brackets the least and the largest.
Scores are on eqgen's own scale of each maze, which its result files carry (0: uniform actions, 100: the waypoint
controller that made the set), and not D4RL's. Milliseconds of one decision for one observation at the planner's
size are from `benchmarks/results/planning.json`; "-" is not measured.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fig_cost import TIMED, TIMES
from fig_schemes import HERE, LAYOUTS, SCHEMES, outcomes, studies

from eqgen.data.reference import Scale
from eqgen.files import replacing


HEAD = "| maze | way to plan | success | steps to the goal | score | latched score | ms a decision |"
TIMED_AT = {"umaze": "cpu", "medium": "medium", "large": "large"}


def spread(values: Sequence[float], digits: int) -> str:
    """Their mean, least and largest."""
    if not np.isfinite(values).any():
        return "-"
    numbers = [f"{function(values):.{digits}f}" for function in (np.nanmean, np.nanmin, np.nanmax)]
    return "{} ({} to {})".format(*numbers) if len(values) > 1 else numbers[0]


def lines(layout: str, results: Path, times: Path) -> list[str]:
    """The rows of one maze."""
    files = studies(layout, results)
    if not files:
        return []
    seeds = [outcomes(study) for study in files]
    scales = [Scale(**study["scale"]) for study in files]
    size = f"{TIMED_AT[layout]}: "
    timed = json.loads(times.read_text())["rows"].items()
    times_of = {name.removeprefix(size): row for name, row in timed if name.startswith(size)}
    found = []
    for name, label in SCHEMES.items():
        rows = [(seed[name], scale) for seed, scale in zip(seeds, scales) if name in seed]
        if not rows:
            continue
        (row,) = [row for row, names in TIMED.items() if name in names]
        cells = (
            layout,
            label,
            spread([row["success"] for row, _ in rows], 2),
            spread([row["steps"] for row, _ in rows], 0),
            spread([float(scale.score(row["returns"])) for row, scale in rows], 0),
            spread([float(scale.score(row["latched"])) for row, scale in rows], 0),
            f"{times_of[row]['1']['best_wall_ms']:.3g}" if row in times_of else "-",
        )
        found.append(f"| {' | '.join(cells)} |")
    return found


def write(
    results: Path = HERE / "results", times: Path = TIMES, out: Path = HERE / "schemes.md"
) -> list[Path]:
    """Writes the table as Markdown."""
    rows = [line for layout in LAYOUTS for line in lines(layout, results, times)]
    if not rows:
        raise FileNotFoundError("There is no result to tell of: make some with mazes.py.")
    intro = " ".join(__doc__.split("\n\n", 2)[2].split())
    with replacing(out) as temporary:
        temporary.write_text("\n".join([intro, "", HEAD, "|---" * 7 + "|", *rows]) + "\n")
    return [out]


if __name__ == "__main__":
    print(*write(), sep="\n")
