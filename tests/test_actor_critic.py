"""The frame of the actor-critics, on DPMD and SDAC: chains by hand, targets by hand, and the two losses' laws."""

import dataclasses
from functools import cache, partial
from typing import Literal, get_args, get_origin

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.algorithms.dacer import DACER
from eqgen.algorithms.dpmd import DPMD
from eqgen.algorithms.fpmd import FPMDM, FPMDR
from eqgen.algorithms.idem import IDEM
from eqgen.algorithms.maxentdp import MaxEntDP
from eqgen.algorithms.qsm import QSM, DenoisingQSM
from eqgen.algorithms.qvpo import QVPO
from eqgen.algorithms.sdac import SDAC
from eqgen.algorithms.td3 import TD3
from eqgen.envs.base import example_transition
from eqgen.exploration import AnnealedNoise
from eqgen.timesteps.times import DiffusionChain
from eqgen.types import Transition
from helpers import assert_trees_close


OBS, ACT, BATCH = 3, 2, 8
CHAIN = DiffusionChain(4, beta_range=(1e-4, 0.003))


def state_of(agent, seed=0):
    return agent.init(example_transition((OBS,), ACT), key=jr.key(seed))


def transitions(key, terminated=False):
    keys = jr.split(key, 4)
    return Transition(
        obs=jr.normal(keys[0], (BATCH, OBS)),
        action=jr.uniform(keys[1], (BATCH, ACT), minval=-1.0, maxval=1.0),
        reward=jr.normal(keys[2], (BATCH,)),
        next_obs=jr.normal(keys[3], (BATCH, OBS)),
        terminated=jnp.full(BATCH, terminated),
        truncated=jnp.full(BATCH, True),
    )


# --- The policy ---


def test_default_chain_has_the_published_betas():
    expected = 0.8 * np.linspace(1e-4, 0.999, 20)
    np.testing.assert_allclose(DPMD().chain.tables.beta, expected, rtol=1e-12)


def test_hoisted_noise_predictor_equals_the_plain_one(getkey):
    actor = state_of(DPMD.tiny()).actor
    obs, x = jr.normal(getkey(), (OBS,)), jr.normal(getkey(), (5, ACT))
    shares, predict = actor.step_shares(), actor.at(obs)
    hoisted = lambda k: jax.vmap(lambda x: predict(x, shares[k]))(x)
    plain = lambda k: jax.vmap(lambda x: actor(x, k, obs))(x)
    steps = jnp.arange(actor.num_steps)
    assert_trees_close(jax.vmap(hoisted)(steps), jax.vmap(plain)(steps))


def test_sampling_is_ancestral_with_the_denoised_action_clipped(getkey):
    """The recursion of Ho et al. (2020), Eq. 7, written out in NumPy with the same noise."""
    agent = dataclasses.replace(DPMD.tiny(), chain=CHAIN)
    state, obs, key = state_of(agent), jr.normal(getkey(), (OBS,)), getkey()
    sampled = eqx.filter_jit(agent.chain_sample)(state.actor, obs, key=key)

    start_key, chain_key = jr.split(key)
    x, noise_keys = np.asarray(jr.normal(start_key, (ACT,)), float), jr.split(chain_key, CHAIN.num_steps)
    beta, alpha_bar = CHAIN.tables.beta, CHAIN.tables.alpha_bar
    before = np.append(1.0, alpha_bar[:-1])
    for k, noise_key in zip(reversed(range(CHAIN.num_steps)), noise_keys):
        eps = np.asarray(state.actor(jnp.asarray(x, jnp.float32), jnp.int32(k), obs))
        x_0 = np.clip((x - np.sqrt(1 - alpha_bar[k]) * eps) / np.sqrt(alpha_bar[k]), -1, 1)
        mean = np.sqrt(before[k]) * beta[k] / (1 - alpha_bar[k]) * x_0
        mean += np.sqrt(1 - beta[k]) * (1 - before[k]) / (1 - alpha_bar[k]) * x
        std = np.sqrt(beta[k] * (1 - before[k]) / (1 - alpha_bar[k]))
        x = mean + std * np.asarray(jr.normal(noise_key, (ACT,)))
    # The library's form goes through log-SNRs in float32, this one through products in float64.
    np.testing.assert_allclose(sampled, x, rtol=1e-3, atol=1e-4)
    assert np.all(np.abs(sampled) <= 1)


