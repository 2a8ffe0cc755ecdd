"""Sources on disk: what they read, split and refuse."""

import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from pictures import encoded, make_folder, photo, write
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from subjects import train_images

from contrastive_jax import data
from contrastive_jax.config import UserError
from contrastive_jax.data import BadRecord
from contrastive_jax.data.bad_records import BadRecords
from contrastive_jax.data.sources import array_record


def open_folder(root, **more):
    return data.open_splits({'source': 'folder', 'root': str(root), **more})


def first_batch(source):
    return next(
        train_images(
            source,
            batch_size=8,
            views=2,
            image_size=6,
            crop={},
            seed=0,
            bad=BadRecords(None, len(source)),
            threads=2,
        )
    )


def test_digits_are_scikit_learns_in_a_fixed_stratified_split():
    splits = data.open_splits({'source': 'digits', 'root': ''})
    assert {k: len(v) for k, v in splits.items()} == {'train': 1297, 'test': 500}
    pixels, labels = load_digits(return_X_y=True)
    indices = sorted(splits['train'].indices + splits['test'].indices)
    assert indices == list(range(1797))
    for split in splits.values():
        for i in (0, 7, len(split) - 1):
            record, number = split[i], split.indices[i]
            assert record['image'].shape == (8, 8, 3)
            assert record['image'].dtype == np.uint8
            assert record['label'] == labels[number]
            scaled = np.round(pixels[number].reshape(8, 8) * 255 / 16)
            np.testing.assert_array_equal(record['image'], np.repeat(scaled[..., None], 3, axis=2))
            assert split.describe(i) == f'digits[{number}]'
    share = np.bincount([splits['test'][i]['label'] for i in range(500)]) / np.bincount(labels)
    assert np.abs(share - 500 / 1797).max() < 0.006
    with pytest.raises(UserError, match="takes nothing after ':', got 'big'"):
        data.open_splits({'source': 'digits:big'})


def test_digits_on_photographs_are_two_photographs_blended_by_a_scan():
    splits = data.open_splits({'source': 'digits:photographs', 'root': ''})
    assert {k: len(v) for k, v in splits.items()} == {'train': 2000, 'test': 500}
    scans = data.open_splits({'source': 'digits', 'root': ''})
    whole = [Image.fromarray(load_sample_image(f'{n}.jpg')).reduce(4) for n in ('china', 'flower')]
    cut = {'train': slice(64, 160), 'test': slice(0, 64)}
    for name, split in splits.items():
        parts = [np.asarray(x)[:, cut[name]] for x in whole]
        tried = 0
        for i in range(12):
            record, scan = split[i], scans[name][i]
            assert record['label'] == scan['label']
            assert record['image'].shape == (32, 32, 3)
            np.testing.assert_array_equal(record['image'], split[i]['image'])
            grey = Image.fromarray(scan['image'][..., 0])
            share = np.asarray(grey.resize((32, 32), Image.Resampling.BICUBIC))[..., None] / 255
            if (share == 1).sum() < 6:
                continue
            tried += 1

            def there(part, mask, image=record['image']):
                """Whether some place of a photograph has all of these pixels."""
                rows, columns = (n - 31 for n in part.shape[:2])
                found = np.ones((rows, columns), bool)
                for r, c in np.argwhere(mask[..., 0]):
                    found &= (part[r : r + rows, c : c + columns] == image[r, c]).all(-1)
                return found.any()

            # Where the scan is black there is one photograph, where it is white the other one.
            found = [(there(part, share == 0), there(part, share == 1)) for part in parts]
            assert found in ([(True, False), (False, True)], [(False, True), (True, False)])
        assert tried >= 3
        assert split.describe(7) == f'{name} digits on photographs[7]'


def test_unknown_sources_list_what_exists():
    with pytest.raises(UserError, match=r"'flder'. Did you mean 'folder'. Exists: .*'tfds'"):
        data.open_splits({'source': 'flder'})
    with pytest.raises(UserError, match=r'config.data.source: unknown name'):
        data.open_splits({})


def test_folder_with_splits_and_classes(tmp_path):
    root = make_folder(tmp_path, splits=('train', 'val', 'test'))
    write(root / 'train' / 'cat' / 'deeper' / 'er' / 'x.JPeG', encoded(photo(), 'JPEG'))
    write(root / 'train' / 'cat' / '.hidden.png', b'')
    write(root / 'train' / '.ipynb_checkpoints' / 'y.png', b'')
    write(root / 'train' / 'dog' / 'notes.txt', b'')
    (root / 'train' / 'empty').mkdir()
    (root / 'train' / 'dog' / 'loop').symlink_to(root / 'train' / 'dog')
    splits = open_folder(root)
    assert {k: len(v) for k, v in splits.items()} == {'train': 13, 'test': 12, 'validation': 12}
    source = splits['train']
    assert source.classes == {'label': ['cat', 'dog']}
    names = [source.describe(i) for i in range(13)]
    assert names == sorted(names)
    assert 'train/cat/deeper/er/x.JPeG' in names
    for i, name in enumerate(names):
        assert source[i]['label'] == ('dog' in name)
    np.testing.assert_array_equal(source[0]['image'], photo(0, 20, 24))


