"""Does choosing among more plans help for ever, and how far should a prior go from N(0, I)?

    python paper_figures/prior_guidance/fig_sweeps.py

Left, the latched return of Monte Carlo sample selection by the number of candidates; right, that of Prior Guidance
by alpha, the weight of the divergence. One seed (0), 100 episodes each and their standard error, in umaze. From
`results/umaze-cpu_seed0_sweeps.json`.
"""

import json
from pathlib import Path

import numpy as np

from eqgen import plotting


HERE = Path(__file__).parent


def latched(rows: dict, prefix: str, scheme: str) -> dict[float, np.ndarray]:
    """Latched returns of all episodes, by the number in the run's or the scheme's name."""
    found = {}
    for key, row in rows.items():
        run, text, _ = key.split()
        of_run = run.startswith(prefix) and text == scheme
        of_scheme = run == prefix and text.startswith(f"{scheme}:")
        if of_run or of_scheme:
            number = run.removeprefix(prefix) if of_run and run != prefix else text.split(":")[-1]
            found[float(number)] = np.array(row["seeds"][0]["latched"])
    return dict(sorted(found.items()))


def line(ax, found: dict[float, np.ndarray], **look) -> None:
    """Means with standard errors."""
    means = [values.mean() for values in found.values()]
    errors = [values.std(ddof=1) / len(values) ** 0.5 for values in found.values()]
    ax.errorbar(list(found), means, errors, marker="o", markersize=3, linewidth=1, capsize=2, **look)


def draw(results: Path = HERE / "results", out: Path = HERE / "sweeps") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    content = json.loads((results / "umaze-cpu_seed0_sweeps.json").read_text())
    rows = content["rows"]
    with plotting.style():
        fig, (left, right) = plotting.subplots(1, 2, width=plotting.TEXT_WIDTH, aspect=0.6, sharey=True)
        candidates = latched(rows, "planner", "mcss")
        if candidates:
            line(left, candidates, color=plotting.COLORS[0], label="MCSS")
        left.set(
            xscale="log",
            xlabel="candidates $K$",
            ylabel="latched return",
            title="sample selection",
            ylim=(0, 250),
        )
        for scheme, label, color in (("prior", "mean", 1), ("prior-sampled", "sampled", 2)):
            line(right, latched(rows, "pg-alpha-", scheme), color=plotting.COLORS[color], label=label)
        right.set(xscale="log", xlabel=r"$\alpha$", title="Prior Guidance")
        right.legend(loc="upper left")
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
