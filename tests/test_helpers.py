"""The comparison that other tests rest on must itself be able to fail."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from helpers import tree_allclose


EQUAL = [
    (jnp.array([-1.0, 2.0]), jnp.array([-1.0, 2.0 + 1e-6])),
    (jr.key(3), jr.key(3)),
    ({"a": 1.0, "b": "text"}, {"a": 1.0, "b": "text"}),
    (eqx.nn.Linear(2, 2, key=jr.key(0)), eqx.nn.Linear(2, 2, key=jr.key(0))),
]
DIFFERENT = {
    "sign": (jnp.array(-1.0), jnp.array(1.0)),
    "value": (jnp.array([1.0, 2.0]), jnp.array([1.0, 2.001])),
    "dtype": (jnp.zeros(2), jnp.zeros(2, int)),
    "shape": (jnp.zeros(2), jnp.zeros((1, 2))),
    "structure": ({"a": 1.0}, {"b": 1.0}),
    "NaN": (jnp.array(jnp.nan), jnp.array(jnp.nan)),
    "integer": (jnp.array(1_000_000), jnp.array(1_000_001)),
    "key": (jr.key(0), jr.key(1)),
    "static leaf": ([jax.nn.relu], [jax.nn.gelu]),
}


@pytest.mark.parametrize("pair", EQUAL)
def test_equal_trees_are_close(pair):
    assert tree_allclose(*pair)


@pytest.mark.parametrize("pair", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_different_trees_are_not_close(pair):
    assert not tree_allclose(*pair)


def test_conditions_of_every_test(getkey, x64):
    assert not tree_allclose(getkey(), getkey())
    assert jnp.zeros(1).dtype == jnp.float64
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.zeros(2) + jnp.zeros((3, 2))
