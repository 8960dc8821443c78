"""Laws of samplers: orders of convergence, closed forms on Gaussian data, moments, identities among them."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from eqgen.parameterizations import converted
from eqgen.samplers import (
    ddim,
    ddpm,
    dpm_solver_pp_2m,
    euler,
    heun,
    karras_grid,
    log_snr_grid,
    meanflow,
    uniform_grid,
)
from eqgen.schedules import Geometric, Karras, LinearFlow, VPCosine, VPLinear
from helpers import assert_trees_close


SCHEDULES = {
    "vp_linear": VPLinear(),
    "karras": Karras(0.002, 20.0),
    "linear_flow": LinearFlow(),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)

MEAN, STD = 0.7, 0.4


def gaussian_denoiser(schedule, mean=MEAN, std=STD):
    """The posterior mean of x_0 ~ N(mean, std^2)."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return denoise


def gaussian_velocity(schedule):
    return converted(gaussian_denoiser(schedule), schedule, source="x0", target="velocity")


def gaussian_flow_map(schedule, x, t, r):
    """Where the probability flow of x_0 ~ N(MEAN, STD^2) takes x from time t to time r."""
    std = lambda t: jnp.sqrt(schedule.alpha(t) ** 2 * STD**2 + schedule.sigma(t) ** 2)
    return schedule.alpha(r) * MEAN + std(r) / std(t) * (x - schedule.alpha(t) * MEAN)


# One row per sampler, all with the same data: (sampler, order of its global error).
FLOW = LinearFlow()
DETERMINISTIC = {
    "ddim": (lambda x, ts, schedule: ddim(gaussian_denoiser(schedule), x, ts, schedule), 1),
    "euler": (lambda x, ts, schedule: euler(gaussian_velocity(schedule), x, ts), 1),
    "heun": (lambda x, ts, schedule: heun(gaussian_velocity(schedule), x, ts), 2),
    "dpm_solver_pp_2m": (
        lambda x, ts, schedule: dpm_solver_pp_2m(gaussian_denoiser(schedule), x, ts, schedule),
        2,
    ),
}
EVERY = {name: sampler for name, (sampler, _) in DETERMINISTIC.items()} | {
    "ddpm": lambda x, ts, schedule: ddpm(gaussian_denoiser(schedule), x, ts, schedule, key=jr.key(3)),
    "ddim_eta": lambda x, ts, schedule: ddim(
        gaussian_denoiser(schedule), x, ts, schedule, eta=0.5, key=jr.key(3)
    ),
    "meanflow": lambda x, ts, schedule: meanflow(lambda x, r, t: x * t + r, x, ts),
}
every_sampler = pytest.mark.parametrize("sampler", EVERY.values(), ids=EVERY)


@pytest.mark.parametrize("sampler, order", DETERMINISTIC.values(), ids=DETERMINISTIC)
def test_order_of_the_global_error(sampler, order, x64):
    """The slope of log error over log step, against the exact flow map."""
    schedule, x, errors, numbers = VPLinear(), jnp.array(1.3), [], [80, 160, 320]
    for num_steps in numbers:
        ts = log_snr_grid(num_steps, schedule, 0.9, 0.1)
        found, _ = jax.jit(lambda x, ts: sampler(x, ts, schedule))(x, ts)
        errors.append(abs(found - gaussian_flow_map(schedule, x, ts[0], ts[-1])))
    slope = -np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    # Finite steps: the next term of the error still moves the slope by a few per cent.
    assert abs(slope - order) < 0.06
    # And what they converge to is the flow map.
    assert errors[-1] < {1: 5e-3, 2: 2e-5}[order]


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@every_schedule
def test_point_mass_is_exact_at_every_eta(schedule, eta, getkey):
    """If x_0 is known, x_t ~ N(alpha x_0, sigma^2) at every time of any grid, whatever eta.

    Between neighbours of the grid the correlation is 1 for eta = 0, that of the forward process for eta = 1.
    """
    n, ts = 4000, jnp.array([0.98, 0.6, 0.25, 0.1])

    @jax.jit
    @jax.vmap
    def standardised(z, key):
        alpha, sigma = jax.vmap(schedule.alpha)(ts), jax.vmap(schedule.sigma)(ts)
        denoise = lambda x, t: jnp.full_like(x, MEAN)
        _, path = ddim(denoise, alpha[0] * MEAN + sigma[0] * z, ts, schedule, eta=eta, key=key)
        return (path - alpha * MEAN) / sigma, alpha / sigma

    z, ratio = standardised(jr.normal(getkey(), (n,)), jr.split(getkey(), n))
    forward = ratio[0, :-1] / ratio[0, 1:]
    # 4.5 standard errors of a mean of n, of a variance and of a product of unit normals.
    assert jnp.max(jnp.abs(z.mean(0))) < 4.5 / np.sqrt(n)
    assert jnp.max(jnp.abs(z.var(0) - 1)) < 4.5 * np.sqrt(2 / n)
    correlation = jnp.mean(z[:, 1:] * z[:, :-1], axis=0)
    assert jnp.max(jnp.abs(correlation - jnp.sqrt(1 - eta**2 * (1 - forward**2)))) < 4.5 * np.sqrt(2 / n)


