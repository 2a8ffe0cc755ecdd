"""The tokenizer: any script survives, texts are cut at the end alone, known vocabularies load."""

import concurrent.futures
import gzip
import pathlib
import unicodedata

import numpy as np
import pytest

from contrastive_jax.config import UserError
from contrastive_jax.data import text

TEXTS = [
    'Ein Hund läuft über die grüne Wiese.',
    'Straße, Größe und Übermut — „wörtlich“',
    '¿Dónde está la niña? ¡Aquí!',
    '猫がテーブルの上で寝ています。',
    'القط نائم على الطاولة',
    'कुत्ता घास पर दौड़ रहा है',
    'a family 👩‍👩‍👧‍👦 with a flag 🇩🇪 and 3.14 <|endoftext|> signs',
    'two dogs run, two dogs play; "two" dogs \x00 \u2028 sleep',
]


def train(path, texts=TEXTS, vocabulary=400, length=96, lower=False):
    tokenizer = text.train_tokenizer(texts, vocabulary=vocabulary, length=length, lower=lower)
    tokenizer.save(path.parent)
    (path.parent / 'tokenizer.json').rename(path)
    return tokenizer


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp('tokenizer') / 'tokenizer.json'
    return train(path), path


def test_any_script_survives_also_one_that_was_never_seen(trained):
    tokenizer, _ = trained
    for given in [*TEXTS, 'ภาษาไทย', 'Ελληνικά', 'x', '\U0010ffff', 'a\u0301 =  b\n\tc ']:
        normal = ' '.join(unicodedata.normalize('NFC', given).split())
        ids = tokenizer([given])[0]
        assert tokenizer.decode(ids) == normal
        assert ids.max() < tokenizer.vocabulary
    assert tokenizer.decode(tokenizer(['lone \ud800 surrogate'])[0]) == 'lone ? surrogate'


def test_a_row_is_start_tokens_end_and_then_nothing(trained):
    tokenizer, _ = trained
    start, end = tokenizer.vocabulary - 2, tokenizer.vocabulary - 1
    ids = tokenizer(['', ' \n', 'dogs', 'two dogs'])
    assert ids.shape == (4, 96)
    assert ids.dtype == np.int32
    for row in ids[:2]:
        assert row.tolist() == [start, end] + [-1] * 94
    # A word is the same token at the start of a text and within.
    assert ids[2][:3].tolist() == [start, ids[2][1], end]
    assert ids[3][:4].tolist() == [start, ids[3][1], ids[2][1], end]
    # A caption cannot end itself.
    assert (tokenizer(TEXTS) == end).sum(axis=1).tolist() == [1] * len(TEXTS)
    assert tokenizer([]).shape == (0, 96)


def test_long_texts_are_cut_with_the_end_kept_and_counted(tmp_path):
    tokenizer = train(tmp_path / 'a.json', length=5)
    ids = tokenizer(['x y z', 'x y z w', 'dogs'])
    end = tokenizer.vocabulary - 1
    assert (ids >= 0).sum(axis=1).tolist()[:2] == [5, 5]
    assert ids[1, -1] == end
    whole = train(tmp_path / 'b.json', length=50)(['x y z', 'x y z w', 'dogs'])
    lengths = (whole >= 0).sum(axis=1)
    assert tokenizer.truncated == (lengths > 5).sum() > 0
    assert tokenizer.seen == 3
    np.testing.assert_array_equal(ids[:, :4][lengths > 5], whole[:, :4][lengths > 5])
    with pytest.raises(UserError, match='length: got 2; expected a whole number of at least 3'):
        train(tmp_path / 'c.json', length=2)


def test_case_is_kept_or_not(tmp_path):
    kept, lowered = train(tmp_path / 'a.json'), train(tmp_path / 'b.json', lower=True)
    assert kept.decode(kept(['Ein HUND Ü'])[0]) == 'Ein HUND Ü'
    assert lowered.decode(lowered(['Ein HUND Ü'])[0]) == 'ein hund ü'
    np.testing.assert_array_equal(lowered(['Ein HUND Ü']), lowered(['ein hund ü']))


def test_reopened_it_gives_the_same_ids_and_training_is_deterministic(trained, tmp_path):
    tokenizer, path = trained
    for where in (path, path.parent, str(path)):
        again = text.open_tokenizer(where, length=96, lower=False)
        np.testing.assert_array_equal(again(TEXTS), tokenizer(TEXTS))
        assert again.vocabulary == tokenizer.vocabulary
    train(tmp_path / 'deeper' / 'b.json', iter(TEXTS))
    assert (tmp_path / 'deeper' / 'b.json').read_text() == path.read_text()


def test_the_vocabulary_is_at_most_what_was_asked(trained, tmp_path):
    assert trained[0].vocabulary <= 400
    many = [f'{a}{b}{a}{b} {c}' for a in 'abcdefgh' for b in 'ijklmnop' for c in 'uvw']
    assert train(tmp_path / 'a.json', many, vocabulary=300).vocabulary == 300
    assert train(tmp_path / 'b.json', ['abc'], vocabulary=5000).vocabulary == 258
    with pytest.raises(UserError, match=r'vocabulary: got 257; .* of at least 258'):
        train(tmp_path / 'c.json', vocabulary=257)
    with pytest.raises(UserError, match='there are no texts'):
        train(tmp_path / 'c.json', [])
    assert not (tmp_path / 'c.json').exists()


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'tokenizer.json'
    train(path)
    before = path.read_text()

    def fail(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(text.epath.Path(path)), 'replace', fail)
        with pytest.raises(KeyboardInterrupt):
            train(path, ['other words, other words'])
    assert path.read_text() == before
    train(path)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == '.json'] == ['tokenizer.json']


