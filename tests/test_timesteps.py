"""Times, laws, weights and the heuristic timestep samplers against closed forms and independent code."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy import stats

from eqgen.hyperparameters import from_json, to_json
from eqgen.networks import timestep_policies
from eqgen.networks.timestep_policies import ImagePolicy, SharedPolicy, TrajectoryPolicy, VectorPolicy
from eqgen.parameterizations import convert
from eqgen.schedules import Karras, LinearFlow, VPCosine, VPLinear
from eqgen.timesteps.base import Draw, period_scan
from eqgen.timesteps.heuristics import (
    SecondMomentState,
    SecondMomentTimesteps,
    StaticTimesteps,
    VarianceTimesteps,
    gradient_variance,
)
from eqgen.timesteps.laws import Beta, LogitNormal, LogNormal, Speed, SpeedPairs, Table, Uniform
from eqgen.timesteps.times import ContinuousTimes, DiffusionChain, FlowIntervals
from eqgen.timesteps.weightings import (
    EDM,
    P2,
    BoundWeight,
    Constant,
    MinSNR,
    SoftMinSNR,
    SpeedWeight,
    error_ratio,
)
from helpers import assert_trees_close


TIMES = {
    "chain": DiffusionChain(50),
    "quad": DiffusionChain(50, "quad", rounding="floor"),
    "vp": ContinuousTimes(VPLinear(), resolution=40),
    "edm": ContinuousTimes(Karras(), low=0.0, resolution=40),
    "flow": ContinuousTimes(LinearFlow(), high=0.999, resolution=40),
}
LAWS = {
    "uniform": Uniform(),
    "logit_normal": LogitNormal(0.3, 0.8),
    "log_normal": LogNormal(),
    "beta": Beta(0.8, 1.4),
    "speed": Speed(),
}
every_times = pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)


def chi_square(counts, probabilities):
    """The p-value of counts under probabilities; rare cells are pooled."""
    expected = np.asarray(probabilities, float)
    expected = expected / expected.sum() * np.sum(counts)
    rare = expected < 5
    pool = lambda x: np.append(np.asarray(x)[~rare], np.sum(np.asarray(x)[rare]))
    counts, expected = pool(counts), pool(expected)
    if expected[-1] == 0:
        assert counts[-1] == 0
        counts, expected = counts[:-1], expected[:-1]
    return stats.chisquare(counts, expected).pvalue


def histogram(times, t):
    return np.bincount(np.asarray(times.cell(t)).ravel(), minlength=times.num_cells)


# --- Times ---


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("num_steps", [100, 1000])
@pytest.mark.parametrize("betas", ["linear", "quad", "cosine"])
def test_kl_weight_is_that_of_the_gaussian_kl(betas, num_steps, variance, x64):
    """KL(q(x_{t-1} | x_t, x_0) || p) written out, as a mean over dimensions, is c_t mse plus a constant."""
    chain = DiffusionChain(num_steps, betas, variance=variance)
    beta, alpha_bar, posterior = chain.tables
    before = np.append(1.0, alpha_bar[:-1])
    rng = np.random.default_rng(0)
    x_0, eps, eps_hat = rng.normal(size=(3, num_steps, 4))
    column = lambda x: x[:, None]
    x_t = column(np.sqrt(alpha_bar)) * x_0 + column(np.sqrt(1 - alpha_bar)) * eps
    x_0_hat = (x_t - column(np.sqrt(1 - alpha_bar)) * eps_hat) / column(np.sqrt(alpha_bar))
    mean = lambda x: (
        column(np.sqrt(before) * beta / (1 - alpha_bar)) * x
        + column(np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar)) * x_t
    )
    s2 = {"small": posterior, "large": np.append(posterior[1], beta[1:])}[variance]
    distance = np.mean((mean(x_0) - mean(x_0_hat)) ** 2, axis=1) / s2
    kl = 0.5 * (-1 - np.log(posterior / s2) + distance + posterior / s2)
    constant = 0.5 * (-1 - np.log(posterior / s2) + posterior / s2)
    weight = chain.kl_weight(chain.points())
    mse = np.mean((eps - eps_hat) ** 2, axis=1)
    np.testing.assert_allclose(kl - constant, weight * mse, rtol=1e-5, atol=1e-12)
    if variance == "small":
        np.testing.assert_allclose(constant, 0, atol=1e-12)


def test_kl_weights_of_the_three_schedules():
    """Spot values of the specification; the clipped last beta of the cosine schedule makes 500 at any T."""
    weight = lambda betas, num_steps=1000: DiffusionChain(num_steps, betas).kl_weight(jnp.arange(num_steps))
    # The specification prints two digits.
    close = lambda actual, expected: np.testing.assert_allclose(actual, expected, rtol=0.03)
    close(weight("linear")[jnp.array([0, 1, 2, 100, 500, 999])], [0.92, 0.60, 0.32, 0.010, 0.0055, 0.010])
    close(weight("cosine")[jnp.array([0, 998])], [0.95, 1.5])
    for num_steps in (100, 1000):
        np.testing.assert_allclose(weight("cosine", num_steps)[-1], 0.998 / (2 * 0.999 * 0.001), rtol=1e-3)


def test_continuous_kl_weight_is_the_limit_of_the_chains():
    chain, times = DiffusionChain(1000), ContinuousTimes(VPLinear())
    steps = jnp.arange(200, 1000, 100)
    # O(1 / T), and beta_range reaches T beta = 0.1 ... 20 only up to a step.
    limit = times.kl_weight((steps + 1) / 1000)
    np.testing.assert_allclose(1000 * chain.kl_weight(steps), limit, rtol=0.03)


@pytest.mark.parametrize("times", [*TIMES.values(), FlowIntervals()], ids=[*TIMES, "intervals"])
def test_cells_and_points_agree(times):
    points = times.points()
    np.testing.assert_array_equal(times.cell(points), np.arange(times.num_cells))
    masses = times.masses(times.edges())
    np.testing.assert_allclose(jnp.sum(masses), 1, rtol=1e-5)
    rng = np.random.default_rng(1)
    u = jnp.asarray(rng.uniform(size=(50_000, len(times.cells))), jnp.float32)
    assert chi_square(histogram(times, times.from_unit(u)), masses) > 1e-3


def test_rounding():
    rounded, floored = DiffusionChain(5), DiffusionChain(5, rounding="floor")
    u = jnp.array([0.0, 0.12, 0.13, 0.5, 0.87, 0.88, 1.0])[:, None]
    np.testing.assert_array_equal(rounded.from_unit(u), [0, 0, 1, 2, 3, 4, 4])
    np.testing.assert_array_equal(floored.from_unit(u), [0, 0, 0, 2, 4, 4, 4])


def test_intervals_under_uniform_coordinates():
    times = FlowIntervals(instants=0.3)
    t = StaticTimesteps(times).sample(None, 20_000, key=jr.key(0)).t
    r, t = np.asarray(t, float).T
    assert np.all(r <= t) and np.all(r >= 0)
    instant = r == t
    assert abs(instant.mean() - 0.3) < 0.015  # 4.6 standard errors
    assert stats.kstest(t, stats.uniform(1e-3, 0.998).cdf).pvalue > 1e-3
    assert stats.kstest((r / t)[~instant], "uniform").pvalue > 1e-3


def test_bad_times_are_named():
    for make, match in [
        (lambda: DiffusionChain(1), "num_steps=1"),
        (lambda: DiffusionChain(10, "cubic"), "cubic"),
        (lambda: DiffusionChain(10, variance="learned"), "learned"),
        (lambda: ContinuousTimes(VPLinear(), low=1.0), "low=1.0"),
        (lambda: FlowIntervals(instants=1.0), "instants=1.0"),
        (lambda: SpeedPairs().pivot(FlowIntervals()), "SpeeD"),
        (lambda: Table(jnp.ones(3)).probabilities(DiffusionChain(4)), "3 masses for 4"),
        (lambda: LogNormal().probabilities(FlowIntervals()), "LogNormal"),
    ]:
        with pytest.raises((ValueError, TypeCheckError), match=match):  # types are checked only in tests
            make()


# --- Laws ---


@every_times
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_draws_follow_the_law(law, times):
    sampler = StaticTimesteps(times, law)
    run = eqx.filter_jit(lambda key: (sampler.sample(None, 50_000, key=key).t, sampler.probabilities(None)))
    t, probabilities = run(jr.key(2))
    assert t.dtype == (jnp.int32 if isinstance(times, DiffusionChain) else jnp.float32)
    np.testing.assert_allclose(jnp.sum(probabilities), 1, rtol=1e-5)
    assert jnp.all(probabilities >= 0)
    assert chi_square(histogram(times, t), probabilities) > 1e-3


def cell_masses(times, cdf):
    return np.diff(cdf(np.asarray(times.edges()[0], float)))


@pytest.mark.parametrize("name", ["chain", "vp"])
def test_laws_have_the_densities_of_their_names(name):
    times = TIMES[name]
    close = lambda law, expected: np.testing.assert_allclose(
        law.probabilities(times), expected / expected.sum(), rtol=1e-3, atol=1e-6
    )  # float32 probabilities of narrow cells are differences
    with np.errstate(divide="ignore"):
        logit = lambda u: np.log(u) - np.log1p(-u)
        close(LogitNormal(0.3, 0.8), cell_masses(times, lambda u: stats.norm.cdf((logit(u) - 0.3) / 0.8)))
    close(Beta(0.8, 1.4), cell_masses(times, stats.beta(0.8, 1.4).cdf))
    close(Uniform(), np.ones(times.num_cells))
    close(Speed(2.0, 0.7), np.where(np.arange(times.num_cells) < 0.7 * times.num_cells, 2.0, 1.0))


def test_log_normal_sigma():
    """Drawn at EDM's schedule, log sigma is the normal law cut off at the schedule's ends."""
    times = TIMES["edm"]
    t = StaticTimesteps(times, LogNormal()).sample(None, 20_000, key=jr.key(3)).t
    log_sigma = np.asarray(jnp.log(times.sigma(t)), float)
    ends = (np.log([0.002, 80]) + 1.2) / 1.2
    assert stats.kstest(log_sigma, stats.truncnorm(*ends, loc=-1.2, scale=1.2).cdf).pvalue > 1e-3


def test_low_discrepancy_batches_are_even():
    """Any batch of n has one draw in each of n equally likely parts, and every single draw has the law."""
    sampler = StaticTimesteps(TIMES["vp"], LogitNormal(), low_discrepancy=True)
    t = jax.jit(jax.vmap(lambda key: sampler.sample(None, 64, key=key).t))(jr.split(jr.key(4), 500))
    p = np.asarray(LogitNormal().cdf(TIMES["vp"].to_unit(t)), float)
    gaps = np.diff(np.sort(p, axis=1), axis=1)
    np.testing.assert_allclose(gaps, 1 / 64, atol=1e-3)  # the distribution function's float32 tails
    assert stats.kstest(p[:, 5], "uniform").pvalue > 1e-3


def test_second_coordinate_of_the_lattice_is_even_too():
    t = StaticTimesteps(FlowIntervals(), low_discrepancy=True).sample(None, 1000, key=jr.key(5)).t
    ratio = np.sort(np.asarray(t[:, 0] / t[:, 1])[np.asarray(t[:, 0] < t[:, 1])])
    # The golden ratio's discrepancy is O(log n / n); independent draws have 0.03 here.
    assert np.max(np.abs(ratio - (np.arange(len(ratio)) + 0.5) / len(ratio))) < 0.01


def test_speed_pairs():
    chain = DiffusionChain(1000)
    growth = np.gradient(np.sqrt(1 - chain.tables.alpha_bar))
    pivot = int(np.argmax(growth < 1e-4)) + 1
    assert int(SpeedPairs().pivot(chain)) == pivot
    sampler = StaticTimesteps(chain, Speed(), SpeedWeight(), SpeedPairs())
    t = np.asarray(sampler.sample(None, 128, key=jr.key(6)).t)
    first, second = t[:64], t[64:]
    np.testing.assert_array_equal(second, np.where(first < pivot, pivot - first, first - pivot))
    marginal = np.zeros(1000)
    np.add.at(marginal, np.abs(np.arange(1000) - pivot), np.asarray(Speed().probabilities(chain)))
    expected = (marginal + np.asarray(Speed().probabilities(chain))) / 2
    np.testing.assert_allclose(sampler.probabilities(None), expected, atol=1e-7)
    assert sampler.sample(None, 5, key=jr.key(7)).t.shape == (5,)
    assert 1 < int(SpeedPairs().pivot(DiffusionChain(100, "cosine"))) < 100  # the scaled threshold
    continuous = StaticTimesteps(TIMES["vp"], Speed(), pairing=SpeedPairs())
    t = continuous.sample(None, 20_000, key=jr.key(8)).t
    assert np.all((t >= 1e-3) & (t <= 1))


# --- Weights ---


def test_closed_forms_of_the_weights():
    chain = DiffusionChain(1000)
    t = chain.points()
    snr = np.asarray(chain.tables.alpha_bar / (1 - chain.tables.alpha_bar))
    close = lambda weighting, expected: np.testing.assert_allclose(weighting(t, chain), expected, rtol=1e-4)
    close(Constant(2.0), np.full(1000, 2.0))
    close(P2(), 1 - chain.tables.alpha_bar)
    close(P2(1.0, 0.5), np.sqrt(1 - chain.tables.alpha_bar))
    close(MinSNR(), np.minimum(snr, 5) / snr)
    close(MinSNR(prediction="x0"), np.minimum(snr, 5))
    close(MinSNR(prediction="v"), np.minimum(snr, 5) / (snr + 1))
    assert jnp.all(MinSNR()(t, chain) <= 1) and jnp.all((MinSNR()(t, chain) == 1)[snr <= 5])
    close(SoftMinSNR(4.0, "x0"), 4 * snr / (snr + 4))
    sigma2 = 1 / snr  # k-diffusion and EDM, on the network's output: |x0 error|^2 = c_out^2 |output error|^2
    c_out2 = sigma2 * 0.25 / (sigma2 + 0.25)
    np.testing.assert_allclose(
        SoftMinSNR(4.0, "x0")(t, chain) * c_out2, sigma2 * 0.25 / (sigma2 + 0.25) ** 2, rtol=1e-4
    )
    np.testing.assert_allclose(EDM(0.5)(t, chain) * c_out2, 1, rtol=1e-4)
    close(BoundWeight(), chain.kl_weight(t) / np.log(2))
    assert jnp.max(BoundWeight(clip=0.5)(t, chain)) == pytest.approx(0.5 / np.log(2))
    growth = np.gradient(1 - chain.tables.alpha_bar)
    scaled = (growth - growth.min()) / (growth.max() - growth.min())
    # 1 - ab grows by 1e-3 a step, of which float32 keeps four digits.
    expected = np.where(np.arange(1000) < 700, 0.4 + 0.2 * scaled, 1.0)
    np.testing.assert_allclose(SpeedWeight()(t, chain), expected, rtol=1e-3)


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "score", "velocity"])
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), Karras(), LinearFlow()])
def test_error_ratio_is_that_of_the_conversions(schedule, kind, x64):
    t = jnp.asarray(0.37)
    x_t, eps, error = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5)))
    to = lambda eps: convert(eps, x_t, t, schedule, source="eps", target=kind)
    ratio = lambda: jnp.sum((to(eps + error) - to(eps)) ** 2) / jnp.sum(error**2)
    actual = jax.jit(lambda t: error_ratio(t, ContinuousTimes(schedule), kind))(t[None])
    np.testing.assert_allclose(actual[0], jax.jit(ratio)(), rtol=1e-9)


def test_velocities_need_continuous_time():
    with pytest.raises(ValueError, match="ContinuousTimes"):
        MinSNR(prediction="velocity")(jnp.arange(3), DiffusionChain(10))
    with pytest.raises(ValueError, match="average velocity"):
        BoundWeight()(FlowIntervals().points(), FlowIntervals())


# --- Samplers with statistics ---


def test_second_moments_against_the_sequential_algorithm():
    """Improved DDPM's update, one loss at a time, with more losses of a step in a batch than it remembers."""
    chain = DiffusionChain(6)
    sampler = SecondMomentTimesteps(chain, Constant(), length=3)
    state = sampler.init(key=jr.key(0))
    update = eqx.filter_jit(sampler.update)
    history, rng = [[] for _ in range(6)], np.random.default_rng(3)
    for round_ in range(12):
        warm = all(len(h) == 3 for h in history)
        p = np.ones(6) / 6
        if warm:
            p = np.sqrt([np.mean(np.square(h)) for h in history])
            p = 0.999 * p / p.sum() + 0.001 / 6
        np.testing.assert_allclose(sampler.probabilities(state), p, rtol=1e-5)
        np.testing.assert_allclose(np.sum(p * (1 / (6 * p))), 1)
        t = rng.integers(0, 6 if round_ else 2, size=12)
        losses = rng.exponential(size=12)
        for step, loss in zip(t, losses):
            history[step] = [*history[step], loss][-3:]
        draw = Draw(jnp.asarray(t, jnp.int32), jnp.ones(12))
        state = update(state, draw, jnp.asarray(losses, jnp.float32))
    assert warm


