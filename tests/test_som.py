"""SOM against its specification's numbered tests (10, 12, 13, 15) and closed forms of its parts."""

import dataclasses
from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from eqgen.algorithms.som import SOM
from eqgen.envs.base import example_transition
from eqgen.envs.toys import mixture
from eqgen.networks.policies import MeanVelocity
from eqgen.schedules import VPLinear
from eqgen.types import Transition
from helpers import assert_trees_close


OBS, ACT, BATCH = 3, 2, 8


def state_of(agent, seed=0):
    return agent.init(example_transition((OBS,), ACT), key=jr.key(seed))


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


def points(key, t):
    """Observations, noised actions, times."""
    obs_key, a_key = jr.split(key)
    return jr.normal(obs_key, (BATCH, OBS)), jr.normal(a_key, (BATCH, ACT)), jnp.full(BATCH, t)


# --- The velocity ---


@pytest.mark.parametrize("normalization", ["batch", "advantage", "group"])
@pytest.mark.parametrize("estimator", ["gradient", "denoising", "truncated"])
def test_normalised_velocity_ignores_scale_and_offset_of_q(estimator, normalization):
    agent = SOM(estimator=estimator, q_normalization=normalization, num_score_samples=16)
    inputs = points(jr.key(0), 0.3)

    @jax.jit
    def velocity(scale, offset):
        q = lambda s, a: scale * (jnp.sum(jnp.sin(3 * a)) + s[0]) + offset
        return agent.velocity(q, *inputs, key=jr.key(1))[0]

    # Float32 values of 10 Q + 3 carry ten times the rounding of Q's.
    assert_trees_close(velocity(10.0, 3.0), velocity(1.0, 0.0), rtol=1e-3, atol=1e-4)


def test_advantage_normalisation_ignores_values_between_states_and_batch_does_not():
    """Adding a value of the state to Q changes no softmax; only the paper's deviation over the batch feels it."""
    inputs = points(jr.key(0), 0.3)

    @partial(jax.jit, static_argnums=0)
    def velocity(agent, value):
        q = lambda s, a: jnp.sum(jnp.sin(3 * a)) + value * s[0]
        return agent.velocity(q, *inputs, key=jr.key(1))[0]

    for normalization, same in (("advantage", True), ("batch", False)):
        agent = SOM.safe(q_normalization=normalization, num_score_samples=16)
        # 50 s in float32 leaves Q with an absolute rounding of 1e-5.
        assert np.allclose(velocity(agent, 0.0), velocity(agent, 50.0), atol=1e-3) == same


def test_linear_q_gives_the_exact_score_for_any_number_of_samples(x64):
    """S = alpha g / mu_t (test 5), hence v = f a - g^2 S / 2; with normalisation alpha g / (sd mu_t)."""
    g = jnp.array([1.0, -2.0])
    obs, a_t, t = points(jr.key(0), 0.4)
    schedule = VPLinear(0.1, 20.0)
    for normalization in ("none", "batch"):
        agent = SOM(
            estimator="gradient",
            score_mode="raw",
            q_normalization=normalization,
            inverse_temperature=1.5,
            num_score_samples=3,
        )
        q = lambda s, a: jnp.dot(g, a)
        v = jax.jit(partial(agent.velocity, q))(obs, a_t, t, key=jr.key(1))[0]
        score = (v - schedule.drift(0.4) * a_t) / (-0.5 * schedule.diffusion_squared(0.4))
        factor = np.asarray(score) / np.asarray(1.5 * g / schedule.alpha(0.4))
        # One factor for all rows and coordinates: 1, or 1 / sd, never the 0 of a gradient through the mean.
        np.testing.assert_allclose(factor, factor[0, 0], rtol=1e-6)
        assert factor[0, 0] > 0
        if normalization == "none":
            np.testing.assert_allclose(factor, 1.0, rtol=1e-6)


