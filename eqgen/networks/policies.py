"""Policy networks."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from eqgen.networks.embeddings import fourier_features, sinusoid
from eqgen.networks.mlp import MLP, Initialization, mish


class TanhGaussianPolicy(eqx.Module):
    """A Gaussian squashed to (-1, 1)^d by tanh (Haarnoja et al., 2018, appendix C).

    Its standard deviation depends on the observation or, with `state_dependent_std=False`, is a parameter of its
    own, 1 at first.
    """

    net: MLP
    log_std: Float[Array, " act"] | None
    log_std_range: tuple[float, float] = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: tuple[int, ...],
        activation: Callable | str = mish,
        log_std_range: tuple[float, float] = (-20.0, 2.0),
        initialization: Initialization = "uniform",
        *,
        state_dependent_std: bool = True,
        key: Key[Array, ""],
    ):
        out_size = 2 * action_size if state_dependent_std else action_size
        self.net = MLP((obs_size,), out_size, hidden, activation, initialization, key=key)
        self.log_std = None if state_dependent_std else jnp.zeros(action_size)
        self.log_std_range = log_std_range

    def __call__(self, obs: Float[Array, " obs"]) -> tuple[Float[Array, " act"], Float[Array, " act"]]:
        """Mean and log standard deviation before the squashing."""
        out = self.net(obs)
        mean, log_std = jnp.split(out, 2) if self.log_std is None else (out, self.log_std)
        return mean, jnp.clip(log_std, *self.log_std_range)

    def mode(self, obs: Float[Array, " obs"]) -> Float[Array, " act"]:
        """The squashed mean."""
        return jnp.tanh(self(obs)[0])

    def sample(
        self, obs: Float[Array, " obs"], *, key: Key[Array, ""]
    ) -> tuple[Float[Array, " act"], Float[Array, ""]]:
        """A reparameterised action and its log density."""
        mean, log_std = self(obs)
        noise = jr.normal(key, mean.shape)
        x = mean + jnp.exp(log_std) * noise
        return jnp.tanh(x), _squashed_log_density(x, noise, log_std)

    def log_prob(self, obs: Float[Array, " obs"], action: Float[Array, " act"]) -> Float[Array, ""]:
        """The log density of an action.

        Its inverse tanh is taken within 1e-6 of the bounds at most, plus or minus 7.25: closer to them an action in
        single precision does not say which it was, and may be the bound itself.
        """
        mean, log_std = self(obs)
        x = jnp.arctanh(jnp.clip(action, -1 + 1e-6, 1 - 1e-6))
        return _squashed_log_density(x, (x - mean) * jnp.exp(-log_std), log_std)


def _squashed_log_density(x, noise, log_std):
    """That of tanh(x), x = mean + std * noise, with the tanh Jacobian in its overflow-free form."""
    log_normal = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_jacobian = 2 * (jnp.log(2.0) - x - jax.nn.softplus(-2 * x))
    return jnp.sum(log_normal - log_jacobian)


class DeterministicPolicy(eqx.Module):
    """An action for each observation: an MLP squashed to (-1, 1)^d by tanh (Lillicrap et al., 2016)."""

    net: MLP

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: tuple[int, ...],
        activation: Callable | str = "relu",
        *,
        key: Key[Array, ""],
    ):
        self.net = MLP((obs_size,), action_size, hidden, activation, key=key)

    def __call__(self, obs: Float[Array, " obs"]) -> Float[Array, " act"]:
        """The action."""
        return jnp.tanh(self.net(obs))


class Velocity(eqx.Module):
    """A flow policy's network v(x, t | obs): dx/dt of the flow between actions (t = 0) and noise (t = 1).

    It sees Fourier features of t, those of `MeanVelocity`.
    """

    net: MLP
    action_size: int = eqx.field(static=True)
    num_frequencies: int = eqx.field(static=True)
    max_frequency: float = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: tuple[int, ...],
        activation: Callable | str = mish,
        num_frequencies: int = 8,
        max_frequency: float = 32.0,
        *,
        key: Key[Array, ""],
    ):
        self.net = MLP((action_size, 2 * num_frequencies, obs_size), action_size, hidden, activation, key=key)
        self.action_size = action_size
        self.num_frequencies, self.max_frequency = num_frequencies, max_frequency

    def __call__(
        self, x: Float[Array, " act"], t: Float[Array, ""], obs: Float[Array, " obs"]
    ) -> Float[Array, " act"]:
        """The velocity at `x` and time t."""
        return self.net(x, self.embed(t), obs)

    def embed(self, t: Float[Array, ""]) -> Float[Array, " features"]:
        """The features of a time."""
        return fourier_features(t, self.num_frequencies, self.max_frequency)

    def at(
        self, obs: Float[Array, " obs"]
    ) -> Callable[[Float[Array, " act"], Float[Array, ""]], Float[Array, " act"]]:
        """The velocity at (x, t) and `obs`, whose share of the first layer is computed here, once."""
        folded = self.net.fold(2, obs)
        return lambda x, t: folded(x, self.embed(t))


class MeanVelocity(eqx.Module):
    """A MeanFlow network u(x, r, t | obs): the average velocity of the flow between times r <= t.

    It sees Fourier features of t and of the gap t - r, as the official MeanFlow networks do, of angular frequencies
    up to `max_frequency`. The MeanFlow identity differentiates them in t.
    """

    net: MLP
    action_size: int = eqx.field(static=True)
    num_frequencies: int = eqx.field(static=True)
    max_frequency: float = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: tuple[int, ...],
        activation: Callable | str = mish,
        num_frequencies: int = 8,
        max_frequency: float = 32.0,
        *,
        key: Key[Array, ""],
    ):
        time_size = 2 * num_frequencies
        self.net = MLP(
            (action_size, time_size, time_size, obs_size), action_size, hidden, activation, key=key
        )
        self.action_size = action_size
        self.num_frequencies, self.max_frequency = num_frequencies, max_frequency

    def __call__(
        self,
        x: Float[Array, " act"],
        r: Float[Array, ""],
        t: Float[Array, ""],
        obs: Float[Array, " obs"],
    ) -> Float[Array, " act"]:
        """The average velocity over [r, t] of the path that is at `x` at time t."""
        embed = lambda s: fourier_features(s, self.num_frequencies, self.max_frequency)
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


class ActionScore(eqx.Module):
    """A network Psi(a | obs) for the score of a policy, the gradient of log pi(a | obs) in the action."""

    net: MLP
    action_size: int = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        action_size: int,
        hidden: tuple[int, ...],
        activation: Callable | str = "relu",
        *,
        key: Key[Array, ""],
    ):
        self.net = MLP((action_size, obs_size), action_size, hidden, activation, key=key)
        self.action_size = action_size

    def __call__(self, action: Float[Array, " act"], obs: Float[Array, " obs"]) -> Float[Array, " act"]:
        """The score at an action."""
        return self.net(action, obs)

    def at(self, obs: Float[Array, " obs"]) -> Callable[[Float[Array, " act"]], Float[Array, " act"]]:
        """The score of actions at `obs`, whose share of the first layer is computed here, once per chain."""
        return self.net.fold(1, obs)
