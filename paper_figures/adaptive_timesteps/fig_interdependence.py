"""What 200 steps at one tenth of the times do to the loss at all of them, and how well a few times stand for all.

    python paper_figures/adaptive_timesteps/fig_interdependence.py

Left, the change of the held-out loss relative to what it was, by the part that was trained (row) and the part that
is judged (column), after 10,000 uniform updates on digits; mean over five seeds. Right, the correlation over looks
of the drop at S with the drop at all times, by the size of S: as the sampler selects S, at random, and the first
times; mean and range of five seeds. From `results/interdependence.json` and `results/surrogate.json`.
"""

import json
from pathlib import Path

import matplotlib.colors
import numpy as np
from curves import HERE, RESULTS

from eqgen import plotting


def draw(out: Path = HERE / "interdependence") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    content = json.loads((RESULTS / "interdependence.json").read_text())
    relative = (np.array(content["change"]) / np.array(content["loss"])[:, None]).mean(axis=0)
    subsets = json.loads((RESULTS / "surrogate.json").read_text())["subsets"]
    with plotting.style():
        fig, (left, right) = plotting.subplots(
            1, 2, width=plotting.TEXT_WIDTH, aspect=0.75, layout="constrained"
        )
        norm = matplotlib.colors.SymLogNorm(10, vmin=-1000, vmax=1000)
        image = left.imshow(100 * relative, cmap="RdBu_r", norm=norm, origin="lower")
        left.grid(False)
        ticks = dict(ticks=range(0, 10, 3), labels=[f"{100 * part}" for part in range(0, 10, 3)])
        left.set_xticks(**ticks)
        left.set_yticks(**ticks)
        left.set(xlabel="loss at $t$ from ...", ylabel="trained at $t$ from ...")
        fig.colorbar(image, ax=left, label="change of the loss, %")
        for number, name in enumerate(("selected", "random", "first")):
            values = np.array([subsets[size][name] for size in subsets])
            mean = values.mean(axis=1)
            errors = mean - values.min(axis=1), values.max(axis=1) - mean
            x = np.arange(len(subsets)) + 0.12 * (number - 1)
            right.errorbar(x, mean, errors, fmt="o", color=plotting.COLORS[number], markersize=4, label=name)
        right.set_xticks(range(len(subsets)), list(subsets))
        right.axhline(0, color="0.6", linewidth=0.8)
        right.set(xlabel="size of $S$", ylabel="correlation with the total drop", ylim=(-0.4, 1.05))
        right.legend(loc="lower right")
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
