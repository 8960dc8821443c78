"""MaxEntDP: its log-probability against a Gaussian policy's, its noise target and soft value by hand."""

import dataclasses
import math
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array, Float

from eqgen.algorithms.maxentdp import MaxEntDP
from eqgen.envs.base import example_transition
from eqgen.timesteps.times import DiffusionChain
from eqgen.types import Transition


OBS, ACT, BATCH = 3, 2, 4
AGENT = dataclasses.replace(MaxEntDP.tiny(), hidden=(8,))
CHAIN = AGENT.chain
log_prob, sample = eqx.filter_jit(AGENT.log_prob), eqx.filter_jit(AGENT.chain_sample)


class GaussianNoise(eqx.Module):
    """The exact noise predictor of the policy N(mean, std^2 I)."""

    mean: Float[Array, " act"]
    std: float
    chain: DiffusionChain = eqx.field(static=True)

    def step_shares(self):
        steps = self.chain.points()
        return jnp.stack([self.chain.alpha(steps), self.chain.sigma(steps)], axis=1)

    def at(self, obs):
        def predict(x, share):
            alpha, sigma = share
            return sigma * (x - alpha * self.mean) / ((alpha * self.std) ** 2 + sigma**2)

        return predict


@cache
def fresh():
    return eqx.filter_jit(lambda key: AGENT.init(example_transition((OBS,), ACT), key=key))(jr.key(0))


def transitions(key):
    keys = jr.split(key, 4)
    return Transition(
        obs=jr.normal(keys[0], (BATCH, OBS)),
        action=jr.uniform(keys[1], (BATCH, ACT), minval=-1.0, maxval=1.0),
        reward=jr.normal(keys[2], (BATCH,)),
        next_obs=jr.normal(keys[3], (BATCH, OBS)),
        terminated=jnp.full(BATCH, False),
        truncated=jnp.full(BATCH, True),
    )


@eqx.filter_jit
def smaller(critics, obs, action):
    return jnp.min(critics(obs, action))


@eqx.filter_jit
def predict(actor, x, step, obs):
    return jax.vmap(lambda x: actor(x, step, obs))(x)


# --- The log-probability ---


def test_log_prob_is_the_sum_over_steps_of_the_noise_error_by_hand():
    """In the published form, by errors of the noise, in NumPy and double precision."""
    state, batch, key = fresh(), transitions(jr.key(1)), jr.key(2)
    found = log_prob(state.actor, batch.obs, batch.action, key=key)
    alpha_bar = CHAIN.tables.alpha_bar
    before = np.append(1.0, alpha_bar[:-1])
    weights = (before - alpha_bar) / (2 * alpha_bar * (1 - alpha_bar))
    for i, row_key in enumerate(jr.split(key, BATCH)):
        total = -0.5 * ACT * math.log(2 * math.pi * math.e)
        for k, step_key in enumerate(jr.split(row_key, CHAIN.num_steps)):
            alpha, sigma = np.sqrt(alpha_bar[k]), np.sqrt(1 - alpha_bar[k])
            eps = np.asarray(jr.normal(step_key, (AGENT.num_log_prob_samples, ACT)), float)
            a_t = alpha * np.asarray(batch.action[i], float) + sigma * eps
            predicted = predict(state.actor, jnp.asarray(a_t, jnp.float32), jnp.int32(k), batch.obs[i])
            denoised = np.clip((a_t - sigma * np.asarray(predicted, float)) / alpha, -1, 1)
            error = np.sum((eps - (a_t - alpha * denoised) / sigma) ** 2, axis=1)
            total += weights[k] * (alpha_bar[k] * ACT - np.mean(error))
        assert float(found[i]) == pytest.approx(total, rel=1e-4, abs=1e-4)


def gaussian_log_probs(num_steps, std=0.2, repeats=64):
    """Means of the estimates at actions 0, 1, 2 deviations off in both dimensions, and the exact values."""
    agent = MaxEntDP(chain=DiffusionChain(num_steps, betas="cosine"), num_log_prob_samples=64)
    actor = GaussianNoise(jnp.array([0.1, -0.1]), std, agent.chain)
    z = np.arange(3.0)
    actions = actor.mean[None] + std * jnp.repeat(jnp.arange(3.0), repeats)[:, None]
    found = eqx.filter_jit(agent.log_prob)(actor, jnp.zeros((3 * repeats, OBS)), actions, key=jr.key(3))
    exact = ACT * (-0.5 * z**2 - math.log(std * math.sqrt(2 * math.pi)))
    return np.asarray(found).reshape(3, repeats).mean(axis=1), exact


def test_log_prob_of_a_gaussian_is_exact_in_the_limit_of_many_steps():
    found, exact = gaussian_log_probs(400)
    # The Riemann sum is off by up to 0.017 per dimension; the standard error of the means is 0.02.
    np.testing.assert_allclose(found, exact, atol=0.08)


def test_twenty_steps_find_too_much_entropy_by_what_the_head_says():
    """One deviation from the mean is where -log pi is the entropy: 0.18 too much per dimension."""
    found, exact = gaussian_log_probs(20)
    assert exact[1] - found[1] == pytest.approx(ACT * 0.18, abs=0.05)  # a standard error of 0.014


# --- The noise target ---


