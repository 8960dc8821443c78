"""Runs the LQL and NC-LQL experiments on real environments and keeps what the figures need.

    python paper_figures/nclql/run.py                                 what there is to run
    python paper_figures/nclql/run.py halfcheetah-cpu                 all agents of one study
    python paper_figures/nclql/run.py halfcheetah-cpu --only lql      one of them

Run directories are made below `runs/nclql`; an interrupted run goes on. Environments, sizes and loops are those of
`paper_figures/som/run.py`, whose SOM and SAC are drawn beside these, and the learning rate is theirs (3e-4; the
released code has 1e-4 for forty times as many updates). `temperature-cpu` asks whether Boltzmann mode with
`temperature="spread"` needs no w: rewards are scaled by a tenth, one and ten times the default. The seeds reported
here are 0 and up; anything that was tuned was tuned on seeds 100 and up.
"""

import dataclasses
from pathlib import Path

from eqgen.algorithms.nclql import LQL, NCLQL
from eqgen.studies import main, online_studies


RESULTS = Path(__file__).parent / "results"
AGENTS = {
    "nclql-reference": NCLQL(learning_rate=3e-4),
    "nclql-boltzmann": NCLQL.boltzmann(learning_rate=3e-4),
    "lql": LQL(learning_rate=3e-4),
}
STUDIES = online_studies(AGENTS)
TEMPERATURES = {
    f"{temperature}-{scale}": NCLQL.boltzmann(learning_rate=3e-4, temperature=temperature, reward_scale=scale)
    for temperature in ("fixed", "spread")
    for scale in (0.02, 0.2, 2.0)
}
pendulum = STUDIES["pendulum-cpu"]
STUDIES["temperature-cpu"] = dataclasses.replace(
    pendulum, seeds=(0, 1, 2), agents=TEMPERATURES, loop=pendulum.loop | dict(total_steps=10_000)
)

if __name__ == "__main__":
    main(STUDIES, folder=Path("runs/nclql"), results=RESULTS)
