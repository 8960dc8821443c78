"""The laptop race: what each agent has learned on HalfCheetah-v5 after so many minutes of one machine.

    python benchmarks/race.py                            three agents, three seeds, an hour each, one after another
    python benchmarks/race.py --minutes 20 --seeds 0     shorter, or some (also: --agents sac)
    python benchmarks/race.py --draw                     draws the figure of what is there

Each race of so many minutes is a folder `benchmarks/results/race-<minutes>` with a result file of each agent and
seed, and their figure. A runner should have the machine for itself. Its clock is its run's: compilation, training,
and the evaluations in between; the same command goes on where it was interrupted.

All have the loop and the widths of the `cpu` size, one update for four steps. SOM is `SOM.safe()`, 32 samples of
the critic for a score, and NC-LQL the mode that draws from the Boltzmann law, as in `paper_figures`.
"""

import argparse
import dataclasses
import os
import signal
import threading
from pathlib import Path

import numpy as np

from eqgen import experiments, plotting
from eqgen.algorithms.base import AbstractAgent
from eqgen.algorithms.nclql import NCLQL
from eqgen.algorithms.sac import SAC
from eqgen.algorithms.som import SOM
from eqgen.runs import Run
from eqgen.sessions import Interrupted
from eqgen.studies import read_result, write_result
from eqgen.training import OnlineSettings
from measure import RESULTS


ENV = "mujoco/HalfCheetah-v5"
AGENTS: dict[str, AbstractAgent] = {
    "sac": SAC().resized("cpu"),
    "som": SOM.safe().resized("cpu"),
    "nclql": NCLQL.boltzmann(learning_rate=3e-4).resized("cpu"),
}
LABELS = {"sac": "SAC", "som": "SOM, safe", "nclql": "NC-LQL, Boltzmann"}
LOOP = dataclasses.replace(
    OnlineSettings.preset("cpu", ENV),
    total_steps=100_000_000,  # none gets there
    eval_every=20_000,
    eval_episodes=5,
    checkpoint_every=20_000,
)


def run(agent: str, seed: int, minutes: float, out: Path) -> None:
    """Trains until the clock of the run says `minutes`, from wherever it is, and writes its result file."""
    folder = Path("runs") / out.name / f"{agent}_seed{seed}"
    begun, spent = (folder / "settings.json").exists(), 0.0
    if begun and (kept := Run.open(folder).checkpoints()):
        saved = int(kept[0].stem.removeprefix("step_"))  # what came after it will be done again
        spent = max(r["wall_time"] for r in Run.open(folder).metrics() if r["env_step"] <= saved)
    if spent >= 60 * minutes:
        return
    bell = threading.Timer(60 * minutes - spent, os.kill, (os.getpid(), signal.SIGTERM))
    bell.start()
    try:
        if begun:
            experiments.resume(folder)
        else:
            experiments.train(AGENTS[agent], ENV, LOOP, seeds=(seed,), out=folder)
    except Interrupted:
        if bell.is_alive():  # it was not the bell that stopped it
            raise
    finally:
        bell.cancel()
    write_result(Run.open(folder), out / f"{agent}_seed{seed}.json")


def curves(agent: str, out: Path) -> list[dict[str, np.ndarray]]:
    """For each seed, the minutes, environment steps and returns of its evaluations."""
    columns = dict(minutes="wall_time", steps="env_step", returns="eval/return")
    found = []
    for path in sorted(out.glob(f"{agent}_seed*.json")):
        records = read_result(path)["records"]
        found.append({name: np.array([r[key] for r in records], float) for name, key in columns.items()})
        found[-1]["minutes"] /= 60
    return found


def draw(out: Path) -> list[Path]:
    """Returns over minutes, and over environment steps: mean, interval and seeds, as far as all seeds came."""
    with plotting.style():
        fig, axes = plotting.subplots(1, 2, width=plotting.TEXT_WIDTH, aspect=0.7, sharey=True)
        for (agent, label), color in zip(LABELS.items(), plotting.COLORS):
            seeds = curves(agent, out)
            for ax, clock in zip(axes, ("minutes", "steps") if seeds else ()):
                grid = np.linspace(0, min(seed[clock][-1] for seed in seeds), 200)
                values = np.stack([np.interp(grid, seed[clock], seed["returns"]) for seed in seeds])
                scale = 1000 if clock == "steps" else 1
                plotting.learning_curve(ax, grid / scale, values, label=label, color=color, show_seeds=True)
        axes[0].set(xlabel="minutes of two cores", ylabel="evaluation return")
        axes[1].set(xlabel="thousand environment steps")
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return plotting.save(fig, out / "curves")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Trains agents against the clock; see the head of this file."
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--agents", nargs="+", choices=list(AGENTS), default=list(AGENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draw", action="store_true", help="only the figure")
    args = parser.parse_args()
    out = RESULTS / f"race-{args.minutes:g}"
    out.mkdir(parents=True, exist_ok=True)
    if not args.draw:
        for seed in args.seeds:
            for agent in args.agents:
                run(agent, seed, args.minutes, out)
    print(*draw(out), sep="\n")
