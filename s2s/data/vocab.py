"""Vocabularies: text to ids and back.

Decides how text is cut into pieces, by SentencePiece models and plain symbol tables, and what file each is
kept in. Must not know what a vocabulary is made from (vocab_training) nor what is done with the ids.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import sentencepiece

from s2s.batch import BOS, EOS, PAD, SPECIALS, UNK
from s2s.config import VocabConfig

# What decoded text shows for an unknown piece.
UNKNOWN = "⁇"
# What SentencePiece writes for the space before a word.
_SPACE = "▁"
# A fixed number: SentencePiece's results depend on it, and must not on the machine's cores.
THREADS = 4


class VocabularyError(ValueError):
    """A vocabulary that cannot be trained, read or used; the message says what to do."""


class Vocabulary(Protocol):
    """Text to ids and back; ids 0 to 3 are `s2s.batch.SPECIALS`.

    Attributes:
      size: number of ids, the reserved ones included.
      fingerprint: hash of everything that decides what `encode` gives.
    """

    size: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS; what is not in the vocabulary becomes UNK."""
        ...

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, faster."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids before the first EOS; PAD and BOS are dropped, UNK shows as "⁇"."""
        ...

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """One printable piece an id, reserved ids shown by name."""
        ...

    def word_numbers(self, ids: Sequence[int]) -> list[int]:
        """The number of the word, from 0, that each id before the first EOS is part of."""
        ...

    def symbols(self, text: str) -> list[str]:
        """Units of the symbol error rate."""
        ...

    def words(self, text: str) -> list[str]:
        """Units of the word error rate."""
        ...

    def save(self, path_stem: Path) -> None:
        """Writes the vocabulary to ``path_stem`` with the suffix of its kind."""
        ...


class Vocabularies(NamedTuple):
    """The vocabularies of both sides: one and the same object when shared."""

    source: Vocabulary
    target: Vocabulary


class SentencePieceVocabulary:
    """A SentencePiece model (Kudo and Richardson 2018).

    Text is normalised as the model says, so a round trip gives normalised text. The
    symbols of a text are its characters, its words what stands between white space.

    Args:
      model: the serialised model.
      kind: "unigram", "bpe", "char" or "word". Under "word" each unknown word is one UNK.

    Raises:
      VocabularyError: ``model`` is no SentencePiece model, or has other reserved ids.
    """

    suffix = ".model"

    def __init__(self, model: bytes, kind: str):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:  # SWIG raises whatever it finds
            raise VocabularyError(f"not a SentencePiece model: {error}") from error
        self._model = model
        self.size = int(self._processor.vocab_size())
        reserved = tuple(self._processor.id_to_piece(id) for id in range(min(4, self.size)))
        if reserved != SPECIALS:
            raise VocabularyError(f"ids 0 to 3 of the SentencePiece model are {reserved}, not {SPECIALS}")
        self.fingerprint = _hash(kind.encode(), model)
        # SentencePiece would join neighbouring unknown words into one UNK.
        self._apart = kind == "word"

    def encode(self, text: str) -> list[int]:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._apart:
            return self._processor.encode(list(texts), num_threads=THREADS)
        words = [text.split() for text in texts]
        pieces = iter(self._processor.encode(list(itertools.chain(*words)), num_threads=THREADS))
        return [list(itertools.chain(*itertools.islice(pieces, len(line)))) for line in words]

    def decode(self, ids: Sequence[int]) -> str:
        ids = _content(ids)
        text = self._processor.decode(ids)
        # Unknown words bring their own spaces.
        return re.sub(" +", " ", text).strip(" ") if self._apart else text

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [self._processor.id_to_piece(int(id)) for id in ids]

    def word_numbers(self, ids: Sequence[int]) -> list[int]:
        pieces = self.tokens(list(itertools.takewhile(lambda id: id != EOS, ids)))
        begins = (self._apart or piece.startswith(_SPACE) or at == 0 for at, piece in enumerate(pieces))
        return [number - 1 for number in itertools.accumulate(begins)]

    def symbols(self, text: str) -> list[str]:
        return list(text)

    def words(self, text: str) -> list[str]:
        return text.split()

    def save(self, path_stem: Path) -> None:
        _write(path_stem.with_name(path_stem.name + self.suffix), self._model)


