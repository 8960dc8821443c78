"""Bits per dimension of held-out digits over updates, over forward passes and over seconds, by timestep sampler.

    python paper_figures/adaptive_timesteps/fig_bounds.py

Linear schedule, T = 1000; mean over five seeds and 95 % bootstrap bands. Forward passes are in units of those of
uniform training (a backward pass counts as two); seconds are updates times what one takes by itself, as
`benchmarks/timesteps.py` measured side by side. From `results/digits-linear_*.json`.
"""

import json
from pathlib import Path

from curves import HERE, LABELS, read

from eqgen import plotting


SHOWN = ("uniform", "min-snr", "log-normal", "speed", "second-moment", "adaptive")
BENCHMARK = HERE.parent.parent / "benchmarks" / "results" / "timesteps.json"
TIMED = {"adaptive": "adaptive, same, every 20", "second-moment": "second moment"}


def draw(out: Path = HERE / "bounds") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    timed = json.loads(BENCHMARK.read_text())["rows"]["mlp"]
    with plotting.style():
        fig, axes = plotting.subplots(
            1, 3, width=plotting.TEXT_WIDTH, aspect=0.95, sharey=True, layout="constrained"
        )
        for color, sampler in zip(plotting.COLORS, SHOWN):
            run = read("digits-linear", sampler)
            seconds = timed[TIMED.get(sampler, "uniform")]["best_wall_ms"] / 1e3
            scales = (1e-3, 1e-3 * (1 + run["relative_cost"]), seconds)
            for ax, scale in zip(axes, scales):
                look = dict(color=color, linewidth=1.6 if sampler == "adaptive" else 1.0)
                plotting.learning_curve(
                    ax, scale * run["steps"][1:], run["bound"][1:].T, label=LABELS[sampler], **look
                )
        axes[0].set(ylabel="bound, bits per dimension", xlabel="thousand updates", ylim=(5.15, 6.8))
        axes[1].set(xlabel="thousand forward passes")
        axes[2].set(xlabel="seconds (one seed, one core)")
        lines, labels = axes[0].get_legend_handles_labels()
        fig.legend(lines, labels, loc="outside upper center", ncols=len(labels), columnspacing=1.2)
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
