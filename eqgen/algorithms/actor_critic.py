"""What actor-critics share: critics learnt by temporal differences, a delayed actor, the best of N samples.

An algorithm on top of this says how an action is drawn (`sample`), what its actor descends (`actor_loss`) and
which network the actor is (`make_actor`). The rest is the frame in which the diffusion-policy papers compare
themselves, [C] the common code of SDAC, DPMD and the baselines beside them (Ma et al., arXiv 2502.00361), [L] that
of SOM's authors, which is a fork of it:

- twin critics regress on `c_r r + gamma (1 - terminated) min_j Q_target_j(s', a')`, a' from the policy [C];
- the actor and all target networks move at every second update of the critics [C];
- the actor's learning rate falls linearly, from update 25,000 over 50,000 of them [C];
- of N samples the one that min_j Q_j of the online critics values most is taken, when acting and for a' [C];
- Gaussian noise on the chosen action, annealed as in `exploration` [C].

`AbstractDiffusionAgent` adds the policy that most of them have: a network that predicts the noise in an action, and
20 steps of ancestral sampling with the denoised action clipped to the box [C].
"""

import dataclasses
from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, Scalar

from eqgen.algorithms.base import AbstractAgent, gradient_step, vector_sizes
from eqgen.exploration import AnnealedNoise, NoiseState, add_noise
from eqgen.losses import critic_loss, td_target
from eqgen.networks.critics import QEnsemble
from eqgen.networks.policies import NoisePredictor
from eqgen.samplers import ddpm, uniform_grid
from eqgen.timesteps.times import DiffusionChain
from eqgen.tree import filter_cond, polyak, shared, tree_copy, vmap_in_blocks
from eqgen.types import Metrics, Transition


Observations = Float[Array, "batch obs"]
Actions = Float[Array, "batch act"]


class ActorCriticState(eqx.Module):
    """Everything that evolves. `actor_metrics` is the report of the last update of the actor."""

    actor: PyTree
    target_actor: PyTree
    critics: PyTree
    target_critics: PyTree
    actor_opt: optax.OptState
    critic_opt: optax.OptState
    noise: NoiseState
    memory: PyTree
    """What one algorithm carries along besides: running statistics, a temperature; () for most."""
    actor_metrics: Metrics
    step: Int[Array, ""]


