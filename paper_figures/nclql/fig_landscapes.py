"""The noise-conditioned critic from coarse to sharp, with chains over it.

    python paper_figures/nclql/fig_landscapes.py

Upper row: Q(., l) less its largest value, at four of ten levels. Lower row: where 200 chains that began anywhere
are at the end of that level, over the density they should have in the end. From `results/landscapes.json`.
"""

import json
from pathlib import Path

import numpy as np

from eqgen import plotting
from eqgen.envs.catalog import make


HERE = Path(__file__).parent


def draw(results: Path = HERE / "results", out: Path = HERE / "landscapes") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    content = json.loads((results / "landscapes.json").read_text())
    settings, chains = content["settings"], np.array(content["chains"])
    bandit = make("toy/mixture")
    with plotting.style():
        columns = len(settings["levels"])
        fig, axes = plotting.subplots(
            2, columns, width=plotting.TEXT_WIDTH, aspect=0.95, sharex=True, sharey=True
        )
        for (top, bottom), level in zip(axes.T, settings["levels"]):
            surface = np.array(content["surfaces"][str(level)])
            look = dict(origin="lower", extent=(-1, 1, -1, 1), vmin=-15, vmax=0)
            image = top.imshow(surface, **look)
            top.set_title(f"level {level}, $\\sigma$ = {settings['sigmas'][level]:.2f}")
            plotting.density(bottom, bandit.log_density, cmap="Greys")
            # The path begins with the start: entry l + 1 is the end of level l.
            bottom.scatter(*chains[:, level + 1].T, s=2, color=plotting.COLORS[1], linewidths=0)
            for ax in (top, bottom):
                ax.set(xlim=(-1, 1), ylim=(-1, 1), xticks=[-1, 0, 1], yticks=[-1, 0, 1], aspect="equal")
                ax.grid(visible=False)
        fig.colorbar(image, ax=axes[0], label="$Q - \\max Q$", fraction=0.03, extend="min")
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
