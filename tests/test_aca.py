"""ACA: the guided chain in NumPy, the two losses by hand, which levels they are of, and when each step is taken."""

import dataclasses
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.algorithms.aca import ACA
from eqgen.envs.base import example_transition
from eqgen.timesteps.times import DiffusionChain
from eqgen.types import Transition
from helpers import assert_trees_close, filled


OBS, ACT, BATCH = 3, 2, 8
CHAIN = DiffusionChain(5, betas="cosine")
levels = pytest.mark.parametrize("clean_level", ["own", "shared"])


def state_of(agent, seed=0):
    init = lambda key: agent.init(example_transition((OBS,), ACT), key=key)
    state = filled(eqx.filter_eval_shape(init, jr.key(0)), seed=seed)
    return dataclasses.replace(
        state, opt_state=jax.tree.map(jnp.zeros_like, state.opt_state), step=jnp.array(0)
    )


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


# --- The chain ---


SHARES = jnp.broadcast_to(jnp.arange(5.0)[:, None, None], (5, 2, 1))


def quadratic(scale=1.0):
    """Critics -scale |a - c_l|^2 and 0, whose maximum moves with the level; shares hold the number of the level."""

    def q(action, share):
        centre = jnp.array([0.5, -0.3]) + 0.1 * share[0, 0]
        return jnp.stack([-scale * jnp.sum((action - centre) ** 2), jnp.zeros(())])

    return q


def test_guidance_has_the_deviations_of_the_reverse_process():
    beta, alpha_bar, posterior = CHAIN.tables
    stds = np.asarray(ACA(chain=CHAIN).guidance_stds)
    np.testing.assert_allclose(stds[1:], np.sqrt(posterior[1:]), rtol=1e-6)
    assert stds[0] == 0
    default = ACA().guidance_stds * 50 * ACA().chain.sigma(jnp.arange(20)) / ACA().chain.alpha(jnp.arange(20))
    # How far the denoised action is moved, as the head of the file says: in steps 1, 10 and 19.
    np.testing.assert_allclose(default[jnp.array([1, 10, 19])], [0.64, 21.8, 20240], rtol=0.01)


def test_chain_is_ancestral_sampling_with_the_unit_gradient_as_noise(getkey):
    agent, start, key = ACA(chain=CHAIN, guidance_weight=2.0), jr.normal(getkey(), (ACT,)), getkey()
    action = jax.jit(lambda: agent.denoised(quadratic(), SHARES, start, key=key))()
    x, noise_keys = np.asarray(start, float), jr.split(key, 4)
    beta, alpha_bar, _ = CHAIN.tables
    before = np.append(1.0, alpha_bar[:-1])
    for k in reversed(range(5)):
        std = np.sqrt(beta[k] * (1 - before[k]) / (1 - alpha_bar[k]))
        gradient = -2 * (x - (np.array([0.5, -0.3]) + 0.1 * k))
        eps = -2.0 * std * gradient / np.linalg.norm(gradient)
        x_0 = np.clip((x - np.sqrt(1 - alpha_bar[k]) * eps) / np.sqrt(alpha_bar[k]), -1, 1)
        x = np.sqrt(before[k]) * beta[k] / (1 - alpha_bar[k]) * x_0 + (
            np.sqrt(1 - beta[k]) * (1 - before[k]) / (1 - alpha_bar[k]) * x
        )
        if k > 0:
            x += std * np.asarray(jr.normal(noise_keys[4 - k], (ACT,)))
    # The library's form goes through log-SNRs in float32, this one through products in float64.
    np.testing.assert_allclose(action, x, rtol=1e-3, atol=1e-4)


def test_chain_does_not_see_the_scale_of_the_critics(getkey):
    agent, start, key = ACA(chain=CHAIN), jr.normal(getkey(), (ACT,)), getkey()
    denoised = jax.jit(lambda scale: agent.denoised(quadratic(scale), SHARES, start, key=key))
    assert_trees_close(denoised(1000.0), denoised(1.0), rtol=1e-4, atol=1e-5)


