"""Methods: NamedTuples of pure functions, as optax's optimisers are."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Tree = Any  # a pytree of arrays
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


Encode = Callable[[Tree, Tree, Batch], dict[str, jax.Array]]
Encoders = dict[str, tuple[Tree, Tree]]


# The encoder of config.model among `Encoders`; files of weights know it by this name.
ENCODER = 'image'


def online(params: Tree, extra: Tree) -> Encoders:
    """The `encoders` of a method whose trained encoder is what evaluators see."""
    return {ENCODER: (params['encoder'], extra['stats']['encoder'])}


def unchanged(params: Tree, extra: Tree, measured: Tree, progress: jax.Array) -> Tree:
    """The `after` of a method whose `extra` holds BatchNorm averages alone."""
    del params, measured, progress
    return extra


class Aux(NamedTuple):
    """Everything that a loss gives beside its value.

    A step may be made of several micro-batches (`config.accumulate`), each with a loss of its own.

    Attributes:
        extra: as it came, but for the running averages of BatchNorm. These belong to the
            micro-batch: each takes them from the one before it and moves them, as in PyTorch.
        metrics: scalars; those of a step are the mean over its micro-batches.
        measured: for `Method.after`, which moves what belongs to the step: a queue, a centre. A
            tree of arrays that lead with rows: [B, ...] for keys of a queue, [1, ...] for a mean.
            A step's are those of all its micro-batches, in the order of the batch's rows.
    """

    extra: Tree
    metrics: Metrics
    measured: Tree = None


class Refresh(NamedTuple):
    """Work of a method between epochs, on embeddings of the whole training split.

    Attributes:
        embed: `(params, extra, batch) -> {'features': [B, D]}`, as `Method.encode`.
        update: `(extra, embeddings_ND, key, progress) -> extra`, jitted. Row i is record i of the
            split; the rows are sharded over the mesh's first axis. Those of unusable records, and
            at the end those of padding, are zeros.
    """

    embed: Encode
    update: Callable[..., Tree]


class Task(NamedTuple):
    """A method's own question about a held-out record, such as which turn its image was given.

    Attributes:
        score: `(params, extra, batch, key) -> {name: [B] float}`: results of each record, of a
            batch as `task` of the inputs gives it, or where they have none as `Method.encode` sees
            it; networks are as they are for evaluators. The key is the same at every evaluation:
            what is asked does not change between them.
        units: of the results by their names: '%', of a share in [0, 1]; or '' or such as 'dB'.
    """

    score: Callable[[Tree, Tree, Batch, jax.Array], dict[str, jax.Array]]
    units: Mapping[str, str]


class Method(NamedTuple):
    """A self-supervised method. Trainer, sharding and checkpoints know nothing else of it.

    `extra` is whatever must survive a restart beside the parameters: BatchNorm statistics, a
    target network, a queue, prototypes. Nobody but the method looks inside. `progress` is a
    float32 scalar, the share of the run's steps that are done: schedules are written in it.

    Attributes:
        init: `(key, batch, records) -> (params, extra)`; run abstractly for shapes, and under jit.
            `records` is the number of training records, an int.
        loss: `(params, extra, batch, key, progress) -> (loss, Aux(extra, metrics, measured))`: the
            scalar loss, differentiated in `params` alone. The batch is as `train` of the config's
            inputs gives it: of images, `batch['views']` [B, V, H, W, 3] float, augmented and
            normalised. It has every label of the data, 'label' or others, and 'index', the record's
            number, [B] int32. B is the global batch: write single-device mathematics.
        encode: `(params, extra, batch) -> {'features': [B, D], ...}` of a batch as `eval` of the
            inputs gives it: of images, `batch['image']` [B, H, W, 3] float, normalised. This is all
            that evaluators and export see. A method with text adds 'embedding' [B, E], in the space
            that images and texts share, and gives that alone from `batch['text']` [B, T] int32.
        after: `(params, extra, measured, progress) -> extra`, once a step, after the optimiser: a
            target follows the parameters, a queue takes in what the losses `measured`.
        refresh: None, or what happens after every epoch.
        encoders: `(params, extra) -> {'image': (params, stats)}`, and 'text' where there is one:
            what the models' own `init` would give, for other runs and programs to start from. Where
            a linear layer leads into the space that both share, 'image_projection' and
            'text_projection', and what scales their similarity, 'similarity', too.
        task: None, or what it is asked, for the evaluator `pretext`.
    """

    init: Callable[[jax.Array, Batch, int], tuple[Tree, Tree]]
    loss: Callable[..., tuple[jax.Array, Aux]]
    encode: Encode
    after: Callable[[Tree, Tree, Tree, jax.Array], Tree] = unchanged
    refresh: Refresh | None = None
    encoders: Callable[[Tree, Tree], Encoders] = online
    task: Task | None = None