def test_best_of_n_takes_the_candidate_the_critics_value_most(getkey):
    agent = DPMD.tiny()
    state, obs, key = state_of(agent), jr.normal(getkey(), (1, OBS)), getkey()
    best = agent.best_of_n(state, obs, 5, keys=key[None])[0]
    draws = jax.vmap(lambda k: agent.sample(state.actor, state.critics, obs[0], key=k))(jr.split(key, 5))
    values = jax.vmap(lambda a: jnp.min(state.critics(obs[0], a)))(draws)
    assert_trees_close(best, draws[jnp.argmax(values)])


def test_evaluation_has_no_exploration_noise(getkey):
    agent = dataclasses.replace(DPMD.tiny(), num_candidates=2, num_eval_candidates=2)
    state, obs, key = state_of(agent), jr.normal(getkey(), (OBS,)), getkey()
    quiet = dataclasses.replace(agent, exploration="none")
    greedy = agent.act(state, obs, key=key, explore=False)
    assert_trees_close(quiet.act(state, obs, key=key, explore=True), greedy)
    assert not np.allclose(agent.act(state, obs, key=key, explore=True), greedy)


# --- Updates ---


def test_td_target_by_hand():
    """c_r r, plus the discounted minimum over target critics unless terminated; truncation bootstraps."""
    agent = dataclasses.replace(DPMD.tiny(), exploration="none", reward_scale=0.5, discount=0.9)
    state, key = state_of(agent), jr.key(1)
    values, actions = agent.next_values(state, transitions(jr.key(0)).next_obs, key=key)
    for terminated in (True, False):
        batch = transitions(jr.key(0), terminated)
        metrics = agent.update(state, batch, key=jr.key(3))[1]
        value_key = jr.split(jr.key(3), 3)[0]
        values, actions = agent.next_values(state, batch.next_obs, key=value_key)
        by_hand = [min(state.target_critics(s, a)) for s, a in zip(batch.next_obs, actions)]
        np.testing.assert_allclose(values, by_hand, rtol=1e-5)
        y = 0.5 * batch.reward + (0.0 if terminated else 0.9) * values
        assert float(metrics["critic/target"]) == pytest.approx(float(jnp.mean(y)), rel=1e-5)


def test_actor_and_targets_move_only_every_policy_delay():
    agent = dataclasses.replace(DPMD.tiny(), policy_delay=3, tau=0.1)
    update = eqx.filter_jit(lambda s, k: agent.update(s, transitions(jr.key(0)), key=k)[0])
    states = [state_of(agent)]
    for i in range(4):
        states.append(update(states[-1], jr.key(i)))
    for name in ("actor", "target_actor", "target_critics"):
        moved = [not eqx.tree_equal(getattr(a, name), getattr(b, name)) for a, b in zip(states, states[1:])]
        assert moved == [True, False, False, True], name
    expected = jax.tree.map(
        lambda old, new: 0.9 * old + 0.1 * new, states[0].target_critics, states[1].critics
    )
    assert_trees_close(states[1].target_critics, expected)


def test_actor_learning_rate_decays_in_units_of_updates():
    agent = DPMD(actor_learning_rate=1.0, final_actor_learning_rate=0.1, decay_start=20, decay_updates=40)
    optimizer, params = agent.actor_optimizer, jnp.zeros(1)
    state, steps = optimizer.init(params), []
    for _ in range(40):  # of the actor: one per two updates
        update, state = optimizer.update(jnp.ones(1), state, params)
        steps.append(-float(update[0]))
    assert steps[10] == pytest.approx(1.0, rel=1e-4)
    assert steps[20] == pytest.approx(0.55, rel=1e-4)
    assert steps[-1] == pytest.approx(0.1, rel=1e-4)


def test_temperature_is_tied_to_the_exploration_noise():
    for agent in (DPMD(), SDAC()):
        start = state_of(dataclasses.replace(agent, hidden=(4,)))
        assert float(agent.temperature(start)) == pytest.approx(5.0, rel=1e-5)
    noise = AnnealedNoise(period=1, learning_rate=0.1)
    state = noise.init()
    for step in range(200):
        state = noise.update(state, jnp.int32(step))
    assert float(noise.std(state)) / 0.1 == pytest.approx(
        np.exp(-0.9) / np.sqrt(2 * np.pi * np.e) / 0.1, rel=0.02
    )


