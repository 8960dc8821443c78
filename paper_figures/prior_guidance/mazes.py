"""Planning in D4RL's mazes: one diffusion planner, all ways to get good plans out of it, on sets made here.

    python paper_figures/prior_guidance/mazes.py                      what there is to run
    python paper_figures/prior_guidance/mazes.py umaze-cpu --seed 0   one seed: set, planner, priors, episodes
    ... umaze-cpu --seed 0 --sweeps                                   alpha, divergences, families, candidates

Per seed: a diffusion planner, Prior Guidance on it (the released code's settings, the corrected ones), the planner
distilled into a MeanFlow planner, Prior Guidance on that. Each is judged by 100 episodes from the same first
states. The planner of the umaze is 32 wide; so narrow a one did not learn the larger mazes, whose planners are 64.
Run directories are made below `runs/prior_guidance`; what was interrupted goes on, and what is done is not done
again.

The seeds reported are 0 and up. Sizes and numbers of updates were tried on seed 100; weights of CG and CFG are
defaults that nobody tuned.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from eqgen import collection, planning
from eqgen.algorithms.meanflow_planner import MeanFlowPlanner
from eqgen.algorithms.planner import DiffusionPlanner
from eqgen.algorithms.prior_guidance import PriorGuidance
from eqgen.data import d4rl
from eqgen.files import replacing
from eqgen.guidance import scheme
from eqgen.offline import OfflineSettings
from eqgen.provenance import provenance


RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/prior_guidance")
ALPHAS = (50.0, 10.0, 1.0, 0.1, 0.01, 0.001)
CANDIDATES = (1, 5, 10, 25, 50, 100, 150, 272)


@dataclasses.dataclass(frozen=True)
class MazeStudy:
    """One maze at one size."""

    layout: str
    size: str = "cpu"
    horizon: int = 16
    steps: int | None = None
    """Of the set; None: as many as D4RL's."""
    updates: int = 6_000
    episodes: int = 100
    replan_every: int = 5
    every_step: bool = True
    """Whether schemes of one plan are also judged with a new one at every step."""
    width: int | None = None
    """Of every transformer; None: as the size has it."""

    def wide(self, learner: Any, **fields: Any) -> Any:
        """The learner at the study's size and width."""
        fields |= {} if self.width is None else {"width": self.width}
        return dataclasses.replace(learner.resized(self.size), **fields)

    @property
    def planner(self) -> DiffusionPlanner:
        fields: dict[str, Any] = dict(target_state="xy", conditional=True, classifier=True)
        planner = self.wide(DiffusionPlanner(), **fields)
        if self.size == "smoke":
            return planner
        return dataclasses.replace(planner, total_updates=self.updates, critic_updates=self.updates)

    def learners(self) -> dict[str, tuple[str, Any]]:
        """By name: the run that each is learned on, and the learner."""
        prior = lambda **fields: self.wide(PriorGuidance(), **fields)
        corrected = dict(num_train_steps=None, squash=None)
        flow = self.wide(MeanFlowPlanner())
        if self.size != "smoke":
            flow = dataclasses.replace(flow, total_updates=self.updates)
        found = {
            "pg": ("planner", prior()),
            "pg-corrected": ("planner", prior(**corrected)),
            "meanflow": ("planner", flow),
            "meanflow-pg": ("meanflow", prior(**corrected)),
        }
        return found

    def sweeps(self) -> dict[str, tuple[str, Any]]:
        """Priors with other weights alpha, another divergence, of other families."""
        prior = lambda **fields: ("planner", self.wide(PriorGuidance(), **fields))
        alphas = {f"pg-alpha-{alpha:g}": prior(divergence_weight=alpha) for alpha in ALPHAS}
        return alphas | {
            "pg-mixture": prior(family="mixture"),
            "pg-flow": prior(family="flow"),
            "pg-renyi": prior(divergence="renyi"),
        }

    def rows(self) -> list[tuple[str, str, int]]:
        """(run, scheme, replan_every) of every evaluation, in the order in which runs are trained."""
        priors = lambda *runs: [(run, text) for run in runs for text in ("prior", "prior-sampled")]
        single = [("planner", text) for text in ("unconditional", "held", "zero", "cfg:1.2:1.0", "cg:0.1")]
        flows = [("meanflow", text) for text in ("unconditional", "zero")]
        rows = [
            *single,
            *priors("pg", "pg-corrected"),
            ("planner", "mcss:50"),
            *flows,
            *priors("meanflow-pg"),
            ("meanflow", "mcss:50"),
        ]
        every_step = [row for row in rows if "mcss" not in row[1]] if self.every_step else []
        return [(run, text, self.replan_every) for run, text in rows] + [(*row, 1) for row in every_step]

    def sweep_rows(self) -> list[tuple[str, str, int]]:
        """The same of the sweeps."""
        priors = [(run, text) for run in self.sweeps() for text in ("prior", "prior-sampled")]
        candidates = [("planner", f"mcss:{number}") for number in CANDIDATES]
        return [(run, text, self.replan_every) for run, text in priors + candidates]


