"""Learning curves of SOM and SAC, one panel per task, from `results/<row>_<agent>.json`.

    python paper_figures/som/fig_learning_curves.py

A panel shows the return of evaluation episodes (mean over episodes; over several seeds mean and 95 % bootstrap
band, a single seed as a line). A run that was stopped early ends early.
"""

import json
from pathlib import Path

import numpy as np

from eqgen import plotting


HERE = Path(__file__).parent
PANELS = {
    "pendulum-cpu": "Pendulum-v1",
    "halfcheetah-cpu": "HalfCheetah-v5",
    "hopper-cpu": "Hopper-v5",
}
STYLES = dict(zip(("som-safe", "som-paper", "sac"), ("-", ":", "--")))
LABELS = {"som-safe": "SOM (safe)", "som-paper": "SOM (paper)", "sac": "SAC"}


def curve(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps, and returns as (seeds, evaluations)."""
    records = json.loads(path.read_text())["records"]
    seeds = sorted({record["seed"] for record in records})
    steps = sorted({record["env_step"] for record in records})
    returns = {(record["seed"], record["env_step"]): record["eval/return"] for record in records}
    return np.array(steps), np.array([[returns[seed, step] for step in steps] for seed in seeds])


def draw(results: Path = HERE / "results", out: Path = HERE / "learning_curves") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    present = {row: [a for a in LABELS if (results / f"{row}_{a}.json").exists()] for row in PANELS}
    rows = [row for row in PANELS if present[row]]
    with plotting.style():
        fig, axes = plotting.subplots(1, len(rows), width=plotting.TEXT_WIDTH, aspect=0.75, squeeze=False)
        lines = {}
        for ax, row in zip(axes[0], rows):
            for agent in present[row]:
                steps, returns = curve(results / f"{row}_{agent}.json")
                look = dict(color=plotting.COLORS[list(LABELS).index(agent)], linestyle=STYLES[agent])
                plotting.learning_curve(ax, steps / 1000, returns, **look)
                lines[LABELS[agent]] = ax.lines[-1]
            ax.set(title=PANELS[row], xlabel="thousand environment steps")
        axes[0, 0].set_ylabel("evaluation return")
        fig.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
