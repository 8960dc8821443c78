"""The planner: constants of its schedules, its losses, its averages, and what it does at the edges."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jaxtyping import TypeCheckError

from eqgen.algorithms.base import Trained, averaging_rate
from eqgen.algorithms.planner import DiffusionPlanner
from eqgen.data.normalizer import Normalizer
from eqgen.data.planning import PlannerBatch
from eqgen.guidance import CFG, CG
from eqgen.samplers import uniform_grid
from eqgen.schedules import VPCosine, VPLinear
from eqgen.timesteps.adaptive import AdaptiveTimesteps
from eqgen.timesteps.heuristics import StaticTimesteps
from eqgen.timesteps.times import ContinuousTimes, DiffusionChain
from eqgen.timesteps.weightings import BoundWeight
from eqgen.tree import filter_scan
from eqgen.types import Transition
from helpers import assert_trees_close, filled, random_windows


HORIZON, OBS, ACT = 8, 4, 2
windows = partial(random_windows, horizon=HORIZON, obs_size=OBS, action_size=ACT)
EXAMPLE = jax.tree.map(lambda x: x[0], windows(jr.key(0), 1))


def tiny(**fields):
    return dataclasses.replace(DiffusionPlanner.tiny(), **fields)


def state_of(planner, **kwargs):
    """A state whose networks are drawn without compiling anything."""
    shapes = eqx.filter_eval_shape(planner.init, EXAMPLE, key=jr.key(0))
    parts = [shapes.denoiser, shapes.critic, shapes.inverse_dynamics]
    return planner.from_networks(EXAMPLE, *(filled(part.online, scale=0.1) for part in parts), **kwargs)


# --- Constants ---


def test_schedules_are_those_of_the_reference():
    """T1: specification, 2.1 and 2.4."""
    planner = DiffusionPlanner()
    for t, alpha in {1e-3: 0.999945, 0.25: 0.723657, 0.5: 0.281183, 0.75: 0.058664, 1.0: 0.006572}.items():
        assert float(planner.schedule.alpha(t)) == pytest.approx(alpha, abs=1e-6)
    assert float(planner.schedule.sigma(1e-3)) == pytest.approx(0.010485, abs=1e-6)
    assert planner.schedule == VPLinear(0.1, 20.0)
    of_actions = jax.vmap(VPCosine().alpha)(uniform_grid(9, 1e-3, 1.0))
    expected = [1.000, 0.9826, 0.9360, 0.8614, 0.7611, 0.6380, 0.4960, 0.3391, 0.1721, 0.0084]
    np.testing.assert_allclose(of_actions, expected, atol=6e-5)  # four digits are given


def test_the_decoder_ends_at_t_min_on_both_grids():
    for grid, count in (("uniform", 21), ("log_snr", 21)):
        ts = DiffusionPlanner(grid=grid).times()
        assert ts.shape == (count,)
        assert_trees_close(ts[jnp.array([0, -1])], jnp.array([1.0, 1e-3]), rtol=1e-4)
    assert_trees_close(DiffusionPlanner().times(5), jnp.linspace(1.0, 1e-3, 6))


# --- The loss of plans ---


def plan_loss(planner, denoiser, states, label, weight, *, key):
    """The planner's loss at times of its own."""
    t_key, key = jr.split(key)
    draw = planner.sampler_of_times.sample(None, len(states), key=t_key)
    return planner.plan_loss(denoiser, (states, label, weight), draw, key=key)[0]


def test_the_loss_of_a_network_that_returns_zero_leaves_row_0_out():
    """T4: E eps^2 over all rows but the first, averaged over all: (H - 1) / H."""
    planner, batch = tiny(), windows(jr.key(1), 4096)
    loss = jax.jit(partial(plan_loss, planner, lambda x, t: jnp.zeros_like(x)))
    value = loss(batch.states, batch.label, batch.weight, key=jr.key(2))
    # eps^2 has variance 2: 4 standard errors of the mean of 4096 * 28 of them.
    assert float(value) == pytest.approx((HORIZON - 1) / HORIZON, abs=4 * (2 / (4096 * 28)) ** 0.5)


