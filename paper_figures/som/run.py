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
from eqgen.studies import main, online_studies


RESULTS = Path(__file__).parent / "results"
AGENTS = {"som-safe": SOM.safe(), "som-paper": SOM.paper(), "sac": SAC()}
STUDIES = online_studies(AGENTS)

if __name__ == "__main__":
    main(STUDIES, folder=Path("runs/som"), results=RESULTS)
