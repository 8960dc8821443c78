"""The schemes on Gaussian data, where all that they should return is known (specification, T2, T3, T11-T13, T15).

A planner of two states of one number: the second, x_0 ~ N(mean, std^2) whatever the first, is worth c x_0.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import ScalarLike, TypeCheckError

from eqgen.guidance import CFG, CG, MCSS, AbstractPlanner, Prior, Unconditional, decode_plan
from eqgen.samplers import log_snr_grid, uniform_grid
from eqgen.schedules import AbstractNoiseSchedule, VPLinear
from helpers import assert_trees_close


OBS = jnp.array([0.37])


class GaussianPlanner(AbstractPlanner):
    """With the exact denoiser and E[V | x_t]. A label y moves the mean by y."""

    mean: ScalarLike = 0.0
    std: ScalarLike = 1.0
    slope: ScalarLike = 1.5
    num_steps: int = 20
    solver: str = "ddim"
    schedule: AbstractNoiseSchedule = VPLinear(0.1, 20.0)
    t_min: float = 1e-3

    def latent_shape(self, state):
        return 1, 1

    def decode(self, state, obs, latent, noise=None, num_steps=None):
        ts = uniform_grid(num_steps or self.num_steps, 1.0, self.t_min)
        noise = noise or (lambda x, t: self.noise(state, x, t))
        return decode_plan(noise, obs, latent, ts, self.schedule, self.solver)

    def noise(self, state, x, t, label=None):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        mean = self.mean if label is None else self.mean + label
        return sigma * (x - alpha * mean) / (alpha**2 * self.std**2 + sigma**2)

    def value(self, state, plan):
        return self.slope * plan[1, 0]

    def noised_value(self, state, x, t):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.slope * (self.mean + gain * (x[1, 0] - alpha * self.mean))

    def latent(self, state, obs, *, key):
        return jnp.zeros((1, 1)) if key is None else jr.normal(key, (1, 1))


@eqx.filter_jit
def plans(scheme, planner, number):
    """The second states of `number` independent plans."""
    one = lambda key: scheme(planner, None, OBS, key=key)[1, 0]
    return jax.vmap(one)(jr.split(jr.key(0), number))


# --- The decoder ---


STEPS = (5, 10, 20, 50)
SLOPES = {
    1.0: [0.6845, 0.8321, 0.9128, 0.9642],
    0.5: [0.2696, 0.3744, 0.4339, 0.4726],
    0.1: [0.0240, 0.0375, 0.0563, 0.0792],
}


def decoded(planner, z):
    return planner.decode(None, OBS, jnp.full((1, 1), z))[1, 0]


@jax.jit
def plain_decoders(mean, std, z):
    return jnp.stack([decoded(GaussianPlanner(mean=mean, std=std, num_steps=n), z) for n in STEPS])


@pytest.mark.parametrize("std", SLOPES)
def test_slope_of_the_decoder(std):
    """T2: few equal steps in t shrink N(0, std^2), most of all if it is narrow (specification, P1)."""
    slopes = plain_decoders(0.0, std, 1.0) - plain_decoders(0.0, std, 0.0)
    np.testing.assert_allclose(slopes, SLOPES[std], atol=1e-3)  # as the specification asks


def test_mean_of_the_decoder():
    """T2, for data of mean 1 and standard deviation 1."""
    of_5, _, of_20, _ = plain_decoders(1.0, 1.0, 0.0)
    np.testing.assert_allclose([of_5, of_20], [0.9954, 0.9939], atol=2e-4)  # four digits are given


def test_the_corrected_decoder_is_accurate_where_the_plain_one_is_not():
    """Ten steps of DPM-Solver++(2M), equal in the log-SNR, against the flow's exact slope."""
    schedule = VPLinear(0.1, 20.0)
    ts = log_snr_grid(10, schedule)

    @jax.jit
    def corrected(std, z):
        noise = lambda x, t: GaussianPlanner(std=std).noise(None, x, t)
        return decode_plan(noise, OBS, jnp.full((1, 1), z), ts, schedule, "dpm_solver_pp_2m")[1, 0]

    deviation = lambda t, std: np.hypot(schedule.alpha(t) * std, schedule.sigma(t))
    for std in SLOPES:
        exact = deviation(1e-3, std) / deviation(1.0, std)
        error = abs(corrected(std, 1.0) - corrected(std, 0.0) - exact)
        plain_error = abs(SLOPES[std][STEPS.index(20)] - exact)
        assert error < 0.04 * exact  # 3.5, 3.3 and 0.8 per cent; twenty plain steps: 8.7, 13 and 44
        assert error < plain_error / 2


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_pp_2m"])
def test_row_0_is_the_state_to_the_bit_after_every_step(solver):
    """T3. The network, too, sees it clean at every step: here it would make NaN of anything else."""
    obs = jnp.array([0.1, -1.7, 3.3])

    def noise(x, t):
        return jnp.where(jnp.all(x[0] == obs), jnp.ones_like(x), jnp.nan)

    decode = lambda z: decode_plan(noise, obs, z, uniform_grid(6, 1.0, 1e-3), VPLinear(), solver)
    plan = jax.jit(decode)(jr.normal(jr.key(0), (4, 3)))
    assert bool(jnp.all(jnp.isfinite(plan)))
    np.testing.assert_array_equal(plan[0], obs)