def test_the_prediction_of_row_0_has_no_gradient_and_the_input_there_is_clean():
    """T3."""
    planner, batch = tiny(), windows(jr.key(1), 16)

    @jax.jit
    @jax.grad
    def gradient(shift):
        def denoiser(x, t):
            return x + shift

        return plan_loss(planner, denoiser, batch.states, batch.label, batch.weight, key=jr.key(2))

    grad = gradient(jnp.zeros((HORIZON, OBS)))
    assert not np.any(grad[0]) and np.all(grad[1:] != 0)

    seen = lambda x, t: jnp.where(jnp.any(jnp.all(x[:1] == batch.states[:, 0], axis=1)), x, jnp.nan)
    loss = jax.jit(partial(plan_loss, planner, seen))
    assert np.isfinite(loss(batch.states, batch.label, batch.weight, key=jr.key(2)))


def test_weights_of_windows_and_of_the_first_step():
    """Linear in w_b; first_step_weight = 10 adds nine times the share of row 1."""
    batch = windows(jr.key(1), 64)
    zero = lambda x, t: jnp.zeros_like(x)
    loss = lambda weight, **fields: float(
        jax.jit(partial(plan_loss, tiny(**fields), zero))(batch.states, batch.label, weight, key=jr.key(2))
    )
    plain = loss(batch.weight)
    assert loss(0.25 * batch.weight) == pytest.approx(0.25 * plain, rel=1e-5)
    row_1 = loss(batch.weight, first_step_weight=1.0) - loss(batch.weight, first_step_weight=0.0)
    assert loss(batch.weight, first_step_weight=10.0) == pytest.approx(plain + 9 * row_1, rel=1e-4)


@pytest.mark.slow
def test_timesteps_are_uniform_unless_another_sampler_is_named():
    plain = tiny()
    times = ContinuousTimes(plain.schedule, plain.t_min)
    assert plain.sampler_of_times == StaticTimesteps(times)
    adaptive = AdaptiveTimesteps(times, reward=BoundWeight(), look_every=2, sweep=5)
    planner = tiny(timesteps=adaptive, inverse_dynamics="mlp")
    state = state_of(planner)
    update = jax.jit(lambda state, key: planner.update(state, windows(key, 8), key=key))
    for key in jr.split(jr.key(1)):
        state, metrics = update(state, key)
    assert np.isfinite(metrics["plan/loss"]) and metrics["timesteps/a"] > 0
    assert int(state.timesteps.step) == 2 and int(state.timesteps.size) == 1
    assert np.any(state.timesteps.queue != 0)


def test_timesteps_of_another_schedule_are_refused():
    for times in (ContinuousTimes(VPLinear(0.1, 10.0)), ContinuousTimes(VPLinear(), 0.1), DiffusionChain(10)):
        with pytest.raises(ValueError, match="the planner's are ContinuousTimes of its schedule"):
            tiny(timesteps=StaticTimesteps(times))


def test_labels_are_dropped_at_the_rate_that_is_asked():
    batch = windows(jr.key(1), 4096)
    # A denoiser that adds how often it sees a label: the noise has mean 0, so kept^2 = kept is what it adds.
    denoiser = lambda x, t, label, kept: jnp.zeros_like(x) + kept
    loss = jax.jit(partial(plan_loss, tiny(conditional=True), denoiser))
    none = jax.jit(partial(plan_loss, tiny(), lambda x, t: jnp.zeros_like(x)))
    args = dict(states=batch.states, label=batch.label, weight=batch.weight, key=jr.key(2))
    share = (loss(**args) - none(**args)) * HORIZON / (HORIZON - 1)
    assert float(share) == pytest.approx(0.75, abs=0.04)  # 4 standard errors of 4096 drops


# --- Inverse dynamics ---


