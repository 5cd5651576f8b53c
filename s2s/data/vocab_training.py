"""Training of vocabularies, and the cache that keeps them.

Decides what a vocabulary is made from: the training part only, as SentencePiece models or plain symbol
tables. Must not know how text becomes ids (vocab) nor where pairs come from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import sentencepiece
from tqdm import tqdm

from s2s.batch import BOS, EOS, PAD, SPECIALS, UNK
from s2s.config import VocabConfig
from s2s.data.corpora import Corpus, Pair, cache_folder
from s2s.data.vocab import (
    THREADS,
    UNKNOWN,
    SentencePieceVocabulary,
    SymbolVocabulary,
    Vocabularies,
    Vocabulary,
    VocabularyError,
    load_vocabularies,
    save_vocabularies,
    split_symbols,
)

# Pairs a SentencePiece model is trained on at most; a larger corpus is sampled.
TRAIN_PAIRS = 1_000_000
# Part of every cache key: raise it when the same pairs would give other vocabularies.
_FORMAT_VERSION = 1


def open_vocabularies(
    corpus: Corpus, cfg: VocabConfig, *, seed: int, cache: str | None, progress: bool = True
) -> Vocabularies:
    """Trains the vocabularies of both sides, or reads what an earlier call left in the cache.

    The cache is keyed by everything that decides the result; a damaged entry is made anew.

    Args:
      corpus, cfg, seed, progress: as in `train_vocabularies`.
      cache: folder of everything prepared; None: s2s in the user's cache folder.

    Raises:
      VocabularyError: as `train_vocabularies`, or the cache cannot be written.
    """
    version = [_FORMAT_VERSION, sentencepiece.__version__, TRAIN_PAIRS]
    parts = [*version, corpus.fingerprint, dataclasses.asdict(cfg), seed]
    folder = cache_folder(cache) / "vocab" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    try:
        return load_vocabularies(folder, cfg)
    except VocabularyError:  # new, or damaged
        vocabs = train_vocabularies(corpus, cfg, seed=seed, progress=progress)
    try:
        save_vocabularies(vocabs, folder)
    except OSError as error:
        raise VocabularyError(
            f"the cache {folder.parent} cannot be written ({error.strerror}): make room or rights there, "
            "or set config.data.cache to another folder"
        ) from error
    return vocabs


def train_vocabularies(corpus: Corpus, cfg: VocabConfig, *, seed: int, progress: bool = True) -> Vocabularies:
    """Trains the vocabularies of both sides on the training part.

    The same corpus, configuration and seed give the same vocabularies on any machine.
    A corpus with less to learn than ``cfg.size`` gives a smaller vocabulary. Kinds
    "char" and "word" keep the most frequent characters and words if there are more.

    Args:
      corpus: the training part; of several targets the first is read.
      cfg: kind, sizes and separators.
      seed: chooses the pairs if there are more than `TRAIN_PAIRS` ("symbols" reads all).
      progress: show a bar on a terminal.

    Raises:
      VocabularyError: the corpus is empty, or has more characters than ``cfg.size`` allows.
    """
    if len(corpus) == 0:
        raise VocabularyError("the training part has no pairs to make a vocabulary from")
    if cfg.kind == "symbols":
        return _train_symbols(corpus, cfg, progress)
    pairs = _shown(_drawn(corpus, seed), min(len(corpus), TRAIN_PAIRS), progress)
    source, target = zip(*((pair["source"], pair["targets"][0]) for pair in pairs), strict=True)
    if cfg.shared:
        both = _train_sentencepiece(itertools.chain(source, target), cfg, cfg.size, "size")
        return Vocabularies(both, both)
    target_field = "size" if cfg.target_size is None else "target_size"
    return Vocabularies(
        _train_sentencepiece(source, cfg, cfg.size, "size"),
        _train_sentencepiece(target, cfg, cfg.target_size or cfg.size, target_field),
    )


def _train_symbols(corpus: Corpus, cfg: VocabConfig, progress: bool) -> Vocabularies:
    source: Counter[str] = Counter()
    target: Counter[str] = Counter()
    for pair in _shown(corpus, len(corpus), progress):
        source.update(split_symbols(pair["source"], cfg.source_separator))
        target.update(split_symbols(pair["targets"][0], cfg.target_separator))
    if cfg.shared:
        both = SymbolVocabulary(_by_frequency(source + target), cfg.source_separator)
        return Vocabularies(both, both)
    return Vocabularies(
        SymbolVocabulary(_by_frequency(source), cfg.source_separator),
        SymbolVocabulary(_by_frequency(target), cfg.target_separator),
    )


def _by_frequency(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda symbol: (-counts[symbol], symbol))


def _train_sentencepiece(texts: Iterable[str], cfg: VocabConfig, size: int, field: str) -> Vocabulary:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=cfg.kind,
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name=cfg.normalization,
            # Whole numbers as pieces could not be copied or computed with.
            split_digits=True,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            pad_piece=SPECIALS[PAD],
            bos_piece=SPECIALS[BOS],
            eos_piece=SPECIALS[EOS],
            unk_piece=SPECIALS[UNK],
            # A piece carries its space inside, an unknown word does not.
            unk_surface=f" {UNKNOWN} " if cfg.kind == "word" else UNKNOWN,
            num_threads=THREADS,
            # Longer lines (in bytes) would be passed over in silence.
            max_sentence_length=1 << 20,
            # Errors come as exceptions; level 2 keeps all the rest quiet.
            minloglevel=2,
        )
    except Exception as error:  # SWIG raises whatever it finds
        raise _explained(error, cfg, size, field) from error
    return SentencePieceVocabulary(model.getvalue(), cfg.kind)


def _explained(error: Exception, cfg: VocabConfig, size: int, field: str) -> VocabularyError:
    needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
    if needed:
        count = int(needed[1])
        return VocabularyError(
            f"config.data.vocab.{field}={size} is too small: the training text has {count - len(SPECIALS)} "
            f"different characters and {cfg.kind!r} needs all of them and {len(SPECIALS)} reserved ids; "
            f"make it at least {count}, better several times that, or use kind 'char'"
        )
    if "sentences_.empty()" in str(error) or "all_chars_count" in str(error):
        return VocabularyError(
            "the training part has no text to make a vocabulary from: every line is blank after "
            f"config.data.vocab.normalization={cfg.normalization!r}"
        )
    return VocabularyError(
        f"SentencePiece cannot train config.data.vocab.kind={cfg.kind!r} of size {size} "
        f"with normalization={cfg.normalization!r}: {error}"
    )


def _drawn(corpus: Corpus, seed: int) -> Iterator[Pair]:
    """All pairs, or as many as a model is trained on."""
    if len(corpus) <= TRAIN_PAIRS:
        return iter(corpus)
    rng = np.random.Generator(np.random.Philox(seed))
    return (corpus[int(index)] for index in np.sort(rng.choice(len(corpus), TRAIN_PAIRS, replace=False)))


def _shown(pairs: Iterable[Pair], total: int, progress: bool) -> Iterable[Pair]:
    # disable=None shows the bar on a terminal only.
    return tqdm(pairs, "vocabulary", total, unit=" pairs", disable=None if progress else True, leave=False)
