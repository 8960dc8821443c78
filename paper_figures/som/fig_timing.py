"""What an update and an action cost, at the sizes of HalfCheetah and the papers' networks.

    python paper_figures/som/fig_timing.py

CPU-milliseconds on one core, from `benchmarks/results/agents.json` (`benchmarks/agents.py`). An action is the best
of the agent's number of candidates, for one observation, but where one candidate is named. SOM's published time of
.218 ms, on hardware that is not known, is not drawn.
"""

import json
from pathlib import Path

import numpy as np

from eqgen import plotting


HERE = Path(__file__).parent
SOURCE = HERE.parent.parent / "benchmarks" / "results" / "agents.json"
OURS = ("SOM", "NC-LQL", "LQL")


def draw(source: Path = SOURCE, out: Path = HERE / "timing") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    agents = json.loads(source.read_text())["agents"]
    rows = {name.removesuffix(", paper"): row for name, row in agents.items() if name.endswith(", paper")}
    names = sorted(rows, key=lambda name: rows[name]["act 1"]["cpu_ms"])
    with plotting.style():
        fig, axes = plotting.subplots(1, 2, width=plotting.TEXT_WIDTH, aspect=0.95, sharey=True)
        for ax, measure, title in zip(axes, ("act 1", "update"), ("an action", "an update of 256")):
            values = np.array([rows[name][measure]["cpu_ms"] for name in names])
            colors = [plotting.COLORS[0 if name.startswith(OURS) else 5] for name in names]
            ax.scatter(values, range(len(names)), color=colors, s=14, zorder=3)
            ax.hlines(range(len(names)), values.min() / 2, values, color=colors, linewidth=1)
            ax.set(xscale="log", xlabel=f"CPU-ms of {title}", xlim=(values.min() / 2, values.max() * 2))
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        for ax in axes:
            ax.grid(axis="y", visible=False)
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
