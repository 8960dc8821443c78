"""Datasets by name: the mazes, and what agents that were trained here do in their environments.

| name | what it holds |
|---|---|
| maze2d-umaze, maze2d-medium, maze2d-large | the waypoint controller's streams (`eqgen.data.mazes`) |
| the same with -navigate | its episodes of 1001 states |
| random | uniform actions |
| medium, expert | what the policy of a run's last checkpoint does, exploring as in training |
| medium-replay | the replay buffer of a run's last checkpoint |
| medium-expert | medium of one run and expert of another, half each |

As in D4RL a *medium* policy is one that was stopped early. `medium_step` reads from the log of a long run when its
return had come a third of the way; a run of that many steps with the same seed is its beginning, replay included.

Scores of these sets lie between the returns of uniform actions and of the expert's policy, measured here. They are
not D4RL's scores: its tasks are older releases of these, and its experts other agents.
"""

import dataclasses
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from eqgen.data import mazes
from eqgen.data.episodes import DataError, Episodes, from_flat
from eqgen.data.reference import Scale
from eqgen.envs import catalog
from eqgen.envs.base import AbstractEnv, step_autoreset
from eqgen.evaluation import rollout_returns
from eqgen.experiments import Experiment
from eqgen.runs import Run
from eqgen.training import greedy_policy, init_online, seed_slice


MAZE_SETS = tuple(f"maze2d-{maze}{kind}" for maze in mazes.SIZES for kind in ("", "-navigate"))
AGENT_SETS = ("random", "medium", "expert", "medium-replay", "medium-expert")


