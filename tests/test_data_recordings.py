"""Sound files and folders of them: what is read, labelled, split and refused."""

import io
import pathlib
import struct

import numpy as np
import pytest
import sounds
from pictures import encoded, photo, write

from contrastive_jax import data
from contrastive_jax.config import UserError
from contrastive_jax.data import BadRecord, sound
from contrastive_jax.data.bad_records import BadRecords
from contrastive_jax.data.sources import recordings

PATTERN = 'recordings:{digit}_{speaker}_*'
X = sounds.int16(sounds.spoken('1', 'bob'))


def open_recordings(root, source=PATTERN, **more):
    return data.open_splits({'source': source, 'root': str(root), **more})


def names(split):
    return [split.describe(i) for i in range(len(split))]


def labels(split, name):
    return [split.classes[name][split[i][name]] for i in range(len(split))]


WIDE = X.astype(np.int32) << 16
EXACT = {
    '16 bits': sounds.wav(X),
    '16 bits, big-endian': sounds.wav(X.astype('>i2')),
    '24 bits': sounds.wav24(WIDE),
    '32 bits': sounds.wav(WIDE),
    'float': sounds.wav((X / 32768).astype(np.float32)),
    'double': sounds.wav(X / 32768),
    'stereo': sounds.wav(np.stack([X, X], 1)),
    'of unknown length': sounds.wav(X)[:4] + b'\xff' * 4 + sounds.wav(X)[8:],
}


@pytest.mark.parametrize('content', EXACT.values(), ids=EXACT)
def test_wav_files_of_every_kind_hold_the_same_samples(content):
    wave, rate = sound.decode(content)
    assert rate == 8000
    assert wave.dtype == np.int16
    np.testing.assert_array_equal(wave, X)


def test_eight_bits_have_their_middle_at_128():
    wave, _ = sound.decode(sounds.wav(((X >> 8) + 128).astype(np.uint8)))
    np.testing.assert_array_equal(wave, (X >> 8) * 256)


def test_channels_are_averaged_and_loud_samples_clipped():
    wave, _ = sound.decode(sounds.wav(np.array([[1000, 2001], [-32768, -32768]], np.int16)))
    assert wave.tolist() == [1500, -32768]
    wave, _ = sound.decode(sounds.wav(np.array([1.5, 1.0, 0.25, -1.0, -7.0], np.float32)))
    assert wave.tolist() == [32767, 32767, 8192, -32768, -32768]


def header(kind, content=b'\0' * 64):
    """A WAV file whose format is of a number that SciPy does not know."""
    form = struct.pack('<HHIIHH', kind, 1, 8000, 8000, 1, 8)
    body = b'WAVEfmt ' + struct.pack('<I', 16) + form + b'data' + struct.pack('<I', len(content))
    return b'RIFF' + struct.pack('<I', len(body + content)) + body + content


BAD = {
    b'': 'zero bytes',
    sounds.wav(X)[:-9]: r'truncated: \d+ of \d+ bytes',
    sounds.wav(X)[:30]: 'truncated',
    sounds.wav(X[:0]): '0 samples at 8000 Hz',
    sounds.wav(np.array([0.5, np.nan], np.float32)): 'not finite',
    encoded(photo(), 'PNG'): 'not a WAV, FLAC or Ogg file',
    b'RIFF\x04\0\0\0WEBP': 'cannot be decoded',
    header(7): 'cannot be decoded: Unknown wave file format: MULAW',
}


@pytest.mark.parametrize(('content', 'why'), BAD.items(), ids=BAD.values())
def test_what_cannot_be_decoded_says_why(content, why):
    with pytest.raises(BadRecord, match=why):
        sound.decode(content)


def test_damaged_files_are_bad_records_and_nothing_else():
    rng, good = np.random.default_rng(0), sounds.wav(X)
    outcomes = set()
    for _ in range(300):
        content = bytearray(good)
        for place in rng.integers(0, 44, 2):
            content[place] = rng.integers(256)
        try:
            outcomes.add(sound.decode(bytes(content))[0].dtype)
        except BadRecord:
            outcomes.add('bad')
    assert outcomes == {np.dtype(np.int16), 'bad'}


