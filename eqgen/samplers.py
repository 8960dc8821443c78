"""Samplers: one function each, on top of any callable.

All have the form `(fn, x, grid, ...) -> (x, path)`. `x` is one example of any shape. `path` holds every state, the
start included; it costs nothing where it is not used. Map over examples with `jax.vmap`.

From noise at t = 1 to data at t = 0, on a grid `ts` of num_steps + 1 times that never increases, `x` at time
`ts[0]` being usually `schedule.prior_std * jr.normal(key, shape)`:

- diffusion samplers take `denoise(x, t)`, the posterior mean of x_0 (`parameterizations.converted` makes it
    from a network that predicts something else);
- flow samplers take `velocity(x, t)`, the drift of dx/dt;
- `meanflow` takes `mean_velocity(x, r, t)`, the velocity averaged over [r, t].

Towards a density known up to a constant, from any `x`, with one step per entry of `step_sizes`:

- `langevin` takes `score(x)`, the gradient of the log-density, and `mala` takes `log_density(x)` itself;
- `annealed_langevin` takes `score(x, level)`, that of densities from smooth to sharp.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, PyTree, Scalar, Shaped

from eqgen.schedules import AbstractNoiseSchedule


Denoise = Callable[[Array, Scalar], Array]
Velocity = Callable[[Array, Scalar], Array]
MeanVelocity = Callable[[Array, Scalar, Scalar], Array]
Score = Callable[[Array], Array]
LevelScore = Callable[[Array, PyTree], Array]
LogDensity = Callable[[Array], Scalar]
Projection = Callable[[Array], Array]

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
    project: Projection | None = None,
    key: Key[Array, ""] | None = None,
) -> Sample:
    """DDIM, Song et al., "Denoising diffusion implicit models" (2021), eq. 12 and 16.

    x_s = alpha_s x_0 + sigma_s (sqrt(1 - eta^2 q) eps + eta sqrt(q) z) with q = 1 - SNR(t) / SNR(s), z ~ N(0,
    I), and x_0, eps what the denoiser makes of x_t. The marginals are right for every eta if the denoiser is.

    **Arguments:**

    - `eta`: in [0, 1]. 0 is deterministic and a first-order solver of the probability-flow ODE, 1 is `ddpm`.
    - `project`: applied after every step, to hold known entries of the sample where they are.
    - `key`: needed when `eta` is not 0.

    **Raises:** `ValueError` for a bad grid, `eta` out of range, or `eta > 0` without a key.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}.")
    if eta > 0 and key is None:
        raise ValueError(f"eta = {eta} draws noise: pass `key`, or eta = 0 for the deterministic sampler.")
    neighbours = _neighbours(ts, x)

    def step(x, t, s, key=None):
        x_0 = denoise(x, t)
        eps = (x - schedule.alpha(t) * x_0) / schedule.sigma(t)
        if eta > 0 and key is not None:
            q = -jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s))
            eps = jnp.sqrt(1 - eta**2 * q) * eps + eta * jnp.sqrt(q) * jr.normal(key, x.shape, x.dtype)
        x = schedule.alpha(s) * x_0 + schedule.sigma(s) * eps
        return x if project is None else project(x)

    keys = () if key is None or eta == 0 else (jr.split(key, jnp.size(ts) - 1),)
    return _scan(step, x, *neighbours, *keys)


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
    denoise: Denoise,
    x: Float[Array, "*x"],
    ts: Float[Array, " times"],
    schedule: AbstractNoiseSchedule,
    *,
    project: Projection | None = None,
) -> Sample:
    """DPM-Solver++(2M), Lu et al., "DPM-Solver++" (2022), algorithm 2: second order, one evaluation a step.

    x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - exp(-h)) D, where h is the step in half the log-SNR and D the
    denoised sample, extrapolated linearly from this and the previous evaluation. The first step is first
    order, and so is one that ends at sigma = 0 (h is infinite there). `project` as in `ddim`.
    """

    def body(carry, times):
        (x, previous_x_0, previous_h), (t, s) = carry, times
        x_0 = denoise(x, t)
        h = 0.5 * (schedule.log_snr(s) - schedule.log_snr(t))
        second_order = (previous_h > 0) & jnp.isfinite(h)
        weight = jnp.where(second_order, h, 0) / jnp.where(second_order, 2 * previous_h, 1)
        extrapolated = x_0 + weight * (x_0 - previous_x_0)
        noise = schedule.sigma(s) / schedule.sigma(t) * x
        x = noise - schedule.alpha(s) * jnp.expm1(-h) * extrapolated
        x = x if project is None else project(x)
        return (x, x_0, h), x

    start = (x, jnp.zeros_like(x), jnp.zeros((), x.dtype))
    (x_last, _, _), path = jax.lax.scan(body, start, _neighbours(ts, x))
    return x_last, jnp.concatenate([x[None], path])


