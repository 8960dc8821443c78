"""Flows and diffusions solved by Diffrax: flow maps, probability-flow ODE, reverse SDE, log-likelihood.

For reference solutions, tolerances instead of step counts, and gradients through a solve; the fixed-step
samplers of `eqgen.samplers` need no Diffrax. All take one example and are meant to be vmapped; every example
then has its own adaptive steps.

Song et al., "Score-based generative modeling through stochastic differential equations" (2021); Chen et al.,
"Neural ordinary differential equations" (2018); Grathwohl et al., "FFJORD" (2019); Kidger, "On neural
differential equations" (2021), for the solvers.
"""

from collections.abc import Callable
from typing import cast

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax
from jaxtyping import Array, Float, Key, PyTree, Scalar, ScalarLike

from eqgen.parameterizations import converted
from eqgen.schedules import AbstractNoiseSchedule


def flow_map(
    velocity: Callable[[Array, Scalar], Array],
    x: Float[Array, "*x"],
    t: ScalarLike,
    r: ScalarLike,
    *,
    ts: Float[Array, " times"] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    num_steps: int | None = None,
    max_steps: int = 4096,
    adjoint: diffrax.AbstractAdjoint | None = None,
    throw: bool = True,
) -> tuple[Float[Array, "*x"], Float[Array, " times *x"]]:
    """The solution at time r of dx/dtau = velocity(x, tau) that is x at time t.

    Either may be the later one, or both be equal (then x_r = x); both may be traced and differ between the
    examples of a vmap, since what is solved is dx/ds = (r - t) velocity(x, t + s (r - t)) on s in [0, 1].

    **Arguments:**

    - `velocity`: dx/dtau at (x, tau).
    - `x`, `t`, `r`: one example of any shape, its time, and the time wanted.
    - `ts`: times, in order from t to r, at which `path` is wanted, interpolated by the solver. None: t and r.
    - `solver`: `diffrax.Tsit5()` if None.
    - `rtol`, `atol`: tolerances of the adaptive steps.
    - `num_steps`: takes this many equal steps instead, whatever the tolerances.
    - `max_steps`: after so many adaptive steps the solve has failed.
    - `adjoint`: how to differentiate, `diffrax.RecursiveCheckpointAdjoint()` (reverse mode) if None.
    - `throw`: whether a failed solve raises an error; if not, its result is NaN.

    **Returns:** (x_r, path).
    """
    t, r = jnp.asarray(t, x.dtype), jnp.asarray(r, x.dtype)
    save = None
    if ts is not None:
        save = jnp.clip((ts - t) / jnp.where(r == t, 1, r - t), 0, 1)
    field = lambda tau, x: velocity(x, tau)
    x_r, path = _solve(field, x, t, r, save, solver, (rtol, atol), num_steps, max_steps, adjoint, throw)
    return x_r, jnp.stack([x, x_r]) if ts is None else path


def probability_flow(
    score: Callable[[Array, Scalar], Array],
    x: Float[Array, "*x"],
    schedule: AbstractNoiseSchedule,
    *,
    t_max: ScalarLike = 1.0,
    t_min: ScalarLike = 1e-3,
    ts: Float[Array, " times"] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    num_steps: int | None = None,
) -> tuple[Float[Array, "*x"], Float[Array, " times *x"]]:
    """Samples by the probability-flow ODE dx/dt = f(t) x - g^2(t) score(x, t) / 2 (Song et al., eq. 13).

    **Arguments:**

    - `score`: the gradient of log p_t at (x, t).
    - `x`: the state at `t_max`, usually `schedule.prior_std * jr.normal(key, shape)`.
    - `t_max`, `t_min`: from where to where; `t_min` > 0, and `t_max` < 1 for `LinearFlow`, where f(1) is
        infinite. With the two exchanged the same ODE encodes data as noise.
    - the others: as in `flow_map`.

    **Returns:** (x at `t_min`, path).
    """
    velocity = converted(score, schedule, source="score", target="velocity")
    return flow_map(
        velocity, x, t_max, t_min, ts=ts, solver=solver, rtol=rtol, atol=atol, num_steps=num_steps
    )


