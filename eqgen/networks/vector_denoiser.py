"""An MLP that denoises points and flattened images."""

from collections.abc import Callable
from math import prod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from eqgen.networks.embeddings import fourier_features
from eqgen.networks.mlp import MLP


class VectorDenoiser(eqx.Module):
    """The noise (or whatever the loss asks for) in a noised array; the calls of `UNet2D`. A fresh one returns 0.

    An MLP on the array, flattened, on Fourier features of the time from 1 to 1000 rad, which tell neighbours among
    1000 timesteps apart, and on the class. Each has its own block of first-layer weights: where all examples of a
    batch have one time (in a sampler, say), `jax.vmap` computes its share once.

    **Arguments:**

    - `shape`: that of one example, `()` included.
    - `hidden`: the width of each hidden layer.
    - `num_classes`: 0 for a network that takes no label.
    - `activation`: a function, or a name in `ACTIVATIONS`.
    - `residual`: whether a hidden layer adds to its input where both are equally wide.
    - `num_frequencies`: of the time's Fourier features.
    """

    mlp: MLP
    shape: tuple[int, ...] = eqx.field(static=True)
    num_classes: int = eqx.field(static=True)
    num_frequencies: int = eqx.field(static=True)
    residual: bool = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, ...],
        hidden: tuple[int, ...] = (128, 128, 128),
        num_classes: int = 0,
        activation: Callable | str = "silu",
        residual: bool = True,
        num_frequencies: int = 16,
        *,
        key: Key[Array, ""],
    ):
        size = prod(shape)
        in_sizes = (size, 2 * num_frequencies, *([num_classes] if num_classes else []))
        mlp = MLP(in_sizes, size, hidden, activation, key=key)
        self.mlp = eqx.tree_at(lambda mlp: mlp.layers[-1], mlp, jax.tree.map(jnp.zeros_like, mlp.layers[-1]))
        self.shape, self.num_classes = tuple(shape), num_classes
        self.num_frequencies, self.residual = num_frequencies, residual

    def __call__(
        self,
        x: Float[Array, "*shape"],
        t: Float[Array, ""],
        label: Int[Array, ""] | None = None,
        kept: Float[Array, ""] | float = 1.0,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*shape"]:
        """The output for `x` at time `t` in [0, 1].

        **Arguments:**

        - `label`: the class; None is no label, and so is `kept = 0`, which drops it.
        - `key`: ignored; there is nothing random.

        **Raises:** `ValueError` for an array of another shape, and for a label where the network has no classes.
        """
        if x.shape != self.shape:
            raise ValueError(f"VectorDenoiser: x has shape {x.shape}; the network was made for {self.shape}.")
        inputs = [x.ravel(), fourier_features(t, self.num_frequencies, 1000.0)]
        if self.num_classes:
            none = jnp.zeros(self.num_classes)
            inputs.append(none if label is None else kept * jax.nn.one_hot(label, self.num_classes))
        elif label is not None:
            raise ValueError(
                "VectorDenoiser: a label for a network without classes; construct it with num_classes."
            )
        first, *hidden, last = self.mlp.layers
        y = self.mlp.activation(first(*inputs))
        for layer in hidden:
            z = self.mlp.activation(layer(y))
            y = y + z if self.residual and y.shape == z.shape else z
        return last(y).reshape(x.shape)
