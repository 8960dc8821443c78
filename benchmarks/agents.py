"""What an update and an action of each agent cost.

    python benchmarks/agents.py           measures, prints a table, writes benchmarks/results/agents.json
    python benchmarks/agents.py iDEM      some of them (all whose names begin so); the others are kept as they were
    python benchmarks/agents.py --table   the table of the README, from what was measured last

Sizes of HalfCheetah, batch 256, each agent at its "cpu" and "paper" sizes, the baselines as they are by default,
which is the latter; and acting on one candidate where a public implementation was measured so (flow-rl). PPO is not
among them: its update is one of a whole rollout.
"""

import json
import sys

from eqgen.algorithms.aca import ACA
from eqgen.algorithms.dacer import DACER
from eqgen.algorithms.dipo import DIPO
from eqgen.algorithms.dpmd import DPMD
from eqgen.algorithms.fpmd import FPMDM, FPMDR
from eqgen.algorithms.idem import IDEM
from eqgen.algorithms.maxentdp import MaxEntDP
from eqgen.algorithms.nclql import LQL, NCLQL
from eqgen.algorithms.qsm import QSM
from eqgen.algorithms.qvpo import QVPO
from eqgen.algorithms.sac import SAC
from eqgen.algorithms.sdac import SDAC
from eqgen.algorithms.som import SOM
from eqgen.algorithms.td3 import TD3
from eqgen.provenance import provenance
from measure import BATCH, RESULTS, TASKS, agent_costs, floor_ratio, gemm_gflops, write


AGENTS = {
    "SAC": SAC(),
    "SOM": SOM(),
    "SOM.paper": SOM.paper(),
    "NC-LQL": NCLQL(),
    "NC-LQL, Boltzmann": NCLQL.boltzmann(),
    "LQL": LQL(),
}
BASELINES = {
    "SOM, one candidate": SOM(num_eval_candidates=1),
    "TD3": TD3(),
    "QSM": QSM(),
    "QSM, one candidate": QSM(num_eval_candidates=1),
    "DIPO": DIPO(),
    "DACER": DACER(),
    "QVPO": QVPO(),
    "SDAC": SDAC(),
    "SDAC, one candidate": SDAC(num_eval_candidates=1),
    "DPMD": DPMD(),
    "iDEM": IDEM(),
    "iDEM, 500 proposals, one candidate": IDEM(num_proposals=500, num_eval_candidates=1),
    "FPMD-R": FPMDR(),
    "FPMD-M": FPMDM(),
    "MaxEntDP": MaxEntDP(),
    "ACA": ACA(),
}
# CPU-ms of public JAX implementations at the same sizes, measured on the machine and day that `hardware` names.
REFERENCE = {
    "hardware": "2 vCPU AMD EPYC (Zen 4), 2026-11-23; 81-100 GFLOP per CPU-second",
    "SAC, NC-LQL's repository (jax 0.4.27), 3x256": {"update": 22.2, "act 1": 0.02, "act 5": 0.06},
    "NC-LQL, its repository (jax 0.4.27), 3x256": {"update": 126.7, "act 1": 0.6, "act 5": 7.6},
    "DACER, the code of SDAC and DPMD (jax 0.4.27), 3x256, 20 steps": {
        "update": 229,
        "act 1": 0.2,
        "act 5": 0.56,
    },
    "DIPO, same, 100 steps": {"update": 264, "act 1": 0.94, "act 5": 2.8},
    "QSM, same, 20 x 32": {"update": 638, "act 1": 5.7, "act 5": 13.1},
    "DPMD, same, 20 x 32": {"update": 1039, "act 1": 9.1, "act 5": 23.8},
    "SDAC, same, 20 x 32": {"update": 2682, "act 1": 7.5, "act 5": 23.5},
    "ACA, its repository, 20 x 32": {"update": 3388, "act 1": 33.2, "act 5": 68.1},
    "SAC, flow-rl (jax 0.10.2), 2x256": {"update": 10.6, "act 1": 0.33, "act 5": 0.36},
    "NC-LQL, flow-rl, 3x256": {"update": 114, "act 1": 1.5, "act 5": 5.0},
    "QSM, flow-rl": {"update": 51, "act 1": 0.9, "act 5": 1.7},
    "SDAC, flow-rl": {"update": 1068, "act 1": 0.6, "act 5": 1.6},
    "iDEM, flow-rl, 500 proposals": {"update": 1897, "act 1": 1.2, "act 5": 2.5},
}


