"""WebDataset: tar files whose members of one name are a sample, read in random access.

A sample is an image (.jpg, .jpeg, .png, .webp), a caption (.txt: the whole file is one; or .json
with 'caption' or 'captions', as img2dataset writes) and a label (.cls, an integer), the last two
optional; classes.txt beside the tars names the classes, one a line. The tars' headers are read once
at the start; images are then read where they are.
"""

import glob
import json
import os
import re
import tarfile
from typing import Any, NamedTuple

from absl import logging

from contrastive_jax.config import UserError
from contrastive_jax.data import (
    BadRecord,
    Record,
    Source,
    labelled,
    reject_argument,
    split_of,
    with_test,
)
from contrastive_jax.data.decode import decode
from contrastive_jax.data.sources.folder import SUFFIXES

EXPECTED = (
    'Expected: a tar file, a directory of *.tar, or a pattern such as '
    "'DIR/train-{000..009}.tar'; uncompressed, with images in them."
)


class Sample(NamedTuple):
    """The members of one name: suffix -> offset and size in the tar."""

    tar: str
    key: str
    members: dict[str, tuple[int, int]]

    def read(self, suffix: str) -> bytes:
        offset, size = self.members[suffix]
        try:
            # Opened each time: several threads read, and of thousands of tars few could stay open.
            with open(self.tar, 'rb') as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadRecord(f'unreadable: {error.strerror}') from error

    def captions(self) -> list[str]:
        """Those that are not blank; [] where there is none."""
        if '.txt' in self.members:
            found = [self.read('.txt').decode('utf-8', 'replace')]
        elif '.json' in self.members:
            try:
                values = json.loads(self.read('.json'))
                found = values.get('captions') or values.get('caption') or []
            except (ValueError, AttributeError) as error:
                raise BadRecord(f'damaged .json: {error}') from error
            found = found if isinstance(found, list) else [found]
        else:
            found = []
        return [text.strip() for text in found if isinstance(text, str) and text.strip()]

    def label(self) -> int:
        """-1 where there is none."""
        if '.cls' not in self.members:
            return -1
        try:
            return int(self.read('.cls'))
        except ValueError as error:
            raise BadRecord(f'damaged .cls: {error}') from error


class WebDataset:
    """The samples of one split.

    Args:
        root: for `describe`, names are relative to it.
        samples: in the order of the tars.
        classes: class names, in label order; [] makes every record unlabelled.
    """

    def __init__(self, root: str, samples: list[Sample], classes: list[str]):
        self.root, self.samples, self._names = root, samples, classes
        self.classes = labelled(classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Record:
        sample = self.samples[index]
        label = sample.label() if self.classes else -1
        if label >= len(self._names):
            raise BadRecord(f'label {label} is not one of the {len(self._names)} classes')
        image = next(suffix for suffix in SUFFIXES if suffix in sample.members)
        return {'image': decode(sample.read(image)), 'label': label}

    def describe(self, index: int) -> str:
        sample = self.samples[index]
        return f'{os.path.relpath(sample.tar, self.root)}/{sample.key}'


class Captioned(WebDataset):
    """Samples with captions."""

    def __getitem__(self, index: int) -> Record:
        captions = self.captions(index)
        return {**super().__getitem__(index), 'captions': captions}

    def captions(self, index: int) -> list[str]:
        found = self.samples[index].captions()
        if not found:
            raise BadRecord('no caption')
        return found


def make(argument: str = '', root: str = '', holdout: float = 0.1) -> dict[str, Source]:
    """Indexes the tars and opens the splits.

    Args:
        argument: must be empty.
        root: a tar, a directory with tars or folders of them, or a pattern with {000..009}, {a,b},
            * or ?. A tar is of the split whose name, train, val or test, begins a word of its own
            or its folder's name.
        holdout: share of train that serves as test where there is no such split.

    Raises:
        UserError: no such tars, one that is damaged, truncated or compressed, no samples, splits
            but no train.
    """
    reject_argument(argument, 'webdataset')
    tars = _tars(os.path.expanduser(str(root)))
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(tar)) for tar in tars])
    samples: dict[str, list[Sample]] = {}
    for tar in tars:
        *folders, name = os.path.relpath(os.path.abspath(tar), folder).split(os.sep)
        split = split_of(name) or next(filter(None, map(split_of, folders)), None) or 'train'
        samples.setdefault(split, []).extend(_index(tar))
    if len(samples) == 1:  # one split, whatever its name
        samples = {'train': next(iter(samples.values()))}
    everything = [sample for part in samples.values() for sample in part]
    if not samples.get('train'):
        has = f'samples in {", ".join(samples)}' if everything else f'no images in {tars[0]}'
        raise UserError(f'config.data.root: {root!r} has {has} and none in train. {EXPECTED}')
    logging.info('%s: %d samples in %d tars', root, len(everything), len(tars))
    kind = Captioned if any(map(_has_caption, everything)) else WebDataset
    classes = _classes(folder, everything)
    splits: dict[str, Source] = {
        split: kind(folder, samples[split], classes)
        for split in ('train', 'test', 'validation')
        if samples.get(split)
    }
    return with_test(splits, holdout, splits['train'].describe, folder)


