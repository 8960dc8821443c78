"""Prior Guidance: divergences, known optima of the objective, priors, gradients (specification, T8-T17)."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from eqgen.algorithms.prior_guidance import PriorGuidance, gaussian_kl, gaussian_log_chi_square
from eqgen.guidance import MCSS, Prior, Unconditional
from eqgen.networks.priors import FlowPrior, GaussianPrior, MixturePrior, Recurrence
from eqgen.tree import filter_scan
from helpers import assert_trees_close, filled, random_windows


HORIZON, OBS, ACT = 5, 3, 2
windows = partial(random_windows, horizon=HORIZON, obs_size=OBS, action_size=ACT)
EXAMPLE = jax.tree.map(lambda x: x[0], windows(jr.key(0), 1))


def tiny(**fields):
    return dataclasses.replace(PriorGuidance.tiny(), **fields)


# --- Divergences ---


def moments_of_ratio(mean, std):
    """E_p[log p/q] and E_p[p/q] - 1 for p = N(mean, std^2), q = N(0, 1), by quadrature."""
    x = np.linspace(mean - 40, mean + 40, 400_001)
    log_p = -0.5 * ((x - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
    log_ratio = log_p + 0.5 * x**2 + 0.5 * np.log(2 * np.pi)
    return np.trapezoid(np.exp(log_p) * log_ratio, x), np.trapezoid(np.exp(log_p + log_ratio), x) - 1


@pytest.mark.parametrize("mean, std", [(0.5, 0.8), (1.0, 0.5), (-0.7, 1.3), (0.0, 1.0)])
def test_divergences_by_quadrature(mean, std):
    """T8, against integrals instead of samples."""
    kl, chi_square = moments_of_ratio(mean, std)
    arguments = jnp.asarray(mean), jnp.log(std)
    assert float(gaussian_kl(*arguments)) == pytest.approx(kl, abs=1e-5)
    assert float(jnp.expm1(gaussian_log_chi_square(*arguments))) == pytest.approx(
        chi_square, abs=1e-4, rel=1e-4
    )


def test_divergences_have_the_values_of_the_specification():
    """T8."""
    chi_square = lambda mean, std: float(jnp.expm1(gaussian_log_chi_square(jnp.asarray(mean), jnp.log(std))))
    assert chi_square(0.5, 0.8) == pytest.approx(0.28817, abs=1e-5)
    assert chi_square(1.0, 0.5) == pytest.approx(1.67719, abs=1e-5)
    assert chi_square(0.0, 1.0) == float(gaussian_kl(jnp.zeros(()), jnp.zeros(()))) == 0.0


def test_a_divergence_of_0_is_not_the_behaviour_once_squashed():
    """Why `corrected` has no squash: 2 tanh of N(0, 1) has the deviation 1.2559 and is .3446 nats from N(0, 1)
    (specification, P2)."""
    x = np.linspace(-9, 9, 200_001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    z = np.asarray(PriorGuidance().squashed(jnp.asarray(x)), float)
    assert np.sqrt(np.trapezoid(density * z**2, x)) == pytest.approx(1.2559, abs=1e-4)
    log_slope = np.log(2) - 2 * np.logaddexp(x, -x) + 2 * np.log(2)  # of 2 tanh, which is 2 / cosh^2
    log_ratio = -0.5 * x**2 - log_slope + 0.5 * z**2
    assert np.trapezoid(density * log_ratio, x) == pytest.approx(0.3446, abs=1e-4)


# --- Optima of the objective ---


class FreeGaussian(eqx.Module):
    """A prior over one number that does not look at the state."""

    mean: jax.Array
    log_std: jax.Array

    def __call__(self, obs):
        return self.mean, self.log_std


def optimum(agent, value, steps=500, batch=512, learning_rate=0.05):
    """(mu, sigma) after stochastic gradient steps on the prior's loss with the latent value `value(z)`."""
    prior = FreeGaussian(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    obs, latent_value = jnp.zeros((batch, 1)), lambda plan: value(plan[1, 0])
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    loss = lambda prior, key: agent.prior_loss(prior, latent_value, obs, key=key)[0]

    def step(carry, key):
        prior, opt_state = carry
        grads = eqx.filter_grad(loss)(prior, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (eqx.apply_updates(prior, updates), opt_state), None

    run = eqx.filter_jit(lambda carry, keys: filter_scan(step, carry, keys)[0][0])
    prior = run((prior, optimizer.init(prior)), jr.split(jr.key(0), steps))
    return float(prior.mean[0, 0]), float(jnp.exp(prior.log_std[0, 0]))


def exact(alpha, **fields):
    return PriorGuidance(squash=None, divergence_weight=alpha, **({"normalize_value": False} | fields))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_optimum_of_a_linear_value(alpha):
    """T9: V = w z has mu* = w / alpha, sigma* = 1; with w = c = 1.5 and alpha = 1, T11's 1.5."""
    mean, std = optimum(exact(alpha), lambda z: 1.5 * z)
    # Adam on batches of 512 with a rate that falls to 0.
    assert mean == pytest.approx(1.5 / alpha, abs=0.02)
    assert std == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_optimum_of_a_quadratic_value(alpha):
    """T9: V = -(z - c)^2 / 2 has mu* = c / (1 + alpha), sigma*^2 = alpha / (1 + alpha)."""
    mean, std = optimum(exact(alpha), lambda z: -0.5 * (z - 1.2) ** 2)
    assert mean == pytest.approx(1.2 / (1 + alpha), abs=0.02)
    assert std == pytest.approx((alpha / (1 + alpha)) ** 0.5, abs=0.03)


def test_a_large_weight_holds_the_prior_at_the_behaviour():
    """T9: alpha -> infinity."""
    mean, std = optimum(exact(1000.0), lambda z: 1.5 * z)
    assert mean == pytest.approx(0.0, abs=5e-3) and std == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("alpha, mean", [(0.5, 1.376), (1.0, 0.905), (2.0, 0.546)])
def test_the_normalised_value_makes_the_scale_irrelevant(alpha, mean):
    """T10: mu* = 1 / (alpha E|N(mu*, 1)|) for any slope (specification, P4)."""
    agent = exact(alpha, normalize_value=True)
    found = [optimum(agent, lambda z, w=w: w * z)[0] for w in (0.1, 10.0)]
    assert found == pytest.approx([mean, mean], abs=0.03)
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_a_constant_added_to_the_value_matters_once_normalised():
    """P4: values far from 0 are divided by more, so that the divergence weighs more."""
    agent = exact(1.0, normalize_value=True)
    assert optimum(agent, lambda z: z + 10.0)[0] < 0.5 * optimum(agent, lambda z: z)[0]


def test_optimum_under_the_renyi_divergence():
    """V = w z: the divergence's slope in mu, 2 mu / (2 - sigma^2), is w / alpha, and its slope in sigma is 0:
    mu^2 = (2 - sigma^2)(1 - sigma^2) / sigma^2. Together, sigma^2 (w / alpha)^2 (2 - sigma^2) = 4 (1 - sigma^2)."""
    mean, std = optimum(exact(1.0, divergence="renyi"), lambda z: z)
    s = std**2
    assert mean == pytest.approx((2 - s) / 2, abs=0.02)
    assert s * (2 - s) == pytest.approx(4 * (1 - s), abs=0.06)


# --- Priors ---


def test_the_recurrence_is_fed_the_state_once():
    """T16: against the loop written out; and every row depends on the state."""
    net, obs = Recurrence(OBS, 6, 8, key=jr.key(1)), jr.normal(jr.key(2), (OBS,))
    x, h, rows = jax.nn.relu(net.embed_norm(net.embed(obs))), jnp.zeros(8), []
    for step in range(6):
        h = net.cell(x if step == 0 else jnp.zeros(8), h)
        rows.append(jax.nn.relu(net.norm(h)))
    assert_trees_close(eqx.filter_jit(net)(obs), jnp.stack(rows), rtol=1e-4, atol=1e-5)
    moved = eqx.filter_jit(net)(obs + 0.5)
    assert bool(jnp.all(jnp.any(jnp.abs(moved - jnp.stack(rows)) > 1e-4, axis=1)))


def test_the_prior_has_the_size_of_the_reference():
    """0.4 million parameters (specification, 2.6)."""
    shapes = eqx.filter_eval_shape(GaussianPrior, 4, 31, key=jr.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes) if hasattr(leaf, "shape"))
    assert size == pytest.approx(4e5, rel=0.01)


def test_the_flow_reports_its_own_jacobian(x64):
    flow = FlowPrior(OBS, 4, 8, 3, key=jr.key(1))
    arrays, static = eqx.partition(flow, eqx.is_inexact_array)
    flow = eqx.combine(jax.tree.map(lambda x: x + 0.3 * jr.normal(jr.key(2), x.shape), arrays), static)
    obs, noise = jr.normal(jr.key(3), (OBS,)), jr.normal(jr.key(4), (4, OBS))
    image = jax.jit(lambda e: flow(obs, e.reshape(4, OBS))[0].ravel())
    _, expected = jnp.linalg.slogdet(jax.jacfwd(image)(noise.ravel()))
    assert abs(float(expected)) > 0.1
    assert_trees_close(flow(obs, noise)[1], expected, rtol=1e-6)


def test_a_mixture_of_equal_components_has_the_divergence_of_one(x64):
    """The Monte Carlo estimate against the closed form."""
    mean, log_std = 0.5 * jr.normal(jr.key(1), (4, OBS)), 0.3 * jr.normal(jr.key(2), (4, OBS))
    prior = lambda obs: (jnp.log(jnp.array([0.3, 0.7])), jnp.stack([mean] * 2), jnp.stack([log_std] * 2))
    agent, keys = PriorGuidance(family="mixture"), jr.split(jr.key(3), 20_000)
    estimates = jax.jit(jax.vmap(lambda k: agent.draws(prior, jnp.zeros(OBS), key=k)[2]))(keys)
    expected = jnp.mean(jnp.sum(gaussian_kl(mean, log_std), axis=1))
    error = float(jnp.std(estimates)) / len(keys) ** 0.5
    assert float(jnp.mean(estimates)) == pytest.approx(float(expected), abs=4 * error)


def test_the_divergence_of_a_flow_is_that_of_the_gaussian_it_makes(x64):
    """Couplings without weights shift by a constant and scale by one: a diagonal Gaussian."""
    flow = FlowPrior(OBS, 4, 8, 2, key=jr.key(1))
    shift, scale = 0.4, np.arctanh(-0.3)  # log sigma = -0.3
    for i in range(2):
        bias = jnp.repeat(jnp.array([shift, scale]), 6)
        flow = eqx.tree_at(lambda f, i=i: f.layers[i].layers[-1].bias, flow, bias)
    agent, keys = PriorGuidance(family="flow"), jr.split(jr.key(3), 20_000)
    estimates = jax.jit(jax.vmap(lambda k: agent.draws(flow, jnp.zeros(OBS), key=k)[2]))(keys)
    expected = OBS * float(gaussian_kl(jnp.asarray(shift), jnp.asarray(-0.3)))
    error = float(jnp.std(estimates)) / len(keys) ** 0.5
    assert float(jnp.mean(estimates)) == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("family", ["gaussian", "mixture", "flow"])
def test_a_fresh_prior_is_near_the_behaviour(family):
    agent = tiny(family=family)
    make = {
        "gaussian": GaussianPrior,
        "mixture": partial(MixturePrior, num_components=2),
        "flow": partial(FlowPrior, num_layers=2),
    }[family]
    prior = make(OBS, HORIZON - 1, 16, key=jr.key(1))
    obs = jr.normal(jr.key(2), (256, OBS))
    divergence = lambda s, k: agent.draws(prior, s, key=k)[2]
    assert abs(float(jnp.mean(jax.jit(jax.vmap(divergence))(obs, jr.split(jr.key(3), 256))))) < 0.05
    mode = jax.jit(jax.vmap(lambda s: agent.mode(prior, s)))(obs)
    assert mode.shape == (256, HORIZON - 1, OBS) and float(jnp.max(jnp.abs(mode))) < 1.0


# --- Where gradients go ---


@pytest.fixture(scope="module")
def trained():
    """An agent, its compiled update, and its state before and after one."""
    agent = tiny()
    shapes = eqx.filter_eval_shape(agent.init, EXAMPLE, key=jr.key(0))
    parts = [shapes.planner.denoiser, shapes.planner.critic, shapes.planner.inverse_dynamics]
    *of_planner, prior, latent_value = (
        filled(part.online) for part in [*parts, shapes.prior, shapes.latent_value]
    )
    state = agent.from_networks(agent.planner.from_networks(EXAMPLE, *of_planner), prior, latent_value)
    update = eqx.filter_jit(lambda s, b: agent.update(s, b, key=jr.key(2)))
    return agent, update, state, update(state, windows(jr.key(1), 16))[0]


def test_the_planner_stays_as_it_is(trained):
    """T14."""
    _, _, before, after = trained
    assert eqx.tree_equal(before.planner, after.planner)
    assert not eqx.tree_equal(before.prior, after.prior)
    assert not eqx.tree_equal(before.latent_value, after.latent_value)


def test_the_latent_value_learns_from_the_polyak_prior(trained):
    """T14: the online prior is no part of its step."""
    _, update, before, after = trained
    other = eqx.tree_at(lambda s: s.prior.online.mean.bias, before, before.prior.online.mean.bias + 1.0)
    changed = update(other, windows(jr.key(1), 16))[0]
    assert eqx.tree_equal(changed.latent_value, after.latent_value)
    assert not eqx.tree_equal(changed.prior.online, after.prior.online)


def test_the_step_of_the_prior_calls_no_denoiser(trained):
    """T14: tracing the update runs the denoiser's code; tracing the prior's part never does, and gives the planner
    a gradient of zero."""
    agent, _, state, _ = trained
    calls = []

    class Counted(eqx.Module):
        net: eqx.Module

        def __call__(self, x, t, label=None):
            calls.append(1)
            return self.net(x, t, label)

    counted = eqx.tree_at(
        lambda s: s.planner.denoiser.average, state, Counted(state.planner.denoiser.average)
    )
    obs = windows(jr.key(1), 16).states[:, 0]
    eqx.filter_eval_shape(agent.update, counted, windows(jr.key(1), 16), key=jr.key(0))
    assert calls
    calls.clear()
    loss = lambda s: agent.prior_loss(s.prior.online, s.latent_value.average, obs, key=jr.key(0))[0]
    grads = eqx.filter_jit(eqx.filter_grad(loss))(counted)
    assert not calls
    assert not any(np.any(g) for g in jax.tree.leaves(grads.planner))
    assert any(np.any(g) for g in jax.tree.leaves(grads.prior.online))


# --- Acting ---


def test_the_mode_is_the_same_plan_for_every_key_and_a_sample_is_not(trained):
    """T15."""
    agent, _, _, state = trained
    obs = jr.normal(jr.key(5), (OBS,))

    def planned(scheme):
        return eqx.filter_jit(lambda key: agent.plan(state, obs, key=key, guidance=scheme))

    mode, sample = planned(Prior()), planned(Prior(sample=True))
    np.testing.assert_array_equal(mode(jr.key(0)), mode(jr.key(1)))
    np.testing.assert_array_equal(sample(jr.key(0)), sample(jr.key(0)))
    assert np.any(sample(jr.key(0)) != sample(jr.key(1)))


def test_the_other_schemes_do_not_see_the_learned_prior(trained):
    agent, _, _, state = trained
    obs = jr.normal(jr.key(5), (OBS,))
    for scheme in (Unconditional(), MCSS(2)):
        with_prior = eqx.filter_jit(lambda s, g=scheme: g(agent, s, obs, key=jr.key(0)))(state)
        alone = eqx.filter_jit(lambda s, g=scheme: g(agent.planner, s, obs, key=jr.key(0)))(state.planner)
        assert_trees_close(with_prior, alone)


def test_latents_are_squashed(trained):
    agent, _, _, state = trained
    far = eqx.tree_at(lambda s: s.prior.average.mean.bias, state, jnp.full(OBS, 50.0))
    latent = eqx.filter_jit(lambda s: agent.latent(s, jnp.zeros(OBS), key=None))(far)
    assert_trees_close(latent, jnp.full((HORIZON - 1, OBS), 2.0))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(family="flow", divergence="chi_square"), "no closed form"),
        (dict(squash=0.0), "squash is 0.0"),
        (dict(divergence_weight=-1.0), "must not be negative"),
        (dict(divergence="renyi", max_log_std=0.4), "chi-square is infinite"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PriorGuidance(**fields)


def test_presets():
    paper, corrected = PriorGuidance.profiles()["paper"], PriorGuidance.profiles()["corrected"]
    assert paper == PriorGuidance() and (paper.num_train_steps, paper.planner.num_steps) == (5, 20)
    assert corrected.num_train_steps is None and corrected.squash is None and corrected.planner.debias
    assert corrected.resized("cpu").planner.solver == "dpm_solver_pp_2m"
    assert corrected.resized("cpu").planner.width == type(corrected.planner).sizes["cpu"]["width"]