def test_second_moment_weights_leave_the_objective():
    """E_p[weight f(t)] = E_uniform[bound weight f(t)], in closed form and for the draws."""
    chain = DiffusionChain(6)
    sampler = SecondMomentTimesteps(chain)
    root = jnp.array([4.0, 1.0, 2.0, 0.5, 1.0, 3.0])
    state = SecondMomentState(jnp.tile(root[:, None], (1, 10)), jnp.full(6, 10))
    p = np.asarray(sampler.probabilities(state))
    draw = sampler.sample(state, 20_000, key=jr.key(9))
    bound = np.asarray(BoundWeight()(chain.points(), chain))
    np.testing.assert_allclose(draw.weight, (bound / (6 * p))[draw.t], rtol=1e-5)
    assert chi_square(histogram(chain, draw.t), p) > 1e-3
    with pytest.raises(ValueError, match="losses"):
        sampler.update(state, draw)


def linear_objective(w, x, t, key):
    """The mean square error of the noise for the model w x_t, x ~ N(0, 1), x_t = a_t x with a_t = t / 10."""
    return jnp.mean((w * (t / 10) * x - jr.normal(key, x.shape)) ** 2)


def test_gradient_variance_in_closed_form():
    """g_d = (2 / D) (w_d a^2 x^2 - a eps x), so tr Cov = (4 / D^2) sum_d (2 w_d^2 a^4 + a^2)."""
    w, ts = jnp.array([1.0, -0.5, 0.3, 2.0]), jnp.array([3, 10])
    x = jr.normal(jr.key(10), (40_000, 4))
    measured = gradient_variance(linear_objective, w, x, ts, block=2000, key=jr.key(11))
    a = np.array([0.3, 1.0])
    expected = [4 / 16 * np.sum(2 * np.asarray(w) ** 2 * s**4 + s**2) for s in a]
    np.testing.assert_allclose(measured, expected, rtol=0.03)  # about 4 standard errors of 40000 examples
    whole = gradient_variance(linear_objective, w, x[:2000], ts, key=jr.key(11))
    parts = gradient_variance(linear_objective, w, x[:2000], ts, block=500, key=jr.key(11))
    np.testing.assert_allclose(parts, whole, rtol=1e-4)
    with pytest.raises(ValueError, match="7"):
        gradient_variance(linear_objective, w, x[:10], ts, block=7, key=jr.key(0))


