"""Batches: deterministic, resumable, the same on any number of processes, whatever is broken."""

import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from pictures import encoded, photo, png_header, write
from subjects import eval_images, train_images

from contrastive_jax import data
from contrastive_jax.config import UserError
from contrastive_jax.data import BadRecord
from contrastive_jax.data.bad_records import BadRecords
from contrastive_jax.inputs.pipeline import text_batches

CROP = {'scale': (0.08, 1.0), 'ratio': (3 / 4, 4 / 3), 'interpolation': 'bicubic', 'flip': 0.5}


class Counting:
    """Record i is a 6 × 5 picture of the value i; `broken` ones are bad."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, set(broken)
        self.classes = {'label': ['a', 'b', 'c']}

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise BadRecord('broken on purpose')
        return {'image': np.full((6, 5, 3), index, np.uint8), 'label': index % 3}

    def describe(self, index):
        return f'counting[{index}]'


def train(source, **changes):
    options = {
        'batch_size': 8,
        'views': 2,
        'image_size': 6,
        'crop': CROP,
        'seed': 3,
        'bad': BadRecords(None, len(source), 1.0),
        'threads': 2,
    }
    return train_images(source, **{**options, **changes})


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def joined(*parts):
    """Batches of several processes as global batches."""
    return [{k: np.concatenate([p[k] for p in row]) for k in row[0]} for row in zip(*parts)]  # noqa: B905


def test_batch_has_the_promised_shape():
    batch = next(train(Counting(20), views=3))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        'views': ((8, 3, 6, 6, 3), 'uint8'),
        'label': ((8,), 'int32'),
        'index': ((8,), 'int32'),
    }
    np.testing.assert_array_equal(batch['views'][:, 0, 0, 0, 0], batch['index'])
    np.testing.assert_array_equal(batch['label'], batch['index'] % 3)


def test_same_seed_same_batches_whatever_the_threads():
    source = data.open_splits({'source': 'digits'})['train']
    first = take(train(source), 3)
    assert_equal(first, take(train(source, threads=0), 3))
    assert_equal(first, take(train(source, threads=4), 3))
    other = next(train(source, seed=4))
    assert (other['index'] != first[0]['index']).any()


def test_two_processes_see_the_global_batches_of_one():
    source = data.open_splits({'source': 'digits'})['train']
    whole = take(train(source, batch_size=512), 4)  # past one epoch of 1,297, in chunks of 64
    parts = [
        take(train(source, batch_size=512, process_index=p, process_count=2), 4) for p in range(2)
    ]
    assert_equal(whole, joined(*parts))
    parts = [
        take(train(source, batch_size=24, process_index=p, process_count=3), 2) for p in range(3)
    ]
    assert_equal(take(train(source, batch_size=24), 2), joined(*parts))


def test_every_epoch_visits_each_record_once_in_another_order():
    index = np.concatenate([b['index'] for b in take(train(Counting(20)), 10)])
    epochs = index.reshape(4, 20)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_no_batch_holds_a_record_twice():
    """Of 1,000 batches of 64 from 100 records; before, of those that span epochs most did."""
    index = [b['index'] for b in take(train(Counting(100), batch_size=64, threads=0), 1000)]
    assert all(len(set(batch)) == 64 for batch in index)
    epochs = np.concatenate(index).reshape(640, 100)
    np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(100), (640, 100)))


def test_what_replaces_bad_records_is_not_in_the_batch_and_the_same_anywhere():
    source = Counting(100, broken=range(0, 100, 9))
    whole = take(train(source, batch_size=24), 40)
    for batch in whole:
        assert len(set(batch['index'])) == 24
        assert not set(batch['index']) & source.broken
    halves = [
        take(train(source, batch_size=24, process_index=p, process_count=2), 40) for p in range(2)
    ]
    assert_equal(whole, joined(*halves))
    # Where there are too few others, a record comes twice rather than none.
    few = next(train(Counting(24, broken=[3]), batch_size=24))
    assert len(few['index']) == 24
    assert set(few['index']) == set(range(24)) - {3}


def test_a_record_is_cropped_anew_each_time():
    source = data.open_splits({'source': 'digits'})['test']
    batches = take(train(source, batch_size=250, views=2), 4)
    views, index = (np.concatenate([b[k] for b in batches]) for k in ('views', 'index'))
    first, second = (np.argsort(index[half]) for half in (slice(0, 500), slice(500, 1000)))
    assert (views[:500][first] != views[500:][second]).any(axis=(1, 2, 3, 4)).all()
    assert (views[:, 0] != views[:, 1]).any(axis=(1, 2, 3)).mean() > 0.99


def test_state_resumes_the_stream_for_any_threads_and_processes():
    source = data.open_splits({'source': 'digits'})['train']
    iterator = train(source)
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 3)
    fresh = train(source, threads=1)
    next(fresh)
    fresh.set_state(state)
    fresh.start_prefetch()
    assert_equal(expected, take(fresh, 3))
    halves = [train(source, process_index=p, process_count=2) for p in range(2)]
    for half in halves:
        half.set_state(state)
    assert_equal(expected, joined(*(take(half, 3) for half in halves)))
    fresh.close()
    with pytest.raises(ValueError, match='closed'):
        next(fresh)


class Captioned(Counting):
    """Record i has the captions i0, i1 and i2."""

    def captions(self, index):
        return [f'{index}{n}' for n in range(3)]

    def __getitem__(self, index):
        return {**super().__getitem__(index), 'captions': self.captions(index)}


def tokenize(texts):
    return np.array([[int(text), -1] for text in texts], np.int32)


def test_one_caption_of_each_image_is_drawn_anew_in_every_epoch():
    source = Captioned(24)
    plain, read = take(train(source), 9), take(train(source, tokenize=tokenize), 9)
    assert_equal(plain, [{k: v for k, v in b.items() if k != 'text'} for b in read])
    text, index = (np.concatenate([b[k] for b in read]) for k in ('text', 'index'))
    assert text.dtype == np.int32
    np.testing.assert_array_equal(text[:, 0] // 10, index)
    drawn = {i: text[index == i, 0] % 10 for i in range(24)}
    assert all(len(d) == 3 for d in drawn.values())
    assert len({tuple(d) for d in drawn.values()}) > 6  # of 27
    halves = [
        take(train(source, tokenize=tokenize, process_index=i, process_count=2), 9) for i in (0, 1)
    ]
    joined = [np.concatenate([a['text'], b['text']]) for a, b in zip(*halves, strict=True)]
    np.testing.assert_array_equal(np.concatenate(joined), text)


def test_texts_in_batches_of_one_shape():
    texts = [str(i) for i in range(11)]
    for count in (1, 2):
        parts = [
            list(text_batches(padded, texts, batch_size=4, process_index=i, process_count=count))
            for i in range(count)
        ]
        rows = [
            {key: np.concatenate([p[key] for p in batch]) for key in batch[0]}
            for batch in zip(*parts, strict=True)
        ]
        assert [len(b['text']) for b in rows] == [4, 4, 4]
        mask = np.concatenate([b['mask'] for b in rows])
        np.testing.assert_array_equal(mask, [1.0] * 11 + [0.0])
        ids = np.concatenate([b['text'] for b in rows])[:, 0]
        np.testing.assert_array_equal(ids, [*range(11), -1])


def padded(texts):
    return tokenize([text or '-1' for text in texts])


LOCAL = {'local_views': 3, 'local_size': 4}


class Coordinates(Counting):
    """Pictures in which red is the column and green the row, 0 to 199."""

    def __getitem__(self, index):
        row, column = np.mgrid[:200, :200].astype(np.uint8)
        return {'image': np.stack([column, row, 0 * row], -1), 'label': 0}


def test_local_views_are_drawn_after_the_others():
    source = data.open_splits({'source': 'digits'})['train']
    without, batches = take(train(source), 3), take(train(source, **LOCAL), 3)
    for batch in batches:
        assert batch['local_views'].shape == (8, 3, 4, 4, 3)
        assert batch['local_views'].dtype == np.uint8
    assert_equal(without, [{k: b[k] for k in without[0]} for b in batches])
    local = np.concatenate([b['local_views'] for b in batches]).reshape(72, -1)
    assert len(np.unique(local, axis=0)) > 65


def test_local_views_are_of_smaller_areas():
    batch = next(train(Coordinates(64), batch_size=64, image_size=64, **LOCAL | {'local_size': 32}))
    shares = {}
    for name in ('views', 'local_views'):
        x = batch[name].reshape(-1, *batch[name].shape[2:]).astype(np.float64)
        side = x.shape[1]
        # Centres of pixels are (side - 1) / side of the crop's width and height apart.
        width, height = (np.ptp(x[..., c], axis=(1, 2)) / (side - 1) * side / 200 for c in (0, 1))
        shares[name] = width * height
        assert np.all((width / height > 0.72) & (width / height < 1.39))
    # Of 192 draws from U[0.05, 0.4], to within the rounding of colours and boxes.
    assert 0.045 < shares['local_views'].min() < 0.075
    assert 0.37 < shares['local_views'].max() < 0.42
    assert abs(shares['local_views'].mean() - 0.225) < 0.03
    assert shares['views'].max() > 0.8


def test_local_views_resume_and_are_the_same_on_any_processes():
    source = data.open_splits({'source': 'digits'})['train']
    iterator = train(source, **LOCAL)
    take(iterator, 3)
    saved = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 3)
    fresh = train(source, threads=0, **LOCAL)
    fresh.set_state(saved)
    assert_equal(expected, take(fresh, 3))
    halves = [train(source, process_index=p, process_count=2, **LOCAL) for p in range(2)]
    for half in halves:
        half.set_state(saved)
    assert_equal(expected, joined(*(take(half, 3) for half in halves)))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'local_views': -1}, r'config.inputs.local_views: got -1; expected a whole number'),
        ({'local_size': 0}, r'config.inputs.local_size: got 0; expected a whole number'),
        (
            {'local_scale': (0.0, 0.4)},
            r'config.inputs.local_scale: got \(0.0, 0.4\); expected 0 < low',
        ),
        ({'local_scale': (0.4, 1.1)}, r'config.inputs.local_scale: .*high <= 1.0'),
        ({'local_scale': (0.4, 0.2)}, r'config.inputs.local_scale: got \(0.4, 0.2\)'),
        ({'local_scale': (0.4,)}, r'config.inputs.local_scale: got \(0.4\); expected'),
    ],
)
def test_local_views_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        train(Counting(20), **{**LOCAL, **changes})


def test_iterator_is_saved_and_restored_in_an_orbax_composite(tmp_path):
    source = Counting(20)
    iterator = train(source)
    take(iterator, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(
            3,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave({'x': np.arange(3.0)}),
                data=grain.checkpoint.CheckpointSave(iterator),
            ),
        )
        expected = take(iterator, 4)
        manager.wait_until_finished()
    fresh = train(source)
    with ocp.CheckpointManager(tmp_path) as manager:
        restored = manager.restore(
            3,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore({'x': np.zeros(3)}),
                data=grain.checkpoint.CheckpointRestore(fresh),
            ),
        )
    np.testing.assert_array_equal(restored['state']['x'], np.arange(3.0))
    assert restored['data'] is fresh
    assert_equal(expected, take(fresh, 4))


def test_batch_sizes_that_cannot_be():
    with pytest.raises(
        UserError, match='batch_size: got 32, but the training split has 20 records'
    ):
        train(Counting(20), batch_size=32)
    with pytest.raises(UserError, match='got 8; expected a multiple of the 3 processes'):
        train(Counting(20), process_count=3)
    with pytest.raises(UserError, match=r'config.seed: got -1'):
        train(Counting(20), seed=-1)
    with pytest.raises(UserError, match='multiple of the 3 processes'):
        eval_images(
            Counting(9), batch_size=8, image_size=6, bad=BadRecords(None, 9), process_count=3
        )


@pytest.mark.parametrize('processes', [1, 2])
def test_eval_batches_hold_every_record_once_and_padding(processes):
    source, bad = Counting(21, broken=[4, 20]), BadRecords(None, 21, 0.1)
    parts = [
        list(
            eval_images(
                source,
                batch_size=8,
                image_size=6,
                bad=bad,
                process_index=p,
                process_count=processes,
                threads=2,
            )
        )
        for p in range(processes)
    ]
    batches = joined(*parts)
    assert [b['image'].shape for b in batches] == [(8, 6, 6, 3)] * 3
    label, mask, image = (
        np.concatenate([b[k] for b in batches]) for k in ('label', 'mask', 'image')
    )
    good = [i for i in range(21) if i not in (4, 20)]
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(np.flatnonzero(mask), good)
    np.testing.assert_array_equal(label[good], np.array(good) % 3)
    assert (label[mask == 0] == -1).all()
    np.testing.assert_array_equal(image[good][:, 2, 3, 1], good)
    assert bad.count == 2


def test_eval_batches_may_be_left_early():
    batches = eval_images(Counting(200), batch_size=8, image_size=6, bad=BadRecords(None, 200))
    next(batches)
    batches.close()
    with pytest.raises(UserError, match=r'crop_fraction: got 1.5'):
        eval_images(
            Counting(9), batch_size=3, image_size=6, bad=BadRecords(None, 9), crop_fraction=1.5
        )


def damaged_folder(root):
    """300 good pictures and one of each kind of bad file."""
    good = encoded(photo(0, 20, 24), 'PNG')
    for i in range(300):
        write(root / 'train' / 'cat' / f'{i:03d}.png', good)
    write(root / 'test' / 'cat' / '0.png', good)
    place = root / 'train' / 'cat'
    jpeg = encoded(photo(), 'JPEG')
    write(place / 'a_truncated.jpg', jpeg[: len(jpeg) // 2])
    write(place / 'b_truncated.png', good[: len(good) // 2])
    write(place / 'c_text.jpg', b'not an image at all')
    write(place / 'd_empty.webp', b'')
    write(place / 'e_bomb.png', png_header(50_000, 50_000))
    (place / 'f_directory.jpg').mkdir()
    (place / 'g_dangling.JPEG').symlink_to(place / 'nowhere.jpg')
    return data.open_splits({'source': 'folder', 'root': str(root)})['train']


def test_bad_files_are_replaced_listed_once_and_found_again(tmp_path):
    source = damaged_folder(tmp_path / 'root')
    assert len(source) == 307
    path = tmp_path / 'bad_records.jsonl'
    bad = BadRecords(path, len(source), 0.05)
    batches = take(train(source, batch_size=64, bad=bad), 10)
    index = np.concatenate([b['index'] for b in batches])
    good = {i for i in range(307) if source.describe(i).endswith('.png')}
    good -= {i for i in range(307) if '_' in source.describe(i)}
    assert set(index) == good
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    reasons = {e['record'].rpartition('/')[2]: e['reason'] for e in entries}
    assert len(entries) == len(reasons) == bad.count == 7
    assert 'Premature end' in reasons['a_truncated.jpg']
    assert 'truncated' in reasons['b_truncated.png'].lower()
    assert 'not a JPEG' in reasons['c_text.jpg']
    assert reasons['d_empty.webp'] == 'zero bytes'
    assert '50000 x 50000' in reasons['e_bomb.png']
    assert reasons['f_directory.jpg'] == 'unreadable: Is a directory'
    assert reasons['g_dangling.JPEG'] == 'unreadable: No such file or directory'

    again = BadRecords(path, len(source), 0.05)
    assert again.count == 7
    assert_equal(batches, take(train(source, batch_size=64, bad=again, threads=0), 10))
    assert len(path.read_text().splitlines()) == 7


def test_more_than_the_allowed_share_stops_the_run(tmp_path):
    source = damaged_folder(tmp_path)
    bad = BadRecords(None, len(source))
    with pytest.raises(UserError) as stopped:
        take(train(source, batch_size=64, bad=bad, threads=0), 10)
    first, *lines = str(stopped.value).splitlines()
    assert first.startswith('4 of 307 records cannot be used, more than 1 %. The first:')
    assert len(lines) == 5
    assert all(line.startswith('  train/cat/') and ': ' in line for line in lines[:4])
    # grain's threads hand the error over as it is.
    with pytest.raises(UserError, match='of 307 records cannot be used'):
        take(train(source, batch_size=64, bad=BadRecords(None, len(source))), 10)


def test_the_share_is_exceeded_only_strictly(tmp_path):
    bad = BadRecords(tmp_path / 'bad.jsonl', 200, 0.01)
    bad.add('a', 'x')
    bad.add('a', 'x')
    bad.add('b', 'y')
    with pytest.raises(UserError, match=r'3 of 200 .* than 1 %. .*\n  a: x\n  b: y\n  c: z\n'):
        bad.add('c', 'z')
    # The run that continues there stops as soon as it meets any of them again.
    resumed = BadRecords(tmp_path / 'bad.jsonl', 200, 0.01)
    with pytest.raises(UserError):
        resumed.add('a', 'x')
    with pytest.raises(UserError):
        BadRecords(None, 50).add('one in 50', 'is 2 %')
    with pytest.raises(UserError, match='max_fraction'):
        BadRecords(None, 50, 2)


def test_two_processes_share_a_list_and_a_cut_line_is_passed_over(tmp_path):
    path = tmp_path / 'bad.jsonl'
    left, right = BadRecords(path, 100, 0.5), BadRecords(path, 100, 0.5)
    left.add('a', 'x')
    right.add('a', 'x')
    right.add('b', 'y')
    left.add('b', 'y')
    assert (left.count, right.count) == (2, 2)
    assert len(path.read_text().splitlines()) == 2
    with open(path, 'a') as file:
        file.write('{"record": "c", "rea')
    third = BadRecords(path, 100, 0.5)
    assert third.count == 2
    third.add('d', 'z')
    assert BadRecords(path, 100, 0.5).count == 3


def test_a_source_without_any_good_record_ends():
    with pytest.raises(UserError, match='none of the 9 records can be used'):
        next(train(Counting(9, broken=range(9))))


def test_what_a_usable_record_lost_is_listed_and_does_not_count(tmp_path):
    path = tmp_path / 'bad.jsonl'
    bad = BadRecords(path, 10, 0.0)
    bad.note('a.jpg caption 2', 'empty caption')
    bad.note('a.jpg caption 2', 'empty caption')
    assert bad.count == 0
    assert len(path.read_text().splitlines()) == 1
    again = BadRecords(path, 10, 0.0)
    again.note('a.jpg caption 2', 'empty caption')
    assert again.count == 0
    assert len(path.read_text().splitlines()) == 1
