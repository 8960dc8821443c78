"""NC-LQL in Boltzmann mode with w fixed and with w adapted to the spread of actions, by the scale of rewards.

    python paper_figures/nclql/fig_temperature.py

Above, the return of evaluation episodes on Pendulum-v1 (mean over 20 episodes; over three seeds mean and 95 %
bootstrap band); below, w of each seed on a logarithmic scale. From `results/temperature-cpu_*.json`.
"""

from pathlib import Path

from eqgen import plotting, studies


HERE = Path(__file__).parent
SCALES = {"0.02": "rewards times 0.02", "0.2": "0.2 (default)", "2.0": "2"}
LABELS = {"fixed": "$w$ fixed", "spread": "$w$ adapted"}
LOOKS = {
    "fixed": dict(color=plotting.COLORS[0], linestyle="-"),
    "spread": dict(color=plotting.COLORS[1], linestyle="--"),
}


def draw(results: Path = HERE / "results", out: Path = HERE / "temperature") -> list[Path]:
    """Writes the figure as PDF and PNG."""
    with plotting.style():
        fig, axes = plotting.subplots(2, 3, width=plotting.TEXT_WIDTH, aspect=0.65, sharex=True, sharey="row")
        for (top, bottom), (scale, title) in zip(axes.T, SCALES.items()):
            for temperature, look in LOOKS.items():
                file = results / f"temperature-cpu_{temperature}-{scale}.json"
                steps, returns = studies.read_curve(file)
                plotting.learning_curve(top, steps / 1000, returns, label=LABELS[temperature], **look)
                learning, w = studies.read_curve(file, "inverse_temperature")
                bottom.plot(learning / 1000, w.T, linewidth=0.9, **look)
            top.set(title=title)
            bottom.set(yscale="log", xlabel="thousand environment steps")
        axes[0, 0].set_ylabel("evaluation return")
        axes[0, 2].legend(loc="lower right")
        axes[1, 0].set_ylabel("inverse temperature $w$")
        return plotting.save(fig, out)


if __name__ == "__main__":
    print(*draw(), sep="\n")