def test_unit_mode_has_its_norm_and_clip_mode_its_cap():
    obs, a_t, t = points(jr.key(0), 0.3)
    q = lambda s, a: jnp.sum(jnp.sin(3 * a))
    schedule = VPLinear(0.1, 20.0)

    def score_norm(**fields):
        agent = SOM(num_score_samples=16, inverse_temperature=1.0, **fields)
        v = jax.jit(partial(agent.velocity, q))(obs, a_t, t, key=jr.key(1))[0]
        score = (v - schedule.drift(0.3) * a_t) / (-0.5 * schedule.diffusion_squared(0.3))
        return jnp.linalg.norm(score, axis=1)

    raw = score_norm(score_mode="raw")
    # Taking the score back out of the velocity costs digits.
    assert_trees_close(score_norm(score_mode="unit", score_weight=7.0), jnp.full(BATCH, 7.0), rtol=1e-3)
    cap = float(jnp.median(raw))
    capped = score_norm(score_mode="clip", score_clip=cap)
    assert_trees_close(capped, jnp.minimum(raw, cap), rtol=1e-3)


def test_truncated_estimator_never_asks_outside_the_box():
    seen = []

    def q(s, a):
        jax.debug.callback(lambda x: seen.append(float(x)), jnp.max(jnp.abs(a)))
        return jnp.sum(a)

    obs, a_t, _ = points(jr.key(0), 0.3)
    velocity = jax.jit(partial(SOM.safe(num_score_samples=4).velocity, q))
    for t in (1e-3, 0.3, 1.0):
        v, _ = velocity(obs, 3 * a_t, jnp.full(BATCH, t), key=jr.key(2))
        assert bool(jnp.all(jnp.isfinite(v)))
    jax.effects_barrier()
    assert len(seen) >= 3 * BATCH * 4 and max(seen) <= 1.0


# --- The regression ---


@pytest.mark.parametrize("solver", ["euler", "heun", "tsit5"])
def test_ode_target_is_the_average_velocity_of_the_flow(solver):
    """With a Gaussian Boltzmann density the exact flow map is known (test 2): a_r = mu_r m + sqrt(V_r/V_t)(...)."""
    mean, std = jnp.array([0.2, -0.1]), 0.2
    q = lambda s, a: -0.5 * jnp.sum((a - mean) ** 2) / std**2
    agent = SOM(
        estimator="denoising",
        q_normalization="none",
        inverse_temperature=1.0,
        num_score_samples=4000,
        target="ode",
        ode_solver=solver,
        ode_steps={"euler": 64, "heun": 16, "tsit5": 0}[solver],
    )
    schedule = agent.noise_schedule
    obs, _, _ = points(jr.key(0), 0.3)
    r, t = jnp.full(BATCH, 0.1), jnp.full(BATCH, 0.4)
    a_t = 0.5 * jr.normal(jr.key(3), (BATCH, ACT))
    _, average, _ = jax.jit(partial(agent.regression_target, q))(obs, a_t, r, t, key=jr.key(1))
    variance = lambda t: (schedule.alpha(t) * std) ** 2 + schedule.sigma(t) ** 2
    start, end = (np.asarray(schedule.alpha(s) * mean) for s in (0.4, 0.1))
    a_r = end + np.sqrt(variance(0.1) / variance(0.4)) * (np.asarray(a_t) - start)
    # 4000 proposals estimate the posterior mean to about std / sqrt(4000), which the velocity magnifies by 10.
    np.testing.assert_allclose(average, (a_t - a_r) / 0.3, atol=0.12)


def test_ode_target_on_an_empty_interval_is_the_velocity():
    agent = SOM.safe(num_score_samples=8, target="ode", ode_steps=2)
    obs, a_t, t = points(jr.key(0), 0.3)
    q = lambda s, a: jnp.sum(jnp.sin(3 * a))
    v, average, _ = jax.jit(partial(agent.regression_target, q))(obs, a_t, t, t, key=jr.key(1))
    assert_trees_close(average, v)


