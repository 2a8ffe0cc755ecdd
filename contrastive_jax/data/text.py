"""Captions to token ids: a byte-level BPE trained on the captions at hand, or a known vocabulary.

Text is one line: NFC, runs of whitespace made one space, lower-cased where asked. Bytes are the
alphabet (Radford et al. 2019, GPT-2, section 2.2), so any script and any emoji survives. It becomes
[start] tokens [end], cut to the length with the end kept (Radford et al. 2021, CLIP, section 2.4).
"""

import functools
import gzip
import html
import importlib
import os
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from contrastive_jax.config import UserError, check_range

START, END = '<|startoftext|>', '<|endoftext|>'
# Their names in known vocabularies; GPT-2 has one token for both, T5 no start.
STARTS = (START, '<start_of_text>', '<|begin_of_text|>', '[CLS]', '<s>', '<bos>', END)
ENDS = (END, '<end_of_text>', '<|end_of_text|>', '[SEP]', '</s>', '<eos>')
# GPT-2's words, with marks (vowel signs of Hindi, Thai, ...) counted as letters; CLIP's.
WORDS = r' ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+'
CLIP_WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# The name of a tokenizer's file in a workdir, by its suffix.
FILES = {'.json': 'tokenizer.json', '.model': 'tokenizer.model', '.gz': 'tokenizer.txt.gz'}
EXPECTED = (
    "Expected: a tokenizer.json of Hugging Face's tokenizers or a directory with one, CLIP's "
    'bpe_simple_vocab_16e6.txt.gz, or a SentencePiece .model.'
)


class Vocabulary(NamedTuple):
    """A library's way between lists of texts and of ids, without `start` and `end`."""

    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    size: int
    start: int | None
    end: int


class Tokenizer:
    """Texts to rows of ids below `vocabulary`, `end` the last; may be called from several threads.

    `seen` and `truncated` count the texts so far and those that were cut to `length`; `name` and
    `content` are of its file.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        normalise: Callable[[str], str],
        length: int,
        content: bytes,
        suffix: str = '.json',
    ):
        check_range('tokenizer', {'length': length}, least=3, whole=True)
        self.name, self.content = FILES[suffix], content
        self.vocabulary, self.length, self.normalise = vocabulary.size, length, normalise
        self.end = vocabulary.end
        self.seen = self.truncated = 0
        self._vocabulary, self._lock = vocabulary, threading.Lock()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """[n, length] int32: start, tokens, end, then -1, which is no token."""
        ids_nT = np.full((len(texts), self.length), -1, np.int32)
        start, end = self._vocabulary.start, self._vocabulary.end
        before = [] if start is None else [start]
        room = self.length - len(before) - 1
        found = self._vocabulary.encode([self.normalise(text) for text in texts])
        for row, ids in zip(ids_nT, found, strict=True):
            ids = [*before, *ids[:room], end]
            row[: len(ids)] = ids
        with self._lock:
            self.seen += len(texts)
            self.truncated += sum(len(ids) > room for ids in found)
        return ids_nT

    def save(self, folder: str | os.PathLike) -> None:
        """Writes its file into a folder, whole or not at all; `open_tokenizer(folder)` reads it."""
        path = epath.Path(folder)
        if (path / self.name).exists() and (path / self.name).read_bytes() == self.content:
            return
        path.mkdir(parents=True, exist_ok=True)
        temporary = path / f'{self.name}.tmp'
        temporary.write_bytes(self.content)
        temporary.replace(path / self.name)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a row."""
        none = (-1, self._vocabulary.start, self._vocabulary.end)
        return self._vocabulary.decode([int(i) for i in ids if i not in none])


def files(folder: str | os.PathLike) -> list[epath.Path]:
    """Those that `save` has written into a folder: one or none."""
    paths = (epath.Path(folder) / name for name in FILES.values())
    return [path for path in paths if path.exists()]


def open_tokenizer(path: str | os.PathLike, *, length: int, lower: bool) -> Tokenizer:
    """Reads a vocabulary.

    Args:
        path: a tokenizer.json or a directory with one; CLIP's bpe_simple_vocab_16e6.txt.gz, whose
            ids are then OpenAI's; a SentencePiece .model.
        length: tokens a text, start and end counted; at least 3.
        lower: lower-case first. CLIP's always does.

    Raises:
        UserError: no such file, not one of the three kinds, no token that ends a text, a package
            that is not installed, length below 3.
    """
    file = epath.Path(path).expanduser()
    if file.is_dir():
        file = next(iter(files(file)), file / FILES['.json'])
    if not file.exists():
        raise UserError(f'tokenizer: {str(file)!r} does not exist. {EXPECTED}')
    return read_tokenizer(file.name, file.read_bytes(), length=length, lower=lower)


