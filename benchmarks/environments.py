"""Steps per second of the environments that are pure JAX, and what compiling them costs.

    python benchmarks/environments.py                         those named in NAMES
    python benchmarks/environments.py mjx/Ant-v5 ...          others of the catalog

Random actions, automatic resets, one compiled loop, n environments side by side; a step is one of the environment,
with all the physics steps in it. `compile_s` is the time until the loop is compiled, without a cache. The figures
of the C engine are in `host.json`.
"""

import argparse
import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr

from eqgen.envs.base import step_autoreset
from eqgen.envs.catalog import make
from eqgen.provenance import provenance
from measure import RESULTS, cpu_seconds, write


NAMES = (
    "gymnax/Pendulum-v1",
    "maze2d/umaze",
    "mjx/InvertedPendulum-v5",
    "mjx/HalfCheetah-v5",
)
NUMBERS = (1, 16, 256, 4096)
SECONDS = 2.0
"""About how long one measurement lasts; a single iteration if that takes longer."""


def loop(env, autoreset: bool, state, keys, iterations):
    """`iterations` steps of environments with these states; one key each."""

    def one(state, key, i):
        act_key, step_key = jr.split(jr.fold_in(key, i))
        action = jr.uniform(act_key, (env.action_dim,), minval=-1.0, maxval=1.0)
        if autoreset:
            state, obs, timestep = step_autoreset(env, state, action, key=step_key)
        else:
            state, timestep = env.step(state, action, key=step_key)
            obs = timestep.obs
        return state, jnp.sum(obs) + timestep.reward

    def body(i, carry):
        state, total = carry
        state, out = jax.vmap(partial(one, i=i))(state, keys)
        return state, total + out

    return jax.lax.fori_loop(0, iterations, body, (state, jnp.zeros(len(keys))))


def rates(env, n: int, autoreset: bool = True) -> dict[str, float]:
    """Compile time and steps per second, by wall clock and per CPU-second."""
    keys = jr.split(jr.key(0), n)
    state, _ = jax.jit(jax.vmap(lambda key: env.reset(key=key)))(keys)
    begun = time.perf_counter()
    lowered = jax.jit(partial(loop, env, autoreset)).lower(state, keys, jnp.int32(1))
    compiled = lowered.compile()
    compile_s = time.perf_counter() - begun

    def timed(iterations):
        begun, used = time.perf_counter(), cpu_seconds()
        jax.block_until_ready(compiled(state, keys, jnp.int32(iterations)))
        return time.perf_counter() - begun, cpu_seconds() - used

    iterations = 1
    while (spent := timed(iterations))[0] < SECONDS / 4:
        iterations *= 4
    if spent[0] < SECONDS:
        spent = timed(iterations)
    rate = lambda seconds: float(f"{n * iterations / seconds:.3g}")
    return {"compile_s": round(compile_s, 1), "per_second": rate(spent[0]), "per_cpu_second": rate(spent[1])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    args = parser.parse_args()
    file = RESULTS / "environments.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else {}
    for name in args.names:
        env, row = make(name), {}
        for n in NUMBERS:
            row[str(n)] = rates(env, n)
            print(name, n, row[str(n)], flush=True)
        rows[name] = row | {"provenance": provenance()}
        write("environments", {"rows": rows})


if __name__ == "__main__":
    main()
