"""Online training as a generator: jitted chunks inside, ordinary Python between them.

Whether the environment is pure JAX (stepped inside the chunk) or on the host (stepped in a Python loop), the
learner runs the same two functions: `_explore` chooses actions, `_learn` stores transitions and updates.
All seeds of a run are stacked along the leading axis of one `OnlineState` and vmapped, so a run of one seed and
a run of twenty are the same program.

Randomness is a function of (seed, stream, iteration) alone: no key is stored, so a state and the settings are
all that a resumed run needs to go on exactly as if it had never stopped.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from eqgen.algorithms.base import AbstractAgent, Size
from eqgen.data.replay import ReplayBuffer
from eqgen.envs.base import AbstractEnv, example_transition, step_autoreset
from eqgen.evaluation import rollout_returns
from eqgen.tree import compile_ahead, filter_fori_loop, filter_scan
from eqgen.types import Transition


_INIT, _TRAIN, _EVAL = range(3)


class NonFiniteError(FloatingPointError):
    """A loss, a statistic or an observation became NaN or infinite; the message names it, the seed, the step."""


@dataclasses.dataclass(frozen=True)
class OnlineSettings:
    """How to run an online agent. All steps are environment steps of one seed.

    One iteration is one step of each of `num_envs` environments, followed by `updates_per_iteration` updates: the
    ratio of updates to data is `updates_per_iteration / num_envs`.
    """

    total_steps: int = 20_000
    num_envs: int = 1
    warmup_steps: int = 1_000
    """Steps with uniformly random actions before the first update."""
    updates_per_iteration: int = 1
    batch_size: int = 256
    buffer_capacity: int = 1_000_000
    """Transitions kept; never more than `total_steps` are allocated."""
    log_every: int = 1_000
    eval_every: int = 5_000
    """0 evaluates never."""
    eval_episodes: int = 10
    checkpoint_every: int = 5_000
    """0 saves at the end only."""

    def __post_init__(self):
        for name in (
            "total_steps",
            "num_envs",
            "updates_per_iteration",
            "batch_size",
            "log_every",
            "eval_episodes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.warmup_steps < self.num_envs:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}; replay needs a step of each of {self.num_envs} environments."
            )
        if self.buffer_capacity < self.num_envs:
            raise ValueError(
                f"buffer_capacity is {self.buffer_capacity}, less than one step of {self.num_envs} environments."
            )
        for name in ("total_steps", "warmup_steps", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, name) % self.num_envs:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of num_envs={self.num_envs}."
                )

    @classmethod
    def preset(cls, size: Size, env: str) -> Self:
        """The settings for an amount of computation, by the environment's family (the part before the slash)."""
        if size == "smoke":
            return cls(
                total_steps=300,
                warmup_steps=100,
                batch_size=32,
                log_every=100,
                eval_every=300,
                eval_episodes=2,
                checkpoint_every=100,
            )
        if not env.startswith("mujoco/"):
            return cls()
        if size == "cpu":
            return cls(
                total_steps=100_000,
                num_envs=4,
                warmup_steps=5_000,
                log_every=1_000,
                eval_every=5_000,
                checkpoint_every=10_000,
            )
        return cls(
            total_steps=1_000_000,
            num_envs=5,
            warmup_steps=30_000,
            log_every=5_000,
            eval_every=25_000,
            eval_episodes=20,
            checkpoint_every=50_000,
        )


class OnlineState(eqx.Module):
    """All that a run needs to go on. Every array but `iteration` has a leading axis of seeds.

    `env` is the state of the environments: a PyTree of the JAX environment, or what the host's
    `HostVectorEnv.get_state` returned, one per seed.
    """

    agent: PyTree
    replay: ReplayBuffer
    env: PyTree
    obs: Float[Array, "seeds envs *obs"]
    episode_return: Float[Array, "seeds envs"]
    iteration: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the generator yields. `records` has one flat, JSON-able dict per seed.

    `state` may be saved or inspected until the generator is asked for more: then its replay and environments are
    reused in place (`state.agent` stays valid).
    """

    env_step: int
    num_updates: int
    records: list[dict[str, Any]]
    state: OnlineState


# --- What both kinds of environment share ---


def _run_key(seed: Int[Array, ""] | int, stream: int, index: Int[Array, ""] | int) -> Key[Array, ""]:
    return jr.fold_in(jr.fold_in(jr.key(seed), stream), index)


def _iteration_keys(seed, iteration):
    return jr.split(_run_key(seed, _TRAIN, iteration), 3)  # explore, environment, learn


def _explore(agent, action_dim, learning, agent_state, obs, key):
    """Actions for all environments of one seed: the agent's, or uniform ones while it is not learning yet."""
    if not learning:
        return jr.uniform(key, (len(obs), action_dim), minval=-1.0, maxval=1.0)
    act = lambda o, k: agent.act(agent_state, o, key=k, explore=True)
    return jax.vmap(act)(obs, jr.split(key, len(obs)))


