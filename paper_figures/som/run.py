"""Runs the SOM experiments on real environments and keeps what the figures need.

    python paper_figures/som/run.py halfcheetah-cpu              one row of EXPERIMENTS, all its agents
    python paper_figures/som/run.py halfcheetah-cpu --only sac   one agent of it
    python paper_figures/som/run.py --list

Every agent of a row is trained in a run directory below `runs/som/`, where an interrupted one goes on, and
leaves `results/<row>_<agent>.json`: settings, versions, hardware, and the evaluations of every seed.
The seeds reported here are 0 and up; anything that was tuned was tuned on seeds 100 and up.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from eqgen import experiments
from eqgen.algorithms.base import AbstractAgent
from eqgen.algorithms.sac import SAC
from eqgen.algorithms.som import SOM
from eqgen.files import replacing
from eqgen.runs import Run
from eqgen.training import OnlineSettings


RESULTS = Path(__file__).parent / "results"

AGENTS: dict[str, AbstractAgent] = {"som-safe": SOM.safe(), "som-paper": SOM.paper(), "sac": SAC()}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the experiment list: an environment, a size, the seeds."""

    env: str
    size: str
    seeds: tuple[int, ...]
    changes: dict = dataclasses.field(default_factory=dict)
    """Fields of `OnlineSettings` that differ from the preset's."""
    agent: dict = dataclasses.field(default_factory=dict)
    """Fields of every agent that differ from the size's."""

    @property
    def settings(self) -> OnlineSettings:
        return dataclasses.replace(OnlineSettings.preset(self.size, self.env), **self.changes)


EXPERIMENTS = {
    "pendulum-cpu": Row(
        "gymnax/Pendulum-v1",
        "cpu",
        (0, 1, 2, 3, 4),
        dict(eval_every=1_000, eval_episodes=20),
        dict(hidden=(64, 64)),
    ),
    "halfcheetah-cpu": Row("mujoco/HalfCheetah-v5", "cpu", (0,)),
    "hopper-cpu": Row("mujoco/Hopper-v5", "cpu", (0,)),
    "pendulum-smoke": Row("gymnax/Pendulum-v1", "smoke", (0, 1)),
}


def run(name: str, agent_name: str, folder: Path = Path("runs/som"), results: Path = RESULTS) -> Path:
    """Trains (or goes on training) one agent of one row, and writes its result file."""
    row = EXPERIMENTS[name]
    agent = dataclasses.replace(AGENTS[agent_name].resized(row.size), **row.agent)
    out = folder / f"{name}_{agent_name}"
    if out.exists():
        finished = experiments.resume(out)
    else:
        finished = experiments.train(agent, row.env, row.settings, seeds=row.seeds, out=out)
    return write_result(finished, results / f"{name}_{agent_name}.json")


def write_result(run: Run, path: Path) -> Path:
    """Settings, provenance and the evaluation records of a run, as one small file."""
    records = [record for record in run.metrics() if "eval/return" in record]
    content = {
        "settings": run.settings,
        "provenance": json.loads((run.path / "provenance.json").read_text()),
        "records": records,
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", choices=sorted(EXPERIMENTS))
    parser.add_argument("--only", choices=sorted(AGENTS), help="one agent instead of all")
    parser.add_argument("--list", action="store_true", help="what there is to run")
    args = parser.parse_args()
    if args.list or args.row is None:
        for name, row in EXPERIMENTS.items():
            print(f"{name}: {row.env}, {row.settings.total_steps} steps, seeds {row.seeds}")
        return
    for agent_name in [args.only] if args.only else AGENTS:
        print(run(args.row, agent_name))


if __name__ == "__main__":
    main()
