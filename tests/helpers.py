"""What the tests share: `from helpers import tree_allclose`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from beartype import beartype


def _value(x: Any) -> np.ndarray:
    """The leaf as a NumPy array; a typed PRNG key as its words."""
    if eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jr.key_data(x)
    return np.asarray(x)


def assert_trees_close(actual: Any, expected: Any, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Asserts that two PyTrees have the same structure, dtypes and shapes and that every leaf is close.

    `rtol` is relative to `|expected|`, so signs do not matter. Leaves that are not floating-point (or whose
    tolerances are both 0) must be equal to the last bit. NaN is close to nothing, itself included.
    """
    found, expected_def = jax.tree.structure(actual), jax.tree.structure(expected)
    assert found == expected_def, f"structures differ:\n  {found}\n  {expected_def}"
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        where = jax.tree_util.keystr(path) or "the only leaf"
        if not (eqx.is_array_like(a) and eqx.is_array_like(b)):
            assert a == b, f"{where}: {a!r} is not {b!r}"
            continue
        a, b = _value(a), _value(b)
        assert a.dtype == b.dtype, f"{where}: dtype {a.dtype} is not {b.dtype}"
        assert a.shape == b.shape, f"{where}: shape {a.shape} is not {b.shape}"
        if jnp.issubdtype(b.dtype, jnp.inexact):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, equal_nan=False, err_msg=where)
        else:
            np.testing.assert_array_equal(a, b, err_msg=where)


def tree_allclose(actual: Any, expected: Any, *, rtol: float = 1e-5, atol: float = 1e-6) -> bool:
    """`assert_trees_close` as a yes or no."""
    try:
        assert_trees_close(actual, expected, rtol=rtol, atol=atol)
    except AssertionError:
        return False
    return True


def typechecked(function: Callable) -> Callable:
    """`beartype`, which sees each method alone and therefore cannot know what `Self` is."""
    hints = {name: hint for name, hint in function.__annotations__.items() if "Self" not in str(hint)}
    function.__annotations__ = hints
    return beartype(function)


def filled(shapes: Any, *, scale: float = 0.3, seed: int = 0) -> Any:
    """A tree like the one that `eqx.filter_eval_shape` returned, its arrays drawn from N(0, scale^2).

    Nothing is compiled, and nothing is left at 0 as in a fresh network.
    """
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)
    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    return jax.tree.map(lambda leaf: draw(leaf) if is_shape(leaf) else leaf, shapes)


def take(tree: Any, i: int) -> Any:
    """Entry `i` along the leading axis of every array."""
    return jax.tree.map(lambda x: x[i] if eqx.is_array(x) else x, tree)


def random_windows(key: Any, *shape: int, horizon: int, obs_size: int, action_size: int) -> Any:
    """Windows of noise with these leading axes, all of weight 1."""
    from eqgen.data.windows import Window  # not above: what checks eqgen's types as it is imported is in here

    keys = jr.split(key, 3)
    return Window(
        states=jr.normal(keys[0], (*shape, horizon, obs_size)),
        actions=jr.uniform(keys[1], (*shape, horizon, action_size), minval=-1.0, maxval=1.0),
        label=jr.uniform(keys[2], shape, minval=-1.0),
        weight=jnp.ones(shape),
    )
