"""DIPO: a diffusion policy learned from actions that gradients of Q have improved.

Yang, Huang, Lei, Zhong, Yang, Fang, Wen, Zhou and Lin, "Policy Representation via Diffusion Probability Model for
Reinforcement Learning", arXiv 2305.13122 (2023): a memory holds pairs of state and action. Its actions climb the
critic, and stay in the memory as they are then; a diffusion learns to draw them, by the plain denoising loss. So
the critic's gradient reaches the policy by way of data, not through the chain.

Notation (paper symbol = name here; t = 0 is the action, as in the paper):

    epsilon_phi(a_t, s, t) = actor      Q_psi = critics      eta = action_step_size      K = chain.num_steps

[P] the paper's abstract and digests of it (we have not seen its full text), [C] its authors' public code, [L] the
code of SDAC's authors (Ma et al., arXiv 2502.00361), where DIPO is a baseline, [I] inferred here, [T] tested here.

Differs from the paper and its code in:
- Improved actions are kept (`write_back`), as [C] sets out to do and [L] does. In [C] they are lost: it writes
  them into an indexed NumPy array, which is a copy, so that every action is improved afresh from the one that was
  taken. That is `write_back=False` here. On Pendulum the two have returns of -700 and -840 after 4,800
  updates; the first has -250 after 9,800 [T].
- The memory is the agent's own, with pairs from the batches it is given, which do not say where in replay they
  are. In [C] and [L] it mirrors replay, pair by pair.
- One improvement is some steps of Adam, the gradients of the whole batch clipped together [C, L], where the paper
  writes a + eta grad_a Q(s, a) [P].
- Evaluation draws from the policy; [C] leaves the noise out of the chain then, but for its start.
- [L] takes other betas, ReLU, and for all tasks the 30 steps and the clipping of about what [C] has for
  HalfCheetah.
"""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import PyTree

from eqgen.algorithms.actor_critic import AbstractDiffusionAgent, Actions, Observations
from eqgen.data.replay import ReplayBuffer
from eqgen.timesteps.times import DiffusionChain
from eqgen.tree import filter_cond, shared


class DIPO(AbstractDiffusionAgent):
    """Hyperparameters and methods of DIPO."""

    num_action_steps: int = 20
    """Gradient steps of one improvement [C], for all tasks but HalfCheetah, which has 40."""
    action_step_size: float = 0.03
    """eta, Adam's rate: about what each step moves each coordinate by, in units of the box [-1, 1] [C]."""
    action_grad_norm: float = 0.1
    """What the norm of the whole batch's action gradients is clipped to, per action dimension; 0 for none. 0.1 by
    default, from 0.08 to 0.3 by task in [C]. Adam divides gradients by their size, so that a limit which always
    applies changes one thing, whatever it is: gradients count alike at every step [T]."""
    write_back: bool = True
    """Whether improved actions go back into the memory and are improved further, or the actions of each batch are
    improved afresh, without a memory."""
    capacity: int = 2**16
    """Pairs that the memory holds [I]."""
    pairs_per_update: int = 5
    """Pairs of a batch that replace the oldest ones once the memory is full: as many as [L] makes transitions per
    update; 1 in [C]. A pair is improved batch size / this many times on average before it goes."""
    num_candidates: int = 1
    """The policy is not improved upon by a choice [C]."""
    num_eval_candidates: int = 1
    bootstrap_with: Literal["online", "target"] = "target"
    """The TD target's next action is the target actor's [C]."""
    exploration: Literal["annealed", "constant", "none"] = "none"
    """The policy's own spread explores [C]."""
    reward_scale: float = 1.0  # [C], as the next three: no decay
    policy_delay: int = 1
    final_actor_learning_rate: float = 3e-4
    max_grad_norm: float = 2.0
    """From 0.8 to 2 by task [C]."""
    chain: DiffusionChain = DiffusionChain(100, betas="cosine")
    """Its steps [C]."""

    sizes = {
        "smoke": dict(
            hidden=(32, 32), chain=DiffusionChain(3, betas="cosine"), num_action_steps=3, capacity=64
        ),
        "cpu": dict(hidden=(256, 256), capacity=2**14),
        "paper": dict(),
    }
    evaluation_policy = "stochastic: best of num_eval_candidates samples (one by default)"
    reports = ("loss", "value")

    def __check_init__(self):
        for name in ("num_action_steps", "capacity", "pairs_per_update"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")

    def improved(self, critics: PyTree, obs: Observations, actions: Actions) -> Actions:
        """Actions after `num_action_steps` steps of Adam up min_j Q_j, kept in the box."""
        adam = optax.adam(self.action_step_size, eps=1e-5)
        limit = self.action_grad_norm * actions.shape[1] if self.action_grad_norm else jnp.inf

        def improve(obs, action):
            q = critics.at(obs)

            def step(carry, _):
                action, opt_state = carry
                descent = jax.grad(lambda a: -jnp.min(q(a)))(action)
                norm = jnp.sqrt(jax.lax.psum(jnp.sum(descent**2), "batch"))
                change, opt_state = adam.update(descent * jnp.minimum(1, limit / (norm + 1e-6)), opt_state)
                return (jnp.clip(action + change, -1, 1), opt_state), None

            (action, _), _ = jax.lax.scan(step, (action, adam.init(action)), length=self.num_action_steps)
            return action

        return jax.vmap(improve, axis_name="batch")(obs, actions)

    def adapt(self, state, batch, *, key):
        """Besides, pairs of the batch enter the memory: all of them until it is full, some afterwards."""
        state = super().adapt(state, batch, key=key)
        if not self.write_back:
            return state
        pairs = (batch.obs, batch.action)
        some = jax.tree.map(lambda x: x[: self.pairs_per_update], pairs)
        filling = shared(state.memory.size) < self.capacity
        memory = filter_cond(filling, lambda m: m.add(pairs), lambda m: m.add(some), state.memory)
        return dataclasses.replace(state, memory=memory)

    def delayed_update(self, state, *, batch, next_actions, key):
        """The frame's, on pairs with improved actions in place of the batch's."""
        draw_key, key = jr.split(key)
        if self.write_back:
            rows = jr.randint(draw_key, (len(batch.obs),), 0, state.memory.size)
            obs, actions = jax.tree.map(lambda x: x[rows], state.memory.data)
            actions = self.improved(state.critics, obs, actions)
            replace = lambda old: old.at[rows].set(actions)
            memory = eqx.tree_at(lambda m: m.data[1], state.memory, replace_fn=replace)
            state = dataclasses.replace(state, memory=memory)
        else:
            obs, actions = batch.obs, self.improved(state.critics, batch.obs, batch.action)
        batch = dataclasses.replace(batch, obs=obs, action=actions)
        return super().delayed_update(state, batch=batch, next_actions=next_actions, key=key)

    def actor_loss(self, actor, state, batch, next_actions, *, key):
        """`batch` holds the improved pairs."""
        loss = self.denoising_loss(actor, batch.obs, batch.action, key=key)
        q = jax.vmap(lambda s, a: self.q_value(state.critics, s, a))(batch.obs, batch.action)
        return loss, {"actor/loss": loss, "actor/value": jnp.mean(q)}

    def initial_memory(self, obs_size, action_size, *, key):
        if not self.write_back:
            return ()
        return ReplayBuffer.create((jnp.zeros(obs_size), jnp.zeros(action_size)), self.capacity)
