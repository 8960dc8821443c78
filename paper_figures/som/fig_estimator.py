"""Bias and deviation of Monte Carlo scores over t, by estimator and number of proposals K.

    python paper_figures/som/fig_estimator.py

Relative to the root mean square of the exact score at that t, on the four-mode mixture: lines are the bias, the
dotted ones of the same colour the standard deviation of one estimate. From `results/estimator_samples.json`.
"""

import json
from pathlib import Path

from eqgen import plotting


HERE = Path(__file__).parent
TITLES = {
    "gradient": "gradients (paper)",
    "denoising": "values, normal proposals",
    "truncated": "values, inside the box",
}


def draw(results: Path = HERE / "results", out: Path = HERE / "estimator") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    content = json.loads((results / "estimator_samples.json").read_text())
    with plotting.style():
        fig, axes = plotting.subplots(1, 3, width=plotting.TEXT_WIDTH, aspect=0.85, sharey=True)
        for ax, (name, title) in zip(axes, TITLES.items()):
            numbers = [key.split()[1] for key in content["estimators"] if key.startswith(f"{name} ")]
            for color, number in zip(plotting.COLORS, numbers):
                row = content["estimators"][f"{name} {number}"]
                ax.plot(content["t"], row["bias"], color=color, label=f"K = {number}")
                ax.plot(content["t"], row["deviation"], ":", color=color)
            ax.set(title=title, xlabel="$t$", yscale="log", ylim=(1e-3, 1e2), xlim=(0, 1))
        axes[0].set_ylabel("bias, deviation / score")
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
