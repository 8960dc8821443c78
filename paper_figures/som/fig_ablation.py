"""SOM on Pendulum, one setting changed at a time.

    python paper_figures/som/fig_ablation.py

The last return and the mean of all evaluations over 20,000 steps, three seeds: mean, worst and best. "unit" takes
the score to unit length times w, as `SOM.paper()` does. From `results/ablation-cpu_*.json`.
"""

from pathlib import Path

from eqgen import studies


HERE = Path(__file__).parent
GROUPS = {
    "safe": {"SOM.safe()": "safe"},
    "K": {"K = 4": "K-4", "K = 10": "K-10", "K = 100": "K-100", "K = 500": "K-500"},
    "alpha": {
        r"$\alpha$ = 0.2": "alpha-0.2",
        r"$\alpha$ = 1": "alpha-1",
        r"$\alpha$ = 20": "alpha-20",
    },
    "w": {f"unit score, w = {w}": f"unit-w-{w}" for w in (1, 5, 10, 25, 50)},
    "N": {"N = 1": "N-1", "N = 32": "N-32"},
    "r = t": {f"share of r = t: {share}": f"equal-times-{share}" for share in (0, 0.25, 0.75)},
    "a_0": {"$a_0$ of the policy": "a0-policy", "$a_0$ of both": "a0-mix"},
    "Q": {"Q over the batch": "Q-batch", "Q over proposals": "Q-group", "Q as it is": "Q-none"},
    "steps": {"two steps": "steps-2", "four steps": "steps-4"},
    "estimator": {"estimator of the paper": "gradient", "values, unrestricted": "denoising"},
}


def draw(results: Path = HERE / "results", out: Path = HERE / "ablation") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    files = lambda names: {label: results / f"ablation-cpu_{name}.json" for label, name in names.items()}
    return studies.draw_ablation({group: files(names) for group, names in GROUPS.items()}, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
