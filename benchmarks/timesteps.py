"""What a timestep sampler adds to a training step, beside the cost model's forward passes.

    python benchmarks/timesteps.py         measures, prints a table, writes benchmarks/results/timesteps.json
    python benchmarks/timesteps.py unet    one network; the others are kept as they were

A diffusion model of 8x8 images with T = 1000 in batches of 128, as a small MLP (in which everything besides the
network shows), as a wide one (in which little should) and as a U-Net. Times are of 120 updates in one compiled
loop, three periods of the default sampler (of the U-Net 40, one period), all samplers in turn and the whole round
twice. The cost model counts the forward passes of looks over those of training, 2 (T' + |S| m) / (3 B f_S), a
backward pass as two (specification of the adaptive sampler, section 9); the policy's own passes are not in it.
"""

import dataclasses
import json
import sys

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr

from eqgen.algorithms.diffusion import Diffusion
from eqgen.data.examples import ExampleData, Examples
from eqgen.provenance import provenance
from eqgen.timesteps.adaptive import AdaptiveTimesteps
from eqgen.timesteps.heuristics import SecondMomentTimesteps, StaticTimesteps
from eqgen.timesteps.times import DiffusionChain
from eqgen.tree import filter_fori_loop
from measure import RESULTS, timed, write


CHAIN = DiffusionChain(1000)
BATCH, ROUNDS = 128, 2
UPDATES = {"mlp": 120, "wide": 120, "unet": 40}
SAMPLERS = {
    "uniform": StaticTimesteps(CHAIN),
    "second moment": SecondMomentTimesteps(CHAIN),
    "adaptive, one law": AdaptiveTimesteps(CHAIN, policy="shared"),
    "adaptive": AdaptiveTimesteps(CHAIN, policy="vector"),
    "adaptive, sweep of 100": AdaptiveTimesteps(CHAIN, policy="vector", sweep=100),
    "adaptive, sweep of 100, reward of 64": AdaptiveTimesteps(
        CHAIN, policy="vector", sweep=100, reward_batch=64
    ),
    "adaptive, same, every 20": AdaptiveTimesteps(
        CHAIN, policy="vector", sweep=100, reward_batch=64, look_every=20
    ),
}
NETWORKS = {
    "mlp": Diffusion(network="mlp").resized("cpu"),
    "wide": dataclasses.replace(Diffusion(network="mlp").resized("cpu"), hidden=(1024, 1024, 1024)),
    "unet": Diffusion(network="unet").resized("cpu"),
}


def loop(learner: Diffusion, data: ExampleData, updates: int):
    """A call that trains for so many updates."""
    state = learner.init(Examples(data.examples().x[0]), key=jr.key(0))

    @eqx.filter_jit
    def train(state, data):
        def body(i, state):
            sample_key, update_key = jr.split(jr.fold_in(jr.key(1), i))
            return learner.update(state, data.sample(BATCH, key=sample_key), key=update_key)[0]

        return filter_fori_loop(0, updates, body, state)

    return lambda: train(state, data)


def measure(network: str) -> dict[str, dict[str, float]]:
    """By sampler: ms per update, ratios to uniform's, and the cost model's ratio."""
    data = ExampleData(jr.randint(jr.key(2), (1500, 1, 8, 8), 0, 17).astype(jnp.uint8), levels=17)
    learners = {
        name: dataclasses.replace(NETWORKS[network], timesteps=sampler) for name, sampler in SAMPLERS.items()
    }
    updates = UPDATES[network]
    calls = {name: loop(learner, data, updates) for name, learner in learners.items()}
    rounds = [{name: timed(call, 3, calls=updates) for name, call in calls.items()} for _ in range(ROUNDS)]
    rows = {}
    for name, learner in learners.items():
        best = {key: min(each[name][key] for each in rounds) for key in ("cpu_ms", "best_wall_ms")}
        cost = learner.timesteps.relative_cost(BATCH) if "adaptive" in name else 0.0
        rows[name] = best | {"model": round(1 + cost, 4)}
    for key in ("cpu_ms", "best_wall_ms"):
        for row in rows.values():
            row[f"{key} / uniform"] = round(row[key] / rows["uniform"][key], 3)
    return rows


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - NETWORKS.keys():
        sys.exit(f"no network {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    chosen, path = sys.argv[1:] or list(NETWORKS), RESULTS / "timesteps.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    content = {"batch": BATCH, "num_steps": CHAIN.num_steps}
    content |= {"rows": kept.get("rows", {}), "provenance": kept.get("provenance", {})}
    for network in chosen:
        content["rows"][network] = measure(network)
        content["provenance"][network] = provenance()
        for name, row in content["rows"][network].items():
            print(f"{network:5} {name:38} " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    write("timesteps", content)
