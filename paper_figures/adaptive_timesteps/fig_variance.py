"""Gradient variance and loss over t, before and during uniform training, on three schedules.

    python paper_figures/adaptive_timesteps/fig_variance.py

Above, tr Cov of the gradient of the unweighted loss over examples and noise; dotted, the same of the bound's terms,
which is c_t^2 times as much, at the end. Below, the held-out loss. Digits; lines are means over five seeds, bands
their range. From `results/variance.json`.
"""

import json
from pathlib import Path

import numpy as np
from curves import HERE, RESULTS

from eqgen import plotting


def draw(out: Path = HERE / "variance") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    content = json.loads((RESULTS / "variance.json").read_text())
    t = np.array(content["t"])
    with plotting.style():
        fig, axes = plotting.subplots(
            2, 3, width=plotting.TEXT_WIDTH, aspect=0.7, sharex=True, sharey="row", layout="constrained"
        )
        for (top, bottom), (betas, rows) in zip(axes.T, content["schedules"].items()):
            for color, (updates, found) in zip(plotting.COLORS, rows["after"].items()):
                for ax, name in ((top, "variance"), (bottom, "loss")):
                    values = np.array(found[name])
                    ax.plot(t, values.mean(axis=0), color=color, label=f"{int(updates):,} updates")
                    ax.fill_between(
                        t, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0
                    )
            weighted = np.array(found["variance"]).mean(axis=0) * np.array(rows["c"]) ** 2
            top.plot(t, weighted, color=color, linestyle=":", label=r"times $c_t^2$")
            top.set(title=betas, yscale="log")
            bottom.set(yscale="log", xlabel="$t$")
        axes[0, 0].set_ylabel("gradient variance")
        axes[1, 0].set_ylabel("loss")
        lines, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(lines, labels, loc="outside upper center", ncols=len(labels))
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
