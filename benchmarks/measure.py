"""How costs are measured here: in CPU-milliseconds, beside the rate of this machine's own matrix product.

    python benchmarks/measure.py          prints that rate

CPU time is that of all threads of this process, which other load on the machine disturbs less than wall time
does; wall time is the best call. The rate of XLA's matrix product, measured in the same run, says how fast the
machine is that day, so that figures of different days can be compared in units of it.
"""

import dataclasses
import json
import math
import resource
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.extend.core import jaxprs_in_params

from eqgen.envs.base import example_transition
from eqgen.files import replacing
from eqgen.training import compiled_policy


RESULTS = Path(__file__).parent / "results"
BATCH = 256
TASKS = {"HalfCheetah": (17, 6), "Humanoid": (376, 17)}
"""Sizes of observation and action; Humanoid's is that of v4."""


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def timed(call, repeats: int, calls: int = 1, average=np.median) -> dict[str, float]:
    """The median CPU-ms and the least wall-ms of one of the `calls` that `call()` makes, after two to compile."""
    for _ in range(2):
        jax.block_until_ready(call())
    cpu, wall = [], []
    for _ in range(repeats):
        begun, used = time.perf_counter(), cpu_seconds()
        jax.block_until_ready(call())
        wall.append(time.perf_counter() - begun)
        cpu.append(cpu_seconds() - used)
    ms = lambda seconds: round(1e3 * float(seconds) / calls, 4)
    return {"cpu_ms": ms(average(cpu)), "best_wall_ms": ms(min(wall))}


def latency(call, calls: int = 1000) -> dict[str, float]:
    """Percentiles of the wall-ms from one call to its result."""
    seconds = []
    for _ in range(calls):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begun)
    return {f"p{q}_ms": round(1e3 * float(np.percentile(seconds, q)), 4) for q in (50, 99)}


def gemm_gflops(size: int = 256, calls: int = 200) -> dict[str, float]:
    """The best GFLOP per CPU-second and per second of products of (size, 256) with (256, 256), in float32."""
    x, w = jnp.ones((size, 256)), jnp.eye(256)
    many = jax.jit(lambda x, w: jax.lax.fori_loop(0, calls, lambda _, x: x @ w, x))
    cost = timed(lambda: many(x, w), 50, average=np.min)
    gflop = calls * 2 * size * 256 * 256 / 1e9
    names = {"per_cpu_second": "cpu_ms", "per_second": "best_wall_ms"}
    return {name: round(1e3 * gflop / cost[key], 1) for name, key in names.items()}


def matmul_gflop(fn, *args, branches=max) -> float:
    """GFLOP of the matrix products of `fn(*args)`, counted in its jaxpr: what no way to compute it can do without.

    A loop of known length counts as often as it runs, one of unknown length once, and of a condition `branches` of
    its sides' counts.
    """
    return _matmul_flop(eqx.filter_make_jaxpr(fn)(*args)[0].jaxpr, branches) / 1e9


def _matmul_flop(jaxpr, branches) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [_matmul_flop(sub, branches) for sub in jaxprs_in_params(equation.params)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2.0 * out.size * math.prod(left.shape[i] for i in contracted)
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        elif equation.primitive.name == "cond":
            total += branches(inner)
        else:
            total += sum(inner)
    return total


def random_batch(obs: int, act: int, *, key):
    """Transitions of a task's shapes."""

    def leaf(x, key):
        shape = (BATCH, *x.shape)
        return jr.uniform(key, shape, minval=-1.0) if x.dtype != bool else jnp.zeros(shape, bool)

    leaves, treedef = jax.tree.flatten(example_transition((obs,), act))
    return jax.tree.unflatten(treedef, [leaf(x, k) for x, k in zip(leaves, jr.split(key, len(leaves)))])


def agent_costs(agent, obs: int, act: int) -> dict:
    """First update, update (the mean over the second and third: SOM moves its actor on every second one; what is
    done once in thousands, as DACER's entropy estimate, is in the first) with its matrix products, actions on 1
    and 5 observations by `compiled_policy` with the percentiles of their wall time, and the number of learned
    parameters.
    """
    state, data = (
        agent.init(example_transition((obs,), act), key=jr.key(0)),
        random_batch(obs, act, key=jr.key(1)),
    )
    update = eqx.filter_jit(lambda state, data, key: agent.update(state, data, key=key)[0])
    begun, used = time.perf_counter(), cpu_seconds()
    state = jax.block_until_ready(update(state, data, jr.key(2)))
    first = {"cpu_s": round(cpu_seconds() - used, 2), "wall_s": round(time.perf_counter() - begun, 2)}
    two = lambda: update(update(state, data, jr.key(2)), data, jr.key(3))
    # DACER's estimate of the entropy comes once in thousands of updates.
    rare = {"num_entropy_samples": agent.num_modes} if hasattr(agent, "num_entropy_samples") else {}
    counted = dataclasses.replace(agent, **rare)
    both = lambda state: counted.update(counted.update(state, data, key=jr.key(2))[0], data, key=jr.key(3))
    costs = {"first update": first, "update": timed(two, 20, calls=2)}
    # Of two updates one moves the actor, where updates are delayed.
    branches = np.mean if getattr(agent, "policy_delay", 1) == 2 else min
    costs["update"]["matmul_gflop"] = float(f"{matmul_gflop(both, state, branches=branches) / 2:.4g}")
    for n in (1, 5):
        acting, inputs = compiled_policy(agent, state, (obs,), batch=n), (jnp.ones((n, obs)), jr.key(4))
        costs[f"act {n}"] = timed(
            lambda a=acting, i=inputs: [jax.block_until_ready(a(*i)) for _ in range(20)], 20, 20
        )
        costs[f"act {n}"] |= latency(lambda a=acting, i=inputs: a(*i))
    learned = [getattr(state, name) for name in ("actor", "critics") if hasattr(state, name)]
    costs["parameters"] = sum(x.size for x in jax.tree.leaves(eqx.filter(learned, eqx.is_inexact_array)))
    return costs


def floor_ratio(costs: dict, gemm: dict[str, float]) -> float:
    """CPU time of an update over what its matrix products take at the rate of `gemm_gflops()`."""
    return costs["update"]["cpu_ms"] * gemm["per_cpu_second"] / 1e3 / costs["update"]["matmul_gflop"]


def write(name: str, content: dict) -> None:
    """`results/<name>.json`."""
    with replacing(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote benchmarks/results/{name}.json")


if __name__ == "__main__":
    print(f"matrix product, GFLOP: {gemm_gflops()}")