@eqx.filter_jit
def noise_target(value, a_t, alpha, sigma, temperature=0.5):
    """With Q a function of the action alone, by 4000 proposals."""
    agent = MaxEntDP(num_proposals=4000, temperature=temperature)
    critics = lambda obs, action: jnp.stack([value(action), value(action) + 1.0])
    return agent.noise_target(critics, jnp.zeros(OBS), a_t, alpha, sigma, key=jr.key(4))[0]


def test_noise_target_of_a_gaussian_is_its_noise_predictor():
    """exp(Q / beta) is N(mean, 0.1^2 I), nothing of which is outside the box."""
    mean, std = jnp.array([0.2, -0.3]), 0.1
    value = lambda action: -0.25 * jnp.sum((action - mean) ** 2) / std**2
    for alpha, sigma, a_t in ((0.98, 0.2, [0.3, -0.4]), (0.6, 0.8, [1.0, -0.9]), (0.01, 1.0, [-2.0, 1.0])):
        a_t, alpha, sigma = jnp.array(a_t), jnp.array(alpha), jnp.array(sigma)
        exact = sigma * (a_t - alpha * mean) / ((alpha * std) ** 2 + sigma**2)
        # The mean of some hundred effective proposals, in units of alpha std / sigma.
        atol = float(0.3 * alpha * std / sigma) + 1e-5
        np.testing.assert_allclose(noise_target(value, a_t, alpha, sigma), exact, atol=atol)


def test_critics_are_asked_inside_the_box_only_and_offsets_do_not_count():
    a_t, alpha, sigma = jnp.array([3.0, -0.5]), jnp.array(0.5), jnp.array(0.9)
    inside = lambda action: jnp.where(jnp.all(jnp.abs(action) <= 1), jnp.sum(jnp.sin(3 * action)), jnp.nan)
    eps = noise_target(inside, a_t, alpha, sigma)
    assert bool(jnp.all(jnp.isfinite(eps)))
    np.testing.assert_allclose(noise_target(lambda a: inside(a) + 10.0, a_t, alpha, sigma), eps, atol=1e-4)
    np.testing.assert_allclose(noise_target(lambda a: 4 * inside(a), a_t, alpha, sigma, 2.0), eps, atol=1e-4)


def test_actor_regresses_on_the_noise_of_replayed_actions_under_the_target_critics():
    state, batch, key = fresh(), transitions(jr.key(5)), jr.key(6)
    state = dataclasses.replace(state, target_critics=jax.tree.map(lambda x: 3 * x, state.critics))
    loss, metrics = eqx.filter_jit(AGENT.actor_loss)(
        state.actor, state, batch, batch.next_obs[:, :ACT], key=key
    )
    noise_key, proposal_key = jr.split(key)
    rows = (*AGENT.noised(batch.action, key=noise_key), jr.split(proposal_key, BATCH))
    target = eqx.filter_jit(AGENT.noise_target)
    squares = []
    for obs, a_t, step, alpha, sigma, row_key in zip(batch.obs, *rows):
        eps, _ = target(state.target_critics, obs, a_t, alpha, sigma, key=row_key)
        squares.append((predict(state.actor, a_t[None], step, obs)[0] - eps) ** 2)
    assert float(loss) == pytest.approx(float(np.mean(squares)), rel=1e-4)
    assert 1 <= float(metrics["actor/effective_samples"]) <= AGENT.num_proposals


# --- The soft value, and acting ---


def test_soft_value_by_hand():
    """min_j Q_target_j(s', a') - beta log pi(a'|s'), of one action without noise."""
    state, batch, key = fresh(), transitions(jr.key(7)), jr.key(8)
    values, actions = eqx.filter_jit(AGENT.next_values)(state, batch.next_obs, key=key)
    action_key, log_prob_key = jr.split(key)
    log_probs = log_prob(state.actor, batch.next_obs, actions, key=log_prob_key)
    for i, (obs, row_key) in enumerate(zip(batch.next_obs, jr.split(action_key, (2, BATCH))[0])):
        np.testing.assert_allclose(actions[i], sample(state.actor, obs, key=row_key), atol=1e-5)
        expected = smaller(state.target_critics, obs, actions[i]) - 0.1 * log_probs[i]
        assert float(values[i]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_one_draw_explores_and_the_best_of_several_is_evaluated():
    state, obs, key = fresh(), jnp.ones(OBS), jr.key(9)
    both = lambda state, key: [AGENT.act(state, obs, key=key, explore=explore) for explore in (True, False)]
    exploring, greedy = eqx.filter_jit(both)(state, key)
    candidate_key = jr.split(key)[0]
    np.testing.assert_allclose(exploring, sample(state.actor, obs, key=candidate_key), atol=1e-5)
    candidates = [sample(state.actor, obs, key=k) for k in jr.split(candidate_key, AGENT.num_eval_candidates)]
    values = [float(smaller(state.critics, obs, action)) for action in candidates]
    np.testing.assert_allclose(greedy, candidates[int(np.argmax(values))], atol=1e-5)


def test_defaults_are_the_published_ones():
    agent = MaxEntDP()
    assert (agent.chain.num_steps, agent.num_proposals, agent.num_log_prob_samples) == (20, 500, 50)
    assert (agent.temperature, agent.num_candidates, agent.num_eval_candidates) == (0.1, 1, 10)
    assert (agent.exploration, agent.noisy_target_action, agent.reward_scale, agent.policy_delay) == (
        "none",
        False,
        1.0,
        1,
    )
