"""Score estimators against the analytic score of a mixture, quadrature, linear densities and SciPy."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import truncnorm

from eqgen.schedules import VPLinear
from eqgen.scores import (
    GaussianMixture,
    denoising_score,
    gradient_score,
    standardize,
    truncated_normal_quantile,
    truncated_score,
)


ESTIMATORS = [gradient_score, denoising_score, truncated_score]
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda f: f.__name__)

schedule = VPLinear()


def coefficients(t):
    return schedule.alpha(t), schedule.sigma(t)


def four_modes(std=0.25):
    """The mixture of the SOM bandit: a mode in each quadrant, unequal weights."""
    means = jnp.array([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5], [0.5, -0.5]])
    return GaussianMixture(means, jnp.full(4, std), jnp.array([0.4, 0.3, 0.2, 0.1]))


def relative_error(estimate, truth):
    return jnp.sqrt(jnp.sum((estimate - truth) ** 2) / jnp.sum(truth**2))


def mixture_error(estimator, num_samples, num_points, key):
    """A function of t: the relative RMSE of the estimated score over `x_t ~ p_t`."""
    mixture = four_modes()

    @jax.jit
    def error(t):
        alpha_t, sigma_t = coefficients(t)
        marginal = mixture.perturbed(alpha_t, sigma_t)
        point_keys, keys = jr.split(key, (2, num_points))
        x_t = jax.vmap(lambda key: marginal.sample(key=key))(point_keys)

        def score(x_and_key):
            x, key = x_and_key
            options = {"num_samples": num_samples, "key": key}
            return estimator(mixture.log_density, x, alpha_t, sigma_t, **options).score

        scores = jax.lax.map(score, (x_t, keys), batch_size=32)
        return relative_error(scores, jax.vmap(marginal.score)(x_t))

    return error


# The bounds at K = 1000 are those of the spec, about 1.5 times what is measured. Four times the samples halve
# an error that is Monte Carlo noise; 30 % is the noise of the measurement itself over 128 points.
@pytest.mark.parametrize(
    "estimator, bounds",
    [
        (gradient_score, {0.02: 0.02, 0.05: 0.05, 0.1: 0.12}),
        (denoising_score, {0.1: 0.1, 0.2: 0.1, 0.5: 0.1, 0.95: 0.1}),
    ],
    ids=["gradient_score", "denoising_score"],
)
def test_error_on_a_mixture_is_monte_carlo_error(estimator, bounds, x64, getkey):
    coarse = mixture_error(estimator, 1000, 128, getkey())
    fine = mixture_error(estimator, 4000, 128, getkey())
    for t, bound in bounds.items():
        assert coarse(t) < bound, t
        assert 0.35 < fine(t) / coarse(t) < 0.65, t


def test_gradient_and_denoising_forms_have_one_limit(x64, getkey):
    # 2e4 samples leave 1.7 % and 1.5 % of Monte Carlo error.
    for estimator in (gradient_score, denoising_score):
        assert mixture_error(estimator, 20_000, 32, getkey())(0.1) < 0.03


def test_truncated_score_against_quadrature(x64, getkey):
    # The target rises towards one corner of the box, so its edges matter.
    log_density = lambda x: 2 * x[0] + jnp.sin(3 * x[1]) + x[0] * x[1]
    nodes, node_weights = map(jnp.asarray, np.polynomial.legendre.leggauss(80))
    grid = jnp.stack(jnp.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    log_mass = jax.vmap(log_density)(grid) + jnp.log(jnp.outer(node_weights, node_weights).ravel())
    h = 1e-5 * jnp.eye(2)

    @jax.jit
    def error(t, key):
        alpha_t, sigma_t = coefficients(t)

        def log_marginal(x_t):
            square = jnp.sum((x_t[None] - alpha_t * grid) ** 2, axis=-1)
            return jax.scipy.special.logsumexp(log_mass - 0.5 * square / sigma_t**2)

        def scores(x_and_key):
            x, key = x_and_key
            truth = jax.vmap(lambda h: (log_marginal(x + h) - log_marginal(x - h)) / 2e-5)(h)
            options = {"num_samples": 2000, "key": key}
            return truncated_score(log_density, x, alpha_t, sigma_t, **options).score, truth

        data_key, noise_key, key = jr.split(key, 3)
        x_0 = jr.uniform(data_key, (64, 2), minval=-1, maxval=1)
        x_t = alpha_t * x_0 + sigma_t * jr.normal(noise_key, (64, 2))
        return relative_error(*jax.lax.map(scores, (x_t, jr.split(key, 64))))

    for t in (0.05, 0.2, 0.5, 0.95):
        assert error(t, getkey()) < 0.1  # the Monte Carlo error of 2000 samples


def test_truncated_score_is_finite_and_in_the_box_everywhere(getkey):
    """In single precision, with `x_t` anywhere: at the smallest t, 100 is ten thousand deviations outside."""
    distances = jnp.array([0.0, 0.5, 0.999, 1.0, 1.05, 1.1, 1.5, 3.0, 100.0])
    x_t = jnp.stack([distances, -distances], axis=-1)
    low, high = -1.0, 0.5
    seen = lambda x: jnp.where(jnp.all((x >= low) & (x <= high)), -jnp.sum(x**2), jnp.nan)
    options = {"num_samples": 32, "low": low, "high": high}

    @jax.jit
    def estimates(t, key):
        estimate = lambda x, key: truncated_score(seen, x, *coefficients(t), key=key, **options)
        return jax.vmap(estimate)(x_t, jr.split(key, len(x_t)))

    for t in (1e-3, 0.01, 0.1, 0.3, 0.7, 1.0):
        estimate = estimates(t, getkey())
        assert jnp.all(jnp.isfinite(estimate.score)), t
        assert jnp.all((estimate.posterior_mean >= low) & (estimate.posterior_mean <= high)), t


def test_truncated_posterior_is_at_the_near_edge(getkey):
    alpha_t, sigma_t = coefficients(1e-3)
    x_t = jnp.array([1.07, 1.5, 3.0, -1.07, -3.0])
    options = {"num_samples": 100, "key": getkey()}
    estimate = jax.jit(lambda x: truncated_score(lambda x: 0 * x[0], x, alpha_t, sigma_t, **options))(x_t)
    # Proposals centred at 1.07 with deviation 0.0105 stay within about 0.01 of the edge.
    np.testing.assert_allclose(estimate.posterior_mean, jnp.sign(x_t), atol=0.01)


@pytest.mark.parametrize(
    "mean, std",
    [
        *[(0.0, 0.01), (0.0, 0.3), (0.0, 152.0), (0.999, 0.01), (1.05, 0.01), (-1.07, 0.01), (1.09, 0.01)],
        *[
            (1.11, 0.01),
            (3.0, 0.01),
            (-3.0, 0.01),
            (1.5, 0.1),
            (100.0, 1.0),
            (-300.0, 152.0),
            (1500.0, 152.0),
        ],
    ],
)
def test_truncated_normal_quantile_against_scipy(mean, std):
    p = np.linspace(1e-4, 1 - 1e-4, 201, dtype=np.float32)
    law = truncnorm((-1 - mean) / std, (1 - mean) / std, loc=mean, scale=std)
    x = np.asarray(truncated_normal_quantile(jnp.asarray(p), jnp.full_like(p, mean), std, -1.0, 1.0))
    # Single precision rounds at the size of the mean. The rest is the error of the tail's expansion just
    # beyond ten deviations, and of seven digits where the box is a hundredth of a deviation wide.
    np.testing.assert_allclose(x, law.ppf(p), rtol=0, atol=2e-3 * law.std() + 2.4e-7 * max(1, abs(mean)))
    assert np.all(np.diff(x) >= 0)


@each_estimator
def test_score_and_posterior_mean_are_one_estimate(estimator, x64, getkey):
    """Tweedie's formula, and the two forms of the variance-preserving probability-flow velocity."""
    mixture, t = four_modes(), 0.3
    alpha_t, sigma_t = coefficients(t)
    x_t = jr.normal(getkey(), (2,))
    log_density, options = mixture.log_density, {"num_samples": 50, "key": getkey()}
    estimate = jax.jit(lambda x: estimator(log_density, x, alpha_t, sigma_t, **options))(x_t)
    tweedie = (alpha_t * estimate.posterior_mean - x_t) / sigma_t**2
    np.testing.assert_allclose(estimate.score, tweedie, rtol=1e-12, atol=1e-12)
    beta = schedule.beta(t)
    by_score = -0.5 * beta * (x_t + estimate.score)
    by_mean = 0.5 * beta * alpha_t / sigma_t**2 * (alpha_t * x_t - estimate.posterior_mean)
    np.testing.assert_allclose(by_score, by_mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_samples", [1, 7])
@pytest.mark.parametrize("t", [1e-3, 0.1, 1.0])
def test_gradient_score_is_exact_for_linear_densities(t, num_samples, x64, getkey):
    slope = jnp.array([1.0, -2.0, 0.5])
    alpha_t, sigma_t = coefficients(t)
    options = {"num_samples": num_samples, "key": getkey()}
    estimate = gradient_score(lambda x: 3 * x @ slope, jr.normal(getkey(), (3,)), alpha_t, sigma_t, **options)
    np.testing.assert_allclose(estimate.score, 3 * slope / alpha_t, rtol=1e-12)


@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_statistics_of_standardize_are_constants(axis_name, x64):
    """Differentiated statistics would make the mean score of a linear density zero."""
    slope = jnp.array([1.0, -2.0, 0.5])
    alpha_t, sigma_t = coefficients(0.3)
    transform = lambda q: 2 * standardize(q, axis_name=axis_name)

    def score(key):
        options = {"num_samples": 400, "key": key, "transform": transform}
        return gradient_score(lambda x: x @ slope, jnp.ones(3), alpha_t, sigma_t, **options).score

    scores = jax.jit(jax.vmap(score, axis_name="batch"))(jr.split(jr.key(1), 128))
    strength = scores @ slope / (slope @ slope)
    np.testing.assert_allclose(scores, strength[:, None] * slope[None], rtol=1e-10)
    # The values are normal with this deviation, which 128 x 400 of them give with a standard error of 0.3 %.
    deviation = jnp.linalg.norm(slope) * sigma_t / alpha_t
    np.testing.assert_allclose(jnp.mean(strength), 2 / (deviation * alpha_t), rtol=0.01)
    assert (jnp.std(strength) < 1e-10) == (axis_name == "batch")


def test_standardize_over_an_axis_is_standardize_over_the_whole(x64, getkey):
    values = 3 + 5 * jr.normal(getkey(), (6, 20))
    whole = standardize(values)
    np.testing.assert_allclose([whole.mean(), whole.std()], [0, 1], atol=1e-6)
    by_axis = jax.vmap(lambda v: standardize(v, axis_name="batch"), axis_name="batch")(values)
    np.testing.assert_allclose(by_axis, whole, rtol=1e-12)
    assert jnp.all(standardize(jnp.ones(5)) == 0)


@each_estimator
def test_standardized_estimates_ignore_the_scale_of_values(estimator, x64, getkey):
    mixture = four_modes()
    alpha_t, sigma_t = coefficients(0.1)
    x_t, keys = jr.normal(getkey(), (8, 2)), jr.split(getkey(), 8)

    @jax.jit
    def scores(scale, offset):
        log_density = lambda x: scale * mixture.log_density(x) + offset
        options = {"num_samples": 50, "transform": lambda q: 5 * standardize(q, axis_name="batch")}
        score = lambda x, key: estimator(log_density, x, alpha_t, sigma_t, key=key, **options).score
        return jax.vmap(score, axis_name="batch")(x_t, keys)

    expected = scores(1.0, 0.0)
    np.testing.assert_allclose(scores(10.0, 3.0), expected, rtol=1e-5)
    assert jnp.max(jnp.abs(scores(-1.0, 0.0) - expected)) > 0.1


@each_estimator
def test_effective_samples_count_the_proposals_that_matter(estimator, getkey):
    @jax.jit
    def effective_samples(slope, key):
        return estimator(
            lambda x: slope * x[0], jnp.zeros(2), 0.9, 0.4, num_samples=64, key=key
        ).effective_samples

    np.testing.assert_allclose(effective_samples(0.0, getkey()), 64, rtol=1e-5)
    assert 1 <= effective_samples(1e4, getkey()) < 2


def test_mixture_closed_forms(x64, getkey):
    mixture = GaussianMixture(
        jnp.array([[0.5, 0.2], [-0.4, -0.6]]), jnp.array([0.3, 0.15]), jnp.array([3.0, 1.0])
    )
    alpha_t, sigma_t = coefficients(0.2)
    marginal = mixture.perturbed(alpha_t, sigma_t)
    axis = jnp.linspace(-2.5, 2.5, 251)
    grid = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    mass = jnp.exp(jax.vmap(mixture.log_density)(grid)) * (axis[1] - axis[0]) ** 2
    np.testing.assert_allclose(jnp.sum(mass), 1, rtol=1e-10)

    @jax.jit
    def closed_forms_and_truths(x):
        square = jnp.sum((x[None] - alpha_t * grid) ** 2, axis=-1)
        kernel = jnp.exp(-0.5 * square / sigma_t**2) / (2 * jnp.pi * sigma_t**2)
        density = jnp.sum(kernel * mass)
        posterior_mean = (kernel * mass) @ grid / density
        tweedie = (x + sigma_t**2 * marginal.score(x)) / alpha_t
        return [
            (mixture.score(x), jax.grad(mixture.log_density)(x)),
            (marginal.log_density(x), jnp.log(density)),
            (mixture.posterior_mean(x, alpha_t, sigma_t), posterior_mean),
            (tweedie, posterior_mean),
        ]

    for x in jr.normal(getkey(), (5, 2)):
        for closed_form, truth in closed_forms_and_truths(x):
            np.testing.assert_allclose(closed_form, truth, rtol=1e-8)  # the grid ends at 6.7 deviations


def test_mixture_samples_follow_it(getkey):
    mixture, n = four_modes(std=0.05), 20_000
    x = jax.jit(jax.vmap(lambda key: mixture.sample(key=key)))(jr.split(getkey(), n))
    mode = jnp.argmin(jnp.sum((x[:, None] - mixture.means[None]) ** 2, axis=-1), axis=1)
    # Four standard errors of a fraction, and of a deviation, from n draws.
    fractions = jnp.bincount(mode, length=4) / n
    np.testing.assert_allclose(fractions, mixture.weights, atol=4 * (0.25 / n) ** 0.5)
    residual = (x - mixture.means[mode]) / 0.05
    np.testing.assert_allclose(jnp.std(residual, axis=0), 1, atol=4 * (0.5 / n) ** 0.5)
