"""What it costs to make maze2d-large, and to load it and gather every one of its windows.

    python benchmarks/data.py [STEPS]     measures, prints, writes benchmarks/results/data.json (4 000 000 steps)

Each stage is a process of its own, so that its peak memory is its own.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr

from eqgen.data import d4rl, mazes, windows
from eqgen.data.normalizer import Normalizer
from eqgen.provenance import provenance
from measure import cpu_seconds, write


BATCH = 1024


def generate(path: str, size: int) -> dict:
    made = mazes.make("maze2d", "large", size=size)
    d4rl.save(path, **made)
    episodes = made["episodes"]
    return {
        "steps": len(episodes),
        "file_mb": round(Path(path).stat().st_size / 1e6),
        "targets_per_million_steps": round(1e6 * episodes.num_episodes / len(episodes)),
        "reward_fraction": round(float(episodes.rewards.mean()), 4),
    }


def epoch(path: str, size: int) -> dict:
    """All windows of planner and policy, once each, in random order, normalised on the device."""
    episodes = d4rl.load(path)
    normalise = Normalizer.fit(episodes.observations)
    sets = {"planner": windows.maze2d_windows(episodes), "policy": windows.maze2d_policy_windows(episodes)}
    counts = {f"{name}_windows": len(index) for name, index in sets.items()}
    episodes, sets = jax.device_put((episodes, sets))

    @jax.jit
    def batch(episodes, index, order):
        window = index.take(episodes, order)
        return jnp.sum(normalise(window.states)) + jnp.sum(window.actions) + jnp.sum(window.label)

    for name, index in sets.items():
        order = jr.permutation(jr.key(0), counts[f"{name}_windows"]).astype(jnp.int32)
        for begin in range(0, len(order) - BATCH + 1, BATCH):
            total = batch(episodes, index, order[begin : begin + BATCH])
        jax.block_until_ready(total)
    return counts | {"batch": BATCH}


def measured(stage, *arguments) -> dict:
    begun = time.perf_counter()
    result = stage(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # in kB on Linux
    costs = {"wall_s": time.perf_counter() - begun, "cpu_s": cpu_seconds(), "peak_gb": peak}
    return result | {name: round(value, 2) for name, value in costs.items()}


def main(size: int = 4_000_000):
    results = {"provenance": provenance(), "set": "maze2d-large"}
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("generate", "epoch"):
            command = [sys.executable, __file__, stage, str(Path(folder, "large.hdf5")), str(size)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[stage] = json.loads(output.splitlines()[-1])
            print(f"{stage}: {results[stage]}", flush=True)
    write("data", results)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        stage, path, size = sys.argv[1:]
        print(json.dumps(measured({"generate": generate, "epoch": epoch}[stage], path, int(size))))
    else:
        main(*map(int, sys.argv[1:]))