def make(
    name: str,
    *,
    size: int | None = None,
    seed: int = 0,
    noise: float | None = None,
    env: str | None = None,
    run: str | Path | None = None,
    expert: str | Path | None = None,
    reference_episodes: int = 20,
) -> dict[str, Any]:
    """A set of that name: the arguments of `eqgen.data.d4rl.save`.

    **Arguments:**

    - `size`: steps. None: as many as D4RL's set has, a million for those of agents.
    - `seed`: of everything random. Of a run that trained several seeds the first acts.
    - `noise`: on the actions of the waypoint controller; None: 0.5.
    - `env`: the environment of "random", such as "mujoco/Hopper-v5"; the others know it from their run.
    - `run`: whose policy or replay it is, for the sets of agents but "random".
    - `expert`: the run whose policy scores 100; "medium-expert" needs it, for "expert" it is the run itself.
        Without one the set has no scale.
    - `reference_episodes`: over how many episodes the two returns of the scale are averaged.

    **Raises:** `DataError` when there is no such set, an argument it needs is missing, or one is given that it does
    not use.
    """
    if size is not None and size < 1:
        raise DataError(f"size is {size}; a set has at least one step.")
    if name not in MAZE_SETS + AGENT_SETS:
        raise DataError(f"There is no set {name!r}. Choose one of {', '.join(MAZE_SETS + AGENT_SETS)}.")
    _refuse_unused(name, size=size, noise=noise, env=env, run=run, expert=expert)
    if name in MAZE_SETS:
        noise = 0.5 if noise is None else noise
        kind = "navigate" if name.endswith("-navigate") else "maze2d"
        return mazes.make(kind, name.split("-")[1], size=size, noise=noise, seed=seed)
    expert = expert or (run if name == "expert" else None)
    needs = {"random": {"--env": env}, "medium-expert": {"--run": run, "--expert": expert}}
    for flag, value in needs.get(name, {"--run": run}).items():
        if value is None:
            raise DataError(f"The set {name} needs {flag}.")
    size = 1_000_000 if size is None else size
    actor: Any = None if run is None else _Trained(run)
    best: Any = None if expert is None else actor if expert == run else _Trained(expert)
    task = actor.env if actor else _environment(env)
    if best and best.env.name != task.name:
        raise DataError(f"The expert of {expert} is of {best.env.name}, not of {task.name}.")
    match name:
        case "random":
            episodes = rollout(_uniform(task), task, size, seed=seed)
        case "medium" | "expert":
            episodes = rollout(actor.exploring, task, size, seed=seed)
        case "medium-replay":
            episodes = actor.replay()
        case _:  # medium-expert
            halves = [
                rollout(who.exploring, task, size // 2, seed=seed + i) for i, who in enumerate((actor, best))
            ]
            episodes = _joined(halves)
    name = f"eqgen/{task.name.replace('/', '-')}-{name}"
    settings = {"env": task.name, "size": len(episodes), "seed": seed}
    settings |= {key: who.about() for key, who in (("run", actor), ("expert", best)) if who}
    scale = _scale(name, task, best, reference_episodes, seed) if best else None
    episodes = dataclasses.replace(episodes, name=name, scale=scale)
    return {"episodes": episodes, "resets": "ends", "settings": settings}


def _refuse_unused(name, **given):
    used = {"random": ("size", "env", "expert"), "medium-replay": ("run", "expert")}
    used = used.get(name, ("size", "noise") if name in MAZE_SETS else ("size", "run", "expert"))
    for argument, value in given.items():
        if value is not None and argument not in used:
            raise DataError(f"The set {name} does not use --{argument}. Leave it out.")


def medium_step(run: str | Path, fraction: float = 1 / 3) -> int:
    """The environment step at which a run's evaluation return, averaged over its seeds, had come `fraction` of the
    way from the first evaluation to the last."""
    steps, returns = Run.open(run).curve("eval/return")
    mean = returns.mean(axis=0)
    if mean[-1] <= mean[0]:
        raise DataError(f"The return of {run} did not rise: from {mean[0]:.1f} to {mean[-1]:.1f}.")
    return int(steps[np.argmax(mean >= mean[0] + fraction * (mean[-1] - mean[0]))])


class _Trained:
    """The first seed of a run at its newest good checkpoint."""

    def __init__(self, path):
        run = Run.open(path)
        self.experiment = Experiment.from_json(run.settings)
        self.env, self.seed = self.experiment.make_env(), self.experiment.seeds[0]
        like = init_online(
            self.experiment.agent, self.env, self.experiment.settings, seeds=self.experiment.seeds
        )
        state, metadata = run.restore(like)
        self.agent, self.buffer = seed_slice((state.agent, state.replay), 0)
        self.env_step = metadata["env_step"]

    def about(self):
        algorithm = type(self.experiment.agent).__name__
        return {"algorithm": algorithm, "env_step": self.env_step, "seed": self.seed}

    @property
    def exploring(self):
        return eqx.Partial(_explore, self.experiment.agent, self.agent)

    @property
    def greedy(self):
        return greedy_policy(self.experiment.agent, self.agent)

    def replay(self) -> Episodes:
        """The records of the buffer, each environment's in the order in which they were made."""
        envs, data = self.experiment.settings.num_envs, jax.tree.map(np.asarray, self.buffer.data)
        capacity, size = len(data.reward), int(self.buffer.size)
        oldest = (int(self.buffer.index) - size) % capacity
        # Each iteration wrote one record of every environment; of an overwritten one only a part may be left.
        skip = size % envs
        rows = (oldest + skip + np.arange(size - skip)) % capacity
        rows = rows.reshape(-1, envs).T
        pick = lambda x: x[rows].reshape(-1, *x.shape[1:])
        fields = data.obs, data.action, data.reward, data.next_obs, data.terminated, data.truncated
        return _chained(*map(pick, fields), piece=rows.shape[1])


def _environment(name):
    try:
        return catalog.make(name)
    except (ValueError, ImportError) as error:
        raise DataError(str(error)) from error


def _explore(agent, agent_state, obs, key):
    return agent.act(agent_state, obs, key=key, explore=True)


def _uniform(env):
    return lambda obs, key: jr.uniform(key, (env.action_dim,), minval=-1.0, maxval=1.0)


def _scale(name, env, expert, episodes, seed):
    keys = jr.split(jr.fold_in(jr.key(seed), 1), 2)
    low, high = (
        float(np.mean(rollout_returns(policy, env, episodes, key=key)[0]))
        for policy, key in zip((_uniform(env), expert.greedy), keys)
    )
    about = expert.about()
    agent = (
        f"{about['algorithm']} after {about['env_step']} steps, {expert.experiment.agent.evaluation_policy}"
    )
    source = f"eqgen, {episodes} episodes each: uniform actions; {agent}"
    try:
        return Scale(name, low, high, "eqgen", source)
    except ValueError as error:
        raise DataError(f"{error} Train the expert for longer.") from error


# --- Rollouts ---


def rollout(policy: Any, env: Any, size: int, *, num_envs: int = 10, seed: int = 0) -> Episodes:
    """`size` steps of a policy `(obs, key) -> action`, in up to `num_envs` environments beside each other.

    The episode that is running in each at the end is truncated there.
    """
    num_envs = min(num_envs, size)
    steps = -(-size // num_envs)
    run = _rollout_jax if isinstance(env, AbstractEnv) else _rollout_host
    fields = run(policy, env, num_envs, steps, seed)
    whole = [np.asarray(x).swapaxes(0, 1).reshape(num_envs * steps, *x.shape[2:]) for x in fields]
    return _chained(*whole, piece=steps)


def _rollout_jax(policy, env, num_envs, steps, seed):
    @eqx.filter_jit
    def run(policy, key):
        reset_key, run_key = jr.split(key)
        state, obs = jax.vmap(lambda k: env.reset(key=k))(jr.split(reset_key, num_envs))

        def one(carry, key):
            state, obs = carry
            act_key, step_key = jr.split(key)
            action = policy(obs, act_key)
            state, next_obs, t = step_autoreset(env, state, action, key=step_key)
            return (state, next_obs), (obs, action, t.reward, t.obs, t.terminated, t.truncated)

        body = lambda carry, key: jax.vmap(one)(carry, jr.split(key, num_envs))
        return jax.lax.scan(body, (state, obs), jr.split(run_key, steps))[1]

    return run(policy, jr.key(seed))


def _rollout_host(policy, env, num_envs, steps, seed):
    act = eqx.filter_jit(lambda policy, obs, key: jax.vmap(policy)(obs, jr.split(key, num_envs)))
    envs, records = env.make(num_envs, seed), []
    try:
        obs = envs.reset()
        for step in range(steps):
            action = np.asarray(act(policy, jnp.asarray(obs), jr.fold_in(jr.key(seed), step)))
            following, t = envs.step(action)
            records.append((obs, action, t.reward, t.obs, t.terminated, t.truncated))
            obs = following
    finally:
        envs.close()
    return [np.stack(field) for field in zip(*records)]


def _chained(obs, action, reward, next_obs, terminated, truncated, *, piece) -> Episodes:
    """Episodes of records that follow each other in pieces of one length."""
    terminated, truncated = terminated.copy(), truncated.copy()
    ends = np.arange(piece - 1, len(obs), piece)
    truncated[ends] |= ~terminated[ends]
    final = next_obs[terminated | truncated]
    return from_flat(obs, action, reward, terminated, truncated, final_observations=final)


def _joined(sets: list[Episodes]) -> Episodes:
    join = lambda get: np.concatenate([get(x) for x in sets])
    return from_flat(
        join(lambda x: x.observations),
        join(lambda x: x.actions),
        join(lambda x: x.rewards),
        join(lambda x: x.terminated),
        join(lambda x: x.truncated),
        final_observations=join(lambda x: x.final_observations),
    )
