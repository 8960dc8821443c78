"""Z-scores, with dimensions that hardly vary left at their scale: of a whole set, or of all rows so far."""

from typing import Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Normalizer(eqx.Module):
    """(x - mean) / std for each dimension."""

    mean: Float[Array, " d"]
    std: Float[Array, " d"]

    @classmethod
    def fit(
        cls, rows: Float[np.ndarray | Array, "n d"], *, floor: float = 1e-6, rows_at_once: int = 2**16
    ) -> "Normalizer":
        """The statistics of all rows, computed in double precision and some rows at a time.

        **Arguments:** `floor`: a standard deviation below it counts as 1, so that a constant dimension (the goal
        that Kitchen's observations carry) becomes 0 and not rounding noise.
        """
        chunks = lambda: (
            np.asarray(rows[i : i + rows_at_once], np.float64) for i in range(0, len(rows), rows_at_once)
        )
        mean = sum(chunk.sum(axis=0) for chunk in chunks()) / len(rows)
        std = np.sqrt(sum(((chunk - mean) ** 2).sum(axis=0) for chunk in chunks()) / len(rows))
        return cls(jnp.asarray(mean, jnp.float32), jnp.asarray(np.where(std < floor, 1.0, std), jnp.float32))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return (x - _like(self.mean, x)) / _like(self.std, x)

    def inverse(self, z: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """The x of which z are the z-scores."""
        return z * _like(self.std, z) + _like(self.mean, z)


class RunningNormalizer(eqx.Module):
    """(x - mean) / std by the statistics of all rows so far; the identity before the first."""

    mean: Float[Array, "*d"]
    variance: Float[Array, "*d"]
    count: Float[Array, ""]

    @classmethod
    def create(cls, shape: tuple[int, ...]) -> Self:
        """Before the first row; `shape` is that of one."""
        return cls(jnp.zeros(shape), jnp.ones(shape), jnp.zeros(()))

    @property
    def std(self) -> Float[Array, "*d"]:
        """The standard deviation; 1 where it is below 1e-6."""
        std = jnp.sqrt(self.variance)
        return jnp.where(std < 1e-6, 1.0, std)

    def update(self, rows: Float[Array, " n *d"]) -> Self:
        """With these rows too: the moments of both parts put together (Chan, Golub and LeVeque, 1983)."""
        count = self.count + len(rows)
        share, gap = len(rows) / count, jnp.mean(rows, axis=0) - self.mean
        variance = (1 - share) * self.variance + share * (jnp.var(rows, axis=0) + (1 - share) * gap**2)
        return type(self)(self.mean + share * gap, variance, count)

    def __call__(self, x: Float[Array, "*b"]) -> Float[Array, "*b"]:
        return (x - _like(self.mean, x)) / _like(self.std, x)

    def inverse(self, z: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The x of which z are the z-scores."""
        return z * _like(self.std, z) + _like(self.mean, z)


def _like(vector, x):
    """With as many axes as x: ranks are never promoted silently."""
    return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)
