"""Several devices in one process: the seeds of a run spread over them, and batches over what is left.

All that a training loop carries has a leading axis of seeds, and no seed needs another, so that devices which hold
some seeds each have nothing to say to each other. Where there are more devices than seeds, a batch can be spread as
well (data parallelism): each device has a part of it and the whole network, and gradients are summed over devices.

Nothing has to be asked for. With one device, as on most machines, nothing changes; which devices there are, JAX and
`CUDA_VISIBLE_DEVICES` decide. Those of other processes are not used.
"""

import math

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree


SEEDS, BATCH = "seeds", "batch"


def mesh_shape(num_seeds: int, batch_size: int | None, num_devices: int) -> tuple[int, int]:
    """Over how many devices the seeds go, and over how many each one's batch.

    As many as divide both the number of seeds and that of devices are taken for the seeds; of the rest as many as
    divide `batch_size`, if it is given, for the batch.
    """
    for_seeds = math.gcd(num_seeds, num_devices)
    return for_seeds, 1 if batch_size is None else math.gcd(batch_size, num_devices // for_seeds)


def training_mesh(num_seeds: int, batch_size: int | None = None) -> Mesh | None:
    """The devices there are, as far as `mesh_shape` uses them; None where one device is all."""
    devices = jax.local_devices()
    shape = mesh_shape(num_seeds, batch_size, len(devices))
    used = math.prod(shape)
    return None if used == 1 else Mesh(np.array(devices[:used]).reshape(shape), (SEEDS, BATCH))


def spread_seeds(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The tree with its arrays, which have a leading axis of seeds, where the mesh has those seeds."""
    if mesh is None:
        return tree
    place = NamedSharding(mesh, PartitionSpec(SEEDS))
    return jax.tree.map(lambda x: jax.device_put(x, place) if eqx.is_array(x) else x, tree)


def spread_batches(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Inside a compiled function: batches with leading axes (seeds, batch), spread over both axes of the mesh."""
    if mesh is None or mesh.shape[BATCH] == 1:
        return tree
    place = NamedSharding(mesh, PartitionSpec(SEEDS, BATCH))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place) if eqx.is_array(x) else x, tree)
