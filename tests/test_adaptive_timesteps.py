"""The adaptive timestep sampler: Beta laws, gradients, the look, the choice of S, and how it runs on the device."""

import io
import math
import textwrap
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from jaxtyping import TypeCheckError
from scipy import stats

from eqgen.hyperparameters import from_json, to_json
from eqgen.networks.timestep_policies import ImagePolicy, SharedPolicy, TrajectoryPolicy, VectorPolicy
from eqgen.schedules import Karras, LinearFlow
from eqgen.timesteps import adaptive
from eqgen.timesteps.adaptive import AdaptiveTimesteps
from eqgen.timesteps.base import Draw, period_scan
from eqgen.timesteps.beta import beta_entropy, beta_log_prob
from eqgen.timesteps.heuristics import StaticTimesteps
from eqgen.timesteps.laws import Uniform
from eqgen.timesteps.selection import select_columns
from eqgen.timesteps.times import ContinuousTimes, DiffusionChain, FlowIntervals
from eqgen.timesteps.weightings import BoundWeight, Constant, MinSNR
from eqgen.tree import filter_scan
from helpers import assert_trees_close, take


CHAIN = DiffusionChain(20)
PERIOD = 4
START = np.log1p(np.exp(0.5)) + 1e-5  # 0.97409, both parameters of the law before training


# --- A small diffusion model and its training step, shared by the tests ---


class Denoiser(eqx.Module):
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key, rate=0.0):
        self.mlp = eqx.nn.MLP(3, 2, 16, 1, key=key)
        self.dropout = eqx.nn.Dropout(rate)

    def __call__(self, x, t, key):
        return self.mlp(jnp.append(self.dropout(x, key=key), t / 20))


def objective(model, x, t, key):
    noise_key, dropout_key = jr.split(key)
    eps = jr.normal(noise_key, x.shape)
    return jnp.mean((model(CHAIN.perturb(x, eps, t), t, dropout_key) - eps) ** 2)


OPTIMIZER = optax.adam(1e-2)


def train_step(sampler, carry, x, key, look=None):
    """One step of training; `carry` is (model, opt_state, sampler state)."""
    model, opt_state, state = carry
    draw_key, noise_key, look_key = jr.split(key, 3)
    draw = sampler.sample(state, len(x), x=x, key=draw_key)

    def loss(model):
        losses = jax.vmap(partial(objective, model))(x, draw.t, jr.split(noise_key, len(x)))
        return jnp.mean(draw.weight * losses), losses

    grads, losses = eqx.filter_grad(loss, has_aux=True)(model)
    updates, opt_state = OPTIMIZER.update(grads, opt_state)
    new = eqx.apply_updates(model, updates)
    state = sampler.update(
        state, draw, losses, before=model, after=new, x=x, objective=objective, key=look_key, look=look
    )
    return (new, opt_state, state), draw.t


def start(sampler, key):
    model = Denoiser(key)
    opt_state = OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))
    return model, opt_state, sampler.init(jnp.zeros(2), key=key)


def data(num_steps, batch=8):
    x = np.random.default_rng(0).normal(size=(num_steps, batch, 2)) * 0.3 + np.array([1.0, -0.5])
    return jnp.asarray(x, jnp.float32), jr.split(jr.key(1), num_steps)


SAMPLER = AdaptiveTimesteps(CHAIN, look_every=PERIOD, sweep=10, reward_batch=4)


def run(carry, xs, sampler=SAMPLER):
    """Training by the period scan."""
    step = lambda carry, x, look: train_step(sampler, carry, *x, look=look)
    return period_scan(step, carry, xs, period=PERIOD)


@pytest.fixture(scope="module")
def compiled_run():
    """`run`, compiled once for every test that uses it, and the number of its traces."""
    traces = []

    @eqx.filter_jit
    def counted(carry, xs):
        traces.append(1)
        return run(carry, xs)

    return counted, traces


# --- Beta laws ---