class AbstractActorCritic(AbstractAgent):
    """Critics, a delayed actor, target networks, the best of N."""

    num_candidates: int = 32
    """N while training: of the behaviour and of the TD target's next action [C]."""
    num_eval_candidates: int = 32
    num_target_candidates: int | None = None
    """N of the TD target's next action alone; None for `num_candidates` [C]."""
    bootstrap_with: Literal["online", "target"] = "online"
    """Which networks draw and choose the TD target's next action: those that act [C], or the target networks."""
    act_with: Literal["actor", "target_actor"] = "actor"
    """Which network draws actions."""
    exploration: Literal["annealed", "constant", "none"] = "annealed"
    """Gaussian noise on the chosen action: as `noise` says [C], always of `exploration_std`, or none."""
    exploration_std: float = 0.1
    noise: AnnealedNoise = AnnealedNoise(learning_rate=7e-3)
    noisy_target_action: bool = True
    """Whether the TD target's next action carries exploration noise [C]."""
    discount: float = 0.99
    """gamma, in [0, 1)."""
    reward_scale: float = 0.2
    """c_r, what rewards are multiplied by before they reach the critics [C]."""
    tau: float = 0.005
    """Share of the online networks that enters the target networks when they move."""
    policy_delay: int = 2
    """Updates of the critics per update of the actor and of the target networks."""
    critic_learning_rate: float = 3e-4
    actor_learning_rate: float = 3e-4
    final_actor_learning_rate: float = 3e-5
    decay_start: int = 25_000
    """The update at which the actor's learning rate begins to fall."""
    decay_updates: int = 50_000
    """How many updates it takes to fall."""
    max_grad_norm: float = 0.0
    """What the norm of all the critics' gradients together, and that of the actor's, is clipped to; 0 for none."""
    hidden: tuple[int, ...] = (256, 256, 256)
    activation: str = "mish"

    evaluation_policy = "stochastic: best of num_eval_candidates samples, no exploration noise"
    reports: ClassVar[tuple[str, ...]] = ("loss",)
    """The keys of the metrics that `actor_loss` returns, without "actor/"."""

    # --- What an algorithm says ---

    @abstractmethod
    def make_actor(self, obs_size: int, action_size: int, *, key: Key[Array, ""]) -> PyTree:
        """The actor's network."""

    @abstractmethod
    def sample(
        self, actor: PyTree, critics: PyTree, obs: Float[Array, " obs"], *, key: Key[Array, ""]
    ) -> Float[Array, " act"]:
        """One draw of the policy, in the box."""

    @abstractmethod
    def actor_loss(
        self,
        actor: PyTree,
        state: ActorCriticState,
        batch: Transition,
        next_actions: Actions,
        *,
        key: Key[Array, ""],
    ) -> tuple[Float[Array, ""], Metrics]:
        """What the actor descends, and metrics named as in `reports`.

        **Arguments:**

        - `state`: with the critics already updated; its `actor` is `actor`, without a gradient.
        - `next_actions`: those of the TD target, drawn at `batch.next_obs` by the policy before its update.
        """

    def next_values(
        self, state: ActorCriticState, next_obs: Observations, *, key: Key[Array, ""]
    ) -> tuple[Float[Array, " batch"], Actions]:
        """V(s') in the TD target, and the actions that it was judged by."""
        actor_keys, noise_keys = jr.split(key, (2, len(next_obs)))
        networks, num_candidates = state, self.num_target_candidates or self.num_candidates
        if self.bootstrap_with == "target":
            networks = dataclasses.replace(state, actor=state.target_actor, critics=state.target_critics)
        actions = self.best_of_n(networks, next_obs, num_candidates, keys=actor_keys)
        if self.noisy_target_action:
            actions = jax.vmap(lambda a, k: self.blur(state, a, key=k))(actions, noise_keys)
        return jax.vmap(lambda s, a: jnp.min(state.target_critics(s, a)))(next_obs, actions), actions

    def adapt(self, state: ActorCriticState, batch: Transition, *, key: Key[Array, ""]) -> ActorCriticState:
        """What else evolves at every update, after the critics: the exploration noise."""
        return dataclasses.replace(state, noise=self.noise.update(state.noise, state.step))

    def initial_memory(self, obs_size: int, action_size: int, *, key: Key[Array, ""]) -> PyTree:
        """`memory` of a fresh state."""
        return ()

    # --- Acting ---

    def q_value(
        self, critics: PyTree, obs: Float[Array, " obs"], action: Float[Array, " act"]
    ) -> Float[Array, ""]:
        """min_j Q_j(s, a)."""
        return jnp.min(critics(obs, action))

    def best_of_n(
        self,
        state: ActorCriticState,
        obs: Observations,
        num_candidates: int,
        *,
        keys: Key[Array, " batch"],
    ) -> Actions:
        """For each observation the best of `num_candidates` draws."""

        def one(obs, key):
            draw = lambda key: self.draw(state, obs, key=key)
            if num_candidates == 1:
                return draw(key)
            actions = jax.vmap(draw)(jr.split(key, num_candidates))
            values = jax.vmap(lambda action: self.q_value(state.critics, obs, action))(actions)
            return actions[jnp.argmax(values)]

        return vmap_in_blocks(one, obs, keys, rows_each=num_candidates)

    def act(self, state, obs, *, key, explore):
        sample_key, noise_key = jr.split(key)
        num_candidates = self.num_candidates if explore else self.num_eval_candidates
        action = self.best_of_n(state, obs[None], num_candidates, keys=sample_key[None])[0]
        return self.explore(state, action, key=noise_key) if explore else action

    def draw(
        self, state: ActorCriticState, obs: Float[Array, " obs"], *, key: Key[Array, ""]
    ) -> Float[Array, " act"]:
        """One of the candidates that `best_of_n` chooses from."""
        return self.sample(getattr(state, self.act_with), state.critics, obs, key=key)

    def explore(
        self, state: ActorCriticState, action: Float[Array, " act"], *, key: Key[Array, ""]
    ) -> Float[Array, " act"]:
        """The chosen action with exploration noise."""
        return add_noise(action, self.noise_std(state), key=key)

    def blur(
        self, state: ActorCriticState, action: Float[Array, " act"], *, key: Key[Array, ""]
    ) -> Float[Array, " act"]:
        """The TD target's next action with the noise that `noisy_target_action` means: the behaviour's."""
        return self.explore(state, action, key=key)

    def noise_std(self, state: ActorCriticState) -> Scalar:
        """Standard deviation of the exploration noise, in units of the box [-1, 1]."""
        if self.exploration == "annealed":
            return self.noise.std(state.noise)
        return jnp.array(self.exploration_std if self.exploration == "constant" else 0.0)

    # --- Updates ---

    @property
    def actor_optimizer(self) -> optax.GradientTransformation:
        """Adam with a linear decay, counted in updates of the actor."""
        schedule = optax.linear_schedule(
            self.actor_learning_rate,
            self.final_actor_learning_rate,
            transition_steps=max(1, self.decay_updates // self.policy_delay),
            transition_begin=self.decay_start // self.policy_delay,
        )
        return self.clipped_adam(schedule)

    @property
    def critic_optimizer(self) -> optax.GradientTransformation:
        """Adam."""
        return self.clipped_adam(self.critic_learning_rate)

    def clipped_adam(self, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        """Adam, after clipping by `max_grad_norm`."""
        adam = optax.adam(learning_rate)
        return (
            optax.chain(optax.clip_by_global_norm(self.max_grad_norm), adam) if self.max_grad_norm else adam
        )

    def update(self, state, batch, *, key):
        value_key, adapt_key, actor_key = jr.split(key, 3)
        next_values, next_actions = self.next_values(state, batch.next_obs, key=value_key)
        y = td_target(batch, next_values, discount=self.discount, reward_scale=self.reward_scale)
        grads, metrics = eqx.filter_grad(critic_loss, has_aux=True)(state.critics, batch, y)
        critics, critic_opt = gradient_step(self.critic_optimizer, state.critics, state.critic_opt, grads)
        state = dataclasses.replace(state, critics=critics, critic_opt=critic_opt)
        state = self.adapt(state, batch, key=adapt_key)
        delayed = partial(self.delayed_update, batch=batch, next_actions=next_actions, key=actor_key)
        due = shared(state.step) % self.policy_delay == 0
        state = delayed(state) if self.policy_delay == 1 else filter_cond(due, delayed, lambda s: s, state)
        state = dataclasses.replace(state, step=state.step + 1)
        return state, metrics | state.actor_metrics | {"noise_std": self.noise_std(state)}

    def delayed_update(
        self, state: ActorCriticState, *, batch: Transition, next_actions: Actions, key: Key[Array, ""]
    ) -> ActorCriticState:
        """The actor's step, then the target networks'."""
        loss = partial(self.actor_loss, state=state, batch=batch, next_actions=next_actions, key=key)
        grads, metrics = eqx.filter_grad(loss, has_aux=True)(state.actor)
        actor, actor_opt = gradient_step(self.actor_optimizer, state.actor, state.actor_opt, grads)
        return dataclasses.replace(
            state,
            actor=actor,
            actor_opt=actor_opt,
            actor_metrics=metrics,
            target_actor=polyak(state.target_actor, actor, self.tau),
            target_critics=polyak(state.target_critics, state.critics, self.tau),
        )

    # --- Initial state ---

    def init(self, example, *, key):
        sizes = vector_sizes(example)
        actor_key, critic_key, memory_key = jr.split(key, 3)
        actor = self.make_actor(*sizes, key=actor_key)
        critics = QEnsemble(*sizes, self.hidden, self.activation, key=critic_key)
        return self.from_networks(actor, critics, self.initial_memory(*sizes, key=memory_key))

    def from_networks(self, actor: Any, critics: Any, memory: PyTree = ()) -> ActorCriticState:
        """A fresh state around networks of your own: an actor as `make_actor` makes it, and
        `critics(obs, action)` that returns one value per member."""
        return ActorCriticState(
            actor=actor,
            target_actor=tree_copy(actor),
            critics=critics,
            target_critics=tree_copy(critics),
            actor_opt=self.actor_optimizer.init(eqx.filter(actor, eqx.is_inexact_array)),
            critic_opt=self.critic_optimizer.init(eqx.filter(critics, eqx.is_inexact_array)),
            noise=self.noise.init(),
            memory=memory,
            actor_metrics={f"actor/{name}": jnp.zeros(()) for name in self.reports},
            step=jnp.zeros((), jnp.int32),
        )


class AbstractDiffusionAgent(AbstractActorCritic):
    """An actor-critic whose policy is a diffusion over the steps of a chain, by noise prediction."""

    chain: DiffusionChain = DiffusionChain(20, beta_range=(1.6e-6, 0.015984))
    """Its steps; the default has betas from 8e-5 to 0.7992 [C]."""

    sizes = {
        "smoke": dict(
            hidden=(32, 32), chain=DiffusionChain(3, betas="cosine"), num_candidates=2, num_eval_candidates=2
        ),
        "cpu": dict(hidden=(256, 256), num_candidates=8, num_eval_candidates=8),
        "paper": dict(),
    }

    def make_actor(self, obs_size, action_size, *, key):
        shape = (obs_size, action_size, self.chain.num_steps)
        return NoisePredictor(*shape, self.hidden, self.activation, key=key)

    def sample(self, actor, critics, obs, *, key):
        return self.chain_sample(actor, obs, key=key)

    def chain_sample(
        self, actor: PyTree, obs: Float[Array, " obs"], *, key: Key[Array, ""]
    ) -> Float[Array, " act"]:
        """Ancestral sampling from N(0, I), the denoised action clipped at every step; differentiable."""
        start_key, chain_key = jr.split(key)
        predict, shares = actor.at(obs), actor.step_shares()
        schedule, num_steps = self.chain.schedule, self.chain.num_steps

        def denoise(x, t):
            eps = predict(x, shares[jnp.round(t * num_steps).astype(jnp.int32) - 1])
            return jnp.clip((x - schedule.sigma(t) * eps) / schedule.alpha(t), -1, 1)

        start = jr.normal(start_key, (actor.action_size,))
        return ddpm(denoise, start, uniform_grid(num_steps), schedule, key=chain_key)[0]

    def denoising_loss(
        self,
        actor: NoisePredictor,
        obs: Observations,
        actions: Actions,
        weights: Float[Array, " batch"] | None = None,
        *,
        key: Key[Array, ""],
    ) -> Float[Array, ""]:
        """The mean over a batch of w |eps - eps_hat|^2 / d, at one random step for each action."""
        step_key, noise_key = jr.split(key)
        steps = jr.randint(step_key, (len(actions),), 0, self.chain.num_steps)
        eps = jr.normal(noise_key, actions.shape)
        noised = jax.vmap(self.chain.perturb)(actions, eps, steps)
        squared = jnp.mean((jax.vmap(actor)(noised, steps, obs) - eps) ** 2, axis=-1)
        return jnp.mean(squared if weights is None else weights * squared)

    def noised(
        self, actions: Actions, *, key: Key[Array, ""]
    ) -> tuple[Actions, Int[Array, " batch"], Float[Array, " batch"], Float[Array, " batch"]]:
        """Actions after a random step of the chain each: `(a_t, step, alpha_t, sigma_t)`."""
        step_key, noise_key = jr.split(key)
        steps = jr.randint(step_key, (len(actions),), 0, self.chain.num_steps)
        noised = jax.vmap(self.chain.perturb)(actions, jr.normal(noise_key, actions.shape), steps)
        return noised, steps, self.chain.alpha(steps), self.chain.sigma(steps)
