"""How fast the host steps MuJoCo, by which engine, and what overlapping that with the learner saves.

    python benchmarks/host.py             measures, prints tables, writes benchmarks/results/host.json
    python benchmarks/host.py engines     that part alone; the other is kept as it was (also: training)

**Engines**, each closing the loop at every step (actions in, observations out), with as many threads as there
are cores where there are threads:

- *HostVectorEnv*: what training uses; one environment after the other, one vector per seed.
- *threads*: the same Gymnasium environments, in equal shares for the threads of a pool.
- *SyncVectorEnv*, *AsyncVectorEnv*: Gymnasium's, reset in the same step. The second has a process per environment.
- *mujoco.rollout*: MuJoCo's own threads. States only: it is spared observations, rewards and the clock, and is
  what an engine written for each task anew could reach at best.

**Training** is SAC with one update of 256 transitions for five environment steps, by three loops:

- *plain*: Gymnasium's SyncVectorEnv, replay in NumPy, `eqx.filter_jit` around acting and around the update.
- *lockstep*, *overlap*: `train_online` with that value of `acting`.

`stepping_share` is the part of lockstep's time that stepping alone takes. Overlap can hide that, and besides it
what Python does between the calls.

All that is compared takes turns in short rounds, of which the fastest counts. `free_cores` in the result is how
many cores this process could keep busy, measured before and after: fewer than `cores` means that other load
disturbed the measurement, and what uses several threads the most.
"""

import itertools
import json
import os
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import equinox as eqx
import gymnasium
import jax
import jax.random as jr
import mujoco
import mujoco.rollout
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from eqgen.algorithms.sac import SAC
from eqgen.envs.base import example_transition
from eqgen.envs.host import HostEnv, HostVectorEnv
from eqgen.provenance import provenance
from eqgen.training import OnlineSettings, train_online
from eqgen.types import Transition
from measure import RESULTS, cpu_seconds, write


CORES = len(os.sched_getaffinity(0))
ENGINE_TASKS = "HalfCheetah-v5", "Hopper-v5"
SIZES = (5, 1), (5, 5)
"""Environments of each seed, seeds."""
TRAINING = {
    "HalfCheetah-v5, 2x256": ("HalfCheetah-v5", (256, 256), 100),
    "HalfCheetah-v5, 2x64": ("HalfCheetah-v5", (64, 64), 200),
    "Hopper-v5, 2x64": ("Hopper-v5", (64, 64), 200),
    "Humanoid-v5, 2x64": ("Humanoid-v5", (64, 64), 100),
}
"""Task, the agent's hidden layers (2x256 is its "cpu" size), iterations in a round."""
ROUNDS = 5


def one_env(task):
    return gymnasium.make(task, disable_env_checker=True)


# --- Engines: (task, number of environments, number of seeds) -> (step, close, its processes) ---


def host_vectors(task, num_envs, num_seeds):
    vectors = [HostVectorEnv(task, num_envs, seed) for seed in range(num_seeds)]
    for envs in vectors:
        envs.reset()

    def step(actions):
        return [envs.step(a) for envs, a in zip(vectors, actions.reshape(num_seeds, num_envs, -1))]

    return step, lambda: [envs.close() for envs in vectors], ()


def threads(task, num_envs, num_seeds):
    envs = [one_env(task) for _ in range(num_envs * num_seeds)]
    first = np.stack([env.reset(seed=i)[0] for i, env in enumerate(envs)]).astype(np.float32)
    pool, shares = ThreadPoolExecutor(CORES), np.array_split(np.arange(len(envs)), min(CORES, len(envs)))

    def step(actions):
        obs, next_obs = np.empty_like(first), np.empty_like(first)
        reward, flags = np.empty(len(envs), np.float32), np.empty((len(envs), 2), bool)

        def share(indices):
            for i in indices:
                next_obs[i], reward[i], *flags[i], _ = envs[i].step(actions[i])
                obs[i] = envs[i].reset()[0] if flags[i].any() else next_obs[i]

        list(pool.map(share, shares))
        return obs, next_obs, reward, flags

    return step, pool.shutdown, ()


def gymnasium_vector(cls, **options):
    def engine(task, num_envs, num_seeds):
        makers = [lambda: one_env(task)] * (num_envs * num_seeds)
        envs = cls(makers, autoreset_mode=AutoresetMode.SAME_STEP, **options)
        envs.reset(seed=0)
        return envs.step, envs.close, [process.pid for process in getattr(envs, "processes", ())]

    return engine