def test_folder_where_validation_serves_as_test(tmp_path):
    for name in ('val', 'Validation'):
        splits = open_folder(make_folder(tmp_path / name, splits=('train', name)))
        assert {k: len(v) for k, v in splits.items()} == {'train': 12, 'test': 12}
        assert splits['test'].describe(0) == f'{name}/cat/0.png'


def test_folder_without_test_holds_out_by_path(tmp_path, caplog):
    root = tmp_path / 'root'
    for i in range(200):
        write(root / f'c{i % 4}' / f'{i}.png', encoded(photo(), 'PNG'))
    with caplog.at_level('INFO', 'absl'):
        splits = open_folder(root, holdout=0.2)
    count = len(splits['test'])
    assert 20 < count < 60
    assert f'no test split in {root}: holding out 20 % = {count} records' in caplog.text
    assert splits['train'].classes == splits['test'].classes == {'label': ['c0', 'c1', 'c2', 'c3']}
    held = {splits['test'].describe(i) for i in range(count)}
    kept = {splits['train'].describe(i) for i in range(200 - count)}
    assert len(held | kept) == 200
    write(root / 'c0' / 'another.png', encoded(photo(), 'PNG'))
    splits = open_folder(root, holdout=0.2)
    now = {splits['test'].describe(i) for i in range(len(splits['test']))}
    assert now - {'c0/another.png'} == held
    assert set(open_folder(root, holdout=0)) == {'train'}
    assert len(open_folder(root, holdout=1e-9)['test']) == 1
    with pytest.raises(UserError, match=r'holdout: got 1.0; .* of at least 0 and below 1'):
        open_folder(root, holdout=1.0)
    only_train = open_folder(make_folder(tmp_path / 'b', count=30, splits=('train',)))
    assert len(only_train['train']) + len(only_train['test']) == 60


def test_flat_folder_is_unlabelled(tmp_path):
    for i in range(30):
        write(tmp_path / f'{i}.webp', encoded(photo(), 'WEBP'))
    splits = open_folder(tmp_path)
    assert splits['train'].classes == {}
    assert splits['train'][0]['label'] == -1
    assert len(splits['train']) + len(splits['test']) == 30


def test_folder_mistakes_say_what_was_expected_and_found(tmp_path):
    cases = [
        ('', r'config.data.root: not set; .*--config.data.root=DIR. Expected: ROOT/train/CLASS'),
        (tmp_path / 'none', r"none' does not exist. Expected:"),
        (pathlib.Path(__file__), 'is a file, not a directory'),
    ]
    (tmp_path / 'empty').mkdir()
    cases.append((tmp_path / 'empty', r'no image files in .* \(it is empty\)'))
    write(tmp_path / 'text' / 'a.txt', b'')
    cases.append((tmp_path / 'text', r'no image files in .* \(it has a.txt\)'))
    make_folder(tmp_path / 'no_train', splits=('test', 'val'))
    cases.append((tmp_path / 'no_train', r"has \['test', 'val'\] but no train folder"))
    strange = make_folder(tmp_path / 'strange')
    write(strange / 'test' / 'zebra' / '0.png', encoded(photo(), 'PNG'))
    cases.append((strange, r'classes that train has not: zebra. Train has 2 classes: cat, dog'))
    flat = make_folder(tmp_path / 'flat', splits=('train',))
    write(flat / 'test' / '0.png', encoded(photo(), 'PNG'))
    cases.append((flat, 'images without class folders, but train has 2 classes: cat, dog'))
    for root, message in cases:
        with pytest.raises(UserError, match=message):
            open_folder(root)


def test_array_record_round_trip_through_the_command(tmp_path):
    root, out = make_folder(tmp_path / 'root', splits=('train', 'test')), tmp_path / 'out'
    write(root / 'train' / 'cat' / 'bad.jpg', b'text')
    command = [
        sys.executable,
        '-m',
        'contrastive_jax.data.sources.array_record',
        str(root),
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout == 'train: 12 records, 1 files left out\ntest: 12 records, 0 files left out\n'
    )
    assert 'left out: train/cat/bad.jpg: not a JPEG' in done.stderr
    assert (out / 'classes.txt').read_text() == 'cat\ndog\n'
    splits = data.open_splits({'source': 'array_record', 'root': str(out)})
    folder_splits = open_folder(root)
    assert set(splits) == {'train', 'test'}
    for i in range(12):
        record, original = splits['test'][i], folder_splits['test'][i]
        np.testing.assert_array_equal(record['image'], original['image'])
        assert record['label'] == original['label']
    assert splits['train'].describe(3) == 'train[3]'
    first_batch(splits['train'])
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.startswith('error: OUT: ')
    assert 'Traceback' not in again.stderr


