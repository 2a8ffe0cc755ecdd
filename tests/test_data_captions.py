"""Sources whose pictures have captions: what they read, split, leave out and refuse."""

import concurrent.futures
import csv
import io
import json
import tarfile

import numpy as np
import pytest
from pictures import encoded, make_folder, photo, write

from contrastive_jax import data
from contrastive_jax.config import UserError
from contrastive_jax.data import BadRecord
from contrastive_jax.data.sources import digits, tfds

PNG = [encoded(photo(i, 20, 24), 'PNG') for i in range(6)]


def open_captions(root, **more):
    return data.open_splits({'source': 'captions', 'root': str(root), 'captions': '', **more})


def open_tars(root, **more):
    return data.open_splits({'source': 'webdataset', 'root': str(root), **more})


def names(source):
    return [source.describe(i) for i in range(len(source))]


def pictures(folder, count=6):
    for i in range(count):
        write(folder / f'{i}.png', PNG[i])


def refuse(match, root, opener=open_captions, **more):
    with pytest.raises(UserError, match=match):
        opener(root, **more)


def karpathy(count=6, splits=('train', 'restval', 'val', 'test'), **more):
    images = [
        {
            'filename': f'{i}.png',
            'split': splits[i % len(splits)],
            'sentences': [{'raw': f'picture {i}'}, {'raw': f'Bild {i} ü'}],
            **more,
        }
        for i in range(count)
    ]
    return {'dataset': 'x', 'images': images}


@pytest.mark.parametrize('place', ['', 'images', 'deep/er'])
def test_karpathys_json_finds_the_pictures(tmp_path, place):
    pictures(tmp_path / place)
    more = {'filepath': place} if place == 'deep/er' else {}
    path = tmp_path / 'dataset.json'
    path.write_text(json.dumps(karpathy(**more)))
    for root, captions in ((tmp_path, ''), (tmp_path, 'dataset.json'), (path, ''), ('', path)):
        splits = open_captions(root, captions=str(captions))
        assert {k: len(v) for k, v in splits.items()} == {'train': 4, 'validation': 1, 'test': 1}
        train = splits['train']
        prefix = 'deep/er/' if more else ''
        assert names(train) == [f'{prefix}{i}.png' for i in (0, 1, 4, 5)]
        record = train[2]
        np.testing.assert_array_equal(record['image'], photo(4, 20, 24))
        assert record['captions'] == train.captions(2) == ['picture 4', 'Bild 4 ü']
        assert (record['label'], train.classes, train.skipped) == (-1, {}, [])


def test_coco_reads_a_file_a_split(tmp_path):
    for split, numbers in (('train2017', (0, 1, 2)), ('val2017', (3, 4))):
        content = {
            'images': [{'id': 10 + i, 'file_name': f'{i}.png'} for i in numbers],
            'annotations': [
                {'image_id': 10 + i, 'caption': f'{word} {i}'}
                for word in ('a', 'b')
                for i in numbers
                if i != 2
            ],
        }
        text = json.dumps(content).encode()
        write(tmp_path / 'annotations' / f'captions_{split}.json', text)
        write(tmp_path / 'annotations' / f'instances_{split}.json', b'{"images": []}')
        for i in numbers:
            write(tmp_path / split / f'{i}.png', PNG[i])
    splits = open_captions(tmp_path)
    assert {k: names(v) for k, v in splits.items()} == {
        'train': ['train2017/0.png', 'train2017/1.png', 'train2017/2.png'],
        'test': ['val2017/3.png', 'val2017/4.png'],
    }
    assert splits['test'][1]['captions'] == ['a 4', 'b 4']
    np.testing.assert_array_equal(splits['test'][1]['image'], photo(4, 20, 24))
    for root, captions in (
        ('annotations/captions_val2017.json', ''),
        ('', 'annotations/captions_v*'),
    ):
        alone = open_captions(tmp_path / root, captions=captions, holdout=0)['train']
        assert names(alone) == ['val2017/3.png', 'val2017/4.png']
    with pytest.raises(BadRecord, match='no caption'):
        splits['train'].captions(2)
    with pytest.raises(BadRecord, match='no caption'):
        splits['train'][2]


