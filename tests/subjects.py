"""Subjects of evaluators whose records are given rows, and batches of given sources."""

import jax

from contrastive_jax import parallel
from contrastive_jax.data import BadRecord, labelled
from contrastive_jax.evaluation.subject import Subject
from contrastive_jax.inputs import Inputs, Transform, captions, images, pipeline

STATISTICS = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}


class Rows:
    """A source whose record i has x[i] as its 'image'; those in `bad` cannot be used."""

    def __init__(self, x, label, classes=(), bad=(), captions=None):
        self.x, self.label, self.bad, self.classes = x, label, set(bad), labelled(classes)
        if captions is not None:
            self.captions = lambda index: captions[index]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index in self.bad:
            raise BadRecord('broken on purpose')
        return {'image': self.x[index], 'label': int(self.label[index])}

    def describe(self, index):
        return f'rows[{index}]'


def given(shape, dtype, train=None, tokenizer=None) -> Inputs:
    """Inputs that give a record's 'image' as it is."""
    row = Transform(
        lambda record, rng: {'image': record['image']},
        {'image': jax.ShapeDtypeStruct(shape, dtype)},
        lambda key, batch: dict(batch),
    )
    return Inputs(
        train=train or row,
        eval=row,
        tune=row,
        baseline=lambda batch: batch['image'],
        reads=('image',),
        record=lambda item: {'image': item},
        tokenizer=tokenizer,
    )


def subject(
    splits, encode, *, devices=1, batch=48, classes=(), bad=(), captions=None, train=None, **more
) -> Subject:
    """A Subject of {split: (rows, labels)}; `encode(batch, name, prepared)` is as Subject's."""
    sources = {name: Rows(x, label, classes, bad, captions) for name, (x, label) in splits.items()}
    x = next(iter(splits.values()))[0]
    tokenizer = more.pop('tokenizer', None)
    mesh = parallel.make_mesh(jax.devices()[:devices])
    inputs = given(x.shape[1:], x.dtype, train, tokenizer)
    return Subject(encode, inputs, sources, mesh, batch_size=batch, **more)


def of_images(source, *, size, **options) -> Inputs:
    """Images' inputs with statistics that do not matter."""
    return images.make(size=size, **{**STATISTICS, **options})


def train_images(source, *, image_size, **options):
    """`train_iterator` of images; options are its own and those of `images.make`."""
    own = ('batch_size', 'seed', 'bad', 'process_index', 'process_count', 'threads')
    feed = {key: options.pop(key) for key in own if key in options}
    tokenize = options.pop('tokenize', None)
    transform = of_images(source, size=image_size, **options).train
    if tokenize:
        transform = captions.with_text(transform, tokenize, tokenize(['0']).shape[1])
    return pipeline.train_iterator(source, transform, **feed)


def eval_images(source, *, image_size, **options):
    """`eval_batches` of images; options are its own and those of `images.make`."""
    own = ('batch_size', 'bad', 'process_index', 'process_count', 'threads')
    feed = {key: options.pop(key) for key in own if key in options}
    transform = of_images(source, size=image_size, **options).eval
    return pipeline.eval_batches(source, transform, **feed)
