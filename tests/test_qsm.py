"""Q-score matching: targets in closed form, loss and chain by NumPy, the temperature of a trained score."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from eqgen.algorithms.qsm import QSM, DenoisingQSM, soft_policy_score
from eqgen.envs.base import example_transition
from eqgen.tree import filter_scan
from eqgen.types import Transition


OBS, ACT, BATCH = 3, 2, 8
CENTRE = np.array([0.2, -0.1], np.float32)
SMALL = dataclasses.replace(QSM.tiny(), hidden=(8, 8))
DENOISING = dataclasses.replace(DenoisingQSM.tiny(), hidden=(8, 8), inverse_temperature=2.0)


def state_of(agent):
    return agent.init(example_transition((OBS,), ACT), key=jr.key(0))


def transitions(key, n=BATCH):
    keys = jr.split(key, 4)
    return Transition(
        obs=jr.normal(keys[0], (n, OBS)),
        action=jr.uniform(keys[1], (n, ACT), minval=-1.0, maxval=1.0),
        reward=jr.normal(keys[2], (n,)),
        next_obs=jr.normal(keys[3], (n, OBS)),
        terminated=jnp.full(n, False),
        truncated=jnp.full(n, False),
    )


def quadratic(obs, action):
    """Two critics with the common maximum CENTRE and curvatures 10 and 30, the state's value beside."""
    return -0.5 * jnp.array([10.0, 30.0]) * jnp.sum((action - CENTRE) ** 2) + 100 * obs[0]


@eqx.filter_jit
def actor_loss(agent, actor, batch, key):
    state = dataclasses.replace(STATE, critics=quadratic)
    return agent.actor_loss(actor, state, batch, batch.action, key=key)


def numpy_score(actor, obs, actions):
    """The ReLU network's output from its arrays alone."""
    x = np.concatenate([actions, obs], axis=-1)
    for number, layer in enumerate(actor.net.layers):
        x = np.maximum(x, 0) if number else x
        x = x @ np.concatenate([np.asarray(w) for w in layer.weights]) + np.asarray(layer.bias)
    return x


STATE, DATA, KEY = state_of(SMALL), transitions(jr.key(0)), jr.key(2)
OBSERVATIONS, ACTIONS = np.asarray(DATA.obs), np.asarray(DATA.action)


# --- What is matched ---


def test_target_is_the_score_of_the_soft_policy_by_the_mean_critic():
    """alpha 20 (centre - a), whatever the state is worth."""
    target = jax.jit(partial(soft_policy_score, quadratic, inverse_temperature=0.5))(DATA.obs, DATA.action)
    np.testing.assert_allclose(target, 0.5 * 20.0 * (CENTRE - ACTIONS), rtol=1e-5, atol=1e-6)


def test_loss_is_that_of_numpy_arithmetic_on_the_networks_weights():
    agent = dataclasses.replace(SMALL, inverse_temperature=0.3)
    loss, metrics = actor_loss(agent, STATE.actor, DATA, KEY)
    score, target = numpy_score(STATE.actor, OBSERVATIONS, ACTIONS), 0.3 * 20.0 * (CENTRE - ACTIONS)
    np.testing.assert_allclose(loss, np.mean((score - target) ** 2), rtol=1e-5)
    lengths = np.linalg.norm(target, axis=1)
    cosines = np.sum(score * target, axis=1) / lengths / np.linalg.norm(score, axis=1)
    np.testing.assert_allclose(metrics["actor/cosine"], cosines.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["actor/target_norm"], lengths.mean(), rtol=1e-5)


