"""Ways to get plans out of one diffusion planner in a maze: success, return, and steps to the goal.

    python paper_figures/prior_guidance/fig_schemes.py

Small dots are seeds (a planner and all that is learned on it, 100 episodes each), large ones their mean. The
return is latched: once the goal is reached, every step that follows counts, as in Prior Guidance's code. A plan is
followed for five steps. From `results/umaze-cpu_seed*.json`.
"""

import json
from pathlib import Path

import numpy as np

from eqgen import plotting


HERE = Path(__file__).parent
SCHEMES = {
    "planner unconditional": "N(0, I), fresh noise",
    "planner held": "N(0, I), noise held",
    "planner zero": "latent 0",
    "planner cg:0.1": "CG, w = 0.1",
    "planner cfg:1.2:1.0": "CFG, w = 1.2",
    "planner mcss:50": "MCSS, K = 50",
    "pg prior": "PG, mean",
    "pg prior-sampled": "PG, sampled",
    "pg-corrected prior": "PG corrected, mean",
    "pg-corrected prior-sampled": "PG corrected, sampled",
    "meanflow unconditional": "MeanFlow, N(0, I)",
    "meanflow zero": "MeanFlow, latent 0",
    "meanflow mcss:50": "MeanFlow, MCSS, K = 50",
    "meanflow-pg prior": "MeanFlow, PG, mean",
    "meanflow-pg prior-sampled": "MeanFlow, PG, sampled",
}
REPLAN_EVERY = 5


def outcomes(path: Path) -> dict[str, tuple[float, float, float]]:
    """Success, latched return and mean steps to the goal of each row of a result file."""
    found = {}
    for key, row in json.loads(path.read_text())["rows"].items():
        for result in row["seeds"]:
            steps = [step for step in result["steps_to_goal"] if step is not None]
            success = len(steps) / row["episodes"]
            found[key] = (
                success,
                float(np.mean(result["latched"])),
                float(np.mean(steps)) if steps else np.nan,
            )
    return found


def draw(results: Path = HERE / "results", out: Path = HERE / "schemes") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    seeds = [outcomes(path) for path in sorted(results.glob("umaze-cpu_seed?.json"))]
    if not seeds:
        raise FileNotFoundError("There is no result to draw: make some with mazes.py.")
    rows = [name for name in SCHEMES if any(f"{name} {REPLAN_EVERY}" in seed for seed in seeds)]
    with plotting.style():
        fig, axes = plotting.subplots(1, 3, width=plotting.TEXT_WIDTH, aspect=1.15, sharey=True)
        for number, name in enumerate(rows):
            values = np.array([s[f"{name} {REPLAN_EVERY}"] for s in seeds if f"{name} {REPLAN_EVERY}" in s])
            color = plotting.COLORS[0 if name.startswith("planner") else 1 if name.startswith("pg") else 2]
            for ax, column in zip(axes, values.T):
                ax.plot(column, np.full(len(column), number), "o", color=color, markersize=2.5, alpha=0.5)
                ax.plot(np.nanmean(column), number, "o", color=color, markersize=5)
        axes[0].set_yticks(range(len(rows)), [SCHEMES[name] for name in rows])
        axes[0].invert_yaxis()
        axes[0].set(xlabel="success", xlim=(-0.03, 1.03))
        axes[1].set(xlabel="latched return", xlim=(0, 300))
        axes[2].set(xlabel="steps to the goal", xlim=(0, None))
        for ax in axes:
            ax.grid(axis="y", linewidth=0.4, alpha=0.4)
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
