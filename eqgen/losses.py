"""Losses that more than one algorithm uses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from eqgen.types import Metrics, Transition


def td_target(
    batch: Transition, next_value: Float[Array, "*batch"], *, discount: float, reward_scale: float = 1.0
) -> Float[Array, "*batch"]:
    """One-step targets `reward_scale r + discount (1 - terminated) V(s')`; truncation still bootstraps."""
    return reward_scale * batch.reward + discount * (1 - batch.terminated) * next_value


def generalized_advantages(
    rollout: Transition,
    value: Float[Array, " time *envs"],
    next_value: Float[Array, " time *envs"],
    *,
    discount: float,
    trace_decay: float,
) -> Float[Array, " time *envs"]:
    """Advantages A_t = sum_k (discount trace_decay)^k delta_{t+k} of the steps of a rollout, each episode's apart.

    delta is the one-step error r + discount (1 - terminated) V(s') - V(s). Behind a truncated step, and behind the
    rollout's last, the sum ends and V(s') stands for what would have come (Schulman et al., arXiv 1506.02438).

    **Arguments:**

    - `rollout`: transitions in the order in which each environment made them.
    - `value`, `next_value`: V(s) and V(s').
    - `trace_decay`: lambda; 0 gives the one-step errors, 1 the discounted returns less V(s).
    """
    delta = td_target(rollout, next_value, discount=discount) - value
    decay = discount * trace_decay * (1 - (rollout.terminated | rollout.truncated))

    def step(later, now):
        delta, decay = now
        advantage = delta + decay * later
        return advantage, advantage

    return jax.lax.scan(step, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)[1]


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
