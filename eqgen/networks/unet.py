"""The 1-D U-Net of Diffuser, and half of one as the value of a noised plan.

Janner, Du, Tenenbaum and Levine, "Planning with diffusion for flexible behavior synthesis" (2022), in the sizes of
CleanDiffuser's `JannerUNet1d` [C]. Plans are `(horizon, obs)`; inside, convolutions have `(channels, horizon)`.
"""

import itertools

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from eqgen.networks.mlp import mish
from eqgen.networks.temporal import LabelEmbedding, Linear, TimeEmbedding


_GROUPS = 8


class ConvBlock(eqx.Module):
    """Convolution, group norm, Mish."""

    conv: eqx.nn.Conv1d
    norm: eqx.nn.GroupNorm

    def __init__(self, in_size: int, out_size: int, kernel: int, *, key: Key[Array, ""]):
        self.conv = eqx.nn.Conv1d(in_size, out_size, kernel, padding=kernel // 2, key=key)
        self.norm = eqx.nn.GroupNorm(_GROUPS, out_size)

    def __call__(self, x: Float[Array, "_in horizon"]) -> Float[Array, "out horizon"]:
        return mish(self.norm(self.conv(x)))


class ResidualBlock(eqx.Module):
    """Two `ConvBlock`s with the embedding added between them."""

    first: ConvBlock
    second: ConvBlock
    shift: Linear
    skip: eqx.nn.Conv1d | eqx.nn.Identity

    def __init__(self, in_size: int, out_size: int, embed_size: int, kernel: int, *, key: Key[Array, ""]):
        keys = jr.split(key, 4)
        self.first = ConvBlock(in_size, out_size, kernel, key=keys[0])
        self.second = ConvBlock(out_size, out_size, kernel, key=keys[1])
        self.shift = Linear(embed_size, out_size, key=keys[2])
        skip = in_size != out_size
        self.skip = eqx.nn.Conv1d(in_size, out_size, 1, key=keys[3]) if skip else eqx.nn.Identity()

    def __call__(
        self, x: Float[Array, "_in horizon"], embedding: Float[Array, " embed"]
    ) -> Float[Array, "out horizon"]:
        y = self.first(x) + self.shift(mish(embedding))[:, None]
        return self.second(y) + self.skip(x)


class UNet1D(eqx.Module):
    """The noise in a noised plan; the same calls as `DiT1D`.

    **Arguments:**

    - `width`: channels of the first level; `multipliers` are those of the levels, each halving the horizon but
        the last. The horizon must be a multiple of 2^(levels - 1) (CleanDiffuser asks for a power of two).
    """

    time: TimeEmbedding
    label: LabelEmbedding | None
    down: tuple[tuple[ResidualBlock, ResidualBlock, eqx.nn.Conv1d | None], ...]
    middle: tuple[ResidualBlock, ResidualBlock]
    up: tuple[tuple[ResidualBlock, ResidualBlock, eqx.nn.ConvTranspose1d], ...]
    last: ConvBlock
    out: eqx.nn.Conv1d

    def __init__(
        self,
        obs_size: int,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 4, 8),
        kernel: int = 5,
        conditional: bool = False,
        *,
        key: Key[Array, ""],
    ):
        _check_width(width)
        keys = iter(jr.split(key, 8 + 6 * len(multipliers)))
        sizes = [obs_size, *(width * m for m in multipliers)]
        block = lambda a, b: ResidualBlock(a, b, width, kernel, key=next(keys))
        halve = lambda n: eqx.nn.Conv1d(n, n, 3, stride=2, padding=1, key=next(keys))
        double = lambda n: eqx.nn.ConvTranspose1d(n, n, 4, stride=2, padding=1, key=next(keys))

        self.time = TimeEmbedding(width, key=next(keys))
        self.label = LabelEmbedding(width, key=next(keys)) if conditional else None
        pairs = list(itertools.pairwise(sizes))
        self.down = tuple(
            (block(a, b), block(b, b), halve(b) if level < len(pairs) else None)
            for level, (a, b) in enumerate(pairs, 1)
        )
        self.middle = (block(sizes[-1], sizes[-1]), block(sizes[-1], sizes[-1]))
        self.up = tuple((block(2 * b, a), block(a, a), double(a)) for a, b in reversed(pairs[1:]))
        self.last = ConvBlock(sizes[1], sizes[1], kernel, key=next(keys))
        self.out = eqx.nn.Conv1d(sizes[1], obs_size, 1, key=next(keys))

    def __call__(
        self,
        x: Float[Array, "horizon obs"],
        t: Float[Array, ""],
        label: Float[Array, ""] | None = None,
        kept: Float[Array, ""] | float = 1.0,
    ) -> Float[Array, "horizon obs"]:
        """The noise in `x` at time `t` in [0, 1]; `kept = 0` drops the label, None is no label.

        **Raises:** `ValueError` for a horizon that cannot be halved often enough.
        """
        _check_horizon(len(x), len(self.down))
        embedding = self.time(t)
        if self.label is not None:
            embedding = embedding + self.label(label, kept)
        y, skips = x.T, []
        for first, second, halve in self.down:
            y = second(first(y, embedding), embedding)
            skips.append(y)
            y = y if halve is None else halve(y)
        for block in self.middle:
            y = block(y, embedding)
        for first, second, double in self.up:
            y = jnp.concatenate([y, skips.pop()])
            y = double(second(first(y, embedding), embedding))
        return self.out(self.last(y)).T


class HalfUNet1D(eqx.Module):
    """A number for a noised plan and its time: the way down of a U-Net, then two layers."""

    time: TimeEmbedding
    down: tuple[tuple[ResidualBlock, ResidualBlock, eqx.nn.Conv1d], ...]
    inner: Linear
    outer: Linear

    def __init__(
        self,
        horizon: int,
        obs_size: int,
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2, 4, 8),
        kernel: int = 3,
        *,
        key: Key[Array, ""],
    ):
        _check_width(width)
        keys = iter(jr.split(key, 3 + 3 * len(multipliers)))
        sizes = [obs_size, *(width * m for m in multipliers)]
        block = lambda a, b: ResidualBlock(a, b, width, kernel, key=next(keys))
        halve = lambda n: eqx.nn.Conv1d(n, n, 3, stride=2, padding=1, key=next(keys))
        self.time = TimeEmbedding(width, key=next(keys))
        self.down = tuple((block(a, b), block(b, b), halve(b)) for a, b in itertools.pairwise(sizes))
        for _ in multipliers:
            horizon = -(-horizon // 2)
        flat = sizes[-1] * horizon + width
        self.inner = Linear(flat, flat // 4, key=next(keys))
        self.outer = Linear(flat // 4, 1, key=next(keys))

    def __call__(self, x: Float[Array, "horizon obs"], t: Float[Array, ""]) -> Float[Array, ""]:
        embedding, y = self.time(t), x.T
        for first, second, halve in self.down:
            y = halve(second(first(y, embedding), embedding))
        return self.outer(mish(self.inner(jnp.concatenate([y.ravel(), embedding]))))[0]


def _check_width(width: int) -> None:
    if width % _GROUPS:
        raise ValueError(f"width is {width}; group norm needs a multiple of {_GROUPS}.")


def _check_horizon(horizon: int, levels: int) -> None:
    multiple = 2 ** (levels - 1)
    if horizon % multiple:
        raise ValueError(
            f"The horizon is {horizon}; a U-Net of {levels} levels halves it {levels - 1} times and needs a "
            f"multiple of {multiple}. Take other windows, fewer multipliers, or the transformer."
        )
