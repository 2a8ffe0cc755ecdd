"""ArrayRecord files: one's own images in a few large files with fast random access.

A directory holds `train*.array_record*`, optionally `test*` and `validation*` (alone, validation
serves as test), and the class names in `classes.txt`, one a line; without that file the records
count as unlabelled. A record is a msgpack map {'image': the bytes of a JPEG, PNG or WebP file,
'label': int, -1 for none}. Packs what the folder source reads:

    python -m contrastive_jax.data.sources.array_record FOLDER OUT
"""

import argparse
import glob
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import logging

from contrastive_jax.config import UserError
from contrastive_jax.data import BadRecord, Record, Source, labelled, reject_argument, with_test
from contrastive_jax.data.decode import decode
from contrastive_jax.data.sources import folder

SPLITS = ('train', 'test', 'validation')
EXPECTED = (
    'Expected: train*.array_record, optionally test*.array_record, validation*.array_record and '
    'classes.txt; `python -m contrastive_jax.data.sources.array_record FOLDER OUT` packs a folder.'
)


class ArrayRecords:
    """The records of some ArrayRecord files, in the files' order.

    Args:
        paths: the files.
        classes: class names in label order; [] makes every record unlabelled.
        name: of the split, for `describe`.
    """

    def __init__(self, paths: Sequence[str], classes: list[str], name: str):
        # Lazily: importing grain is slow, and whoever only packs or lists does without.
        from grain.sources import ArrayRecordDataSource

        self.classes, self.name, self._names = labelled(classes), name, classes
        try:
            self._records: Any = ArrayRecordDataSource(list(paths))
            self._count = len(self._records)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f'config.data.root: cannot read {", ".join(paths)} as ArrayRecord: {error}'
            ) from error

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        import msgpack

        try:
            record = msgpack.unpackb(self._records[index])
            data, label = record['image'], int(record.get('label', -1))
        except Exception as error:  # whatever a damaged file makes of the two readers
            raise BadRecord(f'damaged record: {type(error).__name__}: {error}') from error
        if not self.classes:
            label = -1
        elif not 0 <= label < len(self._names):
            raise BadRecord(f'label {label} is not one of the {len(self._names)} classes')
        return {'image': decode(data), 'label': label}

    def describe(self, index: int) -> str:
        return f'{self.name}[{index}]'


def make(argument: str = '', root: str = '', holdout: float = 0.1) -> dict[str, Source]:
    """Opens the splits in a directory.

    Args:
        argument: must be empty.
        root: the directory.
        holdout: share of train that serves as test where there is no test or validation file.

    Raises:
        UserError: root not set or missing, no train file, unreadable files.
    """
    reject_argument(argument, 'array_record')
    if not root:
        raise UserError(
            f'config.data.root: not set; the array_record source needs it: '
            f'--config.data.root=DIR. {EXPECTED}'
        )
    root = os.path.expanduser(str(root))
    if not os.path.isdir(root):
        raise UserError(f'config.data.root: {root!r} is not a directory. {EXPECTED}')
    paths = {
        split: sorted(glob.glob(os.path.join(glob.escape(root), f'{split}*.array_record*')))
        for split in SPLITS
    }
    if not paths['train']:
        names = sorted(os.listdir(root))[:5]
        raise UserError(
            f'config.data.root: no train*.array_record in {root!r} '
            f'({"it has " + ", ".join(names) if names else "it is empty"}). {EXPECTED}'
        )
    classes_path = os.path.join(root, 'classes.txt')
    classes = []
    if os.path.exists(classes_path):
        with open(classes_path, encoding='utf-8') as file:
            classes = file.read().splitlines()
    else:
        logging.info('%s is missing: the records count as unlabelled', classes_path)
    splits: dict[str, Source] = {
        split: ArrayRecords(files, classes, split) for split, files in paths.items() if files
    }
    return with_test(splits, holdout, str, root)


def pack(source: folder.Folder, path_prefix: str, shards: int) -> tuple[int, list[str]]:
    """Writes a split's files as they are, those that do not decode left out.

    Args:
        source: the split.
        path_prefix: directory and split name: OUT/train.
        shards: number of files, >= 1; record i goes to file i × shards // N.

    Returns:
        The number written, and a line 'path: reason' for each file left out.
    """
    import msgpack
    from array_record.python.array_record_module import ArrayRecordWriter

    written, bad = 0, []
    bounds = [shard * len(source) // shards for shard in range(shards + 1)]
    for shard in range(shards):
        part = '' if shards == 1 else f'-{shard:05d}-of-{shards:05d}'
        # A group of one record: random access reads nothing that it does not need.
        writer = ArrayRecordWriter(f'{path_prefix}{part}.array_record', 'group_size:1')
        for index in range(bounds[shard], bounds[shard + 1]):
            try:
                data = source.read(index)
                decode(data)
            except BadRecord as reason:
                bad.append(f'{source.describe(index)}: {reason}')
                continue
            writer.write(msgpack.packb({'image': data, 'label': source.labels[index]}))
            written += 1
        writer.close()
    return written, bad


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: packs every split of a folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m contrastive_jax.data.sources.array_record',
        description='Packs the splits of an image folder into ArrayRecord files.',
    )
    parser.add_argument('folder', help='what config.data.root is for the folder source')
    parser.add_argument('out', help='a new or empty directory')
    parser.add_argument('--shards', type=int, default=1, help='files a split (default 1)')
    options = parser.parse_args(arguments)
    try:
        if options.shards < 1:
            raise UserError(f'--shards: got {options.shards}; expected at least 1.')
        if os.path.exists(options.out) and (
            not os.path.isdir(options.out) or os.listdir(options.out)
        ):
            raise UserError(f'OUT: {options.out!r} exists and is not an empty directory.')
        # Nothing is held out here: whoever opens the records decides on that.
        splits = folder.make(root=options.folder, holdout=0)
        os.makedirs(options.out, exist_ok=True)
        for name, source in splits.items():
            assert isinstance(source, folder.Folder)
            written, bad = pack(source, os.path.join(options.out, name), options.shards)
            for line in bad:
                print(f'left out: {line}', file=sys.stderr)
            print(f'{name}: {written} records, {len(bad)} files left out')
        classes = splits['train'].classes.get('label', [])
        if classes:
            with open(os.path.join(options.out, 'classes.txt'), 'w', encoding='utf-8') as file:
                file.writelines(f'{name}\n' for name in classes)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