def test_entropy(x64):
    a, b = np.meshgrid(np.geomspace(0.05, 50, 13), np.geomspace(0.05, 50, 13))
    entropy = jax.jit(beta_entropy)
    exact = stats.beta(a, b).entropy()
    np.testing.assert_allclose(entropy(a, b), exact, atol=1e-5)
    # Terms of up to 200 cancel in single precision.
    single = entropy(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(single, exact, rtol=1e-4, atol=3e-4)
    assert np.all(entropy(a, b) <= 1e-12) and abs(entropy(jnp.ones(1), jnp.ones(1))[0]) < 1e-12
    gradient = jax.grad(lambda a, b: beta_entropy(a, b), argnums=(0, 1))
    np.testing.assert_allclose(gradient(jnp.array(1.0), jnp.array(1.0)), (0, 0), atol=1e-12)


def test_density_and_its_gradient_at_clipped_draws():
    u = jnp.array([1e-6, 0.3, 1 - 1e-6])
    for a, b in [(0.05, 0.05), (50.0, 0.05), (50.0, 50.0), (START, START)]:
        log_prob = lambda shape: jax.vmap(lambda u: beta_log_prob(u, *shape))(u)
        shape = jnp.array([a, b])
        # Logarithms near 0 and 1 in single precision.
        np.testing.assert_allclose(log_prob(shape), stats.beta.logpdf(u, a, b), rtol=1e-3, atol=1e-3)
        assert jnp.all(jnp.isfinite(jax.jacobian(log_prob)(shape)))


def test_draws_never_reach_the_ends():
    """At a = b = 0.05 a fifth of the Beta draws in float32 are exactly 1."""
    sampler = AdaptiveTimesteps(CHAIN, policy="shared", uniform_share=0.0)
    state = sampler.from_network(eqx.tree_at(lambda p: p.raw, SharedPolicy(2), jnp.full(2, -20.0)))
    run = lambda key: (sampler.sample(state, 10_000, key=key).aux, jr.beta(key, 0.05, 0.05, (10_000,)))
    u, raw = jax.jit(run)(jr.key(2))
    assert jnp.mean(raw == 1) > 0.1
    assert jnp.all((u >= 1e-6) & (u <= 1 - 1e-6) & (u > 0) & (u < 1))
    assert jnp.mean(u > 0.5) == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
def test_steps_whose_weight_is_capped_are_drawn_by_the_share():
    """c = 500 at the last step of the cosine schedule: the share is 500 times as dense there, draws have the
    law that `probabilities` gives, and the density of the policy gradient integrates to 1."""
    chain = DiffusionChain(50, betas="cosine")
    sampler = AdaptiveTimesteps(chain, policy="shared", uniform_share=0.4, shape_range=None)
    raw = jnp.full(2, jnp.log(jnp.expm1(1 - 1e-5)))  # a = b = 1
    state = sampler.from_network(eqx.tree_at(lambda p: p.raw, SharedPolicy(2), raw))
    probabilities = np.asarray(sampler.probabilities(state), float)
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-5)
    density = probabilities / np.diff(np.asarray(chain.edges()[0])) - 0.6
    excess = np.maximum(1, chain.kl_weights)
    np.testing.assert_allclose(
        density / density[20], excess / excess[20], rtol=1e-2
    )  # .6 + .04 in float32, less .6
    draws = sampler.sample(state, 100_000, key=jr.key(5))
    counts = np.bincount(draws.t, minlength=50)
    assert stats.chisquare(counts, 1e5 * probabilities / probabilities.sum()).pvalue > 1e-3

    one, middles = jnp.ones(1), jnp.asarray((np.arange(10_000) + 0.5) / 10_000, jnp.float32)
    density = jax.vmap(lambda u: jnp.exp(sampler.log_prob(one, one, u[None])))(middles)
    assert float(jnp.mean(density)) == pytest.approx(
        1, abs=5e-3
    )  # a hundred points lie in the last step's cell


def test_the_cap_leaves_what_lies_below_it():
    cosine = DiffusionChain(1000, betas="cosine")
    largest = lambda sampler: float(jnp.max(sampler.rewarding(cosine.points(), cosine))) * math.log(2)
    assert largest(AdaptiveTimesteps.paper(cosine)) == pytest.approx(499.5, rel=1e-3)
    assert largest(AdaptiveTimesteps(cosine)) == pytest.approx(1, rel=1e-5)
    for betas in ("linear", "quad"):
        assert max(DiffusionChain(1000, betas=betas).kl_weights) < 1


