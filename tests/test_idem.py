"""iDEM as a policy: its estimate and its loss by hand, exact scores, what clipping proposals costs."""

import dataclasses
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen import scores
from eqgen.algorithms.idem import IDEM
from eqgen.envs.base import example_transition
from eqgen.samplers import ddpm, uniform_grid
from eqgen.types import Transition
from helpers import assert_trees_close, filled


OBS, ACT, BATCH = 3, 2, 8


def state_of(agent, seed=0):
    init = lambda key: agent.init(example_transition((OBS,), ACT), key=key)
    return filled(eqx.filter_eval_shape(init, jr.key(0)), seed=seed)


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


def agent_with(proposals, **fields):
    return dataclasses.replace(IDEM.tiny(), proposals=proposals, **fields)


G = np.array([1.0, -2.0], np.float32)
LEVEL = (jnp.array(0.9), jnp.array(0.4))


def linear(action):
    return jnp.dot(jnp.asarray(G), action)


def test_free_proposals_give_the_exact_score_of_a_linear_q(getkey):
    """S = beta g / alpha_t, for any number of proposals."""
    agent = agent_with("free", num_proposals=3, inverse_temperature=1.5)
    estimate = agent.score(linear, 3 * jr.normal(getkey(), (ACT,)), *LEVEL, key=getkey())
    np.testing.assert_allclose(estimate.score, 1.5 * G / 0.9, rtol=1e-5)


def test_clipped_proposals_have_no_gradient_outside_the_box(getkey):
    agent, a_t, key = agent_with("clipped", num_proposals=50), jnp.array([0.8, 0.1]), getkey()
    estimate = agent.score(linear, a_t, *LEVEL, key=key)
    a_0 = np.asarray(scores.normal_proposals(a_t, *LEVEL, num_samples=50, key=key))
    q = np.clip(a_0, -1, 1) @ G
    weights = np.exp(q) / np.sum(np.exp(q))
    inside = np.abs(a_0) < 1
    assert 0 < inside.sum() < inside.size
    expected = np.sum(weights[:, None] * inside * G, axis=0) / 0.9
    np.testing.assert_allclose(estimate.score, expected, rtol=1e-4)


def test_truncated_proposals_know_the_box_and_clipped_ones_do_not(getkey):
    """Under a constant Q the policy is uniform on the box, and the score pulls into it. Clipped proposals say 0."""
    a_t, constant = jnp.array([0.8, -1.4]), lambda action: jnp.zeros(())
    assert_trees_close(agent_with("clipped").score(constant, a_t, *LEVEL, key=getkey()).score, jnp.zeros(ACT))
    truncated = agent_with("truncated", num_proposals=20_000).score(constant, a_t, *LEVEL, key=getkey())
    # E[a_0 | a_t] is the mean of N(a_t / alpha, (sigma / alpha)^2) truncated to the box, in closed form.
    centre, width = np.asarray(a_t) / 0.9, 0.4 / 0.9
    low, high = (-1 - centre) / width, (1 - centre) / width
    density = lambda z: np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    mass = np.asarray(jax.scipy.stats.norm.cdf(high) - jax.scipy.stats.norm.cdf(low))
    mean = centre + width * (density(low) - density(high)) / mass
    # 20,000 draws of deviation below 0.4 have a mean that is off by 0.003.
    np.testing.assert_allclose(truncated.posterior_mean, mean, atol=0.01)
    np.testing.assert_allclose(truncated.score, (0.9 * mean - np.asarray(a_t)) / 0.16, atol=0.06)


@pytest.mark.parametrize("proposals", ["clipped", "free", "truncated"])
def test_critics_are_asked_about_actions_in_the_box_unless_proposals_are_free(proposals, getkey):
    seen = []

    def q(action):
        jax.debug.callback(lambda x: seen.append(float(x)), jnp.max(jnp.abs(action)))
        return jnp.sum(action)

    agent_with(proposals).score(q, jnp.array([1.2, -0.3]), *LEVEL, key=getkey())
    jax.effects_barrier()
    assert (max(seen) <= 1) == (proposals != "free")


def test_only_the_truncated_law_samples_the_density_on_the_box():
    """The estimate itself as the noise predictor of the default chain, for Q = 5 (a_1 + a_2)."""

    def mean(proposals):
        agent = IDEM(proposals=proposals)
        schedule, q = agent.chain.schedule, lambda action: 5 * jnp.sum(action)

        def one(key):
            start_key, chain_key, score_key = jr.split(key, 3)

            def denoise(x, t):
                level, k = (schedule.alpha(t), schedule.sigma(t)), jnp.round(20 * t).astype(jnp.int32)
                score = agent.score(q, x, *level, key=jr.fold_in(score_key, k)).score
                return jnp.clip((x + level[1] ** 2 * score) / level[0], -1, 1)

            start = jr.normal(start_key, (ACT,))
            return ddpm(denoise, start, uniform_grid(20), schedule, key=chain_key)[0]

        return float(jnp.mean(jax.jit(jax.vmap(one))(jr.split(jr.key(0), 500))))

    exact = 1 / np.tanh(5) - 1 / 5  # of the density exp(5 a) on [-1, 1]
    # 1000 numbers of deviation 0.2 have a mean that is off by 0.006.
    assert mean("truncated") == pytest.approx(exact, abs=0.03)
    assert mean("clipped") > exact + 0.1


def test_loss_is_the_error_to_minus_sigma_times_the_score():
    agent, key = agent_with("clipped"), jr.key(3)
    state, batch = state_of(agent), transitions(jr.key(1))

    @eqx.filter_jit
    def parts(key):
        loss, metrics = agent.actor_loss(state.actor, state, batch, batch.action, key=key)
        sample_key, noise_key, score_key = jr.split(key, 3)
        clean = agent.best_of_n(state, batch.obs, agent.num_candidates, keys=jr.split(sample_key, BATCH))
        a_t, steps, alpha, sigma = agent.noised(clean, key=noise_key)

        def score(s, a_t, alpha, sigma, key):
            q = lambda a: jnp.min(state.critics(s, a))
            return agent.score(q, a_t, alpha, sigma, key=key).score

        rows = (batch.obs, a_t, alpha, sigma, jr.split(score_key, BATCH))
        return loss, metrics, jax.vmap(score)(*rows), sigma, jax.vmap(state.actor)(a_t, steps, batch.obs)

    loss, metrics, score, sigma, predicted = (jax.tree.map(np.asarray, x) for x in parts(key))
    by_hand = np.mean((predicted + sigma[:, None] * score) ** 2)
    assert float(loss) == pytest.approx(by_hand, rel=1e-4)
    assert set(metrics) == {f"actor/{name}" for name in agent.reports}


OPTIONS = {"num_proposals": 5, "proposals": "clipped", "inverse_temperature": 2.0, "num_candidates": 3}


@cache
def program(agent):
    """The update as JAX traces it, constants included."""
    init = lambda key: agent.init(example_transition((OBS,), ACT), key=key)
    state = eqx.filter_eval_shape(init, jr.key(0))
    update = lambda s, key: agent.update(s, transitions(jr.key(0)), key=key)
    return str(eqx.filter_make_jaxpr(update)(state, jr.key(1))[0])


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_of_its_own_is_accepted_and_ignored(name):
    assert program(dataclasses.replace(IDEM.tiny(), **{name: OPTIONS[name]})) != program(IDEM.tiny())
    others = {program(agent_with(p)) for p in ("clipped", "free", "truncated")}
    assert len(others) == 3
