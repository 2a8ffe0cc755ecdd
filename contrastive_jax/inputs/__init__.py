"""Kinds of data: a file each, named by `config.inputs`, which exports `make(**options) -> Inputs`.

A source (`data`) gives records. An Inputs says what becomes of them: rows of NumPy arrays on the
host, then floats on the device, once for training and once for evaluation. The pipeline, the
training step, evaluators, `load`, `export` and `plan` take every shape from here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_jax.config import UserError
from contrastive_jax.data import BadRecord, Record, Source
from contrastive_jax.data.text import Tokenizer

Row = dict[str, Any]  # arrays, and what `Transform.collate` makes arrays of
Batch = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]
# What a batch has beside an Inputs' own arrays and the source's labels: the record's number.
INDEX = 'index'


class Transform(NamedTuple):
    """From a record to what a network is given.

    Attributes:
        host: `(record, rng) -> row`: one record's arrays, called from several threads. Every draw
            comes from rng. Raises BadRecord for a record that cannot be used.
        shapes: shape and dtype of every array of such a row.
        device: `(key, batch) -> batch`: rows in floats, within the jitted step; keys that it does
            not know stay as they are. Every draw comes from the key.
        collate: functions that make one array [n, ...] of n rows' values, by the values' name,
            where that is cheaper than row by row: texts are tokenised together.
    """

    host: Callable[[Record, np.random.Generator], Row]
    shapes: Shapes
    device: Callable[[jax.Array, Batch], Batch]
    collate: Mapping[str, Callable[[list[Any]], np.ndarray]] = MappingProxyType({})


class Inputs(NamedTuple):
    """A kind of data, as a run is to see it.

    Attributes:
        train: for pretraining.
        eval: for evaluators, `load`, embeddings and exports; ignores rng and key, which may be
            None.
        tune: for training with labels: as `train`, but one view, of geometry alone.
        baseline: `(batch) -> [B, D]` of a batch from `eval.device`: features that need no network.
        reads: keys of a record that training needs.
        record: a record of what a user gives to an encoder, such as an array or a path; raises
            BadRecord.
        show: `(batch) -> bytes`: a PNG file of a batch from `train.device`.
        tokenizer: of inputs with texts, once `prepare` has opened it.
        prepare: `(source, folders) -> Inputs` completed by what is learned from the training split,
            or was kept in one of the folders: a vocabulary. `source` is None where nothing may be
            learned. None: there is nothing to prepare.
        task: for what a method asks of held-out records, where it does not see them as evaluators
            do; ignores rng and key as `eval` does. None: as `eval`.
    """

    train: Transform
    eval: Transform
    tune: Transform
    baseline: Callable[[Batch], jax.Array]
    reads: tuple[str, ...]
    record: Callable[[Any], Record]
    show: Callable[[Batch], bytes] | None = None
    tokenizer: Tokenizer | None = None
    prepare: 'Callable[[Source | None, Sequence[str]], Inputs] | None' = None
    task: Transform | None = None


def batch_shapes(
    transform: Transform, labels: Iterable[str], rows: int, sharding: Any = None
) -> Shapes:
    """Shapes of a batch before `transform.device`.

    Args:
        transform: of the rows.
        labels: names of the source's labels.
        rows: B of the batch.
        sharding: of every array.
    """
    of_row = {**transform.shapes, **{k: scalar() for k in (*labels, INDEX)}}
    return {
        name: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=sharding)
        for name, x in of_row.items()
    }


def blank(transform: Transform, labels: Iterable[str] = ()) -> Batch:
    """One row of zeros, as `transform.device` gives it: what networks are initialised with."""
    shapes = batch_shapes(transform, labels, 1)
    floats = jax.eval_shape(transform.device, jax.random.key(0), shapes)
    return {name: jnp.zeros(x.shape, x.dtype) for name, x in floats.items()}


def scalar() -> jax.ShapeDtypeStruct:
    """Shape of a label."""
    return jax.ShapeDtypeStruct((), jnp.int32)


def empty(shapes: Mapping[str, jax.ShapeDtypeStruct], rows: int) -> dict[str, np.ndarray]:
    """Arrays for so many rows, of zeros."""
    return {name: np.zeros((rows, *x.shape), x.dtype) for name, x in shapes.items()}


def check(kind: str, inputs: Inputs, source: Source, name: str) -> None:
    """Raises UserError unless a source's records have what inputs read.

    Args:
        kind: the inputs' name.
        inputs: the inputs.
        source: the training split; its first usable record is looked at.
        name: the source's name.
    """
    for index in range(min(len(source), 100)):
        try:
            record: Mapping[str, Any] = source[index]
        except BadRecord:
            continue
        if missing := [key for key in inputs.reads if key not in record]:
            raise UserError(
                f'config.inputs: {kind!r} reads {" and ".join(map(repr, missing))} of a record; '
                f'the source {name!r} gives {", ".join(map(repr, record))}.'
            )
        return
