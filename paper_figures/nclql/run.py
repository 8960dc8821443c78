"""Runs the LQL and NC-LQL experiments on real environments and keeps what the figures need.

    python paper_figures/nclql/run.py                                 what there is to run
    python paper_figures/nclql/run.py halfcheetah-cpu                 all agents of one study
    python paper_figures/nclql/run.py halfcheetah-cpu --only lql      one of them

Run directories are made below `runs/nclql`; an interrupted run goes on. Environments, sizes and loops are those of
`paper_figures/som/run.py`, whose SOM and SAC are drawn beside these, and the learning rate is theirs (3e-4; the
released code has 1e-4 for forty times as many updates). `temperature-cpu` asks whether Boltzmann mode with
`temperature="spread"` needs no w: rewards are scaled by a tenth, one and ten times the default. `ablation-cpu`
changes one field of either mode at a time. The seeds reported here are 0 and up; anything that was tuned was tuned
on seeds 100 and up.
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
REFERENCE = {
    "reference": {},
    "reference-L-2": dict(num_levels=2),
    "reference-L-5": dict(num_levels=5),
    "reference-T-1": dict(steps_per_level=1),
    "reference-T-4": dict(steps_per_level=4),
    "reference-sigma-0.5": dict(sigma_max=0.5, sigma_min=0.005),
    "reference-w-50": dict(inverse_temperature=50.0),
    "reference-w-5000": dict(inverse_temperature=5000.0),
    "reference-joint": dict(joint_loss=True),
    "reference-P-4": dict(num_particles=4),
}
BOLTZMANN = {
    "boltzmann": {},
    "boltzmann-w-15": dict(inverse_temperature=15.0),
    "boltzmann-w-50": dict(inverse_temperature=50.0),
    "boltzmann-w-500": dict(inverse_temperature=500.0),
    "boltzmann-w-1500": dict(inverse_temperature=1500.0),
    "boltzmann-L-2": dict(num_levels=2),
    "boltzmann-L-5": dict(num_levels=5),
    "boltzmann-T-1": dict(steps_per_level=1),
    "boltzmann-T-4": dict(steps_per_level=4),
    "boltzmann-sigma-0.1": dict(sigma_max=0.1, sigma_min=0.004),
    "boltzmann-joint": dict(joint_loss=True),
    "boltzmann-P-4": dict(num_particles=4),
}
pendulum = STUDIES["pendulum-cpu"]
short = dataclasses.replace(pendulum, seeds=(0, 1, 2), loop=pendulum.loop | dict(total_steps=10_000))
STUDIES["temperature-cpu"] = dataclasses.replace(short, agents=TEMPERATURES)
for mode, changes in (("reference", REFERENCE), ("boltzmann", BOLTZMANN)):
    agent = AGENTS[f"nclql-{mode}"]
    STUDIES[f"ablation-{mode}-smoke"] = STUDIES["pendulum-smoke"].ablation(agent, changes, seeds=(0,))
    STUDIES[f"ablation-{mode}-cpu"] = short.ablation(agent, changes)
    STUDIES[f"ablation-{mode}-paper"] = STUDIES["halfcheetah-paper"].ablation(agent, changes)

if __name__ == "__main__":
    main(STUDIES, folder=Path("runs/nclql"), results=RESULTS)