@pytest.mark.parametrize("kind", [pytest.param("diffusion", marks=pytest.mark.slow), "mlp"])
def test_inverse_dynamics_recovers_actions(kind):
    """T7: s' = s + a, so that a is the difference; sampled actions lie in [-1, 1]."""
    planner = tiny(
        inverse_dynamics=kind,
        action_levels=10,
        action_hidden=(64, 64),
        action_learning_rate=3e-3,
        total_updates=2000,
        rebase=False,
    )
    state = state_of(planner)

    def pairs(key, number):
        s_key, a_key = jr.split(key)
        s = jr.normal(s_key, (number, OBS))
        a = jr.uniform(a_key, (number, ACT), minval=-1.0, maxval=1.0)
        return jnp.stack([s, s.at[:, :ACT].add(a)], axis=1), a

    def step(part, key):
        pair_key, key = jr.split(key)
        return part.step(
            planner.action_optimizer, planner.action_loss, *pairs(pair_key, 128), key=key, rate=0.02
        )

    trained = eqx.filter_jit(lambda part, keys: filter_scan(step, part, keys)[0])
    part = trained(state.inverse_dynamics, jr.split(jr.key(1), 2000))
    state = dataclasses.replace(state, inverse_dynamics=part)

    states, actions = pairs(jr.key(2), 500)
    act = lambda s, k: planner.action_towards(state, s[0], s[1], key=k)
    sampled = jax.jit(jax.vmap(act))(states, jr.split(jr.key(3), 500))
    assert float(jnp.mean((sampled - actions) ** 2)) < 1e-2
    assert float(jnp.max(jnp.abs(sampled))) <= 1


def test_what_inverse_dynamics_sees():
    obs, target = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1.5, 1.0, 7.0, 8.0])
    rebased = DiffusionPlanner(rebase=True).endpoints(obs, target)
    assert_trees_close(rebased, (jnp.array([0.0, 0, 3, 4]), jnp.array([0.5, -1, 7, 8])))
    displacement = DiffusionPlanner(rebase=True, target_state="xy").endpoints(obs, target)
    assert_trees_close(displacement, (jnp.array([0.0, 0, 3, 4]), jnp.array([0.5, -1])))
    assert_trees_close(DiffusionPlanner(rebase=False).endpoints(obs, target), (obs, target))


# --- Averages and updates ---


class Number(eqx.Module):
    x: jax.Array


def test_averages():
    """The online number goes 1, 2, ..., n. A plain average keeps d^n of where it began; a debiased one is the mean
    weighted by d^(n - k)."""
    decay, n = 0.9, 12
    for debias in (False, True):
        part = Trained.begin(Number(jnp.zeros(())), optax.sgd(1.0))
        for step in range(n):
            rate = averaging_rate(decay, jnp.asarray(step), debias=debias)
            # The gradient is -1 everywhere: every step adds 1.
            part, _ = part.step(optax.sgd(1.0), lambda number: -number.x, rate=rate)
        assert float(part.online.x) == n
        weights = decay ** (n - np.arange(1, n + 1)) * (1 - decay)
        expected = weights @ np.arange(1, n + 1)
        expected = expected / (1 - decay**n) if debias else expected
        assert float(part.average.x) == pytest.approx(expected, rel=1e-5)


def test_polyak_copies_approach_what_stands_still():
    """T17: theta_on + (theta_0 - theta_on) .995^n."""
    part = Trained(Number(jnp.asarray(3.0)), Number(jnp.asarray(1.0)), optax.sgd(0.0).init(None))
    for _ in range(20):
        part, _ = part.step(optax.sgd(0.0), lambda number: number.x, rate=0.005)
    assert float(part.average.x) == pytest.approx(3 - 2 * 0.995**20, rel=1e-5)


def test_the_critic_stops_when_its_updates_are_spent():
    planner, batch = tiny(critic_updates=1), windows(jr.key(1), 8)
    state = state_of(planner)
    step = eqx.filter_jit(
        lambda state: planner.update_critic(state, PlannerBatch(batch, batch), batch.states)
    )
    learned, loss = step(state)
    assert not eqx.tree_equal(learned, state.critic)
    stopped, later_loss = step(dataclasses.replace(state, critic=learned, step=state.step + 1))
    assert eqx.tree_equal(stopped, learned) and float(later_loss) < float(loss)


