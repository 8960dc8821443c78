"""Laws of the diffusion learner: predictions, bound, samples, and every timestep sampler under it."""

import dataclasses
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import norm

from eqgen import checkpoint
from eqgen.algorithms.diffusion import Diffusion
from eqgen.data.examples import ExampleData, Examples
from eqgen.data.points import ring
from eqgen.offline import OfflineSettings, init_offline, train_offline
from eqgen.schedules import Karras, LinearFlow, VPCosine
from eqgen.timesteps.adaptive import AdaptiveTimesteps
from eqgen.timesteps.heuristics import SecondMomentTimesteps, StaticTimesteps, VarianceTimesteps
from eqgen.timesteps.laws import LogNormal, Speed, SpeedPairs
from eqgen.timesteps.times import ContinuousTimes, DiffusionChain, FlowIntervals
from eqgen.timesteps.weightings import EDM, BoundWeight, MinSNR, SpeedWeight
from helpers import assert_trees_close


CHAIN = DiffusionChain(20)
MEAN, STD = jnp.array([0.7, -0.3]), 0.5


class Ideal(eqx.Module):
    """The posterior mean of eps, or of whatever is predicted, for x_0 ~ N(MEAN, STD^2)."""

    learner: Diffusion
    scale: jax.Array

    def __call__(self, x, time):
        schedule = self.learner.times.schedule
        alpha, sigma = schedule.alpha(time), schedule.sigma(time)
        norm = jnp.sqrt(alpha**2 + sigma**2) if self.learner.precondition else 1.0
        gap = x * norm - alpha * MEAN
        x_0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * gap
        eps = (x * norm - alpha * x_0) / sigma
        match self.learner.prediction:
            case "x0":
                found = x_0
            case "eps":
                found = eps
            case "score":
                found = -eps / sigma
            case "v":
                found = alpha * eps - sigma * x_0
            case "velocity":
                found = schedule.d_alpha(time) * x_0 + schedule.d_sigma(time) * eps
        return self.scale * found / norm


def ideal(learner):
    """The learner's state around the exact model of a Gaussian."""
    return learner.from_network(Examples(MEAN), Ideal(learner, jnp.ones(())), key=jr.key(0))


def gaussian(n, key):
    return MEAN[None] + STD * jr.normal(key, (n, 2))


@pytest.mark.parametrize(
    ("times", "prediction", "precondition"),
    [
        (DiffusionChain(1000), "eps", False),
        (DiffusionChain(1000, betas="cosine"), "x0", False),
        (DiffusionChain(1000, betas="quad"), "v", False),
        (DiffusionChain(1000), "score", False),
        (ContinuousTimes(LinearFlow()), "velocity", False),
        (ContinuousTimes(VPCosine()), "v", False),
        (ContinuousTimes(Karras(), low=0.0), "v", True),
    ],
)
def test_an_exact_model_samples_its_law_whatever_it_predicts(times, prediction, precondition):
    learner = Diffusion(StaticTimesteps(times), prediction=prediction, precondition=precondition)
    state = ideal(learner)
    draw = lambda key: learner.sample(state, key=key, num_steps=200)
    x = np.asarray(jax.jit(jax.vmap(draw))(jr.split(jr.key(1), 4000)))
    # DDIM is of first order: 200 steps are 2 per cent off in the deviation; 4 standard errors of the mean besides.
    np.testing.assert_allclose(x.mean(axis=0), MEAN, atol=4 * STD / 4000**0.5 + 0.01)
    np.testing.assert_allclose(x.std(axis=0), STD, rtol=0.06)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_bound_is_that_of_gaussians_written_out(prediction, variance):
    """Against KL divergences between the Gaussians themselves, in float64 NumPy, on the same noise."""
    chain = DiffusionChain(12, variance=variance)
    learner = Diffusion(StaticTimesteps(chain), prediction=prediction)
    model = Ideal(learner, jnp.asarray(0.9))
    x, key = gaussian(5, jr.key(2)), jr.key(3)
    found = learner.bound(model, x, key=key)

    beta, alpha_bar, _ = chain.tables
    before, s2 = np.append(1.0, alpha_bar[:-1]), chain.reverse_variance()

    def one(x_0, k, i):
        """The step's divergence and the decoder's share, as far as the model has a say: variances are fixed."""
        noise = jr.split(jr.fold_in(jr.fold_in(key, k), i), 3)[0]
        alpha, sigma = alpha_bar[k] ** 0.5, (1 - alpha_bar[k]) ** 0.5
        x_k = alpha * x_0 + sigma * np.asarray(jr.normal(noise, (2,)), np.float64)
        out = np.asarray(model(jnp.asarray(x_k, jnp.float32), jnp.float32((k + 1) / 12)), np.float64)
        eps = {
            "eps": out,
            "x0": (x_k - alpha * out) / sigma,
            "v": sigma * x_k + alpha * out,
            "score": -sigma * out,
        }
        x_0_hat = (x_k - sigma * eps[prediction]) / alpha
        posterior = lambda x_0: (
            (before[k] ** 0.5 * beta[k] * x_0 + (1 - beta[k]) ** 0.5 * (1 - before[k]) * x_k)
            / (1 - alpha_bar[k])
        )
        divergence = ((posterior(x_0) - posterior(x_0_hat)) ** 2 / (2 * s2[k])).mean()
        return divergence / math.log(2), -norm.logpdf(
            x_0, posterior(x_0_hat), s2[k] ** 0.5
        ).mean() / math.log(2)

    exact = np.asarray(x, np.float64)
    parts = np.array([[one(exact[i], k, i) for i in range(5)] for k in range(12)]).mean(axis=1)
    terms, decoder = parts[:, 0], parts[0, 1]
    np.testing.assert_allclose(found.terms, terms, rtol=2e-4)  # float32 errors of a difference, squared
    np.testing.assert_allclose(found.decoder, decoder, rtol=1e-4)
    prior = 0.5 * (alpha_bar[-1] * exact**2 - alpha_bar[-1] - np.log1p(-alpha_bar[-1])).mean() / math.log(2)
    np.testing.assert_allclose(found.prior, prior, rtol=1e-4)
    np.testing.assert_allclose(found.total(), decoder + terms[1:].sum() + prior, rtol=1e-4)
    np.testing.assert_allclose(found.total(last=False), decoder + terms[1:-1].sum() + prior, rtol=1e-4)


