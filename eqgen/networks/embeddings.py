"""Embeddings of scalars."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def fourier_features(
    t: Float[Array, ""], num_frequencies: int = 8, max_frequency: float = 32.0
) -> Float[Array, " {2*num_frequencies}"]:
    """Sines and cosines of a time in [0, 1] at log-spaced angular frequencies from 1 to `max_frequency` rad.

    Kept low on purpose: MeanFlow differentiates its network in t, and the frequencies of image diffusion
    (up to 1000 rad and more) make that derivative useless (measured on a toy; specs of SOM, pitfall 8).
    """
    angles = t * jnp.geomspace(1.0, max_frequency, num_frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


def sinusoid(
    position: Int[Array, ""], size: int = 16, max_period: float = 10_000.0
) -> Float[Array, " {size}"]:
    """The sinusoidal embedding of a whole number (Vaswani et al., 2017), scaled by 1/sqrt(size).

    Sines, then cosines, of `position max_period^(-j / (size / 2))` for j = 0, ..., size / 2 - 1.
    """
    if size % 2:
        raise ValueError(f"sinusoid: size is {size}; it must be even, one sine and one cosine a frequency.")
    angles = position * max_period ** (-jnp.arange(size // 2) / (size // 2))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)]) / size**0.5
