"""Samplers: from noise at t = 1 to data at t = 0, one function each, on top of any callable.

All have the form `(fn, x, ts, ...) -> (x, path)`. `ts` is a grid of num_steps + 1 times that never increases.
`x` is one example of any shape at time `ts[0]`, usually `schedule.prior_std * jr.normal(key, shape)`. `path`
holds the state at every time of the grid, the start included; it costs nothing where it is not used. Map over
examples with `jax.vmap`.

What `fn` is:

- diffusion samplers take `denoise(x, t)`, the posterior mean of x_0 (`parameterizations.converted` makes it
    from a network that predicts something else);
- flow samplers take `velocity(x, t)`, the drift of dx/dt;
- `meanflow` takes `mean_velocity(x, r, t)`, the velocity averaged over [r, t].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key, Scalar

from eqgen.schedules import AbstractNoiseSchedule


Denoise = Callable[[Array, Scalar], Array]
Velocity = Callable[[Array, Scalar], Array]
MeanVelocity = Callable[[Array, Scalar, Scalar], Array]

Sample = tuple[Float[Array, "*x"], Float[Array, " times *x"]]


def uniform_grid(num_steps: int, t_max: float = 1.0, t_min: float = 0.0) -> Float[Array, " times"]:
    """`num_steps` equal steps from `t_max` down to `t_min`."""
    _check_num_steps(num_steps)
    return jnp.linspace(t_max, t_min, num_steps + 1)


def karras_grid(
    num_steps: int,
    schedule: AbstractNoiseSchedule,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Float[Array, " times"]:
    """The times at which sigma / alpha runs through the noise levels of Karras et al. (2022), eq. 5.

    sigma / alpha = (sigma_max^(1/rho) + i / num_steps (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i = 0,
    ..., num_steps. Differs from the paper in that sigma = 0 is not appended.

    **Raises:** `ValueError` when `schedule` does not reach these levels.
    """
    _check_num_steps(num_steps)
    levels = jnp.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps + 1)
    ts = jax.vmap(schedule.time_of_log_snr)(-2 * rho * jnp.log(levels))
    known = _concrete(ts)
    if known is not None and not np.all((known > -1e-4) & (known < 1 + 1e-4)):
        raise ValueError(
            f"{schedule} does not have sigma / alpha from sigma_max = {sigma_max} to sigma_min = {sigma_min} "
            f"within [0, 1]: ts = {known}. Choose levels within its range."
        )
    return jnp.clip(ts, 0, 1)


def log_snr_grid(
    num_steps: int, schedule: AbstractNoiseSchedule, t_max: float = 1.0, t_min: float = 1e-3
) -> Float[Array, " times"]:
    """`num_steps` steps from `t_max` to `t_min`, equal in the log-SNR (Lu et al., "DPM-Solver", 2022).

    **Raises:** `ValueError` when the log-SNR is infinite at an end.
    """
    _check_num_steps(num_steps)
    start, end = schedule.log_snr(t_max), schedule.log_snr(t_min)
    known = _concrete(jnp.stack([start, end]))
    if known is not None and not np.all(np.isfinite(known)):
        raise ValueError(
            f"The log-SNR of {schedule} is {known[0]} at t_max = {t_max} and {known[1]} at t_min = {t_min}. "
            "Choose t_max < 1 and t_min > 0."
        )
    return jax.vmap(schedule.time_of_log_snr)(jnp.linspace(start, end, num_steps + 1))


def ddim(
    denoise: Denoise,
    x: Float[Array, "*x"],
    ts: Float[Array, " times"],
    schedule: AbstractNoiseSchedule,
    *,
    eta: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Sample:
    """DDIM, Song et al., "Denoising diffusion implicit models" (2021), eq. 12 and 16.

    x_s = alpha_s x_0 + sigma_s (sqrt(1 - eta^2 q) eps + eta sqrt(q) z) with q = 1 - SNR(t) / SNR(s), z ~ N(0,
    I), and x_0, eps what the denoiser makes of x_t. The marginals are right for every eta if the denoiser is.

    **Arguments:**

    - `eta`: in [0, 1]. 0 is deterministic and a first-order solver of the probability-flow ODE, 1 is `ddpm`.
    - `key`: needed when `eta` is not 0.

    **Raises:** `ValueError` for a bad grid, `eta` out of range, or `eta > 0` without a key.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}.")
    if eta > 0 and key is None:
        raise ValueError(f"eta = {eta} draws noise: pass `key`, or eta = 0 for the deterministic sampler.")
    ts = _check_grid(ts, x)

    def step(x, t, s, key=None):
        x_0 = denoise(x, t)
        eps = (x - schedule.alpha(t) * x_0) / schedule.sigma(t)
        if eta > 0:
            q = -jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s))
            eps = jnp.sqrt(1 - eta**2 * q) * eps + eta * jnp.sqrt(q) * jr.normal(key, x.shape, x.dtype)
        return schedule.alpha(s) * x_0 + schedule.sigma(s) * eps

    return _scan(step, x, ts, jr.split(key, ts.size - 1)) if eta > 0 else _scan(step, x, ts)