def _has_caption(sample: Sample) -> bool:
    try:
        return bool(sample.captions())
    except BadRecord:
        return False


def _classes(folder: str, samples: list[Sample]) -> list[str]:
    """Those of classes.txt, else the numbers up to the largest label."""
    path = os.path.join(folder, 'classes.txt')
    if os.path.exists(path):
        with open(path, encoding='utf-8') as file:
            return file.read().splitlines()
    largest = -1
    for sample in samples:
        try:
            largest = max(largest, sample.label())
        except BadRecord:
            continue  # named when it is read
    return [str(label) for label in range(largest + 1)]


def _tars(root: str) -> list[str]:
    if not root:
        raise UserError(f'config.data.root: not set: --config.data.root=DIR. {EXPECTED}')
    if os.path.isfile(root):
        return [root]
    if os.path.isdir(root):
        root = os.path.join(glob.escape(root), '**', '*.tar')
    tars: dict[str, None] = {}  # each once, in order
    for pattern in _braces(root):
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f'config.data.root: there is no {pattern!r}. {EXPECTED}')
        tars |= dict.fromkeys(found)
    return list(tars)


def _braces(pattern: str) -> list[str]:
    """'a{08..10}{x,y}' -> a08x, a08y, a09x, ... as a shell does."""
    found = re.search(r'\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}', pattern)
    if not found:
        return [pattern]
    first, last, listed = found.groups()
    if listed is None:
        parts = [f'{i:0{len(first)}d}' for i in range(int(first), int(last) + 1)]
    else:
        parts = listed.split(',')
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [expanded for part in parts for expanded in _braces(before + part + after)]


def _index(path: str) -> list[Sample]:
    """The samples of a tar that have an image, in its order; reads the headers only."""
    samples: dict[str, Sample] = {}
    try:
        tar: Any
        with tarfile.open(path, 'r:') as tar:
            while member := tar.next():
                tar.members = []  # else it keeps a kilobyte for each
                folder, name = os.path.split(member.name.removeprefix('./'))
                stem, dot, suffix = name.partition('.')
                if member.isfile() and stem:
                    key = os.path.join(folder, stem)
                    sample = samples.setdefault(key, Sample(path, key, {}))
                    sample.members[dot + suffix.lower()] = (member.offset_data, member.size)
            # tarfile takes damage for the end, which is a block of zeros.
            with open(path, 'rb') as file:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f'no header and no end at byte {tar.offset}')
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f'config.data.root: {path!r} is truncated, damaged or compressed: {error}. {EXPECTED}'
        ) from error
    usable = [s for s in samples.values() if any(suffix in s.members for suffix in SUFFIXES)]
    if len(usable) < len(samples):
        left = len(samples) - len(usable)
        logging.warning('%s: %d samples without an image are left out', path, left)
    return usable
