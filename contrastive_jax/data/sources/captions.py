"""Images with captions: image files, and one file (or one a split) that says what they show.

Understood by content, whatever the file is called:

- Karpathy's JSON: {'images': [{'filename', 'filepath'?, 'split', 'sentences': [{'raw'}]}]}
- COCO's JSON, one file a split: {'images': [{'id', 'file_name'}], 'annotations': [{'image_id',
  'caption'}]}
- a table, as CSV, TSV, JSON lines or a JSON list, with a column for the image's path and one for
  the caption (in JSON also a list of them), and optionally `split` and `label` or `class` (a name).
  Rows of one image are one record.
"""

import csv
import glob
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

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

SUFFIXES = ('.json', '.jsonl', '.ndjson', '.csv', '.tsv', '.txt')
# Names of columns, in any case; the first that is there counts.
IMAGE = ('image', 'path', 'file', 'filename', 'filepath', 'file_name', 'image_path', 'image_name')
CAPTION = ('caption', 'captions', 'text', 'sentence', 'comment')
LABEL = ('label', 'class')
EXPECTED = (
    'Expected: a CSV, TSV or JSONL file with an image column (a path) and a caption column, or the '
    "captions' JSON of Karpathy or COCO."
)
QUOTED = re.compile('".*"')
Skipped = list[tuple[str, str]]


class Row(NamedTuple):
    """An image as a file names it; `folder`, `split` and `label` may be ''."""

    name: str
    captions: list[Any]
    split: str = ''
    label: str = ''
    folder: str = ''


class Item(NamedTuple):
    """A record: its name for `describe`, the image's path, captions, class name ('': none)."""

    name: str
    path: str
    captions: list[Any]
    label: str


