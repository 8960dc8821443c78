"""Runs the SOM experiments on real environments and keeps what the figures need.

    python paper_figures/som/run.py                              what there is to run
    python paper_figures/som/run.py halfcheetah-cpu              all agents of one study
    python paper_figures/som/run.py halfcheetah-cpu --only sac   one of them

Run directories are made below `runs/som`; an interrupted run goes on. The seeds reported here are 0 and up;
anything that was tuned was tuned on seeds 100 and up.
"""

from pathlib import Path

from eqgen.algorithms.sac import SAC
from eqgen.algorithms.som import SOM
from eqgen.studies import Study, main


RESULTS = Path(__file__).parent / "results"
AGENTS = {"som-safe": SOM.safe(), "som-paper": SOM.paper(), "sac": SAC()}
STUDIES = {
    "pendulum-cpu": Study(
        "gymnax/Pendulum-v1",
        "cpu",
        (0, 1, 2, 3, 4),
        AGENTS,
        loop=dict(eval_every=1_000, eval_episodes=20),
        common=dict(hidden=(64, 64)),
    ),
    "halfcheetah-cpu": Study("mujoco/HalfCheetah-v5", "cpu", (0,), AGENTS),
    "hopper-cpu": Study("mujoco/Hopper-v5", "cpu", (0,), AGENTS),
    "pendulum-smoke": Study("gymnax/Pendulum-v1", "smoke", (0, 1), AGENTS),
}

if __name__ == "__main__":
    main(STUDIES, folder=Path("runs/som"), results=RESULTS)
