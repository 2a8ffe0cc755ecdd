"""Devices: one mesh, how state and batches lie on it, and several processes as one program.

Batch rows are sharded over the mesh's first axis, parameters are replicated. Everything else is
plain single-device mathematics under `jit`; only `similarity.py` talks to its neighbours itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from contrastive_jax.config import UserError

AXIS = 'data'


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """The one mesh: every device (or those given) along the axis that batches are sharded over."""
    devices = jax.devices() if devices is None else list(devices)
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def rows(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: leading dimension split, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))


def replicated(mesh: Mesh) -> NamedSharding:
    """How parameters lie on the mesh: every device holds all of them."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises UserError unless every device gets the same number of rows of every micro-batch."""
    parts = mesh.size * accumulate
    if batch_size <= 0 or batch_size % parts:
        near = max(1, round(batch_size / parts)) * parts
        by = f'{mesh.size} devices' + (f' × accumulate={accumulate}' if accumulate > 1 else '')
        raise UserError(
            f'config.batch_size: got {batch_size}, which does not divide by {by}; '
            f'the nearest batch size that does is {near}.'
        )


def shard_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays, sharded on rows, from the rows that each process loaded.

    Args:
        mesh: the mesh of all processes' devices.
        batch: this process's rows, each leaf [B / process_count, ...]; process p holds the p-th
            stretch of the global batch.
    """
    sharding = rows(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of a sharded array as NumPy, on every process."""
    if jax.process_count() == 1 or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def agree(flag: bool) -> bool:
    """Whether any process says yes (every process must ask)."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def initialize(coordinator: str, processes: int, process: int) -> None:
    """Joins a multi-process run.

    Args:
        coordinator: 'host:port' of process 0; empty for one process; 'auto' lets JAX find its
            peers (Cloud TPU, SLURM, Open MPI).
        processes: how many there are; ignored unless a coordinator is named.
        process: which one this is, from 0.
    """
    if coordinator == 'auto':
        jax.distributed.initialize()
    elif coordinator:
        jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays (or of their shapes)."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
