"""DIPO: improved actions by NumPy's Adam, what is written back where, and which networks the TD target asks."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.algorithms.actor_critic import AbstractActorCritic
from eqgen.algorithms.dipo import DIPO
from eqgen.envs.base import example_transition
from eqgen.types import Transition
from helpers import assert_trees_close


OBS, ACT, BATCH = 3, 2, 8
SMALL = dataclasses.replace(DIPO.tiny(), hidden=(8, 8), capacity=16, pairs_per_update=3)
FRESH = dataclasses.replace(SMALL, write_back=False)


def state_of(agent, seed=0):
    return agent.init(example_transition((OBS,), ACT), key=jr.key(seed))


def transitions(key):
    keys = jr.split(key, 4)
    return Transition(
        obs=jr.normal(keys[0], (BATCH, OBS)),
        action=jr.uniform(keys[1], (BATCH, ACT), minval=-1.0, maxval=1.0),
        reward=jr.normal(keys[2], (BATCH,)),
        next_obs=jr.normal(keys[3], (BATCH, OBS)),
        terminated=jnp.full(BATCH, False),
        truncated=jnp.full(BATCH, False),
    )


class Quadratic(eqx.Module):
    """Two critics, whose maxima are of a height that depends on the state."""

    scale: jax.Array

    def at(self, obs):
        return lambda a: self(obs, a)

    def __call__(self, obs, action):
        centres = jnp.array([[0.5, 0.0], [-0.5, 0.3]])
        heights = jnp.stack([obs[0], jnp.zeros(())])
        return self.scale * (heights - 0.5 * jnp.sum((action[None] - centres) ** 2, axis=-1))


def gradient_by_hand(obs, action):
    """That of the smaller of the two values, at scale 1."""
    centres = np.array([[0.5, 0.0], [-0.5, 0.3]])
    values = np.array([obs[0], 0.0]) - 0.5 * np.sum((action - centres) ** 2, axis=1)
    return centres[np.argmin(values)] - action


improved = eqx.filter_jit(lambda agent, critics, obs, actions: agent.improved(critics, obs, actions))
DATA, KEY = transitions(jr.key(0)), jr.key(5)
STATE, FRESH_STATE = state_of(SMALL), state_of(FRESH)
CLIPPED = dataclasses.replace(SMALL, num_action_steps=12, action_step_size=0.1)
UNCLIPPED = dataclasses.replace(CLIPPED, action_grad_norm=0.0)


# --- The improvement ---


@pytest.mark.parametrize("agent", [CLIPPED, UNCLIPPED], ids=["clipped", "unclipped"])
def test_improved_actions_are_those_of_numpys_adam(agent):
    """The gradients of the whole batch clipped together, one Adam per coordinate, the box after every step."""
    actual = improved(agent, Quadratic(jnp.array(1.0)), DATA.obs, DATA.action)
    obs, a = np.asarray(DATA.obs, float), np.asarray(DATA.action, float)
    m = v = np.zeros_like(a)
    for t in range(1, 13):
        g = -np.stack([gradient_by_hand(s, x) for s, x in zip(obs, a)])
        if agent.action_grad_norm:
            g *= min(1.0, 0.1 * ACT / (np.linalg.norm(g) + 1e-6))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        a = a - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-5)
        a = np.clip(a, -1, 1)
    # Adam divides by small roots in single precision.
    np.testing.assert_allclose(actual, a, rtol=1e-3, atol=1e-4)


def test_the_scale_of_q_does_not_matter_clipped_or_not():
    """Adam divides it out; what it leaves of the clipping is that all steps have gradients of one size."""
    move = lambda agent, scale: improved(agent, Quadratic(jnp.array(scale)), DATA.obs, DATA.action)
    for agent in (CLIPPED, UNCLIPPED):
        # Adam's eps of 1e-5, beside gradients of 0.1 to 1.
        np.testing.assert_allclose(move(agent, 100.0), move(agent, 1.0), atol=1e-3)
    assert not np.allclose(move(CLIPPED, 1.0), move(UNCLIPPED, 1.0), atol=0.05)


def test_improved_actions_are_worth_more_and_stay_in_the_box():
    better = improved(FRESH, FRESH_STATE.critics, DATA.obs, DATA.action)
    value = jax.jit(jax.vmap(lambda s, a: jnp.min(FRESH_STATE.critics(s, a))))
    assert bool(jnp.all(value(DATA.obs, better) >= value(DATA.obs, DATA.action)))
    moved = np.abs(np.asarray(better - DATA.action))
    assert 0 < moved.max() < 0.1  # 3 steps of 0.03
    edge = jnp.tile(jnp.array([[1.0, -1.0]]), (BATCH, 1))
    assert bool(jnp.all(jnp.abs(improved(FRESH, FRESH_STATE.critics, DATA.obs, edge)) <= 1))


# --- The memory ---


def test_memory_takes_whole_batches_until_it_is_full_and_then_a_few_pairs():
    second = transitions(jr.key(1))
    adapt = eqx.filter_jit(lambda state, batch: SMALL.adapt(state, batch, key=KEY))
    states = [STATE]
    for data in (DATA, second, DATA):
        states.append(adapt(states[-1], data))
    assert [int(s.memory.size) for s in states] == [0, 8, 16, 16]
    obs, actions = states[-1].memory.data
    assert_trees_close(obs[:8], DATA.obs)  # of which the first three are written once more
    assert_trees_close(actions[8:], second.action)
    assert int(states[-1].memory.index) == 3
    last = adapt(states[-1], second).memory.data[0]
    assert_trees_close(last, obs.at[3:6].set(second.obs[:3]))


@pytest.fixture
def learned(monkeypatch):
    """A function that returns what an agent's actor learns from, and the memory by then."""

    def frame(self, state, *, batch, next_actions, key):
        return batch, state.memory

    monkeypatch.setattr(AbstractActorCritic, "delayed_update", frame)
    return eqx.filter_jit(
        lambda agent, state, batch: agent.delayed_update(
            state, batch=batch, next_actions=batch.action, key=KEY
        )
    )


