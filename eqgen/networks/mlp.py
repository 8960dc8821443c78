"""Multilayer perceptrons whose first layer is split by input.

Two choices make these fast on a CPU. Weights are stored as (in, out), so that a vmapped call is the matrix
product `X @ W` and its gradient `dY @ W.T`: no transposed copies of the activations. And the first layer
keeps one block of weights per input: where an input is not mapped over (the observation, when many candidate
actions are scored), `jax.vmap` computes its share once instead of once per candidate.
"""

from collections.abc import Callable

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


class SplitLinear(eqx.Module):
    """An affine map of several vectors, `sum_i x_i @ W_i + b`, initialised as one layer over all of them.

    Weights and bias are uniform in plus or minus 1/sqrt(total input size).
    """

    weights: tuple[Float[Array, "_in out"], ...]
    bias: Float[Array, " out"]

    def __init__(self, in_sizes: tuple[int, ...], out_size: int, *, key: Key[Array, ""]):
        keys = jr.split(key, len(in_sizes) + 1)
        bound = sum(in_sizes) ** -0.5
        self.weights = tuple(
            jr.uniform(k, (n, out_size), minval=-bound, maxval=bound) for k, n in zip(keys, in_sizes)
        )
        self.bias = jr.uniform(keys[-1], (out_size,), minval=-bound, maxval=bound)

    def __call__(self, *inputs: Float[Array, " _in"]) -> Float[Array, " out"]:
        """`inputs[i]` has shape `(in_sizes[i],)`."""
        return sum(x @ weight for x, weight in zip(inputs, self.weights, strict=True)) + self.bias


class MLP(eqx.Module):
    """A multilayer perceptron of one or several input vectors.

    **Arguments:**

    - `in_sizes`: the length of each input.
    - `out_size`: the length of the output, or "scalar" for an output of shape `()`.
    - `hidden`: the width of each hidden layer.
    - `activation`: elementwise, after every hidden layer: a function, or a name in `ACTIVATIONS`.
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
        *,
        key: Key[Array, ""],
    ):
        self.scalar = out_size == "scalar"
        ins = [tuple(in_sizes), *((width,) for width in hidden)]
        outs = [*hidden, 1 if self.scalar else out_size]
        keys = jr.split(key, len(outs))
        self.layers = tuple(SplitLinear(i, o, key=k) for i, o, k in zip(ins, outs, keys))
        self.activation = ACTIVATIONS[activation] if isinstance(activation, str) else activation

    def __call__(self, *inputs: Float[Array, " _in"]) -> Float[Array, " out"] | Float[Array, ""]:
        """`inputs[i]` has shape `(in_sizes[i],)`."""
        first, *rest = self.layers
        x = first(*inputs)
        for layer in rest:
            x = layer(self.activation(x))
        return x[0] if self.scalar else x