class Captions:
    """The records of one split, in the file's order.

    Args:
        items: the records.
        classes: class names, in label order.
        skipped: what the files have that is no record, (name, reason), of all splits.
    """

    def __init__(self, items: list[Item], classes: list[str], skipped: Skipped):
        self.items, self.classes, self.skipped = items, labelled(classes), skipped
        self._label_of = {'': -1} | {name: label for label, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Record:
        captions = self.captions(index)
        _, path, _, label = self.items[index]
        try:
            with open(path, 'rb') as file:
                data = file.read()
        except FileNotFoundError as error:
            raise BadRecord(f'no such image: {path}') from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise BadRecord(f'unreadable: {error}') from error
        return {'image': decode(data), 'label': self._label_of[label], 'captions': captions}

    def captions(self, index: int) -> list[str]:
        found = self.items[index].captions
        if not found:
            raise BadRecord('no caption')
        return found

    def describe(self, index: int) -> str:
        return self.items[index].name


def make(
    argument: str = '', root: str = '', holdout: float = 0.1, captions: str = ''
) -> dict[str, Source]:
    """Opens the splits.

    Args:
        argument: must be empty.
        root: the directory of the images, or the caption file itself. An image is looked for
            below root, in its `filepath` there and in root/images.
        holdout: share of train that serves as test where there is no test or validation split.
        captions: the file, absolute or below root; '' finds the only one in root, or COCO's in
            root/annotations. A pattern may mean several: train.csv and val.csv are then splits.

    Raises:
        UserError: nothing set, no or several caption files, a file that is none of the layouts,
            a split with an unknown name, an image in two splits, no image where it should be.
    """
    reject_argument(argument, 'captions')
    root, captions = os.path.expanduser(str(root)), os.path.expanduser(str(captions))
    if os.path.isfile(root):
        root, captions = os.path.dirname(root), os.path.abspath(root)
    root = root or os.path.dirname(captions)
    if os.path.basename(os.path.abspath(root)) == 'annotations':  # COCO's images are beside it
        root = os.path.dirname(os.path.abspath(root))
    if not root or not os.path.isdir(root):
        what = 'is not a directory' if root else 'not set: --config.data.root=DIR'
        raise UserError(f'config.data.root: {root!r} {what}. {EXPECTED}')
    skipped: Skipped = []
    files = _files(root, captions, skipped)
    found: dict[str, tuple[str, Item]] = {}  # by name; with the split
    for file, rows in files.items():
        default = split_of(os.path.basename(file)) if len(files) > 1 else None
        place = _place(root, file, rows)
        for row in rows:
            name = os.path.join(row.folder, row.name)
            split = _split(row.split, file) if row.split else default or 'train'
            new = split, Item(name, _places(root, row)[place], [], row.label)
            before, item = found.setdefault(name, new)
            if before != split:
                raise UserError(f'{file}: {name} is in the splits {before} and {split}.')
            item.captions.extend(row.captions)
    for _, item in found.values():
        given, item.captions[:] = list(item.captions), []
        for number, text in enumerate(given, 1):
            if isinstance(text, str) and text.strip():
                item.captions.append(text)
            else:
                skipped.append((f'{item.name} caption {number}', f'empty caption: {text!r}'))
    classes = sorted({item.label for _, item in found.values()} - {''})
    records = {
        split: [item for where, item in found.values() if where == split]
        for split in ('train', 'test', 'validation')
    }
    if not records['train']:
        raise UserError(f'{", ".join(files)}: no image is in the split train. {EXPECTED}')
    splits: dict[str, Source] = {
        split: Captions(part, classes, skipped) for split, part in records.items() if part
    }
    return with_test(splits, holdout, lambda i: records['train'][i].name.replace(os.sep, '/'), root)


def _files(root: str, captions: str, skipped: Skipped) -> dict[str, list[Row]]:
    """The caption files and what they say."""
    names = sorted(n for n in os.listdir(root) if n.lower().endswith(SUFFIXES) and n[0] != '.')
    listed = f'{root!r} has {", ".join(names) or "no such files"}'
    if captions:
        path = os.path.join(root, captions)
        files = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        if not files:
            raise UserError(f'config.data.captions: no file {path!r}; {listed}. {EXPECTED}')
        return {file: _read(file, skipped) for file in files}
    pattern = os.path.join(glob.escape(root), 'annotations', 'captions_{}*.json')
    coco = [file for split in ('train', 'val') for file in sorted(glob.glob(pattern.format(split)))]
    if coco:
        return {file: _read(file, skipped) for file in coco}
    files = [os.path.join(root, name) for name in names]
    if len(files) > 1:
        files = [file for file in files if _fits(file)]
    if len(files) != 1:
        raise UserError(
            f'config.data.captions: not set, and {len(files)} files fit; {listed}. Name one, or a '
            f"pattern for one a split: --config.data.captions='*.csv'. {EXPECTED}"
        )
    return {files[0]: _read(files[0], skipped)}


def _fits(file: str) -> bool:
    try:
        return bool(_read(file, []))
    except UserError:
        return False


def _places(root: str, row: Row) -> list[str]:
    """Where the image may be; join leaves an absolute path as it is."""
    relative = (os.path.join(row.folder, row.name), row.name, os.path.join('images', row.name))
    return [os.path.join(root, path) for path in relative]


def _place(root: str, file: str, rows: list[Row]) -> int:
    """The index of the place that a file's images are in: that of the first one found."""
    for row in rows:
        for place, path in enumerate(_places(root, row)):
            if os.path.isfile(path):
                return place
    raise UserError(
        f'config.data.root: none of the {len(rows)} images in {file} exists; the first one is '
        f'neither {" nor ".join(dict.fromkeys(_places(root, rows[0])))}.'
    )


def _split(name: str, file: str) -> str:
    split = {'restval': 'train', 'dev': 'validation'}.get(name.lower(), split_of(name))
    if split is None:
        raise UserError(f"{file}: unknown split {name!r}; expected 'train', 'val' or 'test'.")
    return split


def _read(file: str, skipped: Skipped) -> list[Row]:
    """The rows of a file; lines that say nothing are added to `skipped`."""
    try:
        with open(file, encoding='utf-8-sig', newline='') as opened:
            text = opened.read()
        if text.lstrip()[:1] not in ('{', '['):
            rows = list(_table(file, _csv(file, text, skipped), skipped))
        else:
            rows = _json(file, text, skipped)
    except (OSError, csv.Error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f'{file}: unreadable: {error}. {EXPECTED}') from error
    except (KeyError, TypeError, AttributeError) as error:
        what = f'{type(error).__name__}: {error}'
        raise UserError(f'{file}: not the layout that it seems, {what}. {EXPECTED}') from error
    if not rows:
        raise UserError(f'{file}: no images in it. {EXPECTED}')
    return rows


def _json(file: str, text: str, skipped: Skipped) -> list[Row]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != 'Extra data':
            raise
        return list(_table(file, _json_lines(file, text, skipped), skipped))
    if isinstance(data, list):
        return list(_table(file, enumerate(data, 1), skipped))
    if 'images' not in data:
        return list(_table(file, [(1, data)], skipped))
    if 'annotations' not in data:  # Karpathy
        return [
            Row(
                image['filename'],
                [sentence['raw'] for sentence in image['sentences']],
                image.get('split', ''),
                folder=image.get('filepath', ''),
            )
            for image in data['images']
        ]
    stem = os.path.splitext(os.path.basename(file))[0]
    # Beside annotations/captions_train2017.json, the images are in train2017.
    folder = stem.removeprefix('captions_')
    rows = {i['id']: Row(i['file_name'], [], folder=folder) for i in data['images']}
    for annotation in data['annotations']:
        rows[annotation['image_id']].captions.append(annotation['caption'])
    return list(rows.values())


def _json_lines(file: str, text: str, skipped: Skipped) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split('\n'), 1):
        try:
            if line.strip():
                yield number, json.loads(line)
        except json.JSONDecodeError as error:
            skipped.append((f'{os.path.basename(file)} line {number}', f'not JSON: {error}'))