def test_policy_starts_nearly_uniform():
    """a = b = softplus(0.5) + 1e-5 for every x; end cells of half width have the mass 0.594 / T."""
    chain = DiffusionChain(1000)
    sampler = AdaptiveTimesteps(chain, uniform_share=0.0)
    state = sampler.init(jnp.zeros(2), key=jr.key(0))
    x = jr.normal(jr.key(3), (100_000, 2))
    shapes = jax.vmap(partial(sampler.shapes, state.policy))(x[:5])
    np.testing.assert_allclose(shapes, START, rtol=1e-6)
    t, probabilities = eqx.filter_jit(
        lambda x, key: (sampler.sample(state, len(x), x=x, key=key).t, sampler.probabilities(state, x[:2]))
    )(x, jr.key(4))
    cdf = stats.beta(START, START).cdf(np.append(np.insert((np.arange(1, 1000) - 0.5) / 999, 0, 0), 1))
    exact = np.diff(cdf)
    np.testing.assert_allclose(jnp.sum(probabilities), 1, rtol=1e-5)
    np.testing.assert_allclose(
        probabilities, exact, atol=3e-6
    )  # differences of float32 distribution functions
    np.testing.assert_allclose(exact[[0, -1]] * 1000, 0.594, atol=1e-3)
    np.testing.assert_allclose(exact[500] * 1000, 0.985, atol=1e-3)
    assert stats.chisquare(np.bincount(t, minlength=1000), exact * len(x)).pvalue > 1e-3


def test_uniform_mixture():
    sampler = AdaptiveTimesteps(CHAIN, reward=BoundWeight(), policy="shared", uniform_share=0.3)
    raw = jnp.array([2.0, 3.0])
    state = sampler.from_network(eqx.tree_at(lambda p: p.raw, SharedPolicy(2), raw))
    a, b = np.log1p(np.exp(np.asarray(raw))) + 1e-5
    u = np.asarray(jax.jit(lambda key: sampler.sample(state, 20_000, key=key).aux)(jr.key(5))[:, 0], float)
    assert stats.kstest(u, lambda u: 0.7 * stats.beta.cdf(u, a, b) + 0.3 * u).pvalue > 1e-3
    density = jax.vmap(lambda u: sampler.log_prob(jnp.array([a]), jnp.array([b]), u))(u[:50, None])
    expected = np.log(0.7 * stats.beta.pdf(u[:50], a, b) + 0.3)
    np.testing.assert_allclose(density, expected, rtol=1e-4, atol=1e-5)
    t = sampler.times.from_unit(jnp.asarray(u, jnp.float32)[:, None])
    counts = np.bincount(t, minlength=20)
    probabilities = np.asarray(sampler.probabilities(state), float)
    assert stats.chisquare(counts, len(u) * probabilities / probabilities.sum()).pvalue > 1e-3


# --- The policy gradient ---