def rollout(task, num_envs, num_seeds):
    env, number = one_env(task).unwrapped, num_envs * num_seeds
    model, spec = env.model, mujoco.mjtState.mjSTATE_FULLPHYSICS
    pool = mujoco.rollout.Rollout(nthread=CORES)
    data = [mujoco.MjData(model) for _ in range(CORES)]

    def first():
        env.reset()
        state = np.empty(mujoco.mj_stateSize(model, spec))
        mujoco.mj_getState(model, env.data, state, spec)
        return state

    states = np.stack([first() for _ in range(number)])

    def step(actions):
        nonlocal states
        control = np.repeat(actions[:, None].astype(float), env.frame_skip, axis=1)
        states = pool.rollout([model] * number, data, states, control)[0][:, -1].copy()
        if task.startswith("Hopper"):  # falls: without resets it would lie on the ground, which costs more
            height, angle = states[:, 2], states[:, 3]
            for i in np.flatnonzero(~((height > 0.7) & (np.abs(angle) < 0.2))):
                states[i] = first()

    return step, pool.close, ()


ENGINES = {
    "AsyncVectorEnv": gymnasium_vector(AsyncVectorEnv, context="fork"),
    "SyncVectorEnv": gymnasium_vector(SyncVectorEnv),
    "HostVectorEnv": host_vectors,
    "threads": threads,
    "mujoco.rollout": rollout,
}


def stepping(task, engine, num_envs, num_seeds, seconds=0.3):
    """A call that steps an engine with random actions for a while and returns how many steps it made."""
    step, close, processes = engine(task, num_envs, num_seeds)
    high = one_env(task).action_space.high
    actions = np.random.default_rng(0).uniform(-high, high, (100, num_envs * num_seeds, len(high)))
    actions = itertools.cycle(actions.astype(np.float32))

    def call():
        end, steps = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            step(next(actions))
            steps += num_envs * num_seeds
        return steps

    return call, close, processes


# --- Training loops ---


def plain_loop(agent, task, settings):
    """The loop that one writes first. Yields every `log_every` environment steps."""
    n, rng, key = settings.num_envs, np.random.default_rng(0), jr.key(0)
    envs = SyncVectorEnv([lambda: one_env(task)] * n, autoreset_mode=AutoresetMode.SAME_STEP)
    high, shape = envs.single_action_space.high, envs.single_observation_space.shape
    example = example_transition(shape, len(high))
    replay = jax.tree.map(lambda x: np.zeros((settings.buffer_capacity, *x.shape), x.dtype), example)
    state = agent.init(example, key=key)
    one = lambda state, obs, key: agent.act(state, obs, key=key, explore=True)
    act = eqx.filter_jit(lambda state, obs, key: jax.vmap(one, (None, 0, 0))(state, obs, jr.split(key, n)))
    update = eqx.filter_jit(lambda state, batch, key: agent.update(state, batch, key=key))
    obs = envs.reset(seed=0)[0].astype(np.float32)
    for step in itertools.count(n, n):
        act_key, update_key = jr.split(jr.fold_in(key, step))
        if step <= settings.warmup_steps:
            actions = rng.uniform(-1, 1, (n, len(high))).astype(np.float32)
        else:
            actions = np.asarray(act(state, obs, act_key))
        next_obs, reward, terminated, truncated, info = envs.step(high * actions)
        final = next_obs.astype(np.float32)
        for i in np.flatnonzero(terminated | truncated):
            final[i] = info["final_obs"][i]
        rows = np.arange(step - n, step) % settings.buffer_capacity
        new = Transition(obs, actions, reward, final, terminated, truncated)
        for stored, x in zip(jax.tree.leaves(replay), jax.tree.leaves(new), strict=True):
            stored[rows] = x
        obs = next_obs.astype(np.float32)
        if step > settings.warmup_steps:
            rows = rng.integers(min(step, settings.buffer_capacity), size=settings.batch_size)
            state, _ = update(state, jax.tree.map(lambda x, rows=rows: x[rows], replay), update_key)
        if step % settings.log_every == 0:
            yield


def training_loop(agent, task, settings, acting):
    settings = OnlineSettings(**vars(settings) | {"acting": acting})
    return train_online(agent, HostEnv(task), settings, seeds=(0,))


# --- Measuring ---