def table(kind, rows, columns):
    if kind == 'json':
        return json.dumps([dict(zip(columns, row, strict=True)) for row in rows])
    if kind == 'jsonl':
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
        return '\ufeff' + '\n'.join([*lines, ''])
    file = io.StringIO()
    writer = csv.writer(file, delimiter='\t' if kind == 'tsv' else ',')
    writer.writerows([columns, *rows])
    return '\ufeff' + file.getvalue()


@pytest.mark.parametrize('kind', ['csv', 'tsv', 'json', 'jsonl'])
@pytest.mark.parametrize('columns', [('image', 'caption'), ('File_Name', 'TEXT')])
def test_tables_group_the_rows_of_a_picture(tmp_path, kind, columns):
    pictures(tmp_path)
    rows = [
        ('3.png', 'a cat, \u2028asleep', 'train', 'cat'),
        ('0.png', 'the "dog"', 'train', 'dog'),
        ('1.png', 'dev', 'val', 'cat'),
        ('3.png', '"eine" Katze', 'train', 'cat'),
        (str(tmp_path / '2.png'), 'last', 'test', ''),
    ]
    (tmp_path / 'x.txt').write_text(table(kind, rows, [*columns, 'split', 'class']))
    splits = open_captions(tmp_path)
    train = splits['train']
    assert names(train) == ['3.png', '0.png']
    assert train[0]['captions'] == ['a cat, \u2028asleep', '"eine" Katze']
    assert train.captions(1) == ['the "dog"']
    assert train.classes == {'label': ['cat', 'dog']}
    assert [train[0]['label'], train[1]['label']] == [0, 1]
    assert splits['test'][0]['label'] == -1
    np.testing.assert_array_equal(splits['test'][0]['image'], photo(2, 20, 24))
    assert names(splits['validation']) == ['1.png']


def test_empty_captions_and_unusable_lines_are_left_out_and_said(tmp_path):
    pictures(tmp_path)
    lines = [
        {'path': '0.png', 'captions': ['a', ' ', 'b', None, 3]},
        {'path': '1.png', 'captions': []},
        {'captions': ['c']},
        {'path': 'gone.png', 'captions': ['d']},
        {'path': '2.png', 'captions': 'e'},
    ]
    text = '\n'.join([*map(json.dumps, lines), '{"path": ', ''])
    (tmp_path / 'x.jsonl').write_text(text)
    source = open_captions(tmp_path, holdout=0)['train']
    assert source.captions(0) == ['a', 'b']
    assert names(source) == ['0.png', '1.png', 'gone.png', '2.png']
    reasons = dict(source.skipped)
    assert len(reasons) == len(source.skipped) == 5
    assert reasons['0.png caption 4'] == 'empty caption: None'
    assert reasons['x.jsonl line 3'] == 'no image'
    assert 'not JSON' in reasons['x.jsonl line 6']
    with pytest.raises(BadRecord, match='no caption'):
        source[1]
    with pytest.raises(BadRecord, match=r'no such image: .*gone.png'):
        source[2]
    assert source.captions(2) == ['d']
    # An opening quotation mark in a TSV quotes nothing; too many fields are no caption.
    (tmp_path / 'x.jsonl').unlink()
    (tmp_path / 'x.tsv').write_text('path\tcaption\n0.png\t"a\n1.png\tb\n2.png\tc\td\n3.png\t"e"\n')
    source = open_captions(tmp_path, holdout=0)['train']
    assert [source.captions(i) for i in range(3)] == [['"a'], ['b'], ['e']]
    assert source.skipped == [('x.tsv line 4', '3 fields, expected 2')]


def test_without_a_test_split_records_are_held_out_by_name(tmp_path):
    pictures(tmp_path / 'images')
    rows = [(f'{i % 6}.png' if i < 6 else f'none{i}.png', f'c {i}') for i in range(200)]
    path = tmp_path / 'x.csv'
    path.write_text(table('csv', rows, ['image', 'caption']))
    splits = open_captions(tmp_path, holdout=0.2)
    held = set(names(splits['test']))
    assert 20 < len(held) < 60
    assert len(splits['train']) + len(held) == 200
    for split in splits.values():
        for i in range(len(split)):
            name = split.describe(i)
            number = int(name.removeprefix('none').removesuffix('.png'))
            assert split.captions(i) == [f'c {number}']
            if number < 6:
                assert split[i]['captions'] == [f'c {number}']
    assert splits['train'].skipped == []
    path.write_text(table('csv', [*rows, ('more.png', 'x')], ['image', 'caption']))
    assert set(names(open_captions(tmp_path, holdout=0.2)['test'])) - {'more.png'} == held


