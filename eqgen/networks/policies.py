"""Policy networks."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from eqgen.networks.embeddings import fourier_features, sinusoid
from eqgen.networks.mlp import MLP, mish


class TanhGaussianPolicy(eqx.Module):
    """A Gaussian squashed to (-1, 1)^d by tanh (Haarnoja et al., 2018, appendix C)."""

    net: MLP
    log_std_range: tuple[float, float] = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: tuple[int, ...],
        activation: Callable | str = mish,
        log_std_range: tuple[float, float] = (-20.0, 2.0),
        *,
        key: Key[Array, ""],
    ):
        self.net = MLP((obs_size,), 2 * action_size, hidden, activation, key=key)
        self.log_std_range = log_std_range

    def __call__(self, obs: Float[Array, " obs"]) -> tuple[Float[Array, " act"], Float[Array, " act"]]:
        """Mean and log standard deviation before the squashing."""
        mean, log_std = jnp.split(self.net(obs), 2)
        return mean, jnp.clip(log_std, *self.log_std_range)

    def mode(self, obs: Float[Array, " obs"]) -> Float[Array, " act"]:
        """The squashed mean."""
        return jnp.tanh(self(obs)[0])

    def sample(
        self, obs: Float[Array, " obs"], *, key: Key[Array, ""]
    ) -> tuple[Float[Array, " act"], Float[Array, ""]]:
        """A reparameterised action and its log density, with the tanh Jacobian in its overflow-free form."""
        mean, log_std = self(obs)
        noise = jr.normal(key, mean.shape)
        x = mean + jnp.exp(log_std) * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
        log_jacobian = 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))
        return jnp.tanh(x), jnp.sum(log_normal - log_jacobian)


class MeanVelocity(eqx.Module):
    """A MeanFlow network u(x, r, t | obs): the average velocity of the flow between times r <= t.

    It sees Fourier features of t and of the gap t - r, as the official MeanFlow networks do.
    """

    net: MLP
    action_size: int = eqx.field(static=True)
    num_frequencies: int = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: tuple[int, ...],
        activation: Callable | str = mish,
        num_frequencies: int = 8,
        *,
        key: Key[Array, ""],
    ):
        time_size = 2 * num_frequencies
        self.net = MLP(
            (action_size, time_size, time_size, obs_size), action_size, hidden, activation, key=key
        )
        self.action_size = action_size
        self.num_frequencies = num_frequencies

    def __call__(
        self,
        x: Float[Array, " act"],
        r: Float[Array, ""],
        t: Float[Array, ""],
        obs: Float[Array, " obs"],
    ) -> Float[Array, " act"]:
        """The average velocity over [r, t] of the path that is at `x` at time t."""
        embed = lambda s: fourier_features(s, self.num_frequencies)
        return self.net(x, embed(t), embed(t - r), obs)


class NoisePredictor(eqx.Module):
    """A diffusion policy's network eps(x, k | obs): the noise in an action after step k = 0, 1, ... of a chain.

    The step is embedded by a sinusoid of 16 numbers and a small network of its own, as in DACER, SDAC and DPMD.
    """

    net: MLP
    embedder: MLP
    action_size: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    embedding_size: int = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        num_steps: int,
        hidden: tuple[int, ...],
        activation: Callable | str = mish,
        embedding_size: int = 16,
        *,
        key: Key[Array, ""],
    ):
        net_key, embedder_key = jr.split(key)
        self.net = MLP((action_size, embedding_size, obs_size), action_size, hidden, activation, key=net_key)
        widths = ((embedding_size,), embedding_size, (2 * embedding_size,))
        self.embedder = MLP(*widths, activation, key=embedder_key)
        self.action_size, self.num_steps, self.embedding_size = action_size, num_steps, embedding_size

    def embed(self, k: Int[Array, ""]) -> Float[Array, " embedding"]:
        """The embedding of step k."""
        return self.embedder(sinusoid(k, self.embedding_size))

    def __call__(
        self, x: Float[Array, " act"], k: Int[Array, ""], obs: Float[Array, " obs"]
    ) -> Float[Array, " act"]:
        """The noise predicted in `x`."""
        return self.net(x, self.embed(k), obs)

    def step_shares(self) -> Float[Array, "steps width"]:
        """What each step adds to the first layer: what the function made by `at` takes."""
        embeddings = jax.vmap(self.embed)(jnp.arange(self.num_steps))
        return embeddings @ self.net.layers[0].weights[1]

    def at(
        self, obs: Float[Array, " obs"]
    ) -> Callable[[Float[Array, " act"], Float[Array, " width"]], Float[Array, " act"]]:
        """The noise in `x`, of (x, a row of `step_shares()`), at `obs`.

        For sampling: the observation's and the steps' shares of the first layer are computed once per chain.
        """
        folded = self.net.fold(2, obs).fold(1, jnp.zeros(self.embedding_size))
        return lambda x, share: folded.shift(share)(x)