def euler(velocity: Velocity, x: Float[Array, "*x"], ts: Float[Array, " times"]) -> Sample:
    """Euler's method for dx/dt = velocity(x, t): first order, one evaluation a step."""
    return _scan(lambda x, t, s: x + (s - t) * velocity(x, t), x, *_neighbours(ts, x))


def heun(velocity: Velocity, x: Float[Array, "*x"], ts: Float[Array, " times"]) -> Sample:
    """Heun's method for dx/dt = velocity(x, t): second order, two evaluations a step.

    The last one is at `ts[-1]`; a velocity that does not exist at t = 0 (one made from a score) needs a grid
    that ends a little above.
    """

    def step(x, t, s):
        v_t = velocity(x, t)
        v_s = velocity(x + (s - t) * v_t, s)
        return x + (s - t) * (v_t + v_s) / 2

    return _scan(step, x, *_neighbours(ts, x))


def meanflow(mean_velocity: MeanVelocity, x: Float[Array, "*x"], ts: Float[Array, " times"]) -> Sample:
    """x_r = x_t - (t - r) u(x_t, r, t), from the average velocity u.

    Geng et al., "Mean flows for one-step generative modeling" (2025), eq. 12. `mean_velocity(x, r, t)` is u,
    with r <= t. One step, x_0 = x_1 - u(x_1, 0, 1), is `ts = uniform_grid(1)`; any grid is exact if u is.
    """
    return _scan(lambda x, t, r: x - (t - r) * mean_velocity(x, r, t), x, *_neighbours(ts, x))


# --- Langevin dynamics ---


def langevin(
    score: Score,
    x: Float[Array, "*x"],
    step_sizes: Float[Array, " steps"],
    *,
    project: Projection | None = None,
    key: Key[Array, ""],
) -> Sample:
    """Unadjusted Langevin, x <- project(x + eta/2 score(x) + sqrt(eta) z), z ~ N(0, I), also in the last step.

    Its stationary law is the density up to a bias O(eta): for N(mu, 1/c), its variance is 1 / (c (1 - eta c/4)),
    and from eta c = 4 on it diverges.

    **Arguments:**

    - `score`: the gradient of the log-density; a temperature belongs to it (`lambda x: w * jax.grad(q)(x)`).
    - `step_sizes`: eta > 0 of each step; `jnp.full(num_steps, eta)` for a constant one.
    - `project`: applied after every step, for instance `reflect_into_box()`.

    **Raises:** `ValueError` for bad `step_sizes`.
    """
    return annealed_langevin(lambda x, level: score(x), x, None, step_sizes, project=project, key=key)