def test_several_files_are_splits_by_name_when_a_pattern_says_so(tmp_path):
    pictures(tmp_path)
    (tmp_path / 'my_train.csv').write_text('image,caption\n0.png,a\n1.png,b\n')
    (tmp_path / 'my_val.csv').write_text('image,caption\n2.png,c\n')
    refuse(
        r"not set, and 2 files fit; .* has my_train.csv, my_val.csv.*captions='\*.csv'", tmp_path
    )
    splits = open_captions(tmp_path, captions='my_*.csv')
    assert {k: names(v) for k, v in splits.items()} == {
        'train': ['0.png', '1.png'],
        'test': ['2.png'],
    }
    # What does not fit is not in the way.
    (tmp_path / 'my_val.csv').unlink()
    (tmp_path / 'readme.txt').write_text('about these pictures')
    (tmp_path / 'config.json').write_text('{"a": 1}')
    assert len(open_captions(tmp_path, holdout=0)['train']) == 2


def test_caption_files_that_do_not_fit_are_explained(tmp_path):
    refuse('config.data.root: .*not set: --config.data.root=DIR', '')
    refuse('is not a directory', tmp_path / 'none')
    refuse('not set, and 0 files fit; .* has no such files.* Expected: a CSV', tmp_path)
    pictures(tmp_path)
    refuse("no file .*y.csv'; .* has no such files", tmp_path, captions='y.csv')
    path = tmp_path / 'x.csv'
    for content, match in {
        'image,words\n0.png,a\n': 'no caption column; it has image, words. It may be called cap',
        'url,caption\nhttp://x,a\n': 'no image column; it has url, caption.*URLs are not fetched',
        'image,caption\n': 'x.csv: no images in it',
        '': 'x.csv: no images in it',
        'image,caption\n0.png,"a\n': 'x.csv line 2: unexpected end of data',
        'image,caption,split\n0.png,a,west\n': "unknown split 'west'; expected 'train', 'val'",
        'image,caption,split\n0.png,a,test\n': 'no image is in the split train',
        'image,caption,split\n0.png,a,test\n0.png,a,train\n': '0.png is in the splits test and tr',
        'image,caption\n9.png,a\n': 'none of the 1 images in .*x.csv exists; .*images/9.png',
        '{"images": [': 'x.csv: unreadable: ',
        '{"a": 1}': 'no image column; it has a',
        '[1, 2]': 'not the layout that it seems',
        '{"images": [{"filename": "a.png"}]}': "it seems, KeyError: 'sentences'",
        '{"images": []}': 'no images in it',
    }.items():
        path.write_text(content)
        refuse(match, tmp_path)
    path.write_bytes(b'image,caption\n0.png,\xff\n')
    refuse('unreadable: .*utf-8', tmp_path)
    refuse("the source 'folder' reads no such file", tmp_path, source='folder', captions='x.csv')


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, content in members:
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(numbers, folder=''):
    for i in numbers:
        yield f'{folder}{i:03d}.png', PNG[i % 6]
        yield f'{folder}{i:03d}.txt', f' picture {i} ü\nin a line \n'
        yield f'{folder}{i:03d}.cls', str(i % 3)


