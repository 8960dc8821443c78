"""Learning curves of SOM and SAC, one panel per task, from `results/<study>_<agent>.json`.

    python paper_figures/som/fig_learning_curves.py

A panel shows the return of evaluation episodes (mean over episodes; over several seeds mean and 95 % bootstrap
band, a single seed as a line). A run that was stopped early ends early.
"""

from pathlib import Path

from eqgen import plotting, studies


HERE = Path(__file__).parent
PANELS = {
    "Pendulum-v1": "pendulum",
    "HalfCheetah-v5": "halfcheetah",
    "Hopper-v5": "hopper",
    "Walker2d-v5": "walker2d",
    "Ant-v5": "ant",
    "Humanoid-v5": "humanoid",
}
LABELS = {"SOM (safe)": "som-safe", "SOM (paper)": "som-paper", "SAC": "sac"}
LOOKS = {
    label: dict(color=color, linestyle=style)
    for label, color, style in zip(LABELS, plotting.COLORS, ("-", ":", "--"))
}


def draw(results: Path = HERE / "results", out: Path = HERE / "learning_curves") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    size = studies.largest_size(results)
    files = lambda task: {label: results / f"{task}-{size}_{agent}.json" for label, agent in LABELS.items()}
    return studies.draw_curves({title: files(task) for title, task in PANELS.items()}, LOOKS, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