@pytest.mark.parametrize("target", ["identity", "ode"])
def test_actor_gradient_is_that_of_the_weighted_error_to_a_frozen_target(target):
    """Test 10: against the loss written with NumPy constants in place of everything but u."""
    agent = SOM.safe(
        hidden=(16,), num_score_samples=8, target=target, ode_steps=2, loss_power=1.0, loss_constant=1e-2
    )
    state = state_of(agent)
    obs, a_t, t = points(jr.key(0), 0.5)
    r = jnp.full(BATCH, 0.2)
    q = partial(agent.q_value, state.critics)
    v, average, _ = jax.jit(partial(agent.regression_target, q))(obs, a_t, r, t, key=jr.key(1))
    grad = eqx.filter_jit(eqx.filter_grad(agent.actor_loss, has_aux=True))
    grads, _ = grad(state.actor, obs, a_t, r, t, v, average)

    def u_of(actor, a_t, r, t):
        return jax.vmap(actor)(a_t, r, t, obs)

    if target == "identity":
        tangents = (v, jnp.zeros_like(r), jnp.ones_like(t))
        u, du_dt = jax.jit(partial(jax.jvp, partial(u_of, state.actor)))((a_t, r, t), tangents)
        frozen = np.asarray(v - (t - r)[:, None] * du_dt)
    else:
        u, frozen = u_of(state.actor, a_t, r, t), np.asarray(average)
    weight = np.asarray(1 / (jnp.mean((u - frozen) ** 2, axis=1) + 1e-2))

    def reference(actor):
        return jnp.mean(weight * jnp.mean((u_of(actor, a_t, r, t) - frozen) ** 2, axis=1))

    expected = eqx.filter_jit(eqx.filter_grad(reference))(state.actor)
    assert_trees_close(grads, expected, rtol=1e-4, atol=1e-6)


def test_one_step_policy_of_a_gaussian_bandit():
    """Test 9 through SOM's own update: the learned one-step map equals the exact flow map of the Gaussian."""
    mean, std = jnp.array([0.3, -0.2]), 0.25
    q = lambda s, a: -0.5 * jnp.sum((a - mean) ** 2) / std**2
    agent = SOM.safe(
        hidden=(64, 64),
        q_normalization="none",
        inverse_temperature=1.0,
        num_score_samples=64,
        actor_learning_rate=2e-3,
        final_actor_learning_rate=1e-4,
        decay_start=0,
        decay_updates=3000,
        policy_delay=1,
        max_grad_norm=1.0,
        loss_constant=1e-2,
        loss_reduction="sum",
    )
    actor = MeanVelocity(1, ACT, agent.hidden, key=jr.key(0))
    opt_state = agent.actor_optimizer.init(actor)
    obs = jnp.zeros((128, 1))

    def step(carry, key):
        actor, opt_state = carry
        a_key, key = jr.split(key)
        actions = jr.uniform(a_key, (128, ACT), minval=-1.0, maxval=1.0)
        return agent.update_actor(actor, opt_state, q, obs, actions, key=key)[:2], None

    (actor, _), _ = jax.jit(partial(jax.lax.scan, step))((actor, opt_state), jr.split(jr.key(1), 3000))
    noise = jr.normal(jr.key(2), (500, ACT))
    one_step = jax.vmap(lambda eps: agent.generate(actor, jnp.zeros(1), eps))(noise)
    mu, sigma = agent.noise_schedule.alpha(1.0), agent.noise_schedule.sigma(1.0)
    exact = np.asarray(mean) + std / np.sqrt((mu * std) ** 2 + sigma**2) * (
        np.asarray(noise) - np.asarray(mu * mean)
    )
    error = np.sqrt(np.mean(np.sum((np.asarray(one_step) - exact) ** 2, axis=1)))
    assert (
        float(error) < 0.3
    )  # a small network after 3000 noisy steps (0.23); the noise itself has length 1.4


# --- Acting ---


def test_acting_is_the_clipped_flow_and_best_of_n_improves_the_value():
    agent = SOM.tiny()
    state = state_of(agent)
    obs = jnp.ones(OBS)
    one = dataclasses.replace(agent, num_eval_candidates=1)
    action = one.act(state, obs, key=jr.key(5), explore=False)
    candidate_key, _ = jr.split(jr.key(5))
    noise = jr.normal(candidate_key, (1, ACT))[0]
    raw = noise - state.actor(noise, jnp.array(0.0), jnp.array(1.0), obs)
    assert_trees_close(action, jnp.clip(raw, -1, 1))

    many = dataclasses.replace(agent, num_eval_candidates=32)

    @partial(jax.jit, static_argnums=0)
    def mean_value(a):
        value = lambda key: agent.q_value(state.critics, obs, a.act(state, obs, key=key, explore=False))
        return jnp.mean(jax.vmap(value)(jr.split(jr.key(6), 64)))

    assert mean_value(many) > mean_value(one)