def annealed_langevin(
    score: LevelScore,
    x: Float[Array, "*x"],
    levels: PyTree[Shaped[Array, "levels ..."]],
    step_sizes: Float[Array, " levels"],
    *,
    steps_per_level: int = 1,
    project: Projection | None = None,
    key: Key[Array, ""],
) -> Sample:
    """`langevin` through densities from smooth to sharp, so that a chain finds the modes before it is in one.

    Song & Ermon, "Generative modeling by estimating gradients of the data distribution" (2019), algorithm 1.
    Without a final denoising step: the sample has the noise of the last level and of the last step.

    **Arguments:**

    - `score`: of `(x, level)`, the gradient of the log-density at that level.
    - `levels`: from coarse to sharp, an array (noise levels, indices) or a PyTree of them (what a network needs
        to know of each level); `score` receives one entry along the leading axis.
    - `step_sizes`: eta at each level, for instance `annealed_step_sizes(levels, 1e-4)`.
    - `steps_per_level`: the number of steps at each level.
    - `project`: applied after every step.

    **Raises:** `ValueError` for bad `step_sizes`, levels of another number, or fewer than one step per level.
    """
    step_sizes = _check_step_sizes(step_sizes, x)
    if any(jnp.shape(leaf)[:1] != step_sizes.shape for leaf in jax.tree.leaves(levels)):
        raise ValueError(
            "levels must have one entry per step size along the leading axis of every array, got shapes "
            f"{jax.tree.map(jnp.shape, levels)} for {step_sizes.size} step sizes."
        )
    if steps_per_level < 1:
        raise ValueError(f"steps_per_level must be at least 1, got {steps_per_level}.")

    def step(x, inputs, z):
        level, eta = inputs
        x = x + eta / 2 * score(x, level) + jnp.sqrt(eta) * z
        return x if project is None else project(x)

    repeated = lambda leaf: jnp.repeat(leaf, steps_per_level, axis=0)
    inputs = jax.tree.map(repeated, (levels, step_sizes))
    # All noise at once: it takes as much room as the path, and a step of a small chain less time.
    keys = jr.split(key, step_sizes.size * steps_per_level)
    noise = jax.vmap(lambda key: jr.normal(key, x.shape, x.dtype))(keys)
    return _scan(step, x, inputs, noise)


def mala(
    log_density: LogDensity,
    x: Float[Array, "*x"],
    step_sizes: Float[Array, " steps"],
    *,
    box: tuple[ArrayLike, ArrayLike] | None = None,
    key: Key[Array, ""],
) -> Sample:
    """Metropolis-adjusted Langevin: steps of `langevin` as proposals y, accepted so that no bias is left.

    Roberts & Tweedie, "Exponential convergence of Langevin distributions and their discrete approximations"
    (1996). The probability of acceptance is min(1, p(y) q(x | y) / p(x) q(y | x)), with q(y | x) the density of
    N(x + eta/2 grad log p(x), eta I). One evaluation of value and gradient a step.

    A rejected step repeats the state, so the acceptance rate is read off the path of a vector:
    `jnp.any(path[1:] != path[:-1], axis=-1).mean()`. Rates near 0.57 mix fastest in many dimensions (Roberts &
    Rosenthal 1998).

    **Arguments:**

    - `log_density`: log p up to a constant. Where it is -inf or NaN, proposals are rejected.
    - `box`: `(low, high)`, outside of which proposals are rejected: samples are of p restricted to the box, in
        which `x` must lie. What `log_density` says outside has no effect.

    **Raises:** `ValueError` for bad `step_sizes`, or `low >= high`.
    """
    step_sizes = _check_step_sizes(step_sizes, x)
    low, high = (-jnp.inf, jnp.inf) if box is None else _check_box(*box)
    value_and_score = jax.value_and_grad(log_density)

    def body(carry, inputs):
        (x, value, score), (eta, key) = carry, inputs
        noise_key, accept_key = jr.split(key)
        z = jr.normal(noise_key, x.shape, x.dtype)
        y = x + eta / 2 * score + jnp.sqrt(eta) * z
        value_y, score_y = value_and_score(y)
        log_forward = -jnp.sum(z**2) / 2
        log_backward = -jnp.sum((x - y - eta / 2 * score_y) ** 2) / (2 * eta)
        log_ratio = value_y + log_backward - value - log_forward
        inside = jnp.all((low <= y) & (y <= high))
        accept = inside & (jnp.log(jr.uniform(accept_key, (), x.dtype)) < log_ratio)  # NaN rejects
        carry = jax.tree.map(partial(jnp.where, accept), (y, value_y, score_y), carry)
        return carry, carry[0]

    inputs = step_sizes, jr.split(key, step_sizes.size)
    (x_last, _, _), path = jax.lax.scan(body, (x, *value_and_score(x)), inputs)
    return x_last, jnp.concatenate([x[None], path])


def geometric_levels(num_levels: int, sigma_max: float, sigma_min: float) -> Float[Array, " levels"]:
    """sigma_l = exp(lerp(ln sigma_max, ln sigma_min, l / (num_levels - 1))): l = 0 is the coarsest.

    **Raises:** `ValueError` unless `num_levels >= 2` and `0 < sigma_min <= sigma_max`.
    """
    if num_levels < 2:
        raise ValueError(f"num_levels must be at least 2 (one level is `langevin`), got {num_levels}.")
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(f"Choose sigma_max >= sigma_min > 0, got {sigma_max = } and {sigma_min = }.")
    return jnp.asarray(np.geomspace(sigma_max, sigma_min, num_levels))  # NumPy's has exact ends