def ddpm(
    denoise: Denoise,
    x: Float[Array, "*x"],
    ts: Float[Array, " times"],
    schedule: AbstractNoiseSchedule,
    *,
    key: Key[Array, ""],
) -> Sample:
    """Ancestral sampling, x_s ~ q(x_s | x_t, x_0).

    Ho et al., "Denoising diffusion probabilistic models" (2020), eq. 7. The variance is that of the
    posterior (beta tilde, "fixed small"), which makes this `ddim` with eta = 1.
    """
    return ddim(denoise, x, ts, schedule, eta=1.0, key=key)


def dpm_solver_pp_2m(
    denoise: Denoise, x: Float[Array, "*x"], ts: Float[Array, " times"], schedule: AbstractNoiseSchedule
) -> Sample:
    """DPM-Solver++(2M), Lu et al., "DPM-Solver++" (2022), algorithm 2: second order, one evaluation a step.

    x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - exp(-h)) D, where h is the step in half the log-SNR and D the
    denoised sample, extrapolated linearly from this and the previous evaluation. The first step is first
    order, and so is one that ends at sigma = 0 (h is infinite there).
    """

    ts = _check_grid(ts, x)

    def body(carry, times):
        (x, previous_x_0, previous_h), (t, s) = carry, times
        x_0 = denoise(x, t)
        h = 0.5 * (schedule.log_snr(s) - schedule.log_snr(t))
        second_order = (previous_h > 0) & jnp.isfinite(h)
        weight = jnp.where(second_order, h, 0) / jnp.where(second_order, 2 * previous_h, 1)
        extrapolated = x_0 + weight * (x_0 - previous_x_0)
        noise = schedule.sigma(s) / schedule.sigma(t) * x
        x = noise - schedule.alpha(s) * jnp.expm1(-h) * extrapolated
        return (x, x_0, h), x

    start = (x, jnp.zeros_like(x), jnp.zeros((), x.dtype))
    (x_last, _, _), path = jax.lax.scan(body, start, (ts[:-1], ts[1:]))
    return x_last, jnp.concatenate([x[None], path])


def euler(velocity: Velocity, x: Float[Array, "*x"], ts: Float[Array, " times"]) -> Sample:
    """Euler's method for dx/dt = velocity(x, t): first order, one evaluation a step."""
    return _scan(lambda x, t, s: x + (s - t) * velocity(x, t), x, _check_grid(ts, x))


def heun(velocity: Velocity, x: Float[Array, "*x"], ts: Float[Array, " times"]) -> Sample:
    """Heun's method for dx/dt = velocity(x, t): second order, two evaluations a step.

    The last one is at `ts[-1]`; a velocity that does not exist at t = 0 (one made from a score) needs a grid
    that ends a little above.
    """

    def step(x, t, s):
        v_t = velocity(x, t)
        v_s = velocity(x + (s - t) * v_t, s)
        return x + (s - t) * (v_t + v_s) / 2

    return _scan(step, x, _check_grid(ts, x))


def meanflow(mean_velocity: MeanVelocity, x: Float[Array, "*x"], ts: Float[Array, " times"]) -> Sample:
    """x_r = x_t - (t - r) u(x_t, r, t), from the average velocity u.

    Geng et al., "Mean flows for one-step generative modeling" (2025), eq. 12. `mean_velocity(x, r, t)` is u,
    with r <= t. One step, x_0 = x_1 - u(x_1, 0, 1), is `ts = uniform_grid(1)`; any grid is exact if u is.
    """
    return _scan(lambda x, t, r: x - (t - r) * mean_velocity(x, r, t), x, _check_grid(ts, x))


def _scan(step: Callable, x: Array, ts: Array, *inputs: Array) -> Sample:
    """Scans `x = step(x, t, s, *inputs)` over the neighbours t >= s of the grid."""

    def body(x, inputs):
        x = step(x, *inputs)
        return x, x

    x_last, path = jax.lax.scan(body, x, (ts[:-1], ts[1:], *inputs))
    return x_last, jnp.concatenate([x[None], path])


def _check_grid(ts: Array, x: Array) -> Array:
    if jnp.ndim(ts) != 1 or jnp.size(ts) < 2:
        raise ValueError(f"ts must be a 1-dimensional grid of two or more times, got shape {jnp.shape(ts)}.")
    known = _concrete(ts)
    if known is not None and np.any(np.diff(known) > 0):
        raise ValueError(f"ts must not increase: it runs from noise (t = 1) to data (t = 0), got {known}.")
    return jnp.asarray(ts, x.dtype)


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")


def _concrete(ts: Array) -> np.ndarray | None:
    """The values of a grid, or None while a function of it is being traced and it has none."""
    try:
        return np.asarray(ts)
    except jax.errors.TracerArrayConversionError:
        return None
