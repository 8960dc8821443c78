"""What an update and an action of each agent cost, in CPU-milliseconds.

    python benchmarks/agents.py           measures, prints a table, writes benchmarks/results/agents.json

Sizes of HalfCheetah (observations of 17, actions of 6), batch 256, each agent at its "cpu" and "paper" sizes.
CPU time is that of all threads of this process, which other load on the machine disturbs less than wall time
does; wall time is the best call. The rate of XLA's own matrix product, measured in the same run, says how fast
the machine is that day, so that figures of different days can be compared in units of it.
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

from eqgen.algorithms.sac import SAC
from eqgen.algorithms.som import SOM
from eqgen.envs.base import example_transition
from eqgen.files import replacing
from eqgen.provenance import provenance


OBS, ACT, BATCH = 17, 6, 256
AGENTS = {"SAC": SAC(), "SOM": SOM(), "SOM.paper": SOM.paper()}
RESULTS = Path(__file__).parent / "results" / "agents.json"

# CPU-ms of public JAX implementations at the same sizes, measured on the machine and day that `hardware` names.
REFERENCE = {
    "hardware": "2 vCPU AMD EPYC (Zen 4), 2026-11-23; 81-100 GFLOP per CPU-second",
    "SAC, NC-LQL's repository (jax 0.4.27), 3x256": {"update": 22.2, "act 1": 0.02, "act 5": 0.06},
    "SAC, flow-rl (jax 0.10.2), 2x256": {"update": 10.6, "act 1": 0.33, "act 5": 0.36},
    "QSM, flow-rl": {"update": 51, "act 1": 0.9, "act 5": 1.7},
    "SDAC, flow-rl": {"update": 1068, "act 1": 0.6, "act 5": 1.6},
    "iDEM, flow-rl": {"update": 1897, "act 1": 1.2, "act 5": 2.5},
}


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def timed(call, repeats: int) -> dict[str, float]:
    """The median CPU-ms and the least wall-ms of `call`, which is run twice beforehand to compile."""
    for _ in range(2):
        jax.block_until_ready(call())
    cpu, wall = [], []
    for _ in range(repeats):
        begun, used = time.perf_counter(), cpu_seconds()
        jax.block_until_ready(call())
        wall.append(time.perf_counter() - begun)
        cpu.append(cpu_seconds() - used)
    return {"cpu_ms": round(1e3 * float(np.median(cpu)), 3), "best_wall_ms": round(1e3 * min(wall), 3)}


def gemm_gflops() -> float:
    """GFLOP per CPU-second of a float32 matrix product of (1024, 256) with (256, 256)."""
    product = jax.jit(lambda x, w: x @ w)
    x, w = jnp.ones((1024, 256)), jnp.ones((256, 256))

    def many():
        return [product(x, w) for _ in range(200)]

    return 200 * 2 * 1024 * 256 * 256 / 1e6 / timed(many, 9)["cpu_ms"]


def batch(key):
    """Random transitions of the task's shapes."""

    def leaf(x, key):
        shape = (BATCH, *x.shape)
        return jr.uniform(key, shape, minval=-1.0) if x.dtype != bool else jnp.zeros(shape, bool)

    leaves, treedef = jax.tree.flatten(example_transition((OBS,), ACT))
    return jax.tree.unflatten(treedef, [leaf(x, k) for x, k in zip(leaves, jr.split(key, len(leaves)))])


def measure(agent) -> dict:
    """Costs of one agent. An update is the mean over two calls: SOM moves its actor on every second one."""
    state, data = agent.init(example_transition((OBS,), ACT), key=jr.key(0)), batch(jr.key(1))
    update = eqx.filter_jit(lambda state, data, key: agent.update(state, data, key=key)[0])
    begun, used = time.perf_counter(), cpu_seconds()
    jax.block_until_ready(update(state, data, jr.key(2)))
    first = {"cpu_s": round(cpu_seconds() - used, 2), "wall_s": round(time.perf_counter() - begun, 2)}
    pair = timed(lambda: update(update(state, data, jr.key(2)), data, jr.key(3)), 20)
    costs = {"first update": first, "update": {name: value / 2 for name, value in pair.items()}}
    for n in (1, 5):
        act = eqx.filter_jit(
            lambda state, obs, keys: jax.vmap(lambda o, k: agent.act(state, o, key=k, explore=False))(
                obs, keys
            )
        )
        obs, keys = jnp.ones((n, OBS)), jr.split(jr.key(4), n)

        def many(act=act, obs=obs, keys=keys):
            for _ in range(20):
                jax.block_until_ready(act(state, obs, keys))
            return ()

        costs[f"act {n}"] = {name: value / 20 for name, value in timed(many, 20).items()}
    learned = eqx.filter(state, lambda x: eqx.is_inexact_array(x))
    names = [name for name in ("actor", "critics") if hasattr(state, name)]
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    costs["parameters"] = sum(count(getattr(learned, name)) for name in names)
    return costs


def main():
    results = {
        "sizes": {"observation": OBS, "action": ACT, "batch": BATCH},
        "provenance": provenance(),
        "gemm_gflop_per_cpu_second": round(gemm_gflops(), 1),
        "agents": {},
        "reference": REFERENCE,
    }
    print(f"matrix product: {results['gemm_gflop_per_cpu_second']} GFLOP per CPU-second")
    print("| agent | networks | update, CPU-ms (best wall) | act on 1 | act on 5 | first update, s |")
    print("|---|---|---|---|---|---|")
    for size in ("cpu", "paper"):
        for name, agent in AGENTS.items():
            costs = measure(agent.resized(size))
            results["agents"][f"{name}, {size}"] = costs
            cells = (
                f"{costs[c]['cpu_ms']:.3g} ({costs[c]['best_wall_ms']:.3g})"
                for c in ("update", "act 1", "act 5")
            )
            width = "x".join(map(str, (len(agent.resized(size).hidden), agent.resized(size).hidden[0])))
            line = " | ".join(cells)
            print(f"| {name}, {size} | {width} | {line} | {costs['first update']['wall_s']} |", flush=True)
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {RESULTS.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
