"""The register of records that could not be used."""

import json
import os
import threading
from collections.abc import Mapping
from typing import Any

from absl import logging

from contrastive_jax.config import UserError, check_range
from contrastive_jax.data import Source


class BadRecords:
    """The distinct records that could not be used: counted, listed in a file, limited in number.

    Thread-safe. Processes that share the file follow each other's entries.

    Args:
        path: a JSONL file, `workdir/bad_records.jsonl`, one {"record": ..., "reason": ...} a line;
            what an earlier run listed there is counted and not listed again. None: no file.
        total: number of records of all splits.
        max_fraction: more than max_fraction × total bad records stop the run. In a set of fewer
            than 1 / max_fraction records the first bad one does.

    Raises:
        UserError: max_fraction outside [0, 1].
    """

    def __init__(self, path: str | os.PathLike | None, total: int, max_fraction: float = 0.01):
        check_range('bad records', {'max_fraction': max_fraction}, least=0, most=1)
        self.path, self.total, self.max_fraction = path, total, max_fraction
        self._reasons: dict[str, str] = {}
        self._notes: set[str] = set()
        self._read = 0
        self._lock = threading.Lock()
        self._follow()

    @property
    def count(self) -> int:
        """Distinct bad records so far, those of earlier runs in this file included."""
        return len(self._reasons)

    def add(self, record: str, reason: str) -> None:
        """Registers a record.

        Raises:
            UserError: there are now too many; the first few are named.
        """
        with self._lock:
            if record not in self._reasons:
                self._follow()
            if record not in self._reasons:
                self._reasons[record] = reason
                logging.warning('bad record %s: %s', record, reason)
                self._write({'record': record, 'reason': reason})
            if self.count > self.max_fraction * self.total:
                first = [f'\n  {r}: {why}' for r, why in list(self._reasons.items())[:5]]
                where = f' (all in {self.path})' if self.path is not None else ''
                raise UserError(
                    f'{self.count} of {self.total} records cannot be used, more than '
                    f'{100 * self.max_fraction:g} %. The first{where}:{"".join(first)}\n'
                    'Mend or remove them and delete that list, or allow more.'
                )

    def note(self, record: str, reason: str) -> None:
        """Lists what was left out of a record that can be used; it does not count."""
        with self._lock:
            self._follow()
            if record not in self._notes:
                self._notes.add(record)
                logging.warning('left out %s: %s', record, reason)
                self._write({'record': record, 'reason': reason, 'usable': True})

    def note_skipped(self, splits: Mapping[str, Source]) -> None:
        """Lists what the sources themselves have left out."""
        for source in splits.values():
            for record, reason in getattr(source, 'skipped', ()):
                self.note(record, reason)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.path is None:
            return
        # One write in append mode, so that lines of several processes do not mix.
        line = json.dumps(entry) + '\n'
        with open(self.path, 'ab', buffering=0) as file:
            if file.tell() > self._read:  # the last line was cut by a kill
                line = '\n' + line
            file.write(line.encode())

    def _follow(self) -> None:
        """Reads the lines that others, or earlier runs, have added to the file."""
        if self.path is None or not os.path.exists(self.path):
            return
        with open(self.path, 'rb') as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b'\n'):  # a line that is being written, or was cut by a kill
                    break
                self._read += len(line)
                try:
                    entry = json.loads(line)
                    if entry.get('usable'):
                        self._notes.add(entry['record'])
                    else:
                        self._reasons.setdefault(entry['record'], entry['reason'])
                except (ValueError, KeyError, TypeError):
                    continue
