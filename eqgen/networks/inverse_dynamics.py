"""The noise in an action, given the state before and the state aimed at."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, ScalarLike

from eqgen.networks.mlp import MLP, mish


class ActionDenoiser(eqx.Module):
    """The noise in a noised action (Diffusion Veteran's inverse dynamics [C]).

    The level of the noise, 0, 1, 2, ..., is embedded by a sinusoid and two layers. In Prior Guidance's
    code all frequencies of the sinusoid but the first are 0, cut off by a whole-number type [C]; not here.
    """

    net: MLP
    level: MLP
    embed_size: int = eqx.field(static=True)

    def __init__(
        self,
        action_size: int,
        state_sizes: tuple[int, int],
        hidden: tuple[int, ...] = (256, 256, 256),
        embed_size: int = 64,
        *,
        key: Key[Array, ""],
    ):
        net_key, level_key = jr.split(key)
        self.net = MLP((action_size, embed_size, *state_sizes), action_size, hidden, mish, key=net_key)
        self.level = MLP((embed_size,), embed_size, (2 * embed_size,), mish, key=level_key)
        self.embed_size = embed_size

    def __call__(
        self,
        action: Float[Array, " act"],
        level: ScalarLike,
        obs: Float[Array, " obs"],
        target: Float[Array, " target"],
    ) -> Float[Array, " act"]:
        half = self.embed_size // 2
        angles = level * 10_000.0 ** (-jnp.arange(half) / (half - 1))
        return self.net(action, self.level(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])), obs, target)
