"""Transformers over the states of a plan: the denoiser DiT1D, its one-step form, and a value of whole plans.

A plan is an array `(horizon, obs)`, one token a state. The blocks are those of Diffusion Veteran's and Prior
Guidance's code [C], with its one oddity: the first layer norm of a block replaces the residual stream instead of
branching off it, x <- LN(x); x <- x + attention(x); x <- x + MLP(LN(x)). The Maze2D planner (width 256, depth 2)
has 2,622,996 parameters, as there.
"""

from collections.abc import Callable
from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.nn import initializers
from jaxtyping import Array, Float, Key

from eqgen.networks.embeddings import fourier_features
from eqgen.networks.mlp import mish


Initializer = Callable[..., Array]

_XAVIER = initializers.glorot_uniform()
_ZERO = initializers.zeros
_SMALL = initializers.normal(0.02)


class Linear(eqx.Module):
    """`x @ W + b` on the last axis; the bias begins at 0."""

    weight: Float[Array, "_in out"]
    bias: Float[Array, " out"]

    def __init__(
        self, in_size: int, out_size: int, initializer: Initializer = _XAVIER, *, key: Key[Array, ""]
    ):
        self.weight, self.bias = initializer(key, (in_size, out_size)), jnp.zeros(out_size)

    def __call__(self, x: Float[Array, "*tokens _in"]) -> Float[Array, "*tokens out"]:
        y = x @ self.weight
        return y + self.bias.reshape((1,) * (y.ndim - 1) + self.bias.shape)