def draws(a, b, share=0.0, n=1_000_000):
    rng = np.random.default_rng(6)
    u = np.where(rng.random(n) < share, rng.random(n), rng.beta(a, b, n))
    return jnp.clip(u, 1e-6, 1 - 1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_score_function(share, x64):
    """E[score] = 0, and E[f score] is the gradient of E[f] for f = u, whose mean is a / (a + b)."""
    a, b = 2.0, 0.7
    sampler = AdaptiveTimesteps(CHAIN, reward=BoundWeight(), uniform_share=share)
    u = draws(a, b, share)
    log_prob = lambda shape, u: sampler.log_prob(shape[:1], shape[1:], u)
    score = jax.jit(jax.vmap(jax.grad(log_prob), (None, 0)))(jnp.array([a, b]), u[:, None])
    error = np.std(score, axis=0) / len(u) ** 0.5
    assert np.all(np.abs(np.mean(score, axis=0)) < 4 * error)
    estimate = score * u[:, None]
    exact = (1 - share) * np.array([b, -a]) / (a + b) ** 2
    error = np.std(estimate, axis=0) / len(u) ** 0.5
    assert np.all(np.abs(np.mean(estimate, axis=0) - exact) < 4 * error)


@pytest.mark.parametrize("mode", ["code", "standard"])
def test_entropy_gradient(mode, x64):
    """Without reward the policy ascends -lambda H grad H in "code" mode (in mean), lambda grad H in "standard"."""
    sampler = AdaptiveTimesteps(CHAIN, entropy=0.5, entropy_mode=mode, uniform_share=0.0)
    policy = eqx.tree_at(lambda p: p.raw, SharedPolicy(2), jnp.array([1.5, 0.2]))
    a, b = (float(shape[0]) for shape in sampler.shapes(policy, None))
    u, parts = draws(a, b), 100
    entropy = lambda policy: jnp.sum(beta_entropy(*sampler.shapes(policy, None)))
    h, grad_h = entropy(policy), eqx.filter_grad(entropy)(policy).raw

    def ascent(u):
        grads = eqx.filter_grad(sampler.policy_loss)(policy, jnp.zeros(len(u)), u, jnp.zeros(len(u)))
        return -grads.raw

    means = jax.jit(jax.vmap(ascent))(u.reshape(parts, -1, 1))
    expected = -0.5 * h * grad_h if mode == "code" else 0.5 * grad_h
    error = np.std(means, axis=0) / parts**0.5
    assert np.all(np.abs(np.mean(means, axis=0) - expected) <= 4 * error + 1e-9)


@pytest.mark.parametrize(
    "mode, entropy, close", [("code", 0.0, False), ("standard", 3.0, True), ("code", 200.0, True)]
)
def test_bandit(mode, entropy, close):
    """The reward -(u - 0.2)^2 draws the law to 0.2, unless the entropy term holds it.

    It takes 2000 steps and not the 500 of the specification: on the way the law trades its mean, 0.10 after 500,
    for a smaller variance.
    """
    sampler = AdaptiveTimesteps(CHAIN, policy="shared", entropy=entropy, entropy_mode=mode, uniform_share=0.0)
    state = sampler.init(key=jr.key(0))
    n = 64

    def step(state, key):
        u = sampler.sample(state, n, key=key).aux
        return sampler.improve(state, jnp.zeros(n), u, -((u[:, 0] - 0.2) ** 2)), None

    final, _ = jax.jit(lambda state, keys: filter_scan(step, state, keys))(state, jr.split(jr.key(7), 2000))
    a, b = (float(shape[0]) for shape in sampler.shapes(final.policy, None))
    if close:
        assert abs(a - 1) < 0.2 and abs(b - 1) < 0.2
    else:
        assert abs(a / (a + b) - 0.2) < 0.05


def test_laws_come_back_from_the_bounds():
    """At a bound the gradient passes inwards and not outwards."""
    sampler = AdaptiveTimesteps(CHAIN, policy="shared", shape_range=(0.5, 2.0), entropy=0.0)
    policy = eqx.tree_at(lambda p: p.raw, SharedPolicy(2), jnp.array([-3.0, 5.0]))
    np.testing.assert_allclose(jnp.concatenate(sampler.shapes(policy, None)), [0.5, 2.0])
    u = jnp.full((1, 1), 0.9)
    gradient = lambda drop: (
        eqx.filter_grad(sampler.policy_loss)(policy, jnp.zeros(1), u, jnp.array([drop])).raw
    )
    inwards, outwards = gradient(1.0), gradient(-1.0)  # a high u asks for a larger a and a smaller b
    assert inwards[0] < 0 < inwards[1]
    np.testing.assert_array_equal(outwards, 0)


def test_gradients_stay_apart():
    """The times carry no gradient into the policy, nor do the drops into the model or the policy."""
    sampler = AdaptiveTimesteps(ContinuousTimes(LinearFlow()), reward=Constant())
    state = sampler.init(jnp.zeros(2), key=jr.key(0))
    x = jr.normal(jr.key(8), (4, 2))
    times = lambda state: jnp.sum(sampler.sample(state, 4, x=x, key=jr.key(9)).t)
    pathwise = eqx.filter_grad(lambda policy: times(eqx.tree_at(lambda s: s.policy, state, policy)))
    loss = lambda drops, u: sampler.policy_loss(state.policy, x, u, drops)
    through = jax.grad(loss, argnums=(0, 1))(jnp.ones(4), jnp.full((4, 1), 0.3))
    for leaf in jax.tree.leaves((pathwise(state.policy), through)):
        np.testing.assert_array_equal(leaf, 0)


# --- The choice of S ---


def best_columns(queue, k):
    """scikit-learn's SelectKBest(f_regression) written out: columns by r^2 with the row sums."""
    y = queue.sum(axis=1)
    return set(np.argsort([stats.pearsonr(column, y)[0] ** 2 for column in queue.T])[-k:])


def test_selection_is_univariate_regression():
    select = {r: jax.jit(partial(select_columns, subset_size=3, ranking=r)) for r in ("r2", "f")}
    rng = np.random.default_rng(10)
    for _ in range(50):
        n = rng.integers(3, 21)
        queue = np.zeros((20, 12), np.float32)
        queue[:n] = rng.normal(size=(n, 12)) * rng.exponential(size=12)
        shuffled = queue.copy()
        shuffled[:n] = rng.permutation(queue[:n])
        for ranking in select:
            chosen, informative = select[ranking](queue, n)
            assert informative and set(np.asarray(chosen)) == best_columns(queue[:n].astype(float), 3)
            assert set(np.asarray(select[ranking](shuffled, n)[0])) == set(np.asarray(chosen))


def test_selection_of_planted_and_of_constant_columns():
    rng = np.random.default_rng(11)
    queue = rng.normal(size=(20, 12)).astype(np.float32) * 1e-4
    queue[:, 7] = rng.normal(size=20)  # nearly all of the sum
    queue[:, 3] = 0.1
    queue[:, 5] = 0.0
    chosen, _ = select_columns(jnp.asarray(queue), jnp.array(20), subset_size=10)
    assert chosen[0] == 7 and not {3, 5} & set(np.asarray(chosen))
    alone = jnp.zeros((20, 12)).at[:, 4].set(queue[:, 7])  # r = 1 but for round-off
    for ranking in ("r2", "f"):
        assert select_columns(alone, jnp.array(20), subset_size=1, ranking=ranking)[0][0] == 4
    assert not select_columns(jnp.zeros((20, 12)), jnp.array(20), subset_size=3)[1]


def test_two_rows_choose_the_last_columns_by_f():
    """What the released code does at its second look: no degree of freedom, all F are 0, ties go to the end."""
    queue = jnp.zeros((20, 12)).at[:2].set(jr.normal(jr.key(12), (2, 12)))
    chosen, _ = select_columns(queue, jnp.array(2), subset_size=3, ranking="f")
    assert set(np.asarray(chosen)) == {9, 10, 11}


# --- The look ---


def table_objective(model, x, t, key):
    """A model that is its own loss by time, so that the drops are known."""
    return model[t] * x


def test_queue_and_subset_over_many_looks():
    """The ring keeps the last rows; S is the first times until `min_rows`; a choice is used one look later."""
    chain = DiffusionChain(5)
    sampler = AdaptiveTimesteps(
        chain, policy="shared", reward=Constant(), queue_length=4, look_every=2, subset_size=2
    )
    rng = np.random.default_rng(13)
    steps = rng.normal(size=(14, 5)).astype(np.float32)
    state, model, rows = sampler.init(key=jr.key(0)), jnp.zeros(5), []
    update = eqx.filter_jit(sampler.update)
    draw = sampler.sample(state, 3, key=jr.key(14))
    for k, step in enumerate(steps):
        before, model, used = state, model - step, np.asarray(state.subset)
        known = dict(before=model + step, after=model, x=jnp.ones(3), objective=table_objective)
        state = update(before, draw, jnp.zeros(3), **known, key=jr.key(k))
        if k % 2:
            kept = lambda s: (s.policy, s.opt_state, s.queue, s.pointer, s.size, s.subset, s.metrics)
            assert_trees_close(kept(state), kept(before), rtol=0, atol=0)
            continue
        rows.append(step)
        last = np.stack(rows[-4:])
        assert state.size == len(last) and state.pointer == len(rows) % 4
        np.testing.assert_allclose(
            np.roll(state.queue, -int(state.pointer), 0)[-len(last) :], last, atol=1e-5
        )
        np.testing.assert_allclose(state.metrics["timesteps/drop"], np.mean(step[used]), atol=1e-5)
        if len(rows) < 3:
            np.testing.assert_array_equal(state.subset, [0, 1])
        else:
            assert set(np.asarray(state.subset)) == best_columns(last.astype(float), 2)
    assert state.step == 14 and len(rows) == 7


def trained_pair(rate=0.0):
    """A model, the model after one more step, and a batch."""
    model = Denoiser(jr.key(15), rate)
    x = data(1, 64)[0][0]
    t = jnp.asarray(np.random.default_rng(16).integers(0, 20, 64))
    loss = lambda model: jnp.mean(jax.vmap(partial(objective, model))(x, t, jr.split(jr.key(17), 64)))
    grads = eqx.filter_grad(loss)(model)
    return model, eqx.apply_updates(model, jax.tree.map(lambda g: -1e-3 * g, grads)), x


@pytest.mark.slow
def test_common_noise():
    """No step, no drop; and fresh noise hides the drop of a small step."""
    model, after, x = trained_pair()
    fresh = AdaptiveTimesteps.paper(CHAIN, fresh_noise=True)

    @eqx.filter_jit
    def drops(sampler, before, after, keys):
        one = lambda key: sampler.drops(before, after, x, jnp.arange(3), objective, key=key)
        row = sampler.sweep_drops(before, after, x[0], objective, key=keys[0])
        return jax.vmap(one)(keys), row

    keys = jr.split(jr.key(18), 8)
    for array in drops(SAMPLER, model, model, keys):
        np.testing.assert_allclose(
            array, 0, atol=1e-5
        )  # two compiled forward passes, each rounded its own way
    still, moved = drops(fresh, model, model, keys)[0], drops(fresh, model, after, keys)[0]
    assert jnp.std(still) > 0
    assert jnp.var(drops(AdaptiveTimesteps.paper(CHAIN), model, after, keys)[0]) * 10 < jnp.var(moved)


def test_dropout_stays_out_of_the_reward():
    """In inference mode the drops are those of the model without dropout; else they are not."""
    x = data(1)[0][0, 0]
    zeroed = lambda model: jax.tree.map(lambda w: 0 * w if eqx.is_array(w) else w, model)

    @eqx.filter_jit
    def row(sampler, rate):
        model = Denoiser(jr.key(19), rate)
        return sampler.sweep_drops(model, zeroed(model), x, objective, key=jr.key(20))

    wet = AdaptiveTimesteps(CHAIN, deterministic=False)
    # Different programs: a few roundings apart.
    np.testing.assert_allclose(row(AdaptiveTimesteps(CHAIN), 0.5), row(wet, 0.0), rtol=1e-4, atol=1e-6)
    assert not np.allclose(row(wet, 0.5), row(wet, 0.0), rtol=1e-2)


def test_a_step_on_one_time_lowers_its_term():
    """In mean over 64 batches, with noise that the step has not seen."""
    model, t = Denoiser(jr.key(37)), jnp.array(2)

    def drop(x, key):
        step_key, drop_key = jr.split(key)
        loss = lambda model: jnp.mean(
            jax.vmap(lambda x, key: objective(model, x, t, key))(x, jr.split(step_key, 8))
        )
        grads = eqx.filter_grad(loss)(model)
        after = eqx.apply_updates(model, jax.tree.map(lambda g: -1e-2 * g, grads))
        return jnp.mean(SAMPLER.drops(model, after, x, jnp.array([1]), objective, key=drop_key))

    drops = jax.jit(jax.vmap(drop))(*data(64))  # the second of ten swept times of twenty is t = 2
    assert SAMPLER.swept[1] == 2
    assert jnp.mean(drops) > 2 * jnp.std(drops) / 8


def fixed_noise_objective(model, x, t, key):
    """The example brings its own noise for every time."""
    x, eps = x
    return jnp.mean((model(CHAIN.perturb(x, eps[t], t), t, key) - eps[t]) ** 2)


def test_drop_is_the_gain_of_the_bound_to_first_order():
    """After a tiny step along -grad L_t the summed drops are gamma <grad bound, grad L_t>."""
    model = Denoiser(jr.key(21))
    x = data(1, 64)[0][0], jr.normal(jr.key(22), (64, 20, 2))
    losses = lambda model, t: jax.vmap(lambda x: fixed_noise_objective(model, x, t, jr.key(0)))(x)
    c = CHAIN.kl_weight(CHAIN.points()) / np.log(2)
    bound = lambda model: jnp.sum(c * jax.vmap(lambda t: jnp.mean(losses(model, t)))(jnp.arange(20)))
    sampler, gamma = AdaptiveTimesteps.paper(CHAIN, policy="shared"), 1e-3

    @eqx.filter_jit
    def measure(t):
        grad_t = eqx.filter_grad(lambda model: jnp.mean(losses(model, t)))(model)
        after = eqx.apply_updates(model, jax.tree.map(lambda g: -gamma * g, grad_t))
        drops = sampler.drops(model, after, x, jnp.arange(20), fixed_noise_objective, key=jr.key(23))
        inner = jax.tree.map(lambda g, h: jnp.sum(g * h), eqx.filter_grad(bound)(model), grad_t)
        own = jnp.mean(losses(model, t) - losses(after, t))
        return jnp.mean(drops), gamma * sum(jax.tree.leaves(inner)), own

    for t in (0, 4, 19):
        drop, first_order, own = measure(jnp.array(t))
        np.testing.assert_allclose(drop, first_order, rtol=0.05)  # second order in gamma
        assert own > 0


# --- Running on the device ---


def test_one_compilation_donation_and_exact_resumption(compiled_run):
    """Three calls trace once; a run stored after two periods goes on as if it had not been, to the last bit."""
    counted, traces = compiled_run
    xs = data(12)
    part = lambda i: jax.tree.map(lambda x: x[PERIOD * i : PERIOD * (i + 1)], xs)
    carry = start(SAMPLER, jr.key(24))
    for i in range(2):
        carry, _ = counted(carry, part(i))
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, carry)
    straight, times = counted(carry, part(2))
    file.seek(0)
    restored = eqx.tree_deserialise_leaves(file, start(SAMPLER, jr.key(25)))
    resumed, again = counted(restored, part(2))
    assert_trees_close(resumed, straight, rtol=0, atol=0)
    np.testing.assert_array_equal(again, times)
    assert len(traces) == 1
    assert straight[2].step == 12 and straight[2].size == 3
    arrays = jax.tree.leaves(eqx.filter(carry, eqx.is_array))
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in arrays)


