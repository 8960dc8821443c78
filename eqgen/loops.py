"""What advances the state of an online run: environments and learner, iteration by iteration.

Whether the environment is pure JAX (`JaxLoop` steps it inside one compiled loop) or on the host (`HostLoop` steps
it in a Python loop), the learner runs the same two functions: `_explore` chooses actions, `_learn` stores
transitions and updates. Both are for one seed and vmapped over all.

Randomness is a function of (seed, stream, iteration) alone: no key is stored, so a state and the settings are
all that a resumed run needs to go on exactly as if it had never stopped.
"""

from functools import partial, reduce

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from eqgen.algorithms.base import AbstractOnPolicyAgent
from eqgen.data.replay import ReplayBuffer
from eqgen.envs.base import step_autoreset
from eqgen.tree import compile_ahead, filter_cond, filter_fori_loop, filter_scan
from eqgen.types import Transition


INIT, TRAIN, EVAL = range(3)


class NonFiniteError(FloatingPointError):
    """A loss, a statistic, an observation or a reward is NaN or infinite; the message names it and where."""


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


# --- What both kinds of environment share ---


def run_key(seed: Int[Array, ""] | int, stream: int, index: Int[Array, ""] | int) -> Key[Array, ""]:
    return jr.fold_in(jr.fold_in(jr.key(seed), stream), index)


def _iteration_keys(seed, iteration):
    return jr.split(run_key(seed, TRAIN, iteration), 3)  # explore, environment, learn


def _explore(agent, action_dim, learning, agent_state, obs, key):
    """Actions for all environments of one seed: the agent's, or uniform ones while it is not learning yet."""
    if not learning:
        return jr.uniform(key, (len(obs), action_dim), minval=-1.0, maxval=1.0)
    act = lambda o, k: agent.act(agent_state, o, key=k, explore=True)
    return jax.vmap(act)(obs, jr.split(key, len(obs)))


def _learn(agent, settings, learning, iteration, agent_state, replay, transitions, key):
    """Stores one step of every environment of one seed; updates if `learning`. Metrics are summed over updates."""
    replay = replay.add(transitions)
    if not learning:
        return agent_state, replay, {}
    if isinstance(agent, AbstractOnPolicyAgent):
        steps = iteration + 1 - settings.warmup_steps // settings.num_envs
        due = steps % agent.rollout_length == 0
        agent_state, metrics = _learn_from_rollout(agent, settings, due, agent_state, replay, key)
        return agent_state, replay, metrics

    def update(state, key):
        sample_key, update_key = jr.split(key)
        return agent.update(state, replay.sample(settings.batch_size, key=sample_key), key=update_key)

    agent_state, metrics = filter_scan(update, agent_state, jr.split(key, settings.updates_per_iteration))
    return agent_state, replay, jax.tree.map(jnp.sum, metrics)


def _learn_from_rollout(agent, settings, due, agent_state, replay, key):
    """An update on all that the buffer holds if it is `due`: the same for all seeds, so that it stays a branch."""

    def update(state):
        by_time = lambda x: x.reshape(agent.rollout_length, settings.num_envs, *x.shape[1:])
        return agent.update(state, jax.tree.map(by_time, replay.in_order()), key=key)

    def wait(state):
        return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), reported)

    reported = eqx.filter_eval_shape(update, agent_state)[1]
    return filter_cond(due, update, wait, agent_state)


def _tally(episode_return, obs, timestep):
    """Sums for the episodes that ended in this step, and the running returns after it."""
    episode_return = episode_return + timestep.reward
    done = timestep.terminated | timestep.truncated
    sums = {
        "finished_return": jnp.sum(jnp.where(done, episode_return, 0.0)),
        "finished": jnp.sum(done, dtype=jnp.float32),
        "bad_obs": _count_bad(obs) + _count_bad(timestep.obs),
        "bad_reward": _count_bad(timestep.reward),
    }
    return jnp.where(done, 0.0, episode_return), sums


