"""Milliseconds per decision of a planner, by scheme: a plan and the action towards its second state.

    python benchmarks/planning.py         measures, prints a table, writes benchmarks/results/planning.json

For one observation and for 64 at once, at the sizes of `paper_figures/prior_guidance` (`cpu`: 16 states of four
numbers; `medium` and `large`: 24 and 32, and twice as wide) and at the `paper` size (32 states). Networks are
untrained, which costs the same. The eager form is the same Python, operation by operation without a compiler
(`jax.disable_jit`), measured in the same run.
"""

import dataclasses
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from eqgen.algorithms.meanflow_planner import MeanFlowPlanner
from eqgen.algorithms.planner import DiffusionPlanner
from eqgen.algorithms.prior_guidance import PriorGuidance
from eqgen.data.windows import Window
from eqgen.guidance import scheme
from eqgen.planning import PlannerPolicy
from eqgen.provenance import provenance
from eqgen.tree import compile_ahead
from measure import gemm_gflops, timed, write


SIZES = {
    "cpu": ("cpu", 16, {}),
    "medium": ("cpu", 24, {"width": 64}),
    "large": ("cpu", 32, {"width": 64}),
    "paper": ("paper", 32, {}),
}
"""By name: the preset, the horizon, and what differs from the preset."""
BATCHES = (1, 64)


def planners(size: str) -> dict[str, tuple]:
    """By name, planners and fresh states."""
    preset, horizon, fields = SIZES[size]
    example = Window(jnp.zeros((horizon, 4)), jnp.zeros((horizon, 2)), jnp.zeros(()), jnp.zeros(()))
    sized = lambda learner, **given: dataclasses.replace(learner.resized(preset), **(fields | given))
    planner = sized(DiffusionPlanner(target_state="xy", conditional=True, classifier=True))
    flow = sized(MeanFlowPlanner(), teacher=planner)
    prior = lambda below: sized(PriorGuidance(), planner=below)
    found = {"planner": planner, "pg": prior(planner), "meanflow": flow, "meanflow-pg": prior(flow)}
    init = eqx.filter_jit(lambda planner: planner.init(example, key=jr.key(0)))
    return {name: (each, init(each)) for name, each in found.items()}


def rows(size: str) -> list[tuple[str, str]]:
    """(planner, scheme) of every row; sample selection is left out where it takes seconds."""
    cheap = [("planner", "unconditional"), ("planner", "cfg"), ("planner", "cg"), ("pg", "prior")]
    cheap += [("meanflow", "unconditional"), ("meanflow-pg", "prior"), ("meanflow", "mcss:50")]
    return cheap + [("planner", "mcss:50")]


def decisions(policy: PlannerPolicy, batch: int):
    """A call that makes so many decisions, by a program compiled ahead of time for what is trained already."""
    args = jr.normal(jr.key(1), (batch, 4)), jr.split(jr.key(2), batch)
    run = compile_ahead(jax.vmap(policy), *args)
    return lambda: run(*args)


def eager_ms(policy: PlannerPolicy, repeats: int = 3) -> float:
    """The least wall time of one decision without a compiler."""
    times = []
    obs = jr.normal(jr.key(1), (4,))
    with jax.disable_jit():
        for _ in range(repeats):
            begun = time.perf_counter()
            policy(obs, jr.key(2)).block_until_ready()
            times.append(1e3 * (time.perf_counter() - begun))
    return min(times)


def main() -> None:
    results, gflops, begun = {}, gemm_gflops(), provenance()
    for size in SIZES:
        made = planners(size)
        for name, text in rows(size):
            policy, row = PlannerPolicy(*made[name], scheme(text)), {}
            for batch in BATCHES:
                if size == "paper" and batch > 1 and text == "mcss:50" and name == "planner":
                    continue
                cost = timed(decisions(policy, batch), 10)
                row[str(batch)] = {key: float(f"{value / batch:.3g}") for key, value in cost.items()}
            if (name, text) in (("planner", "unconditional"), ("pg", "prior"), ("meanflow-pg", "prior")):
                row["eager_ms"] = float(f"{eager_ms(policy):.3g}")
                row["eager_over_compiled"] = float(f"{row['eager_ms'] / row['1']['best_wall_ms']:.3g}")
            results[f"{size}: {name} {text}"] = row
            print(f"{size}: {name} {text}", row, flush=True)
            write("planning", {"rows": results, "gemm_gflops": gflops, "provenance": begun})


if __name__ == "__main__":
    main()
