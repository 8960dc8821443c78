"""What matters in the adaptive sampler: its speed-up over uniform times, one setting changed at a time.

    python paper_figures/adaptive_timesteps/fig_ablation.py

How many times fewer updates (circles) and forward passes (squares) than uniform's it takes to uniform's last bound,
on digits with the linear schedule; mean of five seeds and 95 % bootstrap interval. From
`results/digits-linear*.json`.
"""

from pathlib import Path

import numpy as np
from curves import HERE, interval, read, speedups

from eqgen import plotting


ROWS = {
    "adaptive": "robust, as compared",
    "subset-1": "$|S| = 1$",
    "subset-10": "$|S| = 10$",
    "fresh-noise": "fresh noise",
    "every-10": "$f_S = 10$",
    "every-40": "$f_S = 40$",
    "share-0": "no uniform share",
    "slow-policy": "policy's rate 0.01",
    "whole-sweep": "sweep of all $T$, whole batch",
    "entropy-standard": "standard entropy term",
}


def draw(out: Path = HERE / "ablation") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    uniform = read("digits-linear", "uniform")
    with plotting.style():
        fig, ax = plotting.subplots(1, 1, width=plotting.COLUMN_WIDTH, aspect=0.85, layout="constrained")
        ax.axvline(1, color="0.6", linewidth=0.8)
        runs = {
            name: read("digits-linear" if name == "adaptive" else "digits-linear-ablation", name)
            for name in ROWS
        }
        runs = {name: run for name, run in runs.items() if run is not None}
        for row, run in enumerate(runs.values()):
            for shift, marker, per_pass in ((-0.15, "o", False), (0.15, "s", True)):
                mean, low, high = interval(speedups(run, uniform, per_pass=per_pass))
                look = dict(color=plotting.COLORS[int(per_pass)], markersize=3.5, linewidth=1)
                label = ("forward passes" if per_pass else "updates") if row == 0 else None
                error = np.array([[mean - low], [high - mean]])
                ax.errorbar(mean, row + shift, xerr=error, fmt=marker, label=label, **look)
        ax.set_yticks(range(len(runs)), [ROWS[name] for name in runs])
        ax.invert_yaxis()
        ax.set(xlabel="times fewer than uniform's")
        fig.legend(loc="outside upper center", ncols=2)
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
