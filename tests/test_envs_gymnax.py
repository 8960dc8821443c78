"""The gymnax adapter against gymnax's own interface, and gymnax's Pendulum against Gymnasium's."""

import equinox as eqx
import gymnasium
import gymnax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.envs.base import step_autoreset
from eqgen.envs.gymnax import GymnaxEnv, check_gymnax_version


# One that never ends by itself, one that does, one whose bounds are not [-1, 1].
@pytest.mark.parametrize("gymnax_id", ["Pendulum-v1", "MountainCarContinuous-v0", "PointRobot-misc"])
def test_steps_as_gymnax_does(gymnax_id, getkey):
    """With the same key, from the same state, `step_autoreset` is gymnax's `step`, resets included."""
    env = GymnaxEnv(gymnax_id)
    original, params = gymnax.make(gymnax_id)
    space = original.action_space(params)
    low, high = (jnp.broadcast_to(bound, space.shape) for bound in (space.low, space.high))

    def body(state, key):
        act_key, step_key = jr.split(key)
        action = jr.uniform(act_key, (env.action_dim,), minval=-1.0, maxval=1.0)
        if gymnax_id == "MountainCarContinuous-v0":  # pushed the way it moves, the car arrives
            action = jnp.where(state.velocity > 0, 1.0, -1.0)[None]
        ours = step_autoreset(env, state, action, key=step_key)
        scaled = low + (action + 1) / 2 * (high - low)
        with jax.numpy_rank_promotion("allow"):
            obs, gymnax_state, reward, terminated, truncated, info = original.step(
                step_key, state, scaled, params
            )
        theirs = gymnax_state, obs, info["final_observation"], reward, terminated, truncated
        next_state, next_obs, timestep = ours
        flat = next_state, next_obs, timestep.obs, timestep.reward, timestep.terminated, timestep.truncated
        return next_state, (flat, theirs)

    key = getkey()
    reset_state, reset_obs = env.reset(key=key)
    their_obs, their_state = original.reset(key, params)
    np.testing.assert_allclose(reset_obs, their_obs, rtol=1e-6)
    _, (ours, theirs) = jax.jit(lambda s, k: jax.lax.scan(body, s, k))(reset_state, jr.split(key, 1200))
    for ours_leaf, their_leaf in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(ours_leaf, their_leaf, rtol=1e-5, atol=1e-6)
    terminated, truncated = ours[4], ours[5]
    assert truncated.any() or terminated.any()
    assert terminated.any() == (gymnax_id == "MountainCarContinuous-v0")


def test_pendulum_moves_as_gymnasium_s(getkey):
    env, reference = GymnaxEnv("Pendulum-v1"), gymnasium.make("Pendulum-v1").unwrapped
    reference.reset(seed=0)
    state, _ = env.reset(key=getkey())
    step = jax.jit(lambda state, action: env.step(state, action, key=jr.key(0)))
    for action in np.random.default_rng(0).uniform(-1, 1, (100, 1)).astype(np.float32):
        reference.state = np.array([state.theta, state.theta_dot])
        obs, reward, *_ = reference.step(2 * action)
        state, timestep = step(state, action)
        np.testing.assert_allclose(timestep.obs, obs, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(timestep.reward, reward, rtol=1e-4, atol=1e-5)


def test_the_same_name_shares_compiled_functions(getkey):
    traces = []

    @eqx.filter_jit
    def first_obs(env, key):
        traces.append(env)
        return env.reset(key=key)[1]

    for _ in range(2):
        first_obs(GymnaxEnv("Pendulum-v1"), getkey())
    assert len(traces) == 1
    assert GymnaxEnv("Pendulum-v1") == GymnaxEnv("Pendulum-v1")


def test_an_old_gymnax_is_refused_with_the_remedy():
    for found in (None, "0.0.9", "1.0.0"):
        with pytest.raises(ImportError, match=r'pip install "gymnax>=1.0.1,<2"'):
            check_gymnax_version(found)
    for found in ("1.0.1", "1.0.2rc1", "1.1", "1.10.0"):
        check_gymnax_version(found)
