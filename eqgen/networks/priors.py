"""Distributions over the latent of a plan, given its first state: a Gaussian, a mixture, a flow.

A latent is an array `(future, obs)`, one row for every state after the first. The Gaussian's rows come from a GRU
that sees the state once, as in Prior Guidance's code [C]; the other two are extensions. All begin at N(0, I) or
near it [I].
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.nn import initializers
from jaxtyping import Array, Float, Key

from eqgen.networks.mlp import MLP
from eqgen.networks.temporal import Linear


_SMALL = initializers.normal(0.02)


class Recurrence(eqx.Module):
    """Features of H - 1 rows from one state: a GRU that is fed the state at its first step and zeros after.

    x = ReLU(LN(W s)); h_k = GRU(x if k = 0 else 0, h_{k-1}), h_{-1} = 0; ReLU(LN(h_k)).
    """

    embed: Linear
    embed_norm: eqx.nn.LayerNorm
    cell: eqx.nn.GRUCell
    norm: eqx.nn.LayerNorm
    num_rows: int = eqx.field(static=True)

    def __init__(self, obs_size: int, num_rows: int, hidden: int, *, key: Key[Array, ""]):
        keys = jr.split(key)
        self.embed = Linear(obs_size, hidden, key=keys[0])
        self.cell = eqx.nn.GRUCell(hidden, hidden, key=keys[1])
        self.embed_norm, self.norm = (eqx.nn.LayerNorm(hidden, eps=1e-6) for _ in range(2))
        self.num_rows = num_rows

    def __call__(self, obs: Float[Array, " obs"]) -> Float[Array, "future hidden"]:
        x = jax.nn.relu(self.embed_norm(self.embed(obs)))
        h = self.cell(x, jnp.zeros_like(x))

        def step(h, _):
            h = self.cell(jnp.zeros_like(x), h)
            return h, h

        _, later = jax.lax.scan(step, h, length=self.num_rows - 1)
        return jax.nn.relu(jax.vmap(self.norm)(jnp.concatenate([h[None], later])))


class GaussianPrior(eqx.Module):
    """A diagonal Gaussian.

    **Arguments:**

    - `log_std_range`: what log sigma is clipped to.
    - `bound`: if given, log sigma = bound - softplus(.) instead; below ln(2) / 2 the chi-square divergence from
        N(0, I) is finite.
    """

    rows: Recurrence
    mean: Linear
    log_std: Linear
    log_std_range: tuple[float, float] = eqx.field(static=True)
    bound: float | None = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        num_rows: int,
        hidden: int = 256,
        log_std_range: tuple[float, float] = (-5.0, 2.0),
        bound: float | None = None,
        *,
        key: Key[Array, ""],
    ):
        keys = jr.split(key, 3)
        self.rows = Recurrence(obs_size, num_rows, hidden, key=keys[0])
        self.mean, self.log_std = (Linear(hidden, obs_size, _SMALL, key=k) for k in keys[1:])
        self.log_std_range, self.bound = log_std_range, bound

    def __call__(
        self, obs: Float[Array, " obs"]
    ) -> tuple[Float[Array, "future obs"], Float[Array, "future obs"]]:
        """Mean and log standard deviation."""
        y = self.rows(obs)
        if self.bound is not None:
            return self.mean(y), self.bound - jax.nn.softplus(self.log_std(y))
        return self.mean(y), jnp.clip(self.log_std(y), *self.log_std_range)


class MixturePrior(eqx.Module):
    """A mixture of diagonal Gaussians over whole latents."""

    rows: Recurrence
    means: Linear
    log_stds: Linear
    logits: Linear
    num_components: int = eqx.field(static=True)
    log_std_range: tuple[float, float] = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        num_rows: int,
        hidden: int = 256,
        num_components: int = 5,
        log_std_range: tuple[float, float] = (-5.0, 2.0),
        *,
        key: Key[Array, ""],
    ):
        keys = jr.split(key, 4)
        self.rows = Recurrence(obs_size, num_rows, hidden, key=keys[0])
        outs = num_components * obs_size
        self.means, self.log_stds = (Linear(hidden, outs, _SMALL, key=k) for k in keys[1:3])
        self.logits = Linear(hidden, num_components, _SMALL, key=keys[3])
        self.num_components, self.log_std_range = num_components, log_std_range

    def __call__(
        self, obs: Float[Array, " obs"]
    ) -> tuple[
        Float[Array, " components"],
        Float[Array, "components future obs"],
        Float[Array, "components future obs"],
    ]:
        """Log weights, means and log standard deviations."""
        y = self.rows(obs)
        split = lambda x: x.reshape(len(y), self.num_components, -1).swapaxes(0, 1)
        log_stds = jnp.clip(split(self.log_stds(y)), *self.log_std_range)
        return jax.nn.log_softmax(self.logits(y[0])), split(self.means(y)), log_stds


class FlowPrior(eqx.Module):
    """A normalising flow of N(0, I): affine couplings given the state (Dinh et al., "RealNVP", 2017).

    Each layer shifts and scales one half of the latent's numbers (every second one, in turns) by a network of the
    other half and the state. A fresh flow is the identity. Scales lie in (1/e, e), by a tanh.
    """

    layers: tuple[MLP, ...]
    num_rows: int = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        num_rows: int,
        hidden: int = 256,
        num_layers: int = 4,
        *,
        key: Key[Array, ""],
    ):
        size = obs_size * num_rows
        halves = ((size + 1) // 2, size // 2)
        if size < 2:
            raise ValueError("FlowPrior: a latent of one number has no two halves; take the Gaussian.")
        layers = []
        for i, k in enumerate(jr.split(key, num_layers)):
            given, moved = halves[i % 2], halves[1 - i % 2]
            net = MLP((given, obs_size), 2 * moved, (hidden, hidden), "silu", key=k)
            last = lambda net: (net.layers[-1].weights[0], net.layers[-1].bias)
            layers.append(eqx.tree_at(last, net, jax.tree.map(jnp.zeros_like, last(net))))
        self.layers, self.num_rows = tuple(layers), num_rows

    def __call__(
        self, obs: Float[Array, " obs"], noise: Float[Array, "future obs"]
    ) -> tuple[Float[Array, "future obs"], Float[Array, ""]]:
        """The image of `noise` and log |d image / d noise|."""
        x, log_det = noise.ravel(), jnp.zeros(())
        halves = [x[0::2], x[1::2]]
        for i, net in enumerate(self.layers):
            shift, log_scale = jnp.split(net(halves[i % 2], obs), 2)
            log_scale = jnp.tanh(log_scale)
            halves[1 - i % 2] = halves[1 - i % 2] * jnp.exp(log_scale) + shift
            log_det = log_det + jnp.sum(log_scale)
        return x.at[0::2].set(halves[0]).at[1::2].set(halves[1]).reshape(noise.shape), log_det
