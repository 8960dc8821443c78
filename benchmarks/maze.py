"""Maze2D: steps per second by number of environments, and the scores of its controller and of random actions.

    python benchmarks/maze.py         measures, prints a table, writes benchmarks/results/maze.json

Each step draws random actions, moves the ball and resets it at the time limit (`step_autoreset`), in one compiled
loop. XLA runs such a loop on one core; `sharded` divides the environments among as many CPU devices as there are
cores, each running its own loop. The floor is the physics alone, with fixed actions and without resets: the
rest is random bits, which auto-reset needs at every step.
"""

import os

import jax


CORES = len(os.sched_getaffinity(0))
jax.config.update("jax_num_cpu_devices", CORES)

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P

from eqgen.envs.base import step_autoreset
from eqgen.envs.maze import MAZES, WaypointController, normalised_score
from eqgen.provenance import provenance
from measure import gemm_gflops, timed, write


COUNTS = (1, 16, 256, 4096)
NUM_EPISODES = 1000


def random_steps(maze, states, key, *, n: int, steps: int):
    """The states of `n` environments and their summed rewards after `steps` random steps with auto-reset."""

    def body(carry, key):
        states, total = carry
        act_key, step_key = jr.split(key)
        actions = jr.uniform(act_key, (n, maze.action_dim), minval=-1.0)
        step = lambda state, action, key: step_autoreset(maze, state, action, key=key)
        states, _, timestep = jax.vmap(step)(states, actions, jr.split(step_key, n))
        return (states, total + timestep.reward), None

    return jax.lax.scan(body, (states, jnp.zeros(n)), jr.split(key, steps))[0]


def physics(maze, states, key, *, n: int, steps: int):
    """The same without random numbers and resets."""

    def body(states, _):
        step = lambda state: maze.step(state, jnp.array([0.3, -0.2]), key=key)[0]
        return jax.vmap(step)(states), None

    return jax.lax.scan(body, states, length=steps)[0]


def rates(cost: dict[str, float], n: int, steps: int) -> dict[str, float]:
    """Million steps per second, at the best call, and CPU-nanoseconds per step, of the median one."""
    million_per_s = n * steps / cost["best_wall_ms"] / 1e3
    return {
        "million_steps_per_s": float(f"{million_per_s:.3g}"),
        "cpu_ns_per_step": float(f"{1e6 * cost['cpu_ms'] / n / steps:.3g}"),
    }


def sharded(maze, n: int, steps: int):
    """`random_steps` with an equal share of the environments on each device."""
    mesh = jax.make_mesh((CORES,), ("envs",), axis_types=(AxisType.Auto,))
    share = lambda states, keys: random_steps(maze, states, keys[0], n=n // CORES, steps=steps)
    run = jax.shard_map(share, mesh=mesh, in_specs=P("envs"), out_specs=P("envs"), check_vma=False)
    return lambda states, key: run(states, jr.split(key, CORES))


def throughput(maze, n: int) -> dict:
    steps = max(200, min(5000, 400_000 // n))
    forms = {
        "random actions, auto-reset": lambda states, key: random_steps(maze, states, key, n=n, steps=steps),
        "physics alone": lambda states, key: physics(maze, states, key, n=n, steps=steps),
    }
    if CORES > 1 and n % CORES == 0:
        forms[f"random actions, auto-reset, sharded over {CORES} devices"] = sharded(maze, n, steps)
    states = jax.vmap(lambda key: maze.reset(key=key)[0])(jr.split(jr.key(0), n))
    results: dict = {"steps": steps}
    for name, form in forms.items():
        run = jax.jit(form)
        results[name] = rates(timed(lambda run=run: run(states, jr.key(1)), 15), n, steps)
    return results


@eqx.filter_jit
def returns(maze, controller, keys):
    """One episode's return for each key: under random actions and under the controller."""

    def episode(key, controlled):
        reset_key, plan_key, run_key = jr.split(key, 3)
        state, obs = maze.reset(key=reset_key)
        plan = controller.plan(obs, maze.cell_of(maze.goal), key=plan_key)

        def body(carry, key):
            state, obs, plan = carry
            act_key, random_key = jr.split(key)
            plan, action, _ = controller.act(plan, obs, key=act_key)
            action = action if controlled else jr.uniform(random_key, (2,), minval=-1.0)
            state, timestep = maze.step(state, action, key=key)
            return (state, timestep.obs, plan), timestep.reward

        return jnp.sum(jax.lax.scan(body, (state, obs, plan), jr.split(run_key, maze.max_steps))[1])

    return [jax.vmap(lambda key, c=controlled: episode(key, c))(keys) for controlled in (False, True)]


def scores(maze) -> dict:
    """Means over episodes and their standard errors."""
    results = {}
    both = returns(maze, WaypointController(maze), jr.split(jr.key(0), NUM_EPISODES))
    for name, found in zip(("random actions", "controller"), both):
        found = np.asarray(found, np.float64)
        for kind, values in (("return", found), ("score", normalised_score(maze.name, found))):
            error = values.std(ddof=1) / np.sqrt(len(values))
            results[f"{name}: {kind}"] = [round(float(values.mean()), 2), round(float(error), 2)]
    return results


def main():
    results = {"provenance": provenance(), "cores": CORES, "gemm_gflop": gemm_gflops()}
    large = MAZES["large"]()
    results |= {
        "maze": large.name,
        "throughput by number of environments": {n: throughput(large, n) for n in COUNTS},
    }
    results["episodes"] = NUM_EPISODES
    results["mean and standard error"] = {
        maze.name: scores(maze) for maze in (make() for make in MAZES.values())
    }
    for name in ("throughput by number of environments", "mean and standard error"):
        print(name, *(f"  {key}: {value}" for key, value in results[name].items()), sep="\n")
    write("maze", results)


if __name__ == "__main__":
    main()
