"""Laws of parameterizations: round trips, the derivative of the path, the score, published formulas."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from eqgen.parameterizations import convert, converted, from_x0_and_eps, to_x0_and_eps
from eqgen.schedules import Geometric, Karras, LinearFlow, VPCosine, VPLinear
from helpers import assert_trees_close


KINDS = ("x0", "eps", "v", "score", "velocity")
SCHEDULES = {
    "vp_linear": VPLinear(),
    "vp_cosine": VPCosine(),
    "geometric": Geometric(0.1, 5.0),
    "karras": Karras(0.1, 5.0),
    "linear_flow": LinearFlow(),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
TIMES = np.array([0.02, 0.3, 0.7, 0.98])


def pair(getkey):
    return jr.normal(getkey(), (4, 3)), jr.normal(getkey(), (4, 3))


@every_schedule
def test_every_kind_converts_to_every_other(schedule, getkey, x64):
    """`convert` takes the target of one kind to the target of another, for all 25 of them."""

    @jax.jit
    @jax.vmap
    def check(x_0, eps, t):
        x_t = schedule.perturb(x_0, eps, t)
        truth = {kind: from_x0_and_eps(x_0, eps, t, schedule, kind=kind) for kind in KINDS}
        args = lambda source: (truth[source], x_t, t, schedule)
        pairs = {s: to_x0_and_eps(*args(s), kind=s) for s in KINDS}
        found = {s: {k: convert(*args(s), source=s, target=k) for k in KINDS} for s in KINDS}
        return pairs, {s: (x_0, eps) for s in KINDS}, found, {s: truth for s in KINDS}

    pairs, true_pairs, found, truth = check(*pair(getkey), TIMES)
    assert_trees_close(pairs, true_pairs, rtol=1e-10, atol=1e-10)
    assert_trees_close(found, truth, rtol=1e-10, atol=1e-10)


@every_schedule
def test_velocity_is_the_derivative_of_the_path(schedule, getkey, x64):
    h, (x_0, eps) = 1e-5, pair(getkey)
    path = jax.vmap(schedule.perturb)
    velocity = jax.vmap(lambda x_0, eps, t: from_x0_and_eps(x_0, eps, t, schedule, kind="velocity"))
    difference = (path(x_0, eps, TIMES + h) - path(x_0, eps, TIMES - h)) / (2 * h)
    # h^2 times the third derivative, which is of order 100 at most at these times.
    assert_trees_close(velocity(x_0, eps, TIMES), difference, rtol=1e-6, atol=1e-6)


@every_schedule
def test_score_is_the_gradient_of_the_log_density(schedule, getkey, x64):
    x_0, eps = pair(getkey)

    def check(x_0, eps, t):
        mean, std = schedule.alpha(t) * x_0, schedule.sigma(t)
        log_density = lambda x: jax.scipy.stats.norm.logpdf(x, mean, std).sum()
        gradient = jax.grad(log_density)(schedule.perturb(x_0, eps, t))
        return from_x0_and_eps(x_0, eps, t, schedule, kind="score"), gradient

    assert_trees_close(*jax.vmap(check)(x_0, eps, TIMES), rtol=1e-10)


@every_schedule
def test_velocity_is_the_drift_of_the_probability_flow(schedule, getkey, x64):
    """f x - g^2 score / 2 (Song et al., 2021, eq. 13), for any score."""
    x, score = pair(getkey)

    def check(x, score, t):
        expected = schedule.drift(t) * x - schedule.diffusion_squared(t) * score / 2
        return convert(score, x, t, schedule, source="score", target="velocity"), expected

    assert_trees_close(*jax.vmap(check)(x, score, TIMES), rtol=1e-10, atol=1e-10)


def test_v_of_salimans_and_ho(getkey, x64):
    """x_0 = alpha x - sigma v and eps = sigma x + alpha v, for a variance-preserving schedule."""
    schedule, (x, v) = VPCosine(), pair(getkey)

    def check(x, v, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return to_x0_and_eps(v, x, t, schedule, kind="v"), (alpha * x - sigma * v, sigma * x + alpha * v)

    assert_trees_close(*jax.vmap(check)(x, v, TIMES), rtol=1e-10, atol=1e-10)


def test_vp_velocity_in_posterior_mean_form(getkey, x64):
    """v = beta mu (mu a - a_mean) / (2 sigma^2), the form of SOM that does not cancel."""
    schedule, (a, mean) = VPLinear(), pair(getkey)

    def check(a, mean, t):
        mu, sigma = schedule.alpha(t), schedule.sigma(t)
        expected = schedule.beta(t) * mu / (2 * sigma**2) * (mu * a - mean)
        return convert(mean, a, t, schedule, source="x0", target="velocity"), expected

    assert_trees_close(*jax.vmap(check)(a, mean, TIMES), rtol=1e-12, atol=1e-12)


def test_velocity_from_x0_keeps_single_precision(getkey, x64):
    """Near t = 1 the terms of f x - g^2 score / 2 are 150 times their difference; by x0 nothing is lost."""
    schedule, (x, mean) = VPLinear(), pair(getkey)

    @jax.jit
    @jax.vmap
    def velocities(x, mean, t):
        score = convert(mean, x, t, schedule, source="x0", target="score")
        naive = schedule.drift(t) * x - schedule.diffusion_squared(t) * score / 2
        return convert(mean, x, t, schedule, source="x0", target="velocity"), naive

    single = [a.astype(jnp.float32) for a in (x, mean, jnp.linspace(0.97, 1.0, 4))]
    truth, _ = velocities(*(a.astype(jnp.float64) for a in single))
    error, naive_error = (jnp.max(jnp.abs(v - truth)) / jnp.max(jnp.abs(truth)) for v in velocities(*single))
    assert error < 5e-7 and naive_error > 10 * error


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_differentiate_in_time(kind, getkey, x64):
    """The jvp of a conversion, x_t and t moving together, against a finite difference."""
    schedule, (prediction, x) = VPLinear(), (p[0] for p in pair(getkey))
    f = lambda x, t: convert(prediction, x, t, schedule, source=kind, target="velocity")
    t, h, dx = 0.4, 1e-6, jnp.array([1.0, -2.0, 0.5])
    found = jax.jvp(f, (x, jnp.array(t)), (dx, jnp.array(1.0)))[1]
    difference = (f(x + h * dx, t + h) - f(x - h * dx, t - h)) / (2 * h)
    assert_trees_close(found, difference, rtol=1e-6, atol=1e-6)


def test_converted_wraps_a_network(getkey):
    schedule, (x, _) = VPLinear(), (p[0] for p in pair(getkey))
    network = lambda x, t: t * x
    denoise = converted(network, schedule, source="eps", target="x0")
    expected = (x - schedule.sigma(0.3) * 0.3 * x) / schedule.alpha(0.3)
    assert_trees_close(denoise(x, 0.3), expected)


def test_unknown_kinds_are_named():
    x, schedule = jnp.zeros(2), VPLinear()
    with pytest.raises((ValueError, TypeCheckError), match="noise"):
        to_x0_and_eps(x, x, 0.5, schedule, kind="noise")
    with pytest.raises((ValueError, TypeCheckError), match="noise"):
        from_x0_and_eps(x, x, 0.5, schedule, kind="noise")
