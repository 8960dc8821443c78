"""Laws of Langevin samplers: discrete stationary laws, ladders, coverage of modes, detailed balance, boxes."""

import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest

from eqgen.samplers import (
    annealed_langevin,
    annealed_step_sizes,
    clip_to_box,
    geometric_levels,
    langevin,
    mala,
    reflect_into_box,
)
from eqgen.scores import GaussianMixture
from helpers import assert_trees_close


# Many chains are either mapped over keys or, where the score acts entry by entry, one example of that shape.
def final(sample):
    """The last states of the chains `sample(key)`, over keys."""
    return jax.jit(jax.vmap(lambda key: sample(key)[0]))


def moments(log_density, low, high):
    """Mean, variance and fourth central moment of exp(log_density) on [low, high], by quadrature."""
    x = np.linspace(low, high, 100_001)
    log_p = np.asarray(log_density(x))
    p = np.exp(log_p - log_p.max())
    average = lambda values: np.trapezoid(p * values, x) / np.trapezoid(p, x)
    mean = average(x)
    return mean, average((x - mean) ** 2), average((x - mean) ** 4)


# --- Ladders ---


def test_ladder(x64):
    """The defaults of NC-LQL: its table of noise levels, to the digits printed."""
    sigmas = geometric_levels(10, 0.1, 0.001)
    etas = annealed_step_sizes(sigmas, 1e-4)
    assert sigmas[0] == 0.1 and sigmas[-1] == 0.001
    assert_trees_close(sigmas[1:] / sigmas[:-1], jnp.full(9, 0.01 ** (1 / 9)), rtol=1e-12)
    assert_trees_close((etas[0], etas[-1]), (jnp.array(1.0), jnp.array(1e-4)), rtol=1e-12)
    table = [0.1, 0.0599, 0.0359, 0.0215, 0.0129, 0.00774, 0.00464, 0.00278, 0.00167, 0.001]
    np.testing.assert_allclose(sigmas, table, rtol=5e-3)  # three printed digits
    table = [1, 0.359, 0.129, 0.0464, 0.0167, 5.99e-3, 2.15e-3, 7.74e-4, 2.78e-4, 1e-4]
    np.testing.assert_allclose(etas, table, rtol=5e-3)


# --- Unadjusted Langevin ---


@pytest.mark.parametrize("w, curvature, eta", [(10, 5, 0.01), (50, 4, 0.002), (1, 2, 0.5)])
def test_stationary_law_of_a_quadratic(w, curvature, eta, getkey):
    """N(mu, 1 / (c (1 - eta c/4))) with c = w curvature, exactly; 1 / c it is not."""
    n, mu, c = 100_000, 0.3, w * curvature
    score = lambda x: w * curvature * (mu - x)
    sample = lambda key: langevin(score, jnp.full(n, mu), jnp.full(60, eta), key=key)[0]
    x = jax.jit(sample)(getkey())
    variance = 1 / (c * (1 - eta * c / 4))
    # 4.5 standard errors. What is left of the start after 60 steps is below (3/4)^120.
    assert abs(x.mean() - mu) < 4.5 * np.sqrt(variance / n)
    assert abs(x.var() / variance - 1) < 4.5 * np.sqrt(2 / n) < 0.03
    assert x.var() > 1.1 / c


@pytest.mark.parametrize("dim, n", [(1, 50_000), (3, 15_000)])
@pytest.mark.slow
def test_normalised_gradients_sample_an_exponential_of_the_distance(dim, n, getkey):
    """The score w grad Q / |grad Q| of a quadratic samples exp(-w |a - mu|), whatever the curvature.

    So E|a - mu| = d / w and each variance is (d + 1) / w^2.
    """
    w, mu = 10.0, 0.2

    def score(a):
        gradient = 7 * (mu - a)
        return w * gradient / (jnp.linalg.norm(gradient, axis=-1, keepdims=True) + 1e-8)

    sample = lambda key: langevin(score, jnp.full((n, dim), mu), jnp.full(5000, 1e-4), key=key)[0]
    a = jax.jit(sample)(getkey()) - mu
    # 4.5 standard errors of the variance are 4.5 %; the step rounds the tip of the density off by about 1 %.
    assert abs(jnp.linalg.norm(a, axis=-1).mean() * w / dim - 1) < 0.05
    assert abs((a**2).mean() * w**2 / (dim + 1) - 1) < 0.05


