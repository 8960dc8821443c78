"""Samples of NC-LQL and LQL on multimodal bandits, and mixing from one mode, from `results/bandit_<name>.json`.

    python paper_figures/nclql/fig_bandit.py

Squares: a bandit whose soft policy (grey) has four unequal or eight equal modes, and 400 actions of each sampler
on critics learned from 10 000 uniform actions. Under each the entropy H of the modes over that of equal shares, the
share of actions within three standard deviations of a mode, and the total variation to the soft policy; at the
left what exact draws have. Last row: chains that all start in one of four modes, with exact scores.
"""

import json
from pathlib import Path

import numpy as np

from eqgen import plotting
from eqgen.envs.catalog import make


HERE = Path(__file__).parent
COLUMNS = {
    "reference": "NC-LQL, reference\n20 steps",
    "boltzmann": "NC-LQL, Boltzmann\n20 steps",
    "boltzmann-long": "NC-LQL, Boltzmann\n500 steps",
    "lql": "LQL\n20 steps",
    "lql-long": "LQL\n500 steps",
}
ROWS = {"four": "four modes", "eight": "eight modes"}


def entropy(shares):
    """Over that of equal shares."""
    shares = np.asarray(shares)
    return np.sum(shares * np.log(1 / np.maximum(shares, 1e-12))) / np.log(len(shares))


def draw_samplers(axes, content):
    """One row of squares."""
    bandit = make(content["settings"]["bandit"])
    ticks = dict(xlim=(-1, 1), ylim=(-1, 1), xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    for ax, name in zip(axes, COLUMNS):
        measures = content["samplers"][name]
        plotting.density(ax, bandit.log_density, cmap="Greys")
        ax.scatter(*np.transpose(measures["samples"]), s=2, color=plotting.COLORS[1], linewidths=0)
        note = (
            f"H {measures['entropy']:.2f}, TV {measures['tv']:.2f}\n{measures['within_3_std']:.0%} in a mode"
        )
        ax.set(**ticks)
        ax.set_xlabel(note, fontsize=7)


def draw_mixing(axes, records):
    """Entropy, and share of chains in a mode, over steps. Plain chains stay in theirs in every dimension."""

    def curves(sampler, dim, label, **look):
        chosen = [r for r in records if r["dimension"] == dim and r["sampler"] == sampler]
        for ax, measure in zip(axes, ("entropy", "in_mode")):
            steps = [r["steps"] for r in chosen]
            ax.semilogx(steps, [r[measure] for r in chosen], markersize=3, label=label, **look)

    for dim, color, marker in zip((2, 4, 8, 16), plotting.COLORS, "os^v"):
        curves("annealed", dim, f"annealed, d = {dim}", color=color, marker=marker)
    curves("plain", 16, "plain, d = 16", color="k", linestyle=":")
    for ax, label in zip(axes, ("entropy / ln 4", "share in a mode")):
        ax.set(xlabel="steps", ylabel=label, ylim=(-0.05, 1.05))
    axes[1].legend(loc="center left", bbox_to_anchor=(1.05, 0.5))


def draw(results: Path = HERE / "results", out: Path = HERE / "bandit") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    load = lambda name: json.loads((results / f"bandit_{name}.json").read_text())
    with plotting.style():
        fig, ax = plotting.subplots(width=plotting.TEXT_WIDTH, aspect=0.85)
        ax.remove()
        upper, lower = fig.subfigures(2, 1, height_ratios=(2, 1))
        squares = upper.subplots(2, 5, sharex=True, sharey=True)
        for row, (name, label) in zip(squares, ROWS.items()):
            content = load(name)
            draw_samplers(row, content)
            measures = content["samplers"]["reference"]
            exact = f"exact: H {entropy(measures['exact']):.2f}, TV {measures['tv_exact']:.2f}"
            row[0].set_ylabel(f"{label}\n{exact}", fontsize=7)
        for ax, title in zip(squares[0], COLUMNS.values()):
            ax.set_title(title, fontsize=7)
        draw_mixing(lower.subplots(1, 2), load("mixing")["records"])
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
