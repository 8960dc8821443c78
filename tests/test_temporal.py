"""Networks over plans: sizes of the reference, what a fresh network returns, dependence on position and label."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from eqgen.networks.critics import StateValue
from eqgen.networks.inverse_dynamics import ActionDenoiser
from eqgen.networks.temporal import Block, DiT1D, HorizonCritic, MeanVelocityDiT1D, positions
from eqgen.networks.unet import HalfUNet1D, UNet1D
from helpers import assert_trees_close, filled


HORIZON, OBS = 8, 3
PLAN, T = jnp.sin(3.0 * jnp.arange(HORIZON * OBS)).reshape(HORIZON, OBS), jnp.asarray(0.3)


def num_parameters(make, *args, **kwargs):
    shapes = eqx.filter_eval_shape(make, *args, key=jr.key(0), **kwargs)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes) if hasattr(leaf, "shape"))


@pytest.mark.parametrize(
    "task, obs, depth, heads, number",
    [
        ("maze2d", 4, 2, 4, 2_622_996),
        ("antmaze", 29, 8, 4, 9_742_893),
        ("kitchen", 60, 2, 4, 2_651_724),
        ("hopper", 11, 2, 8, 2_626_587),
        ("cheetah, walker", 17, 2, 8, 2_629_665),
    ],
)
def test_the_denoisers_have_the_sizes_of_the_reference(task, obs, depth, heads, number):
    """Specification, 2.2."""
    assert num_parameters(DiT1D, obs, 256, depth, heads) == number


def test_the_other_networks_have_the_sizes_of_the_reference():
    """Specification, 2.3 and 2.4, which round."""
    assert num_parameters(HorizonCritic, 4) == pytest.approx(1.58e6, rel=2e-3)
    assert num_parameters(StateValue, 17) == pytest.approx(71e3, rel=2e-2)
    assert num_parameters(ActionDenoiser, 2, (4, 4)) == pytest.approx(168e3, rel=2e-3)


def test_a_fresh_denoiser_returns_exactly_zero():
    net = eqx.filter_jit(lambda key: DiT1D(OBS, 16, 1, 2, key=key)(PLAN, T))
    assert not np.any(net(jr.key(1)))


def test_the_first_norm_of_a_block_replaces_the_stream():
    """A fresh modulated block, whose gates are 0, is LN and not the identity."""
    x = jr.normal(jr.key(2), (HORIZON, 16))
    block = filled(eqx.filter_eval_shape(Block, 16, 2, modulated=True, key=jr.key(3)))
    fresh = (jnp.ones(16), jnp.zeros(16), jnp.zeros((16, 96)), jnp.zeros(96))
    where = lambda b: (b.norm1.weight, b.norm1.bias, b.modulation.weight, b.modulation.bias)
    block = eqx.tree_at(where, block, fresh)
    normalized = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
    # LN divides by sqrt(var + 1e-6).
    assert_trees_close(eqx.filter_jit(block)(x, jnp.ones(16)), normalized, rtol=1e-4, atol=1e-5)


def test_positions():
    table = positions(5, 8)
    frequencies = 10_000.0 ** (-np.arange(4) / 3)
    expected = np.concatenate([np.sin(3 * frequencies), np.cos(3 * frequencies)]).astype(np.float32)
    assert_trees_close(table[3], jnp.asarray(expected))
    with pytest.raises(ValueError, match="size is 7"):
        positions(5, 7)


def fitted(net, loss, steps=400, learning_rate=3e-3):
    optimizer = optax.adam(learning_rate)
    arrays, static = eqx.partition(net, eqx.is_inexact_array)

    @jax.jit
    def run(arrays):
        def step(carry, _):
            arrays, opt_state = carry
            grads = jax.grad(lambda arrays: loss(eqx.combine(arrays, static)))(arrays)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(arrays, updates), opt_state), None

        return jax.lax.scan(step, (arrays, optimizer.init(arrays)), length=steps)[0][0]

    return eqx.combine(run(arrays), static)


def test_the_critic_knows_positions_and_overfits_64_windows():
    """T6."""
    plans, labels = jr.normal(jr.key(4), (64, HORIZON, OBS)), jr.uniform(jr.key(5), (64,), minval=-1.0)
    critic = HorizonCritic(OBS, 32, 1, 2, key=jr.key(6))
    loss = lambda critic: jnp.mean((jax.vmap(critic)(plans) - labels) ** 2)
    critic = fitted(critic, loss)
    assert float(eqx.filter_jit(loss)(critic)) < 0.01 * float(jnp.var(labels))
    read = eqx.filter_jit(critic)
    assert abs(float(read(plans[0]) - read(plans[0][::-1]))) > 1e-2
    # Token 0 is read: the order of the later ones matters, too.
    assert abs(float(read(plans[0]) - read(plans[0].at[1:].set(plans[0][:0:-1])))) > 1e-2


@pytest.mark.parametrize("make", [(DiT1D, 16, 1, 2), (UNet1D, 8, (1, 2))], ids=["dit", "unet"])
def test_a_dropped_label_is_no_label(make):
    cls, *sizes = make
    net = eqx.filter_jit(filled(eqx.filter_eval_shape(cls, OBS, *sizes, conditional=True, key=jr.key(1))))
    none, dropped = net(PLAN, T), net(PLAN, T, jnp.asarray(0.7), jnp.asarray(0.0))
    kept = net(PLAN, T, jnp.asarray(0.7), jnp.asarray(1.0))
    assert none.shape == PLAN.shape
    assert_trees_close(dropped, none)
    assert float(jnp.max(jnp.abs(kept - none))) > 1e-3


def test_the_unet_takes_horizons_that_it_can_halve():
    net = eqx.filter_eval_shape(UNet1D, OBS, 8, (1, 2, 4, 8), key=jr.key(1))
    assert eqx.filter_eval_shape(lambda net, x: net(x, T), net, jnp.zeros((40, OBS))).shape == (40, OBS)
    with pytest.raises(ValueError, match="horizon is 36"):
        eqx.filter_eval_shape(lambda net, x: net(x, T), net, jnp.zeros((36, OBS)))
    with pytest.raises(ValueError, match="width is 12"):
        UNet1D(OBS, 12, key=jr.key(1))


def test_half_a_unet_reads_one_number_of_any_horizon():
    for horizon in (4, 7, 32):
        net = eqx.filter_eval_shape(HalfUNet1D, horizon, OBS, 8, (1, 2), key=jr.key(0))
        assert eqx.filter_eval_shape(lambda net, x: net(x, T), net, jnp.zeros((horizon, OBS))).shape == ()


def test_the_mean_velocity_depends_on_both_times():
    net = eqx.filter_jit(filled(eqx.filter_eval_shape(MeanVelocityDiT1D, OBS, 16, 1, 2, key=jr.key(1))))
    at = lambda r, t: net(PLAN, jnp.asarray(r), jnp.asarray(t))
    assert not np.allclose(at(0.0, 1.0), at(0.5, 1.0), atol=1e-3)
    assert not np.allclose(at(0.0, 1.0), at(0.0, 0.5), atol=1e-3)