def compressed(kind, x=X):
    soundfile = pytest.importorskip('soundfile')
    file = io.BytesIO()
    soundfile.write(file, x, 8000, format=kind)
    return file.getvalue()


def test_flac_and_ogg_with_the_extra(monkeypatch):
    content = compressed('FLAC')
    wave, rate = sound.decode(content)
    assert rate == 8000
    np.testing.assert_array_equal(wave, X)
    stereo, _ = sound.decode(compressed('FLAC', np.stack([X, X], 1)))
    np.testing.assert_array_equal(stereo, X)
    ogg, _ = sound.decode(compressed('OGG'))
    assert len(ogg) == len(X)
    assert np.corrcoef(ogg, X)[0, 1] > 0.95
    with pytest.raises(BadRecord, match='cannot be decoded'):
        sound.decode(content[: len(content) // 2])
    monkeypatch.setattr(sound, 'MAX_SAMPLES', len(X) - 1)
    with pytest.raises(BadRecord, match=f'{len(X)} samples are more than the limit'):
        sound.decode(content)


def test_flac_without_the_extra_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sound, 'has_soundfile', lambda: False)
    with pytest.raises(BadRecord, match=r"pip install 'contrastive-jax\[audio\]'"):
        sound.decode(b'fLaC' + bytes(40))
    sounds.make_folder(tmp_path, count=1)
    assert len(open_recordings(tmp_path, holdout=0)['train']) == 6
    write(tmp_path / '0_ann_9.flac', b'fLaC')
    with pytest.raises(UserError, match=r'1 of 7 files in .* are not WAV.*\[audio\]'):
        open_recordings(tmp_path)


def test_labels_from_names(tmp_path):
    sounds.make_folder(tmp_path, count=2, folder='deep/er')
    splits = open_recordings(tmp_path, holdout=0.3)
    train, test = splits['train'], splits['test']
    assert train.classes == {'digit': ['0', '1'], 'speaker': ['ann', 'bob', 'eve']}
    every = sorted(names(train) + names(test))
    assert every == [
        f'deep/er/{d}_{s}_{i}.wav' for d in '01' for s in sounds.SPEAKERS for i in '01'
    ]
    for split in (train, test):
        stems = [pathlib.Path(name).stem.split('_') for name in names(split)]
        assert labels(split, 'digit') == [digit for digit, *_ in stems]
        assert labels(split, 'speaker') == [speaker for _, speaker, _ in stems]
    record = train[0]
    assert record.keys() == {'wave', 'rate', 'digit', 'speaker'}
    digit, speaker, i = pathlib.Path(train.describe(0)).stem.split('_')
    expected = sounds.int16(sounds.spoken(digit, speaker, int(i)))
    np.testing.assert_array_equal(record['wave'], expected)
    assert record['rate'] == 8000
    # A pattern may name folders and the suffix, too.
    (by_folder,) = open_recordings(tmp_path, 'recordings:{set}/{digit}_*.wav', holdout=0).values()
    assert by_folder.classes == {'set': ['er'], 'digit': ['0', '1']}


def test_labels_from_folders_and_none(tmp_path):
    for folder in ('a/birds/x', 'a/cats', 'b'):
        write(tmp_path / folder / '1.wav', sounds.wav(X))
    (classed,) = open_recordings(tmp_path / 'a', 'recordings', holdout=0).values()
    assert classed.classes == {'label': ['birds', 'cats']}
    assert names(classed) == ['birds/x/1.wav', 'cats/1.wav']
    assert labels(classed, 'label') == ['birds', 'cats']
    (flat,) = open_recordings(tmp_path / 'b', 'recordings', holdout=0).values()
    assert flat.classes == {}
    assert flat[0].keys() == {'wave', 'rate'}


def test_splits_of_folders(tmp_path, caplog):
    sounds.make_folder(tmp_path, count=1, folder='train')
    for folder in ('test', 'val'):
        write(tmp_path / folder / '1_zoe_0.wav', sounds.wav(X))
    splits = open_recordings(tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {
        'train': 6,
        'test': 1,
        'validation': 1,
    }
    # Speakers who are not heard in training are classes, too, and the same in every split.
    assert {tuple(split.classes['speaker']) for split in splits.values()} == {
        ('ann', 'bob', 'eve', 'zoe')
    }
    assert labels(splits['test'], 'speaker') == ['zoe']
    assert 'test: 1 classes of speaker that train has not: zoe' in caplog.text
    assert splits['test'].describe(0) == 'test/1_zoe_0.wav'


def test_what_is_left_out_is_listed(tmp_path, caplog):
    sounds.make_folder(tmp_path, count=1)
    write(tmp_path / 'noise.wav', sounds.wav(X))
    write(tmp_path / '0_ann_7.m4a', b'...')
    write(tmp_path / 'notes.txt', b'...')
    write(tmp_path / '.hidden.wav', b'...')
    splits = open_recordings(tmp_path, holdout=0.2)
    assert sum(map(len, splits.values())) == 6
    expected = [
        ('0_ann_7.m4a', 'not a WAV, FLAC or Ogg file'),
        ('noise.wav', "does not match '{digit}_{speaker}_*'"),
    ]
    assert [split.skipped for split in splits.values()] == [expected, expected]
    assert '2 files of train are left out, first 0_ann_7.m4a: not a WAV' in caplog.text
    listed = tmp_path / 'bad_records.jsonl'
    bad = BadRecords(listed, 6)
    bad.note_skipped(splits)
    assert bad.count == 0
    assert len(listed.read_text().splitlines()) == 2
    write(tmp_path / 'a' / 'x.wav', sounds.wav(X))
    train = open_recordings(tmp_path, 'recordings', holdout=0)['train']
    assert names(train) == ['a/x.wav']
    assert ('noise.wav', 'beside the class folders') in train.skipped


def test_a_file_that_cannot_be_read_is_a_bad_record(tmp_path):
    sounds.make_folder(tmp_path, count=1)
    (tmp_path / '0_ann_1.wav').symlink_to(tmp_path / 'gone')
    write(tmp_path / '0_ann_2.wav', b'RIFF')
    (train,) = open_recordings(tmp_path, holdout=0).values()
    reasons = {}
    for i, name in enumerate(names(train)):
        try:
            train[i]
        except BadRecord as error:
            reasons[name] = str(error)
    assert reasons.keys() == {'0_ann_1.wav', '0_ann_2.wav'}
    assert 'unreadable: No such file' in reasons['0_ann_1.wav']


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('recordings:*_*', r"'\*_\*' names no label"),
        ('recordings:{digit', 'names no label'),
        ('recordings:{digit}_{digit}', r'\{digit\} in .* cannot be a label'),
        ('recordings:{digit}_{index}', r'\{index\} in .* none of index, .*\* stands for'),
        ('recordings:{}_{digit}', r'\{\} in .* cannot be a label'),
        ('recordings:{speaker}-*', r'none of the 6 recordings of train .*0_ann_0\.wav: does not'),
    ],
)
def test_patterns_that_are_refused(tmp_path, source, message):
    sounds.make_folder(tmp_path, count=1)
    with pytest.raises(UserError, match=message):
        open_recordings(tmp_path, source)


def test_roots_that_are_refused(tmp_path):
    with pytest.raises(UserError, match='the recordings source needs it'):
        open_recordings('')
    with pytest.raises(UserError, match='does not exist'):
        open_recordings(tmp_path / 'gone')
    write(tmp_path / 'a.txt', b'')
    with pytest.raises(UserError, match=r'no recordings in .* \(it has a\.txt\)'):
        open_recordings(tmp_path)


def test_no_label_can_hide_an_array_of_a_batch():
    for name in recordings.TAKEN:
        with pytest.raises(UserError, match='cannot be a label'):
            recordings.compiled(f'{{{name}}}_*')
