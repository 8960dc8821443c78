"""MeanFlow: learning the average velocity of a flow, so that one evaluation of a network samples.

Geng, Deng, Bai, Kolter, He 2025, "Mean Flows for One-step Generative Modeling", arXiv 2505.13447. The flow
`dx/dt = v(x, t)` runs from data (t = 0) to noise (t = 1); its average velocity over `r <= t`,

    (t - r) u(x_t, r, t) = int_r^t v(x_tau, tau) dtau,      x_r = x_t - (t - r) u(x_t, r, t),      (Eq. 3, 12)

obeys the MeanFlow identity, the derivative of that along the flow,

    u = v - (t - r) du/dt,      du/dt = v . grad_x u + partial_t u,                                 (Eq. 6, 8)

whose right side, held constant, is what `u` is regressed on. `v` is the velocity at `x_t`: the conditional
one of flow matching, or the one of SOM, which follows from a score (Kim et al. 2026, arXiv 2605.23365, Eq. 8
[3P]).

| paper        | here                       |                                                          |
|--------------|----------------------------|----------------------------------------------------------|
| `u_theta`    | `mean_velocity(x, r, t)`   | average velocity                                         |
| `v_t`        | `velocity`                 | instantaneous velocity at `x_t`                          |
| `u_tgt`      | `u_target`                 | regression target, no gradient                           |
| `p`, `c`     | `power`, `c`               | adaptive loss weighting (appendix)                       |
| ratio r != t | `1 - flow_ratio`           | share of intervals that are no single instant            |

Everything is written for one point; `jax.vmap` makes batches.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, ScalarLike

from eqgen.types import Metrics


MeanVelocity = Callable[[Float[Array, " dim"], Float[Array, ""], Float[Array, ""]], Float[Array, " dim"]]
Interval = tuple[Float[Array, ""], Float[Array, ""]]


def meanflow_target(
    mean_velocity: MeanVelocity,
    x_t: Float[Array, " dim"],
    r: ScalarLike,
    t: ScalarLike,
    velocity: Float[Array, " dim"],
) -> tuple[Float[Array, " dim"], Float[Array, " dim"]]:
    """The average velocity and the target the MeanFlow identity gives it, by one `jax.jvp`.

    **Arguments:**

    - `mean_velocity`: `u(x, r, t)`, in this order. A network that takes `(t, t - r)` is wrapped, so that the
      derivative is the one of the wrapper.
    - `velocity`: `v(x_t, t)`.

    **Returns:** `(u, u_target)`, `u_target = v - (t - r) du/dt`. Gradients flow through `u` alone; where
    `r = t` the target is `velocity` itself.
    """
    r, t = jnp.asarray(r, x_t.dtype), jnp.asarray(t, x_t.dtype)
    # The tangent of (x, r, t) is (v, 0, 1). Closed over, r costs nothing, and r = 0 under a root is safe.
    along_flow = lambda x, t: mean_velocity(x, r, t)
    u, du_dt = jax.jvp(along_flow, (x_t, t), (velocity, jnp.ones_like(t)))
    return u, jax.lax.stop_gradient(velocity - (t - r) * du_dt)


def average_velocity(
    x_t: Float[Array, " dim"],
    x_r: Float[Array, " dim"],
    r: ScalarLike,
    t: ScalarLike,
    velocity: Float[Array, " dim"],
) -> Float[Array, " dim"]:
    """The average velocity `(x_t - x_r) / (t - r)` between two points of a solved trajectory.

    The other way to a regression target: `x_r` comes from an ODE solver instead of the identity. Where
    `r = t` it is `velocity`, the limit. Safe to differentiate.
    """
    gap = jnp.asarray(jnp.subtract(t, r), x_t.dtype)
    return jnp.where(gap == 0, velocity, (x_t - x_r) / jnp.where(gap == 0, 1, gap))


def adaptive_loss(
    error: Float[Array, " dim"],
    *,
    power: ScalarLike = 1.0,
    c: ScalarLike = 1e-3,
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Array, ""]:
    """`|error|^2 / stop_gradient(|error|^2 + c)^power`: MeanFlow's adaptive weighting (its appendix).

    **Arguments:**

    - `power`: 0 is the plain square, 1 gives gradients whose length hardly depends on the error's.
    - `c`: positive; errors below its square root are weighted like a plain square. The official code has
      `c = 1e-2` and `"sum"`; SOM has `c = 1e-3` and `"mean"` [3P].
    - `reduction`: how `|error|^2` is taken over the dimensions.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"adaptive_loss: reduction is {reduction!r}; it must be 'mean' or 'sum'.")
    square = jnp.mean(error**2) if reduction == "mean" else jnp.sum(error**2)
    return square / jax.lax.stop_gradient(square + c) ** power