def test_the_bound_of_an_exact_model_has_a_closed_form_above_the_entropy():
    """The error left is the posterior variance of x_0, known for Gaussian data."""
    chain = DiffusionChain(1000)
    learner = Diffusion(StaticTimesteps(chain))
    x = gaussian(2000, jr.key(4))
    bound = eqx.filter_jit(learner.bound)(Ideal(learner, jnp.ones(())), x, key=jr.key(5))
    beta, alpha_bar, _ = chain.tables
    before, s2 = np.append(1.0, alpha_bar[:-1]), chain.reverse_variance()
    left = STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)
    terms = before * (beta / (1 - alpha_bar)) ** 2 * left / (2 * s2) / math.log(2)
    decoder = (0.5 * math.log(2 * math.pi * s2[0]) + left[0] / (2 * s2[0])) / math.log(2)
    # 4 standard errors of a mean of 4000 squares, whose standard deviation is 1.4 of their mean.
    np.testing.assert_allclose(bound.terms, terms, rtol=4 * 1.4 / 4000**0.5 + 1e-3)
    np.testing.assert_allclose(
        bound.decoder, decoder, atol=4 * 1.4 * left[0] / (2 * s2[0]) / 4000**0.5 / math.log(2)
    )
    assert float(bound.total()) > math.log2(STD * math.sqrt(2 * math.pi * math.e))


def test_probabilities_of_all_levels_sum_to_one():
    """The discretised decoder, for means inside, at and far beyond the range of the data."""
    chain = DiffusionChain(10, beta_range=(1e-3, 2e-3))
    learner = Diffusion(StaticTimesteps(chain), prediction="x0")
    levels = jnp.linspace(-1, 1, 17)
    for mean in (-1.02, -1.0, -0.3, 0.06, 0.999, 1.01):
        decode = partial(learner._decoder, partial(constant, mean), half_bin=1 / 16, key=jr.key(6))
        bits = jax.vmap(lambda x, decode=decode: decode(x[None]))(levels)
        # In one dimension the bits of a level are -log2 of its probability. The mean of p(x_0 | x) lies a little
        # off x_0 hat, differently for each level's x; not beyond 2 per cent.
        assert float(jnp.sum(2.0**-bits)) == pytest.approx(1.0, abs=0.02)
        assert np.isfinite(bits).all()


def constant(value, x, t):
    return jnp.full_like(x, value)


def test_each_step_takes_its_turn_through_the_examples():
    learner = Diffusion(StaticTimesteps(CHAIN))
    model, x = Ideal(learner, jnp.asarray(0.9)), gaussian(6, jr.key(7))
    whole = learner.bound(model, x, key=jr.key(8))
    same = learner.bound(model, x, per_step=100, key=jr.key(8))
    assert_trees_close(whole, same)
    part = learner.bound(model, x, per_step=2, key=jr.key(8))
    rows = [(2 * k + jnp.arange(2)) % 6 for k in range(20)]
    error = lambda k, i: learner.objective(model, x[i], jnp.int32(k), jr.fold_in(jr.fold_in(jr.key(8), k), i))
    weights = BoundWeight()(CHAIN.points(), CHAIN)
    expected = [weights[k] * jnp.mean(jax.vmap(lambda i, k=k: error(k, i))(rows[k])) for k in range(20)]
    np.testing.assert_allclose(part.terms, jnp.stack(expected), rtol=1e-5)
    assert part.decoder == whole.decoder
    both = jax.tree.map(lambda *x: jnp.stack(x), whole, part)  # as `vmap` over seeds returns them
    np.testing.assert_allclose(both.total(), [whole.total(), part.total()], rtol=1e-6)