@levels
def test_best_particle_by_the_clean_level_is_taken_and_evaluated_without_noise(clean_level, getkey):
    agent = dataclasses.replace(ACA.tiny(), num_particles=4, clean_level=clean_level)
    state, obs, key = state_of(agent), jr.normal(getkey(), (OBS,)), getkey()

    @eqx.filter_jit
    def run(state):
        critics, (start_key, chain_key) = state.critics, jr.split(jr.split(key)[0])
        shares = critics.level_shares()[critics.num_levels - agent.chain.num_steps :]
        one = lambda start, key: agent.denoised(critics.at(obs), shares, start, key=key)
        actions = jax.vmap(one)(jr.normal(start_key, (4, ACT)), jr.split(chain_key, 4))
        values = jax.vmap(lambda a: jnp.min(critics(obs, a, critics.embeddings()[0])))(actions)
        acted = {explore: agent.act(state, obs, key=key, explore=explore) for explore in (True, False)}
        return actions, values, acted

    actions, values, acted = run(state)
    assert len(set(np.asarray(values))) == 4
    assert_trees_close(acted[False], actions[jnp.argmax(values)])
    assert not np.allclose(acted[True], acted[False])


# --- Learning ---


@levels
def test_noised_levels_regress_on_the_frozen_clean_value(clean_level, getkey):
    agent = dataclasses.replace(ACA.tiny(), chain=CHAIN, clean_level=clean_level)
    critics, batch, key = state_of(agent).critics, transitions(getkey()), getkey()
    assert critics.num_levels == {"own": 6, "shared": 5}[clean_level]
    loss, grads = eqx.filter_jit(eqx.filter_value_and_grad(agent.noised_loss))(critics, batch, key=key)

    step_key, noise_key = jr.split(key)
    steps = np.asarray(jr.randint(step_key, (BATCH,), 0, 5))
    eps, alpha_bar = np.asarray(jr.normal(noise_key, (BATCH, ACT))), CHAIN.tables.alpha_bar[steps][:, None]
    noised = jnp.asarray(np.sqrt(alpha_bar) * batch.action + np.sqrt(1 - alpha_bar) * eps, jnp.float32)
    of_steps = steps + (1 if clean_level == "own" else 0)

    def by_hand(critics, frozen):
        embeddings = critics.embeddings()
        clean = jax.vmap(lambda s, a: frozen(s, a, frozen.embeddings()[0]))(batch.obs, batch.action)
        q = jax.vmap(critics)(batch.obs, noised, embeddings[of_steps])
        return jnp.sum(jnp.mean((q - jnp.mean(clean, axis=1, keepdims=True)) ** 2, axis=0))

    expected, expected_grads = eqx.filter_jit(eqx.filter_value_and_grad(by_hand))(critics, critics)
    assert_trees_close(loss, expected)
    assert_trees_close(grads, expected_grads, rtol=1e-4, atol=1e-5)


@cache
def updates(noised_delay):
    """States after 0, ..., 4 updates on terminated transitions, and their metrics."""
    agent = dataclasses.replace(ACA.tiny(), noised_delay=noised_delay, tau=0.1)
    batch = transitions(jr.key(0), terminated=True)
    update = eqx.filter_jit(lambda s, k: agent.update(s, batch, key=k))
    states, metrics = [state_of(agent)], []
    for i in range(4):
        state, last = update(states[-1], jr.key(i))
        states, metrics = [*states, state], [*metrics, last]
    return agent, batch, states, metrics


@pytest.mark.slow
def test_steps_of_the_one_optimiser_are_one_or_two_an_update():
    for noised_delay, expected in ((2, [0, 2, 3, 5, 6]), (1, [0, 2, 4, 6, 8])):
        _, _, states, metrics = updates(noised_delay)
        counts = [int(state.opt_state[0].count) for state in states]
        assert counts == expected
    losses = [float(metric["critic/noised_loss"]) for metric in updates(2)[3]]
    assert losses[0] == losses[1] != losses[2] == losses[3]  # the last one is reported


