"""Every agent's critic on every probe environment, whose optimal Q is known and no policy can change."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from eqgen.algorithms.aca import ACA
from eqgen.algorithms.base import AbstractOnPolicyAgent
from eqgen.algorithms.nclql import LQL, NCLQL
from eqgen.algorithms.ppo import PPO
from eqgen.envs.base import example_transition, step_autoreset
from eqgen.envs.probes import PROBES
from eqgen.tree import filter_scan
from eqgen.types import Transition
from test_contracts import AGENTS


DISCOUNT, UPDATES, BATCH = 0.8, 1500, 64
LEARNERS = [cls for cls in AGENTS if not issubclass(cls, AbstractOnPolicyAgent)]
QUICK = {"TD3"}
"""Whose critics most others have."""


def collect(env, num_steps=600, *, key):
    """Transitions under uniform actions."""
    reset_key, key = jr.split(key)
    state, obs = env.reset(key=reset_key)

    def step(carry, key):
        state, obs = carry
        action_key, key = jr.split(key)
        action = jr.uniform(action_key, (1,), minval=-1.0, maxval=1.0)
        state, next_obs, timestep = step_autoreset(env, state, action, key=key)
        transition = Transition(
            obs, action, timestep.reward, timestep.obs, timestep.terminated, timestep.truncated
        )
        return (state, next_obs), transition

    return jax.lax.scan(step, (state, obs), jr.split(key, num_steps))[1]


def agent_of(cls):
    """Rewards as they are, quick critics, and of soft values only the value: a temperature of next to nothing."""
    wanted = dict(
        discount=DISCOUNT, reward_scale=1.0, tau=0.05, learning_rate=2e-3, critic_learning_rate=2e-3
    )
    wanted |= dict(initial_temperature=1e-6, temperature_learning_rate=0.0)
    if cls.__name__ == "MaxEntDP":
        wanted |= dict(temperature=1e-4)
    agent = cls.tiny()
    names = {field.name for field in dataclasses.fields(agent)}
    return dataclasses.replace(agent, **{name: value for name, value in wanted.items() if name in names})


def clean_critics(agent, critics):
    """The function of observation and action, where critics have levels of noise too."""
    if isinstance(agent, ACA):
        return critics.at_level(0)
    return agent.clean(critics) if isinstance(agent, LQL | NCLQL) else critics


def exact_values(name):
    row = data_of(name)
    q = lambda obs, action: PROBES[name]().true_q(obs, action, discount=DISCOUNT)
    return jax.vmap(q)(row.obs, row.action)


def distance(q, name):
    """The root of the mean squared error at a probe's data, over its largest value, if that exceeds 1."""
    exact = exact_values(name)
    return float(jnp.sqrt(jnp.mean((q - exact) ** 2)) / jnp.maximum(1.0, jnp.max(exact)))


@cache
def data():
    """(probes, steps): a row of transitions for each probe."""
    rows = [collect(make(), key=jr.key(i)) for i, make in enumerate(PROBES.values())]
    return jax.tree.map(lambda *rows: jnp.stack(rows), *rows)


def data_of(name):
    return jax.tree.map(lambda x: x[list(PROBES).index(name)], data())


@pytest.mark.parametrize(
    "cls",
    [pytest.param(cls, marks=[] if cls.__name__ in QUICK else [pytest.mark.slow]) for cls in LEARNERS],
    ids=lambda cls: cls.__name__,
)
def test_critics_learn_the_known_values(cls):
    agent = agent_of(cls)

    @jax.jit
    @jax.vmap
    def learned(data):
        def step(state, key):
            batch_key, key = jr.split(key)
            rows = jr.randint(batch_key, (BATCH,), 0, len(data.reward))
            return agent.update(state, jax.tree.map(lambda x: x[rows], data), key=key)[0], None

        state = agent.init(example_transition((1,), 1), key=jr.key(0))
        state, _ = filter_scan(step, state, jr.split(jr.key(1), UPDATES))
        critics = clean_critics(agent, state.critics)
        return jax.vmap(lambda s, a: jnp.mean(critics(s, a)))(data.obs, data.action)

    learned_values = learned(data())
    for name, q in zip(PROBES, learned_values):
        # Adam at a constant rate keeps weights on the move; the faults that probes are for are larger, as below.
        assert distance(q, name) < 0.06, name


def test_the_faults_that_probes_are_for_are_larger():
    """The critic that is 0, the one that sees nothing, and the one that takes a time limit for an end."""
    for name in PROBES:
        assert distance(0.0, name) > 0.2, name
    for name in ("observation", "action", "both"):
        assert distance(jnp.mean(exact_values(name)), name) > 0.2, name
    assert distance(1 / (1 - 0.8 * DISCOUNT), "truncation") > 0.2


def test_values_of_ppo_are_the_known_ones():
    """Those of any policy, where actions do not matter; rollouts are pieces of six environments' 100 steps."""
    names, updates = ("constant", "observation", "delayed", "truncation"), 600
    agent = PPO(
        discount=DISCOUNT,
        epochs=2,
        minibatch_size=60,
        hidden=(16,),
        learning_rate=3e-2,
        decay_updates=updates,
    )
    rows = jax.tree.map(lambda *rows: jnp.stack(rows), *map(data_of, names))

    @jax.jit
    @jax.vmap
    def learned(row):
        rollouts = jax.tree.map(lambda x: x.reshape(6, 100, *x.shape[1:]).swapaxes(0, 1), row)

        def step(state, key):
            start = jr.randint(key, (), 0, 80)
            piece = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, 20), rollouts)
            return agent.update(state, piece, key=key)[0], None

        state = agent.init(example_transition((1,), 1), key=jr.key(0))
        state, _ = filter_scan(step, state, jr.split(jr.key(1), updates))
        value = lambda s: state.targets.inverse(state.networks[1](agent.normalized(state, s)))
        return jax.vmap(value)(row.obs)

    for name, values in zip(names, learned(rows)):
        # As above.
        assert distance(values, name) < 0.06, name
