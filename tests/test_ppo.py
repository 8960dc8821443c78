"""PPO: advantages against direct sums, the surrogate's gradients, what an update keeps and does not depend on."""

import dataclasses
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.algorithms.ppo import PPO, Samples, in_other_units
from eqgen.data.normalizer import RunningNormalizer
from eqgen.envs.base import example_transition
from eqgen.envs.catalog import make
from eqgen.losses import generalized_advantages
from eqgen.networks.mlp import MLP
from eqgen.training import OnlineSettings, seed_slice, train_online
from eqgen.types import Transition
from helpers import assert_trees_close, filled, take


OBS, ACT, TIME, ENVS = 3, 2, 8, 2
AGENT = PPO(rollout_length=TIME, epochs=2, minibatch_size=8, hidden=(8,))


def rollout(seed=0, time=TIME, envs=ENVS):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal((time, envs, *shape)), jnp.float32)
    flags = rng.uniform(size=(2, time, envs)) < 0.2
    actions = jnp.tanh(normal(ACT))
    return Transition(2 * normal(OBS) + 1, actions, normal(), normal(OBS), *map(jnp.asarray, flags))


@cache
def begun(agent=AGENT):
    """A state whose networks are not small, and the compiled update."""
    init = lambda key: agent.init(example_transition((OBS,), ACT), key=key)
    state = eqx.filter_jit(init)(jr.key(0))
    networks = filled(eqx.filter_eval_shape(lambda: state.networks))
    update = eqx.filter_jit(lambda state, batch: agent.update(state, batch, key=jr.key(1)))
    return state, eqx.tree_at(lambda s: s.networks, state, networks), update


# --- Advantages ---


def direct_sum(batch, v, next_v, discount, decay):
    """Each advantage on its own, forward in time."""
    batch = jax.tree.map(np.asarray, batch)
    delta = batch.reward + discount * ~batch.terminated * next_v - v
    over = batch.terminated | batch.truncated
    sums = np.zeros_like(delta)
    for t, env in np.ndindex(*delta.shape):
        for k in range(t, len(delta)):
            sums[t, env] += (discount * decay) ** (k - t) * delta[k, env]
            if over[k, env]:
                break
    return sums


@pytest.mark.parametrize("discount, decay", [(0.9, 0.8), (0.99, 0.0), (0.97, 1.0)])
def test_advantages_are_the_sums_of_errors_up_to_the_end_of_the_episode(discount, decay):
    batch, rng = rollout(time=12, envs=3), np.random.default_rng(5)
    v, next_v = (jnp.asarray(rng.standard_normal((12, 3)), jnp.float32) for _ in range(2))
    advantage = generalized_advantages(batch, v, next_v, discount=discount, trace_decay=decay)
    assert_trees_close(advantage, jnp.asarray(direct_sum(batch, v, next_v, discount, decay)), atol=1e-5)
    alone = take(jax.tree.map(lambda x: x.swapaxes(0, 1), (batch, v, next_v)), 1)
    assert_trees_close(
        generalized_advantages(*alone, discount=discount, trace_decay=decay), advantage[:, 1], atol=1e-6
    )


@pytest.mark.parametrize("end, beyond", [("none", 7.0), ("truncated", 7.0), ("terminated", 0.0)])
def test_with_lambda_1_they_are_returns_less_values_and_only_termination_has_nothing_beyond(end, beyond):
    flag = lambda name: jnp.array([False, False, end == name])
    batch = take(rollout(time=3, envs=1), slice(None))
    batch = Transition(
        batch.obs[:, 0],
        batch.action[:, 0],
        jnp.array([1.0, 2.0, 4.0]),
        batch.next_obs[:, 0],
        flag("terminated"),
        flag("truncated"),
    )
    v, next_v = jnp.array([3.0, 5.0, 6.0]), jnp.array([5.0, 6.0, 7.0])
    advantage = generalized_advantages(batch, v, next_v, discount=0.5, trace_decay=1.0)
    returns = jnp.array([1 + 1 + 1 + beyond / 8, 2 + 2 + beyond / 4, 4 + beyond / 2])
    assert_trees_close(advantage, returns - v)


# --- The loss ---


@cache
def loss_and_grads(agent=AGENT):
    """((loss, metrics), gradients) of networks and samples, compiled."""
    both = eqx.filter_value_and_grad(agent.loss, has_aux=True)
    return eqx.filter_jit(lambda networks, batch: both(networks, batch, key=jr.key(0)))


@eqx.filter_jit
def samples(state, batch, moved=0.0):
    """What the loss sees of a rollout; `moved` is added to log pi_old, by turns upwards and downwards."""
    obs, action = (x.reshape(-1, x.shape[-1]) for x in (batch.obs, batch.action))
    log_prob = jax.vmap(state.networks[0].log_prob)(obs, action)
    advantage, target = batch.reward.reshape(-1), batch.reward.reshape(-1) ** 2
    sign = (-1.0) ** jnp.arange(len(obs))
    return Samples(obs, action, log_prob + moved * sign, advantage, target)


