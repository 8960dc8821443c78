"""Ways to get plans out of one diffusion planner in three mazes: success, and return.

    python paper_figures/prior_guidance/fig_schemes.py

Small dots are seeds (a planner and all that is learned on it, 100 episodes each), large ones their mean. The
return is latched: once the goal is reached, every step that follows counts, as in Prior Guidance's code; it is
shown as a share of the steps an episode has. A plan is followed for so many steps as each maze's study says. From
`results/*-cpu_seed*.json`; the numbers are in `schemes.md`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from eqgen import plotting
from eqgen.envs.maze import MAZES


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
LAYOUTS = ("umaze", "medium", "large")


def studies(layout: str, results: Path = HERE / "results") -> list[dict[str, Any]]:
    """The result files of a maze, one per seed, as they are."""
    return [json.loads(path.read_text()) for path in sorted(results.glob(f"{layout}-cpu_seed?.json"))]


def outcomes(study: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By scheme, of one seed's episodes with plans followed as the study says: success, the mean of the steps to
    the goal where it was reached, and the mean return and latched return."""
    found = {}
    for name in SCHEMES:
        row = study["rows"].get(f"{name} {study['study']['replan_every']}")
        if row is None:
            continue
        (result,) = row["seeds"]
        steps = [step for step in result["steps_to_goal"] if step is not None]
        found[name] = dict(
            success=len(steps) / row["episodes"],
            steps=float(np.mean(steps)) if steps else np.nan,
            returns=float(np.mean(result["returns"])),
            latched=float(np.mean(result["latched"])),
        )
    return found


def draw(results: Path = HERE / "results", out: Path = HERE / "schemes") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    seeds = {layout: [outcomes(study) for study in studies(layout, results)] for layout in LAYOUTS}
    seeds = {layout: found for layout, found in seeds.items() if found}
    if not seeds:
        raise FileNotFoundError("There is no result to draw: make some with mazes.py.")
    with plotting.style():
        shape = dict(width=plotting.TEXT_WIDTH, aspect=1.15, sharey=True, sharex=True, squeeze=False)
        fig, axes = plotting.subplots(2, len(seeds), **shape)
        for column, (layout, found) in zip(axes.T, seeds.items()):
            limit = MAZES[layout]().max_steps
            for number, name in enumerate(SCHEMES):
                rows = [seed[name] for seed in found if name in seed]
                color = plotting.COLORS[
                    0 if name.startswith("planner") else 1 if name.startswith("pg") else 2
                ]
                shares = ([r["success"] for r in rows], [r["latched"] / limit for r in rows])
                for ax, values in zip(column, shares if rows else ()):
                    ax.plot(values, np.full(len(values), number), "o", color=color, markersize=2.5, alpha=0.5)
                    ax.plot(np.mean(values), number, "o", color=color, markersize=5)
            column[0].set(title=layout, xlabel="success", xlim=(-0.03, 1.03))
            column[1].set(xlabel="latched return / steps")
        for ax in axes.flat:
            ax.grid(axis="y", linewidth=0.4, alpha=0.4)
            ax.tick_params(labelbottom=True)
        axes[0, 0].set_yticks(range(len(SCHEMES)), list(SCHEMES.values()))
        axes[0, 0].invert_yaxis()
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