def _learn(agent, settings, learning, agent_state, replay, transitions, key):
    """Stores one step of every environment of one seed; updates if `learning`. Returns the mean metrics."""
    replay = replay.add(transitions)
    if not learning:
        return agent_state, replay, {}

    def update(state, key):
        sample_key, update_key = jr.split(key)
        return agent.update(state, replay.sample(settings.batch_size, key=sample_key), key=update_key)

    agent_state, metrics = filter_scan(update, agent_state, jr.split(key, settings.updates_per_iteration))
    return agent_state, replay, jax.tree.map(jnp.mean, metrics)


def _tally(episode_return, timestep):
    """Sums for the episodes that ended in this step, and the running returns after it."""
    episode_return = episode_return + timestep.reward
    done = timestep.terminated | timestep.truncated
    sums = {
        "finished_return": jnp.sum(jnp.where(done, episode_return, 0.0)),
        "finished": jnp.sum(done, dtype=jnp.float32),
        "bad_obs": jnp.sum(~jnp.isfinite(timestep.obs), dtype=jnp.float32),
    }
    return jnp.where(done, 0.0, episode_return), sums


def _transitions(obs, actions, timestep):
    outcome = (timestep.reward, timestep.obs, timestep.terminated, timestep.truncated)
    return jax.vmap(Transition)(obs, actions, *outcome)


# --- Environments in JAX: whole chunks in one compiled loop ---


def _jax_iteration(agent, env, settings, learning, iteration, seed, agent_state, rest):
    replay, env_state, obs, episode_return = rest
    explore_key, env_key, learn_key = _iteration_keys(seed, iteration)
    actions = _explore(agent, env.action_dim, learning, agent_state, obs, explore_key)
    step = lambda s, a, k: step_autoreset(env, s, a, key=k)
    env_state, next_obs, timestep = jax.vmap(step)(env_state, actions, jr.split(env_key, len(obs)))
    episode_return, sums = _tally(episode_return, timestep)
    transitions = _transitions(obs, actions, timestep)
    agent_state, replay, metrics = _learn(
        agent, settings, learning, agent_state, replay, transitions, learn_key
    )
    return agent_state, (replay, env_state, next_obs, episode_return), metrics | sums


@eqx.filter_jit(donate="all-except-first")
def _jax_chunk(kept, rest, learning):
    """Iterations start..stop of all seeds. Of the arguments only `rest` is donated: `kept` stays valid."""
    agent, env, settings, seeds, agent_state, start, stop = kept

    def step(iteration, agent_state, rest):
        one = partial(_jax_iteration, agent, env, settings, learning, iteration)
        return eqx.filter_vmap(one)(seeds, agent_state, rest)

    def body(iteration, carry):
        agent_state, rest, sums = carry
        agent_state, rest, new = step(iteration, agent_state, rest)
        return agent_state, rest, jax.tree.map(jnp.add, sums, new)

    shapes = eqx.filter_eval_shape(step, start, agent_state, rest)[2]
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return filter_fori_loop(start, stop, body, (agent_state, rest, sums))


class _JaxLoop:
    """Advances an `OnlineState` whose environments are pure JAX."""

    def __init__(self, agent, env, settings, seeds):
        self.agent, self.env, self.settings, self.seeds = agent, env, settings, jnp.asarray(seeds)

    def start(self):
        def one(seed):
            keys = jr.split(_run_key(seed, _INIT, 1), self.settings.num_envs)
            return jax.vmap(lambda key: self.env.reset(key=key))(keys)

        return eqx.filter_vmap(one)(self.seeds)

    def advance(self, state, stop, learning):
        kept = (
            self.agent,
            self.env,
            self.settings,
            self.seeds,
            state.agent,
            state.iteration,
            jnp.int32(stop),
        )
        rest = (state.replay, state.env, state.obs, state.episode_return)
        agent_state, rest, sums = _jax_chunk(kept, rest, learning)
        return OnlineState(agent_state, *rest, iteration=jnp.int32(stop)), sums

    def close(self):
        pass


# --- Environments on the host: a Python loop around two compiled functions ---


def _host_explore(agent, action_dim, learning, seeds, iteration, agent_state, obs):
    def one(seed, agent_state, obs):
        return _explore(agent, action_dim, learning, agent_state, obs, _iteration_keys(seed, iteration)[0])

    return eqx.filter_vmap(one)(seeds, agent_state, obs)


