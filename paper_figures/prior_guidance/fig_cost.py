"""What a decision costs and what it is worth: milliseconds against success in umaze.

    python paper_figures/prior_guidance/fig_cost.py

Time of one decision (a plan and the action towards its second state) at the `cpu` size for one observation, from
`benchmarks/results/planning.json`; success of 100 episodes, mean of three seeds and their range, from
`results/umaze-cpu_seed*.json`. A plan is followed for five steps.
"""

import json
from pathlib import Path

import numpy as np
from fig_schemes import SCHEMES, outcomes, studies

from eqgen import plotting


HERE = Path(__file__).parent
TIMES = HERE.parent.parent / "benchmarks" / "results" / "planning.json"
TIMED = {
    "planner unconditional": ("planner unconditional", "planner held", "planner zero"),
    "planner cfg": ("planner cfg:1.2:1.0",),
    "planner cg": ("planner cg:0.1",),
    "planner mcss:50": ("planner mcss:50",),
    "pg prior": ("pg prior", "pg prior-sampled", "pg-corrected prior", "pg-corrected prior-sampled"),
    "meanflow unconditional": ("meanflow unconditional", "meanflow zero"),
    "meanflow-pg prior": ("meanflow-pg prior", "meanflow-pg prior-sampled"),
    "meanflow mcss:50": ("meanflow mcss:50",),
}
MARKERS = {0: "os^vDP", 1: "os^v", 2: "os^vD"}
"""For each colour: planners, priors, MeanFlow."""


def draw(results: Path = HERE / "results", times: Path = TIMES, out: Path = HERE / "cost") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    seeds = [outcomes(study) for study in studies("umaze", results)]
    if not seeds:
        raise FileNotFoundError("There is no result to draw: make some with mazes.py.")
    rows = json.loads(times.read_text())["rows"]
    with plotting.style():
        fig, ax = plotting.subplots(width=plotting.TEXT_WIDTH, aspect=0.45)
        unused = {group: iter(markers) for group, markers in MARKERS.items()}
        for timed, names in TIMED.items():
            group = 0 if timed.startswith("planner") else 1 if timed.startswith("pg") else 2
            color = plotting.COLORS[group]
            for name in names:
                marker = next(unused[group])
                success = np.array([seed[name]["success"] for seed in seeds])
                mean = success.mean()
                error = np.array([[mean - success.min()], [success.max() - mean]])
                ms = rows[f"cpu: {timed}"]["1"]["best_wall_ms"]
                look = dict(color=color, markersize=4, linewidth=0.8, label=SCHEMES[name])
                ax.errorbar(ms, mean, error, fmt=marker, **look)
        ax.set(xscale="log", xlabel="milliseconds a decision", ylabel="success", ylim=(-0.03, 1.05))
        fig.legend(loc="outside right center")
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
