"""Sources to batches with grain: deterministic in (seed, position), the same on any host count.

Dimension key: B global batch, b rows of one process, V views, L local views, H W image, N records.

Position g = 0, 1, 2, ... runs over the rows of all global batches: batch j holds positions
[j·B, (j+1)·B). Epoch g // N visits the records in the order of a permutation keyed by (seed, epoch)
and the crops of a row are keyed by (seed, g). Nothing else enters, so a position's row is the same
for every process count, thread count and restart.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from contrastive_jax.config import UserError
from contrastive_jax.data import BadRecord, Record, Source
from contrastive_jax.data.bad_records import BadRecords
from contrastive_jax.inputs import geometry

# Rows that one thread builds at a time: few enough that a large batch of photographs is spread
# over the threads, many enough that grain's cost of 50 to 100 µs an element disappears.
CHUNK = 64


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

    def get_state(self) -> dict[str, Any]:
        return {'next_batch': self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next = int(state['next_batch'])
        self._chunks.set_state({'next_index': self._next * self._per_batch})

    def __str__(self) -> str:
        return f'BatchIterator(next_batch={self._next})'


def train_iterator(
    source: Source,
    *,
    batch_size: int,
    views: int,
    image_size: int,
    crop: Mapping[str, Any],
    seed: int,
    bad: BadRecords,
    local_views: int = 0,
    local_size: int = 96,
    local_scale: Sequence[float] = (0.05, 0.4),
    tokenize: Callable[[Sequence[str]], np.ndarray] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
) -> BatchIterator:
    """An endless stream of batches of random crops, reshuffled every epoch, checkpointable.

    A record that cannot be used is registered in `bad` and replaced by the next one that can.

    Args:
        source: N records, N >= batch_size.
        batch_size: B, over all processes.
        views: V, crops of each image.
        image_size: H = W of a crop, pixels.
        crop: keywords of geometry.random_resized_crop: scale, ratio, interpolation, flip.
        seed: an integer, 0 to 2**64 - 1.
        bad: the register.
        local_views: L, further crops of each image (multi-crop, Caron et al. 2020,
            arXiv:2006.09882, section 3.2). They are drawn after the others, which stay the same.
        local_size: h = w of these, pixels.
        local_scale: smallest and largest share of the area of these; the rest is as `crop` says.
        tokenize: n texts to [n, T] int32; None: captions are not read. Of the captions of an image
            one is drawn, after its crops, which stay the same.
        process_index: this process; it yields rows [index·b, (index+1)·b) of every global batch.
        process_count: b = batch_size / process_count.
        threads: that decode and crop; 0 works in the caller's thread. None: 1 for records of at
            most 64 × 64 pixels, where more only contend for the GIL, else one a core.

    Returns:
        A grain.DatasetIterator of {'views': [b, V, H, W, 3] uint8, 'label': [b] int32 (-1 where
        there is none), 'index': [b] int32 the record used}, with L > 0 'local_views':
        [b, L, h, w, 3] uint8, and with `tokenize` 'text': [b, T] int32. `get_state`, `set_state`
        and `start_prefetch` as grain's; `close` ends its threads.

    Raises:
        UserError: fewer records than a batch, a batch that does not divide by the processes, seed,
            crop options or local views out of range; while iterating, too many bad records.
    """
    count = len(source)
    if count < batch_size:
        raise UserError(
            f'config.batch_size: got {batch_size}, but the training split has {count} images; '
            f'expected at most {count}.'
        )
    if not 0 <= seed < 2**64:
        raise UserError(f'config.seed: got {seed}, expected 0 to 2**64 - 1.')
    for name, value, least in (('local_views', local_views, 0), ('local_size', local_size, 1)):
        if value < least:
            raise UserError(f'config.data.{name}: got {value}, expected at least {least}.')
    local = _local_rows(batch_size, process_count)
    options = geometry.crop_options(crop)
    scale = geometry.span(local_scale, 1.0, 'config.data.local_scale')
    local_options = {**options, 'scale': scale}
    chunk = _divisor(local, CHUNK)

    def rows(j: int) -> dict[str, np.ndarray]:
        batch, part = divmod(j, local // chunk)
        start = batch * batch_size + process_index * local + part * chunk
        views_bVHWC = np.empty((chunk, views, image_size, image_size, 3), np.uint8)
        local_bLHWC = np.empty((chunk, local_views, local_size, local_size, 3), np.uint8)
        label_b, index_b = np.empty(chunk, np.int32), np.empty(chunk, np.int32)
        texts: list[str] = []
        for row, position in enumerate(range(start, start + chunk)):
            epoch, place = divmod(position, count)
            index, record = _usable(source, int(_order(seed, epoch, count)[place]), bad)
            rng = np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))
            picture = Image.fromarray(record['image'])
            for view in range(views):
                views_bVHWC[row, view] = geometry.random_resized_crop(
                    picture, rng, image_size, **options
                )
            for view in range(local_views):
                local_bLHWC[row, view] = geometry.random_resized_crop(
                    picture, rng, local_size, **local_options
                )
            label_b[row], index_b[row] = record['label'], index
            if tokenize:
                captions = record.get('captions', [])
                texts.append(captions[rng.integers(len(captions))])
        found = {'views': views_bVHWC, 'label': label_b, 'index': index_b}
        if local_views:
            found['local_views'] = local_bLHWC
        if tokenize:
            found['text'] = tokenize(texts)
        return found

    return _batches(rows, 2**48, local // chunk, _threads(source, threads))


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    bad: BadRecords,
    crop_fraction: float = 1.0,
    interpolation: str = 'bicubic',
    process_index: int = 0,
    process_count: int = 1,
    threads: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every record once, in order, in batches of one shape; every process yields as many.

    Args:
        source: N records.
        batch_size: B, over all processes.
        image_size: H = W, pixels.
        bad: the register of records that cannot be used.
        crop_fraction: see geometry.center_crop_resize.
        interpolation: 'bicubic' or 'bilinear'.
        process_index: this process; it yields rows [index·b, (index+1)·b) of every global batch.
        process_count: b = batch_size / process_count.
        threads: as in `train_iterator`.

    Yields:
        {'image': [b, H, W, 3] uint8, 'label': [b] int32, 'mask': [b] float32}, ceil(N / B) times.
        Padding and bad records have mask 0, label -1 and black pixels.

    Raises:
        UserError: a batch that does not divide by the processes; too many bad records.
    """
    local = _local_rows(batch_size, process_count)
    geometry.crop_options({'interpolation': interpolation})
    if not 0 < crop_fraction <= 1:
        raise UserError(f'crop_fraction: got {crop_fraction}, expected a share in (0, 1].')
    chunk = _divisor(local, CHUNK)
    batches = math.ceil(len(source) / batch_size)

    def rows(j: int) -> dict[str, np.ndarray]:
        batch, part = divmod(j, local // chunk)
        start = batch * batch_size + process_index * local + part * chunk
        image_bHWC = np.zeros((chunk, image_size, image_size, 3), np.uint8)
        label_b, mask_b = np.full(chunk, -1, np.int32), np.zeros(chunk, np.float32)
        for row, index in enumerate(range(start, min(start + chunk, len(source)))):
            try:
                record = source[index]
            except BadRecord as reason:
                bad.add(source.describe(index), str(reason))
                continue
            image_bHWC[row] = geometry.center_crop_resize(
                record['image'], image_size, crop_fraction, interpolation
            )
            label_b[row], mask_b[row] = record['label'], 1
        return {'image': image_bHWC, 'label': label_b, 'mask': mask_b}

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
        {'text': [b, T] int32, 'label': [b] int32, all -1, 'mask': [b] float32}, ceil(M / B) times.
        Padding has mask 0 and the ids of the empty text.
    """
    local = _local_rows(batch_size, process_count)
    for batch in range(0, len(texts), batch_size):
        start = batch + process_index * local
        some = list(texts[start : min(start + local, len(texts))])
        mask_b = (np.arange(local) < len(some)).astype(np.float32)
        ids_bT = tokenize([*some, *[''] * (local - len(some))])
        yield {'text': ids_bT, 'label': np.full(local, -1, np.int32), 'mask': mask_b}


def _batches(
    rows: Callable[[int], dict[str, np.ndarray]], chunks: int, per_batch: int, threads: int
) -> BatchIterator:
    """Runs `rows` over chunk numbers in threads, at least one batch ahead of the caller."""
    ahead = max(2 * threads, per_batch + threads) if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.range(chunks).map(rows).to_iter_dataset(options)
    return BatchIterator(iter(dataset), per_batch)


def _usable(source: Source, index: int, bad: BadRecords) -> tuple[int, Record]:
    """The record, or the next one in the source that can be used."""
    for hop in range(len(source)):
        found = (index + hop) % len(source)
        try:
            return found, source[found]
        except BadRecord as reason:
            bad.add(source.describe(found), str(reason))
    raise UserError(f'none of the {len(source)} records can be used.')


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """[N] int32: the records in the order of an epoch."""
    # Not grain's shuffle: through its MapDataset an index costs 20 to 70 µs, as much as a crop.
    return np.random.default_rng([seed, epoch]).permutation(np.arange(count, dtype=np.int32))


def _local_rows(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f'config.batch_size: got {batch_size}, expected a multiple of the {process_count} '
            'processes.'
        )
    return batch_size // process_count


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)


def _threads(source: Source, threads: int | None) -> int:
    if threads is not None:
        return threads
    pixels = 0
    for index in range(min(8, len(source))):
        try:
            pixels = source[index]['image'].shape[0] * source[index]['image'].shape[1]
            break
        except BadRecord:
            continue
    if 0 < pixels <= 64 * 64:
        return 1
    allowed = getattr(os, 'sched_getaffinity', None)
    return min(32, len(allowed(0)) if allowed else os.cpu_count() or 1)