@eqx.filter_jit(donate="all-except-first")
def _host_learn(kept, rest, learning):
    agent, settings, seeds, iteration, agent_state, obs, actions, timestep = kept

    def one(seed, agent_state, rest, obs, actions, timestep):
        replay, episode_return = rest
        episode_return, sums = _tally(episode_return, timestep)
        transitions = _transitions(obs, actions, timestep)
        key = _iteration_keys(seed, iteration)[2]
        agent_state, replay, metrics = _learn(
            agent, settings, learning, agent_state, replay, transitions, key
        )
        return agent_state, (replay, episode_return), metrics | sums

    return eqx.filter_vmap(one)(seeds, agent_state, rest, obs, actions, timestep)


class _HostLoop:
    """Advances an `OnlineState` whose environments are stepped outside of JAX, in lockstep with the learner."""

    def __init__(self, agent, env, settings, seeds):
        self.agent, self.env, self.settings, self.seeds = agent, env, settings, jnp.asarray(seeds)
        self.envs = [env.make(settings.num_envs, seed) for seed in seeds]
        self.live = None
        self.explore = {}  # compiled ahead of time, for before and after learning begins

    def start(self):
        obs = np.stack([envs.reset() for envs in self.envs])
        self.live = self.env_states()
        return self.live, jnp.asarray(obs)

    def env_states(self):
        return tuple(envs.get_state() for envs in self.envs)

    def advance(self, state, stop, learning):
        agent_state, rest, obs = state.agent, (state.replay, state.episode_return), state.obs
        if state.env is not self.live:  # a state from a checkpoint, not the one this loop left behind
            states = zip(self.envs, state.env)
            obs = jnp.asarray(np.stack([envs.set_state(env_state) for envs, env_state in states]))
        if learning not in self.explore:
            explore = partial(_host_explore, self.agent, self.env.action_dim, learning)
            self.explore[learning] = compile_ahead(explore, self.seeds, state.iteration, agent_state, obs)
        total = None
        for i in range(int(state.iteration), stop):
            iteration = jnp.int32(i)
            actions = self.explore[learning](self.seeds, iteration, agent_state, obs)
            outcomes = [envs.step(a) for envs, a in zip(self.envs, np.asarray(actions))]
            next_obs = np.stack([outcome[0] for outcome in outcomes])
            timestep = jax.tree.map(lambda *x: np.stack(x), *[outcome[1] for outcome in outcomes])
            kept = (self.agent, self.settings, self.seeds, iteration, agent_state, obs, actions, timestep)
            agent_state, rest, sums = _host_learn(kept, rest, learning)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
            obs = jnp.asarray(next_obs)
        self.live = self.env_states()
        return OnlineState(agent_state, rest[0], self.live, obs, rest[1], iteration=jnp.int32(stop)), total

    def close(self):
        for envs in self.envs:
            envs.close()


# --- The generator ---


def _loop(agent, env, settings, seeds):
    return (_JaxLoop if isinstance(env, AbstractEnv) else _HostLoop)(agent, env, settings, tuple(seeds))


def _start(loop, agent, env, settings, seeds):
    example = example_transition(env.obs_shape, env.action_dim)
    capacity = min(settings.buffer_capacity, settings.total_steps)
    agents = eqx.filter_vmap(lambda seed: agent.init(example, key=_run_key(seed, _INIT, 0)))(loop.seeds)
    replay = eqx.filter_vmap(lambda _: ReplayBuffer.create(example, capacity))(loop.seeds)
    env_state, obs = loop.start()
    returns = jnp.zeros((len(seeds), settings.num_envs))
    return OnlineState(agents, replay, env_state, obs, returns, iteration=jnp.int32(0))


def init_online(
    agent: AbstractAgent, env: Any, settings: OnlineSettings, *, seeds: Sequence[int]
) -> OnlineState:
    """The state of a run that has not begun; also the skeleton into which a checkpoint is read."""
    loop = _loop(agent, env, settings, seeds)
    try:
        return _start(loop, agent, env, settings, seeds)
    finally:
        loop.close()


