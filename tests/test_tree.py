import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqgen.tree import (
    all_finite,
    compile_ahead,
    compile_bound,
    ensemble,
    filter_cond,
    filter_fori_loop,
    filter_scan,
    for_each_member,
    polyak,
    shared,
    somewhere,
    tree_copy,
    vmap_in_blocks,
)
from helpers import assert_trees_close, take


def mlp(key):
    return eqx.nn.MLP(2, 2, 4, 1, key=key)  # its activation functions are leaves that are not arrays


def grown(model, x):
    return jax.tree.map(lambda leaf: leaf + x if eqx.is_array(leaf) else leaf, model)


def test_filter_scan_equals_the_loop(getkey):
    model = mlp(getkey())
    step = lambda m, x: (grown(m, x), m.layers[0].bias)
    scanned, biases = filter_scan(step, model, jnp.arange(3.0))
    looped = model
    for x in jnp.arange(3.0):
        looped = grown(looped, x)
    assert_trees_close(scanned, looped)
    assert biases.shape == (3, 4)


def test_filter_scan_refuses_a_changed_static_leaf(getkey):
    changed = lambda m, _: (eqx.tree_at(lambda m: m.activation, m, jnp.tanh), None)
    with pytest.raises(ValueError, match="non-array leaf"):
        filter_scan(changed, mlp(getkey()), None, length=2)


def test_filter_fori_loop_equals_the_scan_and_compiles_once_for_all_lengths(getkey):
    model = mlp(getkey())
    traces = []

    @eqx.filter_jit
    def run(model, stop):
        traces.append(None)
        return filter_fori_loop(0, stop, lambda i, m: grown(m, i), model)

    for stop in (1, 4):
        expected, _ = filter_scan(lambda m, x: (grown(m, x), None), model, jnp.arange(stop))
        assert_trees_close(run(model, jnp.int32(stop)), expected)
    assert len(traces) == 1


@pytest.mark.parametrize("pred", [True, False])
def test_filter_cond_takes_the_branch(getkey, pred):
    model = mlp(getkey())
    out = filter_cond(jnp.array(pred), lambda m: grown(m, 1.0), lambda m: m, model)
    assert_trees_close(out, grown(model, 1.0) if pred else model)


def test_filter_cond_refuses_branches_with_different_static_leaves(getkey):
    other = lambda m: eqx.tree_at(lambda m: m.activation, m, jnp.tanh)
    with pytest.raises(ValueError, match="branches"):
        filter_cond(jnp.array(True), other, lambda m: m, mlp(getkey()))


def test_shared_keeps_a_branch_a_branch_under_vmap():
    def f(step, x):
        return jax.lax.cond(shared(step) % 2 == 0, jnp.sin, jnp.cos, x)

    jaxpr = str(jax.make_jaxpr(jax.vmap(f))(jnp.zeros(3, int), jnp.ones(3)))
    assert "cond[" in jaxpr  # without `shared` it would be a select over both branches
    assert "cond[" not in str(
        jax.make_jaxpr(jax.vmap(lambda s, x: jax.lax.cond(s % 2 == 0, jnp.sin, jnp.cos, x)))(
            jnp.zeros(3, int), jnp.ones(3)
        )
    )
    assert_trees_close(jax.vmap(f)(jnp.ones(3, int), jnp.ones(3)), jnp.cos(jnp.ones(3)))


def test_somewhere_is_a_branch_for_all_that_is_mapped_over():
    f = lambda rare, x: jax.lax.cond(somewhere(rare), lambda x: jnp.where(rare, 0.0, x), jnp.sin, x)
    twice = jax.vmap(jax.vmap(f))
    assert "cond[" in str(jax.make_jaxpr(twice)(jnp.zeros((2, 3), bool), jnp.ones((2, 3))))
    x = jnp.arange(6.0).reshape(2, 3)
    assert_trees_close(twice(jnp.zeros((2, 3), bool), x), jnp.sin(x))
    assert_trees_close(twice(x == 4, x), jnp.where(x == 4, 0.0, x))
    assert_trees_close(f(jnp.array(False), jnp.float32(2.0)), jnp.sin(2.0))
    assert_trees_close(jax.vmap(f, (None, 0))(jnp.array(True), jnp.ones(3)), jnp.zeros(3))


