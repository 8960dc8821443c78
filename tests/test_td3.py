"""TD3: its target and its actor's gradient by hand, what it does not do, and that no option is ignored."""

import dataclasses
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.algorithms.td3 import TD3
from eqgen.envs.base import example_transition
from eqgen.networks.policies import DeterministicPolicy
from eqgen.types import Transition
from helpers import assert_trees_close, filled


OBS, ACT, BATCH = 3, 2, 8


def state_of(agent, seed=0):
    init = lambda key: agent.init(example_transition((OBS,), ACT), key=key)
    return filled(eqx.filter_eval_shape(init, jr.key(0)), seed=seed)


def transitions(key, terminated=False):
    keys = jr.split(key, 4)
    return Transition(
        obs=jr.normal(keys[0], (BATCH, OBS)),
        action=jr.uniform(keys[1], (BATCH, ACT), minval=-1.0, maxval=1.0),
        reward=jr.normal(keys[2], (BATCH,)),
        next_obs=jr.normal(keys[3], (BATCH, OBS)),
        terminated=jnp.full(BATCH, terminated),
        truncated=jnp.full(BATCH, False),
    )


def test_the_policy_is_the_tanh_of_its_network(getkey):
    policy = DeterministicPolicy(OBS, ACT, (5,), key=getkey())
    obs = jr.normal(getkey(), (OBS,))
    (first, last), x = policy.net.layers, np.asarray(obs)
    hidden = np.maximum(x @ np.asarray(first.weights[0]) + np.asarray(first.bias), 0)
    expected = np.tanh(hidden @ np.asarray(last.weights[0]) + np.asarray(last.bias))
    assert_trees_close(policy(obs), jnp.asarray(expected))


def test_target_action_is_the_target_actors_blurred_and_clipped_twice(getkey):
    """a' = clip(pi'(s') + clip(0.2 z, -0.5, 0.5), -1, 1), and the smaller target critic values it."""
    agent = dataclasses.replace(TD3.tiny(), smoothing_std=0.6)  # large, so that the inner clip acts
    state, next_obs, key = state_of(agent), 3 * jr.normal(getkey(), (50, OBS)), getkey()
    state = dataclasses.replace(state, target_actor=state_of(agent, 1).actor)
    values, actions = agent.next_values(state, next_obs, key=key)
    normal = jax.vmap(lambda k: jr.normal(k, (ACT,)))(jr.split(key, (2, 50))[1])
    noise = np.clip(0.6 * np.asarray(normal), -0.5, 0.5)
    expected = np.clip(np.asarray(jax.vmap(state.target_actor)(next_obs)) + noise, -1, 1)
    assert np.any(np.abs(noise) == 0.5) and np.any(np.abs(expected) == 1)
    assert_trees_close(actions, jnp.asarray(expected))
    both = np.asarray(jax.vmap(state.target_critics)(next_obs, actions))
    np.testing.assert_allclose(values, both.min(axis=1), rtol=1e-5)


def test_constants_are_the_papers():
    agent = TD3()
    assert (agent.smoothing_std, agent.smoothing_clip, agent.exploration_std) == (0.2, 0.5, 0.1)
    assert (agent.policy_delay, agent.tau, agent.discount, agent.reward_scale) == (2, 0.005, 0.99, 1.0)
    rates = [agent.actor_optimizer.update(jnp.ones(1), agent.actor_optimizer.init(jnp.ones(1)))[0]]
    late = dataclasses.replace(agent, decay_start=0, decay_updates=2).actor_optimizer
    state = late.init(jnp.ones(1))
    for _ in range(3):
        step, state = late.update(jnp.ones(1), state)
        rates.append(step)
    np.testing.assert_allclose(np.ravel(rates), -3e-4, rtol=1e-4)  # no decay