STUDIES = {
    "umaze-cpu": MazeStudy("umaze"),
    "medium-cpu": MazeStudy("medium", horizon=24, updates=8_000, width=64, replan_every=10, every_step=False),
    "large-cpu": MazeStudy("large", horizon=32, updates=12_000, width=64, replan_every=10, every_step=False),
    "umaze-paper": MazeStudy("umaze", "paper", horizon=32, updates=1_000_000),
    "medium-paper": MazeStudy("medium", "paper", horizon=32, updates=1_000_000),
    "large-paper": MazeStudy("large", "paper", horizon=32, updates=1_000_000),
    "umaze-smoke": MazeStudy("umaze", "smoke", horizon=4, steps=20_000, episodes=2, replan_every=15),
}


def run(name: str, seed: int, *, sweeps: bool = False, folder: Path = RUNS, results: Path = RESULTS) -> Path:
    """Everything of one study and seed, or its sweeps; **returns** the result file, which grows row by row."""
    study = STUDIES[name]
    data = make_data(study, folder)
    loop = OfflineSettings.preset(study.size)
    runs = folder / f"{name}_seed{seed}"
    learners = study.sweeps() if sweeps else study.learners()

    def need(run: str) -> None:
        if run == "planner":
            trained(
                runs / run, planning.train, study.planner, data, loop, seeds=(seed,), horizon=study.horizon
            )
        else:
            below, learner = learners[run]
            need(below)
            trained(runs / run, planning.train_on_planner, learner, runs / below, loop, data=data)

    path = results / f"{name}_seed{seed}{'_sweeps' if sweeps else ''}.json"
    content = begun(path, study) | {"scale": dataclasses.asdict(d4rl.load(data).scale)}

    def save() -> None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")

    save()
    for run_name, text, replan_every in study.sweep_rows() if sweeps else study.rows():
        key = f"{run_name} {text} {replan_every}"
        if key in content["rows"]:
            continue
        need(run_name)
        row = planning.evaluate(
            runs / run_name, study.episodes, guidance=scheme(text), replan_every=replan_every, seed=seed
        )
        content["rows"][key] = row | {"provenance": provenance()}
        content["runs"].update(
            {each: summary(runs / each) for each in ["planner", *learners] if (runs / each).exists()}
        )
        save()
        (outcome,) = row["seeds"]
        reached = [step for step in outcome["steps_to_goal"] if step]
        latched = sum(outcome["latched"]) / study.episodes
        print(f"{key}: {len(reached)} of {study.episodes} reach the goal, latched {latched:.1f}", flush=True)
    return path


def begun(path: Path, study: MazeStudy) -> dict[str, Any]:
    """What there is of the study's results.

    **Raises:** `ValueError` when they are of other settings.
    """
    settings = dataclasses.asdict(study)
    content = json.loads(path.read_text()) if path.exists() else {"rows": {}, "runs": {}}
    for name, value in content.get("study", {}).items():
        if settings[name] != value:
            raise ValueError(
                f"{path} is of {name}={value}, and the study has {settings[name]}: move it away."
            )
    return content | {"study": settings}


def make_data(study: MazeStudy, folder: Path) -> Path:
    """The file of the study's set, made if it is not there."""
    path = folder / "data" / f"maze2d-{study.layout}{f'-{study.steps}' if study.steps else ''}.hdf5"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        d4rl.save(path, **collection.make(f"maze2d-{study.layout}", size=study.steps))
    return path


def trained(out: Path, train: Any, *args: Any, **kwargs: Any) -> None:
    """Trains into the run directory, or goes on with what is there."""
    if out.exists():
        planning.resume(out, verbose=False)
    else:
        train(*args, out=out, **kwargs)


def summary(run: Path) -> dict[str, Any]:
    """Settings without paths, provenance and the learning curve of one run."""
    settings = json.loads((run / "settings.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "settings": settings | {"data": Path(settings["data"]).name},
        "provenance": json.loads((run / "provenance.json").read_text()),
        "records": [
            {k: float(f"{v:.4g}") if k != "update" else v for k, v in record.items()} for record in records
        ],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Trains and judges planners in mazes; see the head of this file."
    )
    parser.add_argument("study", nargs="?", choices=list(STUDIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweeps", action="store_true", help="alpha, divergences, families, candidates")
    chosen = parser.parse_args()
    if chosen.study is None:
        for name, study in STUDIES.items():
            print(f"{name}: {study}")
    else:
        print(run(chosen.study, chosen.seed, sweeps=chosen.sweeps), flush=True)