def test_first_update_by_hand():
    """TD at the clean level, then the noised step on the critics that came out, then the targets by tau."""
    agent, batch, (before, after, *_), metrics = updates(2)
    assert float(metrics[0]["critic/target"]) == pytest.approx(0.2 * float(jnp.mean(batch.reward)), rel=1e-5)
    target = 0.2 * batch.reward

    @eqx.filter_jit
    def first(state):
        grads, _ = eqx.filter_grad(agent.clean_loss, has_aux=True)(state.critics, batch, target)
        step, opt_state = agent.optimizer.update(grads, state.opt_state)
        critics = eqx.apply_updates(state.critics, step)
        grads = eqx.filter_grad(agent.noised_loss)(critics, batch, key=jr.split(jr.key(0))[1])
        return eqx.apply_updates(critics, agent.optimizer.update(grads, opt_state)[0])

    # The first step of Adam is the sign of the gradient, which rounding may turn where it is nearly 0.
    assert_trees_close(after.critics, first(before), rtol=1e-3, atol=1e-4)
    mixed = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, before.target_critics, after.critics)
    assert_trees_close(after.target_critics, mixed)


def test_next_value_is_the_smaller_target_critics_at_the_clean_level(getkey):
    agent = ACA.tiny()
    state, next_obs, key = state_of(agent), jr.normal(getkey(), (BATCH, OBS)), getkey()
    state = dataclasses.replace(state, target_critics=state_of(agent, 1).critics)

    @eqx.filter_jit
    def run(state):
        sample_keys, noise_keys = jr.split(key, (2, BATCH))
        actions = agent.sample(state, next_obs, keys=sample_keys)
        noise = jax.vmap(lambda k: jr.normal(k, (ACT,)))(noise_keys)
        actions = jnp.clip(actions + agent.noise.std(state.noise) * noise, -1, 1)
        clean = lambda s, a: state.target_critics(s, a, state.target_critics.embeddings()[0])
        return agent.next_values(state, next_obs, key=key), jax.vmap(clean)(next_obs, actions)

    values, by_hand = run(state)
    assert_trees_close(values, jnp.min(by_hand, axis=1))


def test_learning_rate_falls_in_steps_of_the_optimiser():
    optimizer = ACA(learning_rate=1.0, final_learning_rate=0.1, decay_start=10, decay_steps=20).optimizer
    state, steps = optimizer.init(jnp.zeros(1)), []
    for _ in range(40):
        update, state = optimizer.update(jnp.ones(1), state)
        steps.append(-float(update[0]))
    np.testing.assert_allclose([steps[10], steps[20], steps[39]], [1.0, 0.55, 0.1], rtol=1e-4)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="num_particles is 0.*at least 1"):
        ACA(num_particles=0)
    mistyped = eqx.tree_at(lambda agent: agent.clean_level, ACA(), "mine")
    with pytest.raises(ValueError, match=r"ACA\(clean_level='mine'\).*shared"):
        super(ACA, mistyped).__check_init__()  # behind the type checks that only the tests switch on


OPTIONS = {  # those that the laws above do not hold to account
    "chain": CHAIN,
    "guidance_weight": 60.0,
    "num_particles": 3,
    "clean_level": "shared",
    "noised_delay": 3,
    "noise": dataclasses.replace(ACA().noise, target_entropy=-0.5),
    "discount": 0.9,
}


@cache
def program(agent):
    """The update as JAX traces it, constants included."""
    init = lambda key: agent.init(example_transition((OBS,), ACT), key=key)
    state = eqx.filter_eval_shape(init, jr.key(0))
    update = lambda s, key: agent.update(s, transitions(jr.key(0)), key=key)
    return str(eqx.filter_make_jaxpr(update)(state, jr.key(1))[0])


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_is_accepted_and_ignored(name):
    assert program(dataclasses.replace(ACA.tiny(), **{name: OPTIONS[name]})) != program(ACA.tiny())