def test_ddpm_steps_are_the_posterior_of_ho_et_al(getkey, x64):
    """One step against eq. 7, in terms of beta, bar alpha and beta tilde; mean and variance to 4.5 s.e."""
    schedule, n, ts = VPLinear(), 20_000, jnp.array([0.6, 0.5])
    bar_t, bar_s = (float(schedule.alpha(t)) ** 2 for t in ts)
    beta, x = 1 - bar_t / bar_s, 0.4
    x_0 = float(gaussian_denoiser(schedule)(x, ts[0]))
    mean = (bar_s**0.5 * beta * x_0 + (1 - beta) ** 0.5 * (1 - bar_s) * x) / (1 - bar_t)
    variance = (1 - bar_s) / (1 - bar_t) * beta
    sample = lambda key: ddpm(gaussian_denoiser(schedule), jnp.array(x), ts, schedule, key=key)[0]
    samples = jax.jit(jax.vmap(sample))(jr.split(getkey(), n))
    assert abs(samples.mean() - mean) < 4.5 * np.sqrt(variance / n)
    assert abs(samples.var() / variance - 1) < 4.5 * np.sqrt(2 / n)


DATA_MEAN, DATA_COVARIANCE = np.array([1.0, -0.5]), np.array([[0.5, 0.2], [0.2, 0.3]])


def correlated_data(schedule):
    """The denoiser of N(DATA_MEAN, DATA_COVARIANCE), and the mean and covariance of x_t as functions of t."""
    mean, covariance = jnp.array(DATA_MEAN), jnp.array(DATA_COVARIANCE)
    mean_t = lambda t: schedule.alpha(t) * mean
    covariance_t = lambda t: schedule.alpha(t) ** 2 * covariance + schedule.sigma(t) ** 2 * jnp.eye(2)

    def denoise(x, t):
        gain = schedule.alpha(t) * covariance @ jnp.linalg.inv(covariance_t(t))
        return mean + gain @ (x - mean_t(t))

    return denoise, mean_t, covariance_t


@every_schedule
@pytest.mark.parametrize("sampler, tolerance", [(ddim, 0.04), (dpm_solver_pp_2m, 0.002)])
def test_deterministic_samplers_recover_gaussian_data(sampler, tolerance, schedule):
    """They are affine in x, so the law of what they make of x_1 is known without sampling.

    The tolerances are the discretisation error of 100 steps, of first and of second order.
    """
    denoise, mean_t, covariance_t = correlated_data(schedule)
    ts = log_snr_grid(100, schedule, t_max=0.99)

    @jax.jit
    def law(mean, covariance):
        f = lambda x: sampler(denoise, x, ts, schedule)[0]
        jacobian = jax.jacfwd(f)(mean)
        return f(mean), jacobian @ covariance @ jacobian.T

    mean, covariance = law(mean_t(ts[0]), covariance_t(ts[0]))
    np.testing.assert_allclose(mean, DATA_MEAN, atol=tolerance)
    np.testing.assert_allclose(covariance, DATA_COVARIANCE, atol=tolerance)