def test_scan_equals_a_loop(getkey, x64):
    """`steps_per_level` steps at every level, each with its entry of every array of `levels`, in NumPy."""
    x, key = jr.normal(getkey(), (2, 3)), getkey()
    levels = {"pull": jnp.array([0.5, 1.0, 4.0]), "centre": jr.normal(getkey(), (3, 2, 3))}
    step_sizes = jnp.array([0.8, 0.4, 0.1])
    score = lambda x, level: level["pull"] * (level["centre"] - x)
    result = annealed_langevin(
        score, x, levels, step_sizes, steps_per_level=2, project=clip_to_box(-0.9, 0.7), key=key
    )
    keys, expected = jr.split(key, 6), [np.asarray(x)]
    for i in range(6):
        eta, z, x = float(step_sizes[i // 2]), np.asarray(jr.normal(keys[i], x.shape)), expected[-1]
        drift = np.asarray(levels["pull"][i // 2]) * (np.asarray(levels["centre"][i // 2]) - x)
        expected.append(np.clip(x + eta / 2 * drift + np.sqrt(eta) * z, -0.9, 0.7))
    expected = jnp.array(expected)
    assert_trees_close(result, (expected[-1], expected), rtol=1e-12, atol=1e-12)


SAMPLERS = {
    "langevin": lambda x, etas, key: langevin(lambda x: -x, x, etas, key=key),
    "annealed": lambda x, etas, key: annealed_langevin(lambda x, sigma: -x / sigma, x, etas, etas, key=key),
    "mala": lambda x, etas, key: mala(lambda x: -jnp.sum(x**2) / 2, x, etas, key=key),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


@every_sampler
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_form_of_the_result(sampler, shape, getkey):
    """The path, from start to sample; determinism; jit with traced step sizes; another key, another path."""
    x, etas, key = jr.normal(getkey(), shape), jnp.full(5, 0.1), getkey()
    jitted = jax.jit(sampler)
    last, path = jitted(x, etas, key)
    assert path.shape == (6, *shape) and path.dtype == x.dtype
    assert_trees_close((path[0], path[-1]), (x, last), rtol=0, atol=0)
    assert_trees_close(jitted(x, etas, key), (last, path), rtol=0, atol=0)
    assert_trees_close(sampler(x, etas, key), (last, path))
    assert not jnp.any(jitted(x, etas, getkey())[0] == last)


@every_sampler
def test_examples_do_not_interact(sampler, getkey):
    """Permuting examples and keys permutes the result, to the last bit."""
    x, keys, order = jr.normal(getkey(), (8, 3)), jr.split(getkey(), 8), jr.permutation(getkey(), 8)
    mapped = jax.jit(jax.vmap(lambda x, key: sampler(x, jnp.full(20, 0.1), key)))
    expected = jax.tree.map(lambda leaf: leaf[order], mapped(x, keys))
    assert_trees_close(mapped(x[order], keys[order]), expected, rtol=0, atol=0)


# --- Coverage of modes ---

MODES = np.array([[0.5, 0.5], [0.5, -0.5], [-0.5, 0.5], [-0.5, -0.5]])
EQUAL, UNEQUAL = [0.25] * 4, [0.55, 0.25, 0.15, 0.05]
SIGMAS = geometric_levels(10, 0.6, 0.02)
STEP_SIZES = annealed_step_sizes(SIGMAS, 0.3 * 0.02**2)
CHAINS = 4000


def coverage(samples, std, weights):
    """The share within 3 std of a mode and, among these, entropy / ln 4 and total variation to the weights."""
    distances = np.linalg.norm(np.asarray(samples)[:, None] - MODES, axis=-1)
    in_mode = distances.min(axis=1) < 3 * std
    shares = np.bincount(distances.argmin(axis=1)[in_mode], minlength=4) / in_mode.sum()
    entropy = -np.sum(shares[shares > 0] * np.log(shares[shares > 0])) / np.log(4)
    return in_mode.mean(), entropy, np.abs(shares - weights).sum() / 2


def std_within(samples):
    """The root mean square deviation from the nearest mode, per coordinate."""
    distances = np.linalg.norm(np.asarray(samples)[:, None] - MODES, axis=-1)
    return np.sqrt(np.mean(distances.min(axis=1) ** 2) / 2)


def smoothed_score(std, weights):
    """The score of the mixture after noise `sigma`: w grad Q of Q = (1/w) log p, smoothed exactly."""
    mixture = GaussianMixture(MODES, np.full(4, std), np.array(weights))
    return lambda x, sigma: mixture.perturbed(1.0, sigma).score(x)


def annealed(score, steps_per_level):
    """From one of the modes, through the ladder."""
    start, options = jnp.array(MODES[0], jnp.float32), dict(steps_per_level=steps_per_level)
    return final(lambda key: annealed_langevin(score, start, SIGMAS, STEP_SIZES, key=key, **options))


def reference(score, w=500.0):
    """Normalised gradients with the published ladder and w, from uniform actions: the sampler of NC-LQL."""
    sigmas = geometric_levels(10, 0.1, 0.001)

    def normalised(a, sigma):
        gradient = score(a, sigma)
        return w * gradient / (jnp.linalg.norm(gradient) + 1e-8)

    def sample(key):
        start_key, key = jr.split(key)
        a = jr.uniform(start_key, (2,), minval=-1, maxval=1)
        options = dict(steps_per_level=2, project=clip_to_box(), key=key)
        return annealed_langevin(normalised, a, sigmas, annealed_step_sizes(sigmas, 1e-4), **options)

    return final(sample)


def test_annealing_leaves_the_mode_it_starts_in(getkey):
    """Plain Langevin stays in the mode for as many steps of the last size; annealed Langevin finds all four."""
    std, keys = 0.05, jr.split(getkey(), CHAINS)
    score = smoothed_score(std, EQUAL)
    start, etas = jnp.array(MODES[0], jnp.float32), jnp.full(500, STEP_SIZES[-1])
    plain = final(lambda key: langevin(lambda x: score(x, 0.0), start, etas, key=key))(keys)
    in_mode, plain_entropy, distance = coverage(plain, std, EQUAL)
    assert in_mode > 0.95 and plain_entropy == 0 and distance == 0.75
    in_mode, entropy, distance = coverage(annealed(score, 50)(keys), std, EQUAL)
    assert entropy > 0.98 and entropy - plain_entropy > 0.9
    # 4.5 standard errors of the shares, summed.
    assert distance < 4.5 * np.sqrt(0.25 * 0.75 / CHAINS) * 2
    # The last level has the noise sigma = 0.02 in it.
    expected = 1 - np.exp(-((3 * std) ** 2) / (2 * (std**2 + 0.02**2)))
    assert abs(in_mode - expected) < 0.01
    # Two steps a level are too few to get everywhere.
    assert coverage(annealed(score, 2)(keys), std, EQUAL)[1] < 0.9


def test_annealing_keeps_the_weights_of_the_modes_and_normalising_does_not(getkey):
    std, score, keys = 0.05, smoothed_score(0.05, UNEQUAL), jr.split(getkey(), CHAINS)
    # What 500 steps and the coarse levels' step sizes leave.
    assert coverage(annealed(score, 50)(keys), std, UNEQUAL)[2] < 0.06
    in_mode, entropy, distance = coverage(reference(score)(keys), std, UNEQUAL)
    assert in_mode > 0.99 and distance > 0.2
    # It visits the modes equally often: their basins have equal area.
    assert entropy > 0.98


@pytest.mark.parametrize("std", [0.03, 0.05])
def test_spread_within_a_mode(std, getkey):
    """Of the last level's density, at its step size; with normalised gradients it does not know the density."""
    keys, score = jr.split(getkey(), CHAINS), smoothed_score(std, EQUAL)
    smoothed = std**2 + float(SIGMAS[-1]) ** 2
    expected = np.sqrt(smoothed / (1 - float(STEP_SIZES[-1]) / smoothed / 4))
    # 4.5 standard errors of a standard deviation from 2 x 4000 numbers.
    assert abs(std_within(annealed(score, 50)(keys)) / expected - 1) < 4.5 / np.sqrt(2 * 2 * CHAINS)
    assert abs(std_within(reference(score)(keys)) - 0.015) < 0.001


# --- Metropolis-adjusted Langevin ---


def log_gamma_density(x):
    """The logarithm of a Gamma(2) variable: skewed, and its gradient is not Lipschitz."""
    return 2 * x - jnp.exp(x)


def test_mala_is_exact_where_langevin_is_biased(getkey):
    n, etas = 20_000, jnp.full(100, 0.5)
    mean, variance, fourth = moments(log_gamma_density, -15.0, 8.0)
    mean_error = 4.5 * np.sqrt(variance / n)
    variance_error = 4.5 * np.sqrt((fourth - variance**2) / n)
    keys, start = jr.split(getkey(), n), jnp.array(0.5)
    x = final(lambda key: mala(log_gamma_density, start, etas, key=key))(keys)
    assert abs(x.mean() - mean) < mean_error
    assert abs(x.var() - variance) < variance_error
    x = final(lambda key: langevin(jax.grad(log_gamma_density), start, etas, key=key))(keys)
    assert abs(x.mean() - mean) > 3 * mean_error
    assert abs(x.var() - variance) > 3 * variance_error


def test_rejections_vanish_as_the_step_size_to_the_three_halves(getkey):
    """From exact samples; the rate is read off the path."""
    etas = np.array([0.1, 0.05, 0.025])

    @jax.jit
    @jax.vmap
    def accepted(key):
        start_key, key = jr.split(key)
        x = jnp.log(jr.gamma(start_key, 2.0))
        paths = [mala(log_gamma_density, x, jnp.full(50, eta), key=key)[1] for eta in etas]
        return jnp.array([jnp.mean(path[1:] != path[:-1]) for path in paths])

    rejected = 1 - np.asarray(accepted(jr.split(getkey(), 20_000)).mean(axis=0))
    slope = np.polyfit(np.log(etas), np.log(rejected), 1)[0]
    # The smallest rate rests on about 1000 rejections, and the next order of the step size is there, too.
    assert abs(slope - 1.5) < 0.1
    assert rejected[-1] < 2e-3


@pytest.mark.parametrize("box", [None, (-1.0, 1.0)])
def test_mala_equals_metropolis_hastings_written_out(box, getkey, x64):
    """Every step against NumPy, with the densities of target and proposals in full."""
    log_density = lambda x: -(x[0] ** 2) / 2 - 2 * (x[1] - x[0] ** 2) ** 2
    num_steps, key = 80, getkey()
    etas = jnp.linspace(0.02, 0.6, num_steps)
    x = jnp.array([0.4, -0.3])
    _, path = jax.jit(lambda x, key: mala(log_density, x, etas, box=box, key=key))(x, key)

    def gradient(x):
        excess = x[1] - x[0] ** 2
        return np.array([-x[0] + 8 * x[0] * excess, -4 * excess])

    def proposal_density(to, x, eta):
        deviation = to - x - eta / 2 * gradient(x)
        return np.exp(-deviation @ deviation / (2 * eta)) / (2 * np.pi * eta)

    density = lambda x: np.exp(log_density(x)) * (box is None or np.all(np.abs(x) <= 1))
    x, accepted = np.asarray(x), []
    for i, step_key in enumerate(jr.split(key, num_steps)):
        noise_key, accept_key = jr.split(step_key)
        eta = float(etas[i])
        y = x + eta / 2 * gradient(x) + np.sqrt(eta) * np.asarray(jr.normal(noise_key, (2,)))
        forward, backward = proposal_density(y, x, eta), proposal_density(x, y, eta)
        accepted.append(jr.uniform(accept_key) < density(y) * backward / (density(x) * forward))
        x = y if accepted[-1] else x
        np.testing.assert_allclose(path[i + 1], x, rtol=1e-10, atol=1e-10)
    assert 10 < sum(accepted) < num_steps - 10
    np.testing.assert_array_equal(np.any(path[1:] != path[:-1], axis=-1), accepted)


def test_mala_in_a_box(getkey):
    """The density restricted to it: moments by quadrature, and no state outside."""
    n, etas, box = 20_000, jnp.full(100, 0.3), (-0.4, 1.1)
    mean, variance, fourth = moments(log_gamma_density, *box)
    run = jax.jit(jax.vmap(lambda key: mala(log_gamma_density, jnp.array(1.0), etas, box=box, key=key)))
    x, path = run(jr.split(getkey(), n))
    assert abs(x.mean() - mean) < 4.5 * np.sqrt(variance / n)
    assert abs(x.var() - variance) < 4.5 * np.sqrt((fourth - variance**2) / n)
    assert path.min() >= box[0] and path.max() <= box[1]


def test_mala_stays_where_the_density_exists(getkey):
    """Beta(3, 2), whose logarithm is NaN outside [0, 1]: the same with the box and without."""
    n, etas = 20_000, jnp.full(100, 0.05)
    log_density = lambda x: 2 * jnp.log(x) + jnp.log(1 - x)
    keys = jr.split(getkey(), n)
    x = final(lambda key: mala(log_density, jnp.array(0.5), etas, key=key))(keys)
    assert abs(x.mean() - 3 / 5) < 4.5 * np.sqrt(0.04 / n)
    boxed = final(lambda key: mala(log_density, jnp.array(0.5), etas, box=(0.0, 1.0), key=key))(keys)
    assert_trees_close(boxed, x, rtol=0, atol=0)


# --- Boxes ---


def reflected(x, low, high):
    """One reflection after the other, until the point is inside."""
    while not low <= x <= high:
        x = 2 * high - x if x > high else 2 * low - x
    return x


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.2, 0.7), (-3.0, -1.0)])
def test_reflection_is_right_at_any_distance(low, high, getkey, x64):
    x = jr.uniform(getkey(), (200,), minval=-20, maxval=20)
    expected = jnp.array([reflected(point, low, high) for point in x.tolist()])
    assert_trees_close(reflect_into_box(low, high)(x), expected, rtol=0, atol=1e-12)
    # Inside it changes no bit, and bounds may differ between coordinates.
    inside = jnp.clip((low + high) / 2 + 0.1 * jr.normal(getkey(), (200,)), low, high)
    assert_trees_close(reflect_into_box(low, high)(inside), inside, rtol=0, atol=0)
    bounds = np.linspace(low, low + 0.1, 200), np.linspace(high, high + 1, 200)
    expected = jnp.array([reflected(*triple) for triple in zip(x.tolist(), *bounds)])
    assert_trees_close(reflect_into_box(*bounds)(x), expected, rtol=0, atol=1e-12)


def test_reflection_never_leaves_the_box(getkey):
    """Nor by a rounding: the next numbers outside the bounds of boxes of all sizes."""
    centre, half = jr.normal(getkey(), (10_000,)), jnp.exp(3 * jr.normal(getkey(), (10_000,)))
    low, high = centre - half, centre + half
    for outside in (jnp.nextafter(low, -jnp.inf), jnp.nextafter(high, jnp.inf)):
        x = reflect_into_box(low, high)(outside)
        assert jnp.all((low <= x) & (x <= high))


def test_reflection_keeps_the_uniform_law_and_clipping_does_not(getkey):
    """With score 0 and steps as long as the box is wide."""
    n, bins = 100_000, 20
    start = jr.uniform(getkey(), (n,), minval=-1, maxval=1)

    def run(project):
        step_sizes = jnp.full(5, 2.0**2)
        return jax.jit(lambda key: langevin(jnp.zeros_like, start, step_sizes, project=project, key=key)[0])

    counts, _ = np.histogram(run(reflect_into_box())(getkey()), bins, range=(-1, 1))
    # The chi-squared statistic has mean bins - 1 and variance twice that.
    assert np.sum((counts - n / bins) ** 2) / (n / bins) < bins - 1 + 4.5 * np.sqrt(2 * (bins - 1))
    assert jnp.mean(jnp.abs(run(clip_to_box())(getkey())) == 1) > 0.5


def test_reflection_keeps_a_density_that_presses_on_a_face(getkey):
    """exp(3 x) on [-1, 1], against quadrature: reflected, the error is O(eta); clipped, O(sqrt(eta))."""
    n, eta = 100_000, 0.01
    mean, _, _ = moments(lambda x: 3 * x, -1.0, 1.0)
    start = jr.uniform(getkey(), (n,), minval=-1, maxval=1)

    def error(project):
        sample = lambda key: langevin(
            lambda x: jnp.full_like(x, 3), start, jnp.full(400, eta), project=project, key=key
        )
        return jnp.abs(jax.jit(sample)(getkey())[0].mean() - mean)

    # The standard error is 0.001. The ratio of these bounds is that of eta to sqrt(eta), to a factor of 2.
    assert error(reflect_into_box()) < 1.5 * eta
    assert error(clip_to_box()) > 0.4 * np.sqrt(eta)


# --- Bad input ---


@pytest.fixture
def unchecked():
    """The functions as they are outside tests, where no one checks shapes before they do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@every_sampler
@pytest.mark.parametrize(
    "step_sizes, message",
    [
        (jnp.ones((2, 2)), r"1-dimensional array.*\(2, 2\).*jnp.full"),
        (jnp.array(0.1), r"1-dimensional array.*\(\)"),
        (jnp.ones(0), r"1-dimensional array.*\(0,\)"),
        (jnp.array([0.1, 0.0]), r"positive, got \[0.1 *0"),
        (jnp.array([0.1, jnp.nan]), "positive, got.*nan"),
    ],
)
def test_bad_step_sizes_raise(sampler, step_sizes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        sampler(jnp.zeros(3), step_sizes, jr.key(0))


def test_bad_levels_raise(unchecked):
    args = lambda x, level: -x, jnp.zeros(3)
    for levels in (jnp.ones(3), {"a": jnp.ones(2), "b": jnp.ones((3, 2))}, [0.5, 0.1]):
        with pytest.raises(ValueError, match="levels must have one entry.*for 2 step sizes"):
            annealed_langevin(*args, levels, jnp.ones(2), key=jr.key(0))
    with pytest.raises(ValueError, match="steps_per_level must be at least 1, got 0"):
        annealed_langevin(*args, jnp.ones(2), jnp.ones(2), steps_per_level=0, key=jr.key(0))


def test_bad_ladders_raise():
    with pytest.raises(ValueError, match="num_levels must be at least 2.*got 1"):
        geometric_levels(1, 0.1, 0.001)
    for sigma_max, sigma_min in ((0.1, 0.0), (0.1, -0.1), (0.1, 0.2)):
        with pytest.raises(ValueError, match=f"sigma_max = {sigma_max} and sigma_min = {sigma_min}"):
            geometric_levels(10, sigma_max, sigma_min)
    with pytest.raises(ValueError, match="final_step_size must be positive, got 0"):
        annealed_step_sizes(jnp.ones(3), 0.0)
    with pytest.raises(ValueError, match="sigmas must be positive"):
        annealed_step_sizes(jnp.array([1.0, -1.0]), 1e-4)


def test_bad_boxes_raise():
    in_box = lambda low, high: mala(
        lambda x: 0 * x, jnp.zeros(()), jnp.ones(1), box=(low, high), key=jr.key(0)
    )
    for make in (clip_to_box, reflect_into_box, in_box):
        for low, high in ((1.0, -1.0), (0.5, 0.5)):
            with pytest.raises(
                ValueError, match=f"low must be below high, got low = {low} and high = {high}"
            ):
                make(low, high)
        with pytest.raises(ValueError, match="low must be below high"):
            make(jnp.zeros(2), jnp.array([1.0, 0.0]))
