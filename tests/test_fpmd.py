"""FPMD: flows whose answer is known, the two losses by hand, what the weights ignore, and what they may not."""

import dataclasses
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.algorithms.fpmd import FPMDM, FPMDR
from eqgen.envs.base import example_transition
from eqgen.meanflow import average_velocity, gaussian_flow_map
from eqgen.types import Transition
from helpers import assert_trees_close, filled


OBS, ACT, BATCH = 3, 2, 8
both = pytest.mark.parametrize("cls", [FPMDR, FPMDM])


def state_of(agent, seed=0):
    init = lambda key: agent.init(example_transition((OBS,), ACT), key=key)
    state = filled(eqx.filter_eval_shape(init, jr.key(0)), seed=seed)
    return dataclasses.replace(state, memory=jnp.array(0.7))


def transitions(key, terminated=False):
    keys = jr.split(key, 4)
    return Transition(
        obs=jr.normal(keys[0], (BATCH, OBS)),
        action=jr.uniform(keys[1], (BATCH, ACT), minval=-1.0, maxval=1.0),
        reward=jr.normal(keys[2], (BATCH,)),
        next_obs=jr.normal(keys[3], (BATCH, OBS)),
        terminated=jnp.full(BATCH, terminated),
        truncated=jnp.full(BATCH, False),
    )


# --- The policy ---

MEAN, STD = np.array([0.3, -0.2], np.float32), 0.1


class GaussianVelocity(eqx.Module):
    """The velocity E[eps - a | a_t] where the actions are N(MEAN, STD^2 I)."""

    action_size: int = ACT

    def at(self, obs):
        def velocity(x, t):
            variance = ((1 - t) * STD) ** 2 + t**2
            standardised = (x - (1 - t) * MEAN) / variance
            return t * standardised - (MEAN + (1 - t) * STD**2 * standardised)

        return velocity


class GaussianMeanVelocity(eqx.Module):
    """Its average over [r, t]."""

    action_size: int = ACT

    def __call__(self, x, r, t, obs):
        x_r = gaussian_flow_map(x, 1 - r, r, 1 - t, t, mean=jnp.asarray(MEAN), std=STD)
        return average_velocity(x, x_r, r, t, x)


def test_one_step_of_the_rectified_flow_is_the_mean_and_many_are_the_flow(getkey):
    """At t = 1 the velocity is eps - E[a]: what one step loses is the policy's variance, as the paper has it."""
    noise, obs = jr.normal(getkey(), (ACT,)), jnp.zeros(OBS)
    one = FPMDR(num_steps=1).generate(GaussianVelocity(), obs, noise)
    np.testing.assert_allclose(one, MEAN, atol=1e-6)
    many = FPMDR(num_steps=500).generate(GaussianVelocity(), obs, noise)
    # Euler's method with steps of 1/500, on a path from |noise| to STD |noise|.
    np.testing.assert_allclose(many, MEAN + STD * noise, atol=5e-3)


def test_the_meanflow_takes_any_number_of_steps(getkey):
    noise, obs = jr.normal(getkey(), (ACT,)), jnp.zeros(OBS)
    for num_steps in (1, 3):
        action = FPMDM(num_steps=num_steps).generate(GaussianMeanVelocity(), obs, noise)
        np.testing.assert_allclose(action, MEAN + STD * noise, atol=1e-5)


def test_hoisted_velocity_equals_the_plain_one(getkey):
    actor = state_of(FPMDR.tiny()).actor
    obs, x, t = jr.normal(getkey(), (OBS,)), jr.normal(getkey(), (ACT,)), jnp.array(0.3)
    assert_trees_close(actor.at(obs)(x, t), actor(x, t, obs))


@both
def test_evaluation_takes_num_eval_steps_and_no_noise(cls, getkey):
    agent = dataclasses.replace(cls.tiny(), num_steps=3, num_eval_steps=2)
    state, obs, key = state_of(agent), 0.1 * jr.normal(getkey(), (OBS,)), getkey()
    action = agent.act(state, obs, key=key, explore=False)
    sample_key = jr.split(key)[0]
    noise = jr.normal(sample_key, (ACT,))
    by_hand = dataclasses.replace(agent, num_steps=2).generate(state.actor, obs, noise)
    assert_trees_close(action, jnp.clip(by_hand, -1, 1))
    assert cls().num_eval_steps == cls().num_eval_candidates == 1