def test_loss_equals_the_papers_in_numpy():
    state = begun()[1]
    batch = samples(state, rollout(), moved=0.3)
    (loss, metrics), _ = loss_and_grads()(state.networks, batch)

    (policy, value), x = jax.tree.map(np.asarray, state.networks), np.asarray(batch.obs)
    net = lambda mlp: (
        np.tanh(x @ mlp.layers[0].weights[0] + mlp.layers[0].bias) @ mlp.layers[1].weights[0]
        + mlp.layers[1].bias
    )
    action, std = np.asarray(batch.action), np.exp(policy.log_std)
    pre = np.arctanh(action)
    density = np.exp(-0.5 * ((pre - net(policy.net)) / std) ** 2) / (np.sqrt(2 * np.pi) * std)
    ratio = np.prod(density / (1 - action**2), axis=1) / np.exp(batch.log_prob)
    a = np.asarray(batch.advantage)
    a = (a - a.mean()) / a.std()
    surrogate = np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    value_loss = np.mean((net(value)[:, 0] - batch.target) ** 2) / 2
    assert float(loss) == pytest.approx(float(-surrogate.mean() + 0.5 * value_loss), rel=1e-4)
    assert float(metrics["actor/clipped"]) == 1.0  # exp(0.3) and exp(-0.3) are both beyond 0.2
    assert float(metrics["actor/kl"]) == pytest.approx(float(np.mean(ratio - 1 - np.log(ratio))), rel=1e-3)


def test_at_the_policy_that_acted_the_gradient_is_the_policy_gradient():
    state = begun()[1]
    batch = samples(state, rollout())
    (_, metrics), grads = loss_and_grads()(state.networks, batch)
    advantage = (batch.advantage - batch.advantage.mean()) / batch.advantage.std()

    def objective(policy):
        return -jnp.mean(advantage * jax.vmap(policy.log_prob)(batch.obs, batch.action))

    expected = eqx.filter_jit(eqx.filter_grad(objective))(state.networks[0])
    assert_trees_close(grads[0], expected, rtol=1e-4, atol=1e-6)
    assert float(metrics["actor/kl"]) == float(metrics["actor/clipped"]) == 0.0


@pytest.mark.parametrize(
    "ratio, advantage, slope",
    [(1.3, 1, 0), (1.3, -1, -1.3), (0.7, 1, 0.7), (0.7, -1, 0), (1.1, 1, 1.1), (0.9, -1, -0.9)],
)
def test_clipping_stops_the_gradient_where_the_ratio_has_moved_the_way_that_pays(ratio, advantage, slope):
    total = lambda log_ratio: jnp.sum(AGENT.surrogate(log_ratio, jnp.array([float(advantage)])))
    assert float(jax.grad(total)(jnp.log(jnp.array([ratio])))[0]) == pytest.approx(slope, abs=1e-6)


def test_entropy_bonus_widens_the_policy():
    """Far from the bounds the entropy is log std + const in each dimension, whose derivative is 1."""
    state = begun()[1]
    narrow = eqx.tree_at(lambda n: n[0].log_std, state.networks, jnp.full(ACT, -5.0))
    narrow = eqx.tree_at(lambda n: n[0].net.layers[-1].weights[0], narrow, jnp.zeros((8, ACT)))
    # With ratios of 0 the surrogate has no gradient of its own.
    batch = samples(state, rollout())
    batch = dataclasses.replace(batch, log_prob=jnp.full(len(batch.obs), 1e6))
    slope = lambda agent: loss_and_grads(agent)(narrow, batch)[1][0].log_std
    assert_trees_close(slope(AGENT), jnp.zeros(ACT), atol=1e-6)
    bonus = dataclasses.replace(AGENT, entropy_weight=0.5)
    assert_trees_close(slope(bonus), jnp.full(ACT, -0.5), rtol=1e-2)  # the squash bends even there


# --- Updates ---


def raw_value(state, obs):
    return jax.vmap(lambda s: state.targets.inverse(state.networks[1](s)))(obs)


def test_what_is_learned_does_not_depend_on_the_scale_of_rewards():
    first, _, update = begun()
    batch = rollout()
    larger = dataclasses.replace(batch, reward=1000 * batch.reward)
    (one, _), (other, _) = update(first, batch), update(first, larger)
    assert_trees_close(
        other.networks, one.networks, rtol=1e-3, atol=1e-5
    )  # rounding, through eight Adam steps
    obs = batch.obs.reshape(-1, OBS)
    assert_trees_close(raw_value(other, obs), 1000 * raw_value(one, obs), rtol=1e-3, atol=1e-2)


def test_values_stay_what_they_were_when_their_units_change(getkey):
    net, x = MLP((3,), "scalar", (4,), key=getkey()), jr.normal(getkey(), (5, 3))
    old, new = (RunningNormalizer(*map(jnp.array, (m, s**2, 9.0))) for m, s in ((2.0, 3.0), (-40.0, 0.5)))
    before, after = old.inverse(jax.vmap(net)(x)), new.inverse(jax.vmap(in_other_units(net, old, new))(x))
    assert_trees_close(after, before, atol=1e-5)


