"""Networks of the adaptive timestep sampler: from a clean example to the raw parameters of its Beta laws.

All end in a layer of zero weights and bias 0.5, so that training starts from one nearly uniform law for every
example (softplus(0.5) = 0.974, Beta(0.974, 0.974)). Inputs are single examples: `jax.vmap` makes batches.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, PyTree

from eqgen.networks.mlp import MLP


OUTPUT_BIAS = 0.5


def _neutral(mlp: MLP) -> MLP:
    """The network with its last layer at zero weights and the bias that starts all laws."""
    last = mlp.layers[-1]
    values = (tuple(jnp.zeros_like(w) for w in last.weights), jnp.full_like(last.bias, OUTPUT_BIAS))
    return eqx.tree_at(lambda mlp: (mlp.layers[-1].weights, mlp.layers[-1].bias), mlp, values)


class SharedPolicy(eqx.Module):
    """The same law for every example."""

    raw: Float[Array, " out"]

    def __init__(self, out_size: int):
        self.raw = jnp.full((out_size,), OUTPUT_BIAS)

    def __call__(self, x: PyTree = None) -> Float[Array, " out"]:
        """`x` is ignored."""
        return self.raw


class OfFirst(eqx.Module):
    """A network on the first entry of a tuple: of an example without its condition."""

    network: PyTree

    def __call__(self, x: tuple[PyTree, ...]) -> Float[Array, " out"]:
        """`x` is a tuple such as (data, label)."""
        return self.network(x[0])


class VectorPolicy(eqx.Module):
    """An MLP on the example, flattened."""

    mlp: MLP

    def __init__(
        self, in_size: int, out_size: int, hidden: tuple[int, ...] = (128, 128), *, key: Key[Array, ""]
    ):
        self.mlp = _neutral(MLP((in_size,), out_size, hidden, "relu", key=key))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " out"]:
        """`x` has `in_size` entries."""
        return self.mlp(x.ravel())


class ImagePolicy(eqx.Module):
    """Three convolutions of 3x3, each with ReLU and 2x2 max pooling, then an MLP (channels first).

    With `pool="flatten"` and the default sizes this is the network of the released code for 3x32x32 images: the
    2048 features of the last 4x4 map go to the MLP. "mean" averages over the map instead, for any image of at
    least 8x8.

    **Arguments:**

    - `shape`: (channels, height, width).
    - `channels`, `hidden`: the sizes of the convolutions and of the MLP's hidden layers.
    - `pool`: "mean" or "flatten".
    """

    convolutions: tuple[eqx.nn.Conv2d, ...]
    mlp: MLP
    pool: str = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, int, int],
        out_size: int,
        channels: tuple[int, ...] = (32, 64, 128),
        hidden: tuple[int, ...] = (256, 256),
        pool: str = "mean",
        *,
        key: Key[Array, ""],
    ):
        if pool not in ("mean", "flatten"):
            raise ValueError(f"pool={pool!r} is not supported; choose 'mean' or 'flatten'.")
        depth, height, width = shape
        shrink = 2 ** len(channels)
        if min(height, width) < shrink:
            raise ValueError(f"An image of {height}x{width} is too small for {len(channels)} poolings by 2.")
        mlp_key, *keys = jr.split(key, 1 + len(channels))
        ins = (depth, *channels[:-1])
        self.convolutions = tuple(
            eqx.nn.Conv2d(i, o, 3, padding=1, key=k) for i, o, k in zip(ins, channels, keys)
        )
        places = (height // shrink) * (width // shrink) if pool == "flatten" else 1
        self.mlp = _neutral(MLP((channels[-1] * places,), out_size, hidden, "relu", key=mlp_key))
        self.pool = pool

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, " out"]:
        """`x` is an image of the `shape` given at construction."""
        for convolution in self.convolutions:
            x = _halved(jax.nn.relu(convolution(x)))
        return self.mlp(x.ravel() if self.pool == "flatten" else jnp.mean(x, axis=(1, 2)))


def _halved(x):
    """Max pooling by 2x2; a last odd row or column is dropped."""
    depth, height, width = x.shape
    even = x[:, : height // 2 * 2, : width // 2 * 2]
    return jnp.max(even.reshape(depth, height // 2, 2, width // 2, 2), axis=(2, 4))


class TrajectoryPolicy(eqx.Module):
    """Convolutions of width 5 and stride 2 along time with ReLU, the mean over time, then an MLP.

    **Arguments:**

    - `num_features`: the length of one entry of the trajectory; its horizon is free.
    - `channels`, `hidden`: the sizes of the convolutions and of the MLP's hidden layers.
    """

    convolutions: tuple[eqx.nn.Conv1d, ...]
    mlp: MLP

    def __init__(
        self,
        num_features: int,
        out_size: int,
        channels: tuple[int, ...] = (64, 64),
        hidden: tuple[int, ...] = (128,),
        *,
        key: Key[Array, ""],
    ):
        mlp_key, *keys = jr.split(key, 1 + len(channels))
        ins = (num_features, *channels[:-1])
        self.convolutions = tuple(
            eqx.nn.Conv1d(i, o, 5, stride=2, padding=2, key=k) for i, o, k in zip(ins, channels, keys)
        )
        self.mlp = _neutral(MLP((channels[-1],), out_size, hidden, "relu", key=mlp_key))

    def __call__(self, x: Float[Array, "horizon features"]) -> Float[Array, " out"]:
        """`x` is one trajectory."""
        x = x.T
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return self.mlp(jnp.mean(x, axis=1))