def positions(horizon: int, size: int) -> Float[Array, "{horizon} {size}"]:
    """Sines, then cosines, of the token's number times 10000^(-k / (size / 2 - 1)), k = 0, ..., size / 2 - 1."""
    if size % 2 or size < 4:
        raise ValueError(f"positions: size is {size}; it must be even and at least 4.")
    frequencies = 10_000.0 ** (-jnp.arange(size // 2) / (size // 2 - 1))
    angles = jnp.outer(jnp.arange(horizon), frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class Attention(eqx.Module):
    """Unmasked multi-head self-attention (Vaswani et al., 2017)."""

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    num_heads: int = eqx.field(static=True)

    def __init__(self, width: int, num_heads: int, *, key: Key[Array, ""]):
        if width % num_heads:
            raise ValueError(f"Attention: width {width} is no multiple of num_heads={num_heads}.")
        keys = jr.split(key, 4)
        self.query, self.key, self.value, self.out = (Linear(width, width, key=k) for k in keys)
        self.num_heads = num_heads

    def __call__(self, x: Float[Array, "horizon width"]) -> Float[Array, "horizon width"]:
        heads = lambda y: y.reshape(len(x), self.num_heads, -1)
        # The bias of the keys, which the reference has, shifts all scores of a query alike: the softmax ignores it,
        # and its gradient would be rounding alone, which Adam turns into steps of full length.
        q, k, v = heads(self.query(x)), heads(x @ self.key.weight), heads(self.value(x))
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5)
        return self.out(jnp.einsum("hqk,khd->qhd", weights, v).reshape(x.shape))


class FeedForward(eqx.Module):
    """Two layers, four times as wide inside, with tanh-GELU."""

    inner: Linear
    outer: Linear

    def __init__(self, width: int, *, key: Key[Array, ""]):
        keys = jr.split(key)
        self.inner = Linear(width, 4 * width, key=keys[0])
        self.outer = Linear(4 * width, width, key=keys[1])

    def __call__(self, x: Float[Array, "horizon width"]) -> Float[Array, "horizon width"]:
        return self.outer(jax.nn.gelu(self.inner(x), approximate=True))


class Block(eqx.Module):
    """A transformer block. With an embedding it is modulated: every shift, scale and gate begins at 0."""

    norm1: eqx.nn.LayerNorm
    attention: Attention
    norm2: eqx.nn.LayerNorm
    feed_forward: FeedForward
    modulation: Linear | None

    def __init__(self, width: int, num_heads: int, modulated: bool, *, key: Key[Array, ""]):
        keys = jr.split(key, 3)
        self.norm1, self.norm2 = (eqx.nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention = Attention(width, num_heads, key=keys[0])
        self.feed_forward = FeedForward(width, key=keys[1])
        self.modulation = Linear(width, 6 * width, _ZERO, key=keys[2]) if modulated else None

    def __call__(
        self, x: Float[Array, "horizon width"], embedding: Float[Array, " width"] | None = None
    ) -> Float[Array, "horizon width"]:
        if self.modulation is None:
            x = jax.vmap(self.norm1)(x)
            x = x + self.attention(x)
            return x + self.feed_forward(jax.vmap(self.norm2)(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            self.modulation(jax.nn.silu(cast(Array, embedding)))[None], 6, axis=1
        )
        x = (1 + scale1) * jax.vmap(self.norm1)(x) + shift1
        x = x + gate1 * self.attention(x)
        return x + gate2 * self.feed_forward((1 + scale2) * jax.vmap(self.norm2)(x) + shift2)


class Head(eqx.Module):
    """A modulated layer norm and a linear map that begins at 0, so that a fresh network returns 0."""

    norm: eqx.nn.LayerNorm
    modulation: Linear
    out: Linear

    def __init__(self, width: int, out_size: int, *, key: Key[Array, ""]):
        self.norm = eqx.nn.LayerNorm(width, eps=1e-6)
        self.modulation = Linear(width, 2 * width, _ZERO, key=key)
        self.out = Linear(width, out_size, _ZERO, key=key)

    def __call__(
        self, x: Float[Array, "horizon width"], embedding: Float[Array, " width"]
    ) -> Float[Array, "horizon out"]:
        shift, scale = jnp.split(self.modulation(jax.nn.silu(embedding))[None], 2, axis=1)
        return self.out((1 + scale) * jax.vmap(self.norm)(x) + shift)


class TwoLayers(eqx.Module):
    """Linear, activation, Linear."""

    inner: Linear
    outer: Linear
    activation: Callable = eqx.field(static=True)

    def __init__(self, sizes: tuple[int, int, int], activation: Callable = mish, *, key: Key[Array, ""]):
        keys, (a, b, c) = jr.split(key), sizes
        self.inner, self.outer = Linear(a, b, _SMALL, key=keys[0]), Linear(b, c, _SMALL, key=keys[1])
        self.activation = activation

    def __call__(self, x: Float[Array, " _in"]) -> Float[Array, " out"]:
        return self.outer(self.activation(self.inner(x)))


class TimeEmbedding(eqx.Module):
    """Random Fourier features cos, sin(2 pi f t) of a diffusion time, f ~ 16 N(0, 1), through two layers.

    The frequencies are parameters that are trained, as in Prior Guidance's code [C].
    """

    frequencies: Float[Array, " half"]
    layers: TwoLayers

    def __init__(self, size: int, num_frequencies: int = 16, *, key: Key[Array, ""]):
        keys = jr.split(key)
        self.frequencies = 16 * jr.normal(keys[0], (num_frequencies,))
        self.layers = TwoLayers((2 * num_frequencies, size, size), key=keys[1])

    def __call__(self, t: Float[Array, ""]) -> Float[Array, " size"]:
        angles = 2 * jnp.pi * self.frequencies * t
        return self.layers(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)]))


class LabelEmbedding(eqx.Module):
    """A number as a vector; no number is 0."""

    layers: TwoLayers

    def __init__(self, size: int, *, key: Key[Array, ""]):
        self.layers = TwoLayers((1, size, size), jax.nn.silu, key=key)

    def __call__(
        self, label: Float[Array, ""] | None, kept: Float[Array, ""] | float = 1.0
    ) -> Float[Array, " size"] | float:
        """`kept = 0` drops the label."""
        return 0.0 if label is None else kept * self.layers(label[None])


class Transformer(eqx.Module):
    """Tokens, positions, modulated blocks, head: what the denoiser and the mean velocity share."""

    tokens: Linear
    embedding: TwoLayers
    blocks: tuple[Block, ...]
    head: Head

    def __init__(
        self, obs_size: int, width: int, depth: int, num_heads: int, embed_size: int, *, key: Key[Array, ""]
    ):
        token_key, embed_key, head_key, *keys = jr.split(key, 3 + depth)
        self.tokens = Linear(obs_size, width, key=token_key)
        self.embedding = TwoLayers((embed_size, width, width), key=embed_key)
        self.blocks = tuple(Block(width, num_heads, modulated=True, key=k) for k in keys)
        self.head = Head(width, obs_size, key=head_key)

    def __call__(
        self, x: Float[Array, "horizon obs"], embedded: Float[Array, " embed"]
    ) -> Float[Array, "horizon obs"]:
        embedding = mish(self.embedding(embedded))
        y = self.tokens(x)
        y = y + positions(*y.shape)
        for block in self.blocks:
            y = block(y, embedding)
        return self.head(y, embedding)


class DiT1D(eqx.Module):
    """The noise in a noised plan, by a diffusion transformer (Peebles & Xie, 2023) over its states.

    **Arguments:**

    - `width`, `depth`, `num_heads`: of the transformer.
    - `embed_size`: the width of the embeddings of time and label.
    - `conditional`: whether the network takes a label (classifier-free guidance).
    """

    transformer: Transformer
    time: TimeEmbedding
    label: LabelEmbedding | None

    def __init__(
        self,
        obs_size: int,
        width: int = 256,
        depth: int = 2,
        num_heads: int = 4,
        embed_size: int = 128,
        conditional: bool = False,
        *,
        key: Key[Array, ""],
    ):
        keys = jr.split(key, 3)
        self.transformer = Transformer(obs_size, width, depth, num_heads, embed_size, key=keys[0])
        self.time = TimeEmbedding(embed_size, key=keys[1])
        self.label = LabelEmbedding(embed_size, key=keys[2]) if conditional else None

    def __call__(
        self,
        x: Float[Array, "horizon obs"],
        t: Float[Array, ""],
        label: Float[Array, ""] | None = None,
        kept: Float[Array, ""] | float = 1.0,
    ) -> Float[Array, "horizon obs"]:
        """The noise in `x` at time `t` in [0, 1]; `kept = 0` drops the label, None is no label."""
        embedded = self.time(t)
        if self.label is not None:
            embedded = embedded + self.label(label, kept)
        return self.transformer(x, embedded)


class MeanVelocityDiT1D(eqx.Module):
    """The velocity of a noised plan averaged over [r, t], for planning in one evaluation (MeanFlow).

    The transformer of `DiT1D` with low Fourier features of t and of the gap t - r: MeanFlow differentiates in t.
    """

    transformer: Transformer
    times: TwoLayers
    num_frequencies: int = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        width: int = 256,
        depth: int = 2,
        num_heads: int = 4,
        embed_size: int = 128,
        num_frequencies: int = 16,
        *,
        key: Key[Array, ""],
    ):
        keys = jr.split(key)
        self.transformer = Transformer(obs_size, width, depth, num_heads, embed_size, key=keys[0])
        self.times = TwoLayers((4 * num_frequencies, embed_size, embed_size), key=keys[1])
        self.num_frequencies = num_frequencies

    def __call__(
        self, x: Float[Array, "horizon obs"], r: Float[Array, ""], t: Float[Array, ""]
    ) -> Float[Array, "horizon obs"]:
        """The average velocity over [r, t] of the path that is at `x` at time t."""
        embed = lambda s: fourier_features(s, self.num_frequencies)
        return self.transformer(x, self.times(jnp.concatenate([embed(t), embed(t - r)])))


class HorizonCritic(eqx.Module):
    """The value of a plan, read at its first token (Diffusion Veteran's critic [C]).

    Also the value of a latent: the plan's first state, then the noise of the others.
    """

    tokens: Linear
    blocks: tuple[Block, ...]
    out: Linear

    def __init__(
        self, obs_size: int, width: int = 256, depth: int = 2, num_heads: int = 4, *, key: Key[Array, ""]
    ):
        token_key, out_key, *keys = jr.split(key, 2 + depth)
        self.tokens = Linear(obs_size, width, key=token_key)
        self.blocks = tuple(Block(width, num_heads, modulated=False, key=k) for k in keys)
        self.out = Linear(width, 1, key=out_key)

    def __call__(self, plan: Float[Array, "horizon obs"]) -> Float[Array, ""]:
        y = self.tokens(plan)
        y = y + positions(*y.shape)
        for block in self.blocks:
            y = block(y)
        return self.out(y[0])[0]