# --- DPMD ---


def test_dpmd_weights_are_those_of_standardised_values(getkey):
    agent = dataclasses.replace(DPMD.tiny(), weight_clip=1.5)
    state, batch, key = state_of(agent), transitions(getkey()), getkey()
    state = dataclasses.replace(state, memory=(jnp.float32(0.3), jnp.float32(0.02)))
    loss, metrics = agent.actor_loss(state.actor, state, batch, batch.action, key=key)
    q = np.array([min(state.critics(s, a)) for s, a in zip(batch.next_obs, batch.action)])
    weights = np.exp(np.clip((q - 0.3) / 0.02, -1.5, 1.5) / 5)
    weights /= weights.mean()
    assert float(metrics["actor/weight_max"]) == pytest.approx(weights.max(), rel=1e-4)
    by_hand = agent.denoising_loss(
        state.actor, batch.next_obs, batch.action, jnp.asarray(weights, jnp.float32), key=key
    )
    assert float(loss) == pytest.approx(float(by_hand), rel=1e-4)


def test_denoising_loss_by_hand(getkey):
    agent, key = DPMD.tiny(), getkey()
    state, batch, weights = state_of(agent), transitions(getkey()), jnp.arange(1.0, BATCH + 1)
    step_key, noise_key = jr.split(key)
    steps = jr.randint(step_key, (BATCH,), 0, agent.chain.num_steps)
    eps, total = jr.normal(noise_key, (BATCH, ACT)), 0.0
    for i, k in enumerate(steps):
        alpha_bar = agent.chain.tables.alpha_bar[k]
        noised = np.sqrt(alpha_bar) * batch.action[i] + np.sqrt(1 - alpha_bar) * eps[i]
        error = state.actor(noised.astype(jnp.float32), k, batch.obs[i]) - eps[i]
        total += float(weights[i] * jnp.mean(error**2)) / BATCH
    loss = agent.denoising_loss(state.actor, batch.obs, batch.action, weights, key=key)
    assert float(loss) == pytest.approx(total, rel=1e-4)


def test_dpmd_statistics_follow_the_critics():
    agent = dataclasses.replace(DPMD.tiny(), statistics_rate=0.25)
    state, batch = state_of(agent), transitions(jr.key(5))
    mean, std = agent.adapt(state, batch, key=jr.key(0)).memory
    q = np.array([min(state.critics(s, a)) for s, a in zip(batch.obs, batch.action)])
    assert float(mean) == pytest.approx(0.25 * q.mean(), rel=1e-4)
    assert float(std) == pytest.approx(0.75 + 0.25 * q.std(), rel=1e-4)


# --- SDAC ---


def sdac_by_repetition(agent, actor, state, batch, *, key):
    """The published form: the network regresses on every proposal's own noise, weighted."""
    sample_key, noise_key, proposal_key = jr.split(key, 3)
    clean = agent.best_of_n(state, batch.obs, agent.num_candidates, keys=jr.split(sample_key, BATCH))
    a_t, steps, alpha_t, sigma_t = agent.noised(clean, key=noise_key)

    def one(obs, a_t, step, alpha_t, sigma_t, key):
        noise = -jr.normal(key, (agent.num_proposals, ACT))  # the code's sign: (a_t - sigma noise) / alpha
        recon = jnp.clip((a_t[None] - sigma_t * noise) / alpha_t, -1, 1)
        q = jax.vmap(lambda a: jnp.min(state.critics(obs, a)))(recon)
        weights = jax.nn.softmax(agent.q_scale / agent.temperature(state) * q)
        error = actor(a_t, step, obs)[None] - noise
        return jnp.sum(weights[:, None] * error**2) / ACT

    rows = (batch.obs, a_t, steps, alpha_t, sigma_t, jr.split(proposal_key, BATCH))
    return jnp.mean(jax.vmap(one)(*rows))


