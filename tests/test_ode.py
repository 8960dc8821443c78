"""Laws of the Diffrax solves: Gaussian closed forms, agreement with fixed-step samplers, likelihood, moments."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal, norm

from eqgen.ode import flow_map, log_likelihood, probability_flow, reverse_sde
from eqgen.parameterizations import converted
from eqgen.samplers import heun, uniform_grid
from eqgen.schedules import LinearFlow, VPLinear
from helpers import assert_trees_close


VP, FLOW = VPLinear(), LinearFlow()
MEAN, COVARIANCE = np.array([0.7, -0.3]), np.array([[0.5, 0.2], [0.2, 0.3]])


def law(schedule, t):
    """Mean and covariance of x_t for x_0 ~ N(MEAN, COVARIANCE)."""
    covariance = schedule.alpha(t) ** 2 * jnp.array(COVARIANCE) + schedule.sigma(t) ** 2 * jnp.eye(2)
    return schedule.alpha(t) * jnp.array(MEAN), covariance


def score(schedule):
    def gaussian_score(x, t):
        mean, covariance = law(schedule, t)
        return -jnp.linalg.inv(covariance) @ (x - mean)

    return gaussian_score


def velocity(schedule):
    def denoise(x, t):
        mean, covariance = law(schedule, t)
        gain = schedule.alpha(t) * jnp.array(COVARIANCE) @ jnp.linalg.inv(covariance)
        return jnp.array(MEAN) + gain @ (x - mean)

    return converted(denoise, schedule, source="x0", target="velocity")


def exact_flow_map(schedule, x, t, r):
    """x_r = mean_r + C_r^(1/2) C_t^(-1/2) (x_t - mean_t); the covariances C share their eigenvectors."""
    variances, basis = jnp.linalg.eigh(jnp.array(COVARIANCE))
    std = lambda t: jnp.sqrt(schedule.alpha(t) ** 2 * variances + schedule.sigma(t) ** 2)
    mean = lambda t: schedule.alpha(t) * jnp.array(MEAN)
    return mean(r) + basis @ (std(r) / std(t) * (basis.T @ (x - mean(t))))


def test_flow_map_between_any_two_times(getkey, x64):
    """The closed form, under vmap, every example with times of its own: down, up, far, near and none at all."""
    t = jnp.array([0.99, 0.05, 1.0, 0.5, 0.4, 1e-3])
    r = jnp.array([0.01, 0.9, 1e-3, 0.49, 0.4, 1e-3])
    x = jr.normal(getkey(), (6, 2))

    @jax.jit
    @jax.vmap
    def solve(x, t, r):
        ts = jnp.linspace(t, r, 5)
        expected = jax.vmap(lambda s: exact_flow_map(VP, x, t, s))(ts)
        return flow_map(velocity(VP), x, t, r, ts=ts, rtol=1e-8, atol=1e-8), expected

    (last, path), expected = solve(x, t, r)
    # Local errors of 1e-8 add up along the way; between the steps Tsit5 interpolates at fourth order.
    assert_trees_close(last, expected[:, -1], rtol=1e-6, atol=1e-6)
    assert_trees_close(path, expected, rtol=1e-5, atol=1e-5)
    assert_trees_close(last[4:], x[4:], rtol=0, atol=0)


def test_fixed_steps_are_those_of_the_sampler(x64):
    x = jnp.array([1.0, -1.0])
    last, path = flow_map(velocity(VP), x, 0.9, 0.1, solver=diffrax.Heun(), num_steps=12)
    expected, _ = heun(velocity(VP), x, uniform_grid(12, 0.9, 0.1))
    assert_trees_close(last, expected, rtol=1e-10)
    assert_trees_close(path, jnp.stack([x, last]), rtol=0, atol=0)


def test_flow_map_differentiates_in_reverse_mode(x64):
    """The cotangent goes through the Jacobian C_r^(1/2) C_t^(-1/2); the derivative in r is the last velocity."""
    x, t, r, cotangent = jnp.array([1.0, -1.0]), 0.9, jnp.array(0.2), jnp.array([0.5, 2.0])
    field = velocity(FLOW)
    solve = lambda x, r: cotangent @ flow_map(field, x, t, r, rtol=1e-7, atol=1e-7)[0]
    exact = lambda x: cotangent @ exact_flow_map(FLOW, x, t, r)
    expected = (jax.grad(exact)(x), cotangent @ field(exact_flow_map(FLOW, x, t, r), r))
    assert_trees_close(jax.jit(jax.grad(solve, (0, 1)))(x, r), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_flow_map_differentiates_in_forward_mode(x64):
    x, dx, times = jnp.array([1.0, -1.0]), jnp.array([0.5, 2.0]), (0.9, 0.2)
    solve = lambda x: flow_map(
        velocity(FLOW), x, *times, adjoint=diffrax.ForwardMode(), rtol=1e-7, atol=1e-7
    )[0]
    found, expected = (
        jax.jvp(f, (x,), (dx,))[1] for f in (jax.jit(solve), lambda x: exact_flow_map(FLOW, x, *times))
    )
    assert_trees_close(found, expected, rtol=1e-5, atol=1e-5)


def test_failed_solves_are_seen():
    field = lambda x, t: 1e3 * jnp.sin(1e3 * x)
    solve = lambda throw: flow_map(field, jnp.ones(2), 1.0, 0.0, max_steps=5, throw=throw)
    assert jnp.all(jnp.isnan(solve(False)[0]))
    with pytest.raises(RuntimeError, match="max"):
        jax.block_until_ready(solve(True))


def test_probability_flow_agrees_with_the_sampler_and_the_closed_form(x64):
    x, t_max = jnp.array([1.0, -1.0]), 0.99

    @jax.jit
    def solve(x, t, r):
        return probability_flow(score(VP), x, VP, t_max=t, t_min=r, rtol=1e-8, atol=1e-8)[0]

    data = solve(x, t_max, 1e-3)
    assert_trees_close(data, exact_flow_map(VP, x, t_max, 1e-3), rtol=1e-6, atol=1e-6)
    assert_trees_close(solve(data, 1e-3, t_max), x, rtol=1e-6, atol=1e-6)
    # 400 steps of second order.
    by_heun, _ = jax.jit(lambda x: heun(velocity(VP), x, uniform_grid(400, t_max, 0.1)))(x)
    assert_trees_close(by_heun, solve(x, t_max, 0.1), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_probability_flow_of_a_mixture(getkey):
    """Four unequal modes in 2-D: every mode gets its weight, and nearly every sample lies at one.

    Tsit5 at 1e-5 from t = 1 to 1e-3, 2000 samples; a fraction has a standard error of 0.011 at most.
    """
    std, weights = 0.15, jnp.array([0.4, 0.3, 0.2, 0.1])
    means = 0.6 * jnp.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])

    def log_density(x, t):
        alpha, variance = VP.alpha(t), VP.alpha(t) ** 2 * std**2 + VP.sigma(t) ** 2
        squared = jnp.sum((x[None] - alpha * means) ** 2, axis=-1)
        return jax.scipy.special.logsumexp(jnp.log(weights) - squared / (2 * variance))

    x = jr.normal(getkey(), (2000, 2))
    solve = jax.jit(jax.vmap(lambda x: probability_flow(jax.grad(log_density), x, VP)[0]))
    distances = jnp.linalg.norm(solve(x)[:, None] - means[None], axis=-1)
    fractions = jnp.mean(jnp.argmin(distances, axis=1)[:, None] == jnp.arange(4)[None], axis=0)
    assert jnp.max(jnp.abs(fractions - weights)) < 0.03
    # Of a 2-D normal 1.1 % lie beyond 3 standard deviations.
    assert jnp.mean(jnp.min(distances, axis=1) < 3 * std) > 0.97


def euler_maruyama_moments(num_steps, t_max, t_min):
    """Mean and covariance after Euler-Maruyama steps of the reverse SDE of VP, by propagating the moments."""
    mean, covariance = (np.array(m) for m in law(VP, t_max))
    ts = np.linspace(t_max, t_min, num_steps + 1)
    laws = jax.vmap(lambda t: (VP.drift(t), VP.diffusion_squared(t), *law(VP, t)))(jnp.array(ts))
    for dt, f, g2, mean_t, covariance_t in zip(-np.diff(ts), *(np.array(a) for a in laws)):
        gain = -g2 * np.linalg.inv(covariance_t)
        step = np.eye(2) * (1 - dt * f) + dt * gain
        mean = step @ mean - dt * gain @ mean_t
        covariance = step @ covariance @ step.T + g2 * dt * np.eye(2)
    return mean, covariance


def test_reverse_sde_has_the_moments_of_euler_maruyama(getkey, x64):
    """To 4.5 standard errors with 25 steps; and the moments themselves tend to those of the data."""
    n, num_steps, t_max, t_min = 2000, 25, 0.95, 0.05

    @jax.jit
    @jax.vmap
    def sample(z, key):
        mean, covariance = law(VP, t_max)
        x = mean + jnp.linalg.cholesky(covariance) @ z
        return reverse_sde(score(VP), x, VP, num_steps=num_steps, key=key, t_max=t_max, t_min=t_min)

    x, path = sample(jr.normal(getkey(), (n, 2)), jr.split(getkey(), n))
    assert path.shape == (n, num_steps + 1, 2)
    assert_trees_close(path[:, -1], x, rtol=0, atol=0)
    mean, covariance = euler_maruyama_moments(num_steps, t_max, t_min)
    largest = np.max(np.diag(covariance))
    np.testing.assert_allclose(np.mean(x, axis=0), mean, atol=4.5 * np.sqrt(largest / n))
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=4.5 * largest * np.sqrt(2 / n))

    # First order: 1000 steps leave half a per cent.
    for found, truth in zip(euler_maruyama_moments(1000, t_max, t_min), law(VP, t_min)):
        np.testing.assert_allclose(found, truth, atol=5e-3)


@pytest.mark.parametrize("schedule", [FLOW, pytest.param(VP, marks=pytest.mark.slow)], ids=["flow", "vp"])
def test_log_likelihood_of_gaussian_data(schedule, getkey, x64):
    """With the true law of x_1 in place of the prior, which differ by alpha(1), the density is exact."""
    x = jnp.array(MEAN)[None] + jr.normal(getkey(), (4, 2))

    @jax.jit
    @jax.vmap
    def check(x):
        field = lambda x, t: velocity(schedule)(x[0], t)[None]  # an example may have any shape
        found = log_likelihood(field, x[None], schedule, rtol=1e-7, atol=1e-7)
        x_1 = exact_flow_map(schedule, x, 1e-3, 1.0)
        prior = norm.logpdf(x_1, scale=schedule.prior_std).sum()
        truth = multivariate_normal.logpdf(x_1, *law(schedule, 1.0))
        return found, found - prior + truth, multivariate_normal.logpdf(x, *law(schedule, 1e-3))

    found, corrected, exact = check(x)
    assert_trees_close(corrected, exact, rtol=0, atol=1e-5)
    if schedule is FLOW:
        assert_trees_close(found, exact, rtol=0, atol=1e-5)


def test_log_likelihood_by_hutchinson_is_unbiased(getkey, x64):
    n, x, t_min = 400, jnp.array([0.2, 0.1]), 0.05
    estimate = lambda key: log_likelihood(velocity(FLOW), x, FLOW, key=key, t_min=t_min, num_steps=20)
    estimates = jax.jit(jax.vmap(estimate))(jr.split(getkey(), n))
    exact = multivariate_normal.logpdf(x, *law(FLOW, t_min))
    assert estimates.std() > 0.1  # the Jacobian is not diagonal
    assert abs(estimates.mean() - exact) < 4.5 * estimates.std() / np.sqrt(n)