def measured(calls, processes, rounds=ROUNDS):
    """Steps per second, and per CPU-second, of the fastest round of each call, which returns its number of steps.

    The processes are those of each call beside this one.
    """
    best = {name: {"per_second": 0.0} for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            used, begun = _cpu_seconds(processes.get(name, ())), time.perf_counter()
            steps = call()
            wall = time.perf_counter() - begun
            cpu = _cpu_seconds(processes.get(name, ())) - used
            if steps / wall > best[name]["per_second"]:
                best[name] = {"per_second": round(steps / wall), "per_cpu_second": round(steps / cpu)}
    return best


def _cpu_seconds(processes):
    """User and system time of this process and of others, by their numbers."""
    seconds = cpu_seconds()
    for pid in processes:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def free_cores(seconds=0.3):
    """How many cores the threads of this process can keep busy right now: other load may leave it fewer."""

    def hash_until(end):
        begun = time.thread_time()
        while time.perf_counter() < end:
            sha256(block)  # without Python's lock
        return time.thread_time() - begun

    block = bytes(1_000_000)
    with ThreadPoolExecutor(CORES) as pool:
        end = time.perf_counter() + seconds
        return round(sum(pool.map(hash_until, [end] * CORES)) / seconds, 1)


def engines():
    """All engines on all tasks and sizes."""
    print("| task, environments x seeds | engine | steps/s | per CPU-second |\n|---|---|---|---|")
    results = {}
    for task, (num_envs, num_seeds) in itertools.product(ENGINE_TASKS, SIZES):
        title = f"{task}, {num_envs} x {num_seeds}"
        made = {name: stepping(task, engine, num_envs, num_seeds) for name, engine in ENGINES.items()}
        rates = measured({name: m[0] for name, m in made.items()}, {name: m[2] for name, m in made.items()})
        for _, close, _ in made.values():
            close()
        results[title] = rates
        for name, rate in rates.items():
            print(f"| {title} | {name} | {rate['per_second']} | {rate['per_cpu_second']} |", flush=True)
    return results


def training():
    """All loops on all tasks and sizes of the agent."""
    print("| task, networks | plain, steps/s | lockstep | overlap | over plain | over lockstep | stepping |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for title, (task, hidden, iterations) in TRAINING.items():
        num_envs = 5
        settings = OnlineSettings(
            total_steps=1_000_000,
            num_envs=num_envs,
            warmup_steps=1_000,
            buffer_capacity=100_000,
            log_every=iterations * num_envs,
            eval_every=0,
            checkpoint_every=0,
        )
        agent = SAC(hidden=hidden)
        loops = {"plain": plain_loop(agent, task, settings)}
        loops |= {acting: training_loop(agent, task, settings, acting) for acting in ("lockstep", "overlap")}
        for loop in loops.values():  # past the warm-up and the compiling
            for _ in range(settings.warmup_steps // settings.log_every + 3):
                next(loop)

        def calls(loop, steps=settings.log_every):
            return lambda: (next(loop), steps)[1]

        stepping_alone, close, _ = stepping(task, host_vectors, num_envs, 1)
        rates = measured({"stepping": stepping_alone} | {k: calls(v) for k, v in loops.items()}, {})
        close()
        for loop in loops.values():
            loop.close()
        speed = {name: rate["per_second"] for name, rate in rates.items()}
        results[title] = rates | {
            "overlap_over_plain": round(speed["overlap"] / speed["plain"], 2),
            "overlap_over_lockstep": round(speed["overlap"] / speed["lockstep"], 2),
            "stepping_share": round(speed["lockstep"] / speed["stepping"], 2),
        }
        names = ("plain", "lockstep", "overlap")
        cells = [*map(speed.get, names), *list(results[title].values())[-3:]]
        print(f"| {title} | {' | '.join(map(str, cells))} |", flush=True)
    return results


PARTS = {"engines": engines, "training": training}


def main():
    # Of MuJoCo and Gymnasium about old spellings, and of JAX about forking, which happens before it is in use.
    warnings.simplefilter("ignore")
    mujoco.set_mju_user_warning(lambda message: None)
    path = RESULTS / "host.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in sys.argv[1:] or PARTS:
        free, rates = [free_cores()], PARTS[name]()
        free.append(free_cores())
        print(f"free cores before and after: {free}")
        results[name] = {"cores": CORES, "free_cores": free, "provenance": provenance(), "rates": rates}
    write("host", results)


if __name__ == "__main__":
    main()
