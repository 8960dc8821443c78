"""The U-Net of DDPM for small images.

Ho, Jain and Abbeel, "Denoising diffusion probabilistic models" (2020). Their network for CIFAR-10, which has
35,746,307 parameters, is

    UNet2D((3, 32, 32), 128, (1, 2, 2, 2), num_blocks=2, attention=(1,), dropout=0.1, groups=32);

the defaults are compact. Images are `(channels, height, width)`, as `eqx.nn.Conv2d` has them: under `jax.vmap` that
is as fast on a CPU as convolutions with the channels last.

Differs from the paper in the time's frequencies (from 1 to 1000 rad over [0, 1] instead of 0.1 to 1000) and in the
initialisation of the layers that do not begin at 0, which is Equinox's.
"""

import itertools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from eqgen.networks.embeddings import fourier_features
from eqgen.networks.temporal import Attention, Linear, TwoLayers


def _zeroed(layer):
    """A layer of weights and bias 0, so that what it ends begins as nothing (or as the identity of a skip)."""
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, replace_fn=jnp.zeros_like)


def _conv(in_size, out_size, kernel=3, stride=1, *, key):
    return eqx.nn.Conv2d(in_size, out_size, kernel, stride, padding=kernel // 2, key=key)


class ResidualBlock(eqx.Module):
    """Twice group norm, SiLU and convolution; the embedding is added in between, then comes the dropout."""

    norms: tuple[eqx.nn.GroupNorm, eqx.nn.GroupNorm]
    convolutions: tuple[eqx.nn.Conv2d, eqx.nn.Conv2d]
    shift: Linear
    skip: eqx.nn.Conv2d | None
    dropout: eqx.nn.Dropout

    def __init__(
        self,
        in_size: int,
        out_size: int,
        embed_size: int,
        groups: int,
        dropout: float,
        *,
        key: Key[Array, ""],
    ):
        keys = jr.split(key, 4)
        self.norms = (eqx.nn.GroupNorm(groups, in_size), eqx.nn.GroupNorm(groups, out_size))
        second = _zeroed(_conv(out_size, out_size, key=keys[1]))
        self.convolutions = (_conv(in_size, out_size, key=keys[0]), second)
        self.shift = Linear(embed_size, out_size, key=keys[2])
        self.skip = None if in_size == out_size else _conv(in_size, out_size, 1, key=keys[3])
        self.dropout = eqx.nn.Dropout(dropout)

    def __call__(
        self,
        x: Float[Array, "_in height width"],
        embedding: Float[Array, " embed"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "out height width"]:
        """Without a key there is no dropout."""
        y = self.convolutions[0](jax.nn.silu(self.norms[0](x)))
        y = y + self.shift(embedding)[:, None, None]
        y = jax.nn.silu(self.norms[1](y))
        y = self.dropout(y, key=key, inference=True if key is None else None)
        return self.convolutions[1](y) + (x if self.skip is None else self.skip(x))


class AttentionBlock(eqx.Module):
    """Group norm and self-attention between all places of an image, added to it."""

    norm: eqx.nn.GroupNorm
    attention: Attention

    def __init__(self, size: int, num_heads: int, groups: int, *, key: Key[Array, ""]):
        self.norm = eqx.nn.GroupNorm(groups, size)
        attention = Attention(size, num_heads, key=key)
        self.attention = eqx.tree_at(lambda a: a.out, attention, replace_fn=_zeroed)

    def __call__(self, x: Float[Array, "channels height width"]) -> Float[Array, "channels height width"]:
        places = self.norm(x).reshape(len(x), -1).T
        return x + self.attention(places).T.reshape(x.shape)


class Stage(eqx.Module):
    """A residual block, then attention at the levels that have it."""

    block: ResidualBlock
    attention: AttentionBlock | None

    def __call__(
        self,
        x: Float[Array, "_in height width"],
        embedding: Float[Array, " embed"],
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "out height width"]:
        """Without a key there is no dropout."""
        x = self.block(x, embedding, key=key)
        return x if self.attention is None else self.attention(x)


class UNet2D(eqx.Module):
    """The noise (or whatever the loss asks for) in a noised image; a fresh network returns 0.

    **Arguments:**

    - `shape`: (channels, height, width). The network also takes other heights and widths that it can halve.
    - `width`: channels of the first level; `multipliers` are those of the levels, each halving height and width but
        the last. Two or three levels suit 8x8, four 32x32.
    - `num_blocks`: residual blocks of a level on the way down; on the way up there is one more.
    - `attention`: the numbers of the levels, counted from 0, with attention after every block. There is always one
        between the two blocks in the middle.
    - `num_heads`: of the attention.
    - `num_classes`: 0 for a network that takes no label.
    - `dropout`: the probability, inside of residual blocks.
    - `groups`: of the group norm.

    **Raises:** `ValueError` for sizes that do not divide.
    """

    embed: TwoLayers
    labels: Float[Array, "classes embed"] | None
    first: eqx.nn.Conv2d
    down: tuple[tuple[tuple[Stage, ...], eqx.nn.Conv2d | None], ...]
    middle: tuple[Stage, Stage]
    up: tuple[tuple[tuple[Stage, ...], eqx.nn.Conv2d | None], ...]
    norm: eqx.nn.GroupNorm
    out: eqx.nn.Conv2d
    width: int = eqx.field(static=True)

    def __init__(
        self,
        shape: tuple[int, int, int],
        width: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        num_blocks: int = 1,
        attention: tuple[int, ...] = (),
        num_heads: int = 1,
        num_classes: int = 0,
        dropout: float = 0.0,
        groups: int = 8,
        *,
        key: Key[Array, ""],
    ):
        channels, *size = shape
        levels = len(multipliers)
        _check_size(size, levels)
        if width % groups or width % 2:
            raise ValueError(f"width is {width}; take an even multiple of groups={groups}, or other groups.")
        if not set(attention) <= set(range(levels)):
            raise ValueError(f"attention={attention} names levels beyond 0, ..., {levels - 1}.")
        keys = map(lambda i: jr.fold_in(key, i), itertools.count())
        embed_size = 4 * width

        def stage(in_size, out_size, attends):
            block = ResidualBlock(in_size, out_size, embed_size, groups, dropout, key=next(keys))
            return Stage(
                block, AttentionBlock(out_size, num_heads, groups, key=next(keys)) if attends else None
            )

        self.embed = TwoLayers((width, embed_size, embed_size), jax.nn.silu, key=next(keys))
        self.labels = jr.normal(next(keys), (num_classes, embed_size)) if num_classes else None
        self.first = _conv(channels, width, key=next(keys))
        current, skips, down, up = width, [width], [], []
        for level, multiplier in enumerate(multipliers):
            stages = []
            for _ in range(num_blocks):
                stages.append(stage(current, width * multiplier, level in attention))
                current = width * multiplier
                skips.append(current)
            halve = _conv(current, current, stride=2, key=next(keys)) if level < levels - 1 else None
            skips += [current] * (halve is not None)
            down.append((tuple(stages), halve))
        self.middle = (stage(current, current, True), stage(current, current, False))
        for level, multiplier in reversed(list(enumerate(multipliers))):
            stages = []
            for _ in range(num_blocks + 1):
                stages.append(stage(current + skips.pop(), width * multiplier, level in attention))
                current = width * multiplier
            up.append((tuple(stages), _conv(current, current, key=next(keys)) if level else None))
        self.down, self.up = tuple(down), tuple(up)
        self.norm = eqx.nn.GroupNorm(groups, width * multipliers[0])
        self.out = _zeroed(_conv(width * multipliers[0], channels, key=next(keys)))
        self.width = width

    def __call__(
        self,
        x: Float[Array, "channels height width"],
        t: Float[Array, ""],
        label: Int[Array, ""] | None = None,
        kept: Float[Array, ""] | float = 1.0,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "channels height width"]:
        """The output for `x` at time `t` in [0, 1].

        **Arguments:**

        - `label`: the class; None is no label, and so is `kept = 0`, which drops it.
        - `key`: for dropout. There is none without a key, nor in `eqx.nn.inference_mode`.

        **Raises:** `ValueError` for an image that cannot be halved often enough, and for a label where the network
        has no classes.
        """
        _check_size(x.shape[1:], len(self.down))
        keys = itertools.repeat(None) if key is None else (jr.fold_in(key, i) for i in itertools.count())
        embedding = self.embed(fourier_features(t, self.width // 2, 1000.0))
        if label is not None:
            if self.labels is None:
                raise ValueError(
                    "UNet2D: a label for a network without classes; construct it with num_classes."
                )
            embedding = embedding + kept * self.labels[label]
        embedding = jax.nn.silu(embedding)

        y = self.first(x)
        skips = [y]
        for stages, halve in self.down:
            for stage in stages:
                y = stage(y, embedding, key=next(keys))
                skips.append(y)
            if halve is not None:
                y = halve(y)
                skips.append(y)
        for stage in self.middle:
            y = stage(y, embedding, key=next(keys))
        for stages, refine in self.up:
            for stage in stages:
                y = stage(jnp.concatenate([y, skips.pop()]), embedding, key=next(keys))
            if refine is not None:
                y = refine(jnp.repeat(jnp.repeat(y, 2, axis=1), 2, axis=2))
        return self.out(jax.nn.silu(self.norm(y)))


def _check_size(size: Sequence[int], levels: int) -> None:
    height, width = size
    multiple = 2 ** (levels - 1)
    if height % multiple or width % multiple:
        raise ValueError(
            f"The image is {height}x{width}; a U-Net of {levels} levels halves it {levels - 1} times and needs "
            f"multiples of {multiple}. Take fewer multipliers, or pad the image."
        )