TINY = dict(hidden=(16,), learning_rate=1e-2, average=0.9, total_updates=7)
SAMPLERS = {
    "uniform": StaticTimesteps(CHAIN),
    "min-snr": StaticTimesteps(CHAIN, weighting=MinSNR()),
    "speed": StaticTimesteps(CHAIN, Speed(), SpeedWeight(), SpeedPairs()),
    "second moment": SecondMomentTimesteps(CHAIN),
    "variance": VarianceTimesteps(CHAIN, measure_every=3, sweep=4, num_examples=8),
    "adaptive": AdaptiveTimesteps(CHAIN, look_every=3),
    "edm": StaticTimesteps(ContinuousTimes(Karras()), LogNormal(), EDM(prediction="v", data_std=1.0)),
    "adaptive flow": AdaptiveTimesteps(
        ContinuousTimes(LinearFlow()), look_every=3, reward=BoundWeight(prediction="v"), sweep=9
    ),
}


def learner_with(name):
    prediction = "v" if name in ("edm", "adaptive flow") else "eps"
    return Diffusion(SAMPLERS[name], prediction=prediction, precondition=name == "edm", **TINY)


DATA = ExampleData(np.asarray(ring(64, key=jr.key(9))))
LOOP = OfflineSettings(batch_size=8, log_every=7, checkpoint_every=4)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "adaptive flow" else []) for name in SAMPLERS],
)
def test_every_timestep_sampler_trains_it_and_goes_on_exactly(name, tmp_path):
    """Two seeds side by side, saved after 4 of 7 updates, which is in the middle of a period, and loaded."""
    learner = learner_with(name)
    fresh = lambda: init_offline(
        lambda key: learner.init(Examples(DATA.examples().x[0]), key=key), seeds=(0, 1)
    )
    run = lambda state: list(train_offline(learner, DATA, LOOP, seeds=(0, 1), state=state))
    first, last = run(fresh())
    assert last.step == 7 and all(np.isfinite(record["loss"]) for record in last.records)
    checkpoint.save(tmp_path / "state", first.state, {})
    restored, _ = checkpoint.load(tmp_path / "state", fresh())
    (again,) = run(restored)
    assert_trees_close(again.state, last.state, rtol=0, atol=0)
    before, after = (
        jax.tree.leaves(eqx.filter(s.learner.model.online, eqx.is_array)) for s in (fresh(), last.state)
    )
    assert all(not np.array_equal(a, b) for a, b in zip(before, after))


def test_seeds_side_by_side_are_seeds_alone():
    learner = learner_with("adaptive")
    make = lambda key: learner.init(Examples(DATA.examples().x[0]), key=key)
    run = lambda seeds: list(
        train_offline(learner, DATA, LOOP, seeds=seeds, state=init_offline(make, seeds=seeds))
    )
    both, alone = run((3, 5))[-1].state.learner, run((5,))[-1].state.learner
    of_second = lambda tree: jax.tree.map(lambda x: x[1:], eqx.filter(tree, eqx.is_array))
    # Batched products sum in another order, and Adam divides small gradients by small numbers.
    assert_trees_close(of_second(both), eqx.filter(alone, eqx.is_array), rtol=1e-3, atol=1e-4)


def test_methods_see_the_same_data_and_the_same_start():
    """Paired comparisons: what differs between two runs of one seed is the times, not the batches or networks."""
    states = [learner_with(name).init(Examples(MEAN), key=jr.key(1)) for name in ("uniform", "adaptive")]
    assert_trees_close(*(state.model.online for state in states), rtol=0, atol=0)


