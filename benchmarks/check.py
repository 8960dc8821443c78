"""Whether what is fast still is: fails when a ratio is a fifth worse than the committed one.

    python benchmarks/check.py            a few minutes on one core; exit status 1 if something got slower
    python benchmarks/check.py SAC SOM    some of the agents

Ratios only, each measured side by side in one run, so that machines may differ: CPU time of an update over what its
matrix products alone would take at this machine's rate, and NC-LQL's sampler over the naive form of the same maths.
They are compared with `results/agents.json` and `results/langevin.json`. How much a machine spends on what is no
matrix product also differs, between processors by more than a fifth: on another kind of processor, measure the base
anew first (`make bench`).
"""

import json
import sys

import langevin
from agents import AGENTS, BASELINES
from measure import RESULTS, TASKS, agent_costs, floor_ratio, gemm_gflops


WORSE = 1.2
CHECKED = ("SAC", "TD3", "NC-LQL", "SOM", "FPMD-M", "DACER")


def committed() -> dict[str, float]:
    """The ratios of the result files."""
    agents = json.loads((RESULTS / "agents.json").read_text())
    sampler = json.loads((RESULTS / "langevin.json").read_text())["tasks"]["HalfCheetah"]
    ratios = {
        name.removesuffix(", paper"): floor_ratio(costs, costs.get("gemm_gflop", agents["gemm_gflop"]))
        for name, costs in agents["agents"].items()
        if name.endswith(", paper")
    }
    return ratios | {"sampler": sampler["sampler, ours"]["cpu_ms"] / sampler["sampler, naive"]["cpu_ms"]}


def measured(names: tuple[str, ...]) -> dict[str, float]:
    """The same, now."""
    sizes, found = TASKS["HalfCheetah"], {}
    for name in names:
        agent = (AGENTS | BASELINES)[name].resized("paper")
        found[name] = floor_ratio(agent_costs(agent, *sizes), gemm_gflops())
    costs = langevin.measure(*sizes)
    return found | {"sampler": costs["sampler, ours"]["cpu_ms"] / costs["sampler, naive"]["cpu_ms"]}


def slower(now: dict[str, float], before: dict[str, float]) -> list[str]:
    """What got worse by more than `WORSE`, in words."""
    return [
        f"{name}: {now[name]:.2f}, committed {before[name]:.2f}"
        for name in now
        if now[name] > WORSE * before[name]
    ]


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in AGENTS | BASELINES]:
        print(f"There is no agent {', '.join(unknown)}; choose of {', '.join(AGENTS | BASELINES)}.")
        return 2
    now, before = measured(tuple(names) or CHECKED), committed()
    for name, ratio in now.items():
        print(f"{name}: {ratio:.2f}, committed {before[name]:.2f}")
    worse = slower(now, before)
    print("\n".join(["A fifth or more worse:", *worse]) if worse else "Nothing is a fifth worse.")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
