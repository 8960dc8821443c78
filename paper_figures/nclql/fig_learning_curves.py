"""Learning curves of NC-LQL and LQL, one panel per task, beside SOM and SAC from `paper_figures/som/results`.

    python paper_figures/nclql/fig_learning_curves.py

A panel shows the return of evaluation episodes (mean over episodes; over several seeds mean and 95 % bootstrap
band, a single seed as a line). A run that was stopped early ends early; a task without a run has no panel.
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
    "Swimmer-v5": "swimmer",
}
LABELS = {
    "NC-LQL (reference)": "nclql-reference",
    "NC-LQL (Boltzmann)": "nclql-boltzmann",
    "LQL": "lql",
}
BESIDE = {"SOM": "som-safe", "SAC": "sac"}
LOOKS = {
    label: dict(color=color, linestyle=style)
    for label, color, style in zip(
        LABELS | BESIDE, plotting.COLORS, ("-", "--", "-.", ":", (0, (4, 1, 1, 1, 1, 1)))
    )
}


def draw(
    results: Path = HERE / "results",
    beside: Path = HERE.parent / "som" / "results",
    out: Path = HERE / "learning_curves",
) -> list[Path]:
    """Writes the figure as PDF and PNG. SOM and SAC are read from `beside`."""

    size = studies.largest_size(results)

    def files(task):
        own = {label: results / f"{task}-{size}_{agent}.json" for label, agent in LABELS.items()}
        others = {label: beside / f"{task}-{size}_{agent}.json" for label, agent in BESIDE.items()}
        return own | others if any(path.exists() for path in own.values()) else {}

    return studies.draw_curves({title: files(task) for title, task in PANELS.items()}, LOOKS, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
