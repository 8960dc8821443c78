"""The protocol of timestep samplers, and how a training loop runs one.

A sampler is a module of hyperparameters; what it learns is a state of its own, without keys, so that (seed, step)
resume a run exactly. Drawing needs the state, learning happens in `update`, which every loop calls after every
step of the optimiser with all it knows; each sampler takes what it needs:

    t, weight, aux = draw = sampler.sample(state, len(x), x=x, key=key)
    ...                                 # one step on mean(weight * losses): model -> new_model
    state = sampler.update(state, draw, losses, before=model, after=new_model, x=x, objective=objective, key=key)

`objective(model, x, t, key)` is the unweighted loss of one example, a mean over its dimensions; `key` draws the
noise. The same function, mapped over the batch, makes the training loss.

Some samplers do work only once every `period` steps, in a "look". `update` counts its calls and branches on the
count with `lax.cond`, which stays a branch under `vmap` over seeds that count together. `period_scan` does
without the branch: one look, then `period - 1` plain steps, as nested scans.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped

from eqgen.timesteps.times import AbstractTimes
from eqgen.tree import filter_cond, filter_scan, shared
from eqgen.types import Metrics


Objective = Callable[[PyTree, PyTree, Array, Key[Array, ""]], Float[Array, ""]]
"""`objective(model, x, t, key)`: the loss of one example at time t, unweighted, a mean over dimensions."""


class Draw(NamedTuple):
    """Times for a batch."""

    t: Shaped[Array, " n *pair"]
    """The times, of the kind that the sampler's `times` are."""
    weight: Float[Array, " n"]
    """What to multiply the losses by."""
    aux: PyTree = None
    """What the sampler wants back in `update`."""


class AbstractTimestepSampler(eqx.Module):
    """Which times a diffusion model is trained at, and with what weight."""

    times: eqx.AbstractVar[AbstractTimes]

    @property
    def period(self) -> int:
        """Steps from one look to the next; 1 for samplers that do not look."""
        return 1

    @abstractmethod
    def init(self, example: PyTree = None, *, key: Key[Array, ""]) -> PyTree:
        """The state before training. `example` is one `x` without a batch axis, for samplers that look at x."""

    @abstractmethod
    def sample(self, state: PyTree, n: int, *, x: PyTree = None, key: Key[Array, ""]) -> Draw:
        """Times and loss weights for a batch of `n` (the data `x`, for samplers that look at them)."""

    @abstractmethod
    def update(
        self,
        state: PyTree,
        draw: Draw,
        losses: Float[Array, " n"] | None = None,
        *,
        before: PyTree = None,
        after: PyTree = None,
        x: PyTree = None,
        objective: Objective | None = None,
        key: Key[Array, ""] | None = None,
        look: bool | None = None,
    ) -> PyTree:
        """The state after a step of the optimiser.

        **Arguments:**

        - `draw`: what `sample` gave for this step.
        - `losses`: the batch's unweighted losses in this step.
        - `before`, `after`: the model before and after the step; the weights that are trained, not an average.
        - `x`: the batch.
        - `objective`: see the module.
        - `key`: for the noise of a look.
        - `look`: whether this step looks. None: once every `period` calls, starting with the first.
        """

    def metrics(self, state: PyTree) -> Metrics:
        """Scalars to log; none for samplers that do not learn."""
        return {}

    @abstractmethod
    def probabilities(self, state: PyTree, x: PyTree = None) -> Float[Array, " cells"]:
        """The present law of t, by cell of `times`; averaged over the batch `x` where it depends on x."""


def required(**values):
    """Raises a `ValueError` that names the arguments of `update` that are missing."""
    if missing := [name for name, value in values.items() if value is None]:
        raise ValueError(f"This timestep sampler needs {', '.join(missing)} in `update`.")


def look_or_keep(
    look: bool | None, step: Int[Array, ""], period: int, looking: Callable[..., PyTree], state: PyTree, *args
) -> PyTree:
    """`looking(state, *args)` where the step is to look, else `state`."""
    if look is None:
        due = shared(step) % period == 0
        return filter_cond(due, looking, lambda state, *args: state, state, *args)
    return looking(state, *args) if look else state


def unit_points(n: int, dims: int, *, low_discrepancy: bool, key: Key[Array, ""]) -> Float[Array, "n dims"]:
    """Uniform points of the unit cube: independent, or a lattice of even spread under one common random shift.

    Each point alone is uniform either way. The lattice has n equal steps in the first coordinate (Kingma et al.
    2021, variational diffusion models, appendix I.1) and the golden ratio in the second.
    """
    if not low_discrepancy:
        return jr.uniform(key, (n, dims))
    steps = jnp.array([[1 / n, (5**0.5 - 1) / 2]])[:, :dims]
    points = (jr.uniform(key, (1, dims)) + jnp.arange(n)[:, None] * steps) % 1.0
    return jnp.where(points < 1, points, 0.0)  # in float32 the remainder may round to 1


def period_scan(
    step: Callable[..., tuple[PyTree, PyTree]], carry: PyTree, xs: PyTree, *, period: int
) -> tuple[PyTree, PyTree]:
    """`lax.scan` of `step(carry, x, look)` with `look` true in steps 0, period, 2 period, ..., and no branch.

    Each period is one look and a scan of plain steps. Steps beyond the last whole period begin with a look of
    their own, so a run cut into pieces looks as often as one in a piece only if the pieces are whole periods.

    **Arguments:**

    - `step`: `(carry, x, look) -> (carry, y)`; `look` is a Python bool, to be passed on to `update`.
    - `carry`: may hold leaves that are not arrays.
    - `xs`: a PyTree with a leading axis, one entry a step.

    **Returns:** the last carry and the stacked outputs.
    """

    def run(carry, xs):
        first, rest = jax.tree.map(lambda x: x[0], xs), jax.tree.map(lambda x: x[1:], xs)
        carry, y = step(carry, first, True)
        if not jax.tree.leaves(rest)[0].shape[0]:
            return carry, jax.tree.map(lambda y: y[None], y)
        carry, ys = filter_scan(partial(step, look=False), carry, rest)
        return carry, jax.tree.map(lambda y, ys: jnp.concatenate([y[None], ys]), y, ys)

    num_steps = jax.tree.leaves(xs)[0].shape[0]
    periods, left = divmod(num_steps, period)
    whole = periods * period
    outputs = []
    if periods:
        by_period = lambda x: x[:whole].reshape(periods, period, *x.shape[1:])
        carry, ys = filter_scan(run, carry, jax.tree.map(by_period, xs))
        outputs.append(jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys))
    if left:
        carry, ys = run(carry, jax.tree.map(lambda x: x[whole:], xs))
        outputs.append(ys)
    return carry, jax.tree.map(lambda *ys: jnp.concatenate(ys), *outputs)