def test_exploration_noise_is_absent_in_evaluation():
    state = state_of(SOM.tiny())
    acts = [
        dataclasses.replace(SOM.tiny(), exploration=name).act(
            state, jnp.ones(OBS), key=jr.key(1), explore=explore
        )
        for name in ("none", "constant", "annealed")
        for explore in (True, False)
    ]
    none, none_eval, constant, constant_eval, annealed, annealed_eval = acts
    for action in (none_eval, constant_eval, annealed_eval):
        assert_trees_close(action, none)
    assert not np.allclose(constant, none) and not np.allclose(annealed, none)


# --- The critic ---


def test_bellman_target_by_hand():
    """Test 15: c_r r, plus the discounted minimum over target critics unless terminated."""
    agent = dataclasses.replace(
        SOM.tiny(), num_candidates=1, exploration="none", reward_scale=0.5, discount=0.9
    )
    state = state_of(agent)
    bellman_target, best_of_n = eqx.filter_jit(agent.bellman_target), eqx.filter_jit(agent.best_of_n)
    for terminated in (True, False):
        batch = transitions(jr.key(0), terminated)
        y = bellman_target(state, batch, key=jr.key(1))
        for i, key in enumerate(jr.split(jr.key(1), BATCH)):
            action_key, _ = jr.split(key)
            action = best_of_n(state.actor, state.critics, batch.next_obs[i], 1, key=action_key)
            bootstrap = min(float(q) for q in state.target_critics(batch.next_obs[i], action))
            expected = 0.5 * float(batch.reward[i]) + (0.0 if terminated else 0.9 * bootstrap)
            assert float(y[i]) == pytest.approx(expected, rel=1e-5)


def test_actor_and_targets_move_only_every_policy_delay():
    agent = dataclasses.replace(SOM.tiny(), policy_delay=3, tau=0.1)
    update = eqx.filter_jit(lambda s, k: agent.update(s, transitions(jr.key(0)), key=k)[0])
    states = [state_of(agent)]
    for i in range(4):
        states.append(update(states[-1], jr.key(i)))
    for name in ("actor", "target_actor", "target_critics"):
        moved = [not eqx.tree_equal(getattr(a, name), getattr(b, name)) for a, b in zip(states, states[1:])]
        assert moved == [True, False, False, True], name
    expected = jax.tree.map(
        lambda old, new: 0.9 * old + 0.1 * new, states[0].target_critics, states[1].critics
    )
    assert_trees_close(states[1].target_critics, expected)


def test_actor_learning_rate_decays_from_start_to_end_in_units_of_updates():
    agent = SOM(actor_learning_rate=1.0, final_actor_learning_rate=0.1, decay_start=20, decay_updates=40)
    optimizer, params = agent.actor_optimizer, jnp.zeros(1)
    state, steps = optimizer.init(params), []
    for _ in range(40):  # actor updates: one per two updates
        update, state = optimizer.update(jnp.ones(1), state, params)
        steps.append(-float(update[0]))
    assert steps[9] == pytest.approx(1.0, rel=1e-4) and steps[10] == pytest.approx(1.0, rel=1e-4)
    assert steps[20] == pytest.approx(0.55, rel=1e-4)
    assert steps[-1] == pytest.approx(0.1, rel=1e-4)


# --- Settings ---


def test_profiles_are_what_they_say():
    paper, safe = SOM.paper(), SOM.safe()
    assert (paper.estimator, paper.score_mode, paper.score_weight) == ("gradient", "unit", 25.0)
    assert (paper.inverse_temperature, paper.q_normalization) == (1.0, "batch")
    assert (safe.estimator, safe.score_mode) == ("truncated", "raw")
    assert SOM.paper(score_weight=5.0).score_weight == 5.0


def test_unknown_choices_are_refused_with_the_alternatives():
    """Behind the type checks that only the tests switch on."""
    mistyped = eqx.tree_at(lambda agent: agent.estimator, SOM(), "gradeint")
    with pytest.raises(ValueError, match=r"SOM\(estimator='gradeint'\).*truncated"):
        mistyped.__check_init__()


