"""Beta laws in float32: density, entropy, and bounds on their parameters."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.special import betaln, digamma
from jaxtyping import Array, Float


def beta_log_prob(u: Float[Array, "*n"], a: Float[Array, "*n"], b: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log Beta(u; a, b)."""
    return (a - 1) * jnp.log(u) + (b - 1) * jnp.log1p(-u) - betaln(a, b)


def beta_entropy(a: Float[Array, "*n"], b: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The differential entropy of Beta(a, b): at most 0, which Beta(1, 1) has."""
    inner = (a + b - 2) * digamma(a + b) - (a - 1) * digamma(a) - (b - 1) * digamma(b)
    return betaln(a, b) + inner


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def bounded(x: Float[Array, "*n"], low: float, high: float) -> Float[Array, "*n"]:
    """`clip`, whose gradient is cut only where descent would lead further out, so that no law is stuck there."""
    return jnp.clip(x, low, high)


def _bounded_fwd(x, low, high):
    return jnp.clip(x, low, high), x


def _bounded_bwd(low, high, x, g):
    outwards = ((x <= low) & (g > 0)) | ((x >= high) & (g < 0))
    return (jnp.where(outwards, 0.0, g),)


bounded.defvjp(_bounded_fwd, _bounded_bwd)