# --- The schemes ---


NUMBER = 20_000


def test_unconditional_plans_are_those_of_the_data():
    x = plans(Unconditional(), GaussianPlanner(mean=0.4, std=0.5, num_steps=200), NUMBER)
    # 4 standard errors, and the 200 steps' own 2 per cent.
    assert float(x.mean()) == pytest.approx(0.4, abs=0.02)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("num_steps, mean, std", [(200, 1.490, 0.992), (20, 1.491, 0.914), (5, 1.493, 0.685)])
def test_classifier_guidance_samples_the_tilted_gaussian(num_steps, mean, std):
    """T11: N(0, 1) tilted by exp(c x / alpha) is N(c / alpha, 1); the numbers are the specification's."""
    planner = GaussianPlanner(slope=1.5, num_steps=num_steps)
    x = plans(CG(weight=1.0), planner, NUMBER)
    assert float(x.mean()) == pytest.approx(mean, abs=4 * std / NUMBER**0.5 + 1e-3)
    assert float(x.std()) == pytest.approx(std, abs=4 * std / (2 * NUMBER) ** 0.5 + 1e-3)


def expected_maximum(number):
    """E[max of K independent N(0, 1)], by quadrature."""
    x = np.linspace(-8, 8, 20_001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    cdf = np.cumsum(density) * (x[1] - x[0])
    return np.sum(x * number * cdf ** (number - 1) * density) * (x[1] - x[0])


@pytest.mark.parametrize("number, expected", [(50, 2.247), (150, 2.648)])
def test_sample_selection_returns_the_largest_of_k_whatever_the_value_is_worth(number, expected):
    """T11: unlike CG and the prior, MCSS does not see how much better the best is."""
    assert expected_maximum(number) == pytest.approx(expected, abs=4e-3)  # the specification's is simulated
    x, of_less = (plans(MCSS(number), GaussianPlanner(slope=jnp.asarray(c)), 4000) for c in (1.5, 0.1))
    assert_trees_close(of_less, x)
    # Maxima of 50 have a standard deviation of 0.46: 4 standard errors.
    assert float(x.mean()) == pytest.approx(expected_maximum(number) * SLOPES[1.0][STEPS.index(20)], abs=0.03)


def test_one_candidate_is_the_unconditional_plan():
    """T13."""
    for scheme in (MCSS(1), CG(0.0), CFG(0.0, 2.0)):
        assert_trees_close(
            plans(scheme, GaussianPlanner(), 10), plans(Unconditional(), GaussianPlanner(), 10)
        )


def test_more_candidates_are_never_worse():
    """T13: the draws are nested."""
    best = [plans(MCSS(k), GaussianPlanner(), 50) for k in (1, 2, 5, 20)]
    for fewer, more in zip(best, best[1:]):
        # The same plan decoded in another batch may differ in the last bits.
        assert bool(jnp.all(more >= fewer - 1e-5)) and bool(jnp.any(more > fewer + 1e-3))


def test_classifier_free_guidance():
    """T12: w = 1 is the conditional model; for these data w exaggerates the label's shift by w exactly."""
    shifted = plans(Unconditional(), GaussianPlanner(mean=2.0), 10)
    assert_trees_close(plans(CFG(1.0, 2.0), GaussianPlanner(), 10), shifted)
    three = plans(CFG(3.0, 2.0), GaussianPlanner(), 10)
    assert_trees_close(three, plans(Unconditional(), GaussianPlanner(mean=6.0), 10), rtol=1e-4, atol=1e-4)


def test_the_prior_of_a_planner_alone_is_the_standard_normal():
    planner = GaussianPlanner()
    zero = plans(Unconditional("zero"), planner, 3)
    assert_trees_close(plans(Prior(), planner, 3), zero)
    assert len(np.unique(zero)) == 1
    x = plans(Prior(sample=True), planner, NUMBER)
    assert float(x.std()) == pytest.approx(0.9128, abs=0.02)  # 4 standard errors


def test_held_noise_is_the_same_at_every_decision_and_another_for_another_number():
    planner = GaussianPlanner()
    held = plans(Unconditional("held"), planner, 5)
    assert len(np.unique(held)) == 1
    assert held[0] != plans(Unconditional("held", held=1), planner, 1)[0]


def test_temperature_scales_the_noise():
    hot, cold = (plans(Unconditional(temperature=T), GaussianPlanner(), 100) for T in (1.0, 0.5))
    assert_trees_close(cold, 0.5 * hot)


def test_the_same_key_gives_the_same_plan():
    """T15."""
    for scheme in (Unconditional(), MCSS(3), CG(0.3, 2), CFG(1.2, 1.0), Prior(sample=True)):
        run = eqx.filter_jit(lambda key, s=scheme: s(GaussianPlanner(), None, OBS, key=key))
        np.testing.assert_array_equal(run(jr.key(1)), run(jr.key(1)))
        assert float(run(jr.key(1))[1, 0]) != float(run(jr.key(2))[1, 0])


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="num_candidates is 0"):
        MCSS(0)
    with pytest.raises((ValueError, TypeCheckError), match="draw"):
        Unconditional(draw="new")