def train_online(
    agent: AbstractAgent,
    env: Any,
    settings: OnlineSettings,
    *,
    seeds: Sequence[int],
    state: OnlineState | None = None,
) -> Iterator[Progress]:
    """Trains one agent per seed and yields after every `log_every`, `eval_every` and `checkpoint_every` steps.

    **Arguments:**

    - `agent`: the algorithm with its hyperparameters.
    - `env`: an `AbstractEnv`, or a host environment's specification (`eqgen.envs.catalog.make` returns either).
    - `seeds`: one run each; seed s gives the same run whichever seeds stand beside it.
    - `state`: where to go on from, as `Progress.state` was; None begins anew.

    **Returns:** a generator of `Progress`. The evaluation at a step uses the agent as it is then, in
    environments of its own, with `explore=False`, and random numbers that depend on (seed, step) alone.

    **Raises:** `NonFiniteError` when a metric or an observation is NaN or infinite. Nothing is yielded for
    that chunk, so the last state that was yielded (and saved) is a good one.
    """
    loop = _loop(agent, env, settings, seeds)
    begun = time.perf_counter()
    try:
        if state is None:
            state = _start(loop, agent, env, settings, seeds)
            records = [{"seed": int(seed), "env_step": 0, "updates": 0, "wall_time": 0.0} for seed in seeds]
            if settings.eval_every:
                _evaluate(records, agent, env, settings, state)
            yield Progress(0, 0, records, state)
        while (first := int(state.iteration)) < settings.total_steps // settings.num_envs:
            stop, learning = _next_stop(first, settings)
            state, sums = loop.advance(state, stop, learning)
            records = _records(sums, first, stop, settings, seeds)
            step = stop * settings.num_envs
            if settings.eval_every and (step % settings.eval_every == 0 or step == settings.total_steps):
                _evaluate(records, agent, env, settings, state)
            for record in records:
                record["wall_time"] = time.perf_counter() - begun
            yield Progress(step, records[0]["updates"], records, state)
    finally:
        loop.close()


def _next_stop(first, settings):
    """The iteration at which to stop next, and whether there are updates until then."""
    warmup = settings.warmup_steps // settings.num_envs
    stops = [settings.total_steps // settings.num_envs] + ([warmup] if first < warmup else [])
    for name in ("log_every", "eval_every", "checkpoint_every"):
        if every := getattr(settings, name) // settings.num_envs:
            stops.append((first // every + 1) * every)
    return min(stops), first >= warmup


def _records(sums, first, stop, settings, seeds):
    sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    step = stop * settings.num_envs
    updates = max(0, stop - settings.warmup_steps // settings.num_envs) * settings.updates_per_iteration
    records = []
    for i, seed in enumerate(seeds):
        values = {name: float(value[i]) for name, value in sums.items()}
        finished, finished_return = values.pop("finished"), values.pop("finished_return")
        bad_obs = values.pop("bad_obs") > 0
        means = {name: value / (stop - first) for name, value in values.items()}
        _check_finite(means, bad_obs, seed, step)
        record = {"seed": int(seed), "env_step": step, "updates": updates, "train/episodes": int(finished)}
        records.append(record | {"train/return": finished_return / finished if finished else None} | means)
    return records


def _check_finite(means, bad_obs, seed, step):
    """Names what is not finite. An agent that diverges breaks the observations and the other way round: both."""
    bad = next((name for name, value in means.items() if not np.isfinite(value)), None)
    causes = [f"The metric {bad} of seed {seed} is {means[bad]}"] if bad else []
    causes += [f"{'an' if bad else 'An'} observation of seed {seed} was NaN or infinite"] if bad_obs else []
    if causes:
        raise NonFiniteError(f"{' and '.join(causes)} at environment step {step}.")


@eqx.filter_jit
def greedy_action(agent: AbstractAgent, agent_state: PyTree, obs: Array, key: Key[Array, ""]) -> Array:
    """What the agent does when it is judged: `act(..., explore=False)`."""
    return agent.act(agent_state, obs, key=key, explore=False)


def greedy_policy(agent: AbstractAgent, agent_state: PyTree) -> eqx.Partial:
    """The policy `(obs, key) -> action` to hand to evaluation and rendering; `agent_state` is of one seed."""
    return eqx.Partial(greedy_action, agent, agent_state)


def seed_slice(state: PyTree, index: int) -> PyTree:
    """One seed's part of a tree stacked over seeds."""
    return jax.tree.map(lambda x: x[index] if eqx.is_array(x) else x, state)


def _evaluate(records, agent, env, settings, state):
    for i, record in enumerate(records):
        policy = greedy_policy(agent, seed_slice(state.agent, i))
        key = _run_key(record["seed"], _EVAL, record["env_step"])
        returns, lengths = rollout_returns(policy, env, settings.eval_episodes, key=key)
        returns = np.asarray(returns, np.float64)
        record |= {
            "eval/return": float(returns.mean()),
            "eval/returns": [float(x) for x in returns],
            "eval/length": float(np.mean(lengths)),
            "eval/episodes": settings.eval_episodes,
            "eval/policy": f"last parameters, {agent.evaluation_policy}",
        }