def test_tars_are_read_in_random_access(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f'train-{shard:03d}.tar', samples(range(4 * shard, 4 * shard + 4)))
    write_tar(tmp_path / 'val-000.tar', samples(range(12, 14), './a/' + 150 * 'long/'))
    pattern = tmp_path / '{train-{000..002},val-000}.tar'
    for root in (tmp_path, pattern, tmp_path / '*-00?.tar'):
        splits = open_tars(root)
        assert {k: len(v) for k, v in splits.items()} == {'train': 12, 'test': 2}
        train = splits['train']
        assert train.classes == {'label': ['0', '1', '2']}
        assert names(train)[:5] == [f'train-000.tar/00{i}' for i in range(4)] + [
            'train-001.tar/004'
        ]
        record = splits['test'][1]
        assert record['captions'] == splits['test'].captions(1) == ['picture 13 ü\nin a line']
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for i, record in zip(
                [*range(12)] * 5, pool.map(train.__getitem__, [*range(12)] * 5), strict=True
            ):
                np.testing.assert_array_equal(record['image'], photo(i % 6, 20, 24))
                assert record['label'] == i % 3
                assert record['captions'] == [f'picture {i} ü\nin a line']
    (tmp_path / 'classes.txt').write_text('cat\ndog\nbird\n')
    assert open_tars(tmp_path)['test'].classes == {'label': ['cat', 'dog', 'bird']}
    one = open_tars(tmp_path / 'val-000.tar')
    assert sum(map(len, one.values())) == 2


