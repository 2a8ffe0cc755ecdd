"""A folder of JPEG, PNG and WebP files, with or without splits and classes.

Understood, each level optional: root / train, test, val or validation / class / ... / image.
Hidden files and folders are ignored; symbolic links are followed; the order is sorted by path.
"""

import os

from absl import logging

from contrastive_jax.config import UserError
from contrastive_jax.data import (
    BadRecord,
    Record,
    Source,
    hold_out,
    labelled,
    reject_argument,
    with_test,
)
from contrastive_jax.data.decode import decode

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')
SPLITS = {'train': ('train',), 'test': ('test',), 'validation': ('val', 'validation')}
EXPECTED = (
    'Expected: ROOT/train/CLASS/image.jpg and ROOT/test/CLASS/image.jpg (or val, validation), '
    'ROOT/CLASS/image.jpg, or images directly in ROOT; JPEG, PNG or WebP.'
)


class Folder:
    """Image files below one directory.

    Args:
        root: for `describe`, names are relative to it.
        paths: the files, relative to root.
        labels: one label a file.
        classes: class names, in label order.
    """

    def __init__(self, root: str, paths: list[str], labels: list[int], classes: list[str]):
        self.root, self.paths, self.labels = root, paths, labels
        self.classes = labelled(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The file as it is."""
        try:
            with open(os.path.join(self.root, self.paths[index]), 'rb') as file:
                return file.read()
        except OSError as error:
            raise BadRecord(f'unreadable: {error.strerror}') from error

    def __getitem__(self, index: int) -> Record:
        return {'image': decode(self.read(index)), 'label': self.labels[index]}

    def describe(self, index: int) -> str:
        return self.paths[index]


def make(argument: str = '', root: str = '', holdout: float = 0.1) -> dict[str, Source]:
    """Opens the splits below a root.

    Args:
        argument: must be empty.
        root: the directory.
        holdout: share of train that serves as test where there is no test, val or validation.

    Raises:
        UserError: root not set, missing, without images, or with splits whose classes disagree.
    """
    reject_argument(argument, 'folder')
    root, split_folders = open_root(root, 'folder', EXPECTED)
    if not split_folders:
        source = _scan(root, '', None)
        return hold_out(source, holdout, lambda i: source.paths[i].replace(os.sep, '/'), root)
    train = _scan(root, split_folders['train'], None)
    splits: dict[str, Source] = {'train': train}
    for split, name in split_folders.items():
        if split != 'train':
            splits[split] = _scan(root, name, train)
    return with_test(splits, holdout, lambda i: train.paths[i].replace(os.sep, '/'), root)


def open_root(root: str, source: str, expected: str) -> tuple[str, dict[str, str]]:
    """A root and the names of the folders in it that are splits, none where nothing is split.

    Args:
        root: config.data.root.
        source: the name of the source that needs it.
        expected: which files where; ends the errors.

    Raises:
        UserError: root not set or missing; splits without train.
    """
    if not root:
        raise UserError(
            f'config.data.root: not set; the {source} source needs it: --config.data.root=DIR. '
            f'{expected}'
        )
    root = os.path.expanduser(str(root))
    if not os.path.isdir(root):
        what = 'is a file, not a directory' if os.path.isfile(root) else 'does not exist'
        raise UserError(f'config.data.root: {root!r} {what}. {expected}')
    found = {e.name.lower(): e.name for e in _entries(root) if e.is_dir()}
    folders = {
        split: found[name] for split, names in SPLITS.items() for name in names if name in found
    }
    if 'train' not in folders:
        if folders and len(found) == len(folders):
            raise UserError(
                f'config.data.root: {root!r} has {sorted(folders.values())} but no train '
                f'folder. {expected}'
            )
        return root, {}
    if others := sorted(set(found.values()) - set(folders.values())):
        logging.warning('%s: not a split, ignored: %s', root, ', '.join(others))
    return root, folders


def _entries(path: str) -> list[os.DirEntry]:
    """The entries that are not hidden, sorted by name."""
    with os.scandir(path) as entries:
        return sorted((e for e in entries if not e.name.startswith('.')), key=lambda e: e.name)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def walk(
    root: str,
    relative: str,
    suffixes: tuple[str, ...] = SUFFIXES,
    seen: frozenset[str] = frozenset(),
) -> list[str]:
    """Every file of these kinds below root/relative, relative to root; cycles of links are cut."""
    path = os.path.join(root, relative)
    real = os.path.realpath(path)
    if real in seen:
        return []
    files = []
    for entry in _entries(path):
        name = os.path.join(relative, entry.name)
        # By name first: a directory called x.jpg and a dangling link are records, and bad ones.
        if entry.name.lower().endswith(suffixes):
            files.append(name)
        elif entry.is_dir():
            files += walk(root, name, suffixes, seen | {real})
    return files


def _scan(root: str, relative: str, train: Folder | None) -> Folder:
    """The images of one split; `train` gives the classes that the other splits must keep to."""
    path = os.path.join(root, relative)
    entries = _entries(path)
    loose = [os.path.join(relative, e.name) for e in entries if _is_image(e.name)]
    folders = [e.name for e in entries if not _is_image(e.name) and e.is_dir()]
    found = {name: walk(root, os.path.join(relative, name)) for name in folders}
    found = {name: files for name, files in found.items() if files}
    if not found and not loose:
        names = [e.name for e in entries]
        more = f' and {len(names) - 5} more' if len(names) > 5 else ''
        has = f'it has {", ".join(names[:5])}{more}' if names else 'it is empty'
        raise UserError(f'config.data.root: no image files in {path!r} ({has}). {EXPECTED}')
    if found and loose:
        logging.warning('%s: %d images beside the class folders are ignored', path, len(loose))
    classes = list(found) if train is None else train.classes.get('label', [])
    if train is not None:
        strange = [name for name in found if name not in classes]
        if strange:
            raise UserError(
                f'config.data.root: {path!r} has classes that train has not: '
                f'{", ".join(strange[:5])}. Train has {len(classes)} classes'
                f'{": " + ", ".join(classes[:5]) if classes else ""}.'
            )
        if classes and not found:
            raise UserError(
                f'config.data.root: {path!r} has images without class folders, but train has '
                f'{len(classes)} classes: {", ".join(classes[:5])}.'
            )
    if not found:
        return Folder(root, loose, [-1] * len(loose), [])
    files = [file for name in found for file in found[name]]
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [label_of[name] for name in found for _ in found[name]]
    return Folder(root, files, labels, classes)
