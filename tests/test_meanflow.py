"""The MeanFlow identity against closed forms and finite differences; its loss; the laws of the intervals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from scipy.stats import kstest, norm

from eqgen.meanflow import (
    adaptive_loss,
    average_velocity,
    gaussian_flow_map,
    meanflow_loss,
    meanflow_target,
    sample_logit_normal_interval,
    sample_uniform_interval,
)
from eqgen.schedules import Geometric, Karras, LinearFlow, VPCosine, VPLinear


SCHEDULES = [VPLinear(), VPCosine(), Geometric(), Karras(), LinearFlow()]
MEAN, STD = np.array([0.5, -0.3, 0.1]), 0.4


def gaussian_flow(schedule, dim=3):
    """The velocity, the flow map and the average velocity of data `N(MEAN, STD^2 I)`."""
    mean = jnp.asarray(MEAN[:dim])

    def velocity(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        score = -(x - alpha * mean) / ((alpha * STD) ** 2 + sigma**2)
        return schedule.drift(t) * x - 0.5 * schedule.diffusion_squared(t) * score

    def flow_map(x, r, t):
        ends = schedule.alpha(r), schedule.sigma(r), schedule.alpha(t), schedule.sigma(t)
        return gaussian_flow_map(x, *ends, mean=mean, std=STD)

    return velocity, flow_map, lambda x, r, t: (x - flow_map(x, r, t)) / (t - r)


# Times stay below 0.99: at 1 the derived coefficients of the linear flow are infinite, VPCosine stands still.
@pytest.mark.parametrize("r, t", [(0.0, 0.99), (0.0, 0.5), (0.2, 0.7), (0.1, 0.11)])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_identity_holds_for_gaussian_data(schedule, r, t, x64, getkey):
    velocity, _, mean_velocity = gaussian_flow(schedule)
    x_t = jr.normal(getkey(), (3,))
    u, u_target = jax.jit(lambda x: meanflow_target(mean_velocity, x, r, t, velocity(x, t)))(x_t)
    np.testing.assert_allclose(u, mean_velocity(x_t, r, t), rtol=1e-12)
    np.testing.assert_allclose(u_target, u, rtol=1e-11, atol=1e-12)


def test_identity_holds_from_noise_to_data(x64, getkey):
    velocity, flow_map, mean_velocity = gaussian_flow(VPLinear())
    x_1 = jr.normal(getkey(), (3,))
    target = jax.jit(lambda x: meanflow_target(mean_velocity, x, 0.0, 1.0, velocity(x, 1.0)))
    u, u_target = target(x_1)
    np.testing.assert_allclose(u_target, u, rtol=0, atol=1e-12)
    np.testing.assert_allclose(x_1 - u, flow_map(x_1, 0.0, 1.0), rtol=1e-12)


def network(key, dim=3, width=16, takes_gap=False):
    """A mean velocity `u(x, r, t)`; inside, the network takes `(x, t, t - r)` if `takes_gap`."""
    mlp = eqx.nn.MLP(dim + 2, dim, width, 2, activation=jnp.tanh, key=key)

    def mean_velocity(mlp, x, r, t):
        times = jnp.stack([t, t - r]) if takes_gap else jnp.stack([r, t])
        return mlp(jnp.concatenate([x, times]))

    return mlp, mean_velocity


@pytest.mark.parametrize("takes_gap", [False, True])
def test_target_against_finite_differences(takes_gap, x64, getkey):
    mlp, mean_velocity = network(getkey(), takes_gap=takes_gap)
    x, v = jr.normal(getkey(), (2, 3))
    r, t, h = 0.2, 0.7, 1e-5
    u = lambda s: mean_velocity(mlp, x + s * v, jnp.asarray(r), jnp.asarray(t + s))
    expected = v - (t - r) * (u(h) - u(-h)) / (2 * h)
    target = eqx.filter_jit(lambda mlp: meanflow_target(eqx.Partial(mean_velocity, mlp), x, r, t, v)[1])
    u_target = target(mlp)
    np.testing.assert_allclose(u_target, expected, rtol=0, atol=1e-9)


def test_target_of_an_instant_is_the_velocity(getkey):
    mlp, mean_velocity = network(getkey())
    x, v = jr.normal(getkey(), (2, 3))
    target = eqx.filter_jit(lambda mlp: meanflow_target(eqx.Partial(mean_velocity, mlp), x, 0.4, 0.4, v)[1])
    assert jnp.all(target(mlp) == v)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_is_that_of_a_weighted_square_with_frozen_target(reduction, x64, getkey):
    mlp, mean_velocity = network(getkey())
    x, v = jr.normal(getkey(), (2, 3))
    r, t = jnp.asarray(0.2), jnp.asarray(0.7)
    options = {"power": 0.75, "c": 1e-2, "reduction": reduction}

    def loss(mlp, v):
        return meanflow_loss(eqx.Partial(mean_velocity, mlp), x, r, t, v, **options)[0]

    u, u_target = map(np.asarray, meanflow_target(eqx.Partial(mean_velocity, mlp), x, r, t, v))
    reduce = getattr(np, reduction)
    weight = (reduce((u - u_target) ** 2) + 1e-2) ** -0.75
    frozen = lambda mlp: weight * getattr(jnp, reduction)((mean_velocity(mlp, x, r, t) - u_target) ** 2)
    np.testing.assert_allclose(loss(mlp, v), frozen(mlp), rtol=1e-10)
    gradients, expected = eqx.filter_jit(eqx.filter_grad(loss))(mlp, v), eqx.filter_grad(frozen)(mlp)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert jnp.all(jax.grad(loss, argnums=1)(mlp, v) == 0)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_adaptive_loss_is_a_weighted_square(power, x64, getkey):
    error = jr.normal(getkey(), (4,))
    square = jnp.mean(error**2)
    weight = (square + 1e-3) ** -power
    np.testing.assert_allclose(adaptive_loss(error, power=power), square * weight, rtol=1e-12)
    gradient = jax.grad(lambda e: adaptive_loss(e, power=power))(error)
    np.testing.assert_allclose(gradient, 2 * error / 4 * weight, rtol=1e-12)
    as_sum = adaptive_loss(error, power=power, c=4e-3, reduction="sum")
    np.testing.assert_allclose(as_sum, square * weight * 4 ** (1 - power), rtol=1e-12)


def test_adaptive_loss_at_zero_and_at_unknown_reductions():
    assert adaptive_loss(jnp.zeros(3)) == 0
    assert jnp.all(jax.grad(adaptive_loss)(jnp.zeros(3)) == 0)
    with pytest.raises(Exception, match="median"):
        adaptive_loss(jnp.zeros(3), reduction="median")


def test_average_velocity_is_what_the_identity_regresses_on(x64, getkey):
    velocity, flow_map, mean_velocity = gaussian_flow(VPLinear())
    x_t, r, t = jr.normal(getkey(), (3,)), 0.2, 0.7
    u = average_velocity(x_t, flow_map(x_t, r, t), r, t, velocity(x_t, t))
    np.testing.assert_allclose(u, mean_velocity(x_t, r, t), rtol=1e-12)


def test_average_velocity_of_an_instant_is_the_velocity(getkey):
    x, v = jr.normal(getkey(), (2, 3))
    t = jnp.asarray(0.5)
    assert jnp.all(average_velocity(x, x, t, t, v) == v)
    slopes = jax.jacobian(average_velocity, argnums=(0, 1, 2, 3))(x, x, t, t, v)
    assert all(jnp.all(slope == 0) for slope in slopes)


def draw(sampler, key, n=20_000, **options):
    r, t = jax.jit(jax.vmap(lambda key: sampler(key=key, **options)))(jr.split(key, n))
    assert r.shape == t.shape == (n,)
    assert jnp.all((0 <= r) & (r <= t) & (t <= 1))
    return np.asarray(r), np.asarray(t)


@pytest.mark.parametrize("sampler", [sample_uniform_interval, sample_logit_normal_interval])
@pytest.mark.parametrize("flow_ratio, endpoint_fraction", [(0.0, 0.0), (0.25, 0.3), (0.75, 0.1), (1.0, 0.5)])
def test_shares_of_instants_and_endpoints(sampler, flow_ratio, endpoint_fraction, getkey):
    r, t = draw(sampler, getkey(), flow_ratio=flow_ratio, endpoint_fraction=endpoint_fraction)
    four_standard_errors = 4 * (0.25 / len(t)) ** 0.5
    interval, end = 1 - flow_ratio, endpoint_fraction
    expected = [flow_ratio, interval * end, interval * end, interval * end**2]
    shares = [np.mean(r == t), np.mean(r == 0), np.mean(t == 1), np.mean((r == 0) & (t == 1))]
    np.testing.assert_allclose(shares, expected, atol=four_standard_errors)


def test_law_of_uniform_intervals(getkey):
    r, t = draw(
        sample_uniform_interval, getkey(), t_min=0.1, t_max=0.8, flow_ratio=0.3, endpoint_fraction=0.0
    )
    assert t.min() >= 0.1 and t.max() <= 0.8
    assert kstest((t - 0.1) / 0.7, "uniform").pvalue > 1e-3
    assert kstest((r / t)[r < t], "uniform").pvalue > 1e-3
    assert kstest(t[r == t] / 0.7 - 1 / 7, "uniform").pvalue > 1e-3


def test_law_of_logit_normal_intervals(getkey):
    r, t = draw(sample_logit_normal_interval, getkey(), mean=0.3, std=0.7, flow_ratio=0.0)
    later, earlier = (np.log(t / (1 - t)) - 0.3) / 0.7, (np.log(r / (1 - r)) - 0.3) / 0.7
    assert kstest(later, lambda z: norm.cdf(z) ** 2).pvalue > 1e-3
    assert kstest(earlier, lambda z: 1 - norm.cdf(-z) ** 2).pvalue > 1e-3


def test_one_step_of_a_trained_network_is_the_flow_map(getkey):
    """Data `N(MEAN, STD^2 I)` in two dimensions, the velocity in closed form."""
    schedule = VPLinear()
    velocity, flow_map, _ = gaussian_flow(schedule, dim=2)
    mean = jnp.asarray(MEAN[:2], jnp.float32)
    mlp, mean_velocity = network(getkey(), dim=2, width=64, takes_gap=True)
    steps = 5000
    optimiser = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def example_loss(mlp, key):
        time_key, data_key, noise_key = jr.split(key, 3)
        r, t = sample_uniform_interval(key=time_key, flow_ratio=0.25)
        x_0 = mean + STD * jr.normal(data_key, (2,))
        x_t = schedule.alpha(t) * x_0 + schedule.sigma(t) * jr.normal(noise_key, (2,))
        v = velocity(x_t, t)
        return meanflow_loss(eqx.Partial(mean_velocity, mlp), x_t, r, t, v, power=0.5)[0]

    params, static = eqx.partition(mlp, eqx.is_array)

    def update(carry, key):
        params, state = carry
        keys = jr.split(key, 256)
        loss = lambda p: jnp.mean(jax.vmap(lambda k: example_loss(eqx.combine(p, static), k))(keys))
        updates, state = optimiser.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    train = jax.jit(lambda key: jax.lax.scan(update, (params, optimiser.init(params)), jr.split(key, steps)))
    (params, _), _ = train(getkey())
    trained = eqx.combine(params, static)
    zero, one = jnp.zeros(()), jnp.ones(())
    x_1 = jr.normal(getkey(), (1000, 2))
    one_step = jax.vmap(lambda x: x - mean_velocity(trained, x, zero, one))(x_1)
    truth = jax.vmap(lambda x: flow_map(x, 0.0, 1.0))(x_1)
    # A network of this size reaches about 0.025 in so many updates; the data's own deviation is 0.4.
    assert jnp.sqrt(jnp.mean(jnp.sum((one_step - truth) ** 2, axis=-1))) < 0.05
