"""Laws of the replay buffer: which rows exist, that they stay whole, that they are drawn evenly."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import chisquare

from eqgen.data.replay import ReplayBuffer
from eqgen.envs.base import example_transition
from eqgen.types import Transition
from helpers import assert_trees_close


CAPACITY = 7


def record(number):
    """A transition every field of which is a different function of its number."""
    return Transition(
        obs=jnp.full(2, 1.0 * number),
        action=jnp.full(3, -2.0 * number),
        reward=3.0 * number,
        next_obs=jnp.full(2, 5.0 * number),
        terminated=number % 2 == 0,
        truncated=number % 3 == 0,
    )


@partial(jax.jit, static_argnums=1)
def records(start, n):
    return jax.vmap(record)(start + jnp.arange(n, dtype=jnp.float32))


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def stack(*trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


add = jax.jit(lambda buffer, batch: buffer.add(batch))
sample = partial(jax.jit, static_argnums=1)(lambda buffer, n, key: buffer.sample(n, key=key))


def filled(sizes, capacity=CAPACITY):
    """A buffer after batches of these sizes, and how many records it has seen."""
    buffer, start = ReplayBuffer.create(example_transition((2,), 3), capacity), 0
    for n in sizes:
        buffer, start = add(buffer, records(start, n)), start + n
    return buffer, start


@pytest.mark.parametrize("sizes", [[1], [3], [3, 3], [3, 3, 3], [7], [5, 7], [1] * 15, [4, 4, 4, 4, 4]])
def test_holds_exactly_the_last_records_at_their_place_in_the_ring(sizes):
    buffer, seen = filled(sizes)
    assert int(buffer.size) == min(seen, CAPACITY)
    assert int(buffer.index) == seen % CAPACITY
    kept = range(max(0, seen - CAPACITY), seen)
    for number in kept:
        assert_trees_close(row(buffer.data, number % CAPACITY), row(records(number, 1), 0), rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [[7], [5, 7], [3] * 7, [4, 4, 4, 4, 4], [3]])
def test_in_order_begins_with_the_oldest(sizes):
    buffer, seen = filled(sizes)
    kept = records(max(0, seen - CAPACITY), min(seen, CAPACITY))
    ordered = jax.tree.map(lambda x: x[CAPACITY - int(buffer.size) :], buffer.in_order())
    assert_trees_close(ordered, kept, rtol=0, atol=0)
    assert not jnp.any(buffer.in_order().reward[: CAPACITY - int(buffer.size)])


@pytest.mark.parametrize("sizes", [[2], [5], [6, 4], [3] * 7])
def test_samples_are_whole_records_among_those_kept(sizes, getkey):
    buffer, seen = filled(sizes)
    batch = sample(buffer, 200, getkey())
    number = np.asarray(batch.reward) / 3
    assert set(number.tolist()) == set(range(max(0, seen - CAPACITY), seen))
    np.testing.assert_array_equal(batch.obs, np.stack([number] * 2, 1))
    np.testing.assert_array_equal(batch.action, np.stack([-2 * number] * 3, 1))
    np.testing.assert_array_equal(batch.next_obs, np.stack([5 * number] * 2, 1))
    np.testing.assert_array_equal(batch.terminated, number % 2 == 0)
    np.testing.assert_array_equal(batch.truncated, number % 3 == 0)


def test_flags_stay_booleans_and_any_pytree_is_a_record(getkey):
    buffer, _ = filled([4])
    batch = sample(buffer, 5, getkey())
    assert batch.terminated.dtype == batch.truncated.dtype == bool
    tree = {"tokens": jnp.zeros((3,), jnp.uint8), "nested": (jnp.zeros(()), jnp.zeros((2, 2)))}
    buffer = ReplayBuffer.create(tree, 4).add(jax.tree.map(lambda x: jnp.ones((2, *x.shape), x.dtype), tree))
    assert_trees_close(buffer.sample(1, key=getkey()), jax.tree.map(lambda x: jnp.ones_like(x)[None], tree))
    assert buffer.capacity == 4
    assert buffer.nbytes == 4 * (3 * 1 + 4 + 4 * 4)


def test_draws_evenly(getkey):
    buffer, _ = filled([7, 7, 2])  # wrapped, every row written
    number = np.asarray(sample(buffer, 20_000, getkey()).reward / 3).astype(int)
    # A fixed key, so this either always passes or never; 1e-3 is far from what a biased draw gives.
    assert chisquare(np.bincount(number - number.min(), minlength=CAPACITY)).pvalue > 1e-3


def test_draws_with_replacement_and_differently_for_every_key(getkey):
    buffer, _ = filled([7])
    first, second = (np.asarray(sample(buffer, 64, getkey()).reward) for _ in range(2))
    assert len(np.unique(first)) == CAPACITY
    assert not np.array_equal(first, second)


def test_scan_equals_loop(getkey):
    batches = jax.tree.map(lambda x: x.reshape(5, 2, *x.shape[1:]), records(0, 10))
    keys = jr.split(getkey(), 5)

    def body(buffer, xs):
        batch, key = xs
        buffer = buffer.add(batch)
        return buffer, buffer.sample(3, key=key)

    start, _ = filled([])
    scanned, samples = jax.lax.scan(body, start, (batches, keys))
    step, buffer, looped = jax.jit(body), start, []
    for i in range(5):
        buffer, drawn = step(buffer, (row(batches, i), keys[i]))
        looped.append(drawn)
    assert_trees_close(scanned, buffer, rtol=0, atol=0)
    assert_trees_close(samples, stack(*looped), rtol=0, atol=0)


def test_vmap_equals_separate_buffers(getkey):
    buffers = [filled([2])[0], filled([6, 3])[0], filled([])[0]]
    batches = [records(10 * i, 3) for i in range(3)]
    keys = jr.split(getkey(), 3)

    def use(buffer, batch, key):
        buffer = buffer.add(batch)
        return buffer, buffer.sample(4, key=key)

    together = jax.jit(jax.vmap(use))(stack(*buffers), stack(*batches), keys)
    separate = stack(*[jax.jit(use)(*each) for each in zip(buffers, batches, keys)])
    assert_trees_close(together, separate, rtol=0, atol=0)


def test_donated_buffer_is_written_in_place():
    buffer, _ = filled([])
    address = buffer.data.obs.unsafe_buffer_pointer()
    after = jax.jit(lambda b, x: b.add(x), donate_argnums=0)(buffer, records(0, 3))
    assert after.data.obs.unsafe_buffer_pointer() == address
    assert buffer.data.obs.is_deleted()


def test_refuses_what_cannot_be_stored():
    with pytest.raises(ValueError, match="capacity is 0"):
        ReplayBuffer.create(example_transition((2,), 3), 0)
    with pytest.raises(ValueError, match="8 records do not fit into a capacity of 7"):
        filled([8])