@both
def test_noise_is_on_every_candidate_or_on_the_chosen_one(cls, getkey):
    agent = cls.tiny()
    state, obs, key = state_of(agent), jr.normal(getkey(), (OBS,)), getkey()

    @eqx.filter_jit
    def run(state):
        sample_key, noise_key = jr.split(key)
        keys = jax.vmap(jr.split)(jr.split(sample_key, agent.num_candidates))
        plain = jax.vmap(lambda k: agent.sample(state.actor, state.critics, obs, key=k))
        std = agent.noise_std(state)
        noisy = jax.vmap(lambda a, k: jnp.clip(a + std * jr.normal(k, (ACT,)), -1, 1))
        candidates = noisy(plain(keys[:, 0]), keys[:, 1])
        best = candidates[jnp.argmax(jax.vmap(lambda a: jnp.min(state.critics(obs, a)))(candidates))]
        after = dataclasses.replace(agent, noise_on="choice")
        chosen = after.best_of_n(state, obs[None], agent.num_candidates, keys=sample_key[None])
        acted = [a.act(state, obs, key=key, explore=True) for a in (agent, after)]
        return best, noisy(chosen, noise_key[None])[0], acted

    best, chosen, acted = run(state)
    assert_trees_close(acted, [best, chosen])
    assert not np.allclose(best, chosen)


# --- The loss ---


def weights_of(q, deviation, temperature):
    weights = np.exp((q - np.max(q)) / (deviation * temperature))
    return weights / np.mean(weights)


@both
def test_loss_is_the_weighted_mean_of_errors(cls, getkey):
    agent = dataclasses.replace(cls.tiny(), temperature=0.5)
    state, batch, key = state_of(agent), transitions(getkey()), getkey()
    actions = jr.uniform(getkey(), (BATCH, ACT), minval=-1)
    loss = eqx.filter_jit(lambda: agent.actor_loss(state.actor, state, batch, actions, key=key))()[0]
    q = np.min(np.asarray(jax.vmap(state.critics)(batch.next_obs, actions)), axis=1)
    error = lambda s, a, k: agent.squared_error(state.actor, s, a, key=k)
    errors = np.asarray(jax.vmap(error)(batch.next_obs, actions, jr.split(key, BATCH)))
    assert float(loss) == pytest.approx(np.mean(weights_of(q, 0.7, 0.5) * errors), rel=1e-4)


def test_terminal_states_have_no_weight(getkey):
    agent = FPMDR.tiny()
    state, batch, key = state_of(agent), transitions(getkey()), getkey()

    @eqx.filter_jit
    def loss(terminated, next_obs):
        changed = dataclasses.replace(batch, terminated=terminated, next_obs=next_obs)
        return agent.actor_loss(state.actor, state, changed, batch.action, key=key)[0]

    terminated = jnp.arange(BATCH) < 3
    elsewhere = jnp.where(terminated[:, None], batch.next_obs + 5, batch.next_obs)
    assert_trees_close(loss(terminated, elsewhere), loss(terminated, batch.next_obs))
    assert not np.allclose(loss(~terminated, elsewhere), loss(~terminated, batch.next_obs + 1))
    assert float(loss(jnp.full(BATCH, True), elsewhere)) == 0.0


class Offset(eqx.Module):
    """Critics `scale Q + offset`."""

    critics: eqx.Module
    scale: jax.Array
    offset: jax.Array

    def __call__(self, obs, action):
        return self.scale * self.critics(obs, action) + self.offset


def test_weights_ignore_offsets_however_large_and_scales_that_the_deviation_follows(getkey):
    agent = FPMDR.tiny()
    state, batch, key = state_of(agent), transitions(getkey()), getkey()

    @eqx.filter_jit
    def loss(scale, offset):
        critics = Offset(state.critics, scale, offset)
        moved = dataclasses.replace(state, critics=critics, memory=scale * state.memory)
        return agent.actor_loss(state.actor, moved, batch, batch.action, key=key)[0]

    plain = loss(jnp.array(1.0), jnp.array(0.0))
    # Q + 1e3 has a rounding of 3e-5, which is divided by 2.1 and put into an exponential.
    assert_trees_close(loss(jnp.array(1.0), jnp.array(1e3)), plain, rtol=1e-3)
    assert_trees_close(loss(jnp.array(1.0), jnp.array(-1e3)), plain, rtol=1e-3)
    assert_trees_close(loss(jnp.array(10.0), jnp.array(0.0)), plain, rtol=1e-4)