OPTIONS = {
    "inverse_temperature": 2.0,
    "q_normalization": "group",
    "q_reduction": "mean",
    "estimator": "denoising",
    "num_score_samples": 5,
    "score_mode": "unit",
    "a0_source": "mix",
    "target": "ode",
    "time_distribution": "logit-normal",
    "flow_ratio": 0.3,
    "endpoint_fraction": 0.3,
    "t_min": 0.01,
    "loss_power": 0.25,
    "loss_constant": 0.1,
    "loss_reduction": "sum",
    "num_candidates": 3,
    "generation_steps": 2,
    "act_with": "target_actor",
    "exploration": "constant",
    "discount": 0.9,
    "reward_scale": 1.0,
    "tau": 0.1,
    "policy_delay": 1,
    "noisy_target_action": False,
    "critic_learning_rate": 1e-3,
    "actor_learning_rate": 1e-3,
    "final_actor_learning_rate": 1e-4,
    "decay_start": 10,
    "decay_updates": 10,
    "max_grad_norm": 0.5,
    "hidden": (8,),
    "activation": "relu",
}
SUB_OPTIONS = {  # fields that matter only where another one has the value beside it
    "score_weight": (5.0, dict(score_mode="unit")),
    "score_clip": (5.0, dict(score_mode="clip")),
    "ode_steps": (3, dict(target="ode")),
    "ode_solver": ("euler", dict(target="ode")),
    "ode_tolerance": (1e-2, dict(target="ode", ode_steps=0)),
    "exploration_std": (0.3, dict(exploration="constant")),
}


@cache
def program(agent):
    """The update as JAX traces it, constants included."""
    state = eqx.filter_eval_shape(lambda key: agent.init(example_transition((OBS,), ACT), key=key), jr.key(0))
    update = lambda s, key: agent.update(s, transitions(jr.key(0)), key=key)
    return str(eqx.filter_make_jaxpr(update)(state, jr.key(1))[0])


@pytest.mark.parametrize("name", [*OPTIONS, *SUB_OPTIONS])
def test_no_option_is_accepted_and_ignored(name):
    """Every field changes the traced program of the update. (Tracing is quick; compiling each would not be.)"""
    value, needed = SUB_OPTIONS.get(name, (OPTIONS.get(name), {}))
    agent = dataclasses.replace(SOM.tiny(), **needed)
    assert program(dataclasses.replace(agent, **{name: value})) != program(agent)


def test_every_field_is_covered_by_that_test():
    elsewhere = {"noise_schedule", "noise", "num_eval_candidates"}  # modules of their own; evaluation only
    assert set(OPTIONS) | set(SUB_OPTIONS) | elsewhere == {field.name for field in dataclasses.fields(SOM)}


@pytest.mark.slow
def test_modes_of_the_mixture_bandit_are_found_in_their_proportions():
    """Test 8 in its 8 000-update form: within .07 of the weights, 70 % within 3 S of a mode."""
    bandit = mixture()
    agent = SOM.safe(
        q_normalization="none",
        inverse_temperature=1.0,
        num_score_samples=100,
        actor_learning_rate=1e-3,
        final_actor_learning_rate=5e-5,
        decay_start=0,
        decay_updates=8000,
        policy_delay=1,
        max_grad_norm=1.0,
        loss_constant=1e-2,
        loss_reduction="sum",
    )
    actor = MeanVelocity(1, ACT, agent.hidden, key=jr.key(0))
    opt_state, obs = agent.actor_optimizer.init(actor), jnp.zeros((256, 1))

    def step(carry, key):
        actor, average, opt_state = carry
        a_key, key = jr.split(key)
        actions = jr.uniform(a_key, (256, ACT), minval=-1.0, maxval=1.0)
        q = lambda s, a: bandit.log_density(a)
        actor, opt_state, _ = agent.update_actor(actor, opt_state, q, obs, actions, key=key)
        return (actor, optax.incremental_update(actor, average, 0.005), opt_state), None

    carry, _ = jax.jit(partial(jax.lax.scan, step))((actor, actor, opt_state), jr.split(jr.key(1), 8000))
    actions = jax.vmap(lambda e: agent.generate(carry[1], jnp.zeros(1), e))(jr.normal(jr.key(2), (4000, ACT)))
    fractions = jnp.bincount(jax.vmap(bandit.mode)(actions), length=4) / 4000
    nearest = jnp.linalg.norm(actions[:, None] - bandit.mode_centres[None], axis=-1).min(axis=1)
    np.testing.assert_allclose(fractions, [0.4, 0.3, 0.2, 0.1], atol=0.07)
    assert float(jnp.mean(nearest < 3 * 0.15)) >= 0.7