def test_running_moments_are_those_of_all_rows():
    rng = np.random.default_rng(0)
    parts = [scale * rng.standard_normal((n, 2)) + scale for n, scale in ((1, 1), (5, 10), (30, 0.1))]
    running = RunningNormalizer.create((2,))
    assert_trees_close(running(jnp.ones((3, 2))), jnp.ones((3, 2)))
    for part in parts:
        running = running.update(jnp.asarray(part, jnp.float32))
    rows = np.concatenate(parts)
    assert float(running.count) == 36
    assert_trees_close(running.mean, jnp.asarray(rows.mean(0), jnp.float32))
    assert_trees_close(running.variance, jnp.asarray(rows.var(0), jnp.float32))
    row = jnp.asarray(rows[4], jnp.float32)
    assert_trees_close(running.inverse(running(row)), row)
    constant = RunningNormalizer.create((2,)).update(jnp.full((4, 2), 3.0))
    assert_trees_close(constant.std, jnp.ones(2))


def test_moments_of_observations_are_those_of_the_rollouts_and_move_after_the_update():
    _, state, update = begun()
    batch = rollout()
    after, metrics = update(state, batch)
    obs = np.asarray(batch.obs).reshape(-1, OBS)
    assert_trees_close(after.observations.mean, jnp.asarray(obs.mean(0)), atol=1e-5)
    assert_trees_close(after.observations.variance, jnp.asarray(obs.var(0)), atol=1e-5)
    # Until then the networks saw what they acted on: raw observations, as before the first update.
    log_prob = jax.vmap(state.networks[0].log_prob)(obs, batch.action.reshape(-1, ACT))
    assert float(metrics["actor/entropy"]) == pytest.approx(-float(log_prob.mean()), rel=1e-4)
    act = lambda agent: agent.act(after, batch.obs[0, 0], key=jr.key(0), explore=False)
    policy, z = after.networks[0], after.observations(batch.obs[0, 0])
    assert_trees_close(act(AGENT), policy.mode(z))
    assert_trees_close(
        act(dataclasses.replace(AGENT, observation_clip=0.1)), policy.mode(jnp.clip(z, -0.1, 0.1))
    )
    assert_trees_close(
        act(dataclasses.replace(AGENT, normalize_observations=False)), policy.mode(batch.obs[0, 0])
    )


@pytest.mark.parametrize("num, size, steps", [(12, 4, 9), (10, 4, 7), (3, 8, 3)])
def test_minibatches_are_epochs_of_permutations_end_to_end(num, size, steps):
    agent = PPO(epochs=3, minibatch_size=size)
    rows = np.asarray(agent.minibatches(num, key=jr.key(0)))
    assert rows.shape == (steps, min(size, num))
    epochs = np.split(rows.reshape(-1), [num, 2 * num])
    assert all(sorted(epoch) == list(range(num)) for epoch in epochs[:2])
    assert len(set(epochs[2].tolist())) == len(epochs[2]) > num - size
    assert not np.array_equal(epochs[0], epochs[1])


def test_learning_rate_falls_by_update_and_the_gradients_norm_is_cut():
    agent = PPO(learning_rate=1.0, decay_updates=4, adam_eps=1e-12)
    params, grads = jnp.zeros(2), jnp.array([30.0, 40.0])

    def first_step(agent, step):
        optimizer = agent.optimizer(jnp.array(step))
        return optimizer.update(grads, optimizer.init(params))

    for step, rate in ((0, 1.0), (1, 0.75), (4, 0.0), (9, 0.0)):
        assert_trees_close(first_step(agent, step)[0], jnp.full(2, -rate))
    assert_trees_close(first_step(dataclasses.replace(agent, decay_updates=0), 9)[0], jnp.full(2, -1.0))
    momentum = first_step(agent, 0)[1][1][0].mu
    assert_trees_close(momentum, 0.1 * jnp.array([0.3, 0.4]))  # 0.1 is Adam's 1 - beta_1


# --- Learning ---


def test_learns_the_best_action_of_each_observation():
    """The probe's is s / 2. Nothing there needs to be normalised; without it the moments stay as they are."""
    plain = dict(normalize_observations=False, normalize_targets=False)
    agent = PPO(rollout_length=16, epochs=4, minibatch_size=32, hidden=(16,), learning_rate=1e-2, **plain)
    settings = OnlineSettings(
        total_steps=8192,
        num_envs=8,
        warmup_steps=0,
        batch_size=None,
        log_every=8192,
        eval_every=0,
        checkpoint_every=0,
    )
    *_, last = train_online(agent, make("probe/both"), settings, seeds=(0,))
    assert last.num_updates == 64
    state = seed_slice(last.state.agent, 0)
    for s in (-1.0, 1.0):
        action = agent.act(state, jnp.array([s]), key=jr.key(0), explore=False)
        assert float(action[0]) == pytest.approx(s / 2, abs=0.1)  # the noise of the last rollouts
    assert float(state.observations.count) == float(state.targets.count) == 0


@pytest.mark.parametrize("field", ["rollout_length", "epochs", "minibatch_size"])
def test_impossible_fields_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} is 0; it must be at least 1"):
        PPO(**{field: 0})