@pytest.mark.parametrize("block", [1, 4, 10, 64])
def test_blocks_change_nothing(getkey, block):
    xs, weights = jr.normal(getkey(), (10, 3)), jr.normal(getkey(), (3, 2))
    fn = lambda x, i: (x @ weights, i + 1)
    assert_trees_close(
        vmap_in_blocks(fn, xs, jnp.arange(10), rows_each=1024 // block), jax.vmap(fn)(xs, jnp.arange(10))
    )


def test_ensemble_members_are_independent_and_equal_separate_ones(getkey):
    key = getkey()
    stack = ensemble(mlp, 3, key=key)
    for i, member_key in enumerate(jr.split(key, 3)):
        assert_trees_close(take(stack, i), mlp(member_key))
    assert not jnp.allclose(stack.layers[0].weight[0], stack.layers[0].weight[1])


def test_polyak_is_the_exponential_average_with_its_closed_form():
    target, online = {"w": jnp.zeros(2), "n": jnp.int32(1)}, {"w": jnp.ones(2), "n": jnp.int32(7)}
    for _ in range(10):
        target = polyak(target, online, 0.1)
    assert_trees_close(target, {"w": jnp.full(2, 1 - 0.9**10), "n": jnp.int32(7)})
    assert_trees_close(polyak(target, online, 1.0), online)
    assert_trees_close(polyak(target, online, 0.0)["w"], target["w"])


def test_tree_copy_survives_the_donation_of_the_original():
    tree = {"w": jnp.ones(3), "f": jnp.tanh}
    copy = tree_copy(tree)
    tree["w"].delete()
    assert_trees_close(copy["w"], jnp.ones(3))
    assert copy["f"] is jnp.tanh


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_all_finite(bad):
    assert all_finite({"a": jnp.ones(2), "n": jnp.int32(3), "f": jnp.tanh})
    assert not all_finite({"a": jnp.ones(2), "b": jnp.array([0.0, bad])})


def test_compiled_ahead_equals_the_function_and_compiles_once():
    traces = []

    def scale(net, settings, x):
        traces.append(None)
        return {"y": settings["factor"] * net(x), "name": settings["name"], "net": net}

    net = eqx.nn.MLP(3, 2, 8, 1, key=jr.key(0))
    settings = {"factor": 2.0, "name": "kept"}
    compiled = compile_ahead(scale, net, settings, np.ones(3, np.float32))
    for x in (np.ones(3, np.float32), jnp.arange(3.0)):
        expected, actual = scale(net, settings, jnp.asarray(x)), compiled(net, settings, x)
        assert_trees_close(actual["y"], expected["y"])
        assert actual["name"] == "kept" and eqx.tree_equal(actual["net"], net)
    assert len(traces) == 3  # once by compile_ahead, twice above
    with pytest.raises(TypeError):
        compiled(net, settings, jnp.ones(4))


def test_compiled_ahead_donates_what_it_is_told_to():
    add = compile_ahead(lambda x, y: x + y, jnp.ones(3), jnp.ones(3), donate=(1,))
    x, y = jnp.ones(3), jnp.ones(3)
    assert_trees_close(add(x, y), jnp.full(3, 2.0))
    assert y.is_deleted() and not x.is_deleted()


def test_compiled_bound_equals_the_closure_and_keeps_only_what_it_uses():
    net, unused = eqx.nn.MLP(3, 2, 8, 1, key=jr.key(0)), jnp.zeros(1000)
    state = {"net": net, "moments": unused, "name": "kept"}
    bound = compile_bound(
        lambda x, key: state["net"](x) + jr.normal(key, (2,)), np.ones(3, np.float32), jr.key(0)
    )
    for x, key in ((np.ones(3, np.float32), jr.key(1)), (jnp.arange(3.0), jr.key(2))):
        assert_trees_close(bound(x, key), net(jnp.asarray(x)) + jr.normal(key, (2,)))
    (leaves,) = bound.args
    assert sorted(x.size for x in leaves) == sorted(
        x.size for x in jax.tree.leaves(eqx.filter(net, eqx.is_array))
    )
    with pytest.raises(TypeError):
        bound(jnp.ones(4), jr.key(0))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_each_member_is_given_its_own_entries(monkeypatch, backend):
    """By both ways: one after the other, as on a CPU, and mapped, as on an accelerator."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    stack = ensemble(lambda key: eqx.nn.Linear(3, 2, key=key), 4, key=jr.key(0))
    x, shifts = jnp.arange(3.0), jnp.arange(4.0)
    values = for_each_member(stack)(lambda member, shift: member(x) + shift, shifts)
    expected = stack.weight @ x + stack.bias + shifts[:, None]
    assert_trees_close(values, expected)
