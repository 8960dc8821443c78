"""Distances between samples: closed forms, means over repetitions, invariances; a classifier's features."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg

from eqgen.metrics import (
    FeatureClassifier,
    fit_classifier,
    frechet_distance,
    median_distance,
    mmd2,
    sliced_wasserstein2,
)
from eqgen.networks.mlp import MLP
from helpers import assert_trees_close


X, Y = jr.normal(jr.key(0), (33, 2, 3)), 0.3 + 1.5 * jr.normal(jr.key(1), (24, 2, 3))
SHIFT = jnp.asarray([[0.5, -1.0, 2.0], [0.0, 0.25, -0.5]])[None]


def flat(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


def distances(x, y):
    return np.linalg.norm(flat(x)[:, None] - flat(y)[None], axis=-1)


# --- Maximum mean discrepancy ---


def estimates(shift, scale, repeats=2000, n=12, m=17, dim=3, **kwargs):
    """Of `mmd2` between N(0, I) and N(shift, scale^2 I), and four standard errors of their mean."""

    def one(key):
        x_key, y_key = jr.split(key)
        return mmd2(jr.normal(x_key, (n, dim)), shift + scale * jr.normal(y_key, (m, dim)), **kwargs)

    values = np.asarray(jax.jit(jax.vmap(one))(jr.split(jr.key(2), repeats)), np.float64)
    return values.mean(), 4 * values.std() / repeats**0.5


def test_the_mmd_of_equal_laws_is_zero_in_the_mean():
    mean, error = estimates(0.0, 1.0, bandwidth=1.5)
    assert abs(mean) < error < 0.01


def test_the_mmd_of_two_gaussians_is_the_closed_form_in_the_mean():
    shift, scale, h, multiples = 0.7, 1.6, 1.5, (0.5, 2.0)

    def kernel(square, variance, dim=3):
        """E k(a, b) for a - b ~ N(delta, variance I), |delta|^2 = square."""
        widths = (h * np.asarray(multiples)) ** 2
        factor = (widths / (widths + variance)) ** (dim / 2)
        return np.mean(factor * np.exp(-square / (2 * (widths + variance))))

    exact = kernel(0.0, 2.0) + kernel(0.0, 2 * scale**2) - 2 * kernel(3 * shift**2, 1 + scale**2)
    mean, error = estimates(shift, scale, bandwidth=h, multiples=multiples)
    assert abs(mean - exact) < error < 0.2 * exact


def test_the_mmd_is_equation_3_with_the_median_distance():
    pooled = np.concatenate([flat(X), flat(Y)])
    pairs = distances(pooled, pooled)[np.triu_indices(len(pooled), 1)]
    h = np.partition(pairs, (len(pairs) - 1) // 2)[(len(pairs) - 1) // 2]
    kernel = lambda a, b: np.mean([np.exp(-(distances(a, b) ** 2) / (2 * (m * h) ** 2)) for m in (1, 3)], 0)
    within = lambda a: (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))
    expected = within(X) + within(Y) - 2 * kernel(X, Y).mean()
    assert_trees_close(mmd2(X, Y, multiples=(1, 3)), jnp.asarray(expected, jnp.float32))


@pytest.mark.parametrize("n", [2, 3, 12, 33])
def test_the_median_distance_is_that_of_all_pairs(n):
    pairs = np.sort(distances(X[:n], X[:n])[np.triu_indices(n, 1)])
    expected = jnp.asarray(pairs[(len(pairs) - 1) // 2], jnp.float32)
    assert_trees_close(median_distance(X[:n], block=5), expected)


def test_blocks_change_nothing():
    with_block = lambda block: jax.jit(lambda x, y: mmd2(x, y, block=block))(X, Y)
    assert_trees_close(with_block(1), with_block(1000))
    assert_trees_close(with_block(7), with_block(1000))


def test_the_mmd_knows_neither_order_nor_origin():
    y = Y.repeat(2, axis=0)[: len(X)]  # as many as X, so that all calls are one program
    distance = jax.jit(mmd2)
    expected = distance(X, y)
    assert_trees_close(distance(jr.permutation(jr.key(3), X), y), expected)
    assert_trees_close(distance(y, X), expected)
    assert_trees_close(distance(X + 10 * SHIFT, y + 10 * SHIFT), expected)
    assert_trees_close(distance(3 * X, 3 * y), expected)  # the bandwidth scales along


def test_one_example_is_too_few():
    with pytest.raises(ValueError, match="there are 33 and 1"):
        mmd2(X, Y[:1])
    with pytest.raises(ValueError, match="among 1 examples"):
        median_distance(Y[:1])


# --- Sliced Wasserstein distance ---


def test_a_translation_costs_its_length_over_the_root_of_the_dimension():
    d, number = SHIFT.size, 20_000
    square = sliced_wasserstein2(X, X + SHIFT, num_projections=number, key=jr.key(4)) ** 2
    # d theta_1^2 has mean 1 and variance 2 (d - 1) / (d + 2) on the sphere.
    ratio = float(d * square / jnp.sum(SHIFT**2))
    assert abs(ratio - 1) < 4 * (2 * (d - 1) / (d + 2) / number) ** 0.5


def test_on_a_line_the_distance_is_between_quantiles():
    at = lambda *points: jnp.asarray(points)[:, None]
    line = lambda x, y: sliced_wasserstein2(x, y, num_projections=3, key=jr.key(5))
    assert_trees_close(line(at(3.0, 1.0, 2.0), at(3.5, 1.5, 2.5)), jnp.asarray(0.5))
    assert_trees_close(line(at(1.0), at(0.0, 3.0)), jnp.asarray(2.5**0.5))
    # [0, 1/3] to [0, 1/2], then 1/6 of the mass from 1 to 0, the rest of 1 and all of 5 to 4.
    assert_trees_close(line(at(0.0, 1.0, 5.0), at(0.0, 4.0)), jnp.asarray((1 / 6 + 9 / 6 + 1 / 3) ** 0.5))


def test_unequal_numbers_are_as_their_repetitions():
    n, m = 6, 8
    repeated = sliced_wasserstein2(jnp.repeat(X[:n], 4, axis=0), jnp.repeat(Y[:m], 3, axis=0), key=jr.key(6))
    assert_trees_close(sliced_wasserstein2(X[:n], Y[:m], key=jr.key(6)), repeated)


def test_the_sliced_distance_knows_no_order_and_scales():
    y = Y.repeat(2, axis=0)[: len(X)]
    distance = jax.jit(lambda x, y: sliced_wasserstein2(x, y, key=jr.key(7)))
    expected = distance(X, y)
    assert_trees_close(distance(jr.permutation(jr.key(8), X), y), expected)
    assert_trees_close(distance(y, X), expected)
    assert_trees_close(distance(-3 * X, -3 * y), 3 * expected)
    assert_trees_close(distance(X + SHIFT, y + SHIFT), expected)
    assert float(distance(X, jr.permutation(jr.key(8), X))) == 0


# --- Fréchet distance ---


def with_moments(key, n, mean, root):
    """n rows whose sample mean is `mean` and whose sample covariance is `root^T root`."""
    x = np.asarray(jr.normal(key, (n, len(mean))), np.float64)
    white = np.linalg.qr(x - x.mean(axis=0))[0] * (n - 1) ** 0.5
    return jnp.asarray(white @ root + mean)


def test_the_frechet_distance_is_scipys(x64):
    x = jr.normal(jr.key(9), (40, 7)) @ jr.normal(jr.key(10), (7, 7))
    y = 0.4 + jr.normal(jr.key(11), (55, 7)) @ jr.normal(jr.key(12), (7, 7))
    s_x, s_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s_x @ s_y).real
    expected = np.sum((np.mean(x, 0) - np.mean(y, 0)) ** 2) + np.trace(s_x + s_y - 2 * root)
    assert_trees_close(frechet_distance(x, y), jnp.asarray(expected), rtol=1e-10)


def test_commuting_covariances_have_a_closed_form():
    means, stds = (
        np.asarray([[0.5, 1.0, -2.0], [0.0, 0.0, 1.0]]),
        np.asarray([[1.0, 2.0, 0.3], [4.0, 0.0, 0.3]]),
    )
    rotation = np.linalg.qr(np.asarray(jr.normal(jr.key(13), (3, 3)), np.float64))[0]
    x, y = (with_moments(jr.key(14 + i), 30 + i, means[i], np.diag(stds[i]) @ rotation) for i in range(2))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((stds[0] - stds[1]) ** 2)
    assert_trees_close(frechet_distance(x, y), jnp.asarray(expected, jnp.float32))
    assert_trees_close(frechet_distance(y, x), jnp.asarray(expected, jnp.float32))


def test_equal_sets_have_no_frechet_distance():
    """In single precision, and with standard deviations from 1 down to 1e-4."""
    x = jr.normal(jr.key(16), (200, 20)) * jnp.geomspace(1.0, 1e-4, 20)[None]
    assert float(frechet_distance(x, jr.permutation(jr.key(17), x))) < 1e-5


def test_too_few_examples_are_named():
    with pytest.raises(ValueError, match="4 and 9 examples are too few for the covariance of 4"):
        frechet_distance(jnp.zeros((4, 4)), jnp.zeros((9, 4)))


def test_the_frechet_distance_compiles():
    x, y = X.reshape(33, -1), Y.reshape(24, -1)
    assert_trees_close(jax.jit(frechet_distance)(x, y), frechet_distance(x, y))


# --- Features ---


def test_features_are_what_the_last_layer_sees():
    classifier = FeatureClassifier(MLP((6,), 4, (8, 5), "silu", key=jr.key(19)), "ours")
    features = classifier.features(X[0])
    assert features.shape == (5,) and classifier.name == "ours"
    assert_trees_close(classifier(X[0]), classifier.mlp(X[0].ravel()))
    assert_trees_close(classifier.mlp.layers[-1](features), classifier(X[0]))


def accuracy(classifier, x, labels):
    return float(jnp.mean(jnp.argmax(jax.jit(jax.vmap(classifier))(x), axis=1) == labels))


def test_a_classifier_learns_blobs_and_says_whose_features_it_has():
    labels = jnp.arange(90) % 3
    x = jnp.eye(3)[labels].reshape(90, 1, 3) + 0.1 * jr.normal(jr.key(20), (90, 1, 3))
    fit = lambda **kwargs: fit_classifier(x, labels, num_classes=3, hidden=(8, 4), key=jr.key(21), **kwargs)
    classifier = fit(steps=300, learning_rate=1e-2)
    assert accuracy(classifier, x, labels) == 1
    assert classifier.name == "MLP 3-8-4-3 trained on 90 examples"
    assert eqx.filter_eval_shape(lambda: fit(name="blobs")).name == "blobs"


@pytest.mark.slow
def test_a_classifier_of_digits_is_right_in_97_of_100():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    x = jnp.asarray(digits.data[order] / 8 - 1, jnp.float32)
    labels = jnp.asarray(digits.target[order])
    classifier = fit_classifier(x[:1437], labels[:1437], num_classes=10, key=jr.key(22))
    assert accuracy(classifier, x[1437:], labels[1437:]) >= 0.97
    features = jax.jit(jax.vmap(classifier.features))
    assert features(x).shape == (1797, 32)
    # Digits are nearer to other digits than to digits upside down.
    distance = lambda images: float(frechet_distance(features(images)[::2], features(x)[1::2]))
    assert distance(x[:, ::-1]) > 5 * distance(x)
