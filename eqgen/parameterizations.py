"""What a network may predict about x_t = alpha x_0 + sigma eps, and the exact conversions between.

Given x_t and t, any one of these determines the clean sample, the noise, and with them all the others:

| kind       | in terms of the pair (x_0, eps)             | source                                        |
|------------|---------------------------------------------|-----------------------------------------------|
| `x0`       | x_0                                         |                                               |
| `eps`      | eps                                         | Ho et al. (2020)                              |
| `v`        | alpha eps - sigma x_0                       | Salimans & Ho (2022)                          |
| `score`    | -eps / sigma                                | grad log p(x_t | x_0), Song et al. (2021)     |
| `velocity` | alpha' x_0 + sigma' eps                     | dx_t / dt, Lipman et al. (2023)               |

For one pair these are the regression targets of training; for posterior means given x_t (what training finds)
the conversions hold as well, since all are linear, and `velocity` is then the drift of the probability-flow
ODE dx/dt = f x - g^2 score / 2 (Song et al., 2021, eq. 13), `score` the gradient of log p_t.

Every conversion goes through the pair, which keeps the accuracy of the prediction: a velocity made from `x0`
is free of the cancellation between f x and g^2 score / 2 near t = 1, one made from `score` does not divide by
a small sigma. Pure functions of one example: they work under vmap, jvp and grad.
"""

from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array, Float, ScalarLike

from eqgen.schedules import AbstractNoiseSchedule


Kind = Literal["x0", "eps", "v", "score", "velocity"]
"""What a prediction is; see the table above."""


def to_x0_and_eps(
    prediction: Float[Array, "*x"],
    x_t: Float[Array, "*x"],
    t: ScalarLike,
    schedule: AbstractNoiseSchedule,
    *,
    kind: Kind,
) -> tuple[Float[Array, "*x"], Float[Array, "*x"]]:
    """The clean sample and the noise that a prediction implies: alpha x_0 + sigma eps = x_t.

    **Arguments:**

    - `prediction`: a quantity of the given `kind`, at x_t and t.
    - `x_t`, `t`: the noisy sample and its time in (0, 1].
    - `schedule`: alpha and sigma.
    - `kind`: what `prediction` is. `eps` and `score` say nothing about x_0 where alpha = 0, `x0` nothing
        about eps where sigma = 0, `velocity` nothing about either where the schedule stands still (the end
        of `VPCosine`): what is undetermined comes out infinite or NaN.

    **Returns:** (x_0, eps).

    **Raises:** `ValueError` for an unknown `kind`.
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if kind == "x0":
        return prediction, (x_t - alpha * prediction) / sigma
    if kind == "eps":
        return (x_t - sigma * prediction) / alpha, prediction
    if kind == "score":
        return (x_t + sigma**2 * prediction) / alpha, -sigma * prediction
    if kind == "v":
        norm = alpha**2 + sigma**2
        return (alpha * x_t - sigma * prediction) / norm, (sigma * x_t + alpha * prediction) / norm
    if kind == "velocity":
        d_alpha, d_sigma = schedule.d_alpha(t), schedule.d_sigma(t)
        det = alpha * d_sigma - d_alpha * sigma  # > 0: the log-SNR falls
        return (d_sigma * x_t - sigma * prediction) / det, (alpha * prediction - d_alpha * x_t) / det
    raise ValueError(_unknown(kind))


def from_x0_and_eps(
    x_0: Float[Array, "*x"],
    eps: Float[Array, "*x"],
    t: ScalarLike,
    schedule: AbstractNoiseSchedule,
    *,
    kind: Kind,
) -> Float[Array, "*x"]:
    """The quantity of the given `kind` that belongs to a clean sample and a noise: the regression target.

    **Raises:** `ValueError` for an unknown `kind`.
    """
    if kind == "x0":
        return x_0
    if kind == "eps":
        return eps
    if kind == "score":
        return -eps / schedule.sigma(t)
    if kind == "v":
        return schedule.alpha(t) * eps - schedule.sigma(t) * x_0
    if kind == "velocity":
        return schedule.d_alpha(t) * x_0 + schedule.d_sigma(t) * eps
    raise ValueError(_unknown(kind))


def convert(
    prediction: Float[Array, "*x"],
    x_t: Float[Array, "*x"],
    t: ScalarLike,
    schedule: AbstractNoiseSchedule,
    *,
    source: Kind,
    target: Kind,
) -> Float[Array, "*x"]:
    """The quantity of kind `target` that a prediction of kind `source` implies at x_t and t.

    `convert(x_0, x_t, t, schedule, source="x0", target="velocity")` is the probability-flow velocity of a
    posterior mean. Infinite or NaN where `to_x0_and_eps` says so.

    **Raises:** `ValueError` for an unknown kind.
    """
    x_0, eps = to_x0_and_eps(prediction, x_t, t, schedule, kind=source)
    return from_x0_and_eps(x_0, eps, t, schedule, kind=target)


def converted(
    fn: Callable[[Array, Any], Array], schedule: AbstractNoiseSchedule, *, source: Kind, target: Kind
) -> Callable[[Array, ScalarLike], Array]:
    """A function (x_t, t) -> `target` made from one that predicts `source`.

    `ddim(converted(network, schedule, source="eps", target="x0"), x, ts, schedule)` samples from a network
    that predicts the noise.
    """
    return lambda x_t, t: convert(fn(x_t, t), x_t, t, schedule, source=source, target=target)


def _unknown(kind: str) -> str:
    return f"Unknown kind of prediction {kind!r}; use one of 'x0', 'eps', 'v', 'score', 'velocity'."
