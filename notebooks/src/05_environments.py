# %% [markdown]
# # Environments: one contract, three back-ends
#
# A task can be stepped by gymnax or a closed form (pure JAX), by MuJoCo's C engine on the host, or by MJX (MuJoCo
# in JAX). Algorithms see the same contract everywhere; what differs is speed, and where it is to be had.
#
# 1. the contract, step by step;
# 2. the same policy on both of MuJoCo's engines: states overlaid, and how differences grow;
# 3. what a step costs, and what compiling costs;
# 4. mazes in closed form, their controller, a layout of your own;
# 5. an environment of your own, in under 30 lines, and an agent trained in it.
#
# **Time** in eqgen's formulas is noise time, $t=0$ data and $t=1$ noise. Here only environment steps occur, counted
# $k = 0, 1, \dots$
#
# | symbol | in the code | meaning |
# |---|---|---|
# | $s_k$ | `state`, `obs` | state of an environment; what an agent sees of it |
# | $a_k\in[-1,1]^d$ | `action` | rescaled by the environment to its own bounds |
# | $r_k$ | `reward` | |
# | | `terminated`, `truncated` | the task ended; only the clock ran out |
#
# **Where it comes from.** The MuJoCo tasks are Gymnasium's, from its XML files; what differs between its versions 4
# and 5 stands at the head of `eqgen/envs/mjx/tasks.py`. Maze2D is D4RL's (Fu et al., 2020, arXiv 2004.07219).
#
# **Needs** nothing.

# %% tags=["setup"]
import importlib.util
import os
import subprocess
import sys
from pathlib import Path


if importlib.util.find_spec("eqgen") is None:  # a machine that has not got it, such as Colab's: install it
    source, checkout = os.environ.get("EQGEN_SOURCE", ".."), Path("eqgen-checkout")
    if (Path(source) / "pyproject.toml").exists():
        checkout = Path(source)
    elif "EQGEN_SOURCE" not in os.environ:
        raise ModuleNotFoundError("Set os.environ['EQGEN_SOURCE'] to a checkout of eqgen or its git address.")
    elif not checkout.exists():
        subprocess.run(["git", "clone", "--quiet", "--depth=1", source, checkout], check=True)
    checkout = str(checkout.resolve())
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", f"{checkout}[images]"], check=True)
    sys.path.insert(0, checkout)  # where a kernel that starts from now on will look by itself

# %% tags=["parameters"]
seed = 0
steps = 100  # smoke: 3
task = "HalfCheetah-v5"  # smoke: "InvertedPendulum-v5"
numbers = (1, 16, 256)  # smoke: (1, 2)
seconds = 1.0  # smoke: 0.01
maze_episodes = 200  # smoke: 2
train_steps = 8000  # smoke: 80

# %%
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

from eqgen import plotting
from eqgen.algorithms.sac import SAC
from eqgen.envs.base import AbstractEnv, step_autoreset
from eqgen.envs.catalog import available, make
from eqgen.envs.maze import Maze2D, WaypointController, normalised_score
from eqgen.evaluation import rollout_returns
from eqgen.training import OnlineSettings, train_online
from eqgen.types import TimeStep


plotting.use_style()
keys = jr.split(jr.key(seed), 8)
colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]

# %% [markdown]
# ## 1. The contract
#
# `make` knows an environment by its name; the part before the slash says what steps it.

# %%
families = {}
for name in available():
    families.setdefault(name.partition("/")[0], []).append(name.partition("/")[2])
for family, names in families.items():
    print(f"{family:>9}  {len(names):2}  {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")

# %% [markdown]
# An environment in JAX is an immutable object with `reset` and `step`; its state is a value that you keep. `step`
# never resets. `step_autoreset` does, and still hands out the true last observation, which is what replay stores.

# %%
pendulum = make("gymnax/Pendulum-v1")
state, obs = pendulum.reset(key=keys[0])
state, timestep = pendulum.step(state, jnp.array([0.5]), key=keys[1])
print(pendulum)
print("obs", np.round(obs, 3), "  next", np.round(timestep.obs, 3), "  reward", float(timestep.reward))
print("terminated", bool(timestep.terminated), "  truncated", bool(timestep.truncated))


def to_the_limit(carry, key):
    state, acted_on, outcome = step_autoreset(pendulum, carry, jnp.zeros(1), key=key)
    return state, (acted_on, outcome)