def test_improved_pairs_are_learned_from_and_written_back_to_the_rows_they_came_from(learned):
    state = SMALL.adapt(STATE, DATA, key=KEY)
    batch, memory = learned(SMALL, state, transitions(jr.key(1)))
    rows = np.asarray(jr.randint(jr.split(KEY)[0], (BATCH,), 0, 8))
    obs, actions = (np.array(x) for x in state.memory.data)
    better = improved(SMALL, state.critics, jnp.asarray(obs[rows]), jnp.asarray(actions[rows]))
    assert not np.allclose(better, actions[rows])
    assert_trees_close((batch.obs, batch.action), (jnp.asarray(obs[rows]), better))
    actions[rows] = better
    assert_trees_close(memory.data, (jnp.asarray(obs), jnp.asarray(actions)))


def test_without_a_memory_the_batch_itself_is_improved(learned):
    batch, memory = learned(FRESH, FRESH_STATE, DATA)
    assert memory == FRESH_STATE.memory == ()
    better = improved(FRESH, FRESH_STATE.critics, DATA.obs, DATA.action)
    assert_trees_close((batch.obs, batch.action), (DATA.obs, better))


def test_loss_is_the_denoising_loss_of_the_pairs_and_their_value_is_reported():
    loss, metrics = eqx.filter_jit(FRESH.actor_loss)(
        FRESH_STATE.actor, FRESH_STATE, DATA, DATA.action, key=KEY
    )
    expected = eqx.filter_jit(FRESH.denoising_loss)(FRESH_STATE.actor, DATA.obs, DATA.action, key=KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    values = [min(FRESH_STATE.critics(s, a)) for s, a in zip(DATA.obs, DATA.action)]
    np.testing.assert_allclose(metrics["actor/value"], np.mean(values), rtol=1e-4)


# --- The frame's options that it uses ---


def test_td_target_asks_the_target_networks():
    asked = []

    class Asked(DIPO):
        def best_of_n(self, state, obs, num_candidates, *, keys):
            asked.append((state.actor, state.critics, num_candidates))
            return DATA.action

    target = dataclasses.replace(STATE, target_actor="slow actor", target_critics=Quadratic(jnp.array(2.0)))
    for bootstrap_with, networks in (
        ("target", (target.target_actor, target.target_critics)),
        ("online", (target.actor, target.critics)),
    ):
        Asked(bootstrap_with=bootstrap_with).next_values(target, DATA.next_obs, key=KEY)
        assert eqx.tree_equal(asked.pop(), (*networks, 1))


def test_gradients_are_clipped_to_a_norm_before_adam_sees_them():
    gradients = {"a": jnp.full(4, 3.0), "b": jnp.full(5, 4.0)}  # of norm sqrt(116)
    params = jax.tree.map(jnp.zeros_like, gradients)
    for optimizer in (FRESH.critic_optimizer, FRESH.actor_optimizer):
        _, (_, (adam, _)) = optimizer.update(gradients, optimizer.init(params), params)
        assert_trees_close(adam.mu, jax.tree.map(lambda g: 0.1 * g * 2.0 / 116**0.5, gradients))


@pytest.mark.parametrize("field, value", [("num_action_steps", 0), ("pairs_per_update", 0), ("capacity", 0)])
def test_counts_below_one_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}"):
        DIPO(**{field: value})
