"""The distilled planner on Gaussian plans, whose flow is known."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.algorithms.meanflow_planner import MeanFlowPlanner
from eqgen.algorithms.prior_guidance import PriorGuidance
from eqgen.data.windows import Window
from eqgen.guidance import CG, Unconditional
from eqgen.meanflow import average_velocity, gaussian_flow_map
from eqgen.parameterizations import convert
from eqgen.schedules import VPLinear
from eqgen.timesteps.adaptive import AdaptiveTimesteps
from eqgen.timesteps.heuristics import StaticTimesteps
from eqgen.timesteps.times import ContinuousTimes, FlowIntervals
from eqgen.timesteps.weightings import Constant
from helpers import assert_trees_close


HORIZON, OBS, ACT, MEAN, STD = 5, 3, 2, 0.7, 0.5
SCHEDULE = VPLinear(0.1, 20.0)
EXAMPLE = Window(jnp.zeros((HORIZON, OBS)), jnp.zeros((HORIZON, ACT)), jnp.zeros(()), jnp.ones(()))


class ExactNoise(eqx.Module):
    """What a perfect denoiser of N(MEAN, STD^2) predicts."""

    def __call__(self, x, t, label=None):
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


class ExactMeanVelocity(eqx.Module):
    """The average velocity of the same flow."""

    def __call__(self, x, r, t):
        alpha_r, sigma_r, alpha_t, sigma_t = (f(s) for s in (r, t) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
        shape, x = x.shape, x.ravel()
        x_r = gaussian_flow_map(x, alpha_r, sigma_r, alpha_t, sigma_t, mean=jnp.full(x.shape, MEAN), std=STD)
        velocity = convert(ExactNoise()(x, t), x, t, SCHEDULE, source="eps", target="velocity")
        return average_velocity(x, x_r, r, t, velocity).reshape(shape)


@pytest.fixture(scope="module")
def exact():
    """A planner and a state whose networks are exact."""
    planner = MeanFlowPlanner.tiny()
    state = eqx.filter_eval_shape(planner.init, EXAMPLE, key=jr.key(0))
    where = lambda s: (s.teacher.denoiser.average, s.mean_velocity.average)
    return planner, eqx.tree_at(where, state, (ExactNoise(), ExactMeanVelocity()))


def test_one_evaluation_decodes_what_the_flow_does(exact):
    planner, state = exact
    obs, latent = jnp.array([0.3, -0.2, 0.9]), jr.normal(jr.key(1), (HORIZON - 1, OBS))
    decode = lambda n: jax.jit(lambda z: planner.decode(state, obs, z, num_steps=n))(latent)
    ends = SCHEDULE.alpha(0.0), SCHEDULE.sigma(0.0), SCHEDULE.alpha(1.0), SCHEDULE.sigma(1.0)
    flat = gaussian_flow_map(latent.ravel(), *ends, mean=jnp.full(latent.size, MEAN), std=STD)
    plan = decode(1)
    np.testing.assert_array_equal(plan[0], obs)
    assert_trees_close(plan[1:], flat.reshape(latent.shape), rtol=1e-4, atol=1e-5)
    assert_trees_close(decode(4), plan, rtol=1e-3, atol=1e-4)  # four times the rounding


def test_the_exact_velocity_satisfies_the_identity_under_an_exact_teacher(exact, x64):
    """And one that is off by a tenth does not. The adaptive loss is switched to the plain square."""
    planner, state = exact
    planner = dataclasses.replace(planner, loss_power=0.0)
    states = MEAN + STD * jr.normal(jr.key(2), (64, HORIZON, OBS))
    off = lambda x, r, t: ExactMeanVelocity()(x, r, t) + 0.1
    loss = lambda u: planner.flow_loss(u, state.teacher, states, key=jr.key(3))[0]
    assert float(jax.jit(lambda: loss(ExactMeanVelocity()))()) < 1e-6
    assert float(jax.jit(lambda: loss(off))()) == pytest.approx(0.01 * (HORIZON - 1) / HORIZON, rel=1e-2)


def test_guidance_of_the_noise_is_refused(exact):
    planner, state = exact
    with pytest.raises(ValueError, match="need its teacher"):
        eqx.filter_eval_shape(CG(0.0), planner, state, jnp.zeros(OBS), key=jr.key(0))
    plan = eqx.filter_eval_shape(Unconditional(), planner, state, jnp.zeros(OBS), key=jr.key(0))
    assert plan.shape == (HORIZON, OBS)


def test_a_prior_is_learned_on_top():
    """Without compiling: one update keeps the structure, and the network is run once, not once a step."""
    agent = PriorGuidance(planner=MeanFlowPlanner(), num_train_steps=None).resized("smoke")
    state = eqx.filter_eval_shape(agent.init, EXAMPLE, key=jr.key(0))
    batch = jax.tree.map(lambda x: jnp.stack([x] * 4), EXAMPLE)
    later, _ = eqx.filter_eval_shape(agent.update, state, batch, key=jr.key(0))
    assert jax.tree.structure(later) == jax.tree.structure(state)
    assert eqx.filter_eval_shape(agent.act, state, jnp.zeros(OBS), key=jr.key(0)).shape == (ACT,)


# --- Other intervals ---


def intervals(planner, **fields):
    return FlowIntervals(planner.schedule, planner.t_min, 1.0, resolution=(4, 3), **fields)


def test_given_intervals_and_weights_take_the_place_of_its_own(exact):
    """The identity holds on every interval, so an exact velocity has no loss there; one that is off has its square
    times the weights' mean."""
    planner, state = exact
    planner = dataclasses.replace(planner, loss_power=0.0)
    states = MEAN + STD * jr.normal(jr.key(2), (64, HORIZON, OBS))
    draw = StaticTimesteps(intervals(planner)).sample(None, 64, key=jr.key(4))
    draw = draw._replace(weight=jnp.linspace(0.0, 4.0, 64))
    off = lambda x, r, t: ExactMeanVelocity()(x, r, t) + 0.1
    loss = lambda u: planner.flow_loss(u, state.teacher, states, draw, key=jr.key(3))[0]
    assert float(jax.jit(lambda: loss(ExactMeanVelocity()))()) < 1e-4  # single precision
    # The Jacobian-vector product of the exact velocity is rounded in single precision.
    assert float(jax.jit(lambda: loss(off))()) == pytest.approx(2 * 0.01 * (HORIZON - 1) / HORIZON, rel=5e-2)