# Which of them an agent of ours is put beside in the README.
BESIDE = {
    "SAC, paper": "SAC, NC-LQL's repository (jax 0.4.27), 3x256",
    "NC-LQL, paper": "NC-LQL, its repository (jax 0.4.27), 3x256",
    "DACER, paper": "DACER, the code of SDAC and DPMD (jax 0.4.27), 3x256, 20 steps",
    "DIPO, paper": "DIPO, same, 100 steps",
    "QSM, paper": "QSM, same, 20 x 32",
    "QSM, one candidate, paper": "QSM, flow-rl",
    "DPMD, paper": "DPMD, same, 20 x 32",
    "SDAC, paper": "SDAC, same, 20 x 32",
    "SDAC, one candidate, paper": "SDAC, flow-rl",
    "ACA, paper": "ACA, its repository, 20 x 32",
    "iDEM, 500 proposals, one candidate, paper": "iDEM, flow-rl, 500 proposals",
}


def table() -> str:
    """What was measured, as Markdown."""
    results = json.loads((RESULTS / "agents.json").read_text())
    lines = [
        "| agent, size | update | over floor | action | 5 actions | public: update | action | 5 actions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, costs in results["agents"].items():
        ours = [f"{costs[key]['cpu_ms']:.2g}" for key in ("act 1", "act 5")]
        ratio = floor_ratio(costs, costs.get("gemm_gflop", results["gemm_gflop"]))
        others = results["reference"].get(BESIDE.get(name), {})
        theirs = [f"{others[key]:g}" if others else "" for key in ("update", "act 1", "act 5")]
        cells = [name, f"{costs['update']['cpu_ms']:.3g}", f"{ratio:.2f}", *ours, *theirs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(names):
    obs, act = TASKS["HalfCheetah"]
    path = RESULTS / "agents.json"
    results = json.loads(path.read_text()) if names and path.exists() else {"agents": {}}
    results["sizes"] = {"observation": obs, "action": act, "batch": BATCH}
    results["reference"] = REFERENCE
    shared = {"provenance": provenance(), "gemm_gflop": gemm_gflops()}
    results |= {} if names else shared
    agents = {
        f"{name}, {size}": agent.resized(size) for size in ("cpu", "paper") for name, agent in AGENTS.items()
    }
    agents |= {f"{name}, paper": agent for name, agent in BASELINES.items()}
    print(f"matrix product, GFLOP: {shared['gemm_gflop']}")
    print(
        "| agent | networks | update, CPU-ms (best wall) | over floor | act on 1 | act on 5 | first update, s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, agent in agents.items():
        if names and not name.startswith(tuple(names)):
            continue
        costs = results["agents"][name] = agent_costs(agent, obs, act) | (shared if names else {})
        cell = lambda c, costs=costs: f"{costs[c]['cpu_ms']:.3g} ({costs[c]['best_wall_ms']:.3g})"
        ratio = f"{floor_ratio(costs, shared['gemm_gflop']):.2f}"
        line = " | ".join([cell("update"), ratio, cell("act 1"), cell("act 5")])
        width = f"{len(agent.hidden)}x{agent.hidden[0]}"
        print(f"| {name} | {width} | {line} | {costs['first update']['wall_s']} |", flush=True)
        write("agents", results)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        print(table())
    else:
        main(sys.argv[1:])
