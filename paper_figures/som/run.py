"""Runs the SOM experiments on real environments and keeps what the figures need.

    python paper_figures/som/run.py                              what there is to run
    python paper_figures/som/run.py halfcheetah-cpu              all agents of one study
    python paper_figures/som/run.py halfcheetah-cpu --only sac   one of them

Run directories are made below `runs/som`; an interrupted run goes on. `ablation-cpu` changes one field of
`SOM.safe()` at a time, and w where the score has unit length, as in `SOM.paper()`. The seeds reported here are 0
and up; anything that was tuned was tuned on seeds 100 and up.
"""

from pathlib import Path

from eqgen.algorithms.sac import SAC
from eqgen.algorithms.som import SOM
from eqgen.studies import main, online_studies


RESULTS = Path(__file__).parent / "results"
AGENTS = {"som-safe": SOM.safe(), "som-paper": SOM.paper(), "sac": SAC()}
ABLATION = {
    "safe": {},
    "K-4": dict(num_score_samples=4),
    "K-10": dict(num_score_samples=10),
    "K-100": dict(num_score_samples=100),
    "K-500": dict(num_score_samples=500),
    "alpha-0.2": dict(inverse_temperature=0.2),
    "alpha-1": dict(inverse_temperature=1.0),
    "alpha-20": dict(inverse_temperature=20.0),
    "unit-w-1": dict(score_mode="unit", score_weight=1.0),
    "unit-w-5": dict(score_mode="unit", score_weight=5.0),
    "unit-w-10": dict(score_mode="unit", score_weight=10.0),
    "unit-w-25": dict(score_mode="unit", score_weight=25.0),
    "unit-w-50": dict(score_mode="unit", score_weight=50.0),
    "N-1": dict(num_candidates=1, num_eval_candidates=1),
    "N-32": dict(num_candidates=32, num_eval_candidates=32),
    "equal-times-0": dict(flow_ratio=0.0),
    "equal-times-0.25": dict(flow_ratio=0.25),
    "equal-times-0.75": dict(flow_ratio=0.75),
    "a0-policy": dict(a0_source="policy"),
    "a0-mix": dict(a0_source="mix"),
    "Q-batch": dict(q_normalization="batch"),
    "Q-group": dict(q_normalization="group"),
    "Q-none": dict(q_normalization="none"),
    "steps-2": dict(generation_steps=2),
    "steps-4": dict(generation_steps=4),
    "gradient": dict(estimator="gradient"),
    "denoising": dict(estimator="denoising"),
}
STUDIES = online_studies(AGENTS)
for task, size, seeds in (
    ("pendulum", "smoke", (0,)),
    ("pendulum", "cpu", (0, 1, 2)),
    ("halfcheetah", "paper", (0, 1, 2, 3, 4)),
):
    name = f"ablation-{size}" if task == "pendulum" else f"ablation-{task}-{size}"
    STUDIES[name] = STUDIES[f"{task}-{size}"].ablation(SOM.safe(), ABLATION, seeds=seeds)

if __name__ == "__main__":
    main(STUDIES, folder=Path("runs/som"), results=RESULTS)