def test_state_can_be_donated():
    """No array appears twice in a state."""
    state = start(SAMPLER, jr.key(26))[2]
    arrays = jax.tree.leaves(eqx.filter(state, eqx.is_array))
    assert len({x.unsafe_buffer_pointer() for x in arrays}) == len(arrays)


@pytest.mark.slow
def test_branch_and_scan_by_periods_agree(compiled_run):
    """A plain scan, where `update` counts and branches, is the period scan; the branch survives vmap over seeds."""
    xs = data(PERIOD)
    carry = start(SAMPLER, jr.key(27))
    step = lambda carry, x: train_step(SAMPLER, carry, *x)
    branching = lambda carry, xs: filter_scan(step, carry, xs)
    expected, times = compiled_run[0](carry, xs)
    actual, drawn = eqx.filter_jit(branching)(carry, xs)
    np.testing.assert_array_equal(drawn, times)
    # Two programs, whose products may be fused differently: a few roundings, grown by four steps.
    assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)

    seeds = eqx.filter_vmap(lambda key: start(SAMPLER, key))(jr.split(jr.key(28), 2))
    mapped = eqx.filter_vmap(branching, in_axes=(eqx.if_array(0), None))
    assert "cond[" in str(eqx.filter_make_jaxpr(mapped)(seeds, xs)[0])


