"""An encoder and the data to try it on, as evaluators see them.

N: rows of a split (with padding), D: features, B: batch rows, n: rows of a subset.
"""

import fnmatch
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from contrastive_jax import config, data, models, parallel
from contrastive_jax.data import Source
from contrastive_jax.data.bad_records import BadRecords
from contrastive_jax.evaluation import Asked, pooled, spread
from contrastive_jax.inputs import Batch, Inputs, Transform, pipeline

Rows = Sequence[int] | np.ndarray  # of records
RECORDS = 64  # that `Subject.of` encodes at a time, about


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


class Weights(NamedTuple):
    """A network with its weights, for `models.apply`."""

    module: models.Encoder
    params: Any
    stats: Any


class Subject:
    """An encoder and the data to try it on; computes each split's features once."""

    def __init__(
        self,
        encode: Callable[..., jax.Array],
        inputs: Inputs,
        splits: Mapping[str, Source],
        mesh: Mesh,
        *,
        batch_size: int,
        bad: BadRecords | None = None,
        outputs: Callable[[], Sequence[str]] = tuple,
        weights: Weights | None = None,
        random: bool = False,
        task: Asked | None = None,
    ):
        """
        Args:
            encode: jitted `(batch, name, prepared=False) -> [B, ...]`, sharded on B, of a batch as
                `inputs.eval.device` takes it, or if prepared gives it; or of one with 'text' [B, T]
                int32 alone. The name is 'features', or 'embedding' in a space that texts share, or
                another output. KeyError: there is no such output.
            inputs: how the data become batches. Their tokenizer is None where the encoder reads no
                texts.
            splits: 'train', 'test', maybe 'validation'.
            mesh: what batches and features are sharded over.
            batch_size: B, over all processes.
            bad: the register of unusable records; None: one of its own, without a limit.
            outputs: `() ->` the names that encode knows.
            weights: of the encoder. None: there is none, as of the baseline.
            random: its weights are those that a new network has.
            task: what its method asks of records. None: nothing.
        """
        self.inputs, self.splits, self.mesh = inputs, dict(splits), mesh
        self.classes = next(iter(self.splits.values())).classes
        self.weights, self.random, self.task = weights, random, task
        self._encode, self._outputs, self._batch_size = encode, outputs, batch_size
        self.bad = bad or BadRecords(None, sum(map(len, splits.values())), 1.0)
        self._features: dict[tuple[str, str, int], jax.Array] = {}
        self._labels: dict[str, dict[str, np.ndarray]] = {}

    # --- Whole splits -----------------------------------------------------------------------------

    def features(
        self,
        split: str,
        name: str = 'features',
        label: str = 'label',
        dimensions: int = pooled.DIMENSIONS,
    ) -> Features:
        """The features of a split, or another output, computed at the first call.

        They pass through the host batch by batch: there the parts are joined without compiling
        anything, and no device holds a split twice. While joining, each process needs host memory
        for the split (ImageNet's 1.28 M rows of 2048 float32: 10 GB).

        A map [B, h, w, C], or patches [B, N, C] of a square grid, are averaged over the cells of
        the finest grid that leaves at most `dimensions` numbers (9,216 are 36 KB a record), on the
        devices, and then flattened.

        Args:
            split: of `splits`.
            name: of what encode knows.
            label: of those that records have; all −1 where they have none of this name.
            dimensions: at most, of what is pooled.
        """
        key = split, name, dimensions
        if key not in self._features:
            x_ND, self._labels[split] = self.through(
                self.splits[split],
                lambda batch: pooled.pooled(self._encode(batch, name), name, dimensions),
            )
            self._features[key] = on_mesh(self.mesh, x_ND)
        x_ND, labels = self._features[key], self._labels[split]
        label_N = labels.get(label)
        if label_N is None:
            return Features(x_ND, np.full(len(x_ND), -1, np.int32))
        return Features(x_ND, padded(label_N, len(x_ND)))

    def labelled(
        self, name: str = 'features', label: str = 'label', dimensions: int = pooled.DIMENSIONS
    ) -> Features:
        """All rows that a classifier may learn from: 'train', and 'validation' if there is one."""
        splits = [s for s in ('train', 'validation') if s in self.splits]
        parts = [self.features(split, name, label, dimensions) for split in splits]
        if len(parts) == 1:
            return parts[0]
        key = 'labelled', name, dimensions
        if key not in self._features:
            x_ND = np.concatenate([parallel.to_host(p.x_ND) for p in parts])
            self._features[key] = on_mesh(self.mesh, x_ND)
        label_N = np.concatenate([p.label_N for p in parts])
        return Features(self._features[key], padded(label_N, len(self._features[key])))

    def labelled_records(self, rows: Rows) -> Source:
        """The records that some rows of `labelled` are of, in their order."""
        splits = [self.splits[s] for s in ('train', 'validation') if s in self.splits]
        first = len(self.features('train').label_N)  # of validation: padding is between them
        train = len(splits[0])
        numbers = [r if r < first else train + r - first for r in map(int, rows)]
        return data.Subset(data.Joined(splits), numbers)

    def through(
        self,
        source: Source,
        encode: Callable[[Batch], jax.Array],
        transform: Transform | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Encodes every record of a source; gives the results and the labels on the host.

        Args:
            source: its records, in order.
            encode: jitted, as this class takes it, but for one output.
            transform: makes the rows; None: `inputs.eval`.

        Returns:
            [N, ...] float32 and each label [N] int32, with padding; bad records are zeros, and
            their labels, as those of padding, -1.
        """
        batches = pipeline.eval_batches(
            source,
            transform or self.inputs.eval,
            batch_size=self._batch_size,
            bad=self.bad,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return self._rows(batches, encode, (transform or self.inputs.eval).shapes)

    def forget(self, name: str) -> None:
        """Frees an output's memory on the devices; the next call computes it again."""
        for key in [k for k in self._features if k[1] == name]:
            del self._features[key]

    def named(self, patterns: Sequence[str], where: str) -> list[str]:
        """Outputs by their names, which must exist, or by patterns such as 'block*', in order.

        Raises:
            UserError: no such output; those that exist are listed.
        """
        exist = sorted(self._outputs(), key=_natural)
        found: list[str] = []
        for pattern in patterns:
            if not set(pattern) & set('*?[') and pattern not in exist:
                raise config.unknown('output of the encoder', pattern, exist, where)
            found += fnmatch.filter(exist, pattern)
        return list(dict.fromkeys(found))

    def missing(self, label: str = 'label') -> str:
        """Why a classifier of a label cannot be evaluated, or ''."""
        for split in ('train', 'test'):
            if split not in self.splits:
                return f'there is no {split} split'
        if label not in self.classes:
            there = f'; there is {", ".join(map(repr, self.classes))}' if self.classes else ''
            return f'the data has no label {label!r}{there}' if there else 'the data has no labels'
        for split in ('train', 'test'):
            if not (self.features(split, label=label).label_N >= 0).any():
                return f'no record of the {split} split has a label'
        return ''

    # --- Single records ---------------------------------------------------------------------------

    def rows(self, split: str, rows: Rows) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Records as `inputs.eval.host` makes them, the same on every process.

        Returns:
            Arrays [n, ...] by name, and bool [n]: False for a bad record, whose row is zeros.
        """
        if not len(rows):
            raise ValueError('no rows')
        some = data.Subset(self.splits[split], list(map(int, rows)))
        batch = next(
            pipeline.eval_batches(some, self.inputs.eval, batch_size=len(rows), bad=self.bad)
        )
        return {name: batch[name] for name in self.inputs.eval.shapes}, batch['mask'] > 0

    def sample(self, count: int) -> dict[str, np.ndarray]:
        """Test records evenly spread over the split (train's, where there is no test split).

        Returns:
            Arrays [n, ...], n ≤ count: records that cannot be used are left out.
        """
        split = 'test' if 'test' in self.splits else 'train'
        rows, used = self.rows(split, spread(len(self.splits[split]), count))
        return {name: x[used] for name, x in rows.items()}

    def of(self, rows: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        """Any output of some rows, [n, ...] float32: 'patches', 'attention', ...

        Args:
            rows: arrays [n, ...] that `inputs.eval.device` takes, the same on every process.
            name: of what encode knows.

        Raises:
            KeyError: no such output.
        """
        return self._some(rows, lambda batch: self._encode(batch, name))

    def of_floats(self, rows: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        """As `of`, of rows that `inputs.eval.device` need not prepare: augmented views."""
        return self._some(rows, lambda batch: self._encode(batch, name, prepared=True))

    def first_of(
        self, count: int, names: Sequence[str], say: Callable[[str], None]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Test images [n, H, W, 3] uint8 and the first of the named outputs that there is of them.

        None, and `say` says why, of the baseline and where there is nothing to draw.
        """
        if reason := self.no_images():
            say(reason)
            return None
        if self.weights is None:
            say('the baseline has none')
            return None
        images = self.sample(count)
        if not len(images['image']):
            say('none of the sampled images can be used')
            return None
        for name in names:
            try:
                x = self.of(images, name)
            except KeyError:
                continue
            if np.isfinite(x).all():
                return images['image'], x
            say(f'{name!r} is not finite')
            return None
        say(f'the encoder gives no {" and no ".join(map(repr, names))}')
        return None

    def no_images(self) -> str:
        """Why nothing can be drawn of the data, or ''."""
        if 'image' in self.inputs.eval.shapes:
            return ''
        return f'the inputs give no images but {", ".join(self.inputs.eval.shapes)}'

    # --- Texts ------------------------------------------------------------------------------------

    @property
    def reads_text(self) -> bool:
        return self.inputs.tokenizer is not None and self.weights is not None

    def texts(self, texts: Sequence[str]) -> jax.Array:
        """Embeddings of texts, [M, D] float32 and padded with zeros, not normalised."""
        assert self.inputs.tokenizer is not None, 'the encoder reads no text'
        batches = pipeline.text_batches(
            self.inputs.tokenizer,
            texts,
            batch_size=self._batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        x_MD, _ = self._rows(batches, lambda batch: self._encode(batch, 'embedding'))
        return on_mesh(self.mesh, x_MD)

    def captions(self, split: str) -> list[list[str]] | None:
        """The captions of every record, none for a bad one; None where the data has none."""
        source = self.splits[split]
        if not hasattr(source, 'captions'):
            return None
        return [data.captions(source, i) for i in range(len(source))]

    # --- Batch by batch ---------------------------------------------------------------------------

    def _some(
        self, rows: Mapping[str, np.ndarray], encode: Callable[[Batch], jax.Array]
    ) -> np.ndarray:
        count = len(next(iter(rows.values())))
        processes = jax.process_count()
        local = max(1, RECORDS // self.mesh.size) * self.mesh.size // processes

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for start in range(0, count, local * processes):
                mine = start + jax.process_index() * local
                some = {name: x[mine : mine + local] for name, x in rows.items()}
                yield {
                    **{name: padded(x, local, 0) for name, x in some.items()},
                    'mask': np.ones(local, np.float32),
                }

        return self._rows(batches(), encode)[0][:count]

    def _rows(
        self,
        batches: Iterator[dict[str, np.ndarray]],
        encode: Callable[[Batch], jax.Array],
        shapes: Collection[str] = (),
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """An output of all batches and their labels, on the host."""

        def run() -> Iterator[dict[str, Any]]:
            for numpy_batch in batches:
                # Where a row is in the global batch: the mesh may order processes' devices
                # otherwise.
                count = len(numpy_batch['mask'])
                place = np.arange(count, dtype=np.int32) + jax.process_index() * count
                batch = parallel.shard_batch(self.mesh, {**numpy_batch, 'place': place})
                keys = *(shapes or self.inputs.eval.shapes), 'text'
                given = {k: v for k, v in batch.items() if k in keys}
                rest = {k: v for k, v in batch.items() if k not in given}
                yield {'x': encode(given), **rest}

        x: list[np.ndarray] = []
        labels: dict[str, list[np.ndarray]] = {}
        for device in parallel.in_flight(run()):
            found = {name: parallel.to_host(y) for name, y in device.items()}
            order = np.argsort(found.pop('place'))
            counts_B = found.pop('mask')[order] > 0
            x.append(found.pop('x')[order].astype(np.float32))
            # A row that does not count must not poison statistics either, whatever the encoder
            # made of its zeros.
            x[-1][~counts_B] = 0
            for name, label_B in found.items():
                label_B = np.where(counts_B, label_B[order], -1).astype(np.int32)
                labels.setdefault(name, []).append(label_B)
        return np.concatenate(x), {name: np.concatenate(parts) for name, parts in labels.items()}


def padded(x_N: np.ndarray, rows: int, value: float = -1) -> np.ndarray:
    """Rows with others of one value behind them, `rows` in all."""
    more = ((0, rows - len(x_N)), *((0, 0),) * (x_N.ndim - 1))
    return np.pad(x_N, more, constant_values=value)


def put(mesh: Mesh, x_ND: np.ndarray, label_N: np.ndarray) -> Features:
    """Host rows (the same on every process) and their labels as Features."""
    rows_ND = on_mesh(mesh, x_ND)
    return Features(rows_ND, padded(label_N, len(rows_ND)))


def on_mesh(mesh: Mesh, x_ND: np.ndarray) -> jax.Array:
    """Host rows (the same on every process) on the mesh, padded to a multiple of the devices."""
    x_ND = padded(x_ND, len(x_ND) + -len(x_ND) % mesh.size, 0)
    return jax.make_array_from_callback(x_ND.shape, parallel.rows(mesh), lambda at: x_ND[at])


def gather(mesh: Mesh, x_ND: jax.Array, rows: np.ndarray) -> np.ndarray:
    """`x_ND[rows]` on every host, for row numbers of any shape."""
    return parallel.to_host(_gatherer(mesh)(x_ND, rows))


@functools.cache
def _gatherer(mesh: Mesh) -> Callable[[jax.Array, np.ndarray], jax.Array]:
    return jax.jit(lambda x_ND, rows: x_ND[rows], out_shardings=parallel.replicated(mesh))


def _natural(name: str) -> list[str | int]:
    """Sorts 'block10' after 'block9'."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r'(\d+)', name))]
