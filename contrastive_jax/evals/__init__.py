"""How good an encoder's features are: one evaluator a file, each `make(**options) -> evaluate`.

`evaluate(encoder)` yields (name, value) pairs; accuracies are fractions in [0, 1], and a picture is
the bytes of a PNG file. Most evaluators see the encoder through the features of whole splits, which
are computed once for all of them; those that draw see more of a few images; those that train it on
have its weights. What the classifiers share is here: which rows are labelled, and which few of
them a few-labels experiment may use.

N: rows of a split (with padding), D: features, B: batch rows, n: rows of a subset, h w: a map.
"""

import fnmatch
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from contrastive_jax import config, models, parallel
from contrastive_jax.config import UserError
from contrastive_jax.evaluation import pooled

Rows = Sequence[int] | np.ndarray  # of records
Evaluate = Callable[['Encoder'], Iterator[tuple[str, float | bytes]]]
PICTURES = 64  # that `Encoder.of` encodes at a time, about


class Features(NamedTuple):
    """A split as an encoder sees it.

    Attributes:
        x_ND: float32, sharded over the mesh's first axis; rows in the order of the records,
            whatever the devices or processes.
        label_N: int32 on the host, all rows of all processes; −1 for padding, bad and unlabelled
            records.
    """

    x_ND: jax.Array
    label_N: np.ndarray


class Tower(NamedTuple):
    """An image encoder with its weights, for `models.apply`."""

    module: models.Encoder
    params: Any
    stats: Any