@pytest.mark.slow
def test_seeds_together_are_seeds_apart(compiled_run):
    num_seeds = 4
    xs = data(PERIOD)
    keys = jr.split(jr.key(29), num_seeds)
    streams = jax.vmap(lambda key: jr.split(key, PERIOD))(keys)
    together = eqx.filter_vmap(lambda key, stream: run(start(SAMPLER, key), (xs[0], stream)))
    carries, times = eqx.filter_jit(together)(keys, streams)
    for i in range(num_seeds):
        carry, drawn = compiled_run[0](start(SAMPLER, keys[i]), (xs[0], streams[i]))
        np.testing.assert_array_equal(times[i], drawn)
        # Batched matrix products round differently; four steps of Adam let that grow.
        arrays = lambda tree: eqx.filter(tree, eqx.is_array)
        assert_trees_close(arrays(take(carries, i)), arrays(carry), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compiled_look_is_the_eager_one():
    sampler = AdaptiveTimesteps(CHAIN, policy="shared", sweep=4, subset_size=1, reward_batch=2)
    state, model = sampler.init(key=jr.key(0)), jnp.linspace(1.0, 2.0, 20)
    draw = sampler.sample(state, 3, key=jr.key(30))
    args = dict(before=model, after=0.9 * model, x=jnp.ones(3), objective=table_objective, key=jr.key(31))
    look = lambda: sampler.update(state, draw, None, look=True, **args)
    assert_trees_close(jax.jit(look)(), look(), rtol=1e-5, atol=1e-6)


def test_the_example_of_the_module_runs():
    """The ten lines for somebody else's training loop, taken from the docstring."""
    lines = adaptive.__doc__.split("predicts the noise):\n")[1].split("\nwith `state")[0]
    model = eqx.nn.MLP(2, 2, 8, 1, key=jr.key(32))
    optimizer = optax.adam(1e-3)
    names = vars(adaptive) | {"partial": partial, "optimizer": optimizer, "data": data}
    lines = textwrap.dedent(lines).replace(
        "perturb(x, eps, t), t)", "perturb(x, eps, t))"
    )  # an MLP takes no t
    exec(lines, names)
    x, keys = data(2)
    state = names["sampler"].init(x[0, 0], key=jr.key(33))
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    _, _, state = names["step"](model, opt_state, state, x[0], keys[0])
    assert state.step == 1 and state.size == 1


# --- Kinds of models and settings ---


def test_floor_mapping_of_uniform_u_is_the_uniform_sampler():
    chain = DiffusionChain(100, rounding="floor")
    u = jr.uniform(jr.key(34), (1000, 1))
    np.testing.assert_array_equal(chain.from_unit(u), Uniform().draw(u, DiffusionChain(100)))
    static = StaticTimesteps(DiffusionChain(100)).sample(None, 1000, key=jr.key(34))
    np.testing.assert_array_equal(static.t, chain.from_unit(u))


@pytest.mark.parametrize(
    "times, reward",
    [
        (ContinuousTimes(Karras(), low=0.0, resolution=8), BoundWeight(prediction="x0")),
        (FlowIntervals(resolution=(4, 2)), Constant()),
    ],
    ids=["edm", "meanflow"],
)
def test_continuous_models(times, reward):
    """A look in continuous time and with pairs (r, t): the swept drops are those of a loss that is known."""
    sampler = AdaptiveTimesteps(times, MinSNR(prediction="x0"), reward, policy="shared", sweep=5)
    loss = lambda model, x, t, key: model * jnp.sum(t) * x
    state = sampler.init(key=jr.key(0))

    @jax.jit
    def run():
        draw = sampler.sample(state, 6, key=jr.key(35))
        known = dict(before=jnp.array(3.0), after=jnp.array(1.0), x=jnp.ones(6), objective=loss)
        return draw, sampler.update(state, draw, None, **known, key=jr.key(36)), sampler.probabilities(state)

    draw, after, probabilities = run()
    assert draw.t.shape == ((6, 2) if len(times.cells) == 2 else (6,)) and draw.weight.shape == (6,)
    points = times.points()[sampler.swept]
    expected = 2 * reward(points, times) * points.reshape(5, -1).sum(1)
    np.testing.assert_allclose(after.queue[0], expected, rtol=1e-4)
    np.testing.assert_allclose(jnp.sum(probabilities), 1, rtol=1e-5)
    assert jnp.any(after.policy.raw != state.policy.raw)


def test_built_in_networks_by_example():
    sampler = AdaptiveTimesteps(CHAIN)
    make = lambda shape, **fields: eqx.filter_eval_shape(
        lambda key: AdaptiveTimesteps(CHAIN, **fields).init(jnp.zeros(shape), key=key).policy, jr.key(0)
    )
    for shape, network in [((3,), VectorPolicy), ((9, 4), TrajectoryPolicy), ((1, 8, 8), ImagePolicy)]:
        assert isinstance(make(shape), network)
    assert make((3, 32, 32), policy="image_flat").pool == "flatten"
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 4\)"):
        make((1, 2, 3, 4))
    with pytest.raises(ValueError, match="sized by one example"):
        sampler.init(key=jr.key(0))
    with pytest.raises(ValueError, match="looks at the data"):
        sampler.sample(sampler.init(jnp.zeros(2), key=jr.key(0)), 4, key=jr.key(0))
    with pytest.raises(ValueError, match="before, after"):
        draw = Draw(jnp.zeros(4, jnp.int32), jnp.ones(4))
        sampler.update(sampler.init(jnp.zeros(2), key=jr.key(0)), draw, look=True)


