"""Records of a run: metrics.jsonl, TensorBoard events, the progress line and the closing table."""

import contextlib
import importlib.util
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from contrastive_jax.config import UserError, renamed

FILE = 'metrics.jsonl'
MEASURES = 'measures.json'
BASELINE = 'baseline_'  # prefix of its metrics' names
COLUMNS = ('baseline', 'untrained', 'trained')

Measures = Mapping[str, tuple[str, str]]


class Writer:
    """Appends to `workdir/metrics.jsonl` one JSON object a log event, and TensorBoard events.

    Other processes than the first write nothing.
    """

    def __init__(self, workdir: str, *, tensorboard: bool = False, enabled: bool | None = None):
        """
        Args:
            workdir: an existing directory, or a bucket's URL.
            tensorboard: whether to write events for TensorBoard, too. Needs TensorFlow, which is
                imported at the first write.
            enabled: whether this process writes; by default the first does.

        Raises:
            UserError: tensorboard without TensorFlow and TensorBoard (clu's writer needs both).
        """
        self._enabled = jax.process_index() == 0 if enabled is None else enabled
        self._workdir, self._tensorboard, self._events = workdir, tensorboard, None
        for package in ('tensorflow', 'tensorboard') if tensorboard else ():
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f'config.tensorboard: got True, but {package} is not installed. Install it by '
                    "`pip install 'contrastive-jax[tensorflow]'`; metrics.jsonl needs neither."
                )

    def resume(self, step: int) -> None:
        """Drops records of later steps than the one the run continues at, so that none is double.

        At step 0 nothing was saved, and everything starts anew.
        """
        path = epath.Path(self._workdir) / FILE
        if not self._enabled or not path.exists():
            return
        kept = [r for r in read(self._workdir) if r['step'] <= step] if step > 0 else []
        # A rename is atomic: whenever the process is killed, the old file is whole or the new one.
        temporary = path.with_name(f'{FILE}.tmp')
        temporary.write_text(''.join(_line(r) for r in kept))
        temporary.replace(path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Records values of a step; what is not finite becomes null, because NaN is not JSON."""
        if not self._enabled:
            return
        record = {'step': int(step)} | {k: _finite(v) for k, v in values.items()}
        append(epath.Path(self._workdir) / FILE, _line(record))
        if self._tensorboard:
            if self._events is None:
                self._events = _tensorboard(self._workdir)
            self._events.write_scalars(step, {k: float(v) for k, v in values.items()})
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


def read(workdir: str) -> list[dict[str, Any]]:
    """The records of a run, in the order written; none where there is no file.

    A last line that a killed process left unfinished is passed over.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f'{path}, line {number}: not JSON ({error}).') from error
            continue
        records.append({renamed(key): value for key, value in record.items()})
    return records


def append(path: epath.Path, line: str) -> None:
    """Adds a line to a file. A bucket's objects cannot grow: there it is written anew."""
    if '://' in str(path):
        path.write_text((path.read_text() if path.exists() else '') + line)
    else:
        with open(path, 'a+b') as file:
            file.seek(0, 2)
            if file.tell():
                file.seek(-1, 2)
                if file.read() != b'\n':  # a killed process left a line unfinished
                    file.seek(0)
                    file.truncate(file.read().rfind(b'\n') + 1)
            file.write(line.encode())


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + '\n'


def _finite(value: Any) -> int | float | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _tensorboard(workdir: str) -> Any:
    import tensorflow as tf

    # TensorFlow must not take the accelerators' memory, which JAX needs.
    for kind in ('GPU', 'TPU'):
        tf.config.set_visible_devices([], kind)
    from clu import metric_writers

    return metric_writers.SummaryWriter(workdir)


