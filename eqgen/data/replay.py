"""Uniform experience replay: a ring of arrays on the device.

The buffer is an immutable PyTree, so it can be scanned, vmapped over seeds and donated. Donate it to the
jitted function that returns its successor: XLA then writes the new rows in place, and copies it otherwise.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Int, Key, PyTree


class ReplayBuffer(eqx.Module):
    """The last `capacity` records, sampled uniformly with replacement.

    Any PyTree of arrays is a record; a `Transition` is the usual one. Rows `0 .. size - 1` hold records, and
    the next one is written at `index`.
    """

    data: PyTree[Array]
    index: Int[Array, ""]
    size: Int[Array, ""]

    @classmethod
    def create(cls, example: PyTree, capacity: int) -> "ReplayBuffer":
        """An empty buffer.

        **Arguments:**

        - `example`: one record, whose shapes and dtypes every row takes on (booleans stay booleans).
        - `capacity`: how many records to keep, at least 1.
        """
        if capacity < 1:
            raise ValueError(f"ReplayBuffer: capacity is {capacity}; it must be at least 1.")
        data = jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x)), example)
        return cls(data, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    @property
    def capacity(self) -> int:
        """The number of rows (of one buffer: inside the `jax.vmap` when there is one per seed)."""
        return jax.tree.leaves(self.data)[0].shape[0]

    @property
    def nbytes(self) -> int:
        """The memory of the rows, in bytes."""
        return sum(x.nbytes for x in jax.tree.leaves(self.data))

    def add(self, batch: PyTree) -> "ReplayBuffer":
        """The buffer with the `n` records of `batch` (leading axis n) written over the oldest ones.

        **Raises:** `ValueError` when n exceeds the capacity: rows would be written twice in no defined order.
        """
        n = jax.tree.leaves(batch)[0].shape[0]
        if n > self.capacity:
            raise ValueError(f"ReplayBuffer: {n} records do not fit into a capacity of {self.capacity}.")
        rows = (self.index + jnp.arange(n, dtype=jnp.int32)) % self.capacity

        def write(old, new):
            return old.at[rows].set(new, mode="promise_in_bounds", unique_indices=True)

        return type(self)(
            jax.tree.map(write, self.data, batch),
            (self.index + n) % self.capacity,
            jnp.minimum(self.size + n, self.capacity),
        )

    def in_order(self) -> PyTree:
        """All rows, the oldest record first; before it zeros while there are fewer than `capacity`."""
        rows = (self.index + jnp.arange(self.capacity, dtype=jnp.int32)) % self.capacity
        return jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), self.data)

    def sample(self, n: int, *, key: Key[Array, ""]) -> PyTree:
        """`n` records drawn uniformly with replacement from those written (zeros while there are none)."""
        rows = jr.randint(key, (n,), 0, jnp.maximum(self.size, 1))
        return jax.tree.map(lambda x: x.at[rows].get(mode="promise_in_bounds"), self.data)