@every_schedule
def test_ddpm_recovers_gaussian_data(schedule, getkey):
    denoise, mean_t, covariance_t = correlated_data(schedule)
    n, ts = 4000, log_snr_grid(200, schedule, t_max=0.99)

    @jax.jit
    @jax.vmap
    def sample(z, key):
        x = mean_t(ts[0]) + jnp.linalg.cholesky(covariance_t(ts[0])) @ z
        return ddpm(denoise, x, ts, schedule, key=key)[0]

    x = np.asarray(sample(jr.normal(getkey(), (n, 2)), jr.split(getkey(), n)))
    # 4.5 standard errors, and for the covariance the 0.03 that 200 first-order steps lose (found by
    # propagating it through the steps).
    np.testing.assert_allclose(x.mean(0), DATA_MEAN, atol=4.5 * np.sqrt(0.5 / n))
    np.testing.assert_allclose(np.cov(x.T), DATA_COVARIANCE, atol=0.5 * 4.5 * np.sqrt(2 / n) + 0.03)


def test_values_of_ddim_on_a_uniform_grid(x64):
    """Slopes of the DDIM map for x_0 ~ N(1, std^2), beta from 0.1 to 20, t uniform from 1 to 1e-3."""
    table = {1.0: {5: 0.6845, 10: 0.8321, 20: 0.9128, 50: 0.9642}, 0.5: {5: 0.2696, 20: 0.4339}}
    for std, slopes in table.items():
        denoise = gaussian_denoiser(VPLinear(), mean=1.0, std=std)
        for num_steps, slope in slopes.items():
            f = lambda x: ddim(denoise, x, uniform_grid(num_steps, t_min=1e-3), VPLinear())[0]  # noqa: B023
            value, found = jax.jvp(f, (jnp.array(0.0),), (jnp.array(1.0),))
            assert abs(found - slope) < 6e-5  # four printed digits
            if (std, num_steps) == (1.0, 5):
                assert abs(value - 0.9954) < 6e-5


def test_ddim_of_the_linear_flow_is_euler(getkey, x64):
    x, ts = jr.normal(getkey(), (2, 3)), uniform_grid(7, t_max=0.95, t_min=0.0)
    by_euler = euler(gaussian_velocity(FLOW), x, ts)
    assert_trees_close(ddim(gaussian_denoiser(FLOW), x, ts, FLOW), by_euler, rtol=1e-10)


def test_ddim_with_eta_one_is_ddpm(getkey):
    x, ts, key = jr.normal(getkey(), (3,)), uniform_grid(5), getkey()
    denoise = gaussian_denoiser(VPLinear())
    assert_trees_close(
        ddim(denoise, x, ts, VPLinear(), eta=1.0, key=key), ddpm(denoise, x, ts, VPLinear(), key=key)
    )


def test_first_step_of_dpm_solver_is_ddim(getkey):
    x, ts, denoise = jr.normal(getkey(), (3,)), jnp.array([1.0, 0.6]), gaussian_denoiser(VPLinear())
    assert_trees_close(dpm_solver_pp_2m(denoise, x, ts, VPLinear()), ddim(denoise, x, ts, VPLinear()))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm_solver_pp_2m"])
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), LinearFlow()], ids=["linear", "cosine", "flow"])
def test_last_step_to_zero_noise_is_the_denoised_sample(name, schedule, getkey):
    """From t = 1 to t = 0, where log-SNRs and derivatives are infinite, all stays finite."""
    x, ts = jr.normal(getkey(), (3,)), uniform_grid(6)
    last, path = EVERY[name](x, ts, schedule)
    assert jnp.all(jnp.isfinite(path))
    assert_trees_close(last, gaussian_denoiser(schedule)(path[-2], ts[-2]), rtol=1e-5)


