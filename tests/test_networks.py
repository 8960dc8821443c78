import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.networks.critics import QEnsemble
from eqgen.networks.embeddings import fourier_features
from eqgen.networks.mlp import ACTIVATIONS, MLP, mish
from eqgen.networks.policies import MeanVelocity, TanhGaussianPolicy
from helpers import assert_trees_close, take


def test_mish_equals_its_definition_in_value_and_derivatives(x64):
    x = jnp.linspace(-40.0, 40.0, 401)
    definition = lambda x: x * jnp.tanh(jax.nn.softplus(x))
    for f, g in [(mish, definition)] + [
        (jax.vmap(d(mish)), jax.vmap(d(definition)))
        for d in (jax.grad, jax.jacfwd, lambda h: jax.grad(jax.grad(h)))
    ]:
        assert_trees_close(f(x), g(x), rtol=1e-7, atol=1e-8)


def test_mish_is_finite_in_single_precision_at_the_extremes():
    x = jnp.array([-1e30, -100.0, 100.0, 1e30])
    assert_trees_close(mish(x), jnp.array([0.0, 0.0, 100.0, 1e30]))
    assert bool(jnp.all(jnp.isfinite(jax.vmap(jax.grad(mish))(x))))


def test_split_first_layer_is_the_layer_of_the_concatenation(getkey):
    net = MLP((3, 2), 4, (8,), "tanh", key=getkey())
    x, y = jr.normal(getkey(), (3,)), jr.normal(getkey(), (2,))
    weight = jnp.concatenate(net.layers[0].weights)
    hidden = jnp.tanh(jnp.concatenate([x, y]) @ weight + net.layers[0].bias)
    assert_trees_close(net(x, y), hidden @ net.layers[1].weights[0] + net.layers[1].bias)


def test_the_share_of_an_unmapped_input_is_computed_once(getkey):
    """What makes scoring many actions of one observation cheap: no product of (candidates, obs) with weights."""
    net = MLP((7, 2), "scalar", (8,), key=getkey())
    obs, actions = jr.normal(getkey(), (7,)), jr.normal(getkey(), (5, 2))
    jaxpr = jax.make_jaxpr(jax.vmap(lambda a: net(obs, a)))(actions)
    shapes = [e.invars[0].aval.shape for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert (7,) in shapes and (5, 7) not in shapes


def test_wrong_number_of_inputs_is_an_error(getkey):
    with pytest.raises(ValueError):
        MLP((3, 2), 4, (8,), key=getkey())(jnp.ones(3))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_name(getkey, name):
    net = MLP((3,), "scalar", (4,), name, key=getkey())
    assert net(jnp.ones(3)).shape == ()


def test_ensemble_values_are_the_members(getkey):
    critics = QEnsemble(3, 2, (8,), size=4, key=getkey())
    obs, action = jnp.ones(3), jnp.ones(2)
    values = critics(obs, action)
    for i in range(4):
        member = take(critics.members, i)
        assert_trees_close(values[i], member(obs, action))
    assert len(np.unique(np.asarray(values))) == 4


def test_fourier_features_stay_below_their_highest_frequency():
    """The derivative in t is bounded by it: MeanFlow differentiates the network in t."""
    for t in (0.0, 0.3, 1.0):
        derivative = jax.jacfwd(fourier_features)(t)
        assert derivative.shape == (16,)
        assert float(jnp.max(jnp.abs(derivative))) <= 32.0 + 1e-4


def test_tanh_gaussian_log_prob_integrates_to_one(x64, getkey):
    """exp(log_prob) is the density of the sampled action: its integral over (-1, 1) is 1 (change of variables)."""
    policy = TanhGaussianPolicy(2, 1, (8,), key=getkey())
    obs = jnp.array([0.3, -0.7])
    mean, std = (float(x[0]) for x in (policy(obs)[0], jnp.exp(policy(obs)[1])))
    x = jnp.linspace(mean - 9 * std, mean + 9 * std, 20001)
    density = jnp.exp(-0.5 * ((x - mean) / std) ** 2) / (std * jnp.sqrt(2 * jnp.pi))
    assert_trees_close(jnp.trapezoid(density, x), jnp.array(1.0), rtol=1e-6)
    action, log_prob = jax.vmap(lambda k: policy.sample(obs, key=k))(jr.split(getkey(), 500))
    of_action = jnp.interp(action[:, 0], jnp.tanh(x), density / (1 - jnp.tanh(x) ** 2))
    assert_trees_close(jnp.exp(log_prob), of_action, rtol=1e-4)


def test_tanh_gaussian_log_prob_is_finite_when_saturated(getkey):
    policy = TanhGaussianPolicy(1, 1, (4,), key=getkey())
    far = eqx.tree_at(lambda p: p.net.layers[-1].bias, policy, jnp.array([50.0, 0.0]))
    _, log_prob = far.sample(jnp.zeros(1), key=getkey())
    assert bool(jnp.isfinite(log_prob))
    assert bool(jnp.all(jnp.isfinite(jax.grad(lambda o: far.sample(o, key=jr.key(0))[1])(jnp.zeros(1)))))


@pytest.mark.parametrize("state_dependent_std", [True, False])
def test_tanh_gaussian_log_prob_of_an_action_is_that_of_its_sampling(getkey, state_dependent_std):
    policy = TanhGaussianPolicy(2, 3, (8,), state_dependent_std=state_dependent_std, key=getkey())
    obs, keys = jnp.array([0.3, -0.7]), jr.split(getkey(), 500)
    actions, sampled = jax.vmap(lambda k: policy.sample(obs, key=k))(keys)
    # An action in single precision says its inverse tanh to 1e-4 up to 4, where few of these are beyond.
    assert_trees_close(jax.vmap(lambda a: policy.log_prob(obs, a))(actions), sampled, rtol=1e-3, atol=2e-3)
    same = jnp.array_equal(policy(obs)[1], policy(-obs)[1])
    assert bool(same) != state_dependent_std


def test_tanh_gaussian_log_prob_is_finite_on_the_bounds(getkey):
    policy = TanhGaussianPolicy(1, 2, (4,), state_dependent_std=False, key=getkey())
    at = lambda policy: policy.log_prob(jnp.zeros(1), jnp.array([1.0, -1.0]))
    value, grads = eqx.filter_value_and_grad(at)(policy)
    assert bool(jnp.isfinite(value)) and all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))


def test_mean_velocity_depends_on_both_times(getkey):
    net = MeanVelocity(3, 2, (16,), key=getkey())
    x, obs = jnp.ones(2), jnp.ones(3)
    at = lambda r, t: net(x, jnp.array(r), jnp.array(t), obs)
    assert at(0.0, 1.0).shape == (2,)
    assert not jnp.allclose(at(0.0, 1.0), at(0.5, 1.0))
    assert not jnp.allclose(at(0.0, 1.0), at(0.0, 0.5))