def test_array_record_shards_holdout_and_bad_records(tmp_path, capsys):
    root = make_folder(tmp_path / 'root', count=20, splits=('train',))
    assert array_record.main([str(root), str(tmp_path / 'out'), '--shards=3']) == 0
    out = tmp_path / 'out'
    assert len(list(out.glob('train-*-of-00003.array_record'))) == 3
    splits = data.open_splits({'source': 'array_record', 'root': str(out), 'holdout': 0.25})
    assert len(splits['train']) + len(splits['test']) == 40
    assert {splits['train'][i]['label'] for i in range(len(splits['train']))} == {0, 1}
    (out / 'classes.txt').write_text('cat\n')
    whole = data.open_splits({'source': 'array_record', 'root': str(out), 'holdout': 0})['train']
    with pytest.raises(BadRecord, match='label 1 is not one of the 1 classes'):
        whole[39]
    (out / 'classes.txt').unlink()
    unlabelled = data.open_splits({'source': 'array_record', 'root': str(out)})['train']
    assert (unlabelled.classes, unlabelled[0]['label']) == ({}, -1)
    assert array_record.main([str(tmp_path / 'none'), str(tmp_path / 'o2')]) == 2
    assert 'does not exist' in capsys.readouterr().err
    for wrong, message in (
        ('', '--config.data.root=DIR'),
        (str(tmp_path / 'none'), 'is not a directory'),
        (str(root), r'no train\*.array_record in .* \(it has train\)'),
    ):
        with pytest.raises(UserError, match=message):
            data.open_splits({'source': 'array_record', 'root': wrong})
    write(tmp_path / 'junk' / 'train.array_record', b'junk' * 100)
    with pytest.raises(UserError, match='as ArrayRecord'):
        data.open_splits({'source': 'array_record', 'root': str(tmp_path / 'junk')})


def test_tfds_says_what_it_needs(monkeypatch):
    with pytest.raises(UserError, match="needs a dataset's name: 'tfds:cifar10'"):
        data.open_splits({'source': 'tfds'})
    monkeypatch.setitem(sys.modules, 'tensorflow', None)
    with pytest.raises(UserError, match=r"pip install 'contrastive-jax\[tensorflow\]'"):
        data.open_splits({'source': 'tfds:cifar10'})


def test_nothing_heavy_is_imported_for_the_names():
    code = textwrap.dedent("""
        import sys
        from contrastive_jax import data
        from contrastive_jax.data.sources import digits, folder, tfds, array_record
        data.open_splits({'source': 'digits'})
        heavy = 'grain jax sklearn tensorflow tensorflow_datasets array_record simplejpeg PIL'
        print([name for name in heavy.split() if name in sys.modules])
    """)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == '[]\n'


@pytest.mark.tensorflow
def test_tfds_reads_a_real_dataset(tmp_path):
    import tensorflow_datasets as tfds

    counts = {'train': 30, 'validation': 10}

    # Not registered: found again by its files below data_dir, as a dataset made elsewhere is.
    class Squares(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Pictures in two classes, with a validation split and no test split."""

        VERSION = tfds.core.Version('1.0.0')

        def _info(self):
            features = {
                'image': tfds.features.Image(shape=(None, None, 3)),
                'label': tfds.features.ClassLabel(names=['dark', 'light']),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples(n) for name, n in counts.items()}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {'image': photo(i, 20, 24), 'label': i % 2}

    Squares(data_dir=tmp_path, file_format='array_record').download_and_prepare()
    splits = data.open_splits({'source': 'tfds:squares', 'root': str(tmp_path)})
    assert {k: len(v) for k, v in splits.items()} == {'train': 30, 'test': 10}
    assert splits['train'].classes == {'label': ['dark', 'light']}
    known = {photo(i, 20, 24).tobytes(): i % 2 for i in range(30)}
    for i in range(30):
        record = splits['train'][i]
        assert record['label'] == known.pop(record['image'].tobytes())
    assert not known
    assert splits['test'].describe(2) == 'squares/validation[2]'
    assert first_batch(splits['train'])['views'].shape == (8, 2, 6, 6, 3)
    with pytest.raises(UserError, match=r"no TFDS dataset 'cifar1O'.* Closest names: .*cifar10"):
        data.open_splits({'source': 'tfds:cifar1O', 'root': str(tmp_path)})