def read_tokenizer(name: str, content: bytes, *, length: int, lower: bool) -> Tokenizer:
    """As `open_tokenizer`, of a file's name and content."""
    suffix = os.path.splitext(name)[1]
    suffix = suffix if suffix in FILES else '.json'

    normalise: Callable[[str], str] = functools.partial(_normal, lower=lower)
    try:
        if suffix == '.gz':
            vocabulary, normalise = _clip(gzip.decompress(content).decode())
        elif suffix == '.model':
            lib = _import('sentencepiece')
            model = lib.SentencePieceProcessor(model_proto=content)
            start = model.bos_id() if model.bos_id() >= 0 else None
            end, size = model.eos_id(), model.vocab_size()
            vocabulary = Vocabulary(model.encode, model.decode, size, start, end)
        else:
            vocabulary = _of(_import('tokenizers').Tokenizer.from_str(content.decode()))
    except UserError:
        raise
    except Exception as error:  # each library has its own, tokenizers' is Exception itself
        raise UserError(f'tokenizer: cannot read {name!r}: {error}. {EXPECTED}') from error
    if vocabulary.end < 0:
        raise UserError(f'tokenizer: {name!r} has no token that ends a text: {ENDS}.')
    return Tokenizer(vocabulary, normalise, length, content, suffix)


def train_tokenizer(
    texts: Iterable[str], *, vocabulary: int, length: int, lower: bool
) -> Tokenizer:
    """Trains a byte-level BPE; the same texts give the same one.

    Args:
        texts: captions; they are read once.
        vocabulary: tokens at most, at least 258: the bytes, start and end. What occurs once makes
            no token, so few texts give fewer. The last two are start and end, as in CLIP's.
        length: tokens a text, start and end counted; at least 3.
        lower: lower-case first.

    Raises:
        UserError: no texts, vocabulary below 258, length below 3, tokenizers not installed.
    """
    check_range('tokenizer', {'vocabulary': vocabulary}, least=258, whole=True)
    lib = _import('tokenizers')
    model = lib.Tokenizer(lib.models.BPE())
    # A word brings the space before it, the first word too: one token wherever it stands.
    model.normalizer = lib.normalizers.Prepend(' ')
    model.pre_tokenizer = _words(lib, WORDS)
    model.decoder = lib.decoders.Sequence([lib.decoders.ByteLevel(), lib.decoders.Strip(' ', 1, 0)])
    trainer = lib.trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        min_frequency=2,
        initial_alphabet=sorted(lib.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for text in texts:
            read += 1
            yield _normal(text, lower)

    model.train_from_iterator(lines(), trainer)
    if not read:
        raise UserError('tokenizer: there are no texts to train on.')
    model.add_special_tokens([START, END])
    content = model.to_str().encode()
    return Tokenizer(_of(model), functools.partial(_normal, lower=lower), length, content)


def _normal(text: str, lower: bool) -> str:
    """One line in NFC; lone surrogates, which JSON can hold and UTF-8 cannot, become '?'."""
    text = unicodedata.normalize('NFC', text.encode('utf-8', 'replace').decode())
    text = ' '.join(text.split())
    return text.lower() if lower else text


def _words(lib: Any, pattern: str) -> Any:
    pre = lib.pre_tokenizers
    split = pre.Split(lib.Regex(pattern), 'removed', invert=True)
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def _of(model: Any) -> Vocabulary:
    """The vocabulary of a tokenizers.Tokenizer; an end of -1 where it has none."""
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True  # a caption that says '<|endoftext|>' ends no text
    ids = model.get_vocab()
    start, end = (next((ids[n] for n in names if n in ids), None) for names in (STARTS, ENDS))

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in model.encode_batch_fast(texts, add_special_tokens=False)]

    size = max(ids.values()) + 1
    return Vocabulary(encode, model.decode, size, start, -1 if end is None else end)


def _clip(text: str) -> tuple[Vocabulary, Callable[[str], str]]:
    """OpenAI's byte-level BPE, where a word's last token ends in '</w>', and its cleaning."""
    lib, ftfy = _import('tokenizers'), _import('ftfy')
    lines = text.split('\n')[1 : 49152 - 256 - 2 + 1]  # a version before, unused merges after
    merges = [tuple(line.split()) for line in lines if line]
    # Bytes as characters: the printable ones are themselves and come first.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    names = [*letters, *(c + '</w>' for c in letters), *map(''.join, merges), START, END]
    ids = {name: i for i, name in enumerate(names)}
    model = lib.Tokenizer(lib.models.BPE(ids, merges, end_of_word_suffix='</w>'))
    model.add_special_tokens([START, END])
    model.pre_tokenizer = _words(lib, CLIP_WORDS)
    spaces = lib.decoders.Replace('</w>', ' '), lib.decoders.Strip(' ', 0, 1)
    model.decoder = lib.decoders.Sequence([lib.decoders.ByteLevel(), *spaces])

    def clean(text: str) -> str:
        # Mojibake and curly quotes mended, HTML entities read.
        text = ftfy.fix_text(text.encode('utf-8', 'replace').decode())
        return ' '.join(html.unescape(html.unescape(text)).split()).lower()

    return _of(model), clean


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'tokenizer: needs {name} ({error}): pip install {name}') from error