def test_actor_loss_is_minus_the_first_critics_value_and_climbs_it(getkey):
    agent = TD3.tiny()
    state, batch = state_of(agent), transitions(getkey())
    _, next_actions = agent.next_values(state, batch.next_obs, key=getkey())
    loss = lambda actor: agent.actor_loss(actor, state, batch, next_actions, key=jr.key(0))[0]
    by_hand = -np.mean([float(state.critics(s, state.actor(s))[0]) for s in batch.obs])
    assert float(loss(state.actor)) == pytest.approx(by_hand, rel=1e-5)

    # The deterministic policy gradient: E[grad_phi pi(s) grad_a Q_1(s, a)].
    def surrogate(actor):
        slope = lambda s: jax.grad(lambda a: state.critics(s, a)[0])(state.actor(s))
        return -jnp.mean(jax.vmap(lambda s: jnp.dot(actor(s), jax.lax.stop_gradient(slope(s))))(batch.obs))

    gradient = lambda fn: eqx.filter_jit(eqx.filter_grad(fn))(state.actor)
    assert_trees_close(gradient(loss), gradient(surrogate))


def test_acts_without_noise_when_evaluated_and_with_constant_noise_otherwise(getkey):
    agent = TD3.tiny()
    state, obs = state_of(agent), jr.normal(getkey(), (OBS,))
    keys = jr.split(getkey(), 4000)
    greedy = agent.act(state, obs, key=keys[0], explore=False)
    assert_trees_close(greedy, state.actor(obs))
    noisy = jax.vmap(lambda k: agent.act(state, obs, key=k, explore=True))(keys)
    # A sample deviation of 8000 numbers is within 3 % of the true one.
    np.testing.assert_allclose(np.std(np.asarray(noisy) - np.asarray(greedy)), 0.1, rtol=0.03)


def test_several_candidates_of_a_deterministic_actor_are_refused():
    for name in ("num_candidates", "num_eval_candidates", "num_target_candidates"):
        with pytest.raises(ValueError, match=f"{name} is 4.*must be 1"):
            TD3(**{name: 4})


OPTIONS = {
    "act_with": ("target_actor", {}),
    "bootstrap_with": ("online", {}),
    "max_grad_norm": (1.0, {}),
    "smoothing_std": (0.3, {}),
    "smoothing_clip": (0.3, {}),
    "noisy_target_action": (False, {}),
    "discount": (0.9, {}),
    "reward_scale": (0.5, {}),
    "tau": (0.1, {}),
    "policy_delay": (1, {}),
    "critic_learning_rate": (1e-3, {}),
    "actor_learning_rate": (1e-3, {}),
    "final_actor_learning_rate": (1e-3, {}),
    "decay_start": (10, dict(final_actor_learning_rate=1e-4)),
    "decay_updates": (10, dict(final_actor_learning_rate=1e-4)),
    "hidden": ((8,), {}),
    "activation": ("tanh", {}),
    "exploration": ("annealed", {}),
    "exploration_std": (0.3, {}),
    "noise": (dataclasses.replace(TD3().noise, initial_std=0.3), dict(exploration="annealed")),
}


@cache
def program(agent):
    """An update and an action as JAX traces them, constants included."""
    state = eqx.filter_eval_shape(lambda key: agent.init(example_transition((OBS,), ACT), key=key), jr.key(0))

    def both(state, key):
        updated = agent.update(state, transitions(jr.key(0)), key=key)
        return updated, agent.act(state, jnp.ones(OBS), key=key, explore=True), agent.noise.init()

    return str(eqx.filter_make_jaxpr(both)(state, jr.key(1))[0])


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_is_accepted_and_ignored(name):
    value, needed = OPTIONS[name]
    agent = dataclasses.replace(TD3.tiny(), **needed)
    assert program(dataclasses.replace(agent, **{name: value})) != program(agent)


def test_every_field_is_covered_by_that_test():
    elsewhere = {"num_candidates", "num_eval_candidates", "num_target_candidates"}  # must be 1
    assert set(OPTIONS) | elsewhere == {field.name for field in dataclasses.fields(TD3)}
