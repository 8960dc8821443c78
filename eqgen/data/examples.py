"""What a diffusion model learns from: examples without time, in a set to draw batches from."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Key, Num, UInt8


class Examples(NamedTuple):
    """Points, images or paths. The axes of `label` are the batch's; `x` has those of one example besides."""

    x: Float[Array, "..."]
    label: Int[Array, "*batch"] | None = None


def from_levels(values: UInt8[Array, "..."], levels: int) -> Float[Array, "..."]:
    """The numbers in [-1, 1] that the levels 0 .. `levels` - 1 of grey stand for, 2 v / (`levels` - 1) - 1."""
    # From a table: compiled or not, arithmetic is rounded in different ways.
    return jnp.asarray(2 * np.arange(levels) / (levels - 1) - 1, jnp.float32)[values]


def to_levels(x: Float[Array, "..."], levels: int) -> UInt8[Array, "..."]:
    """The nearest level to each number; the inverse of `from_levels`."""
    return jnp.round((jnp.clip(x, -1, 1) + 1) * ((levels - 1) / 2)).astype(jnp.uint8)


class ExampleData(eqx.Module):
    """A set of n examples on the device, to draw from; it is an `eqgen.offline.Data`.

    Images are kept as bytes and become floats as they are drawn: CIFAR-10 takes 150 MB, not 600.
    """

    values: UInt8[Array, "n ..."] | Float[Array, "n ..."]
    labels: Int[Array, " n"] | None
    levels: int | None = eqx.field(static=True)
    """How many levels of grey there are; None: the values are continuous."""

    def __init__(
        self,
        values: Num[Array | np.ndarray, "n ..."],
        labels: Integer[Array | np.ndarray, " labels"] | None = None,
        *,
        levels: int | None = None,
    ):
        """**Arguments:**

        - `values`: one example per row; whole numbers in 0 .. `levels` - 1, or any if `levels` is None.
        - `labels`: one class per row, if there are classes.

        **Raises:** `ValueError` for a set without examples, for other than one label per example, and for values
        that are no levels or not finite.
        """
        values = np.asarray(values)  # which compares levels without overflow, whatever integers they are
        if values.size == 0:
            raise ValueError(f"values has shape {values.shape}: there are no examples.")
        if labels is not None and len(labels) != len(values):
            raise ValueError(f"There are {len(labels)} labels for {len(values)} examples.")
        if levels is None:
            good, wanted = np.isfinite(values), "a finite number"
        else:
            if not 2 <= levels <= 256:
                raise ValueError(f"levels is {levels}; 2 to 256 fit into a byte.")
            if values.dtype.kind not in "iu":
                raise ValueError(f"values are {values.dtype}; levels are whole numbers.")
            good, wanted = (values >= 0) & (values < levels), f"one of 0 .. {levels - 1}"
        if not good.all():
            row = int(np.argmin(good.reshape(len(values), -1).all(axis=1)))
            raise ValueError(f"Example {row} holds {values[row][~good[row]][0]}, which is not {wanted}.")
        self.values = jnp.asarray(values, jnp.float32 if levels is None else jnp.uint8)
        self.labels = None if labels is None else jnp.asarray(labels, jnp.int32)
        self.levels = levels

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.values.shape[1:]

    @property
    def half_bin(self) -> float | None:
        """Half the distance between two levels, as the likelihood of a discretised Gaussian needs it; None where
        values are continuous."""
        return None if self.levels is None else 1 / (self.levels - 1)

    def take(self, i: Int[Array, "*b"]) -> Examples:
        """The examples of these numbers, levels as floats in [-1, 1]."""
        x = self.values[i]
        x = x if self.levels is None else from_levels(x, self.levels)
        return Examples(x, None if self.labels is None else self.labels[i])

    def sample(self, n: int, *, key: Key[Array, ""]) -> Examples:
        """`n` examples drawn uniformly with replacement."""
        return self.take(jr.randint(key, (n,), 0, len(self)))

    def examples(self) -> Examples:
        """All of them."""
        return self.take(jnp.arange(len(self)))

    def split(self, held_out: int | float, *, key: Key[Array, ""]) -> tuple["ExampleData", "ExampleData"]:
        """A random split; both parts keep the order of the rows.

        **Arguments:** `held_out`: how many examples, or as a float which fraction of them.

        **Returns:** what is left to train on, and what was held out.

        **Raises:** `ValueError` when one of the two would be empty.
        """
        count = round(held_out * len(self)) if isinstance(held_out, float) else held_out
        if not 0 < count < len(self):
            raise ValueError(
                f"held_out is {held_out}, {count} of {len(self)} examples; both parts need at least one."
            )
        rows = np.asarray(jr.permutation(key, len(self)))
        return self._rows(np.sort(rows[count:])), self._rows(np.sort(rows[:count]))

    def _rows(self, rows):
        labels = None if self.labels is None else np.asarray(self.labels)[rows]
        return ExampleData(np.asarray(self.values)[rows], labels, levels=self.levels)
