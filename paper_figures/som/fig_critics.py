"""Scores under critics that are wrong: the local gradient against Monte Carlo estimates, over t.

    python paper_figures/som/fig_critics.py

The mean cosine with the exact score of the right density, K = 100, one panel a critic. From
`results/estimator_critics.json`; `estimator.py` says what the critics are.
"""

import json
from pathlib import Path

from eqgen import plotting


HERE = Path(__file__).parent
TITLES = {
    "exact": "right critic",
    "sinusoid": "with a sinusoid",
    "spike": "near a spike",
    "fit": "fitted to 200 points",
}
FORMS = {
    "local": ("local gradient", "-."),
    "gradient": ("smoothed, gradients (paper)", "--"),
    "denoising": ("smoothed, values", ":"),
    "truncated": ("smoothed, values inside the box", "-"),
}


def draw(results: Path = HERE / "results", out: Path = HERE / "critics") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    content = json.loads((results / "estimator_critics.json").read_text())
    with plotting.style():
        fig, axes = plotting.subplots(1, 4, width=plotting.TEXT_WIDTH, aspect=1.25, sharey=True)
        for ax, (critic, title) in zip(axes, TITLES.items()):
            for color, (form, (label, line)) in zip(plotting.COLORS, FORMS.items()):
                values = content["critics"][critic]["cosine"][form]
                ax.plot(content["t"], values, line, color=color, label=label)
            ax.set(title=title, xlabel="$t$", xlim=(0, 1), xticks=[0, 0.5, 1], ylim=(-0.3, 1.05))
        axes[0].set_ylabel("cosine with right score")
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
