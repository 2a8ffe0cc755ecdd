"""A collection as an encoder sees it, in one file: a unit row for each picture or text.

As .npz, `rows` [N, D] float32, `paths` or `texts` [N], and what they are: `workdir`, `run`, `step`,
`kind`, `name`, `root`. As .parquet, the first two are columns, the rest is the schema's metadata.
"""

import hashlib
import importlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from contrastive_jax.config import ROLES, UserError
from contrastive_jax.data.bad_records import BadRecords
from contrastive_jax.data.sources import folder
from contrastive_jax.inference import Trained

KINDS = {'images': 'paths', 'texts': 'texts'}
EVERY = 10  # seconds between lines of progress
KEY = b'contrastive_jax'  # of the metadata


class About(NamedTuple):
    """Origin of an index: `kind` of the KINDS, `name` of the encoder's outputs.

    `root` is the directory that paths are relative to, '' for texts; `run` says which run of
    `workdir` it was, by its config.
    """

    workdir: str
    run: str
    step: int
    kind: str
    name: str
    root: str


class Index(NamedTuple):
    """rows_ND float32 of length 1; items, the N paths or texts."""

    rows_ND: np.ndarray
    items: list[str]
    about: About


def of_images(encoder: Trained, root: str, name: str, max_bad: float) -> Index:
    """The pictures (JPEG, PNG, WebP) below a directory, sorted by their paths in it.

    Several processes read a share each and have the same result.

    Args:
        encoder: the encoder.
        root: the directory. Hidden files are ignored, links are followed.
        name: one of the encoder's outputs.
        max_bad: a larger share of unusable pictures is an error; they are left out and logged.

    Raises:
        UserError: an encoder of something else; no directory, no pictures, too many unusable
            ones, no such output.
    """
    if 'image' not in encoder.inputs.eval.shapes:
        reads = ', '.join(encoder.inputs.eval.shapes)
        raise UserError(f'--images: {encoder.workdir} encodes {reads}, not images.')
    root = os.path.abspath(os.path.expanduser(root))
    if not os.path.isdir(root):
        raise UserError(f'--images: {root!r} is no directory.')
    paths = sorted(path.replace(os.sep, '/') for path in folder.walk(root, ''))
    if not paths:
        raise UserError(f'--images: there is no JPEG, PNG or WebP file below {root!r}.')
    bad = BadRecords(None, len(paths), max_bad)
    source = folder.Folder(root, paths, [-1] * len(paths), [])
    batches = encoder.records(source, bad, name, **_processes())
    rows_ND, used_N = _collected(batches, len(paths), encoder.outputs[name], 'images')
    skipped = int((~used_N).sum())
    # A process knows of its own share alone.
    if skipped > max_bad * len(paths) or skipped == len(paths):
        raise UserError(f'{skipped} of {len(paths)} pictures cannot be used; see above.')
    if skipped:
        logging.warning('%d of %d pictures cannot be used and are left out', skipped, len(paths))
        rows_ND, paths = rows_ND[used_N], [p for p, used in zip(paths, used_N, strict=True) if used]
    return Index(unit(rows_ND), paths, _about(encoder, 'images', name, root))


def of_texts(encoder: Trained, path: str) -> Index:
    """The lines of a UTF-8 file: row i is line i + 1.

    Raises:
        UserError: no such file, not UTF-8, no line, an empty line; the method reads no texts.
    """
    try:
        lines = epath.Path(path).read_bytes().decode('utf-8-sig').split('\n')
    except OSError as error:
        raise UserError(f'--texts: {path}: {error.strerror}') from error
    except UnicodeDecodeError as error:
        raise UserError(f'--texts: {path}: not UTF-8 ({error}).') from error
    lines = [line.strip() for line in lines[:-1] + [line for line in lines[-1:] if line]]
    if not all(lines):
        numbers = [i for i, line in enumerate(lines, 1) if not line]
        more = f' (and {len(numbers) - 1} others)' if len(numbers) > 1 else ''
        raise UserError(f'--texts: {path}: line {numbers[0]}{more} is empty; a text is one line.')
    if not lines:
        raise UserError(f'--texts: {path} is empty.')
    batches = encoder.sentences(lines, **_processes())
    rows_ND, _ = _collected(batches, len(lines), encoder.outputs['embedding'], 'texts')
    if cut := encoder.tokenizer.truncated:
        logging.warning(
            '%d texts have more than %d tokens and are cut', cut, encoder.tokenizer.length
        )
    return Index(unit(rows_ND), lines, _about(encoder, 'texts', 'embedding', ''))


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays one.

    Raises:
        UserError: a number is NaN or infinite.
    """
    if not np.isfinite(x_ND).all():
        raise UserError('the encoder gives rows that are NaN or infinite.')
    norm_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    return x_ND / np.where(norm_N1 > 0, norm_N1, 1)


def nearest(index: Index, query_MD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosines [M, k], rows [M, k]), the largest first, of equal ones the first; k is at most N."""
    scores_MN = unit(query_MD) @ index.rows_ND.T
    rows_Mk = np.argsort(-scores_MN, axis=1, kind='stable')[:, :k]
    return np.take_along_axis(scores_MN, rows_Mk, 1), rows_Mk


