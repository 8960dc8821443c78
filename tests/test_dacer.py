"""DACER: the derivative down the chain, the losses and targets by hand, and the noise that follows the entropy."""

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

from eqgen.algorithms.dacer import DACER
from eqgen.envs.base import example_transition
from eqgen.exploration import AnnealedNoise, add_noise
from eqgen.schedules import VPLinear
from eqgen.timesteps.times import DiffusionChain
from eqgen.types import Transition
from helpers import assert_trees_close


OBS, ACT, BATCH = 3, 2, 8
AGENT = dataclasses.replace(DACER.tiny(), hidden=(8,))


class Shifts(eqx.Module):
    """An actor whose predicted noise is one number for each step, whatever it sees."""

    noise: Float[Array, " steps"]
    action_size: int = eqx.field(static=True, default=1)

    def step_shares(self):
        return self.noise[:, None]

    def at(self, obs):
        return lambda x, share: share + jnp.zeros_like(x)


class Points(eqx.Module):
    """An actor that knows the noise of chains to one action."""

    action: Float[Array, " act"]
    chain: DiffusionChain = eqx.field(static=True)

    @property
    def action_size(self):
        return self.action.size

    def step_shares(self):
        steps = self.chain.points()
        return jnp.stack([self.chain.alpha(steps), self.chain.sigma(steps)], axis=1)

    def at(self, obs):
        return lambda x, share: (x - share[0] * self.action) / share[1]


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
        terminated=jnp.arange(BATCH) % 2 == 0,
        truncated=jnp.full(BATCH, True),
    )


# --- The chain ---


def test_default_chain_has_the_levels_of_the_published_rates():
    """exp(-(0.1 t + 9.9 t^2 / 2)) at t = 1/20, 2/20, ..., 1."""
    chain, schedule = DACER().chain, VPLinear(0.1, 10.0)
    for levels, of_schedule in ((chain.alpha, schedule.alpha), (chain.sigma, schedule.sigma)):
        np.testing.assert_allclose(
            levels(chain.points()), jax.vmap(of_schedule)(jnp.arange(1, 21) / 20), rtol=1e-5
        )
    t = np.arange(1, 21)
    np.testing.assert_allclose(chain.tables.beta, 1 - np.exp(-0.1 / 20 - 4.95 * (2 * t - 1) / 400), rtol=1e-9)


def test_derivative_passes_through_every_step_of_the_chain():
    """Unclipped, a_{k-1} = A_k a_k + B_k (a_k - sigma_k c_k) / alpha_k: d a_0 / d c_k is a product of factors."""
    chain = DiffusionChain(4, betas="vp", beta_range=(1e-4, 3e-4))
    agent = dataclasses.replace(AGENT, chain=chain)
    actor, key = Shifts(jnp.array([0.1, -0.2, 0.3, 0.2])), jr.key(2)
    action = lambda actor: agent.chain_sample(actor, jnp.zeros(OBS), key=key)[0]
    value, grad = eqx.filter_jit(eqx.filter_value_and_grad(action))(actor)
    assert abs(float(value)) < 0.9  # this key's chain stays clear of the box, where derivatives are 0

    beta, alpha_bar = chain.tables.beta, chain.tables.alpha_bar
    before, alpha, sigma = np.append(1.0, alpha_bar[:-1]), np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    of_action = np.sqrt(before) * beta / (1 - alpha_bar)
    of_state = np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)
    onwards = np.append(1.0, np.cumprod(of_state + of_action / alpha)[:-1])
    np.testing.assert_allclose(
        grad.noise, -onwards * of_action * sigma / alpha, rtol=1e-3
    )  # log-SNRs in float32


# --- Losses and targets ---


@eqx.filter_jit
def noisy(actor, obs, sample_key, noise_key, std):
    return add_noise(AGENT.chain_sample(actor, obs, key=sample_key), std, key=noise_key)


@eqx.filter_jit
def smaller(critics, obs, action):
    return jnp.min(critics(obs, action))