def test_threads_share_one(trained):
    tokenizer, path = trained
    tokenizer = text.open_tokenizer(path, length=12, lower=False)
    alone = tokenizer(TEXTS)
    cut, seen = tokenizer.truncated, tokenizer.seen
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(tokenizer, [TEXTS] * 200))
    assert all((row == alone).all() for row in rows)
    assert (tokenizer.truncated, tokenizer.seen) == (201 * cut, 201 * seen)


def test_mistakes_say_what_was_expected(tmp_path):
    def refuse(path, match):
        with pytest.raises(UserError, match=match):
            text.open_tokenizer(path, length=8, lower=True)

    refuse(tmp_path / 'none.json', r"none.json' does not exist. Expected: a tokenizer.json")
    refuse(tmp_path, 'tokenizer.json. does not exist')
    for name in ('a.json', 'a.txt.gz'):
        (tmp_path / name).write_bytes(b'no tokenizer')
        refuse(tmp_path / name, rf'cannot read .*{name}')
    tokenizers = pytest.importorskip('tokenizers')
    tokenizers.Tokenizer(tokenizers.models.BPE({'a': 0}, [])).save(str(tmp_path / 'b.json'))
    refuse(tmp_path / 'b.json', 'no token that ends a text')


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    (tmp_path / 'a.model').write_bytes(b'')
    monkeypatch.setitem(sys.modules, 'sentencepiece', None)
    with pytest.raises(UserError, match='pip install sentencepiece'):
        text.open_tokenizer(tmp_path / 'a.model', length=8, lower=True)
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(UserError, match='pip install tokenizers'):
        train(tmp_path / 'a.json')


def test_other_tokenizer_files_with_their_names_for_start_and_end(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({'[UNK]': 0, '[CLS]': 1, '[SEP]': 2, 'dog': 3}, '[UNK]')
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.enable_padding(length=7)
    model.enable_truncation(2)
    model.save(str(tmp_path / 'tokenizer.json'))
    tokenizer = text.open_tokenizer(tmp_path, length=6, lower=True)
    assert tokenizer(['Dog dog cat']).tolist() == [[1, 3, 3, 0, 2, -1]]
    assert tokenizer.vocabulary == 4


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip('sentencepiece')
    for name, more in {'both': {}, 'end': {'bos_id': -1}}.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 4),
            model_prefix=str(tmp_path / name),
            vocab_size=150,
            hard_vocab_limit=False,
            minloglevel=2,
            **more,
        )
        tokenizer = text.open_tokenizer(tmp_path / f'{name}.model', length=60, lower=True)
        processor = sentencepiece.SentencePieceProcessor(str(tmp_path / f'{name}.model'))
        row = tokenizer(['Two  dogs RUN'])[0]
        before = [processor.bos_id()] if name == 'both' else []
        known = [*before, *processor.encode('two dogs run'), processor.eos_id()]
        assert row[: len(known)].tolist() == known
        assert set(row[len(known) :].tolist()) == {-1}
        assert tokenizer.decode(row) == 'two dogs run'
        assert tokenizer.vocabulary == processor.vocab_size()


def test_clips_vocabulary_by_the_definition(tmp_path):
    pytest.importorskip('ftfy')
    merges = ['h e', 'l l', 'he ll', 'hell o</w>', 'd o', 'do g</w>']
    lines = '\n'.join(['"version"', *merges, ''])
    (tmp_path / 'bpe.txt.gz').write_bytes(gzip.compress(lines.encode()))
    tokenizer = text.open_tokenizer(tmp_path / 'bpe.txt.gz', length=12, lower=False)
    first = 512  # the 256 bytes, and once more as a word's last
    start, end = first + len(merges), first + len(merges) + 1
    row = tokenizer(['Hello &amp;  DOG'])[0].tolist()
    ampersand = 256 + ord('&') - ord('!')
    assert row[:5] == [start, first + 3, ampersand, first + 5, end]
    assert tokenizer.decode(row) == 'hello & dog'
    assert tokenizer.vocabulary == end + 1


def test_clips_own_vocabulary_where_open_clip_is_installed():
    open_clip = pytest.importorskip('open_clip')
    path = pathlib.Path(open_clip.__file__).parent / 'bpe_simple_vocab_16e6.txt.gz'
    tokenizer = text.open_tokenizer(path, length=77, lower=True)
    texts = [*TEXTS[:6], "it's  we'll", 'â€œmojibakeâ€ “curly”', '&lt;b&gt;', '', 'word ' * 200]
    theirs = open_clip.SimpleTokenizer()(texts).numpy()
    ours = tokenizer(texts)
    np.testing.assert_array_equal(np.where(ours < 0, 0, ours), theirs)
    assert tokenizer.vocabulary == 49408