def test_meanflow_is_exact_on_any_grid(x64):
    """The average velocity of a Gaussian's flow in closed form: one step and many give the flow map."""
    x = jnp.array([1.3, -0.2])

    def mean_velocity(x, r, t):
        return (x - gaussian_flow_map(FLOW, x, t, r)) / (t - r)

    for num_steps in (1, 5):
        ts = uniform_grid(num_steps)
        last, path = meanflow(mean_velocity, x, ts)
        expected = jax.vmap(lambda r: gaussian_flow_map(FLOW, x, 1.0, r))(ts)
        assert_trees_close(path, expected, rtol=1e-12, atol=1e-12)
        assert_trees_close(last, expected[-1], rtol=1e-12, atol=1e-12)


@every_sampler
def test_form_of_the_result(sampler, getkey):
    """The path, from start to sample; determinism; jit with a traced grid; repeated times do nothing."""
    run = lambda x, ts: sampler(x, ts, VPLinear())
    jitted = jax.jit(run)
    x, ts = jr.normal(getkey(), (2, 3)), uniform_grid(4, t_min=0.2)
    last, path = jitted(x, ts)
    assert path.shape == (5, 2, 3) and path.dtype == x.dtype
    assert_trees_close((path[0], path[-1]), (x, last), rtol=0, atol=0)
    assert_trees_close(jitted(x, ts), (last, path), rtol=0, atol=0)
    # Other fusions round differently.
    assert_trees_close(run(x, ts), (last, path), rtol=1e-5, atol=1e-5)
    _, path = jitted(x, jnp.array([0.9, 0.9, 0.7, 0.5, 0.5]))
    assert_trees_close((path[1], path[4]), (path[0], path[3]))


@every_sampler
def test_bad_grids_raise(sampler):
    for ts in (jnp.array([0.2, 0.9]), jnp.array([1.0]), jnp.ones((2, 2)), jnp.array(1.0)):
        with pytest.raises((ValueError, TypeCheckError), match="ts must|'ts'"):
            sampler(jnp.zeros(2), ts, VPLinear())


def test_bad_eta_raises():
    args = gaussian_denoiser(VPLinear()), jnp.zeros(2), uniform_grid(3), VPLinear()
    with pytest.raises(ValueError, match="key"):
        ddim(*args, eta=0.5)
    with pytest.raises(ValueError, match="eta"):
        ddim(*args, eta=1.5, key=jr.key(0))


def test_grids():
    assert_trees_close(uniform_grid(4, 0.9, 0.1), jnp.array([0.9, 0.7, 0.5, 0.3, 0.1]))
    assert_trees_close(karras_grid(8, Karras()), uniform_grid(8), atol=1e-5)
    schedule = VPLinear()
    ts = karras_grid(10, schedule, sigma_min=0.01, sigma_max=50.0, rho=5.0)
    levels = (50**0.2 + np.arange(11) / 10 * (0.01**0.2 - 50**0.2)) ** 5
    ratio = jax.vmap(lambda t: schedule.sigma(t) / schedule.alpha(t))(ts)
    # float32 times resolve a ratio that grows as exp(B(t) / 2) to B'(t) / 2 = 10 roundings.
    assert_trees_close(ratio, jnp.array(levels), rtol=1e-5)
    steps = jnp.diff(jax.vmap(schedule.log_snr)(log_snr_grid(10, schedule, 0.9, 0.01)))
    assert_trees_close(steps, jnp.full(10, steps[0]), rtol=1e-4)


def test_bad_grid_requests_raise():
    for make in (uniform_grid, lambda n: karras_grid(n, Karras()), lambda n: log_snr_grid(n, VPLinear())):
        with pytest.raises(ValueError, match="num_steps"):
            make(0)
    with pytest.raises(ValueError, match="sigma_max"):
        karras_grid(5, Geometric(sigma_max=50.0), sigma_min=0.01)
    with pytest.raises(ValueError, match="t_max < 1"):
        log_snr_grid(5, LinearFlow())
