"""What the adaptive sampler learns: the law of t over training, on three schedules.

    python paper_figures/adaptive_timesteps/fig_law.py

Probability of each twentieth of the times relative to uniform (1), mean over five seeds and over examples. Digits;
30 % of the draws are uniform whatever the policy says. From `results/digits-*_adaptive.json`.
"""

from pathlib import Path

import matplotlib.colors
from curves import HERE, read

from eqgen import plotting


def draw(out: Path = HERE / "law") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    with plotting.style():
        fig, axes = plotting.subplots(
            1, 3, width=plotting.TEXT_WIDTH, aspect=0.8, sharey=True, layout="constrained"
        )
        for ax, betas in zip(axes, ("linear", "cosine", "quad")):
            run = read(f"digits-{betas}", "adaptive")
            ax.grid(False)
            relative = run["law"].mean(axis=1).T * run["law"].shape[-1]
            extent = (0, run["steps"][-1] / 1000, 0, 1)
            image = ax.imshow(
                relative,
                origin="lower",
                aspect="auto",
                extent=extent,
                cmap="RdBu_r",
                norm=matplotlib.colors.TwoSlopeNorm(1.0, 0.3, 3.0),
            )
            ax.set(title=betas, xlabel="thousand updates")
        axes[0].set_ylabel("time $t / T$")
        fig.colorbar(image, ax=axes, label="probability / uniform", ticks=[0.3, 0.65, 1, 2, 3])
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
