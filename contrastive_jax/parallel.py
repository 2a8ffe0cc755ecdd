"""Devices: one mesh, how state and batches lie on it, and several processes as one program.

Batch rows are sharded over the mesh's first axis, parameters are replicated. Everything else is
plain single-device mathematics under `jit`; only `similarity` talks to its neighbours itself.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from contrastive_jax.config import UserError, check_range

Item = TypeVar('Item')
AXIS = 'data'
HEARTBEAT = 40  # seconds without a sign of life after which the other processes stop
FSDP_SIZE = 2**14  # numbers in the smallest leaf that is worth splitting


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """The one mesh: every device (or those given) along the axis that batches are sharded over.

    They come in an order in which neighbours on the mesh, and its two ends, are neighbours on the
    hardware, where there is one: what travels around the ring then crosses one link a hop, which
    XLA overlaps with compute.
    """
    devices = list(jax.devices() if devices is None else devices)
    if all(d.platform == 'tpu' for d in devices):  # elsewhere coordinates mean something else
        slices = sorted({getattr(d, 'slice_index', 0) or 0 for d in devices})
        parts = [[d for d in devices if (getattr(d, 'slice_index', 0) or 0) == s] for s in slices]
        devices = [d for part in parts for d in _ring(part)]
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _ring(devices: list[Any]) -> list[Any]:
    """Devices with coordinates on a full grid as a closed walk over its links; others as they are.

    Such a walk exists where both sides of a two-dimensional grid are above 1 and one is even. A
    third dimension is taken along a snake, which unrolls it.
    """
    chips: dict[tuple[int, ...], list[Any]] = {}
    for device in devices:
        chips.setdefault(tuple(getattr(device, 'coords', None) or ()), []).append(device)
    if () in chips:
        return devices
    axes = [sorted(set(values)) for values in zip(*chips, strict=True)]
    if math.prod(map(len, axes)) != len(chips):
        return devices
    # The longest even side first; the others, unrolled, are the grid's second side.
    axes_order = sorted(range(len(axes)), key=lambda a: (len(axes[a]) % 2, -len(axes[a])))
    first, *others = axes_order
    across = _snake([len(axes[a]) for a in others])
    if len(across) == 1:
        walk = [(r, 0) for r in range(len(axes[first]))]
    else:
        # Back and forth without column 0, by which the way then returns.
        columns = range(1, len(across))
        walk = [(r, c) for r in range(len(axes[first])) for c in columns[:: 1 - 2 * (r % 2)]]
        walk += [(r, 0) for r in reversed(range(len(axes[first])))]
    ordered = []
    for r, c in walk:
        place = dict(zip(others, across[c], strict=True)) | {first: r}
        ordered += chips[tuple(axes[a][place[a]] for a in range(len(axes)))]
    return ordered


def _snake(sides: list[int]) -> list[tuple[int, ...]]:
    """All places of a grid, each next to the one before it."""
    path: list[tuple[int, ...]] = [()]
    for side in sides:
        path = [
            (*place, i) for at, place in enumerate(path) for i in range(side)[:: 1 - 2 * (at % 2)]
        ]
    return path


def rows(mesh: Mesh) -> NamedSharding:
    """Layout of a batch on the mesh: leading dimension split, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Layout of parameters on the mesh: every device holds all of them."""
    return NamedSharding(mesh, PartitionSpec())


def lay_out(mesh: Mesh, tree: Any, fsdp: bool) -> Any:
    """Shapes and dtypes of a state's leaves, with how each lies on the mesh.

    Args:
        mesh: the mesh.
        tree: of `jax.ShapeDtypeStruct`.
        fsdp: whether each leaf is split over the devices, along the longest of its dimensions that
            they divide, where it is worth it (`FSDP_SIZE`); what a step needs of it is gathered
            when it is needed. (ZeRO stage 3, Rajbhandari et al. 2020; FSDP, Zhao et al. 2023.)
    """

    def one(x: Any) -> Any:
        sharding = replicated(mesh)
        dims = [d for d in range(x.ndim) if x.shape[d] % mesh.size == 0]
        if fsdp and x.size >= FSDP_SIZE and dims:
            longest = max(dims, key=lambda d: x.shape[d])
            spec = PartitionSpec(*(None,) * longest, mesh.axis_names[0])
            sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1, microbatch: int = 0) -> None:
    """Raises UserError unless every device gets the same number of rows of every micro-batch.

    Warns where XLA could hang.
    """
    check_range('config', {'accumulate': accumulate}, least=1, whole=True)
    check_range('config', {'microbatch': microbatch}, least=0, whole=True)
    parts = mesh.size * accumulate
    if batch_size <= 0 or batch_size % parts:
        near = max(1, round(batch_size / parts)) * parts
        by = f'{mesh.size} devices' + (f' × accumulate={accumulate}' if accumulate > 1 else '')
        raise UserError(
            f'config.batch_size: got {batch_size}, which does not divide by {by}; '
            f'the nearest batch size that does is {near}.'
        )
    rows = batch_size // accumulate
    if microbatch and (rows % microbatch or microbatch % mesh.size):
        fit = [m for m in range(mesh.size, rows + 1, mesh.size) if rows % m == 0]
        near = min(fit, key=lambda m: abs(m - microbatch))
        raise UserError(
            f'config.microbatch: got {microbatch}; expected a multiple of the {mesh.size} devices '
            f'that divides the batch of {rows}; the nearest is {near}.'
        )
    if microbatch and mesh.size > 1 and mesh.devices.flat[0].platform == 'cpu':
        logging.warning(
            'config.microbatch on %d CPU devices can hang: see docs/troubleshooting.md', mesh.size
        )


def split_rows(tree: Any, parts: int, together: int = 1) -> Any:
    """Leaves [B, ...] as [parts, B / parts, ...]: row i goes to part i % parts.

    Rows so stay spread over the devices as they are, and nothing moves between them.

    Args:
        tree: of arrays that lead with B, a multiple of parts · together.
        parts: how many.
        together: rows that follow each other and go to one part, such as the views of an image;
            i then counts these.
    """

    def split(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(-1, parts, together, *x.shape[1:]), 0, 1)
        return x.reshape(parts, -1, *x.shape[3:])

    return jax.tree.map(split, tree)


def join_rows(tree: Any, together: int = 1) -> Any:
    """Leaves [parts, B / parts, ...] as [B, ...]: undoes `split_rows`."""

    def join(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(len(x), -1, together, *x.shape[2:]), 0, 1)
        return x.reshape(-1, *x.shape[3:])

    return jax.tree.map(join, tree)


def shard_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays, sharded on rows, from the rows that each process loaded.

    Args:
        mesh: the mesh of all processes' devices.
        batch: this process's rows, each leaf [B / process_count, ...]. They lie, in order, where
            its devices are on the mesh.
    """
    sharding = rows(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of a sharded array as NumPy, on every process."""
    if jax.process_count() == 1 or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def sum_over_processes(x: np.ndarray) -> np.ndarray:
    """The sum of every process's array, in its own precision (every process must call)."""
    if jax.process_count() == 1:
        return x
    # As bytes: JAX would make float32 of float64.
    parts = multihost_utils.process_allgather(np.ascontiguousarray(x).view(np.uint8))
    return np.asarray(parts).view(x.dtype).sum(0)


def in_flight(items: Iterable[Item], ahead: int = 2) -> Iterator[Item]:
    """The items in order, each once `ahead` more have been asked for.

    Of results that devices are still computing: they always have the next batches to work on while
    the host waits for one.
    """
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def initialize(coordinator: str, processes: int, process: int) -> None:
    """Joins a multi-process run.

    Args:
        coordinator: 'host:port' of process 0; empty for one process; 'auto' lets JAX find its
            peers (Cloud TPU, SLURM, Open MPI).
        processes: how many there are; ignored unless a coordinator is named.
        process: which one this is, from 0.
    """
    # JAX waits 100 s by default before it believes that a process is dead.
    if coordinator == 'auto':
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
    elif coordinator:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT
        )


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays (or of their shapes)."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