def meanflow_loss(
    mean_velocity: MeanVelocity,
    x_t: Float[Array, " dim"],
    r: ScalarLike,
    t: ScalarLike,
    velocity: Float[Array, " dim"],
    *,
    power: ScalarLike = 1.0,
    c: ScalarLike = 1e-3,
    reduction: Literal["mean", "sum"] = "mean",
) -> tuple[Float[Array, ""], Metrics]:
    """The MeanFlow loss at one point, see [`meanflow_target`][] and [`adaptive_loss`][].

    **Returns:** the loss, and `meanflow_error = |u - u_target|^2 / dim` (the loss itself is near 1 whatever
    the error, when `power = 1`) and `target_norm = |u_target|`.
    """
    u, u_target = meanflow_target(mean_velocity, x_t, r, t, velocity)
    error = u - u_target
    metrics = {"meanflow_error": jnp.mean(error**2), "target_norm": jnp.linalg.norm(u_target)}
    return adaptive_loss(error, power=power, c=c, reduction=reduction), metrics


def sample_uniform_interval(
    *,
    key: Key[Array, ""],
    t_min: ScalarLike = 1e-3,
    t_max: ScalarLike = 1 - 1e-3,
    flow_ratio: ScalarLike = 0.5,
    endpoint_fraction: ScalarLike = 0.1,
) -> Interval:
    """An interval `(r, t)`: `t ~ U(t_min, t_max)`, `r ~ U(0, t)`, then `r = t` with probability `flow_ratio`.

    SOM's law [3P, there with `flow_ratio = 0.25`]. One-step sampling only ever uses (0, 1), which no
    continuous law draws: so of the intervals with `r < t` a share `endpoint_fraction` gets `r = 0` and,
    independently, as many get `t = 1` [I].

    **Returns:** scalars `0 <= r <= t <= 1`.
    """
    t_key, r_key, mix_key = jr.split(key, 3)
    t = jr.uniform(t_key, minval=t_min, maxval=t_max)
    # In order already; but of the operand of a sort there is one, which fused code might compute, and round, twice.
    r, t = jnp.sort(jnp.stack([t * jr.uniform(r_key), t]))
    return _mix_interval(r, t, flow_ratio, endpoint_fraction, mix_key)


def sample_logit_normal_interval(
    *,
    key: Key[Array, ""],
    mean: ScalarLike = -0.4,
    std: ScalarLike = 1.0,
    flow_ratio: ScalarLike = 0.75,
    endpoint_fraction: ScalarLike = 0.0,
) -> Interval:
    """An interval `(r, t)`: two draws of `sigmoid(mean + std N(0, 1))`, sorted.

    `r = t` with probability `flow_ratio`. The law of the MeanFlow paper on images.
    `endpoint_fraction` as in [`sample_uniform_interval`][].

    **Returns:** scalars `0 <= r <= t <= 1`.
    """
    pair_key, mix_key = jr.split(key)
    r, t = jnp.sort(jax.nn.sigmoid(mean + std * jr.normal(pair_key, (2,))))
    return _mix_interval(r, t, flow_ratio, endpoint_fraction, mix_key)


def _mix_interval(r, t, flow_ratio, endpoint_fraction, key):
    """`r = t` with probability `flow_ratio`; the other intervals reach the ends 0 and 1 now and then."""
    flow_key, start_key, end_key = jr.split(key, 3)
    instant = jr.bernoulli(flow_key, flow_ratio)
    from_data = jr.bernoulli(start_key, endpoint_fraction) & ~instant
    to_noise = jr.bernoulli(end_key, endpoint_fraction) & ~instant
    r = jnp.where(instant, t, jnp.where(from_data, 0.0, r))
    return r, jnp.where(to_noise, 1.0, t)


def gaussian_flow_map(
    x_t: Float[Array, " dim"],
    alpha_r: ScalarLike,
    sigma_r: ScalarLike,
    alpha_t: ScalarLike,
    sigma_t: ScalarLike,
    *,
    mean: Float[Array, " dim"],
    std: ScalarLike,
) -> Float[Array, " dim"]:
    """The probability flow from t to r in closed form, for data `N(mean, std^2 I)`.

    `x_r = alpha_r m + sqrt(V_r / V_t) (x_t - alpha_t m)` with `V = alpha^2 std^2 + sigma^2`: every point
    keeps its standardised position, whatever the schedule. The truth for samplers, solvers and MeanFlow.
    """
    variance = lambda alpha, sigma: (alpha * std) ** 2 + sigma**2
    scale = jnp.sqrt(variance(alpha_r, sigma_r) / variance(alpha_t, sigma_t))
    return jnp.asarray(alpha_r * mean + scale * (x_t - alpha_t * mean))
