"""Losses that more than one algorithm uses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqgen.types import Metrics, Transition


def td_target(
    batch: Transition, next_value: Float[Array, " batch"], *, discount: float, reward_scale: float = 1.0
) -> Float[Array, " batch"]:
    """One-step targets `reward_scale r + discount (1 - terminated) V(s')`; truncation still bootstraps."""
    return reward_scale * batch.reward + discount * (1 - batch.terminated) * next_value


def critic_loss(
    critics: Callable[[Array, Array], Float[Array, " size"]],
    batch: Transition,
    target: Float[Array, " batch"],
) -> tuple[Float[Array, ""], Metrics]:
    """The sum over an ensemble of critics of each one's mean squared error to the common target."""
    return squared_error(jax.vmap(critics)(batch.obs, batch.action), target)


def squared_error(
    q: Float[Array, "batch size"], target: Float[Array, " batch"]
) -> tuple[Float[Array, ""], Metrics]:
    """`critic_loss` of values that are at hand already."""
    loss = jnp.sum(jnp.mean((q - target[:, None]) ** 2, axis=0))
    metrics = {"critic/loss": loss, "critic/q": jnp.mean(q), "critic/q_std": jnp.std(q)}
    return loss, metrics | {"critic/target": jnp.mean(target)}
