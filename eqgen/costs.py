"""What an update and an action of an agent cost: time, memory, parameters.

Measured on random transitions of a task's shapes, so alike for every agent and without the task. CPU time is that
of all threads of this process; what an accelerator spends is in the wall time alone. Threads that wait for one
another spend CPU time too: it is lowest, and disturbed least by other load, on one
(`XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`).
"""

import ctypes
import gc
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from eqgen.algorithms.base import AbstractAgent
from eqgen.envs.base import example_transition
from eqgen.tree import compile_bound
from eqgen.types import Transition


def agent_costs(
    agent: AbstractAgent, obs_shape: tuple[int, ...], action_dim: int, *batch_shape: int, repeats: int = 5
) -> dict[str, Any]:
    """What one seed of an agent costs.

    An update's time is the mean over four in a row, since some methods move their actor only at every second one,
    and without the first of all, at which some do what they repeat after thousands. An action's (of evaluation, on
    one observation, as `compiled_policy` computes it) is the mean over fifty. Each is the median of `repeats` such
    means.

    **Arguments:** `batch_shape`: the leading axes of what an update is given: (batch,), or those of a rollout.

    **Returns:**

    - `update_cpu_ms`, `update_wall_ms`, `action_cpu_ms`, `action_wall_ms`; `single_thread`: whether on one.
    - `compile_cpu_s`: of both programs; little when they lie in JAX's cache on disk.
    - `update_mb`: arguments, results and temporaries of the program of an update; None where JAX cannot tell.
    - `parameters`: how many are learned (by Adam), without copies such as target networks.
    """
    example = example_transition(obs_shape, action_dim)
    init_key, batch_key, key = jr.split(jr.key(0), 3)
    state, fixed = eqx.partition(eqx.filter_jit(agent.init)(example, key=init_key), eqx.is_array)
    batch = random_transitions(example, batch_shape, key=batch_key)

    def update(state, batch, key):
        return eqx.filter(agent.update(eqx.combine(state, fixed), batch, key=key)[0], eqx.is_array)

    def act(obs, key):
        return agent.act(eqx.combine(state, fixed), obs, key=key, explore=False)

    begun = time.process_time()
    update = jax.jit(update).lower(state, batch, key).compile()
    act = compile_bound(act, example.obs, key)
    compile_time = time.process_time() - begun

    second = update(state, batch, key)

    def four_updates():
        new = second
        for _ in range(4):
            new = update(new, batch, key)
        return new

    memory: Any = update.memory_analysis()
    kinds = ("argument", "output", "temp")
    size = None if memory is None else sum(getattr(memory, f"{kind}_size_in_bytes") for kind in kinds)
    return {
        **_timed("update", four_updates, 4, repeats),
        **_timed("action", lambda: [act(example.obs, key) for _ in range(50)], 50, repeats),
        "single_thread": "--xla_cpu_multi_thread_eigen=false" in os.environ.get("XLA_FLAGS", ""),
        "compile_cpu_s": round(compile_time, 2),
        "update_mb": None if size is None else round(size / 1e6, 2),
        "parameters": num_learned(state),
    }


def random_transitions(example: Transition, shape: tuple[int, ...], *, key: Key[Array, ""]) -> Transition:
    """Transitions like `example`, with these leading axes: all uniform in [-1, 1], and no episode ends."""
    leaves, treedef = jax.tree.flatten(example)

    def draw(leaf, key):
        full = (*shape, *leaf.shape)
        return jnp.zeros(full, bool) if leaf.dtype == bool else jr.uniform(key, full, minval=-1.0)

    return treedef.unflatten(map(draw, leaves, jr.split(key, len(leaves))))


def _timed(name: str, call: Callable[[], Any], calls: int, repeats: int) -> dict[str, float]:
    jax.block_until_ready(call())
    cpu, wall = [], []
    for _ in range(repeats):
        used, begun = time.process_time(), time.perf_counter()
        jax.block_until_ready(call())
        cpu.append(time.process_time() - used)
        wall.append(time.perf_counter() - begun)
    ms = lambda seconds: float(f"{1e3 * np.median(seconds) / calls:.4g}")
    return {f"{name}_cpu_ms": ms(cpu), f"{name}_wall_ms": ms(wall)}


def num_learned(state: PyTree) -> int:
    """How many parameters are learned: Adam keeps a first moment of each of them, and of nothing else."""
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)
    moments = [node.mu for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
    return sum(leaf.size for leaf in jax.tree.leaves(moments))


def forget_peak_memory() -> None:
    """Lets `peak_memory` begin anew, as far as the system can: lets go of compiled programs, gives back what was
    freed, and resets the count of resident memory."""
    jax.clear_caches()
    gc.collect()
    with suppress(OSError, AttributeError):  # where there is no glibc, or no Linux
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> dict[str, float | None]:
    """The most memory at once, in MB.

    **Returns:** `process_mb`: resident in this process since `forget_peak_memory` (since it began, where that could
    not be reset), most of it XLA's while it compiles; `device_mb`: on an accelerator since the process began.
    """
    units_per_mb = 1e6 if sys.platform == "darwin" else 1e6 / 1024
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mb
    device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"process_mb": round(process, 1), "device_mb": None if device is None else round(device / 1e6, 1)}