def test_variance_proportional_sampling():
    chain = DiffusionChain(11)
    sampler = VarianceTimesteps(chain, measure_every=2, sweep=3, num_examples=64)
    w, x = jnp.array([1.0, -0.5]), jr.normal(jr.key(12), (64, 2))
    state = sampler.init(key=jr.key(0))
    np.testing.assert_allclose(sampler.probabilities(state), 1 / 11, rtol=1e-6)
    update = eqx.filter_jit(sampler.update)
    draw = sampler.sample(state, 64, key=jr.key(13))
    known = dict(before=w, after=w, x=x, objective=linear_objective)
    first = update(state, draw, **known, key=jr.key(14))
    measured = gradient_variance(linear_objective, w, x, jnp.array([0, 5, 10]), key=jr.key(14))
    variance = np.interp(np.arange(11), [0, 5, 10], measured)
    np.testing.assert_allclose(sampler.probabilities(first), variance / variance.sum(), rtol=1e-4)
    second = update(first, draw, **known, key=jr.key(15))
    np.testing.assert_array_equal(second.variance, first.variance)  # a step in between does not measure
    third = update(second, draw, **known, key=jr.key(16))
    assert not np.array_equal(third.variance, second.variance)
    draws = sampler.sample(first, 20_000, key=jr.key(17)).t
    assert chi_square(histogram(chain, draws), sampler.probabilities(first)) > 1e-3


