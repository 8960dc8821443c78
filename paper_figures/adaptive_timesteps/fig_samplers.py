"""All timestep samplers on all schedules: how far below uniform's the bound ends.

    python paper_figures/adaptive_timesteps/fig_samplers.py

Held-out digits, patches of photographs and points on a ring. Bits per dimension below (right of 0) or above those
of uniform training after as many updates, paired by seed: mean of five and 95 % bootstrap interval. On the cosine
schedule without the last step, whose weight of 500 drowns the rest. From `results/*.json`.
"""

from pathlib import Path

import numpy as np
from curves import HERE, LABELS, interval, read

from eqgen import plotting


DATA = {"digits": "digits", "patches": "photo patches", "ring": "ring"}
LEAST = -0.5
"""What ends further above uniform's is drawn at the border."""


def draw(out: Path = HERE / "samplers") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    studies = [f"{data}-{betas}" for data in DATA for betas in ("linear", "cosine", "quad")]
    ran = lambda name: any(read(study, name) is not None for study in studies)
    names = [name for name in LABELS if name != "uniform" and ran(name)]
    present = [data for data in DATA if read(f"{data}-linear", "uniform") is not None]
    with plotting.style():
        fig, axes = plotting.subplots(
            1, 3, width=plotting.TEXT_WIDTH, aspect=1.3, sharey=True, layout="constrained"
        )
        for ax, betas in zip(axes, ("linear", "cosine", "quad")):
            ax.axvline(0, color="0.6", linewidth=0.8)
            metric = "bound_but_last" if betas == "cosine" else "bound"
            for number, data in enumerate(present):
                shift = 0.22 * (number - (len(present) - 1) / 2)
                rows, points = [], []
                for row, name in enumerate(names):
                    run, uniform = read(f"{data}-{betas}", name), read(f"{data}-{betas}", "uniform")
                    if run is not None and uniform is not None:
                        rows.append(row + shift)
                        points.append(interval(uniform[metric][-1] - run[metric][-1]))
                if not points:
                    continue
                mean, low, high = np.array(points).T
                inside = mean > LEAST
                look = dict(color=plotting.COLORS[number], markersize=3.5, linewidth=1, label=DATA[data])
                rows = np.array(rows)
                errors = (mean - low)[inside], (high - mean)[inside]
                ax.errorbar(mean[inside], rows[inside], xerr=errors, fmt="o", **look)
                ax.plot(
                    np.full((~inside).sum(), LEAST),
                    rows[~inside],
                    "<",
                    color=plotting.COLORS[number],
                    markersize=4,
                )
            ax.set(title=betas, xlim=(LEAST - 0.05, 0.4), xlabel="bits per dimension gained")
        axes[0].set_yticks(range(len(names)), [LABELS[name] for name in names])
        axes[0].invert_yaxis()
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(present))
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
