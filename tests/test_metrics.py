"""Records: what is written, what a killed run leaves, and pictures that can be opened."""

import importlib.util
import json
import math
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from contrastive_jax import figures
from contrastive_jax.config import UserError
from contrastive_jax.figures import curves
from contrastive_jax.workdir import records

# --- metrics.jsonl -------------------------------------------------------------------------------


def test_records_are_json_and_not_finite_is_null(tmp_path):
    writer = records.Writer(str(tmp_path))
    writer.write(1, {'train/loss': np.float32(2.5), 'n': 3, 'bad': math.nan, 'worse': math.inf})
    # Flushed: another reader sees it before the writer is closed.
    (line,) = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(line) == {'step': 1, 'train/loss': 2.5, 'n': 3, 'bad': None, 'worse': None}
    writer.write(2, {'train/loss': 2.0})
    writer.close()
    assert [r['step'] for r in records.read(str(tmp_path))] == [1, 2]


def test_resume_drops_later_steps_and_the_unfinished_line(tmp_path):
    writer = records.Writer(str(tmp_path))
    for step in (0, 10, 20, 20, 30):
        writer.write(step, {'x': step})
    with (tmp_path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 40, "x"')
    assert [r['step'] for r in records.read(str(tmp_path))] == [0, 10, 20, 20, 30]
    again = records.Writer(str(tmp_path))
    again.resume(20)
    again.write(30, {'x': -1})
    kept = records.read(str(tmp_path))
    assert [(r['step'], r['x']) for r in kept] == [
        (0, 0),
        (10, 10),
        (20, 20),
        (20, 20),
        (30, -1),
    ]
    assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']
    # Before the first checkpoint nothing is kept: step 0 is evaluated again, too.
    again.resume(0)
    assert records.read(str(tmp_path)) == []


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(UserError, match='line 2'):
        records.read(str(tmp_path))


def test_no_records(tmp_path):
    assert records.read(str(tmp_path)) == []
    records.Writer(str(tmp_path)).resume(5)
    disabled = records.Writer(str(tmp_path), enabled=False)
    disabled.write(1, {'x': 1.0})
    disabled.resume(0)
    disabled.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_without_tensorflow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    records.Writer(str(tmp_path))
    with pytest.raises(UserError, match=r"pip install 'contrastive-jax\[tensorflow\]'"):
        records.Writer(str(tmp_path), tensorboard=True)


@pytest.mark.tensorflow
def test_tensorboard_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    writer = records.Writer(str(tmp_path), tensorboard=True)
    writer.write(3, {'train/loss': 1.5})
    writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={'tensors': 0}).Reload()
    (event,) = events.Tensors('train/loss')
    assert event.step == 3
    assert tensor_util.make_ndarray(event.tensor_proto) == 1.5


# --- Progress and table --------------------------------------------------------------------------


def test_progress_counts_training_time_alone(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, 'monotonic', lambda: now)
    progress = records.Progress(100, 1100, batch_size=64)
    now += 30  # compilation
    progress.step(101)
    assert progress.values() == {}
    assert progress.line({'train/loss': 5.0}) == 'step 101/1100  loss 5'
    now += 10
    progress.step(201)
    assert progress.values() == {'train/examples_per_second': pytest.approx(640)}
    values = {'train/loss': 3.4119, 'train/learning_rate': 1.2e-3}
    line = progress.line(values, bad=2)
    assert line == (
        'step 201/1100  loss 3.412  lr 0.0012  640 examples/s  1:30 left  2 bad records'
    )
    with progress.pause():
        now += 20
    now += 10
    progress.step(301)
    assert progress.values() == {'train/examples_per_second': pytest.approx(640)}
    # 200 steps took 20 s and 20 s of evaluation; 799 remain.
    assert progress.line({}) == 'step 301/1100  640 examples/s  2:40 left'


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0, '0:00'), (59.6, '1:00'), (102, '1:42'), (3661, '1:01:01'), (200_000, '2 d 7 h')],
)
def test_durations(seconds, text):
    assert records._duration(seconds) == text


def test_table():
    text = records.table(
        {
            ('knn, all labels', '%'): [0.98, None, 0.9912],
            ('linear, 10 labels per class', '%'): [0.9, math.nan, 1],
            ('inpainting', 'dB'): [18.123, None, 27],
        },
        ['raw pixels', 'untrained', 'trained'],
    )
    assert text.splitlines() == [
        '                             raw pixels  untrained  trained',
        '───────────────────────────────────────────────────────────',
        'knn, all labels                    98.0          –     99.1',
        'linear, 10 labels per class        90.0          –    100.0',
        'inpainting (dB)                   18.12          –       27',
    ]


# --- figures -------------------------------------------------------------------------------------


