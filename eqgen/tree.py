"""PyTree tools: scans over Equinox modules, ensembles, Polyak averages.

Equinox modules carry leaves that are not arrays (activation functions), which `jax.lax.scan` refuses;
`filter_scan` splits such trees in two and puts them together again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, ArrayLike, Bool, Int, Key, PyTree, ScalarLike


Tree = TypeVar("Tree")


def filter_scan(
    f: Callable[[Tree, Any], tuple[Tree, Any]], init: Tree, xs: PyTree = None, length: int | None = None
) -> tuple[Tree, PyTree]:
    """`jax.lax.scan` whose carry may hold leaves that are not arrays.

    **Arguments:** as `jax.lax.scan`. The non-array leaves of the carry must come out as they went in.

    **Returns:** the last carry and the stacked outputs.

    **Raises:** `ValueError` when `f` changes a non-array leaf of the carry.
    """
    arrays, static = eqx.partition(init, eqx.is_array)

    def body(arrays, x):
        carry, y = f(eqx.combine(arrays, static), x)
        arrays, new_static = eqx.partition(carry, eqx.is_array)
        if not eqx.tree_equal(static, new_static):
            raise ValueError("filter_scan: a non-array leaf of the carry changed inside the scan.")
        return arrays, y

    arrays, ys = jax.lax.scan(body, arrays, xs, length)
    return eqx.combine(arrays, static), ys


def filter_fori_loop(
    start: Int[ArrayLike, ""], stop: Int[ArrayLike, ""], body: Callable[[Any, Tree], Tree], init: Tree
) -> Tree:
    """`jax.lax.fori_loop` whose carry may hold leaves that are not arrays (which `body` must not change).

    `start` and `stop` may be traced, so loops of different lengths share one compiled program.
    """
    arrays, static = eqx.partition(init, eqx.is_array)
    step = lambda i, arrays: eqx.filter(body(i, eqx.combine(arrays, static)), eqx.is_array)
    return eqx.combine(jax.lax.fori_loop(start, stop, step, arrays), static)


def filter_cond(
    pred: Bool[Array, ""], true_fn: Callable[..., Tree], false_fn: Callable[..., Tree], *operands: Any
) -> Tree:
    """`jax.lax.cond` whose operands and results may hold leaves that are not arrays.

    **Raises:** `ValueError` when the branches disagree in a non-array leaf.
    """
    arrays, static = eqx.partition(operands, eqx.is_array)
    statics = []

    def branch(fn):
        def run(arrays):
            out_arrays, out_static = eqx.partition(fn(*eqx.combine(arrays, static)), eqx.is_array)
            statics.append(out_static)
            return out_arrays

        return run

    out = jax.lax.cond(pred, branch(true_fn), branch(false_fn), arrays)
    if not eqx.tree_equal(statics[0], statics[-1]):
        raise ValueError("filter_cond: the branches return different non-array leaves.")
    return eqx.combine(out, statics[0])


def vmap_in_blocks(fn: Callable[..., PyTree], *args: PyTree, rows_each: int) -> PyTree:
    """`jax.vmap(fn)(*args)`; on a CPU, some examples at a time, so that what they need stays in cache.

    A large batch through wide layers is bound by memory on a CPU, where each activation is written out between
    matrix product and activation function. Blocks of about a thousand rows halve its time; smaller ones lose it
    to overhead. Accelerators get the plain `jax.vmap`. Results may differ in the last bits.

    **Arguments:**

    - `rows_each`: how many rows one example sends through a network; with 32 of them a block has 32 examples.
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(fn)(*args)
    number, most = len(jax.tree.leaves(args)[0]), max(1, 1024 // rows_each)
    # A block size that divides the batch leaves no rest, for which `fn` would be compiled a second time.
    block = next((size for size in range(most, most // 2, -1) if number % size == 0), most)
    return jax.lax.map(lambda xs: fn(*xs), args, batch_size=block)


@custom_vmap
def shared(x: Array) -> Array:
    """The identity, with a promise: `x` is the same along every axis that is mapped over.

    Under `jax.vmap` the result is not batched. So `lax.cond(shared(step) % 2 == 0, ...)` stays a branch when
    seeds that count their steps together are vmapped, instead of becoming a `select` that runs both sides.
    """
    return x


@shared.def_vmap
def _shared_vmap(axis_size, in_batched, x):
    return (x[0] if in_batched[0] else x), False


@custom_vmap
def somewhere(x: Array) -> Array:
    """Whether `x` is true: here or, under `jax.vmap`, for any of the elements that are mapped over.

    The result is not batched, so `lax.cond(somewhere(rare), ...)` stays a branch, which is taken for all or none.
    """
    return x


@somewhere.def_vmap
def _somewhere_vmap(axis_size, in_batched, x):
    return somewhere(jnp.any(x, axis=0) if in_batched[0] else x), False


def ensemble(make: Callable[[Key[Array, ""]], Tree], size: int, *, key: Key[Array, ""]) -> Tree:
    """`size` independently initialised `make(key)`, stacked along a new leading axis of every array.

    Call the members with `eqx.filter_vmap(lambda member: member(x))(stack)`.
    """
    return eqx.filter_vmap(make)(jr.split(key, size))


def compile_ahead(
    fn: Callable[..., PyTree], *args: PyTree, donate: tuple[int, ...] = ()
) -> Callable[..., PyTree]:
    """`fn` compiled now, for arguments of the shapes and dtypes of `args`.

    A call hands the arrays to the program and does nothing else: no tracing, and no comparison of what is not an
    array, which every call of `eqx.filter_jit` repeats (a quarter of the 0.2 ms that a small agent takes to act).
    Nor does it wait for the result, as `eqx.filter_jit` does. Meant for loops that call one function with one kind
    of arguments very often.

    **Arguments:**

    - `args`: what the function takes, with arrays (also NumPy's) wherever a call has them.
    - `donate`: the positions of arguments whose memory the result may take over.

    **Returns:** a function of the same arguments. It raises `TypeError` for other shapes or dtypes, and takes
    what is not an array to be as it was.
    """
    leaves, treedef = jax.tree.flatten(args)
    dynamic = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]
    owners = [n for n, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
    donated = tuple(k for k, i in enumerate(dynamic) if owners[i] in donate)
    out_treedef, out_static = None, {}

    def run(*arrays):
        nonlocal out_treedef
        filled = list(leaves)
        for i, array in zip(dynamic, arrays):
            filled[i] = array
        out, out_treedef = jax.tree.flatten(fn(*jax.tree.unflatten(treedef, filled)))
        out_static.update({i: leaf for i, leaf in enumerate(out) if not eqx.is_array(leaf)})
        return [leaf for leaf in out if eqx.is_array(leaf)]

    compiled = jax.jit(run, donate_argnums=donated).lower(*(leaves[i] for i in dynamic)).compile()

    def call(*args):
        leaves = jax.tree.leaves(args)
        out = compiled(*[leaves[i] for i in dynamic])
        for i, leaf in out_static.items():
            out.insert(i, leaf)
        return jax.tree.unflatten(out_treedef, out)

    return call


def compile_bound(fn: Callable[..., PyTree], *args: PyTree) -> Callable[..., PyTree]:
    """`fn`, a closure over whatever it needs, compiled now for arguments of the shapes and dtypes of `args`.

    Of what it closes over the program keeps the arrays that it uses. A call then handles `args` and nothing else:
    taking a module of a hundred arrays apart takes longer than a small network does to act. For one set of
    weights, used often; `compile_ahead` is for weights that change.

    **Arguments:** `args`: PyTrees of arrays.

    **Returns:** a function of the same arguments, which raises `TypeError` for other shapes or dtypes.
    """
    arrays, static = eqx.partition(eqx.filter_closure_convert(fn, *args), eqx.is_array)
    leaves, treedef = jax.tree.flatten(arrays)

    def run(leaves, *args):
        return eqx.combine(jax.tree.unflatten(treedef, leaves), static)(*args)

    return partial(jax.jit(run).lower(leaves, *args).compile(), leaves)


def for_each_member(stack: PyTree) -> Callable[..., PyTree]:
    """A function `each(fn, *xs)` that stacks `fn(member, *(x[i] for x in xs))` over the members of an ensemble.

    `eqx.filter_vmap(fn)(stack, *xs)` on an accelerator; on a CPU the members one by one, taken apart here and
    so outside of a loop that calls `each`. XLA's batched matrix products are slower there than as many single
    ones: by a tenth for 256 rows, by a third for one.
    """
    if jax.default_backend() != "cpu":
        return lambda fn, *xs: eqx.filter_vmap(fn)(stack, *xs)
    take = lambda tree, i: jax.tree.map(lambda x: x[i] if eqx.is_array(x) else x, tree)
    size = next(len(x) for x in jax.tree.leaves(stack) if eqx.is_array(x))
    members = [take(stack, i) for i in range(size)]

    def each(fn, *xs):
        values = [fn(member, *take(xs, i)) for i, member in enumerate(members)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)

    return each


def polyak(target: Tree, online: Tree, tau: ScalarLike) -> Tree:
    """The Polyak (exponential moving) average `(1 - tau) target + tau online` of the floating-point leaves.

    Other leaves are taken from `online`. `tau = 1` copies, `tau = 0` keeps.
    """

    def mix(old, new):
        return (1 - tau) * old + tau * new if eqx.is_inexact_array(old) else new

    return jax.tree.map(mix, target, online)


def tree_copy(tree: Tree) -> Tree:
    """The same tree with every array copied, so that neither of the two is lost when the other is donated."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True) if eqx.is_array(x) else x, tree)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating-point leaf is free of NaN and infinity."""
    leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)