def annealed_step_sizes(sigmas: Float[Array, " levels"], final_step_size: float) -> Float[Array, " levels"]:
    """eta_l = final_step_size (sigma_l / sigma_{L-1})^2, Song & Ermon (2019): steps in proportion to the noise.

    **Raises:** `ValueError` unless all are positive.
    """
    _check_positive("sigmas", sigmas)
    _check_positive("final_step_size", final_step_size)
    return final_step_size * (sigmas / sigmas[-1]) ** 2


def clip_to_box(low: ArrayLike = -1.0, high: ArrayLike = 1.0) -> Projection:
    """The nearest point of the box, as a function of x.

    After every Langevin step this piles mass up on the faces, where it holds all that would have left the box: a
    bias O(sqrt(eta)) unless the density is small there. `reflect_into_box` has less.

    **Raises:** `ValueError` if `low >= high`.
    """
    low, high = _check_box(low, high)
    return lambda x: jnp.clip(x, low, high)


def reflect_into_box(low: ArrayLike = -1.0, high: ArrayLike = 1.0) -> Projection:
    """Reflection at the faces of the box, as often as it takes (a triangular wave), as a function of x.

    Langevin dynamics reflected after every step keep the density restricted to the box up to a bias O(eta); with
    score 0 they keep the uniform law at every step size.

    **Raises:** `ValueError` if `low >= high`.
    """
    low, high = _check_box(low, high)

    def reflect(x):
        width = jnp.subtract(high, low)
        folded = low + width - jnp.abs(jnp.mod(x - low, 2 * width) - width)
        # Rounding moves points that need no folding, and those next to a face across it.
        return jnp.where((low <= x) & (x <= high), x, jnp.clip(folded, low, high))

    return reflect


# --- What they share ---


def _scan(step: Callable, x: Array, *inputs: PyTree) -> Sample:
    """Scans `x = step(x, *inputs)` over the leading axis of the inputs."""

    def body(x, inputs):
        x = step(x, *inputs)
        return x, x

    x_last, path = jax.lax.scan(body, x, inputs)
    return x_last, jnp.concatenate([x[None], path])


def _neighbours(ts: Array, x: Array) -> tuple[Array, Array]:
    """The times t and s <= t that each step of the grid leads from and to."""
    if jnp.ndim(ts) != 1 or jnp.size(ts) < 2:
        raise ValueError(f"ts must be a 1-dimensional grid of two or more times, got shape {jnp.shape(ts)}.")
    known = _concrete(ts)
    if known is not None and np.any(np.diff(known) > 0):
        raise ValueError(f"ts must not increase: it runs from noise (t = 1) to data (t = 0), got {known}.")
    ts = jnp.asarray(ts, x.dtype)
    return ts[:-1], ts[1:]


def _check_step_sizes(step_sizes: Array, x: Array) -> Array:
    if jnp.ndim(step_sizes) != 1 or jnp.size(step_sizes) < 1:
        raise ValueError(
            f"step_sizes must be a 1-dimensional array, one for every step or level, got shape "
            f"{jnp.shape(step_sizes)}; jnp.full(num_steps, eta) repeats one."
        )
    _check_positive("step_sizes", step_sizes)
    return jnp.asarray(step_sizes, x.dtype)


def _check_positive(name: str, x: ArrayLike) -> None:
    known = _concrete(x)
    if known is not None and not np.all(known > 0):
        raise ValueError(f"{name} must be positive, got {known}.")


def _check_box(low: ArrayLike, high: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
    known_low, known_high = _concrete(low), _concrete(high)
    if known_low is not None and known_high is not None and not np.all(known_low < known_high):
        raise ValueError(f"low must be below high, got {low = } and {high = }.")
    return low, high


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")


def _concrete(x: ArrayLike) -> np.ndarray | None:
    """The values of an array, or None while a function of it is being traced and it has none."""
    try:
        return np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        return None
