"""Multilayer perceptrons whose first layer is split by input.

Two choices make these fast on a CPU. Weights are stored as (in, out), so that a vmapped call is the matrix
product `X @ W` and its gradient `dY @ W.T`: no transposed copies of the activations. And the first layer
keeps one block of weights per input: where an input is not mapped over (the observation, when many candidate
actions are scored), `jax.vmap` computes its share once instead of once per candidate, and a loop that changes
only some inputs can `fold` the others into the bias beforehand.
"""

from collections.abc import Callable
from typing import Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key


@jax.custom_jvp
def mish(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x tanh(softplus(x))` (Misra, 2019), as the equal `x n / (n + 2)` with `n = e^x (e^x + 2)`.

    One exponential for value and derivative instead of three transcendental functions. Beyond x = 20, where
    `n` would overflow in float32 long before it matters, the ratio is 1 to machine precision.
    """
    return x * _gate(x)[0]


def _gate(x):
    e = jnp.exp(jnp.minimum(x, 20.0))
    n = e * (e + 2.0)
    inverse = 1.0 / (n + 2.0)
    return n * inverse, 4.0 * e * (e + 1.0) * inverse * inverse


@mish.defjvp
def _mish_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    gate, d_gate = _gate(x)
    return x * gate, dx * (gate + x * d_gate)


ACTIVATIONS: dict[str, Callable] = {
    "mish": mish,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
}
"""Activations by the name that settings files and the command line use."""


Initialization = Literal["uniform", "truncated_normal"]


class SplitLinear(eqx.Module):
    """An affine map of several vectors, `sum_i x_i @ W_i + b`, initialised as one layer over all n inputs.

    "uniform": weights and bias uniform in plus or minus 1/sqrt(n), as PyTorch does. "truncated_normal": weights
    normal of scale 1/sqrt(n) cut off at two of them, bias 0, as Haiku does.
    """

    weights: tuple[Float[Array, "_in out"], ...]
    bias: Float[Array, " out"]

    def __init__(
        self,
        in_sizes: tuple[int, ...],
        out_size: int,
        initialization: Initialization = "uniform",
        *,
        key: Key[Array, ""],
    ):
        *keys, bias_key = jr.split(key, len(in_sizes) + 1)
        scale, shapes = sum(in_sizes) ** -0.5, [(n, out_size) for n in in_sizes]
        match initialization:
            case "uniform":
                draw = lambda key, shape: jr.uniform(key, shape, minval=-scale, maxval=scale)
                self.bias = draw(bias_key, (out_size,))
            case "truncated_normal":
                draw = lambda key, shape: scale * jr.truncated_normal(key, -2.0, 2.0, shape)
                self.bias = jnp.zeros(out_size)
            case _:
                raise ValueError(
                    f"initialization={initialization!r} is not supported; choose one of {get_args(Initialization)}"
                )
        self.weights = tuple(draw(key, shape) for key, shape in zip(keys, shapes))

    def __call__(self, *inputs: Float[Array, " _in"]) -> Float[Array, " out"]:
        """`inputs[i]` has shape `(in_sizes[i],)`."""
        return sum(x @ weight for x, weight in zip(inputs, self.weights, strict=True)) + self.bias

    def fold(self, index: int, x: Float[Array, " _in"]) -> "SplitLinear":
        """The map of the other inputs that has input `index` fixed to `x`, its share part of the bias."""
        *before, weight = self.weights[: index + 1]
        weights = (*before, *self.weights[index + 1 :])
        return eqx.tree_at(lambda layer: (layer.weights, layer.bias), self, (weights, self.bias + x @ weight))


class MLP(eqx.Module):
    """A multilayer perceptron of one or several input vectors.

    **Arguments:**

    - `in_sizes`: the length of each input.
    - `out_size`: the length of the output, or "scalar" for an output of shape `()`.
    - `hidden`: the width of each hidden layer.
    - `activation`: elementwise, after every hidden layer: a function, or a name in `ACTIVATIONS`.
    - `initialization`: that of every layer, see [`SplitLinear`][].
    """

    layers: tuple[SplitLinear, ...]
    activation: Callable = eqx.field(static=True)
    scalar: bool = eqx.field(static=True)

    def __init__(
        self,
        in_sizes: tuple[int, ...],
        out_size: int | str,
        hidden: tuple[int, ...],
        activation: Callable | str = mish,
        initialization: Initialization = "uniform",
        *,
        key: Key[Array, ""],
    ):
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(
                f"There is no activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}."
            )
        self.scalar = out_size == "scalar"
        ins = [tuple(in_sizes), *((width,) for width in hidden)]
        outs = [*hidden, 1 if self.scalar else out_size]
        keys = jr.split(key, len(outs))
        self.layers = tuple(SplitLinear(i, o, initialization, key=k) for i, o, k in zip(ins, outs, keys))
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else activation

    def __call__(self, *inputs: Float[Array, " _in"]) -> Float[Array, " out"] | Float[Array, ""]:
        """`inputs[i]` has shape `(in_sizes[i],)`."""
        first, *rest = self.layers
        x = first(*inputs)
        for layer in rest:
            x = layer(self.activation(x))
        return x[0] if self.scalar else x

    def fold(self, index: int, x: Float[Array, " _in"]) -> "MLP":
        """The network of the other inputs that has input `index` fixed to `x`.

        For loops that call it many times with the same `x`: the product with its weights is done here, once.
        """
        first, *rest = self.layers
        return eqx.tree_at(lambda mlp: mlp.layers, self, (first.fold(index, x), *rest))

    def shift(self, share: Float[Array, " width"]) -> "MLP":
        """The network with `share` added to the bias of its first layer: what an input folded elsewhere adds."""
        bias = lambda mlp: mlp.layers[0].bias
        return eqx.tree_at(bias, self, bias(self) + share)