_, (acted_on, outcome) = jax.lax.scan(to_the_limit, state, jr.split(keys[2], pendulum.max_steps))
last = int(np.argmax(outcome.truncated))
print(f"\nstep {last + 2}: truncated. True next observation {np.round(outcome.obs[last], 3)},")
print(f"the one to act on next {np.round(acted_on[last], 3)}, of a new episode.")

# %% [markdown]
# On the host the same contract holds for a vector of environments, with NumPy arrays; `make` gives its
# specification, whose `make` gives the vector. Training loops take either.

# %%
host = make(f"mujoco/{task}")
vector = host.make(num_envs=2, seed=seed)
host_obs = vector.reset()
next_obs, timestep = vector.step(np.zeros((2, host.action_dim)))
print(host)
print("observations", host_obs.shape, "  rewards", timestep.reward)
vector.close()

# %% [markdown]
# ## 2. One policy, two engines
#
# A policy without randomness, $a = \tanh(Ws)$ with one random $W$, starts from the same state in MuJoCo's C engine
# (float64) and in MJX, once in float32, as on a GPU, and once in float64.

# %%
on_mjx = make(f"mjx/{task}")
weights = np.random.default_rng(seed).normal(size=(on_mjx.action_dim, *on_mjx.obs_shape)) / 4


def reset_generator(seed):
    """Gymnasium's environment itself, to read its exact state."""
    import gymnasium
    import mujoco

    mujoco.set_mju_user_warning(lambda message: None)  # the XML files use old spellings
    env = gymnasium.make(task).unwrapped
    obs, _ = env.reset(seed=seed)
    return env, obs


def on_the_host():
    env, obs = reset_generator(seed)
    start, path = (env.data.qpos.copy(), env.data.qvel.copy()), [obs]
    half = (env.action_space.high - env.action_space.low) / 2
    for _ in range(steps):
        obs, *_ = env.step(half * np.tanh(weights @ obs))
        path.append(obs)
    env.close()
    return start, np.array(path)


def in_jax(start):
    env = make(f"mjx/{task}")  # in the precision that holds now
    state, obs = jax.jit(env.reset_to)(*map(jnp.asarray, start))

    @jax.jit
    def rollout(state, obs):
        def step(carry, _):
            state, obs = carry
            state, timestep = env.step(state, jnp.tanh(jnp.asarray(weights, obs.dtype) @ obs), key=jr.key(0))
            return (state, timestep.obs), timestep.obs

        return jax.lax.scan(step, (state, obs), None, steps)[1]

    return np.concatenate([np.asarray(obs)[None], rollout(state, obs)])


start, reference = on_the_host()
paths = {"MJX, float32": in_jax(start)}
jax.clear_caches()  # what MJX traced in float32 would be found again, and not fit
with jax.enable_x64(True):
    paths["MJX, float64"] = in_jax(start)

# %%
fig, (left, right) = plotting.subplots(1, 2, width=plotting.TEXT_WIDTH, aspect=0.75)
shown = {1: "pitch of the trunk", 4: "front thigh"} if task.startswith("HalfCheetah") else {1: "angle"}
for (i, label), color in zip(shown.items(), colors):
    left.plot(reference[:, i], color=color, linewidth=2.5, alpha=0.4, label=f"{label}, C engine")
    left.plot(paths["MJX, float32"][:, i], color=color, linewidth=0.9, linestyle="--", label=f"{label}, MJX")