class Progress:
    """Speed and time left.

    Examples per second are those of training alone: neither compilation (all up to the first step)
    counts nor what happens within `pause` (evaluation, checkpoints). The time left does include
    pauses, as many as there were so far.
    """

    def __init__(self, start: int, total: int, batch_size: int):
        """
        Args:
            start: the step the run starts or continues at.
            total: the last step.
            batch_size: records a step, over all devices.
        """
        self._total, self._batch_size = total, batch_size
        self._step, self._origin = start, None
        self._time = self._mark_time = 0.0
        self._mark_step = start
        self._paused = self._mark_paused = 0.0
        self._rate: float | None = None
        self._left: float | None = None

    def step(self, step: int) -> None:
        """Says that a step has been made, or been given to the devices."""
        self._step = step
        if self._origin is None:
            self._origin = step
            self._time = self._mark_time = time.monotonic()
            self._mark_step = step

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Does not count the time within as training."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    def values(self) -> dict[str, float]:
        """Examples per second since the last call; nothing before the second step."""
        if self._origin is None or self._step <= self._mark_step:
            return {}
        now = time.monotonic()
        spent = now - self._mark_time - (self._paused - self._mark_paused)
        steps = self._step - self._mark_step
        self._rate = steps * self._batch_size / max(spent, 1e-9)
        # The whole run so far, because a single stretch may be exceptional.
        self._left = (self._total - self._step) * (now - self._time) / (self._step - self._origin)
        self._mark_time, self._mark_step, self._mark_paused = now, self._step, self._paused
        return {'train/examples_per_second': self._rate}

    def line(self, values: Mapping[str, float], bad: int = 0) -> str:
        """The log line of a step, after `values()`.

        'step 300/2000  loss 3.412  lr 0.0012  812 examples/s  1:42 left'

        Args:
            values: metrics; 'train/loss' and 'train/learning_rate' are shown.
            bad: records that could not be used, shown if any.
        """
        parts = [f'step {self._step}/{self._total}']
        if 'train/loss' in values:
            parts.append(f'loss {values["train/loss"]:.4g}')
        if 'train/learning_rate' in values:
            parts.append(f'lr {values["train/learning_rate"]:.2g}')
        if self._rate is not None and self._left is not None:
            digits = 0 if self._rate >= 10 else 1
            parts += [f'{self._rate:,.{digits}f} examples/s', f'{_duration(self._left)} left']
        if bad:
            parts.append(f'{bad} bad records')
        return '  '.join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f'{days} d {hours} h'
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def describe(workdir: str, measures: Measures) -> None:
    """Adds to `workdir/measures.json` how evaluators' numbers are to be printed.

    Args:
        workdir: of the run.
        measures: '<evaluator>/<metric>' -> title, '' for a number that is in no table, and unit.
            Of a title that is there already, the evaluator's name becomes a part.
    """
    path = epath.Path(workdir) / MEASURES
    both = described(workdir) | {key: (title, unit) for key, (title, unit) in measures.items()}
    titles: set[str] = set()
    for key, (title, unit) in both.items():
        # Of one evaluator with other options: the table has a row for each.
        if title in titles:
            both[key] = (title := f'{title}, {key.partition("/")[0]}', unit)
        titles |= {title} - {''}
    temporary = path.with_name(f'{MEASURES}.tmp')
    temporary.write_text(json.dumps(both, indent=1) + '\n')
    temporary.replace(path)


def described(workdir: str) -> dict[str, tuple[str, str]]:
    """The content of measures.json; nothing where a run is older than that."""
    path = epath.Path(workdir) / MEASURES
    found = json.loads(path.read_text()) if path.exists() else {}
    return {key: (title, unit) for key, (title, unit) in found.items()}


def summary(workdir: str, held_out: int) -> None:
    """Prints the closing table of all measures that have a title, and writes it to results.json.

    Args:
        workdir: of a run with records of an evaluation.
        held_out: records of the test split.
    """
    found = evaluations(read(workdir))
    titled = {key: about for key, about in described(workdir).items() if about[0] and key in found}
    if not titled:
        return
    # In the order of the evaluators.
    keys = [key for key in found if key in titled]
    print(f'\nOn {held_out} held-out records; % unless said otherwise, frozen unless fine-tuned\n')
    some = [i for i in range(len(COLUMNS)) if any(found[key][i] is not None for key in keys)]
    rows = {titled[key]: [found[key][i] for i in some] for key in keys}
    print(table(rows, [COLUMNS[i] for i in some]), flush=True)
    results = {titled[key][0]: dict(zip(COLUMNS, found[key], strict=True)) for key in keys}
    (epath.Path(workdir) / 'results.json').write_text(json.dumps(results, indent=2) + '\n')


def evaluations(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """'<evaluator>/<metric>' -> its newest value for each of COLUMNS, None where there is none."""
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    for record in records:
        values = {k: v for k, v in record.items() if k.startswith('eval/')}
        if record['step'] == 0:
            first |= values
        else:
            last |= values
    found: dict[str, list[float | None]] = {}
    names = list(last or first)
    evaluators = list(dict.fromkeys(key.split('/')[1] for key in names))
    # Evaluators that came later may have more to say of what is there.
    for key in sorted(names, key=lambda key: evaluators.index(key.split('/')[1])):
        _, evaluator, metric = key.split('/', 2)
        # Where there is no run, the baseline's are all there are.
        metric = metric.removeprefix(BASELINE)
        baseline, own = (f'eval/{evaluator}/{prefix}{metric}' for prefix in (BASELINE, ''))
        found[f'{evaluator}/{metric}'] = [first.get(baseline), first.get(own), last.get(own)]
    return found


def printed(value: float | None, unit: str) -> str:
    """A number as tables show it.

    >>> printed(0.1234, '%'), printed(27.125, 'dB'), printed(None, '%')
    ('12.3', '27.12', '–')
    """
    if value is None or not math.isfinite(value):
        return '–'
    return f'{100 * value:.1f}' if unit == '%' else f'{value:.4g}'


def row_title(title: str, unit: str) -> str:
    """A title with its unit, which is not said of per cents."""
    return f'{title} ({unit})' if unit not in ('', '%') else title


def table(rows: Mapping[tuple[str, str], Sequence[float | None]], columns: Sequence[str]) -> str:
    """Measures as text.

    Args:
        rows: (title, unit) -> one number a column, None where there is none.
        columns: their names.
    """
    cells = [['', *columns]]
    for (title, unit), values in rows.items():
        cells.append([row_title(title, unit), *(printed(v, unit) for v in values)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    ]
    lines.insert(1, '─' * (sum(widths) + 2 * len(columns)))
    return '\n'.join(lines)