def _count_bad(x):
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.float32)


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
    episode_return, sums = _tally(episode_return, obs, timestep)
    transitions = _transitions(obs, actions, timestep)
    agent_state, replay, metrics = _learn(
        agent, settings, learning, iteration, agent_state, replay, transitions, learn_key
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


class JaxLoop:
    """Advances an `OnlineState` whose environments are pure JAX.

    Both loops have `start() -> (env, obs)` for a new run, and `advance(state, stop, learning) -> (state, sums)`
    up to iteration `stop`, where `sums` are those of the metrics over updates, and of what `_tally` counts over
    iterations, one value per seed.
    """

    def __init__(self, agent, env, settings, seeds):
        self.agent, self.env, self.settings, self.seeds = agent, env, settings, jnp.asarray(seeds)

    def start(self):
        def one(seed):
            keys = jr.split(run_key(seed, INIT, 1), self.settings.num_envs)
            return jax.vmap(lambda key: self.env.reset(key=key))(keys)

        return eqx.filter_jit(eqx.filter_vmap(one))(self.seeds)

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


def _host_explore(agent, env, settings, learning, seeds, iteration, agent_state, obs):
    def one(seed, agent_state, obs):
        return _explore(
            agent, env.action_dim, learning, agent_state, obs, _iteration_keys(seed, iteration)[0]
        )

    return eqx.filter_vmap(one)(seeds, agent_state, obs)


def _host_learn(agent, env, settings, learning, seeds, iteration, agent_state, rest, obs, actions, timestep):
    def one(seed, agent_state, rest, obs, actions, timestep):
        replay, episode_return = rest
        episode_return, sums = _tally(episode_return, obs, timestep)
        transitions = _transitions(obs, actions, timestep)
        key = _iteration_keys(seed, iteration)[2]
        agent_state, replay, metrics = _learn(
            agent, settings, learning, iteration, agent_state, replay, transitions, key
        )
        return agent_state, (replay, episode_return), metrics | sums

    return eqx.filter_vmap(one)(seeds, agent_state, rest, obs, actions, timestep)


class HostLoop:
    """Advances an `OnlineState` whose environments are stepped outside of JAX.

    What happened in a step is handed to the learner before the next actions are chosen (lockstep) or after
    (overlap). A compiled function returns before it has run, and functions of one thread run in order. So in
    overlap only actions are waited for, which need the update before last, and the environments are stepped
    while the last one runs. At the end of `advance` the learner has caught up: no state has an update pending.
    """

    def __init__(self, agent, env, settings, seeds):
        self.agent, self.env, self.settings, self.seeds = agent, env, settings, jnp.asarray(seeds)
        self.envs = [env.make(settings.num_envs, seed) for seed in seeds]
        self.live = None
        self.compiled = {}

    def start(self):
        obs = np.stack([envs.reset() for envs in self.envs])
        self.live = self.env_states()
        return self.live, jnp.asarray(obs)

    def env_states(self):
        return tuple(envs.get_state() for envs in self.envs)

    def step(self, actions):
        outcomes = [envs.step(a) for envs, a in zip(self.envs, actions)]
        return jax.tree.map(lambda *x: np.stack(x), *outcomes)

    def call(self, fn, learning, *args, donate=()):
        """`fn` for all seeds, by a program of before or after learning begins. Does not wait for its result."""
        if (fn, learning) not in self.compiled:
            fixed = partial(fn, self.agent, self.env, self.settings, learning)
            self.compiled[fn, learning] = compile_ahead(fixed, self.seeds, *args, donate=donate)
        return self.compiled[fn, learning](self.seeds, *args)

    def advance(self, state, stop, learning):
        agent_state, rest, obs = state.agent, (state.replay, state.episode_return), state.obs
        if state.env is not self.live:  # a state from a checkpoint, not the one this loop left behind
            states = zip(self.envs, state.env)
            obs = np.stack([envs.set_state(env_state) for envs, env_state in states])
        stepped, sums = None, []

        def learn():
            nonlocal agent_state, rest
            if stepped is not None:
                iteration, *outcome = stepped
                args = (iteration, agent_state, rest, *outcome)
                agent_state, rest, new = self.call(_host_learn, learning, *args, donate=(3,))
                sums.append(new)

        for i in range(int(state.iteration), stop):
            iteration = np.array(i, np.int32)
            if self.settings.acting == "lockstep":
                learn()
            actions = self.call(_host_explore, learning, iteration, agent_state, obs)
            if self.settings.acting == "overlap":
                learn()
            next_obs, timestep = self.step(np.asarray(actions))
            stepped = iteration, obs, actions, timestep
            obs = next_obs
        learn()
        self.live = self.env_states()
        state = OnlineState(
            agent_state, rest[0], self.live, jnp.asarray(obs), rest[1], iteration=jnp.int32(stop)
        )
        return state, jax.tree.map(lambda *x: reduce(np.add, map(np.asarray, x)), *sums)

    def close(self):
        for envs in self.envs:
            envs.close()
