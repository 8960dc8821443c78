"""Univariate feature selection on the device: which columns of a table explain its row sums."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def select_columns(
    queue: Float[Array, "rows columns"],
    size: Int[Array, ""],
    *,
    subset_size: int,
    ranking: Literal["r2", "f"] = "r2",
) -> tuple[Int[Array, " {subset_size}"], Bool[Array, ""]]:
    """The columns that, each alone, explain the row sums best in a linear regression, best first.

    Univariate feature selection over the first `size` rows (scikit-learn's `SelectKBest(f_regression)`), with the
    squared correlation r^2 or F = r^2 / (1 - r^2) (size - 2), which ranks alike but where it is 0 / 0 or 1 / 0:
    for two rows all F are 0 and the last columns win. Columns that do not vary have r^2 = 0.

    **Returns:** the columns, and whether the row sums vary at all; if not, the choice means nothing.
    """
    filled = jnp.arange(len(queue)) < size
    columns = jnp.where(filled[:, None], queue, 0.0)
    total = jnp.sum(columns, axis=1, keepdims=True)
    xs, y = _standardised(columns, filled), _standardised(total, filled)
    r2 = jnp.minimum(jnp.sum(xs * y, axis=0) ** 2, 1.0)
    if ranking == "r2":
        return jax.lax.top_k(r2, subset_size)[1], jnp.any(y != 0)
    f = r2 / jnp.maximum(1 - r2, jnp.finfo(r2.dtype).eps) * (size - 2)
    last_first = jax.lax.top_k(f[::-1], subset_size)[1]
    return len(f) - 1 - last_first, jnp.any(y != 0)


def _standardised(columns, filled):
    """Columns of mean 0 and norm 1 over the filled rows; 0 where a column does not vary but by round-off."""
    count = jnp.maximum(jnp.sum(filled), 1)
    centred = jnp.where(filled[:, None], columns - jnp.sum(columns, axis=0, keepdims=True) / count, 0.0)
    largest = jnp.max(jnp.abs(columns), axis=0, keepdims=True)
    scaled = centred / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.linalg.norm(scaled, axis=0, keepdims=True)
    varies = norm > 1e-6 * jnp.sqrt(count)
    return jnp.where(varies, scaled / jnp.where(varies, norm, 1.0), 0.0)
