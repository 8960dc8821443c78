"""QVPO: advantages of the best draw, the weighted loss with its entropy term, and the number of candidates."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.algorithms.qvpo import QVPO
from eqgen.envs.base import example_transition
from eqgen.types import Transition
from helpers import assert_trees_close


OBS, ACT, BATCH = 3, 2, 6


class Quick(QVPO):
    """A policy that is one evaluation of the network, which compiles sooner than a chain."""

    def sample(self, actor, critics, obs, *, key):
        return jnp.tanh(3 * actor(jr.normal(key, (ACT,)), jnp.int32(0), obs))


SMALL = dataclasses.replace(Quick.tiny(), hidden=(8, 8), num_uniform_samples=3, entropy_weight=0.5)


def state_of(agent, seed=0, **changes):
    state = agent.init(example_transition((OBS,), ACT), key=jr.key(seed))
    return dataclasses.replace(state, **changes)


def transitions(key):
    keys = jr.split(key, 4)
    return Transition(
        obs=jr.normal(keys[0], (BATCH, OBS)),
        action=jr.uniform(keys[1], (BATCH, ACT), minval=-1.0, maxval=1.0),
        reward=jr.normal(keys[2], (BATCH,)),
        next_obs=jr.normal(keys[3], (BATCH, OBS)),
        terminated=jnp.full(BATCH, False),
        truncated=jnp.full(BATCH, False),
    )


class Bumps(eqx.Module):
    """Two critics; `value` is a share of the state, which says nothing about actions."""

    scale: jax.Array
    value: jax.Array

    def __call__(self, obs, action):
        q = jnp.sin(3 * action[0] + obs[0]) + action[1]
        return self.scale * jnp.stack([q, q + 0.1 * action[0]]) + self.value * obs[1]


def bumps(scale=1.0, value=0.0):
    return Bumps(jnp.array(scale), jnp.array(value))


DATA, KEYS = transitions(jr.key(0)), jr.split(jr.key(1), BATCH)
STATE = state_of(SMALL, critics=bumps())


@eqx.filter_jit
def best_sample(state, keys):
    return SMALL.best_sample(state, DATA.obs, keys=keys)


# --- Weights ---


def test_best_draw_and_its_advantage_over_the_mean_by_hand():
    actions, weights = best_sample(STATE, KEYS)
    draw = lambda s, k: SMALL.sample(STATE.actor, None, s, key=k)
    drawn = jax.jit(jax.vmap(jax.vmap(draw, (None, 0))))(DATA.obs, jax.vmap(lambda k: jr.split(k, 4))(KEYS))
    for i, obs in enumerate(DATA.obs):
        q = np.array([np.min(STATE.critics(obs, a)) for a in drawn[i]])
        np.testing.assert_allclose(actions[i], drawn[i, q.argmax()], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(weights[i], q.max() - q.mean(), rtol=1e-4, atol=1e-6)


def test_weights_ignore_values_between_states_and_scale_with_q():
    weights = lambda critics: best_sample(dataclasses.replace(STATE, critics=critics), KEYS)[1]
    plain = weights(bumps())
    assert float(plain.min()) > 0
    # Values of five leave an absolute rounding of 1e-6.
    np.testing.assert_allclose(weights(bumps(value=5.0)), plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights(bumps(scale=4.0)), 4 * plain, rtol=1e-4)
    np.testing.assert_allclose(weights(bumps(scale=0.0, value=1.0)), 0.0, atol=1e-6)


# --- The loss ---


def test_loss_and_gradient_are_those_of_the_weighted_best_and_uniform_actions():
    """(sum_i w_i e(best_i) + omega sum_ij w_i e(uniform_ij)) / (B + B N_e), each state with its own weight, and all
    but e held fixed: the chain that drew the actions is not differentiated."""
    key = jr.key(3)
    loss = lambda actor: SMALL.actor_loss(actor, STATE, DATA, DATA.action, key=key)
    (value, metrics), gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))(STATE.actor)

    sample_key, uniform_key, loss_key = jr.split(key, 3)
    best, weights = best_sample(STATE, jr.split(sample_key, BATCH))
    uniform = jr.uniform(uniform_key, (BATCH * 3, ACT), minval=-1.0, maxval=1.0)
    states = np.concatenate([np.arange(BATCH), np.arange(BATCH * 3) // 3])
    shares = np.asarray(weights)[states] * np.concatenate([np.ones(BATCH), np.full(BATCH * 3, 0.5)])
    step_key, noise_key = jr.split(loss_key)
    steps = jr.randint(step_key, states.shape, 0, SMALL.chain.num_steps)
    eps = jr.normal(noise_key, (len(states), ACT))
    alpha_bar = SMALL.chain.tables.alpha_bar[np.asarray(steps)][:, None]
    actions = np.concatenate([best, uniform])
    noised = jnp.asarray(np.sqrt(alpha_bar) * actions + np.sqrt(1 - alpha_bar) * eps, jnp.float32)

    def by_hand(actor):
        errors = (jax.vmap(actor)(noised, steps, DATA.obs[states]) - eps) ** 2
        return jnp.sum(jnp.asarray(shares, jnp.float32) * jnp.sum(errors, axis=1) / ACT) / (BATCH * 4)

    expected = eqx.filter_jit(eqx.filter_value_and_grad(by_hand))(STATE.actor)
    assert_trees_close((value, gradient), expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["actor/advantage"], jnp.mean(weights), rtol=1e-5)


class Recording(Quick):
    """Returns what its denoising loss is given, as if it were the loss, without drawing from the policy."""

    def best_sample(self, state, obs, *, keys):
        return jnp.zeros((BATCH, ACT)), jnp.arange(1.0, BATCH + 1)

    def denoising_loss(self, actor, *rows, key):
        return rows


def test_uniform_actions_fill_the_box_and_can_be_left_out():
    rows = lambda n: Recording(num_uniform_samples=n).actor_loss(
        STATE.actor, STATE, DATA, DATA.action, key=jr.key(5)
    )[0]
    obs, actions, weights = rows(200)
    uniform = np.asarray(actions[BATCH:])
    assert uniform.min() < -0.99 and uniform.max() > 0.99 and abs(uniform.mean()) < 0.05
    assert_trees_close(obs[BATCH:], jnp.repeat(DATA.obs, 200, axis=0))
    assert_trees_close(weights[BATCH:], 0.02 * jnp.repeat(weights[:BATCH], 200))
    assert [len(x) for x in rows(0)] == [BATCH] * 3


def test_entropy_weight_falls_linearly_to_its_floor():
    agent = QVPO(entropy_decay_updates=1000)
    omega = lambda step: float(agent.omega(dataclasses.replace(STATE, step=jnp.int32(step))))
    np.testing.assert_allclose([omega(s) for s in (0, 500, 899)], [0.02, 0.01, 0.00202], rtol=1e-5)
    np.testing.assert_allclose([omega(s) for s in (901, 5000)], 0.002, rtol=1e-5)


# --- Acting and the target ---


def test_target_takes_the_best_of_its_own_number_of_draws_of_the_target_networks():
    asked = {}

    class Asked(Quick):
        def best_of_n(self, state, obs, num_candidates, *, keys):
            asked.update(actor=state.actor, critics=state.critics, n=num_candidates)
            return DATA.action

    state = dataclasses.replace(STATE, target_critics=bumps(scale=2.0))
    values, actions = Asked(num_candidates=2, num_target_candidates=5).next_values(
        state, DATA.next_obs, key=jr.key(8)
    )
    assert asked == dict(actor=state.target_actor, critics=state.target_critics, n=5)
    assert_trees_close(actions, DATA.action)
    by_hand = [min(state.target_critics(s, a)) for s, a in zip(DATA.next_obs, actions)]
    np.testing.assert_allclose(values, by_hand, rtol=1e-5)


def test_an_advantage_over_nothing_is_refused():
    with pytest.raises(ValueError, match="num_train_samples is 1"):
        QVPO(num_train_samples=1)
