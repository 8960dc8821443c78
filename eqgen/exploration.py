"""Gaussian exploration noise whose size is annealed by an entropy target.

The diffusion-policy line of SOM (DACER, SDAC and the code of ACA and NC-LQL [L]) adds N(0, std^2) to the chosen
action, std = 0.1 exp(l), and every few hundred updates takes one Adam step in l on the gap between the noise's
entropy per dimension, 0.5 log(2 pi e std^2), and a target. That entropy is known in closed form, so this is a
schedule: from std = 0.5 down to exp(target) / sqrt(2 pi e), 0.098 for the target -0.9, whatever the task does.
"""

from typing import cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key, Scalar, ScalarLike


class NoiseState(eqx.Module):
    """The log of the scale, l, and its optimiser's state."""

    log_scale: Float[Array, ""]
    opt_state: optax.OptState


class AnnealedNoise(eqx.Module):
    """The schedule: its start, its target in nats per dimension, and one Adam step every `period` updates."""

    initial_std: float = 0.5
    target_entropy: float = -0.9
    period: int = 250
    learning_rate: float = 3e-2

    def init(self) -> NoiseState:
        """The state at `initial_std`."""
        log_scale = jnp.log(jnp.array(self.initial_std / 0.1, float))
        return NoiseState(log_scale, optax.adam(self.learning_rate).init(log_scale))

    def update(self, state: NoiseState, step: Int[Array, ""]) -> NoiseState:
        """The state after update number `step`, counted from 0."""
        own_entropy = 0.5 * jnp.log(2 * jnp.pi * jnp.e) + jnp.log(self.std(state))
        moved = self.corrected(state, own_entropy)
        due = (step + 1) % self.period == 0
        return jax.tree.map(lambda new, old: jnp.where(due, new, old), moved, state)

    def corrected(self, state: NoiseState, entropy: Float[Array, ""]) -> NoiseState:
        """The state after one step by an entropy per dimension, to more noise where that is below the target.

        `update` takes the noise's own entropy; DACER measures that of its policy with the noise.
        """
        gap = entropy - self.target_entropy
        change, opt_state = optax.adam(self.learning_rate).update(gap, state.opt_state)
        return NoiseState(state.log_scale + cast(Array, change), opt_state)

    def std(self, state: NoiseState) -> Scalar:
        """The standard deviation now, in units of the action box [-1, 1]."""
        return 0.1 * jnp.exp(state.log_scale)


def add_noise(action: Float[Array, " act"], std: ScalarLike, *, key: Key[Array, ""]) -> Float[Array, " act"]:
    """The action with Gaussian noise, clipped to the box [-1, 1]^d."""
    return jnp.clip(action + std * jr.normal(key, action.shape), -1, 1)
