"""How a policy is judged: returns of separate episodes, and what many runs say together.

Protocol. Each of `num_episodes` environments, which training never sees, runs exactly one episode, from its
own reset to its own end. So long and short episodes count alike (the first n episodes *finished* by a vector
environment would favour short ones). A return is the plain sum of rewards, without discount. Whether the
policy explores is the caller's choice, and belongs in the record.

Over runs: the interquartile mean and stratified percentile-bootstrap intervals of Agarwal et al.,
"Deep RL at the Edge of the Statistical Precipice" (NeurIPS 2021, arXiv 2108.13264).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from eqgen.envs.base import AbstractEnv


Policy = Callable[[Float[Array, "*obs"], Key[Array, ""]], Float[Array, " act"]]
"""`(obs, key) -> action` for one observation, the action in [-1, 1]^d."""


def rollout_returns(
    policy: Policy, env: Any, num_episodes: int, *, key: Key[Array, ""]
) -> tuple[Float[Array, " episodes"], Int[Array, " episodes"]]:
    """Runs `num_episodes` episodes beside each other.

    **Arguments:**

    - `policy`: a callable; if it is a PyTree (such as `eqx.Partial`), new weights do not compile anew.
    - `env`: an `AbstractEnv`, or a `HostEnv` whose episodes are stepped on the host.
    - `num_episodes`: at least 1. Episode i depends on `key` and i alone, not on how many others run.

    **Returns:** the undiscounted returns and the lengths in steps.
    """
    if num_episodes < 1:
        raise ValueError(f"num_episodes is {num_episodes}; at least one episode is needed.")
    if isinstance(env, AbstractEnv):
        return _rollout_jax(policy, env, num_episodes, key)
    return _rollout_host(policy, env, num_episodes, key)


@eqx.filter_jit
def _rollout_jax(policy, env, num_episodes, key):
    keys = jax.vmap(jr.fold_in, (None, 0))(key, jnp.arange(num_episodes))

    def episode(key):
        reset_key, run_key = jr.split(key)
        state, obs = env.reset(key=reset_key)

        def unfinished(carry):
            _, _, done, _, length = carry
            return ~done & (length < env.max_steps)

        def step(carry):
            state, obs, _, total, length = carry
            act_key, step_key = jr.split(jr.fold_in(run_key, length))
            state, timestep = env.step(state, policy(obs, act_key), key=step_key)
            return state, timestep.obs, timestep.done, total + timestep.reward, length + 1

        # Vmapped, a while loop runs until the last episode has ended and keeps the carry of the others.
        start = (state, obs, jnp.array(False), jnp.zeros(()), jnp.array(0))
        _, _, _, total, length = jax.lax.while_loop(unfinished, step, start)
        return total, length

    return jax.vmap(episode)(keys)


@eqx.filter_jit
def rollout_rewards(
    plan: Callable[..., Any],
    act: Callable[..., Float[Array, " act"]],
    env: AbstractEnv,
    num_episodes: int,
    *,
    replan_every: int = 1,
    key: Key[Array, ""],
) -> Float[Array, "episodes steps"]:
    """The rewards of episodes of a planner that makes a plan, follows it for some steps, and plans anew.

    **Arguments:**

    - `plan`: `(obs, key) -> plan`.
    - `act`: `(plan, step, obs, key) -> action`, `step` counting from 0 since the plan was made.
    - `replan_every`: steps for which a plan is followed.

    **Returns:** rewards, zero after an episode has ended, for `env.max_steps` steps.
    """
    num_plans = -(-env.max_steps // replan_every)

    def episode(key):
        reset_key, plan_key, step_key = jr.split(key, 3)
        state, obs = env.reset(key=reset_key)

        def follow(carry, number):
            current = plan(carry[1], jr.fold_in(plan_key, number))

            def step(carry, i):
                state, obs, done = carry
                act_key, env_key = jr.split(jr.fold_in(step_key, number * replan_every + i))
                state, timestep = env.step(state, act(current, i, obs, act_key), key=env_key)
                return (state, timestep.obs, done | timestep.done), jnp.where(done, 0.0, timestep.reward)

            return jax.lax.scan(step, carry, jnp.arange(replan_every))

        start = state, obs, jnp.array(False)
        rewards = jax.lax.scan(follow, start, jnp.arange(num_plans))[1]
        return rewards.reshape(-1)[: env.max_steps]

    return jax.vmap(episode)(jax.vmap(jr.fold_in, (None, 0))(key, jnp.arange(num_episodes)))


@eqx.filter_jit
def _act_batch(policy, obs, key, step):
    keys = jax.vmap(lambda i: jr.fold_in(jr.fold_in(key, i), step))(jnp.arange(len(obs)))
    return jax.vmap(policy)(obs, keys)


def _rollout_host(policy, env, num_episodes, key):
    seed_key, act_key = jr.split(key)
    envs = env.make(num_episodes, int(jr.randint(seed_key, (), 0, 2**31 - 1)))
    try:
        obs = envs.reset()
        returns, lengths = np.zeros(num_episodes), np.zeros(num_episodes, np.int32)
        running = np.ones(num_episodes, bool)
        while running.any():
            actions = _act_batch(policy, jnp.asarray(obs), act_key, jnp.asarray(lengths.max()))
            obs, timestep = envs.step(np.asarray(actions))
            returns += np.where(running, timestep.reward, 0.0)
            lengths += running
            running &= ~(timestep.terminated | timestep.truncated)
    finally:
        envs.close()
    return jnp.asarray(returns, jnp.float32), jnp.asarray(lengths)


def iqm(scores: Num[np.ndarray, "..."]) -> float:
    """The interquartile mean: the mean of what remains when a quarter is cut off at each end.

    Over all entries together, as the paper does with a runs x tasks table of normalised scores.
    """
    ordered = np.sort(scores, axis=None)
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def bootstrap_interval(
    scores: Num[np.ndarray, "..."],
    statistic: Callable[[np.ndarray], float] = iqm,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile-bootstrap interval of `statistic`, stratified over tasks.

    Runs are drawn with replacement within each task on its own, so every resample holds the tasks in equal
    parts. With fewer than about five runs the interval is too narrow: show the runs themselves as well.

    **Arguments:**

    - `scores`: (runs, tasks), or (runs,) for one task.
    - `statistic`: of a resampled table of the same shape, e.g. `iqm`, `np.mean`, `np.median`.
    - `confidence`: the mass inside, in (0, 1).

    **Returns:** the lower and the upper end.
    """
    table = np.asarray(scores)
    if table.ndim not in (1, 2) or table.size == 0:
        raise ValueError(f"scores has shape {table.shape}; (runs,) or (runs, tasks) is needed.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie in (0, 1).")
    table = table.reshape(len(table), -1)
    rng, columns = np.random.default_rng(seed), np.arange(table.shape[1])
    draws = [
        statistic(table[rng.integers(len(table), size=table.shape), columns]) for _ in range(num_resamples)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
