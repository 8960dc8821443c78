"""NC-LQL on Pendulum in both modes, one setting changed at a time.

    python paper_figures/nclql/fig_ablation.py

The last return and the mean of all evaluations over 10,000 steps, three seeds: mean, worst and best. L levels of T
steps each, P chains an action. From `results/ablation-*-cpu_*.json`.
"""

from pathlib import Path

from eqgen import studies


HERE = Path(__file__).parent
COMMON = {"L = 2": "L-2", "L = 5": "L-5", "T = 1": "T-1", "T = 4": "T-4"}
LAST = {"joint loss": "joint", "P = 4": "P-4"}
GROUPS = {
    "boltzmann": {
        "Boltzmann mode": "",
        **{f"w = {w}": f"w-{w}" for w in (15, 50, 500, 1500)},
        **COMMON,
        r"$\sigma$ from 0.1 to 0.004": "sigma-0.1",
        **LAST,
    },
    "reference": {
        "reference mode": "",
        "w = 50": "w-50",
        "w = 5000": "w-5000",
        **COMMON,
        r"$\sigma$ from 0.5 to 0.005": "sigma-0.5",
        **LAST,
    },
}


def draw(results: Path = HERE / "results", out: Path = HERE / "ablation") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    file = lambda mode, name: results / f"ablation-{mode}-cpu_{mode}{'-' * bool(name)}{name}.json"
    groups = {
        mode: {label: file(mode, name) for label, name in names.items()} for mode, names in GROUPS.items()
    }
    return studies.draw_ablation(groups, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
