"""How costs are measured here: in CPU-milliseconds, beside the rate of this machine's own matrix product.

    python benchmarks/measure.py          prints that rate

CPU time is that of all threads of this process, which other load on the machine disturbs less than wall time
does; wall time is the best call. The rate of XLA's matrix product, measured in the same run, says how fast the
machine is that day, so that figures of different days can be compared in units of it.
"""

import json
import resource
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

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


def random_batch(obs: int, act: int, *, key):
    """Transitions of a task's shapes."""

    def leaf(x, key):
        shape = (BATCH, *x.shape)
        return jr.uniform(key, shape, minval=-1.0) if x.dtype != bool else jnp.zeros(shape, bool)

    leaves, treedef = jax.tree.flatten(example_transition((obs,), act))
    return jax.tree.unflatten(treedef, [leaf(x, k) for x, k in zip(leaves, jr.split(key, len(leaves)))])


def agent_costs(agent, obs: int, act: int) -> dict:
    """First update, update (the mean over the second and third: SOM moves its actor on every second one; what is
    done once in thousands, as DACER's entropy estimate, is in the first), actions on 1 and 5 observations by
    `compiled_policy`, with the percentiles of its wall time, and the number of learned parameters."""
    state, data = (
        agent.init(example_transition((obs,), act), key=jr.key(0)),
        random_batch(obs, act, key=jr.key(1)),
    )
    update = eqx.filter_jit(lambda state, data, key: agent.update(state, data, key=key)[0])
    begun, used = time.perf_counter(), cpu_seconds()
    state = jax.block_until_ready(update(state, data, jr.key(2)))
    first = {"cpu_s": round(cpu_seconds() - used, 2), "wall_s": round(time.perf_counter() - begun, 2)}
    two = lambda: update(update(state, data, jr.key(2)), data, jr.key(3))
    costs = {"first update": first, "update": timed(two, 20, calls=2)}
    for n in (1, 5):
        acting, inputs = compiled_policy(agent, state, (obs,), batch=n), (jnp.ones((n, obs)), jr.key(4))
        costs[f"act {n}"] = timed(
            lambda a=acting, i=inputs: [jax.block_until_ready(a(*i)) for _ in range(20)], 20, 20
        )
        costs[f"act {n}"] |= latency(lambda a=acting, i=inputs: a(*i))
    learned = [getattr(state, name) for name in ("actor", "critics") if hasattr(state, name)]
    costs["parameters"] = sum(x.size for x in jax.tree.leaves(eqx.filter(learned, eqx.is_inexact_array)))
    return costs


def write(name: str, content: dict) -> None:
    """`results/<name>.json`."""
    with replacing(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote benchmarks/results/{name}.json")


if __name__ == "__main__":
    print(f"matrix product, GFLOP: {gemm_gflops()}")
