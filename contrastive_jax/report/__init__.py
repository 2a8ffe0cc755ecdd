"""A run, or several side by side, as one HTML page: `python -m contrastive_jax.report`.

Everything comes from the workdir; neither the data nor an accelerator is needed.
"""

import json
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from contrastive_jax.config import defaults, flatten
from contrastive_jax.workdir import checkpoint, environment, records


class Run(NamedTuple):
    """The contents of a workdir.

    Attributes:
        name: for people, unique among the runs of a page.
        workdir: its path.
        config: flat, 'method.temperature' -> JSON value.
        records: of metrics.jsonl.
        environment: see `environment.record`; {} for runs that are older than it.
        bad: (record, reason) of what cannot be used of the data.
        parameters: how many are trained, '' if unknown.
        measures: how to print evaluators' numbers.
        shown: inputs.png (views.png of earlier versions), if it is there.
        pictures: folder ('step_200', 'baseline') -> '<evaluator>_<name>' -> PNG.
        newest: the folder of the newest step, '' where there is none.
    """

    name: str
    workdir: str
    config: dict[str, Any]
    records: list[dict[str, Any]]
    measures: dict[str, tuple[str, str]]
    environment: dict[str, Any]
    bad: list[tuple[str, str]]
    parameters: str
    shown: bytes | None
    pictures: dict[str, dict[str, bytes]]
    newest: str

    @property
    def step(self) -> int:
        """The last one that is recorded."""
        return max((r['step'] for r in self.records), default=0)

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, None where they depend on data that nothing is known of."""
        if self.config['total_steps']:
            return self.config['total_steps']
        images = self.environment.get('data', {}).get('splits', {}).get('train')
        epochs, batch = self.config['total_epochs'], self.config['batch_size']
        return round(epochs * images / batch) if images else None


def read(workdirs: Sequence[str]) -> list[Run]:
    """The runs in these workdirs, paths or URLs.

    Raises:
        UserError: there is no run in one of them, or its records are damaged.
    """
    short = [os.path.basename(os.path.normpath(w)) for w in workdirs]
    names = [s if short.count(s) == 1 else w for s, w in zip(short, workdirs, strict=True)]
    return [_read(name, workdir) for name, workdir in zip(names, workdirs, strict=True)]


def _read(name: str, workdir: str) -> Run:
    path = epath.Path(workdir)
    given = checkpoint.read(workdir)
    config = defaults() | flatten(given)
    # Named without options: flattened, nothing would be left of them.
    named = {'evals': given.get('evals', {}), 'inputs.augment': given['inputs'].get('augment', {})}
    for key, options in named.items():
        config |= {f'{key}.{name}': {} for name, how in options.items() if not how}
    total = re.search(r'Total: ([\d,]+)', _text(path / 'parameters.txt'))
    pictures = _pictures(path / 'pictures')
    steps = [int(found[1]) for f in pictures if (found := re.fullmatch(r'step_(\d+)', f))]
    shown = next((p for n in ('inputs.png', 'views.png') if (p := path / n).exists()), None)
    return Run(
        name,
        str(workdir),
        config,
        records.read(workdir),
        records.described(workdir),
        environment.read(workdir),
        _bad(_text(path / 'bad_records.jsonl')),
        total[1] if total else '',
        shown.read_bytes() if shown else None,
        pictures,
        f'step_{max(steps)}' if steps else '',
    )


def _text(path: epath.Path) -> str:
    return path.read_text() if path.exists() else ''


def _pictures(folder: epath.Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for inner in sorted(folder.iterdir()) if folder.exists() else ():
        files = sorted(f for f in inner.iterdir() if re.fullmatch(r'[^.].*\.png', f.name))
        found[inner.name] = {f.name.removesuffix('.png'): f.read_bytes() for f in files}
    return found


def _bad(text: str) -> list[tuple[str, str]]:
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            found.append((str(entry['record']), str(entry['reason'])))
        except (ValueError, KeyError, TypeError):  # cut by a kill
            continue
    return found
