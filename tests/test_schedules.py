"""Laws of noise schedules: derivatives, the SDE, the inverse, float32 accuracy, published values."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.schedules import Geometric, Karras, LinearFlow, VPCosine, VPLinear
from helpers import assert_trees_close


# Each with the last time at which all its quantities are finite and nothing stands still.
SCHEDULES = {
    "vp_linear": (VPLinear(), 1.0),
    "vp_constant": (VPLinear(beta_min=5.0, beta_max=5.0), 1.0),
    "vp_cosine": (VPCosine(), 0.994),
    "geometric": (Geometric(), 1.0),
    "karras": (Karras(), 1.0),
    "linear_flow": (LinearFlow(), 0.999),
}
every_schedule = pytest.mark.parametrize("schedule, t_end", SCHEDULES.values(), ids=SCHEDULES)
vp_schedules = pytest.mark.parametrize("name", ["vp_linear", "vp_constant", "vp_cosine"])


def grid(t_end, dtype=None):
    return jnp.linspace(1e-3, t_end, 50, dtype=dtype)


def over(f, ts):
    """`f` at every time, in one compilation."""
    return jax.jit(jax.vmap(f))(ts)


@every_schedule
def test_derivatives_match_finite_differences(schedule, t_end, x64):
    h, ts = 1e-6, grid(t_end)[:-1]
    for f, df in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        difference = (over(f, ts + h) - over(f, ts - h)) / (2 * h)
        # Central differences in float64: h^2 f''' / 6 is 1e-6 of f' where sigma ~ sqrt(t), at t = 1e-3.
        assert_trees_close(over(df, ts), difference, rtol=1e-6, atol=1e-6)


@vp_schedules
def test_variance_is_preserved(name, x64):
    schedule, t_end = SCHEDULES[name]
    ts = grid(t_end)
    total = over(lambda t: schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, ts)
    assert_trees_close(total, jnp.ones_like(ts), rtol=0, atol=1e-12)


@every_schedule
def test_log_snr_falls(schedule, t_end):
    log_snr = over(schedule.log_snr, grid(t_end))
    assert jnp.all(jnp.isfinite(log_snr)) and jnp.all(jnp.diff(log_snr) < 0)
    ratio = over(lambda t: schedule.alpha(t) / schedule.sigma(t), grid(t_end))
    assert_trees_close(jnp.exp(log_snr / 2), ratio, rtol=1e-5)


@every_schedule
def test_time_of_log_snr_is_the_inverse(schedule, t_end, x64):
    round_trip = lambda t: schedule.time_of_log_snr(schedule.log_snr(t))
    for dtype, atol in ((jnp.float64, 1e-12), (jnp.float32, 1e-6)):
        ts = grid(t_end, dtype)
        assert_trees_close(over(round_trip, ts), ts, rtol=0, atol=atol)


@every_schedule
def test_diffusion_is_the_rate_of_the_log_snr(schedule, t_end, x64):
    """g^2 = -sigma^2 d log-SNR / dt (Kingma et al., 2021), which does not go through f."""
    expected = over(lambda t: -(schedule.sigma(t) ** 2) * jax.grad(schedule.log_snr)(t), grid(t_end))
    assert_trees_close(over(schedule.diffusion_squared, grid(t_end)), expected, rtol=1e-10)


def test_sde_coefficients_in_closed_form(x64):
    rate = np.pi / 2 / 1.008
    closed_forms = [
        (VPLinear(), lambda t: -(0.1 + 19.9 * t) / 2, lambda t: 0.1 + 19.9 * t),
        (
            VPCosine(),
            lambda t: -rate * np.tan(rate * (t + 0.008)),
            lambda t: 2 * rate * np.tan(rate * (t + 0.008)),
        ),
        (Geometric(), lambda t: 0 * t, lambda t: 2 * np.log(5000) * (0.01 * 5000**t) ** 2),
        (Karras(rho=1.0), lambda t: 0 * t, lambda t: 2 * 79.998 * (0.002 + 79.998 * t)),
        (LinearFlow(), lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)),
    ]
    ts = jnp.linspace(0.01, 0.99, 9)
    for schedule, drift, diffusion_squared in closed_forms:
        assert_trees_close(over(schedule.drift, ts), jnp.array(drift(np.array(ts))), rtol=1e-10)
        found = over(schedule.diffusion_squared, ts)
        assert_trees_close(found, jnp.array(diffusion_squared(np.array(ts))), rtol=1e-10)
    assert_trees_close(VPLinear().beta(0.3), VPLinear().diffusion_squared(0.3), rtol=1e-10)


@every_schedule
def test_single_precision_is_enough(schedule, t_end, x64):
    """Every quantity in float32 agrees with float64 from t = 1e-3 on, and stays float32 under x64."""
    quantities = lambda t: dict(
        alpha=schedule.alpha(t),
        sigma=schedule.sigma(t),
        log_snr=schedule.log_snr(t),
        drift=schedule.drift(t),
        diffusion_squared=schedule.diffusion_squared(t),
        d_alpha=schedule.d_alpha(t),
        d_sigma=schedule.d_sigma(t),
    )
    ts = grid(t_end, jnp.float32)
    single, double = over(quantities, ts), over(quantities, ts.astype(jnp.float64))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(single))
    # The log-SNR crosses zero, so its error there is absolute: a few roundings of terms of order 10.
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), double)
    assert_trees_close(single, rounded, rtol=1e-5, atol=3e-6)


def test_values_of_the_som_paper(x64):
    """(t, alpha, sigma / alpha) of the VP schedule with beta from 0.1 to 20."""
    table = [
        (0.01, "0.999", "0.045"),
        (0.05, "0.985", "0.174"),
        (0.1, "0.947", "0.340"),
        (0.2, "0.811", "0.720"),
        (0.3, "0.630", "1.23"),
        (0.5, "0.281", "3.41"),
        (0.7, "0.084", "11.8"),
        (1.0, "0.0066", "152"),
    ]
    schedule = VPLinear()
    for t, alpha, ratio in table:
        for value, printed in ((schedule.alpha(t), alpha), (schedule.sigma(t) / schedule.alpha(t), ratio)):
            half_a_digit = 0.5 * 10.0 ** -len(printed.partition(".")[2])
            assert abs(value - float(printed)) <= half_a_digit
    assert abs(schedule.alpha(1.0) - 0.006572) < 1e-6


def test_cosine_values_of_a_ten_step_policy():
    """alpha on linspace(1e-3, 1, 10), the last time taken as 0.9946 (four digits)."""
    alpha = [1.0, 0.9826, 0.9360, 0.8614, 0.7611, 0.6380, 0.4960, 0.3391, 0.1721, 0.0084]
    np.testing.assert_allclose(jax.vmap(VPCosine().alpha)(jnp.linspace(1e-3, 1, 10)), alpha, atol=6e-5)


def test_karras_levels_are_those_of_edm(x64):
    """Karras et al. (2022), eq. 5, with N = 18 levels."""
    i, low, high = np.arange(18), 0.002 ** (1 / 7), 80 ** (1 / 7)
    levels = (high + i / 17 * (low - high)) ** 7
    found = jax.vmap(Karras().sigma)(jnp.linspace(1, 0, 18))
    assert_trees_close(found, jnp.array(levels), rtol=1e-10)


def test_cosine_stands_still_at_the_end():
    schedule = VPCosine()
    for t in (schedule.t_clip, 0.999, 1.0):
        assert schedule.alpha(t) == schedule.alpha(schedule.t_clip) > 0
        assert schedule.drift(t) == schedule.diffusion_squared(t) == 0
    assert jnp.isfinite(schedule.log_snr(1.0))


@every_schedule
def test_perturb_and_prior(schedule, t_end, getkey):
    x_0, eps = jr.normal(getkey(), (2, 3)), jr.normal(getkey(), (2, 3))
    expected = schedule.alpha(0.4) * x_0 + schedule.sigma(0.4) * eps
    assert_trees_close(schedule.perturb(x_0, eps, 0.4), expected)
    assert schedule.prior_std == schedule.sigma(1.0)


@every_schedule
def test_times_may_be_python_numbers(schedule, t_end):
    for f in (schedule.alpha, schedule.sigma, schedule.d_alpha, schedule.d_sigma):
        assert_trees_close(f(1), f(jnp.array(1.0)))