def test_sdac_gradient_is_that_of_the_published_repetition(getkey):
    agent = dataclasses.replace(SDAC.tiny(), q_scale=200.0)
    state, batch, key = state_of(agent), transitions(getkey()), getkey()
    frugal = lambda actor: agent.actor_loss(actor, state, batch, batch.action, key=key)[0]
    repeated = partial(sdac_by_repetition, agent, state=state, batch=batch, key=key)
    # Noise of order one enters the sums in another order.
    assert_trees_close(
        eqx.filter_grad(frugal)(state.actor), eqx.filter_grad(repeated)(state.actor), rtol=1e-3, atol=1e-5
    )


def test_sdac_learns_the_noise_predictor_of_the_soft_policy():
    """For Q quadratic inside the box the target's mean is the exact eps of a Gaussian, in closed form."""
    agent = SDAC(num_proposals=4096, q_scale=1.0, noise=AnnealedNoise(initial_std=0.1))  # lambda = 1
    center, width = jnp.array([0.2, -0.1]), 0.1
    critics = lambda obs, a: jnp.stack([-0.5 * jnp.sum((a - center) ** 2) / width**2] * 2)
    a_t, alpha_t, sigma_t = center * 0.9 + jnp.array([0.05, -0.1]), jnp.float32(0.9), jnp.float32(0.2)
    zero = lambda a_t, k, obs: jnp.zeros(ACT)
    state = dataclasses.replace(state_of(dataclasses.replace(agent, hidden=(4,))), critics=critics)
    fixed = lambda clean, key: (a_t[None], jnp.zeros(1, jnp.int32), alpha_t[None], sigma_t[None])

    class Fixed(SDAC):
        def best_of_n(self, state, obs, num_candidates, *, keys):
            return a_t[None]

        def noised(self, actions, *, key):
            return fixed(actions, key)

    one = jax.tree.map(lambda x: x[:1], transitions(jr.key(0)))
    agent = Fixed(**{f.name: getattr(agent, f.name) for f in dataclasses.fields(agent)})
    loss, metrics = agent.actor_loss(zero, state, one, one.action, key=jr.key(2))
    gain = alpha_t * width**2 / (alpha_t**2 * width**2 + sigma_t**2)
    eps = (a_t - alpha_t * (center + gain * (a_t - alpha_t * center))) / sigma_t
    # 4096 proposals of which a fifth count: 3 % of the deviation of eps.
    assert float(loss) == pytest.approx(float(jnp.mean(eps**2)), rel=0.1)
    assert 200 < float(metrics["actor/effective_samples"]) < 4096


# --- Options ---


@cache
def programs(agent):
    """Update, behaviour and evaluation as JAX traces them, constants included."""
    state = eqx.filter_eval_shape(lambda key: agent.init(example_transition((OBS,), ACT), key=key), jr.key(0))
    update = lambda s, key: agent.update(s, transitions(jr.key(0)), key=key)
    act = lambda s, key: [agent.act(s, jnp.ones(OBS), key=key, explore=how) for how in (True, False)]
    return tuple(str(eqx.filter_make_jaxpr(f)(state, jr.key(1))[0]) for f in (update, act))


NEEDED = {
    "exploration_std": dict(exploration="constant")
}  # fields that matter where another has the value beside it
ELSEWHERE = {"chain", "noise"}  # modules of their own


def other_value(field, value):
    """Another value of a field that is supported too."""
    choices = get_args(field.type)
    if get_origin(field.type) is Literal:
        return next(choice for choice in choices if choice != value)
    match value:
        case bool():
            return not value
        case None:
            return 3
        case int():
            return 2 * value + 1
        case float():
            return 0.37 * value + 0.013
        case tuple():
            return (16,)
        case str():
            return "relu" if value != "relu" else "mish"


AGENTS = [DACER, DPMD, FPMDM, FPMDR, IDEM, MaxEntDP, QSM, DenoisingQSM, QVPO, SDAC, TD3]


@pytest.mark.slow
@pytest.mark.parametrize("cls", AGENTS, ids=lambda cls: cls.__name__)
def test_no_option_is_accepted_and_ignored(cls):
    """Every field changes a traced program, or the value is refused."""
    ignored = []
    for field in dataclasses.fields(cls):
        if field.name in ELSEWHERE:
            continue
        agent = dataclasses.replace(cls.tiny(), **NEEDED.get(field.name, {}))
        try:
            other = dataclasses.replace(agent, **{field.name: other_value(field, getattr(agent, field.name))})
        except ValueError:
            continue
        if programs(other) == programs(agent):
            ignored.append(field.name)
    assert not ignored
