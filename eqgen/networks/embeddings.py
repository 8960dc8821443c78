"""Embeddings of scalars."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def fourier_features(
    t: Float[Array, ""], num_frequencies: int = 8, max_frequency: float = 32.0
) -> Float[Array, " {2*num_frequencies}"]:
    """Sines and cosines of a time in [0, 1] at log-spaced angular frequencies from 1 to `max_frequency` rad.

    Kept low on purpose: MeanFlow differentiates its network in t, and the frequencies of image diffusion
    (up to 1000 rad and more) make that derivative useless (measured on a toy; specs of SOM, pitfall 8).
    """
    angles = t * jnp.geomspace(1.0, max_frequency, num_frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])
