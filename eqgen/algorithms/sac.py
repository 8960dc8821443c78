"""SAC: soft actor-critic, the yardstick.

Haarnoja, Zhou, Hartikainen, Tucker, Ha, Tan, Kumar, Zhu, Gupta, Abbeel and Levine, "Soft Actor-Critic Algorithms
and Applications", arXiv 1812.05905 (2018): maximum-entropy actor-critic with a squashed Gaussian policy, twin
critics and a temperature learned to hold a target entropy.

Notation (paper symbol = name here):

    pi_phi = actor          Q_theta = critics             alpha = temperature
    gamma = discount        H = target_entropy            tau = tau

Differs from the paper in:
- The entropy target is a field per action dimension (the paper's -1 by default).
- log(alpha) is the parameter that is optimised, as in all later code; the gradient is `-(log pi + H)`, without
  the factor alpha that differentiating alpha itself would add.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key

from eqgen.algorithms.base import AbstractAgent, gradient_step, vector_sizes
from eqgen.losses import critic_loss, td_target
from eqgen.networks.critics import QEnsemble
from eqgen.networks.policies import TanhGaussianPolicy
from eqgen.tree import polyak, tree_copy


class SACState(eqx.Module):
    """Everything that evolves."""

    actor: TanhGaussianPolicy
    critics: QEnsemble
    target_critics: QEnsemble
    log_temperature: Float[Array, ""]
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    temperature_opt: optax.OptState
    step: Int[Array, ""]


class SAC(AbstractAgent):
    """Hyperparameters and methods of SAC."""

    discount: float = 0.99
    """gamma, in [0, 1)."""
    reward_scale: float = 1.0
    tau: float = 0.005
    """Share of the online critics that enters the target critics at each update."""
    actor_learning_rate: float = 3e-4
    critic_learning_rate: float = 3e-4
    temperature_learning_rate: float = 3e-4
    initial_temperature: float = 1.0
    target_entropy_per_dim: float = -1.0
    """Nats per action dimension; the paper's target is -dim(A)."""
    hidden: tuple[int, ...] = (256, 256, 256)
    activation: str = "relu"

    sizes = {"smoke": dict(hidden=(32, 32)), "cpu": dict(hidden=(256, 256)), "paper": dict()}
    evaluation_policy = "greedy: tanh of the Gaussian's mean"

    def act(self, state, obs, *, key, explore):
        return state.actor.sample(obs, key=key)[0] if explore else state.actor.mode(obs)

    def soft_value(
        self, state: SACState, obs: Float[Array, " obs"], *, key: Key[Array, ""]
    ) -> Float[Array, ""]:
        """A one-sample estimate of V(s) = E[min_j Q_target_j(s, a) - alpha log pi(a|s)] (Eq. 3)."""
        action, log_prob = state.actor.sample(obs, key=key)
        return jnp.min(state.target_critics(obs, action)) - jnp.exp(state.log_temperature) * log_prob

    def actor_loss(
        self,
        actor: TanhGaussianPolicy,
        critics: QEnsemble,
        temperature: Float[Array, ""],
        obs: Float[Array, "batch obs"],
        *,
        key: Key[Array, ""],
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """E[alpha log pi(a|s) - min_j Q_j(s, a)] (Eq. 9) and, beside it, the policy's entropy."""

        def one(obs, key):
            action, log_prob = actor.sample(obs, key=key)
            return temperature * log_prob - jnp.min(critics(obs, action)), log_prob

        loss, log_prob = jax.vmap(one)(obs, jr.split(key, len(obs)))
        return jnp.mean(loss), -jnp.mean(log_prob)

    def update(self, state, batch, *, key):
        target_key, actor_key = jr.split(key)
        target_keys = jr.split(target_key, len(batch.reward))
        next_value = jax.vmap(lambda s, k: self.soft_value(state, s, key=k))(batch.next_obs, target_keys)
        y = td_target(batch, next_value, discount=self.discount, reward_scale=self.reward_scale)
        grads, metrics = eqx.filter_grad(critic_loss, has_aux=True)(state.critics, batch, y)
        optimizer = optax.adam(self.critic_learning_rate)
        critics, critic_opt = gradient_step(optimizer, state.critics, state.critic_opt, grads)

        temperature = jnp.exp(state.log_temperature)
        value_and_grad = eqx.filter_value_and_grad(self.actor_loss, has_aux=True)
        (loss, entropy), grads = value_and_grad(state.actor, critics, temperature, batch.obs, key=actor_key)
        optimizer = optax.adam(self.actor_learning_rate)
        actor, actor_opt = gradient_step(optimizer, state.actor, state.actor_opt, grads)

        surplus = entropy - self.target_entropy_per_dim * batch.action.shape[-1]
        optimizer = optax.adam(self.temperature_learning_rate)
        log_temperature, temperature_opt = gradient_step(
            optimizer, state.log_temperature, state.temperature_opt, surplus
        )
        metrics |= {"actor/loss": loss, "actor/entropy": entropy, "temperature": temperature}
        state = SACState(
            actor=actor,
            critics=critics,
            target_critics=polyak(state.target_critics, critics, self.tau),
            log_temperature=log_temperature,
            actor_opt=actor_opt,
            critic_opt=critic_opt,
            temperature_opt=temperature_opt,
            step=state.step + 1,
        )
        return state, metrics

    def init(self, example, *, key):
        obs_size, action_size = vector_sizes(example)
        actor_key, critic_key = jr.split(key)
        actor = TanhGaussianPolicy(obs_size, action_size, self.hidden, self.activation, key=actor_key)
        critics = QEnsemble(obs_size, action_size, self.hidden, self.activation, key=critic_key)
        return self.from_networks(actor, critics)

    def from_networks(self, actor: Any, critics: Any) -> SACState:
        """A fresh state around networks of your own: `actor.sample(obs, key=)`, `actor.mode(obs)`, and
        `critics(obs, action)` that returns one value per member."""
        log_temperature = jnp.log(jnp.array(self.initial_temperature, float))
        return SACState(
            actor=actor,
            critics=critics,
            target_critics=tree_copy(critics),
            log_temperature=log_temperature,
            actor_opt=optax.adam(self.actor_learning_rate).init(eqx.filter(actor, eqx.is_inexact_array)),
            critic_opt=optax.adam(self.critic_learning_rate).init(eqx.filter(critics, eqx.is_inexact_array)),
            temperature_opt=optax.adam(self.temperature_learning_rate).init(log_temperature),
            step=jnp.zeros((), jnp.int32),
        )
