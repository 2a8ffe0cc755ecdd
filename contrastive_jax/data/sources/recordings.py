"""A folder of WAV, FLAC and Ogg files, with labels from the names of files or of folders.

    --config.data.source='recordings:{digit}_{speaker}_*' --config.data.root=DIR

Files lie below the root, or below its train, test and val or validation, at any depth. The pattern
is of the end of a path without its suffix: what stands at {digit} is the file's class of the label
'digit', * is anything, / parts folders. LibriSpeech's speakers are 'recordings:{speaker}/*/*'.
Without a pattern the first folder is the class of 'label': root / train / CLASS / ... / file.wav.
"""

import os
import re
from collections.abc import Mapping

from absl import logging

from contrastive_jax.config import UserError
from contrastive_jax.data import Record, Source, sound, with_test
from contrastive_jax.data.sources.folder import open_root, walk

# Sound files that nothing here reads, so that they are named and not passed over.
OTHERS = ('.aac', '.aif', '.aiff', '.au', '.m4a', '.mp3', '.opus', '.w64', '.wma')
EXPECTED = (
    f'Expected: {", ".join(sound.SUFFIXES)} below ROOT, or ROOT/train and ROOT/test (or val, '
    "validation); labels from names, 'recordings:{digit}_{speaker}_*', or from folders, "
    'ROOT/train/CLASS/recording.wav.'
)
FOLDERS, ANY = re.compile(r'(?P<label>[^/]+)/.+'), re.compile('.+')
# What batches call arrays of their own.
TAKEN = ('index', 'mask', 'place', 'rate', 'text', 'views', 'wave', 'x')


class Recordings:
    """Sound files below one directory.

    Args:
        root: for `describe`, paths are relative to it.
        files: path -> label -> class, by its name.
        classes: label -> the names of its classes.
        skipped: (path, reason) of files that are left out.
    """

    def __init__(
        self,
        root: str,
        files: Mapping[str, Mapping[str, str]],
        classes: dict[str, list[str]],
        skipped: list[tuple[str, str]],
    ):
        self.root, self.paths, self.classes, self.skipped = root, list(files), classes, skipped
        number = {k: {name: i for i, name in enumerate(names)} for k, names in classes.items()}
        self._labels = [{k: number[k][own[k]] for k in classes} for own in files.values()]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        wave, rate = sound.read(os.path.join(self.root, self.paths[index]))
        return {'wave': wave, 'rate': rate, **self._labels[index]}

    def describe(self, index: int) -> str:
        return self.paths[index]


def make(argument: str = '', root: str = '', holdout: float = 0.1) -> dict[str, Source]:
    """Opens the splits below a root.

    A label's classes are those of all splits, sorted by name. Files that the pattern does not match
    are left out and listed.

    Args:
        argument: the pattern; '': labels from folders, or none where there are no folders.
        root: the directory.
        holdout: share of train that serves as test where there is no test, val or validation.

    Raises:
        UserError: a pattern that cannot be read, or that no file of a split matches; root not set,
            missing or without recordings; FLAC or Ogg files without soundfile.
    """
    pattern = compiled(argument) if argument else FOLDERS
    root, folders = open_root(root, 'recordings', EXPECTED)
    listed = {split: _list(root, folder) for split, folder in (folders or {'train': ''}).items()}
    if not argument and not any(map(pattern.fullmatch, listed['train'].values())):
        pattern = ANY
    mismatch = f'does not match {argument!r}' if argument else 'beside the class folders'
    found = {s: _matched(root, s, files, pattern, mismatch) for s, files in listed.items()}
    classes: dict[str, list[str]] = {}
    for label in pattern.groupindex:
        there = {s: {own[label] for own in files.values()} for s, (files, _) in found.items()}
        classes[label] = sorted(set().union(*there.values()))
        for split, names in there.items():
            if strange := sorted(names - there['train']):
                some = ', '.join(strange[:5])
                logging.warning(
                    '%s: %d classes of %s that train has not: %s', split, len(strange), label, some
                )
    splits = {s: Recordings(root, files, classes, out) for s, (files, out) in found.items()}
    train = splits['train']
    return with_test({**splits}, holdout, lambda i: train.paths[i].replace(os.sep, '/'), root)


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern as an expression of a whole path, with a group for every field.

    Raises:
        UserError: no field, one that comes twice, or a name that cannot be a label's.
    """
    stem, suffix = os.path.splitext(pattern)
    parts = re.split(r'(\{.*?\}|\*)', stem if suffix in sound.SUFFIXES else pattern)
    expression, names = '(?:.*/)?', set()
    for part in parts:
        if not re.fullmatch(r'\{.*\}', part):
            expression += '[^/]*' if part == '*' else re.escape(part)
            continue
        name = part[1:-1]
        if not name.isidentifier() or name in TAKEN or name in names:
            raise UserError(
                f'config.data.source: {part} in {pattern!r} cannot be a label; expected different '
                f'words, none of {", ".join(TAKEN)}. * stands for what is no label.'
            )
        expression += f'(?P<{name}>[^/]+?)'
        names.add(name)
    if not names:
        raise UserError(f'config.data.source: {pattern!r} names no label. {EXPECTED}')
    return re.compile(expression)


def _list(root: str, folder: str) -> dict[str, str]:
    """Path from the root -> path below the folder, without suffix, of every sound file."""
    paths, place = walk(root, folder, sound.SUFFIXES + OTHERS), os.path.join(root, folder)
    if not paths:
        has = ', '.join(sorted(os.listdir(place))[:5]) or 'nothing'
        raise UserError(f'config.data.root: no recordings in {place!r} (it has {has}). {EXPECTED}')
    others = sum(path.lower().endswith(sound.SUFFIXES[1:]) for path in paths)
    if others and not sound.has_soundfile():
        raise UserError(
            f'config.data.root: {others} of {len(paths)} files in {place!r} are not WAV. '
            f'{sound.INSTALL}.'
        )
    stems = [os.path.splitext(os.path.relpath(path, folder or '.'))[0] for path in paths]
    return {path: stem.replace(os.sep, '/') for path, stem in zip(paths, stems, strict=True)}


def _matched(
    root: str, split: str, files: dict[str, str], pattern: re.Pattern[str], mismatch: str
) -> tuple[dict[str, dict[str, str]], list[tuple[str, str]]]:
    """(path -> label -> class, (path, reason) of those that are left out)."""
    found, skipped = {}, []
    for path, below in files.items():
        if not path.lower().endswith(sound.SUFFIXES):
            skipped.append((path, 'not a WAV, FLAC or Ogg file'))
        elif match := pattern.fullmatch(below):
            found[path] = match.groupdict()
        else:
            skipped.append((path, mismatch))
    first = ': '.join(skipped[0]) if skipped else ''
    if not found:
        raise UserError(
            f'config.data.root: none of the {len(files)} recordings of {split} in {root!r} can be '
            f'used, {first}. {EXPECTED}'
        )
    if skipped:
        logging.warning(
            '%s: %d files of %s are left out, first %s', root, len(skipped), split, first
        )
    return found, skipped