def test_views_are_side_by_side_and_enlarged_exactly(tmp_path):
    views = np.random.default_rng(0).integers(0, 256, (4, 2, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / 'views.png'
    figures.write(figures.views_grid(views), path)
    sheet = np.asarray(Image.open(path))
    # 8 pixels become 112; views 4 apart, images 18 apart.
    first, second = sheet[18 : 18 + 112, 18 : 18 + 112], sheet[18 : 18 + 112, 134 : 134 + 112]
    np.testing.assert_array_equal(first[::14, ::14], views[0, 0])
    np.testing.assert_array_equal(first, views[0, 0].repeat(14, 0).repeat(14, 1))
    np.testing.assert_array_equal(second[::14, ::14], views[0, 1])
    assert [p.name for p in tmp_path.iterdir()] == ['views.png']


def test_local_views_are_to_the_right_and_as_enlarged(tmp_path):
    rng = np.random.default_rng(0)
    views = rng.integers(0, 256, (2, 2, 8, 8, 3), dtype=np.uint8)
    local = rng.integers(0, 256, (2, 3, 4, 4, 3), dtype=np.uint8)
    path = tmp_path / 'views.png'
    figures.write(figures.views_grid(views, ['a', 'b'], local_BLHWC=local), path)
    sheet = np.asarray(Image.open(path))
    # 4 pixels become 56: two rows, beside two views of 112 and their gaps of 4.
    left = 18 + 2 * 116
    for k, (x, y) in enumerate([(left, 18), (left + 60, 18), (left, 78)]):
        tile = sheet[y : y + 56, x : x + 56]
        np.testing.assert_array_equal(tile, local[0, k].repeat(14, 0).repeat(14, 1))
    np.testing.assert_array_equal(sheet[18:130:14, 18:130:14], views[0, 0])
    assert (sheet[78:134, left + 60 : left + 116] == 255).all()


@pytest.mark.parametrize(
    ('shape', 'names'),
    [((16, 2, 32, 32, 3), True), ((3, 2, 224, 160, 3), True), ((1, 1, 5, 9, 1), False)],
)
def test_views_of_any_shape(shape, names, tmp_path):
    views = np.random.default_rng(0).normal(0.5, 1, shape)
    views[0, 0, 0, 0] = np.nan
    path = tmp_path / 'views.png'
    captions = [f'name {i}' * 20 for i in range(shape[0])] if names else None
    figures.write(figures.views_grid(views, captions), path)
    with Image.open(path) as image:
        width, height = image.size
    assert 100 < width < 1600
    assert 80 < height < 1600


def test_float_views_are_clipped_and_scaled(tmp_path):
    views = np.array([-1.0, 0.5, 2.0]).reshape(1, 1, 1, 3, 1)
    figures.write(figures.views_grid(views), tmp_path / 'v.png')
    row = np.asarray(Image.open(tmp_path / 'v.png'))[19]
    assert list(row[18:129:37, 0]) == [0, 128, 255]


MEASURES = {
    f'{evaluator}/top1{key}': (f'{evaluator}{key}', '%')
    for evaluator in ('knn', 'linear')
    for key in ('', '_10_per_class')
}


def run() -> list[dict[str, Any]]:
    keys = ['top1', 'top1_10_per_class']
    records: list[dict[str, Any]] = [{'step': 0}]
    for evaluator in ('knn', 'linear'):
        records[0] |= {f'eval/{evaluator}/{p}{k}': 0.9 for k in keys for p in ('', 'baseline_')}
    for step in (1, 50, 100):
        records.append({'step': step, 'train/loss': 5 / step, 'train/learning_rate': 1e-3})
    records[2]['train/loss'] = None
    records.append({'step': 100, 'eval/knn/top1': 0.95, 'eval/linear/top1_10_per_class': 0.97})
    records[-1]['eval/linear/top1_10_per_class_std'] = 0.01
    return records


@pytest.mark.parametrize('records', [[], run()[1:2], run()[:1], run()[1:4], run()])
def test_curves_of_whole_and_partial_runs(records, tmp_path):
    path = tmp_path / 'curves.png'
    figures.write(figures.training_curves(records, MEASURES), path)
    with Image.open(path) as image:
        image.load()
        assert image.size[0] > 600
    assert [p.name for p in tmp_path.iterdir()] == ['curves.png']


def test_curves_show_what_was_recorded(tmp_path):
    assert curves.drawn(run(), {}) == {}
    assert curves.drawn(run(), MEASURES) == {
        e: [f'eval/{e}/top1', f'eval/{e}/top1_10_per_class'] for e in ('knn', 'linear')
    }
    steps, values = curves.series(run(), 'train/loss')
    assert list(steps) == [1, 100]
    assert list(values) == [5, 0.05]
    steps, values = curves.series(run(), 'eval/linear/top1_10_per_class', 100)
    assert (list(steps), list(values)) == ([0, 100], [90, 97])


def test_a_bucket_s_file_grows_by_being_written_anew():
    """gcsfs turns mode 'a' into overwriting."""

    class Object:
        text = None

        def __str__(self):
            return 'gs://bucket/metrics.jsonl'

        def exists(self):
            return self.text is not None

        def read_text(self):
            return self.text

        def write_text(self, text):
            self.text = text

    path = Object()
    for line in ('a\n', 'b\n'):
        records.append(path, line)
    assert path.text == 'a\nb\n'


def test_an_unfinished_line_is_dropped_before_the_next(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"ste')
    records.append(path, '{"step": 2}\n')
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