def _csv(file: str, text: str, skipped: Skipped) -> Iterator[tuple[int, dict[str, str]]]:
    header = text.split('\n', 1)[0]
    delimiter = next((d for d in '\t|;,' if d in header), ',')
    # With tabs and bars a quotation mark may open a caption and never close: there it quotes only
    # where the field ends in one too.
    quoting = csv.QUOTE_MINIMAL if delimiter in ',;' else csv.QUOTE_NONE
    lines = csv.reader(
        io.StringIO(text, newline=''), delimiter=delimiter, quoting=quoting, strict=True
    )
    try:
        names = [name.strip() for name in next(lines, [])]
        for line in lines:
            values = [v.strip() for v in line]
            if quoting == csv.QUOTE_NONE:
                values = [v[1:-1].replace('""', '"') if QUOTED.fullmatch(v) else v for v in values]
            if len(values) == len(names):
                yield lines.line_num, dict(zip(names, values, strict=True))
            elif line:
                reason = f'{len(line)} fields, expected {len(names)}'
                skipped.append((f'{os.path.basename(file)} line {lines.line_num}', reason))
    except csv.Error as error:
        raise UserError(f'{file} line {lines.line_num}: {error}. {EXPECTED}') from error


def _table(file: str, lines: Iterable[tuple[int, Any]], skipped: Skipped) -> Iterator[Row]:
    first = True
    for number, line in lines:
        values = {str(key).lower(): value for key, value in line.items()}
        for what, names in (('image', IMAGE), ('caption', CAPTION)):
            if first and not any(name in values for name in names):
                raise UserError(
                    f'{file}: no {what} column; it has {", ".join(map(str, line))}. It may be '
                    f'called {", ".join(names)}; URLs are not fetched. {EXPECTED}'
                )
        first = False
        image, texts, split, label = (
            next((values[name] for name in names if values.get(name) not in (None, '')), '')
            for names in (IMAGE, CAPTION, ('split',), LABEL)
        )
        if not image:
            skipped.append((f'{os.path.basename(file)} line {number}', 'no image'))
            continue
        texts = texts if isinstance(texts, list) else [texts]
        yield Row(str(image), texts, str(split), str(label))
