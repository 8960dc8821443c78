"""Networks of images and points: sizes, what a fresh one returns, gradients, labels, dropout, errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.networks.unet2d import AttentionBlock, ResidualBlock, UNet2D
from eqgen.networks.vector_denoiser import VectorDenoiser
from helpers import assert_trees_close, filled


T, LABEL = jnp.asarray(0.3), jnp.asarray(2)
SHAPE = (2, 4, 8)
IMAGE = jnp.sin(3.0 * jnp.arange(64)).reshape(SHAPE)
SMALL = dict(width=4, multipliers=(1, 2), attention=(1,), num_heads=2, groups=2, num_classes=3, dropout=0.5)
UNET = lambda key: UNet2D(SHAPE, **SMALL, key=key)
VECTOR = lambda key: VectorDenoiser(SHAPE, (8, 8, 6), num_classes=3, key=key)
BOTH = pytest.mark.parametrize("make", [UNET, VECTOR], ids=["unet", "vector"])


def full(make):
    """The network with nothing left at 0."""
    return filled(eqx.filter_eval_shape(make, jr.key(0)))


@eqx.filter_jit
def call(net, *args):
    return net(*args)


def output_shape(net, shape):
    return eqx.filter_eval_shape(lambda net, x: net(x, T), net, jnp.zeros(shape)).shape


# --- Both ---


@BOTH
def test_a_fresh_network_returns_exactly_zero(make):
    last = lambda net: net.out if make is UNET else net.mlp.layers[-1]
    # The rest of a fresh network, which takes long to draw, does not matter to a last layer of zeros.
    net = eqx.tree_at(last, full(make), eqx.filter_jit(lambda key: last(make(key)))(jr.key(1)))
    y = call(net, IMAGE, T, LABEL, jnp.asarray(1.0))
    assert y.shape == SHAPE and not np.any(y)


@BOTH
def test_a_dropped_label_is_no_label(make):
    net, other = full(make), jnp.asarray(0)
    none = call(net, IMAGE, T)
    for label in (LABEL, other):
        assert_trees_close(call(net, IMAGE, T, label, jnp.asarray(0.0)), none)
    kept = call(net, IMAGE, T, LABEL, jnp.asarray(1.0))
    assert float(jnp.max(jnp.abs(kept - none))) > 1e-3
    assert float(jnp.max(jnp.abs(kept - call(net, IMAGE, T, other, jnp.asarray(1.0))))) > 1e-3


@BOTH
def test_neighbours_among_1000_timesteps_differ(make):
    at = lambda t: call(full(make), IMAGE, jnp.asarray(t), LABEL, jnp.asarray(1.0))
    assert float(jnp.max(jnp.abs(at(0.5) - at(0.501)))) > 1e-3


@BOTH
@pytest.mark.slow
def test_every_parameter_has_a_finite_gradient(make):
    loss = lambda net: jnp.sum((net(IMAGE, T, LABEL) - IMAGE) ** 2)
    grads = eqx.filter_jit(eqx.filter_grad(loss))(full(make))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        where = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(grad)), where
        # The keys' bias shifts all scores of a query alike, so `Attention` leaves it out.
        assert np.any(grad) or where.endswith(".attention.key.bias"), where


@BOTH
def test_an_unconditional_network_takes_no_label(make):
    net = full(lambda key: UNet2D(SHAPE, 8, key=key) if make is UNET else VectorDenoiser(SHAPE, key=key))
    assert output_shape(net, SHAPE) == SHAPE
    with pytest.raises(ValueError, match="construct it with num_classes"):
        net(IMAGE, T, LABEL)


# --- The U-Net ---


def test_the_network_for_cifar_10_has_the_size_of_ddpm():
    """35.7 million parameters (Ho et al., appendix B); 35,746,307 in its ports."""
    paper = dict(multipliers=(1, 2, 2, 2), num_blocks=2, attention=(1,), dropout=0.1, groups=32)
    net = eqx.filter_eval_shape(lambda key: UNet2D((3, 32, 32), 128, **paper, key=key), jr.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(net) if hasattr(leaf, "shape")) == 35_746_307
    assert output_shape(net, (3, 32, 32)) == (3, 32, 32)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_small_image_has_up_to_three_levels(levels):
    make = lambda key: UNet2D((1, 8, 8), 8, (1, 2, 3)[:levels], attention=(levels - 1,), key=key)
    net = eqx.filter_eval_shape(make, jr.key(0))
    for shape in ((1, 8, 8), (1, 16, 4)):
        assert output_shape(net, shape) == shape


def test_a_fresh_block_is_its_skip():
    x, embedding = jr.normal(jr.key(2), (8, 4, 4)), jr.normal(jr.key(3), (6,))
    assert_trees_close(ResidualBlock(8, 8, 6, 4, 0.0, key=jr.key(4))(x, embedding), x)
    assert_trees_close(AttentionBlock(8, 2, 4, key=jr.key(5))(x), x)


def test_attention_follows_a_permutation_of_places():
    block = full(lambda key: AttentionBlock(8, 2, 4, key=key))
    x, order = jr.normal(jr.key(6), (8, 16)), jr.permutation(jr.key(7), 16)
    image = lambda x: x.reshape(8, 4, 4)
    assert_trees_close(block(image(x[:, order])), image(block(image(x)).reshape(8, 16)[:, order]), atol=1e-5)


def test_dropout_is_on_with_a_key_only():
    x, embedding = jr.normal(jr.key(2), (8, 4, 4)), jr.normal(jr.key(3), (6,))
    block = full(lambda key: ResidualBlock(8, 8, 6, 4, 0.5, key=key))
    without = block(x, embedding)
    first, second = (block(x, embedding, key=jr.key(i)) for i in range(2))
    assert not np.allclose(first, without) and not np.allclose(first, second)
    assert_trees_close(eqx.nn.inference_mode(block)(x, embedding, key=jr.key(0)), without)


def test_the_key_reaches_every_block():
    """The network draws one mask a block: 2 on the way down, 2 in the middle, 4 on the way up."""
    net = eqx.filter_eval_shape(UNET, jr.key(0))
    program = lambda net, key: eqx.filter_make_jaxpr(lambda net: net(IMAGE, T, key=key))(net)[0]
    masks = lambda net, key: str(program(net, key)).count("name=_bernoulli")
    assert masks(net, jr.key(0)) == 8
    assert masks(net, None) == masks(eqx.nn.inference_mode(net), jr.key(0)) == 0


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="image is 8x6; .* multiples of 4"):
        UNet2D((1, 8, 6), 8, (1, 2, 2), key=jr.key(0))
    with pytest.raises(ValueError, match="image is 4x7"):
        output_shape(eqx.filter_eval_shape(UNET, jr.key(0)), (2, 4, 7))
    with pytest.raises(ValueError, match="width is 12"):
        UNet2D((1, 8, 8), 12, key=jr.key(0))
    with pytest.raises(ValueError, match=r"attention=\(2,\)"):
        UNet2D((1, 8, 8), 8, attention=(2,), key=jr.key(0))


# --- The MLP ---


@pytest.mark.parametrize("shape", [(), (2,), (3, 8, 8)])
def test_a_vector_denoiser_takes_any_shape(shape):
    net = eqx.filter_eval_shape(VectorDenoiser, shape, (8,), key=jr.key(0))
    assert output_shape(net, shape) == shape


def test_another_shape_is_named():
    with pytest.raises(ValueError, match=r"shape \(4,\); the network was made for \(2,\)"):
        VectorDenoiser((2,), (8,), key=jr.key(0))(jnp.zeros(4), T)


def test_layers_add_to_their_input_where_asked():
    x = jnp.asarray([0.5, -1.0])
    net = full(lambda key: VectorDenoiser((2,), (8, 8, 6), activation="tanh", key=key))
    plain = full(lambda key: VectorDenoiser((2,), (8, 8, 6), activation="tanh", residual=False, key=key))
    angles = 0.3 * jnp.geomspace(1.0, 1000.0, 16)
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])
    assert_trees_close(plain(x, T), plain.mlp(x, features), atol=1e-5)
    first, second, third, last = net.mlp.layers
    y = jnp.tanh(first(x, features))
    y = y + jnp.tanh(second(y))
    assert_trees_close(net(x, T), last(jnp.tanh(third(y))), atol=1e-5)


def test_the_share_of_a_common_time_is_computed_once():
    net = full(lambda key: VectorDenoiser((2,), (8,), key=key))
    products = lambda axes, t: [
        eqn.outvars[0].aval.shape
        for eqn in jax.make_jaxpr(jax.vmap(net, axes))(jnp.zeros((5, 2)), t).eqns
        if eqn.primitive.name == "dot_general"
    ]
    assert products((0, None), T) == [(5, 8), (8,), (5, 2)]
    assert products((0, 0), jnp.zeros(5)) == [(5, 8), (5, 8), (5, 2)]
