"""TensorFlow Datasets by name: 'tfds:cifar10', 'tfds:imagenet2012', 'tfds:my_dataset/config'.

Read in random access through `tfds.data_source` (ArrayRecord files). The first use of a dataset
downloads and prepares it into config.data.root, or TFDS's own directory where that is ''. Texts in
a feature called caption, captions or text ('tfds:coco_captions') are the images' captions.
"""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from contrastive_jax.config import UserError
from contrastive_jax.data import BadRecord, Record, Source, labelled, with_test
from contrastive_jax.data.decode import decode

VALIDATION = ('validation', 'val', 'valid', 'dev')
CAPTIONS = ('captions', 'caption', 'text')


class Tfds:
    """One split.

    Args:
        records: what `builder.as_data_source` returns, images not decoded.
        features: the dataset's feature dictionary.
        name: dataset and split, for `describe`.
        image: name of the image feature.
        label: name of the class label feature, None where there is none.
    """

    def __init__(self, records: Any, features: Any, name: str, image: str, label: str | None):
        self.records, self.name, self.image, self.label = records, name, image, label
        self.classes = labelled(list(features[label].names) if label else [])

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int) -> Any:
        """The record as TFDS gives it."""
        try:
            return self.records[index]
        except Exception as error:  # a damaged file, in the words of one of TFDS's readers
            raise BadRecord(f'unreadable: {type(error).__name__}: {error}') from error

    def record(self, read: Any) -> Record:
        label = int(read[self.label]) if self.label else -1
        return {'image': decode(read[self.image]), 'label': label}

    def __getitem__(self, index: int) -> Record:
        return self.record(self.read(index))

    def describe(self, index: int) -> str:
        return f'{self.name}[{index}]'


class Captioned(Tfds):
    """One split whose feature `text` holds a caption, several, or dictionaries with a 'text'."""

    def __init__(self, *split: Any, text: str):
        super().__init__(*split)
        self.text = text

    def __getitem__(self, index: int) -> Record:
        read = self.read(index)
        return {**self.record(read), 'captions': self._of(read)}

    def captions(self, index: int) -> list[str]:
        return self._of(self.read(index))

    def _of(self, read: Any) -> list[str]:
        texts = read[self.text]
        texts = texts['text'] if isinstance(texts, Mapping) else texts
        texts = [texts] if isinstance(texts, str | bytes) else texts
        texts = [text['text'] if isinstance(text, Mapping) else text for text in texts]
        texts = [
            text.decode('utf-8', 'replace') if isinstance(text, bytes) else text for text in texts
        ]
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise BadRecord('no caption')
        return texts


def make(argument: str = '', root: str = '', holdout: float = 0.1) -> dict[str, Source]:
    """Opens, and where needed downloads and prepares, a dataset.

    Args:
        argument: the dataset's name, config and version: 'cifar10', 'cifar10:3.0.2'.
        root: TFDS's data directory; '' means ~/tensorflow_datasets.
        holdout: share of train that serves as test where there is no test or validation split.

    Raises:
        UserError: no name, TensorFlow not installed, unknown name, no images, no train split.
    """
    where = 'config.data.source'
    if not argument:
        raise UserError(f"{where}: 'tfds' needs a dataset's name: 'tfds:cifar10'.")
    tfds = _import()
    try:
        builder = tfds.builder(argument, data_dir=str(root) or None)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        close = difflib.get_close_matches(argument, tfds.list_builders(), n=3, cutoff=0.5)
        hint = f' Closest names: {", ".join(close)}.' if close else ''
        reason = str(error).splitlines()[0].rstrip('.')
        raise UserError(f'{where}: no TFDS dataset {argument!r}: {reason}.{hint}') from error
    features = builder.info.features
    image = _feature(features, tfds.features.Image, ('image',))
    label = _feature(features, tfds.features.ClassLabel, ('label', 'labels'))
    texts = (name for name in CAPTIONS if name in features and _holds_text(features[name]))
    text = next(texts, None)
    if image is None:
        raise UserError(f'{where}: {argument!r} has no image feature; it has {list(features)}.')
    try:
        builder.download_and_prepare(file_format='array_record')
    except Exception as error:  # network, disk, licence: TFDS's message is the useful one
        raise UserError(f'{where}: {argument!r} could not be prepared: {error}') from error
    names = {'train': 'train', 'test': 'test'}
    names['validation'] = next((n for n in VALIDATION if n in builder.info.splits), 'validation')
    # ImageNet's test split has no labels (each is -1); its papers report the validation split.
    if argument.startswith('imagenet2012'):
        names['test'] = names.pop('validation')
    names = {split: n for split, n in names.items() if n in builder.info.splits}
    if 'train' not in names:
        raise UserError(
            f"{where}: {argument!r} has no 'train' split; it has {list(builder.info.splits)}."
        )
    skip = {image: tfds.decode.SkipDecoding()}
    splits: dict[str, Source] = {}
    for split, n in names.items():
        try:
            records = builder.as_data_source(split=n, decoders=skip)
        except NotImplementedError as error:  # prepared earlier as TFRecord: no random access
            raise UserError(f'{where}: {argument!r}: {error}') from error
        parts = records, features, f'{argument}/{n}', image, label
        splits[split] = Captioned(*parts, text=text) if text else Tfds(*parts)
    return with_test(splits, holdout, str, argument)


def _import() -> Any:
    try:
        tf: Any = importlib.import_module('tensorflow')
        tfds: Any = importlib.import_module('tensorflow_datasets')
    except ImportError as error:
        raise UserError(
            f"config.data.source: 'tfds:...' needs TensorFlow and TFDS ({error}): "
            "pip install 'contrastive-jax[tensorflow]'"
        ) from error
    # TensorFlow only reads files here; left alone it would take the accelerator's memory.
    for kind in ('GPU', 'TPU'):
        try:
            tf.config.set_visible_devices([], kind)
        except (RuntimeError, ValueError) as error:
            logging.warning('TensorFlow keeps the %s: %s', kind, error)
    return tfds


def _feature(features: Any, kind: type, preferred: tuple[str, ...]) -> str | None:
    """The name of the feature of a kind: a usual name first, else the first one."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    return next((name for name in preferred if name in names), names[0] if names else None)


def _holds_text(feature: Any) -> bool:
    """Whether it is a text, a sequence of texts, or of dictionaries with a 'text'."""
    dtype = getattr(feature, 'np_dtype', None)
    dtype = dtype.get('text') if isinstance(dtype, Mapping) else dtype
    return dtype is not None and np.dtype(dtype) == object