def test_rectified_flow_regresses_on_noise_minus_action(getkey):
    """In the paper's time, 1 - t: a_t = tau a + (1 - tau) eps with velocity a - eps, the negative of ours."""
    agent, key = FPMDR.tiny(), getkey()
    actor, obs, action = state_of(agent).actor, jr.normal(getkey(), (OBS,)), jnp.array([0.5, -0.9])
    time_key, noise_key = jr.split(key)
    t, eps = float(jr.uniform(time_key)), np.asarray(jr.normal(noise_key, (ACT,)))
    tau, a = 1 - t, np.asarray(action)
    predicted = -np.asarray(actor(jnp.asarray(tau * a + (1 - tau) * eps), jnp.array(t), obs))
    by_hand = np.mean((predicted - (a - eps)) ** 2)
    assert float(agent.squared_error(actor, obs, action, key=key)) == pytest.approx(by_hand, rel=1e-5)


def test_meanflow_regresses_on_the_identity_by_finite_differences(getkey, x64):
    agent, key = dataclasses.replace(FPMDM.tiny(), hidden=(8,)), getkey()
    actor, obs, action = state_of(agent).actor, jr.normal(getkey(), (OBS,)), jnp.array([0.5, -0.9])
    actor = jax.tree.map(lambda x: x.astype(float) if eqx.is_array(x) else x, actor)
    time_key, noise_key = jr.split(key)
    r, t = agent.interval(key=time_key)
    eps = jr.normal(noise_key, (ACT,))
    v, a_t, h = eps - action, (1 - t) * action + t * eps, 1e-5
    along = lambda h: actor(a_t + h * v, r, t + h, obs)
    target = v - (t - r) * (along(h) - along(-h)) / (2 * h)
    by_hand = np.mean((np.asarray(along(0.0)) - np.asarray(target)) ** 2)
    assert float(agent.squared_error(actor, obs, action, key=key)) == pytest.approx(by_hand, rel=1e-6)


def test_intervals_are_ordered_pairs_of_uniform_times():
    draw = lambda ratio: jax.vmap(lambda k: FPMDM(flow_ratio=ratio).interval(key=k))(
        jr.split(jr.key(0), 4000)
    )
    r, t = draw(0.0)
    assert bool(jnp.all(r < t))
    # Standard errors of these means are 0.004; the smaller and the larger of two uniforms have 1/3 and 2/3.
    np.testing.assert_allclose([jnp.mean(r), jnp.mean(t)], [1 / 3, 2 / 3], atol=0.015)
    r, t = draw(0.75)
    np.testing.assert_allclose(jnp.mean(r == t), 0.75, atol=0.03)
    np.testing.assert_allclose(jnp.mean(t, where=r == t), 0.5, atol=0.02)


def test_running_deviation_follows_the_batches(getkey):
    agent = dataclasses.replace(FPMDR.tiny(), statistics_rate=0.1)
    state, batch = state_of(agent), transitions(getkey())
    q = np.min(np.asarray(jax.vmap(state.critics)(batch.obs, batch.action)), axis=1)
    adapted = agent.adapt(state, batch, key=getkey())
    assert float(adapted.memory) == pytest.approx(0.9 * 0.7 + 0.1 * np.std(q), rel=1e-5)


# --- Options ---

OPTIONS = {
    "num_steps": 4,
    "temperature": 1.0,
    "statistics_rate": 0.1,
    "num_candidates": 3,
    "noise_on": "choice",
    "num_eval_steps": 5,
    "num_eval_candidates": 5,
    "noise": dataclasses.replace(FPMDR().noise, initial_std=0.3),
}


@cache
def program(agent):
    """An update and an evaluated action as JAX traces them, constants included."""
    init = lambda key: agent.init(example_transition((OBS,), ACT), key=key)
    state = eqx.filter_eval_shape(init, jr.key(0))

    def run(state, key):
        updated = agent.update(state, transitions(jr.key(0)), key=key)
        return updated, agent.act(state, jnp.ones(OBS), key=key, explore=False), agent.noise.init()

    return str(eqx.filter_make_jaxpr(run)(state, jr.key(1))[0])


@pytest.mark.parametrize("name", OPTIONS)
@both
def test_no_option_of_its_own_is_accepted_and_ignored(cls, name):
    assert program(dataclasses.replace(cls.tiny(), **{name: OPTIONS[name]})) != program(cls.tiny())


def test_flow_ratio_is_not_ignored():
    assert program(dataclasses.replace(FPMDM.tiny(), flow_ratio=0.3)) != program(FPMDM.tiny())


def test_targets_without_noise_need_noise_on_the_choice():
    with pytest.raises(ValueError, match="Choose noise_on='choice'"):
        FPMDR(noisy_target_action=False)
    assert not FPMDM(noisy_target_action=False, noise_on="choice").noisy_target_action