def test_denoising_form_regresses_on_minus_sigma_times_the_score_at_the_noised_action():
    silent = lambda a_t, step, obs: jnp.zeros(ACT)
    loss, _ = actor_loss(DENOISING, silent, DATA, KEY)
    step_key, noise_key = jr.split(KEY)
    steps = np.asarray(jr.randint(step_key, (BATCH,), 0, 5))
    eps = np.asarray(jr.normal(noise_key, (BATCH, ACT)))
    # VPLinear(0.1, 10) at t = (step + 1) / 5.
    t = (steps[:, None] + 1) / 5
    alpha_bar = np.exp(-0.1 * t - 0.5 * 9.9 * t**2)
    a_t = np.sqrt(alpha_bar) * ACTIONS + np.sqrt(1 - alpha_bar) * eps
    expected = -np.sqrt(1 - alpha_bar) * 2.0 * 20.0 * (CENTRE - a_t)
    np.testing.assert_allclose(loss, np.mean(expected**2), rtol=1e-4)


# --- The policy ---


def test_folded_score_equals_the_plain_one():
    both = lambda a, s: (STATE.actor.at(s)(a), STATE.actor(a, s))
    folded, plain = jax.jit(jax.vmap(both))(DATA.action, DATA.obs)
    np.testing.assert_allclose(folded, plain, rtol=1e-5, atol=1e-6)


def test_chain_is_langevin_with_falling_steps_by_numpy():
    """From N(0, I), a <- clip(a + eta/2 Psi + sqrt(eta) z) with eta 1, 2/3 and 1/3 of the first."""
    agent, obs = dataclasses.replace(SMALL, first_step_size=0.6), np.ones(OBS, np.float32)
    sampled = jax.jit(lambda obs, key: agent.sample(STATE.actor, None, obs, key=key))(jnp.asarray(obs), KEY)
    start_key, chain_key = jr.split(KEY)
    a = np.asarray(jr.normal(start_key, (ACT,)))
    for eta, key in zip((0.6, 0.4, 0.2), jr.split(chain_key, 3)):
        z = np.asarray(jr.normal(key, (ACT,)))
        a = np.clip(a + eta / 2 * numpy_score(STATE.actor, obs, a) + np.sqrt(eta) * z, -1, 1)
    np.testing.assert_allclose(sampled, a, rtol=1e-5, atol=1e-6)


def test_trained_policy_has_the_temperature():
    """Q = -20 |a - centre|^2 / 2: the actions' variance is 1 / (20 alpha), their mean the centre."""
    alpha = 4.0
    agent = QSM(inverse_temperature=alpha, num_steps=40, first_step_size=0.4 / (20 * alpha), hidden=(32,))
    optimizer = optax.adam(1e-2)

    def step(carry, key):
        actor, opt_state = carry
        loss = lambda actor: actor_loss(agent, actor, transitions(key, 64), key)[0]
        updates, opt_state = optimizer.update(eqx.filter_grad(loss)(actor), opt_state)
        return (eqx.apply_updates(actor, updates), opt_state), None

    @eqx.filter_jit
    def trained_actions(actor):
        opt_state = optimizer.init(eqx.filter(actor, eqx.is_inexact_array))
        (actor, _), _ = filter_scan(step, (actor, opt_state), jr.split(jr.key(0), 1500))
        draw = lambda key: agent.sample(actor, None, jnp.zeros(OBS), key=key)
        return jax.vmap(draw)(jr.split(jr.key(1), 4000))

    drawn = np.asarray(trained_actions(agent.make_actor(OBS, ACT, key=jr.key(3))))
    # A network of 32 units is right to a few per cent; steps of at most 0.4 / curvature add 2 to 10 % of variance.
    np.testing.assert_allclose(drawn.mean(axis=0), CENTRE, atol=0.03)
    np.testing.assert_allclose(drawn.var(axis=0), 1 / (20 * alpha), rtol=0.25)


# --- What is refused ---


@pytest.mark.parametrize("cls", [QSM, DenoisingQSM])
def test_temperatures_that_are_none_are_refused(cls):
    with pytest.raises(ValueError, match=r"inverse_temperature is 0.*positive"):
        cls(inverse_temperature=0.0)


def test_chains_without_steps_are_refused():
    with pytest.raises(ValueError, match=r"num_steps is 0"):
        QSM(num_steps=0)
    with pytest.raises(ValueError, match=r"first_step_size is -1"):
        QSM(first_step_size=-1.0)
