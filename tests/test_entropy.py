"""Entropy estimates against closed forms, scikit-learn's mixtures, and the laws of entropy."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.scipy.special import logsumexp

from eqgen.entropy import FullGaussianMixture, fit_mixture, mixture_entropy, neighbour_entropy


N, DIM = 400, 3
NORMAL = 0.5 * math.log(2 * math.pi * math.e)  # the entropy of N(0, 1)
KEYS = jr.split(jr.key(7), 4)
by_neighbours = jax.jit(neighbour_entropy)
fit_one = jax.jit(lambda x: fit_mixture(x, 1, num_iterations=1, key=KEYS[0]))
fit_three = jax.jit(jax.vmap(lambda key, x: fit_mixture(x, 3, key=key), in_axes=(0, None)))


@jax.jit
def bounds(fits):
    return jax.vmap(lambda fit: fit.entropy_bound())(fits)


def by_mixture(x):
    """The estimates that four different starts lead to."""
    return np.asarray(bounds(fit_three(KEYS, x)))


def correlated(key):
    """Samples of a Gaussian, and its entropy."""
    factor = 0.3 * jnp.eye(DIM) + 0.2 * jnp.tril(jnp.ones((DIM, DIM)), -1)
    return jr.normal(key, (N, DIM)) @ factor.T, DIM * (NORMAL + math.log(0.3))


def blobs(key, std=0.1):
    """Samples of three Gaussians of weights 0.5, 0.3, 0.2, and the mixture's entropy if they do not overlap."""
    mode_key, noise_key = jr.split(key)
    weights = jnp.array([0.5, 0.3, 0.2])
    modes = jr.categorical(mode_key, jnp.log(weights), shape=(N,))
    entropy = DIM * (NORMAL + math.log(std)) - float(jnp.sum(weights * jnp.log(weights)))
    return 5 * jnp.eye(DIM)[modes] + std * jr.normal(noise_key, (N, DIM)), entropy


def test_one_mode_has_the_samples_moments_and_the_entropy_of_their_gaussian(getkey):
    x, entropy = correlated(getkey())
    fit = fit_one(x)
    covariance = np.cov(np.asarray(x, float), rowvar=False, bias=True)
    np.testing.assert_allclose(fit.means[0], np.mean(x, axis=0), atol=1e-6)
    np.testing.assert_allclose(fit.covariances[0], covariance + 1e-6 * np.eye(DIM), atol=1e-6)
    found = float(fit.entropy_bound())
    assert found == pytest.approx(DIM * NORMAL + 0.5 * np.linalg.slogdet(covariance)[1], abs=1e-4)
    assert found == pytest.approx(entropy, abs=0.2)  # three standard errors, sqrt(d / 2n) each


def test_separate_modes_are_found_from_any_start_and_their_entropy_is_the_mixtures(getkey):
    x, entropy = blobs(getkey())
    for weights in np.sort(fit_three(KEYS, x).weights, axis=1):
        np.testing.assert_allclose(
            weights, [0.2, 0.3, 0.5], atol=0.08
        )  # three standard errors of the fractions
    # Three standard errors: sqrt(d / 2n) from the deviations, and less from the fractions.
    np.testing.assert_allclose(by_mixture(x), entropy, atol=0.25)
    np.testing.assert_allclose(by_neighbours(x), entropy, atol=0.25)


def test_three_modes_for_one_gaussian_are_too_high_by_at_most_log_3(getkey):
    x, entropy = correlated(getkey())
    excess = by_mixture(x) - entropy
    assert np.all((-0.2 < excess) & (excess < math.log(3) + 0.2))
    assert float(by_neighbours(x)) == pytest.approx(entropy, abs=0.25)


def test_bound_exceeds_the_entropy_by_0_to_log_k():
    grid = jnp.linspace(-60.0, 60.0, 8001)[:, None]

    @jax.jit
    def excess(gap):
        means = gap * jnp.array([[-1.0], [0.0], [1.0]])
        mixture = FullGaussianMixture(jnp.full(3, 1 / 3), means, jnp.ones((3, 1, 1)))
        log_p = logsumexp(mixture.log_joint(grid), axis=1)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p) * (grid[1, 0] - grid[0, 0])
        return mixture.entropy_bound() - entropy

    # The sum over the grid is in single precision.
    assert float(excess(0.0)) == pytest.approx(math.log(3), abs=1e-3)
    assert 0.1 < float(excess(1.0)) < math.log(3)
    assert float(excess(50.0)) == pytest.approx(0.0, abs=1e-3)


def test_agrees_with_scikit_learn(getkey):
    """Where the likelihood has one clear maximum; elsewhere both depend on where they start."""
    mixture = pytest.importorskip("sklearn.mixture")
    for std in (0.1, 0.8):
        x, _ = blobs(getkey(), std)
        fit = mixture.GaussianMixture(3, tol=1e-6, max_iter=300, random_state=0).fit(np.asarray(x, float))
        of_modes = DIM * NORMAL + 0.5 * np.linalg.slogdet(fit.covariances_)[1]
        expected = np.sum(fit.weights_ * (of_modes - np.log(fit.weights_)))
        np.testing.assert_allclose(
            by_mixture(x), expected, atol=2e-3
        )  # EM is not quite at rest after 30 steps


def test_entropy_of_an_affine_image(getkey):
    """H(A x + b) = H(x) + log |det A|, of samples that are turned, scaled and moved."""
    x, _ = blobs(getkey(), 0.3)
    turn = jnp.linalg.qr(jr.normal(getkey(), (DIM, DIM)))[0]
    moved = 2.0 * x @ turn.T + 1.0
    # The floor of the variances does not scale, and the distances of moved samples are rounded.
    np.testing.assert_allclose(by_mixture(moved) - by_mixture(x), DIM * math.log(2), atol=1e-3)
    np.testing.assert_allclose(by_neighbours(moved) - by_neighbours(x), DIM * math.log(2), atol=1e-3)


def test_neighbours_by_hand():
    x = jnp.array([0.0, 1.0, 3.0, 7.0])[:, None]
    second = np.array([3.0, 2.0, 3.0, 6.0])  # distances to the second neighbour
    psi = lambda n: -0.5772156649 + sum(1 / i for i in range(1, n))
    expected = psi(4) - psi(2) + math.log(2) + np.mean(np.log(second))
    assert float(jax.jit(neighbour_entropy, static_argnums=1)(x, 2)) == pytest.approx(expected, rel=1e-5)


def test_samples_without_a_density_have_a_finite_entropy(getkey):
    """That of the floor, in one point; on a line or on the faces of a box, less than that of a normal law."""
    point = jnp.full((N, DIM), 0.3)
    floor = DIM * (NORMAL + 0.5 * math.log(1e-6))
    np.testing.assert_allclose(by_mixture(point), floor, atol=0.01)  # rounding of the mean lifts it
    spread = jr.normal(getkey(), (N, DIM))
    faces, line = jnp.clip(2 * spread, -1, 1), spread[:, :1] * jnp.ones(DIM)[None]
    for x in (point, faces, line):
        for value in (*by_mixture(x), float(by_neighbours(x))):
            assert math.isfinite(value) and value < DIM * NORMAL


def test_few_samples_are_refused():
    with pytest.raises(ValueError, match="num_modes=3 must lie between 1 and the number of samples, 2"):
        mixture_entropy(jnp.zeros((2, 1)), key=jr.key(0))
    with pytest.raises(ValueError, match="neighbour=3 must lie between 1 and 2"):
        neighbour_entropy(jnp.zeros((3, 1)))