def reverse_sde(
    score: Callable[[Array, Scalar], Array],
    x: Float[Array, "*x"],
    schedule: AbstractNoiseSchedule,
    *,
    num_steps: int,
    key: Key[Array, ""],
    t_max: ScalarLike = 1.0,
    t_min: ScalarLike = 1e-3,
    solver: diffrax.AbstractSolver | None = None,
) -> tuple[Float[Array, "*x"], Float[Array, " times *x"]]:
    """Samples by the reverse-time SDE dx = (f(t) x - g^2(t) score(x, t)) dt + g(t) dW (Song et al., eq. 6).

    Solved forward in the time s = t_max - t that has passed, with the sign of the drift turned round, in
    equal steps. The noise is additive, so solvers of the Ito and of the Stratonovich kind agree on what they
    solve. It has forward-mode derivatives only; `samplers.ddpm` has both.

    **Arguments:**

    - `score`, `x`, `t_max`, `t_min`: as in `probability_flow`.
    - `num_steps`: equal steps from `t_max` to `t_min`.
    - `solver`: one that needs Brownian increments only; `diffrax.Euler()` (Euler-Maruyama) if None.

    **Returns:** (x at `t_min`, path at all `num_steps + 1` times).
    """
    t_max = jnp.asarray(t_max, x.dtype)
    grid = jnp.linspace(0, 1, num_steps + 1, dtype=x.dtype) * (t_max - t_min)

    def drift(s, x, args):
        t = t_max - s
        return schedule.diffusion_squared(t) * score(x, t) - schedule.drift(t) * x

    def diffusion(s, x, args):
        g = jnp.sqrt(schedule.diffusion_squared(t_max - s))
        return g * lineax.IdentityLinearOperator(jax.eval_shape(lambda: x))

    # "Unsafe" with adaptive steps only; with fixed ones it draws independent increments, at a fifteenth of the
    # time of a Brownian tree. Diffrax has no reverse mode through it.
    brownian = diffrax.UnsafeBrownianPath(jax.eval_shape(lambda: x), key)
    solution = diffrax.diffeqsolve(
        diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, brownian)),
        diffrax.Euler() if solver is None else solver,
        grid[0],
        grid[-1],
        None,
        x,
        saveat=diffrax.SaveAt(t0=True, steps=True),
        stepsize_controller=diffrax.StepTo(grid),
        max_steps=num_steps,
        adjoint=diffrax.ForwardMode(),
    )
    path = cast(Array, solution.ys)  # there is one, as `saveat` asks for it
    return path[-1], path


def log_likelihood(
    velocity: Callable[[Array, Scalar], Array],
    x_0: Float[Array, "*x"],
    schedule: AbstractNoiseSchedule,
    *,
    t_min: ScalarLike = 1e-3,
    t_max: ScalarLike = 1.0,
    key: Key[Array, ""] | None = None,
    solver: diffrax.AbstractSolver | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    num_steps: int | None = None,
    max_steps: int = 4096,
) -> Float[Array, ""]:
    """log p(x_0) in nats under the flow dx/dt = velocity(x, t) that starts from x_1 ~ N(0, sigma(t_max)^2 I).

    The instantaneous change of variables, log p_{t_min}(x_0) = log p_{t_max}(x_{t_max}) + int div
    velocity(x_t, t) dt over [t_min, t_max] (Chen et al., 2018, theorem 1; Song et al., 2021, eq. 39), solved
    together with the flow.

    **Arguments:**

    - `velocity`: the drift of the probability-flow ODE; `parameterizations.converted` makes it from a score.
    - `x_0`: one example of any shape, taken to be the state at `t_min`.
    - `t_min`, `t_max`: where the data and the Gaussian prior sit.
    - `key`: None computes the divergence exactly, by as many Jacobian-vector products as x_0 has entries. A
        key estimates it without bias by a single one, with a Rademacher vector kept through the solve
        (Hutchinson; Grathwohl et al., 2019); average over keys for less variance.
    - the others: as in `flow_map`.
    """
    if key is None:
        probes = jnp.eye(x_0.size, dtype=x_0.dtype).reshape(x_0.size, *x_0.shape)
    else:
        probes = jr.rademacher(key, (1, *x_0.shape), x_0.dtype)

    def field(t, state):
        v, push = jax.linearize(lambda x: velocity(x, t), state[0])
        return v, jnp.sum(probes * jax.vmap(push)(probes))

    t_min, t_max = jnp.asarray(t_min, x_0.dtype), jnp.asarray(t_max, x_0.dtype)
    start = (x_0, jnp.zeros((), x_0.dtype))
    tolerances = (rtol, atol)
    (x_1, integral), _ = _solve(field, start, t_min, t_max, None, solver, tolerances, num_steps, max_steps)
    return jnp.sum(jax.scipy.stats.norm.logpdf(x_1, scale=schedule.sigma(t_max))) + integral


def _solve(
    field: Callable[[Scalar, PyTree], PyTree],
    y: PyTree,
    t: Scalar,
    r: Scalar,
    save: Float[Array, " times"] | None,
    solver: diffrax.AbstractSolver | None,
    tolerances: tuple[float, float],
    num_steps: int | None,
    max_steps: int,
    adjoint: diffrax.AbstractAdjoint | None = None,
    throw: bool = True,
) -> tuple[PyTree, PyTree]:
    """The solution at r of dy/dtau = field(tau, y), and at the fractions `save` of the way there."""

    def scaled_field(s, y, args):
        return jax.tree.map(lambda v: (r - t) * v, field(t + s * (r - t), y))

    if num_steps is None:
        rtol, atol = tolerances
        controller = diffrax.PIDController(rtol=rtol, atol=atol)
    else:
        controller, max_steps = diffrax.StepTo(jnp.linspace(0, 1, num_steps + 1, dtype=t.dtype)), num_steps
    at_end = diffrax.SubSaveAt(t1=True)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(scaled_field),
        diffrax.Tsit5() if solver is None else solver,
        jnp.zeros((), t.dtype),
        jnp.ones((), t.dtype),
        None,
        y,
        saveat=diffrax.SaveAt(subs=(at_end, None if save is None else diffrax.SubSaveAt(ts=save))),
        stepsize_controller=controller,
        max_steps=max_steps,
        adjoint=diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        throw=throw,
    )
    failed = solution.result != diffrax.RESULTS.successful
    end, path = cast(tuple[PyTree, PyTree], solution.ys)
    return jax.tree.map(lambda y: jnp.where(failed, jnp.nan, y[0]), end), path