class Views(NamedTuple):
    """How a run shows pictures to its encoder in training.

    Attributes:
        mean, std: of each channel, in units of [0, 1]: what `augment.normalize` takes.
        crop: keywords of `data.geometry.random_resized_crop`.
        pairs: `(split, rows) ->` two augmented views of those records, [n, 2, H, W, 3] uint8, the
            same on every process; zeros for a bad one.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: Mapping[str, Any]
    pairs: Callable[[str, Rows], np.ndarray]


class Encoder:
    """An encoder and the data to try it on; computes each split's features once."""

    def __init__(
        self,
        encode: Callable[[dict[str, jax.Array], str], jax.Array],
        splits: Sequence[str],
        classes: Sequence[str],
        batches: Callable[[str], Iterator[dict[str, np.ndarray]]],
        mesh: Mesh,
        *,
        texts: Callable[[Sequence[str]], Iterator[dict[str, np.ndarray]]] | None = None,
        captions: Callable[[str], list[list[str]] | None] = lambda split: None,
        images: Callable[[str, Rows], np.ndarray] | None = None,
        sizes: Mapping[str, int] | None = None,
        tower: Tower | None = None,
        views: Views | None = None,
        outputs: Callable[[], Sequence[str]] | None = None,
        random: bool = False,
    ):
        """
        Args:
            encode: jitted `({'image': [B, H, W, 3] uint8, 'label', 'mask'}, name) -> [B, D]` of a
                global batch, sharded on B; or of one with 'text' [B, T] int32 in the image's place.
                The name is 'features', or 'embedding' in a space that images and texts share.
            splits: names of the splits there are: 'train', 'test', maybe 'validation'.
            classes: class names in label order; empty where nothing is labelled.
            batches: `(split) ->` this process's batches of NumPy arrays 'image', 'label' [b] int32
                and 'mask' [b] float32 (0: padding or a bad record), all of one shape.
            mesh: what batches and features are sharded over.
            texts: `(texts) ->` this process's batches of 'text', 'label' and 'mask'. None: the
                encoder reads no text.
            captions: `(split) ->` the captions of every record, none for a bad one; None where the
                data has none.
            images: `(split, rows) ->` those records as the encoder is given them, [n, H, W, 3]
                uint8, the same on every process; zeros for a bad one.
            sizes: how many records the splits have.
            tower: None: there is none, as of raw pixels.
            views: how it was shown pictures.
            outputs: `() ->` the names that encode knows of an image.
            random: its weights are those that a new network has.
        """
        self.splits, self.classes, self.mesh = tuple(splits), list(classes), mesh
        self._encode, self._batches = encode, batches
        self._texts, self.captions, self.reads_text = texts, captions, texts is not None
        self._images, self._sizes, self.tower = images, dict(sizes or {}), tower
        self.views, self._outputs, self.random = views, outputs, random
        self._features: dict[tuple[str, str], Features] = {}

    def features(self, split: str, name: str = 'features') -> Features:
        """The features of a split, or another output of its images, computed at the first call.

        They pass through the host batch by batch: there the parts are joined without compiling
        anything, and no device holds a split twice. While joining, each process needs host memory
        for the split (ImageNet's 1.28 M rows of 2048 float32: 10 GB).

        A map [B, h, w, C], or patches [B, N, C] of a square grid, are averaged over the cells of
        the finest grid that leaves at most 9,216 numbers (36 KB an image), on the devices, and then
        flattened.
        """
        if (split, name) not in self._features:
            self._features[split, name] = self._compute(self._batches(split), name)
        return self._features[split, name]

    def named(self, patterns: Sequence[str], where: str) -> list[str]:
        """Outputs by their names, which must exist, or by patterns such as 'block*', in order.

        Raises:
            UserError: no such output; those that exist are listed.
        """
        exist = sorted(self._outputs() if self._outputs else (), key=_natural)
        found: list[str] = []
        for pattern in patterns:
            if not set(pattern) & set('*?[') and pattern not in exist:
                raise config.unknown('output of the encoder', pattern, exist, where)
            found += fnmatch.filter(exist, pattern)
        return list(dict.fromkeys(found))

    def forget(self, name: str) -> None:
        """Frees an output's memory on the devices; the next call computes it again."""
        for key in [k for k in self._features if k[1] == name]:
            del self._features[key]

    def texts(self, texts: Sequence[str]) -> jax.Array:
        """Embeddings of texts, [M, D] float32 and padded with zeros, not normalised."""
        assert self._texts is not None, 'the encoder reads no text'
        return self._compute(self._texts(texts), 'embedding').x_ND

    def images(self, split: str, rows: Rows) -> np.ndarray:
        """Records as the encoder is given them, [n, H, W, 3] uint8; zeros for a bad one."""
        assert self._images is not None, 'the encoder was made without images'
        return self._images(split, rows)

    def sample(self, count: int) -> np.ndarray:
        """Test images evenly spread over the split (train's, where there is no test split).

        Returns:
            uint8 [n, H, W, 3], n ≤ count: records that cannot be used are left out.
        """
        split = 'test' if 'test' in self.splits else 'train'
        size = self._sizes[split]
        images = self.images(split, spread(size, count).tolist())
        return images[images.any(axis=(1, 2, 3))]

    def of(self, images_nHWC: np.ndarray, name: str) -> np.ndarray:
        """Any output of given images, [n, ...] float32: 'patches', 'attention', ...

        Args:
            images_nHWC: uint8, the same on every process.
            name: an output that the method's `encode` gives of images.

        Raises:
            KeyError: no such output.
        """
        processes = jax.process_count()
        local = max(1, PICTURES // self.mesh.size) * self.mesh.size // processes

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for start in range(0, len(images_nHWC), local * processes):
                mine = start + jax.process_index() * local
                image = images_nHWC[mine : mine + local]
                padding = local - len(image)
                yield {
                    'image': np.pad(image, ((0, padding), (0, 0), (0, 0), (0, 0))),
                    'label': np.full(local, -1, np.int32),
                    'mask': np.ones(local, np.float32),
                }

        return self._rows(batches(), lambda batch: self._encode(batch, name))[0][: len(images_nHWC)]

    def _compute(self, batches: Iterator[dict[str, np.ndarray]], name: str) -> Features:
        return put(
            self.mesh, *self._rows(batches, lambda b: pooled.pooled(self._encode(b, name), name))
        )

    def _rows(
        self,
        batches: Iterator[dict[str, np.ndarray]],
        encode: Callable[[dict[str, jax.Array]], jax.Array],
    ) -> tuple[np.ndarray, np.ndarray]:
        """An output of all batches and their labels, on the host."""
        x, label = [], []
        waiting: list[tuple[jax.Array, ...]] = []

        def collect() -> None:
            x_BD, label_B, mask_B, place_B = (parallel.to_host(y) for y in waiting.pop(0))
            order = np.argsort(place_B)
            x_BD, label_B, mask_B = x_BD[order], label_B[order], mask_B[order]
            x.append(x_BD.astype(np.float32))
            # A row that does not count must not poison statistics either, whatever the encoder
            # made of its black pixels.
            counts_B = mask_B > 0
            x[-1][~counts_B] = 0
            label.append(np.where(counts_B, label_B, -1).astype(np.int32))

        for numpy_batch in batches:
            # Where a row is in the global batch: the mesh may order processes' devices otherwise.
            count = len(numpy_batch['label'])
            place = np.arange(count, dtype=np.int32) + jax.process_index() * count
            batch = parallel.shard_batch(self.mesh, {**numpy_batch, 'place': place})
            waiting.append((encode(batch), batch['label'], batch['mask'], batch['place']))
            if len(waiting) > 2:  # the devices always have the next batches to work on
                collect()
        while waiting:
            collect()
        return np.concatenate(x), np.concatenate(label)

    def labelled(self, name: str = 'features') -> Features:
        """All rows that a classifier may learn from: 'train', and 'validation' if there is one."""
        parts = [self.features(s, name) for s in ('train', 'validation') if s in self.splits]
        if len(parts) == 1:
            return parts[0]
        key = 'labelled', name
        if key not in self._features:
            x_ND = np.concatenate([parallel.to_host(p.x_ND) for p in parts])
            label_N = np.concatenate([p.label_N for p in parts])
            self._features[key] = put(self.mesh, x_ND, label_N)
        return self._features[key]

    def missing(self) -> str:
        """Why a classifier cannot be evaluated, or ''."""
        for split in ('train', 'test'):
            if split not in self.splits:
                return f'there is no {split} split'
        if not self.classes:
            return 'the data has no labels'
        for split in ('train', 'test'):
            if not (self.features(split).label_N >= 0).any():
                return f'no image of the {split} split has a label'
        return ''


def sampled(
    encoder: Encoder, count: int, names: Sequence[str], say: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Test images [n, H, W, 3] and the first of the named outputs that the encoder gives of them.

    None, and `say` says why, of raw pixels and where there is nothing to draw.
    """
    if encoder.tower is None:
        say('raw pixels have none')
        return None
    images = encoder.sample(count)
    if not len(images):
        say('none of the sampled images can be used')
        return None
    for name in names:
        try:
            x = encoder.of(images, name)
        except KeyError:
            continue
        if np.isfinite(x).all():
            return images, x
        say(f'{name!r} is not finite')
        return None
    say(f'the encoder gives no {" and no ".join(map(repr, names))}')
    return None


def spread(size: int, count: int) -> np.ndarray:
    """At most `count` of range(size), evenly spread over it."""
    count = min(count, size)
    return (2 * np.arange(count) + 1) * size // (2 * max(count, 1))


def grid(images_nHWC: np.ndarray, patches: int) -> tuple[int, int]:
    """(rows, columns) of the square patches that the images divide into."""
    height, width = images_nHWC.shape[1:3]
    side = math.sqrt(height * width / patches)
    return round(height / side), round(width / side)


def missed(what: str) -> Callable[[str], None]:
    """`say(reason)`: logs why `what` is not evaluated, each reason once."""
    said: set[str] = set()

    def say(reason: str) -> None:
        if reason not in said:
            logging.info('%s is not evaluated: %s', what, reason)
            said.add(reason)

    return say


def put(mesh: Mesh, x_ND: np.ndarray, label_N: np.ndarray) -> Features:
    """Host rows (the same on every process) as Features, padded to a multiple of the devices."""
    padding = -len(x_ND) % mesh.size
    x_ND = np.pad(x_ND, ((0, padding), (0, 0)))
    label_N = np.pad(label_N, (0, padding), constant_values=-1)
    sharding = parallel.rows(mesh)
    return Features(
        jax.make_array_from_callback(x_ND.shape, sharding, lambda index: x_ND[index]), label_N
    )


def _natural(name: str) -> list[str | int]:
    """Sorts 'block10' after 'block9'."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r'(\d+)', name))]


def few_labels(per_class: Sequence[int], fractions: Sequence[float]) -> dict[str, int | float]:
    """What the experiments with few labels are called in metrics, and what `draws` takes for each.

    {'10_per_class': 10, '1_percent': 0.01}
    """
    named: dict[str, int | float] = {f'{n}_per_class': int(n) for n in per_class}
    return named | {f'{100 * f:g}_percent': float(f) for f in fractions}


def draws(label_N: np.ndarray, labels: int | float, count: int, seed: int) -> list[np.ndarray]:
    """Random stratified subsets of the labelled rows.

    Args:
        label_N: int; negative labels are never drawn.
        labels: an int: labels of each class in a subset; a class with fewer gives all it has. A
            float: the share of every class, rounded, at least one; of one seed and draw, the
            subset of a smaller share is part of a larger one's.
        count: how many subsets.
        seed: the same seed draws the same records, however many padding rows lie between them.

    Returns:
        `count` sorted arrays of row numbers, all of one length.
    """
    rows_of = [np.flatnonzero(label_N == c) for c in np.unique(label_N[label_N >= 0])]
    if isinstance(labels, float):
        sizes, stream = [max(1, round(labels * len(rows))) for rows in rows_of], 0
    else:
        sizes, stream = [labels] * len(rows_of), labels
    fewer = sum(len(rows) < size for rows, size in zip(rows_of, sizes, strict=True))
    if fewer:
        logging.info(
            '%d of %d classes have fewer than %d labelled images: all of them are used',
            fewer,
            len(rows_of),
            labels,
        )
    subsets = []
    for draw in range(count):
        rng = np.random.default_rng([seed, stream, draw])
        some = [rng.permutation(rows)[:n] for rows, n in zip(rows_of, sizes, strict=True)]
        subsets.append(np.sort(np.concatenate(some)))
    return subsets


def over_draws(name: str, values: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Mean and standard deviation of a metric over draws: `name` and `<name>_std`."""
    yield name, float(np.mean(values))
    yield f'{name}_std', float(np.std(values))


def gather(mesh: Mesh, x_ND: jax.Array, rows: np.ndarray) -> np.ndarray:
    """`x_ND[rows]` on every host, for row numbers of any shape."""
    return parallel.to_host(_gatherer(mesh)(x_ND, rows))


@functools.cache
def _gatherer(mesh: Mesh) -> Callable[[jax.Array, np.ndarray], jax.Array]:
    return jax.jit(lambda x_ND, rows: x_ND[rows], out_shardings=parallel.replicated(mesh))


def check_draws(
    where: str, per_class: Sequence[int], draws: int, fractions: Sequence[float] = ()
) -> None:
    """Raises UserError unless the options of the few-labels experiments make sense."""
    if any(n < 1 for n in per_class):
        raise UserError(f'{where}.per_class: got {tuple(per_class)}, expected numbers from 1.')
    if any(not 0 < f <= 1 for f in fractions):
        raise UserError(f'{where}.fractions: got {tuple(fractions)}, expected shares in (0, 1].')
    if (per_class or fractions) and draws < 1:
        raise UserError(f'{where}.draws: got {draws}, expected at least 1.')