def test_the_value_of_states_is_that_of_the_data():
    """States that lead to themselves with reward r: V = r / (1 - gamma), or r where the episode ends. Plans are
    worth the mean, or the sum, of their later states."""
    planner = tiny(
        plan_value="mean_of_states", discount=0.5, tau=0.1, critic_learning_rate=1e-2, value_hidden=(32,)
    )
    state = state_of(planner)
    n, obs = 64, jr.normal(jr.key(1), (64, OBS))
    ended = jnp.arange(n) % 2 == 0
    obs = obs.at[:, 0].set(jnp.where(ended, 2.0, -2.0))
    transitions = Transition(
        obs=obs,
        action=jnp.zeros((n, ACT)),
        reward=jnp.ones(n),
        next_obs=obs,
        terminated=ended,
        truncated=jnp.zeros(n, bool),
    )
    batch = windows(jr.key(2), n)
    batch = PlannerBatch(batch, batch, transitions)

    def step(state, _):
        return dataclasses.replace(
            state, critic=planner.update_critic(state, batch, batch.plans.states)[0]
        ), None

    state = eqx.filter_jit(lambda s: filter_scan(step, s, length=600)[0])(state)
    values = jax.vmap(state.critic.online)(obs)
    np.testing.assert_allclose(values, jnp.where(ended, 1.0, 2.0), atol=0.1)  # a network after 600 steps
    plan = obs[:5]
    expected = jax.vmap(state.critic.online)(plan[1:])
    assert_trees_close(planner.value(state, plan), jnp.mean(expected))
    summed = dataclasses.replace(planner, plan_value="sum_of_states")
    assert_trees_close(summed.value(state, plan), jnp.sum(expected))


def test_units_do_not_matter():
    """Windows in other units with the normaliser to match give the same update, and the same action."""
    planner, batch = tiny(), windows(jr.key(1), 8)
    units = Normalizer(jnp.arange(4.0), jnp.array([0.5, 2.0, 4.0, 1.0]))
    scaled = dataclasses.replace(batch, states=units.inverse(batch.states))
    plain, other = state_of(planner), state_of(planner, normalizer=units)
    update = eqx.filter_jit(lambda s, b: planner.update(s, b, key=jr.key(3))[1])
    assert_trees_close(update(other, scaled), update(plain, batch), rtol=1e-4)
    act = eqx.filter_jit(lambda s, o: planner.act(s, o, key=jr.key(4)))
    obs = batch.states[0, 0]
    # The first step of a fresh decoder divides by alpha(1) = 0.0066: rounding grows by 150.
    assert_trees_close(act(other, units.inverse(obs)), act(plain, obs), rtol=1e-2, atol=1e-2)


# --- Edges ---


def test_what_was_not_trained_is_asked_for_in_vain():
    planner = tiny()
    state = eqx.filter_eval_shape(planner.init, EXAMPLE, key=jr.key(0))
    plan = lambda scheme: eqx.filter_eval_shape(scheme, planner, state, jnp.zeros(OBS), key=jr.key(0))
    with pytest.raises(ValueError, match="classifier=True"):
        plan(CG(0.1))
    with pytest.raises(ValueError, match="conditional=True"):
        plan(CFG(1.2, 1.0))


def test_the_value_of_states_needs_transitions():
    planner, batch = tiny(plan_value="sum_of_states"), windows(jr.key(1), 4)
    state = eqx.filter_eval_shape(planner.init, EXAMPLE, key=jr.key(0))
    with pytest.raises(ValueError, match="PlannerBatch"):
        eqx.filter_eval_shape(planner.update, state, batch, key=jr.key(0))


def test_what_is_no_window_is_refused():
    shorter = jax.tree.map(lambda x: x[:1] if x.ndim == 2 else x, EXAMPLE)
    for example in (shorter, windows(jr.key(0), 3)):
        with pytest.raises(ValueError, match="takes one window"):
            tiny().from_networks(example, None, None, None)


@pytest.mark.parametrize("fields", [dict(num_steps=1), dict(average=1.0), dict(network="mlp")], ids=str)
def test_settings_that_make_no_sense_are_refused(fields):
    with pytest.raises((ValueError, TypeCheckError), match=next(iter(fields))):
        DiffusionPlanner(**fields)


@pytest.mark.slow
def test_the_unet_and_the_guided_planner_update():
    """Options that no other test trains: shapes and structure, without compiling."""
    planner, batch = tiny(network="unet", conditional=True, classifier=True), windows(jr.key(1), 4)
    state = eqx.filter_eval_shape(planner.init, EXAMPLE, key=jr.key(0))
    later, metrics = eqx.filter_eval_shape(planner.update, state, batch, key=jr.key(0))
    assert jax.tree.structure(later) == jax.tree.structure(state)
    assert {"plan/loss", "critic/loss", "classifier/loss", "action/loss"} == metrics.keys()
    for scheme in (CG(0.1, 3), CFG(1.2, 1.0)):
        plan = eqx.filter_eval_shape(scheme, planner, state, jnp.zeros(OBS), key=jr.key(0))
        assert plan.shape == (HORIZON, OBS)