def test_samplers_are_settings():
    """Samplers survive the JSON of a run's settings."""
    for sampler in (
        StaticTimesteps(TIMES["flow"], LogNormal(), MinSNR(prediction="velocity"), low_discrepancy=True),
        StaticTimesteps(TIMES["chain"], Speed(), SpeedWeight(), SpeedPairs()),
        SecondMomentTimesteps(FlowIntervals(), Constant()),
        VarianceTimesteps(DiffusionChain(10)),
    ):
        assert from_json(to_json(sampler)) == sampler


# --- The scan by periods ---


@pytest.mark.parametrize("num_steps, period", [(12, 4), (11, 4), (3, 4), (5, 1)])
def test_period_scan_is_the_loop(num_steps, period):
    def step(carry, x, look):
        count, total = carry
        return (count + look, total + x * (2 if look else 1)), (x, jnp.asarray(look))

    start = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    xs = jnp.arange(num_steps)
    (looks, total), (ys, looked) = jax.jit(lambda xs: period_scan(step, start, xs, period=period))(xs)
    expected = np.arange(num_steps) % period == 0
    np.testing.assert_array_equal(looked, expected)
    np.testing.assert_array_equal(ys, np.arange(num_steps))
    assert looks == expected.sum() == -(-num_steps // period)
    assert total == np.sum(np.arange(num_steps) * np.where(expected, 2, 1))


# --- Policy networks ---


SMALL = ((2, 2, 4), (8,))
POLICIES = {
    "vector": (lambda key: VectorPolicy(6, 2, (8,), key=key), (6,)),
    "flattened": (lambda key: VectorPolicy(6, 4, (8,), key=key), (2, 3)),
    "image": (lambda key: ImagePolicy((1, 8, 8), 2, *SMALL, key=key), (1, 8, 8)),
    "odd": (lambda key: ImagePolicy((3, 13, 9), 2, *SMALL, key=key), (3, 13, 9)),
    "flat": (lambda key: ImagePolicy((3, 16, 16), 2, *SMALL, "flatten", key=key), (3, 16, 16)),
    "trajectory": (lambda key: TrajectoryPolicy(5, 2, (4, 4), (8,), key=key), (9, 5)),
}


@pytest.mark.parametrize("make, shape", POLICIES.values(), ids=POLICIES)
def test_policies_start_neutral_and_can_learn(make, shape):
    @eqx.filter_jit
    def run(key, x):
        network = make(key)
        grads = eqx.filter_grad(lambda network: jnp.sum(network(x[0])))(network)
        return jax.vmap(network)(x), grads.mlp.layers[-1].weights

    z, last = run(jr.key(18), jnp.asarray(np.random.default_rng(4).normal(size=(2, *shape)), jnp.float32))
    np.testing.assert_array_equal(z, np.full_like(z, 0.5))
    assert all(jnp.any(weight != 0) for weight in last)


def test_policy_of_the_released_code():
    network = jax.eval_shape(lambda key: ImagePolicy((3, 32, 32), 2, pool="flatten", key=key), jr.key(0))
    assert [layer.weights[0].shape for layer in network.mlp.layers] == [(2048, 256), (256, 256), (256, 2)]


def test_pooling_takes_the_largest_of_four():
    x = jr.normal(jr.key(20), (2, 5, 6))
    pooled = eqx.nn.MaxPool2d(2, 2)(x)
    assert_trees_close(jax.jit(timestep_policies._halved)(x), pooled, rtol=0, atol=0)


def test_unfit_policies_are_named():
    with pytest.raises(ValueError, match="too small"):
        ImagePolicy((1, 4, 8), 2, key=jr.key(0))
    with pytest.raises(ValueError, match="pool='max'"):
        ImagePolicy((1, 8, 8), 2, pool="max", key=jr.key(0))
    np.testing.assert_array_equal(SharedPolicy(4)(None), [0.5] * 4)