@pytest.mark.slow
def test_a_learning_sampler_looks_at_the_error_of_the_average_velocity():
    """One update: what it saw is the drop of the error by the update, at the swept intervals."""
    planner = MeanFlowPlanner().resized("smoke")
    sampler = AdaptiveTimesteps(
        intervals(planner), reward=Constant(), policy="shared", sweep=5, queue_length=4, min_rows=2
    )
    planner = dataclasses.replace(planner, timesteps=sampler)

    update = eqx.filter_jit(lambda state, batch, key: planner.update(state, batch, key=key))
    state = eqx.filter_jit(lambda key: planner.init(EXAMPLE, key=key))(jr.key(0))
    batch = jax.tree.map(lambda x: jr.normal(jr.key(1), (8, *x.shape), x.dtype), EXAMPLE)
    first, metrics = update(state, batch, jr.key(2))
    again, _ = update(first, batch, jr.key(3))
    before, after, later = state.timesteps, first.timesteps, again.timesteps
    assert set(sampler.metrics(after)) <= set(metrics)
    assert not np.array_equal(before.policy.raw, after.policy.raw)
    np.testing.assert_array_equal(after.policy.raw, later.policy.raw)  # the second update does not look
    assert np.all(np.isfinite(after.queue[0])) and np.any(after.queue[0] != 0)


@pytest.mark.parametrize(
    "times",
    [ContinuousTimes(SCHEDULE), FlowIntervals(SCHEDULE, 0.0, 1.0), FlowIntervals()],
    ids=["not intervals", "another start", "another schedule"],
)
def test_times_of_another_kind_are_refused(times):
    with pytest.raises(ValueError, match="FlowIntervals of its teacher's schedule"):
        MeanFlowPlanner(timesteps=StaticTimesteps(times))