def test_settings():
    assert from_json(to_json(SAMPLER)) == SAMPLER
    paper = AdaptiveTimesteps.paper(CHAIN, look_every=10)
    assert (paper.look_every, paper.uniform_share, paper.reduction) == (10, 0.0, "sum")
    assert not AdaptiveTimesteps.paper(CHAIN, fresh_noise=True).common_noise and paper.common_noise
    for fields, match in [
        (dict(times=ContinuousTimes(LinearFlow())), "explicit `reward`"),
        (dict(times=CHAIN, ranking="lasso"), "lasso"),
        (dict(times=CHAIN, uniform_share=1.0), "uniform_share=1.0"),
        (dict(times=CHAIN, min_rows=1), "min_rows=1"),
        (dict(times=CHAIN, subset_size=30), "subset_size=30"),
        (dict(times=CHAIN, sweep=1), "sweep=1"),
    ]:
        with pytest.raises((ValueError, TypeCheckError), match=match):  # types are checked only in tests
            AdaptiveTimesteps(**fields)


@pytest.mark.parametrize(
    "num_steps, batch, period, percent", [(1000, 128, 40, 18), (1000, 32, 40, 57), (100, 64, 10, 30)]
)
def test_cost_model(num_steps, batch, period, percent):
    sampler = AdaptiveTimesteps(DiffusionChain(num_steps), look_every=period)
    assert round(100 * sampler.relative_cost(batch)) == percent