class SymbolVocabulary:
    """Plain symbols between separators, such as characters or phonemes.

    Nothing is normalised: known symbols survive a round trip as they are. The symbols
    of a text are what stands between separators; the whole text is its one word.

    Args:
      symbols: the symbols of ids 4, 5, ...
      separator: what stands between two symbols; "" splits into characters, and
        under " " repeated spaces count as one.

    Raises:
      VocabularyError: a symbol occurs twice or holds the separator.
    """

    suffix = ".json"

    def __init__(self, symbols: Sequence[str], separator: str):
        self._symbols = tuple(symbols)
        self._separator = separator
        self._ids = {symbol: id for id, symbol in enumerate(self._symbols, len(SPECIALS))}
        if len(self._ids) != len(self._symbols):
            raise VocabularyError(f"symbol {Counter(self._symbols).most_common(1)[0][0]!r} occurs twice")
        for symbol in self._symbols:
            if self.symbols(symbol) != [symbol] and symbol != "":
                raise VocabularyError(f"symbol {symbol!r} is none: the separator is {separator!r}")
        self._pieces = (*SPECIALS[:UNK], UNKNOWN, *self._symbols)
        self.size = len(self._pieces)
        self.fingerprint = _hash(b"symbols", json.dumps([separator, *self._symbols]).encode())

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(symbol, UNK) for symbol in self.symbols(text)]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._separator.join(self._pieces[id] for id in _content(ids))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [SPECIALS[id] if id < len(SPECIALS) else self._pieces[id] for id in ids]

    def word_numbers(self, ids: Sequence[int]) -> list[int]:
        # Links between symbols are what one wants to see, so each counts as a word.
        return list(range(sum(1 for _ in itertools.takewhile(lambda id: id != EOS, ids))))

    def symbols(self, text: str) -> list[str]:
        return split_symbols(text, self._separator)

    def words(self, text: str) -> list[str]:
        return [text]

    def save(self, path_stem: Path) -> None:
        text = json.dumps(self._symbols, ensure_ascii=False, indent=0) + "\n"
        _write(path_stem.with_name(path_stem.name + self.suffix), text.encode("utf-8", "surrogatepass"))


def split_symbols(text: str, separator: str) -> list[str]:
    """Splits a text into its symbols, as `SymbolVocabulary` says.

    >>> split_symbols("n  oʊ", " "), split_symbols("abc", "")
    (['n', 'oʊ'], ['a', 'b', 'c'])
    """
    if separator == "":
        return list(text)
    if separator == " ":
        return [symbol for symbol in text.split(" ") if symbol]
    return text.split(separator) if text else []


def save_vocabularies(vocabs: Vocabularies, folder: Path) -> None:
    """Writes both vocabularies into a folder, one file if they are shared."""
    folder.mkdir(parents=True, exist_ok=True)
    if vocabs.source is vocabs.target:
        vocabs.source.save(folder / "shared")
    else:
        vocabs.source.save(folder / "source")
        vocabs.target.save(folder / "target")


def load_vocabularies(folder: Path, cfg: VocabConfig) -> Vocabularies:
    """Reads what `save_vocabularies` wrote.

    Raises:
      VocabularyError: a file is missing or damaged.
    """
    if cfg.shared:
        both = _load(folder / "shared", cfg.kind, cfg.source_separator)
        return Vocabularies(both, both)
    return Vocabularies(
        _load(folder / "source", cfg.kind, cfg.source_separator),
        _load(folder / "target", cfg.kind, cfg.target_separator),
    )


def _load(stem: Path, kind: str, separator: str) -> Vocabulary:
    suffix = SymbolVocabulary.suffix if kind == "symbols" else SentencePieceVocabulary.suffix
    path = stem.with_name(stem.name + suffix)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise VocabularyError(
            f"cannot read the vocabulary {path}: {error.strerror}; it is written when training starts"
        ) from error
    try:
        if kind != "symbols":
            return SentencePieceVocabulary(data, kind)
        symbols = json.loads(data.decode("utf-8", "surrogatepass"))
        if not isinstance(symbols, list) or not all(isinstance(symbol, str) for symbol in symbols):
            raise VocabularyError("not a JSON list of strings")
        return SymbolVocabulary(symbols, separator)
    except ValueError as error:
        raise VocabularyError(
            f"the vocabulary {path} is damaged ({error}); restore the file or train again in a new folder"
        ) from error


def _content(ids: Sequence[int]) -> list[int]:
    ended = itertools.takewhile(lambda id: id != EOS, (int(id) for id in ids))
    return [id for id in ended if id not in (PAD, BOS)]


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    # Renamed into place, so that nobody reads half a file.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    os.replace(partial, path)