def test_tars_splits_from_folders_and_holdout(tmp_path):
    for split in ('training', 'validation', 'test'):
        write_tar(tmp_path / split / '0.tar', samples(range(4)))
    splits = open_tars(tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {'train': 4, 'validation': 4, 'test': 4}
    assert splits['validation'].describe(0) == 'validation/0.tar/000'
    write_tar(tmp_path / 'all' / 'contest.tar', samples(range(200)))
    splits = open_tars(tmp_path / 'all', holdout=0.2)
    assert 20 < len(splits['test']) < 60
    number = int(splits['test'].describe(3)[-3:])
    assert splits['test'].captions(3) == [f'picture {number} ü\nin a line']


def test_tars_captions_may_be_json_or_missing(tmp_path):
    jsons = [{'caption': 'a'}, {'captions': ['b', ' ', 'c']}, {'width': 3}, [], {'caption': None}]
    members = []
    for i, content in enumerate(jsons):
        members += [(f'{i}.JPG', encoded(photo(i), 'JPEG')), (f'{i}.json', json.dumps(content))]
    members += [('5.webp', b'damaged'), ('5.txt', 'f'), ('5.cls', 'x'), ('lonely.txt', 'g')]
    write_tar(tmp_path / 'a.tar', [*members, ('6.png', PNG[0]), ('6.cls', '0')])
    source = open_tars(tmp_path, holdout=0)['train']
    assert names(source) == [f'a.tar/{i}' for i in range(7)]
    assert [source.captions(i) for i in (0, 1, 5)] == [['a'], ['b', 'c'], ['f']]
    for i, match in {2: 'no caption', 3: 'damaged .json', 4: 'no caption', 6: 'no caption'}.items():
        with pytest.raises(BadRecord, match=match):
            source[i]
    with pytest.raises(BadRecord, match=r'damaged .cls'):
        source[5]
    write_tar(tmp_path / 'a.tar', [(f'{i}.png', PNG[i]) for i in range(3)])
    source = open_tars(tmp_path, holdout=0)['train']
    assert not hasattr(source, 'captions')
    assert set(source[0]) == {'image', 'label'}
    assert (source[0]['label'], source.classes) == (-1, {})


def test_damaged_tars_are_named(tmp_path):
    path = tmp_path / 'a.tar'
    write_tar(path, samples(range(4)))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[6]
        inside, between = last.offset_data + 10, last.offset
    cuts = {inside: 'in a picture', between: 'between members', between + 100: 'in a header'}
    for length in cuts:
        path.write_bytes(whole[:length])
        refuse(r"a.tar' is truncated, damaged or compressed", tmp_path, open_tars)
    path.write_bytes(whole[:between] + b'x' * 512 + whole[between + 512 :])
    refuse(r"a.tar' is truncated, damaged or compressed: no header", tmp_path, open_tars)
    with tarfile.open(path, 'w:gz') as tar:
        tar.addfile(tarfile.TarInfo('a.png'))
    refuse(r"a.tar' is truncated, damaged or compressed", tmp_path, open_tars)
    write_tar(path, [('a.txt', 'a')])
    refuse(r'has no images in .*a.tar', tmp_path, open_tars)
    refuse(r'not set: --config.data.root=DIR. Expected: a tar', '', open_tars)
    refuse(r"there is no '.*b-01.tar'", tmp_path / 'b-{01..02}.tar', open_tars)


def test_grids_of_digits_are_what_their_captions_say():
    splits = data.open_splits({'source': 'digits:grids'})
    scans = data.open_splits({'source': 'digits'})
    seen = set()
    for (split, count), texts in zip({'train': 8000, 'test': 1000}.items(), (3, 2), strict=True):
        source = splits[split]
        assert len(source) == count
        assert source.classes == {'label': digits.NAMES}
        known = {}
        for i in range(len(scans[split])):
            known[scans[split][i]['image'].tobytes()] = scans[split][i]['label']
        for i in range(0, count, 1 if split == 'test' else 40):
            record = source[i]
            image = record['image']
            assert image.shape == (16, 16, 3)
            assert image.dtype == np.uint8
            corners = [image[y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]
            a, b, c, d = (digits.NAMES[known[corner.tobytes()]] for corner in corners)
            assert record['label'] == digits.NAMES.index(a)
            captions = record['captions']
            assert captions == source.captions(i)
            assert len(captions) == texts
            assert captions[0] == f'{a} and {b} above {c} and {d}'
            assert captions[1] == f'top row {a} {b}, bottom row {c} {d}'
            partial = {
                f'a {name} at the {where}'
                for name, where in zip((a, b, c, d), digits.CORNERS, strict=True)
            }
            assert set(captions[2:]) <= partial
        seen.update(source.captions(i)[0] for i in range(count))
    assert len(seen) == 9000
    again = data.open_splits({'source': 'digits:grids'})
    np.testing.assert_array_equal(again['train'][77]['image'], splits['train'][77]['image'])
    assert again['train'].captions(77) == splits['train'].captions(77)


def test_subsets_pass_captions_on_only_where_there_are_some(tmp_path):
    grids = data.open_splits({'source': 'digits:grids'})['test']
    part = data.Subset(grids, [5, 3])
    assert part.captions(1) == grids.captions(3) == part[1]['captions']
    assert data.Subset(part, [1]).captions(0) == grids.captions(3)
    folder = data.open_splits({'source': 'folder', 'root': str(make_folder(tmp_path))})
    assert not hasattr(data.Subset(folder['train'], [0]), 'captions')


def test_tfds_texts_in_every_form():
    forms = [
        'ü'.encode(),
        ['ü', ' '],
        {'id': [1], 'text': ['ü'.encode()]},
        [{'text': 'ü'}],
        np.array(['ü'.encode()], object),
        [],
    ]
    records = [{'image': PNG[0], 'captions': form} for form in forms]
    source = tfds.Captioned(records, {}, 'x/train', 'image', None, text='captions')
    assert [source.captions(i) for i in range(5)] == [['ü']] * 5
    assert source[2]['captions'] == ['ü']
    assert source[2]['label'] == -1
    with pytest.raises(BadRecord, match='no caption'):
        source.captions(5)


@pytest.mark.tensorflow
def test_tfds_reads_captions_of_a_real_dataset(tmp_path):
    import tensorflow_datasets as real

    # As coco_captions has them.
    class Described(real.core.GeneratorBasedBuilder, skip_registration=True):
        """Pictures with two captions each."""

        VERSION = real.core.Version('1.0.0')

        def _info(self):
            captions = real.features.Sequence({'id': np.int64, 'text': np.str_})
            features = {'image': real.features.Image(), 'captions': captions}
            return real.core.DatasetInfo(
                builder=self, features=real.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {'train': self._generate_examples(), 'val': self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                texts = [{'id': i, 'text': f'Bild {i} ü'}, {'id': 9, 'text': 'zwei'}]
                yield i, {'image': photo(i, 20, 24), 'captions': texts}

    Described(data_dir=tmp_path, file_format='array_record').download_and_prepare()
    splits = data.open_splits({'source': 'tfds:described', 'root': str(tmp_path)})
    assert {k: len(v) for k, v in splits.items()} == {'train': 6, 'test': 6}
    known = {photo(i, 20, 24).tobytes(): [f'Bild {i} ü', 'zwei'] for i in range(6)}
    for i in range(6):
        record = splits['test'][i]
        expected = known[record['image'].tobytes()]
        assert record['captions'] == splits['test'].captions(i) == expected
