"""Sources to batches with grain: deterministic in (seed, position), the same on any host count.

Dimension key: B global batch, b rows of one process, T tokens, N records.

Position g = 0, 1, 2, ... runs over the rows of all global batches: batch j holds positions
[j·B, (j+1)·B). `Order` says which record is at a position, and what is drawn for a row is keyed by
(seed, g). Nothing else enters, so a position's row is the same for every process count, thread
count and restart.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from contrastive_jax.config import UserError, check_range
from contrastive_jax.data import BadRecord, Source
from contrastive_jax.data.bad_records import BadRecords
from contrastive_jax.inputs import INDEX, Transform, empty, scalar
from contrastive_jax.inputs.order import Order

# Rows that one thread builds at a time: few enough that a large batch of photographs is spread
# over the threads, many enough that grain's cost of 50 to 100 µs an element disappears.
CHUNK = 64
SMALL_RECORD = 64 * 64 * 3  # bytes; threads that make rows of smaller ones contend for the GIL


class BatchIterator(grain.DatasetIterator):
    """Whole batches from chunks of rows; its state is the number of batches returned.

    The state does not depend on the chunks, threads or processes, so a run may continue with other
    numbers of them.
    """

    def __init__(self, chunks: grain.DatasetIterator, per_batch: int):
        super().__init__(chunks)
        self._chunks, self._per_batch, self._next = chunks, per_batch, 0

    def __next__(self) -> dict[str, np.ndarray]:
        parts = [next(self._chunks) for _ in range(self._per_batch)]
        self._next += 1
        if len(parts) == 1:
            return parts[0]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def next(self, state: Any) -> dict[str, np.ndarray]:
        """The next batch. A feed that acts in an environment looks at the state; this one does not.

        Args:
            state: the TrainState before the step that the batch is for.
        """
        del state
        return next(self)

    def get_state(self) -> dict[str, Any]:
        return {'next_batch': self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next = int(state['next_batch'])
        self._chunks.set_state({'next_index': self._next * self._per_batch})

    def __str__(self) -> str:
        return f'BatchIterator(next_batch={self._next})'


def train_iterator(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    bad: BadRecords,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
) -> BatchIterator:
    """An endless stream of training batches, reshuffled every epoch, checkpointable.

    No batch holds a record twice. One that cannot be used is registered in `bad` and replaced by
    one that can; by one of the same batch only if no other is found, which takes data of less than
    two batches or many bad records.

    Args:
        source: N records, N >= batch_size.
        transform: makes the rows.
        batch_size: B, over all processes.
        seed: an integer, 0 to 2**64 - 1.
        bad: the register.
        process_index: this process; it yields rows [index·b, (index+1)·b) of every global batch.
        process_count: b = batch_size / process_count.
        threads: that make rows; 0 works in the caller's thread. None: 1 for records of at most
            SMALL_RECORD bytes, else one a core.

    Returns:
        A grain.DatasetIterator of `inputs.batch_shapes`: the transform's arrays [b, ...], every
        label of the source, [b] int32, -1 where there is none, and 'index': [b] int32, the record
        used. `get_state`, `set_state` and `start_prefetch` as grain's; `close` ends its threads.

    Raises:
        UserError: fewer records than a batch, a batch that does not divide by the processes, seed
            out of range; while iterating, too many bad records.
    """
    count = len(source)
    if count < batch_size:
        raise UserError(
            f'config.batch_size: got {batch_size}, but the training split has {count} records; '
            f'expected at most {count}.'
        )
    check_range('config', {'seed': seed}, least=0, most=2**64 - 1, whole=True)
    local = _local_rows(batch_size, process_count)
    chunk = _divisor(local, CHUNK)
    labels = tuple(source.classes)
    shapes = {**transform.shapes, **{name: scalar() for name in (*labels, INDEX)}}

    order = Order(seed, count, batch_size)

    def candidates(position: int) -> Iterator[int]:
        """The position's record, those in its place, and if none of these can be used, all."""
        first = order(position)
        yield first
        yield from order.others(position)
        yield from ((first + hop) % count for hop in range(1, count))

    def made(position: int) -> Mapping[str, Any]:
        """The position's row: of its record, or of the next candidate that can be used."""
        for index in candidates(position):
            try:
                record: Any = source[index]
                key = np.array([seed, position], np.uint64)
                row = transform.host(record, np.random.Generator(np.random.Philox(key=key)))
            except BadRecord as reason:
                bad.add(source.describe(index), str(reason))
                continue
            numbers = {**{name: record[name] for name in labels}, INDEX: index}
            return {**row, **{name: np.int32(x) for name, x in numbers.items()}}
        raise UserError(f'none of the {count} records can be used.')

    def rows(j: int) -> dict[str, np.ndarray]:
        batch, part = divmod(j, local // chunk)
        start = batch * batch_size + process_index * local + part * chunk
        found = empty(shapes, chunk)
        together: dict[str, list[Any]] = {name: [] for name in transform.collate}
        for i, position in enumerate(range(start, start + chunk)):
            for name, x in made(position).items():
                if name in together:
                    together[name].append(x)
                else:
                    found[name][i] = x
        return found | {name: transform.collate[name](values) for name, values in together.items()}

    return _batches(rows, 2**48, local // chunk, _threads(source, threads))


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    bad: BadRecords,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every record once, in order, in batches of one shape; every process yields as many.

    Args:
        source: N records.
        transform: makes the rows.
        batch_size: B, over all processes.
        bad: the register of records that cannot be used.
        process_index: this process; it yields rows [index·b, (index+1)·b) of every global batch.
        process_count: b = batch_size / process_count.
        threads: as in `train_iterator`.

    Yields:
        The transform's arrays [b, ...], every label of the source, [b] int32, and 'mask': [b]
        float32, ceil(N / B) times. Padding and bad records have mask 0, labels -1 and zeros.

    Raises:
        UserError: a batch that does not divide by the processes; too many bad records.
    """
    local = _local_rows(batch_size, process_count)
    chunk = _divisor(local, CHUNK)
    batches = math.ceil(len(source) / batch_size)
    labels = tuple(source.classes)
    no_draws: Any = None

    def rows(j: int) -> dict[str, np.ndarray]:
        batch, part = divmod(j, local // chunk)
        start = batch * batch_size + process_index * local + part * chunk
        found = empty(transform.shapes, chunk)
        found |= {name: np.full(chunk, -1, np.int32) for name in labels}
        mask_b = np.zeros(chunk, np.float32)
        for i, index in enumerate(range(start, min(start + chunk, len(source)))):
            try:
                record: Any = source[index]
                row = transform.host(record, no_draws)
            except BadRecord as reason:
                bad.add(source.describe(index), str(reason))
                continue
            for name, x in {**row, **{name: record[name] for name in labels}}.items():
                found[name][i] = x
            mask_b[i] = 1
        return {**found, 'mask': mask_b}

    per_batch = local // chunk
    iterator = _batches(rows, batches * per_batch, per_batch, _threads(source, threads))

    def until_closed() -> Iterator[dict[str, np.ndarray]]:
        try:
            yield from iterator
        finally:
            iterator.close()

    return until_closed()


def text_batches(
    tokenize: Callable[[Sequence[str]], np.ndarray],
    texts: Sequence[str],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Every text once, in order, in batches of one shape; every process yields as many.

    Args:
        tokenize: n texts to [n, T] int32.
        texts: M of them, the same on every process.
        batch_size: B, over all processes.
        process_index: this process; it yields rows [index·b, (index+1)·b) of every global batch.
        process_count: b = batch_size / process_count.

    Yields:
        {'text': [b, T] int32, 'mask': [b] float32}, ceil(M / B) times. Padding has mask 0 and the
        ids of the empty text.
    """
    local = _local_rows(batch_size, process_count)
    for batch in range(0, len(texts), batch_size):
        start = batch + process_index * local
        some = list(texts[start : min(start + local, len(texts))])
        mask_b = (np.arange(local) < len(some)).astype(np.float32)
        ids_bT = tokenize([*some, *[''] * (local - len(some))])
        yield {'text': ids_bT, 'mask': mask_b}


def _batches(
    rows: Callable[[int], dict[str, np.ndarray]], chunks: int, per_batch: int, threads: int
) -> BatchIterator:
    """Runs `rows` over chunk numbers in threads, at least one batch ahead of the caller."""
    ahead = max(2 * threads, per_batch + threads) if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.range(chunks).map(rows).to_iter_dataset(options)
    return BatchIterator(iter(dataset), per_batch)


def _local_rows(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f'config.batch_size: got {batch_size}; expected a multiple of the {process_count} '
            'processes.'
        )
    return batch_size // process_count


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def _threads(source: Source, threads: int | None) -> int:
    if threads is not None:
        return threads
    for index in range(min(8, len(source))):
        try:
            record: Any = source[index]
        except BadRecord:
            continue
        if sum(getattr(x, 'nbytes', 0) for x in record.values()) <= SMALL_RECORD:
            return 1
        break
    allowed = getattr(os, 'sched_getaffinity', None)
    return min(32, len(allowed(0)) if allowed else os.cpu_count() or 1)
