"""Samples of NC-LQL and LQL on multimodal bandits, and mixing from one mode, from `results/bandit_<name>.json`.

    python paper_figures/nclql/fig_bandit.py

Rows of squares: bandits whose reward has four or eight equal bumps, or four unequal ones (the darker the higher);
columns: samplers on critics learned from 10 000 uniform actions, with 400 of the actions they draw. Below each the
entropy over that of equal shares (of exp(w r): the number in the row's label), the share of actions within three
standard deviations of a mode, and the total variation to exp(w r) (of as many exact draws: likewise). Last row:
chains that all start in one of four modes, with exact scores.
"""

import json
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from eqgen import plotting


HERE = Path(__file__).parent
STD = 0.1
COLUMNS = {
    "reference": "NC-LQL\nreference, 20 steps",
    "boltzmann": "NC-LQL\nBoltzmann, 20 steps",
    "boltzmann-long": "NC-LQL\nBoltzmann, 500 steps",
    "lql": "LQL\n20 steps",
    "lql-long": "LQL\n500 steps",
}
ROWS = {"four": "four bumps", "eight": "eight bumps", "unequal": "four, unequal"}


def entropy(shares):
    """Over that of equal shares."""
    shares = np.asarray(shares)
    return np.sum(shares * np.log(1 / np.maximum(shares, 1e-12))) / np.log(len(shares))


def bumps(action, centres, heights):
    """The logarithm of the reward, which `plotting.density` takes."""
    square = jnp.sum((action[None] - centres) ** 2, axis=-1)
    return jnp.log(jnp.sum(heights * jnp.exp(-square / (2 * STD**2))) + 1e-6)


def draw_samplers(axes, content, centres, heights):
    """One row of squares."""
    ticks = dict(xlim=(-1, 1), ylim=(-1, 1), xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    for ax, name in zip(axes, COLUMNS):
        measures = content["samplers"][name]
        plotting.density(ax, partial(bumps, centres=centres, heights=heights), cmap="Greys")
        samples = np.array(measures["samples"])
        ax.scatter(*samples.T, s=2, color=plotting.COLORS[1], linewidths=0)
        note = f"H {measures['entropy']:.2f}   in {measures['within_3_std']:.2f}   TV {measures['tv']:.2f}"
        ax.set(xlabel=note, **ticks)
        ax.xaxis.label.set_fontsize(6.5)


def draw_mixing(left, right, records):
    """Entropy and share in a mode, over steps."""
    for dim, color in zip((2, 4, 8, 16), plotting.COLORS):
        for sampler, style, marker in (("annealed", "-", "o"), ("plain", ":", "s")):
            chosen = [r for r in records if r["dimension"] == dim and r["sampler"] == sampler]
            steps = [r["steps"] for r in chosen]
            look = dict(color=color, linestyle=style, marker=marker, markersize=2.5)
            left.semilogx(steps, [r["entropy"] for r in chosen], label=f"{sampler}, d = {dim}", **look)
            right.semilogx(steps, [r["in_mode"] for r in chosen], **look)
    left.set(xlabel="steps", ylabel="entropy / ln 4", ylim=(-0.05, 1.05))
    right.set(xlabel="steps", ylabel="share in a mode", ylim=(-0.05, 1.05))


def draw(results: Path = HERE / "results", out: Path = HERE / "bandit") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    load = lambda name: json.loads((results / f"bandit_{name}.json").read_text())
    with plotting.style():
        fig, axes = plotting.subplots(4, 5, width=plotting.TEXT_WIDTH, aspect=1.22)
        for row, (name, label) in zip(axes, ROWS.items()):
            content = load(name)
            centres, heights = (np.array(content["settings"][key]) for key in ("centres", "heights"))
            draw_samplers(row, content, centres, heights)
            measures = content["samplers"]["reference"]
            exact = f"H {entropy(measures['exact']):.2f}, TV {measures['tv_exact']:.2f}"
            row[0].set_ylabel(f"{label}\n(exact: {exact})", fontsize=7)
            for ax in row[1:]:
                ax.set_yticklabels([])
        for ax, title in zip(axes[0], COLUMNS.values()):
            ax.set_title(title, fontsize=7)
        grid = axes[3, 0].get_gridspec()
        for ax in axes[3]:
            ax.remove()
        left, right = fig.add_subplot(grid[3, :2]), fig.add_subplot(grid[3, 2:4])
        draw_mixing(left, right, load("mixing")["records"])
        handles, labels = left.get_legend_handles_labels()
        right.legend(handles, labels, loc="center left", bbox_to_anchor=(1.03, 0.5))
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
