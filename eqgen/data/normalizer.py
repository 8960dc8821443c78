"""Z-scores of observations, with dimensions that hardly vary left at their scale."""

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


def _like(vector, x):
    """With as many axes as x: ranks are never promoted silently."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
