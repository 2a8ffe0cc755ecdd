"""Where records come from: a source for each split, opened by name.

`open_splits` gives sources; `inputs` says what becomes of their records. Importing this package
imports neither grain nor an image library.
"""

import bisect
import hashlib
import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from absl import logging

from contrastive_jax import config
from contrastive_jax.config import UserError, check_range


class BadRecord(Exception):
    """A record that cannot be used; its text is the reason."""


# One record: its arrays by name, and an int for each of the source's labels, -1 where it has none.
# An image is 'image' [H, W, 3] uint8 of any size, with 'captions', at least one, where the source
# has `captions(index)`; a recording is 'wave' [T] int16 and its 'rate' in Hz.
Record = Mapping[str, Any]


class Source(Protocol):
    """Records in random access; `source[i]` may be called from several threads at once.

    `classes` holds for each label that records have, 'label' or others, the names of its classes in
    order; {} where they have none.
    `source[i]` raises BadRecord(reason) for a record that cannot be used. `describe(i)` names the
    record for people, a path or 'name[i]', and is unique over the splits.

    A source of images with captions also has `captions(i)`, which gives a record's without
    decoding the image and raises BadRecord where there is none. It may have `skipped`, a list of
    (name, reason) for what was left out: empty captions, unusable lines.
    """

    classes: dict[str, list[str]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...

    def describe(self, index: int, /) -> str: ...


def labelled(names: Sequence[str]) -> dict[str, list[str]]:
    """`Source.classes` of records with one 'label', or with none where there are no names."""
    return {'label': list(names)} if names else {}


class Subset:
    """The records `indices` of a source, in that order."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices, self.classes = source, list(indices), source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[self.indices[index]]

    def describe(self, index: int) -> str:
        return self.source.describe(self.indices[index])

    @property
    def captions(self) -> Callable[[int], list[str]]:
        """The source's; an AttributeError, so that `hasattr` tells, where it has none."""
        source: Any = self.source
        read = source.captions
        return lambda index: read(self.indices[index])

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) for all that the whole source left out."""
        return getattr(self.source, 'skipped', [])


class Joined:
    """The records of several sources, which have the same labels, one source after the other."""

    def __init__(self, sources: Sequence[Source]):
        self.sources, self.classes = list(sources), sources[0].classes
        self._ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        return self._ends[-1]

    def _at(self, index: int) -> tuple[Source, int]:
        i = bisect.bisect_right(self._ends, index)
        return self.sources[i], index - (self._ends[i - 1] if i else 0)

    def __getitem__(self, index: int) -> Record:
        source, place = self._at(index)
        return source[place]

    def describe(self, index: int) -> str:
        source, place = self._at(index)
        return source.describe(place)


def hold_out(
    source: Source, fraction: float, key: Callable[[int], str], name: str
) -> dict[str, Source]:
    """Splits a source without test records into 'train' and 'test' by a hash of each record's key.

    Which side a record falls on depends on its key alone: adding files to a folder moves none of
    the others. At least one record is held out.

    Args:
        source: all records.
        fraction: share held out, in [0, 1); 0 gives 'train' alone.
        key: names record i in a way that does not change: its path below the root, or its number.
        name: what to call the source in the log.

    Raises:
        UserError: fraction outside [0, 1).
    """
    check_range('config.data', {'holdout': fraction}, least=0, below=1)
    if fraction == 0:
        logging.info('no test split in %s, and config.data.holdout is 0: no test records', name)
        return {'train': source}
    digests = [hashlib.sha256(key(i).encode()).digest()[:8] for i in range(len(source))]
    hashes = [int.from_bytes(d, 'big') / 2**64 for d in digests]
    limit = max(fraction, min(hashes))
    test = [i for i, value in enumerate(hashes) if value <= limit]
    train = [i for i, value in enumerate(hashes) if value > limit]
    logging.info(
        'no test split in %s: holding out %g %% = %d records', name, 100 * fraction, len(test)
    )
    return {'train': Subset(source, train), 'test': Subset(source, test)}


def captions(source: Any, index: int) -> list[str]:
    """A record's captions, or none where it cannot be used; the source must have captions."""
    try:
        return source.captions(index)
    except BadRecord:
        return []


def split_of(name: str) -> str | None:
    """'train', 'test' or 'validation' where a word of the name begins so: 'captions_val2017'."""
    found = re.search(r'(?<![a-z])(train|test|val)', name.lower())
    return {'val': 'validation'}.get(found[1], found[1]) if found else None


def with_test(
    splits: dict[str, Source], fraction: float, key: Callable[[int], str], name: str
) -> dict[str, Source]:
    """The splits; without a test split, validation serves as one, else `hold_out` makes one.

    Args:
        splits: 'train' and any others.
        fraction, key, name: see `hold_out`; key is of a record of train.

    Raises:
        UserError: fraction outside [0, 1).
    """
    if 'test' in splits:
        return splits
    if 'validation' not in splits:
        return hold_out(splits['train'], fraction, key, name)
    logging.info('no test split in %s: validation serves as test', name)
    return {'train': splits['train'], 'test': splits['validation']}


def open_splits(data: Any) -> dict[str, Source]:
    """Opens the splits of the source that a config names.

    Args:
        data: a mapping (config.data) with `source`: a module of `data/sources`, and behind a ':'
            what its `make` takes as the argument: 'folder', 'digits:grids', 'tfds:<name>'; `root`:
            a directory, '' where the source needs none; `holdout`: the share of train that serves
            as test where the source has no test split (default 0.1); `captions`: the file of them.
            The other keys are read where the source's `make` has a parameter of that name.

    Returns:
        'train' and 'test', and 'validation' where the source has one of its own beside a test
        split. Without any test split and with holdout 0, 'train' alone.

    Raises:
        UserError: unknown source, or what the source says is missing.
    """
    where = 'config.data.source'
    name, _, argument = str(data.get('source', '')).partition(':')
    make = config.module('data.sources', name, where).make
    options = {key: data[key] for key in inspect.signature(make).parameters if key in data}
    if data.get('captions') and 'captions' not in options:
        raise UserError(
            f'config.data.captions: got {data["captions"]!r}, but the source {name!r} reads no '
            "such file; 'captions' does."
        )
    return config.call(make, where, argument=argument, **options)


def reject_argument(argument: str, name: str) -> None:
    """Raises for 'digits:something' where the source takes nothing after the colon."""
    if argument:
        raise UserError(
            f"config.data.source: {name!r} takes nothing after ':', got {argument!r}. "
            "A TFDS dataset is 'tfds:<name>'; a folder's place is config.data.root."
        )
