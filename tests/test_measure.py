"""The counting of matrix products against hand-counted ones, and what the check of ratios calls slower."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest


FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def beside():
    """The benchmarks import one another as scripts that lie side by side do."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def flop(fn, *args, **kwargs):
    from measure import matmul_gflop

    return 1e9 * matmul_gflop(fn, *args, **kwargs)


def test_products_are_counted():
    x, w = jnp.ones((5, 7)), jnp.ones((7, 3))
    product = lambda x, w: x @ w
    assert flop(product, x, w) == pytest.approx(2 * 5 * 7 * 3)
    assert flop(jax.jit(product), x, w) == pytest.approx(2 * 5 * 7 * 3)
    assert flop(jax.vmap(product, (0, None)), jnp.ones((4, 5, 7)), w) == pytest.approx(4 * 2 * 5 * 7 * 3)
    both = jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), (0, 1))
    assert flop(both, x, w) == pytest.approx(3 * 2 * 5 * 7 * 3)  # forward, and one for each gradient


def test_loops_count_as_often_as_they_run_and_conditions_as_told():
    w = jnp.eye(4)
    many = lambda x: jax.lax.fori_loop(0, 6, lambda _, x: x @ w, x)
    assert flop(many, jnp.ones((3, 4))) == pytest.approx(6 * 2 * 3 * 4 * 4)
    maybe = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x)
    for branches, factor in ((max, 1.0), (min, 0.0), (np.mean, 0.5)):
        assert flop(maybe, jnp.ones((3, 4)), branches=branches) == pytest.approx(factor * 2 * 3 * 4 * 4)


def test_a_fifth_is_slower_and_less_is_not():
    import check

    assert check.slower({"a": 1.19, "b": 1.21}, {"a": 1.0, "b": 1.0}) == ["b: 1.21, committed 1.00"]


def test_committed_updates_take_longer_than_their_matrix_products():
    """Otherwise the count, the rate or the clock is wrong."""
    import check

    ratios = check.committed()
    assert set(check.CHECKED) <= ratios.keys() and ratios.pop("sampler") < 1
    assert all(1 < ratio < 6 for ratio in ratios.values()), ratios


def test_the_readme_has_the_table_of_what_was_measured_last():
    import agents

    readme = (FOLDER.parent / "README.md").read_text()
    assert agents.table() in readme, "put the output of `python benchmarks/agents.py --table` into README.md"