def test_labels_are_learnt_and_guide():
    """Two classes at -1 and +1: each is found where it is, and none gives both."""
    label = jnp.arange(64) % 2
    data = ExampleData(np.asarray((2.0 * label - 1)[:, None] * jnp.ones((64, 1))), np.asarray(label))
    learner = Diffusion(
        StaticTimesteps(DiffusionChain(50)),
        num_classes=2,
        hidden=(32, 32),
        learning_rate=3e-3,
        average=0.99,
        label_dropout=0.3,
        total_updates=800,
    )
    example = jax.tree.map(lambda x: x[0], data.examples())
    state = init_offline(lambda key: learner.init(example, key=key), seeds=(0,))
    loop = OfflineSettings(batch_size=64, log_every=800, checkpoint_every=0)
    trained = list(train_offline(learner, data, loop, seeds=(0,), state=state))[-1].state.learner
    trained = jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, trained)

    def draw(label, weight=1.0):
        one = lambda key: learner.sample(trained, key=key, num_steps=25, label=label, weight=weight)
        return np.asarray(jax.jit(jax.vmap(one))(jr.split(jr.key(2), 200)))[:, 0]

    for label, weight in ((0, 1.0), (1, 1.0), (0, 1.5)):
        found = draw(jnp.int32(label), weight)
        # A small network, trained for seconds, spreads the points out; the class is right nearly always.
        assert (np.sign(found) == 2 * label - 1).mean() > 0.97
        assert found.mean() == pytest.approx(2.0 * label - 1, abs=0.3)
    share = (draw(None) > 0).mean()
    assert 0.3 < share < 0.7  # a half, 4 standard errors of 200 draws, and a network that is not exact


@pytest.mark.slow
def test_dropout_is_off_where_models_are_judged():
    learner = dataclasses.replace(Diffusion().resized("smoke"), dropout=0.5, timesteps=StaticTimesteps(CHAIN))
    state = learner.init(Examples(jnp.zeros((1, 8, 8))), key=jr.key(0))
    noisy = jax.tree.map(lambda x: x + 0.1 if eqx.is_inexact_array(x) else x, state.model.online)
    x = jr.normal(jr.key(1), (3, 1, 8, 8))
    loss = lambda key: learner.objective(noisy, x[0], jnp.int32(3), key)
    keys = jr.split(jr.key(2), 2)
    assert float(learner.bound(noisy, x, key=keys[0]).total()) == float(
        learner.bound(noisy, x, key=keys[0]).total()
    )
    drop = lambda key: learner.predict(noisy, x[0], jnp.float32(0.5), key=key)
    assert not np.array_equal(drop(keys[0]), drop(keys[1])) and np.isfinite(loss(keys[0]))
    still = eqx.nn.inference_mode(noisy)
    np.testing.assert_array_equal(*(learner.predict(still, x[0], jnp.float32(0.5), key=key) for key in keys))


@pytest.mark.parametrize(
    ("shape", "network"),
    [
        ((4,), "VectorDenoiser"),
        pytest.param((8, 2), "DiT1D", marks=pytest.mark.slow),
        pytest.param((1, 8, 8), "UNet2D", marks=pytest.mark.slow),
    ],
)
def test_the_network_fits_the_example(shape, network):
    learner = Diffusion(AdaptiveTimesteps(CHAIN)).resized("smoke")
    state = learner.init(Examples(jnp.zeros(shape)), key=jr.key(0))
    assert type(state.model.online).__name__ == network
    batch = Examples(jr.normal(jr.key(1), (4, *shape)))
    state, metrics = eqx.filter_jit(learner.update)(state, batch, key=jr.key(2))
    assert np.isfinite(metrics["loss"]) and metrics["timesteps/a"] > 0
    assert learner.sample(state, key=jr.key(3), num_steps=2).shape == shape


def test_what_does_not_go_together_is_refused():
    chain = StaticTimesteps(CHAIN)
    for fields, words in [
        (dict(timesteps=StaticTimesteps(FlowIntervals())), "FlowIntervals"),
        (dict(timesteps=chain, prediction="velocity"), "ContinuousTimes"),
        (dict(precondition=True), "'v'"),
        (dict(average=1.0), "average=1.0"),
        (dict(total_updates=0), "total_updates=0"),
    ]:
        with pytest.raises(ValueError, match=words):
            Diffusion(**fields)
    learner = Diffusion(chain).resized("smoke")
    state = learner.init(Examples(MEAN), key=jr.key(0))
    for wrong, words in [
        (lambda: learner.sample(state, key=jr.key(0), num_steps=21), "the chain has 20"),
        (lambda: learner.denoiser(state, weight=2.0), "pass its label"),
        (lambda: learner.denoiser(state, jnp.int32(0)), "no classes"),
        (
            lambda: dataclasses.replace(learner, num_classes=3).init(Examples(MEAN), key=jr.key(0)),
            "no labels",
        ),
        (lambda: dataclasses.replace(learner, dropout=0.1).init(Examples(MEAN), key=jr.key(0)), "has none"),
        (lambda: dataclasses.replace(learner, network="dit").init(Examples(MEAN), key=jr.key(0)), "no form"),
        (
            lambda: Diffusion(StaticTimesteps(ContinuousTimes(LinearFlow()))).bound(
                None, MEAN[None], key=jr.key(0)
            ),
            "DiffusionChain",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            wrong()