def check(index: Index, encoder: Trained) -> None:
    """Logs a warning where another step of the encoder made an index.

    Raises:
        UserError: another run did.
    """
    ours, theirs = _about(encoder, *index.about[3:]), index.about
    got = index.rows_ND.shape[1]
    if ours.run != theirs.run or got != encoder.outputs.get(theirs.name):
        has = ', '.join(f'{name} {size}' for name, size in encoder.outputs.items())
        raise UserError(
            f'--index: made by another run, {theirs.workdir}, of its {theirs.name} ({got} '
            f'dimensions); {encoder.workdir} has {has}.'
        )
    if ours.step != theirs.step:
        message = 'the index was made at step %d, %s is now at step %d: make it again'
        logging.warning(message, theirs.step, encoder.workdir, ours.step)


def prepare(path: str) -> None:
    """Makes the directory of an index that is to be written, before the work is done.

    Raises:
        UserError: it cannot be made; a name that `write` does not know; no pyarrow for it.
    """
    _check_path(path)
    try:
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'index: {error.filename}: {error.strerror}') from error


def write(index: Index, path: str) -> None:
    """Writes an index, whole or not at all; raises what `prepare` does."""
    prepare(path)
    rows_ND, items, about = index
    file = epath.Path(path)
    temporary = file.with_name(f'.{file.name}.{os.getpid()}.tmp')
    column = KINDS[about.kind]
    try:
        with temporary.open('wb') as out:
            if file.suffix == '.npz':
                arrays: dict[str, Any] = {'rows': rows_ND, column: np.array(items, str)}
                np.savez(out, **arrays, **about._asdict())
            else:
                pa, parquet = _parquet()
                rows = pa.FixedSizeListArray.from_arrays(rows_ND.ravel(), rows_ND.shape[1])
                table = pa.table({column: items, 'rows': rows})
                said = {KEY: json.dumps(about._asdict())}
                parquet.write_table(table.replace_schema_metadata(said), out)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str) -> Index:
    """Reads what `write` has written.

    Raises:
        UserError: no such file, not an index.
    """
    _check_path(path)
    if not epath.Path(path).exists():
        raise UserError(f'index: {path!r} does not exist.')
    try:
        with epath.Path(path).open('rb') as file:
            if path.endswith('.npz'):
                with np.load(file) as found:
                    about = About(**{key: found[key].item() for key in About._fields})
                    return Index(found['rows'], found[KINDS[about.kind]].tolist(), about)
            table = _parquet()[1].read_table(file)
            about = About(**json.loads(table.schema.metadata[KEY]))
            rows = table['rows'].combine_chunks()
            rows_ND = rows.flatten().to_numpy().reshape(len(table), -1)
            return Index(rows_ND, table[KINDS[about.kind]].to_pylist(), about)
    except UserError:
        raise
    except Exception as error:  # NumPy's and Arrow's have nothing in common
        raise UserError(f'index: {path!r} is no index of ours ({error}).') from error


def _collected(
    batches: Iterator[tuple[np.ndarray, np.ndarray]], count: int, size: int, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """(rows_ND, used_N) of all processes, on every process."""
    rows_ND, used_N = np.zeros((count, size), np.float32), np.zeros(count, bool)
    start = said = time.monotonic()
    done = 0
    for batch in batches:
        # Batch by batch, so that no process runs far ahead: collectives do not wait for ever.
        x_BD, used_B = map(_everyone, batch)
        x_BD, used_B = x_BD[: count - done], used_B[: count - done]
        rows_ND[done : done + len(x_BD)], used_N[done : done + len(x_BD)] = x_BD, used_B
        done += len(x_BD)
        now = time.monotonic()
        if now - said > EVERY and jax.process_index() == 0:
            said, rate = now, done / (now - start)
            left = (count - done) / rate / 60
            so_far = f'{done:,} of {count:,} {what}'
            logging.info('%s, %.0f/s, %.1f minutes left', so_far, rate, left)
    return rows_ND, used_N


def _everyone(x: np.ndarray) -> np.ndarray:
    """The rows of all processes, one after another."""
    one = jax.process_count() == 1
    return x if one else np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _processes() -> dict[str, int]:
    return {'process_index': jax.process_index(), 'process_count': jax.process_count()}


def _about(encoder: Trained, kind: str, name: str, root: str) -> About:
    kept = {k: v for k, v in encoder.identity().items() if k not in ROLES['free']}
    run = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
    workdir = os.fspath(epath.Path(encoder.workdir).absolute())
    return About(workdir, run, encoder.step, kind, name, root)


def _check_path(path: str) -> None:
    suffix = os.path.splitext(path)[1]
    if suffix not in ('.npz', '.parquet'):
        raise UserError(f'index: got {path!r}; expected a name that ends in .npz or .parquet.')
    if suffix == '.parquet':
        _parquet()


def _parquet() -> tuple[Any, Any]:
    try:
        return importlib.import_module('pyarrow'), importlib.import_module('pyarrow.parquet')
    except ImportError as error:
        raise UserError(f'index: .parquet needs pyarrow ({error}): pip install pyarrow') from error
