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
