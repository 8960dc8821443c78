"""One-step samples of SOM's actor on the four-mode bandit, from `results/bandit_<variant>.json`.

    python paper_figures/som/fig_bandit.py

Each panel: the density exp(Q) in the background and 1000 actions, each from one network evaluation, drawn where
they fall before clipping (a note counts those outside the picture). Below: the share of samples per mode beside
the weights.
"""

import json
from pathlib import Path

import numpy as np

from eqgen import plotting
from eqgen.envs.toys import mixture


HERE = Path(__file__).parent
TITLES = {
    "safe": "truncated, raw score",
    "safe-ode": "truncated, ODE target",
    "denoising": "denoising, raw score",
    "paper": "gradient, unit (paper)",
}
EXTENT = (-1.25, 1.25, -1.25, 1.25)


def draw(results: Path = HERE / "results", out: Path = HERE / "bandit") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    files = {name: results / f"bandit_{name}.json" for name in TITLES}
    present = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    bandit = mixture()
    with plotting.style():
        fig, axes = plotting.subplots(2, len(present), width=1.75 * len(present), aspect=1.0, squeeze=False)
        for (top, bottom), (name, content) in zip(axes.T, present.items()):
            plotting.density(top, bandit.log_density, extent=EXTENT)
            samples = np.array(content["samples"])
            top.scatter(*samples.T, s=1.5, color=plotting.COLORS[1], linewidths=0)
            top.set(
                xlim=EXTENT[:2], ylim=EXTENT[2:], title=TITLES[name], xticks=[-1, 0, 1], yticks=[-1, 0, 1]
            )
            outside = float(np.mean(np.abs(samples).max(axis=1) > EXTENT[1]))
            measures = content["one_step"]
            note = (
                f"{outside:.0%} outside" if outside > 0.005 else f"within 3 S: {measures['within_3_std']:.2f}"
            )
            top.text(0.5, 0.02, note, transform=top.transAxes, ha="center", va="bottom", fontsize=6)
            modes, exact = np.arange(4), content["exact"]["fractions"]
            bottom.bar(modes - 0.2, exact, 0.4, label="exact sampler", color="0.6")
            bottom.bar(modes + 0.2, measures["fractions"], 0.4, label="one step", color=plotting.COLORS[1])
            bottom.set(xlabel="mode", xticks=modes, ylim=(0, 1))
        axes[1, 0].set_ylabel("share of samples")
        axes[1, 0].legend()
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