def test_actor_ascends_the_smaller_value_of_its_noisy_actions():
    state, batch, key = fresh(), transitions(jr.key(0)), jr.key(1)
    loss, metrics = eqx.filter_jit(AGENT.actor_loss)(state.actor, state, batch, batch.action, key=key)
    values = []
    for obs, row_key in zip(batch.obs, jr.split(key, BATCH)):
        action = noisy(state.actor, obs, *jr.split(row_key), 0.3)  # lambda alpha is 0.1 x 3 at the beginning
        values.append(float(smaller(state.critics, obs, action)))
    assert float(loss) == pytest.approx(-np.mean(values), rel=1e-4)
    assert metrics.keys() == {"actor/loss", "actor/entropy"}


def test_target_takes_one_noisy_action_and_no_entropy():
    state, batch = fresh(), transitions(jr.key(0))
    values, actions = eqx.filter_jit(AGENT.next_values)(state, batch.next_obs, key=jr.key(1))
    actor_keys, noise_keys = jr.split(jr.key(1), (2, BATCH))
    for i, obs in enumerate(batch.next_obs):
        np.testing.assert_allclose(
            actions[i], noisy(state.actor, obs, actor_keys[i], noise_keys[i], 0.3), atol=1e-5
        )
        assert float(values[i]) == pytest.approx(
            float(smaller(state.target_critics, obs, actions[i])), rel=1e-4
        )


def test_one_draw_is_what_is_done_and_noise_is_for_exploration_only():
    state, obs, key = fresh(), jnp.ones(OBS), jr.key(3)
    both = lambda state, obs, key: [
        AGENT.act(state, obs, key=key, explore=explore) for explore in (True, False)
    ]
    exploring, greedy = eqx.filter_jit(both)(state, obs, key)
    assert_trees_close(greedy, noisy(state.actor, obs, *jr.split(key), 0.0), atol=1e-5)
    assert_trees_close(exploring, noisy(state.actor, obs, *jr.split(key), 0.3), atol=1e-5)


# --- The regulator ---

NORMAL = 0.5 * math.log(2 * math.pi * math.e)  # the entropy of N(0, 1)
REGULATED = dataclasses.replace(
    AGENT, noise=AnnealedNoise(0.3, -0.9, period=3, learning_rate=0.03), num_entropy_samples=200, num_modes=1
)


@eqx.filter_jit
def adapt(state):
    return REGULATED.adapt(state, transitions(jr.key(0)), key=jr.fold_in(jr.key(5), state.step))


def one_action(std):
    """The state in which the policy is one action in the middle of the box, and explores with this deviation."""
    noise = dataclasses.replace(fresh().noise, log_scale=jnp.log(std / 0.1))
    return dataclasses.replace(fresh(), actor=Points(jnp.array([0.1, -0.2]), REGULATED.chain), noise=noise)


def test_entropy_is_that_of_the_noisy_policy_per_dimension():
    for std in (0.05, 0.1):
        found = float(adapt(one_action(std)).memory)
        # A standard error of 1 / sqrt(2 x 1600 x 2).
        assert found == pytest.approx(NORMAL + math.log(std), abs=0.05)


@pytest.mark.parametrize("std, sign", [(0.2, -1), (0.05, 1)])  # -0.19 and -1.58 nats
def test_noise_shrinks_above_the_target_entropy_and_grows_below(std, sign):
    state, stds, entropies = one_action(std), [], []
    for step in range(5):
        state = dataclasses.replace(adapt(state), step=jnp.int32(step + 1))
        stds.append(float(REGULATED.noise_std(state)))
        entropies.append(float(state.memory))
    # Adam's steps on gradients of almost one size have the length of its rate, in log(alpha).
    np.testing.assert_allclose(stds, std * np.exp(sign * 0.03 * np.array([1, 1, 1, 2, 2])), rtol=2e-3)
    assert entropies[0] == entropies[2] != entropies[3] == entropies[4]


def test_default_regulator_is_the_published_one():
    noise = DACER().noise
    assert (noise.initial_std, noise.target_entropy, noise.period) == (0.3, -0.9, 10_000)
    assert (DACER().num_entropy_samples, DACER().num_modes, DACER().num_candidates) == (200, 3, 1)