left.set(xlabel="environment step $k$", ylabel="radians")
left.legend(fontsize=6, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
for (label, path), style in zip(paths.items(), ("-", "--")):
    difference = np.abs(path - reference).max(axis=1)
    right.semilogy(np.maximum(difference, 1e-17), linestyle=style, color="k", label=label)
right.set(xlabel="environment step $k$", ylabel="largest difference of an observation")
right.legend()
plt.show()

# %% [markdown]
# The curves lie on one another until chaos takes over: contacts multiply a difference, so that what begins at the
# last digit of float32 is visible after some dozens of steps, and of float64 much later. It is the same task, not
# the same trajectory. `benchmarks/results/parity.json` has this for all tasks, versions 4 and 5, with rewards and
# terminations, and the returns of 64 episodes in both engines.
#
# ## 3. What a step costs
#
# Random actions, resets included, on this machine. Loops in JAX are compiled once, which is not counted in the
# curves and shown beside them; an environment step of the cheetah is five physics steps.


# %%
def jax_rate(env, n):
    """Seconds to compile, and steps per second of n environments."""

    def one(state, key, k):
        act_key, step_key = jr.split(jr.fold_in(key, k))
        action = jr.uniform(act_key, (env.action_dim,), minval=-1.0, maxval=1.0)
        state, _, timestep = step_autoreset(env, state, action, key=step_key)
        return state, timestep.reward

    def run(state, env_keys, k_max):
        def body(k, carry):
            return jax.vmap(lambda state, key: one(state, key, k))(carry[0], env_keys)

        return jax.lax.fori_loop(0, k_max, body, (state, jnp.zeros(n)))

    env_keys = jr.split(keys[3], n)
    state, _ = jax.jit(jax.vmap(lambda key: env.reset(key=key)))(env_keys)
    begun = time.perf_counter()
    compiled = jax.jit(run).lower(state, env_keys, jnp.int32(1)).compile()
    compile_time, k_max, spent = time.perf_counter() - begun, 1, 0.0
    while spent < seconds / 2:
        k_max *= 4
        begun = time.perf_counter()
        jax.block_until_ready(compiled(state, env_keys, jnp.int32(k_max)))
        spent = time.perf_counter() - begun
    return compile_time, n * k_max / spent


def host_rate(spec, n):
    envs, rng, k_max = spec.make(n, seed), np.random.default_rng(seed), 0
    envs.reset()
    begun = time.perf_counter()
    while (spent := time.perf_counter() - begun) < seconds:
        envs.step(rng.uniform(-1, 1, (n, spec.action_dim)))
        k_max += 1
    envs.close()
    return n * k_max / spent


rates = {f"C engine, {task}": {n: host_rate(host, n) for n in numbers[:2]}}
compile_times = {}
for name in (f"mjx/{task}", "gymnax/Pendulum-v1", "maze2d/large"):
    some = numbers[:2] if name.startswith("mjx") else numbers
    found = {n: jax_rate(make(name), n) for n in some}
    compile_times[name] = max(compile_time for compile_time, _ in found.values())
    rates[name] = {n: rate for n, (_, rate) in found.items()}

# %%
fig, (left, right) = plotting.subplots(1, 2, width=plotting.TEXT_WIDTH, aspect=0.75)
for (name, found), marker in zip(rates.items(), "osv^"):
    left.loglog(list(found), list(found.values()), marker=marker, label=name)
left.set(xlabel="environments side by side", ylabel="environment steps per second")
left.legend(fontsize=6, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
right.barh(list(compile_times), list(compile_times.values()), color="0.6")
right.set(xlabel="seconds to compile")
plt.show()
for name, found in rates.items():
    print(f"{name:>28}  " + "  ".join(f"n={n}: {rate:11,.0f}/s" for n, rate in found.items()))

# %% [markdown]
# On a CPU the C engine is the one to take for MuJoCo tasks: MJX there is for checking, and for programs that are
# compiled whole. On a GPU MJX steps thousands of environments at once. Closed forms run at millions of steps a
# second anywhere. `eqgen/envs/README.md` has the table of what to take when.
#
# ## 4. Mazes
#
# D4RL's point mass in a maze: one step is a few additions, and off the walls equal to MuJoCo's to rounding. The
# controller steers from cell to cell of a shortest path.


# %%
def controlled(env, num_episodes, key):
    """Observations (episodes, steps, 4) and rewards of the controller on its way to the goal, and beyond."""
    controller = WaypointController(env)

    def episode(key):
        reset_key, plan_key, run_key = jr.split(key, 3)
        state, obs = env.reset(key=reset_key)
        plan = controller.plan(obs, env.cell_of(env.goal), key=plan_key)

        def step(carry, key):
            state, obs, plan = carry
            plan, action, _ = controller.act(plan, obs, key=key)
            state, timestep = env.step(state, action, key=key)
            return (state, timestep.obs, plan), (obs, timestep.reward)

        return jax.lax.scan(step, (state, obs, plan), jr.split(run_key, env.max_steps))[1]

    return jax.jit(jax.vmap(episode))(jr.split(key, num_episodes))


yours = Maze2D("""
    ###########
    #...#.....#
    #.#.#.###.#
    #.#...#G#.#
    #.#####...#
    #.........#
    ###########
""")
mazes = [make(f"maze2d/{size}") for size in ("umaze", "medium", "large")] + [yours]
ways = [controlled(env, maze_episodes, keys[4]) for env in mazes]

# %% tags=["thumbnail"]
fig, axes = plt.subplots(
    1, 4, figsize=(plotting.TEXT_WIDTH, 1.7), width_ratios=[len(m.layout[0]) for m in mazes]
)
scores = {}
for ax, env, (obs, reward) in zip(axes, mazes, ways):
    plotting.maze(ax, env)
    reached = np.where(reward.any(axis=1), np.argmax(reward > 0, axis=1) + 1, env.max_steps)
    for i in np.argsort(-reached)[: min(2, maze_episodes)]:
        plotting.maze_path(ax, obs[i, : max(reached[i], 2)])
    returns = np.asarray(reward.sum(axis=1))
    scores[env.name] = returns
    title = env.name.partition("/")[2]
    if env is not yours:
        title += f"\nscore {normalised_score(env.name, returns).mean():.1f}"
    ax.set_title(title, fontsize=7)
plt.show()

# %% [markdown]
# The two longest ways of 200 episodes, coloured by time. The scores are D4RL's,
# $100\,(R-R_{\min})/(R_{\max}-R_{\min})$ of the return; they exceed 100 because the run behind $R_{\max}$ kept
# the first episode's plan in all others, and so steered through walls. The fourth maze is the text above, read by
# `Maze2D`.
#
# ## 5. An environment of your own
#
# A subclass of `AbstractEnv`: names and shapes as fields, `reset` and `step` for one example. Nothing is
# registered.


# %%
class Landing(AbstractEnv):
    """A rocket above the ground, seen by height and speed: land it soon, and softly, on thrust alone."""

    name: str = "landing"
    obs_shape: tuple[int, ...] = (2,)
    action_dim: int = 1
    max_steps: int = 60

    def reset(self, *, key):
        height = jr.uniform(key, minval=1.0, maxval=2.0)
        obs = jnp.stack([height, jnp.zeros(())])
        return (obs, jnp.int32(0)), obs

    def step(self, state, action, *, key):
        (height, speed), elapsed = state
        thrust = 1 + jnp.clip(action[0], -1, 1)  # between 0 and twice its weight
        speed = speed + 0.1 * (thrust - 1)
        height = height + 0.1 * speed
        landed, elapsed = height <= 0, elapsed + 1
        reward = jnp.where(landed, 2 - 2 * jnp.abs(speed), 0.0) - 0.05
        obs = jnp.stack([height, speed])
        return (obs, elapsed), TimeStep(obs, reward, landed, ~landed & (elapsed >= self.max_steps))


env = Landing()
agent = SAC(hidden=(64, 64), actor_learning_rate=1e-3, critic_learning_rate=1e-3, initial_temperature=0.05)
settings = OnlineSettings(
    total_steps=train_steps, num_envs=1, warmup_steps=train_steps // 8, batch_size=128, eval_every=train_steps // 8,
    eval_episodes=20, log_every=train_steps // 8, checkpoint_every=0,
)  # fmt: skip
curve = []
for progress in train_online(agent, env, settings, seeds=(seed + 1,)):
    curve += [
        (record["env_step"], record["eval/return"]) for record in progress.records if "eval/return" in record
    ]
random_return = float(
    np.mean(rollout_returns(lambda o, key: jr.uniform(key, (1,), minval=-1), env, 200, key=keys[5])[0])
)
print("random actions", round(random_return, 2))
print("SAC           ", [(step, round(value, 2)) for step, value in curve])

# %% [markdown]
# ## Things to try
#
# - `task = "Ant-v5"`: its first contacts multiply differences faster. (It compiles for minutes.)
# - Another policy seed: which joints part first?
# - A maze with two ways to the goal; `WaypointController(jitter=0)`.
# - A gravity of your own for the rocket, as a field, and `jax.vmap` over it.

# %% tags=["claims"]
first = {label: np.abs(path - reference).max(axis=1)[:11].max() for label, path in paths.items()}
assert first["MJX, float64"] < 1e-9 < first["MJX, float32"] < 1e-2
# The specification's scores; four standard errors of 200 episodes (from 1000 of ours) to either side.
intervals = {"maze2d/umaze": (132, 153), "maze2d/medium": (144, 162), "maze2d/large": (190, 215)}
assert all(
    low < normalised_score(name, scores[name]).mean() < high for name, (low, high) in intervals.items()
)
assert rates["maze2d/large"][numbers[-1]] > 1e6 and rates[f"C engine, {task}"][1] > rates[f"mjx/{task}"][1]
assert curve[-1][1] > 0 > random_return
