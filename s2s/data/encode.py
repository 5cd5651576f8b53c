"""Encoded corpora: every pair as ids, made once and kept on disk.

Decides how ids are stored and when they must be made anew. Must not know how pairs
are batched or shuffled.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from s2s.batch import EOS
from s2s.data.corpora import Corpus, CorpusError, Pair, cache_folder
from s2s.data.vocab import Vocabularies, Vocabulary

# Part of every cache key: raise it when the same pairs would be stored differently.
FORMAT_VERSION = 1
# Pairs encoded at a time: enough to keep SentencePiece's threads busy.
_CHUNK = 8192
_ARRAYS = {
    "source_ids": np.int32,
    "source_starts": np.int64,
    "target_ids": np.int32,
    "target_starts": np.int64,
    "record": np.int64,
    "line": np.int64,
    "too_long": np.int64,
}


@dataclass(frozen=True)
class Encoded:
    """The pairs of a corpus as ids, EOS last on both sides; position n is the n-th pair kept.

    Attributes:
      source_ids: the source ids of all pairs, one after another; int32.
      source_starts: pair n is source_ids[source_starts[n]:source_starts[n + 1]]; int64.
      target_ids, target_starts: the same for the (first) target.
      record: index of each pair in its corpus; int64.
      line: its line number; int64.
      too_long: line numbers of the pairs left out because a side was too long.
    """

    source_ids: np.ndarray
    source_starts: np.ndarray
    target_ids: np.ndarray
    target_starts: np.ndarray
    record: np.ndarray
    line: np.ndarray
    too_long: list[int]

    def __len__(self) -> int:
        return len(self.record)

    @property
    def source_lengths(self) -> np.ndarray:
        """Source ids of each pair, EOS included; int32."""
        return np.diff(self.source_starts).astype(np.int32)

    @property
    def target_lengths(self) -> np.ndarray:
        """Target ids of each pair, EOS included; int32."""
        return np.diff(self.target_starts).astype(np.int32)


def encode_corpus(
    corpus: Corpus,
    vocabs: Vocabularies,
    *,
    max_source: int | None,
    max_target: int | None,
    cache: str | None,
    progress: bool = True,
) -> Encoded:
    """Encodes a corpus, or maps what an earlier call left on disk into memory.

    The cache is keyed by corpus, vocabularies and limits; a damaged entry is made anew.

    Args:
      corpus: the pairs; of several targets the first is encoded.
      vocabs: of both sides.
      max_source: longest source kept, in ids with EOS; None: no limit.
      max_target: the same for the target.
      cache: folder of prepared corpora; None: s2s in the user's cache folder.
      progress: show a bar on a terminal.

    Raises:
      CorpusError: no pair is short enough, or the cache cannot be written.
    """
    parts = [
        FORMAT_VERSION,
        corpus.fingerprint,
        vocabs.source.fingerprint,
        vocabs.target.fingerprint,
        max_source,
        max_target,
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    folder = cache_folder(cache) / "encoded" / key
    encoded = _read(folder)
    if encoded is None:
        arrays = _encode(corpus, vocabs, max_source, max_target, progress)
        try:
            _write(folder, arrays)
        except OSError as error:
            raise CorpusError(
                f"the cache {folder.parent} cannot be written ({error.strerror}): make room or rights there, "
                "or set config.data.cache to another folder"
            ) from error
        encoded = _read(folder) or _from_arrays(arrays)
    if len(encoded) == 0:
        raise CorpusError(
            f"{corpus.name}: all {len(encoded.too_long)} pairs are longer than "
            f"config.data.max_source_length={max_source} or config.data.max_target_length={max_target} ids "
            "(with EOS); raise them"
        )
    return encoded


def _encode(
    corpus: Corpus, vocabs: Vocabularies, max_source: int | None, max_target: int | None, progress: bool
) -> dict[str, np.ndarray]:
    sides: dict[str, list[np.ndarray]] = {name: [] for name in ("source_ids", "target_ids")}
    lengths: dict[str, list[np.ndarray]] = {name: [] for name in ("source", "target")}
    records, lines, too_long = [], [], []
    # disable=None shows the bar on a terminal only.
    disable = None if progress else True
    with tqdm(desc="encoding", total=len(corpus), unit=" pairs", disable=disable, leave=False) as bar:
        for first, pairs in _chunks(corpus):
            source, source_lengths = _ids(vocabs.source, [pair["source"] for pair in pairs])
            target, target_lengths = _ids(vocabs.target, [pair["targets"][0] for pair in pairs])
            keep = np.ones(len(pairs), bool)
            if max_source is not None:
                keep &= source_lengths <= max_source
            if max_target is not None:
                keep &= target_lengths <= max_target
            line = np.array([pair["line"] for pair in pairs], np.int64)
            sides["source_ids"].append(source[np.repeat(keep, source_lengths)])
            sides["target_ids"].append(target[np.repeat(keep, target_lengths)])
            lengths["source"].append(source_lengths[keep])
            lengths["target"].append(target_lengths[keep])
            records.append(first + np.flatnonzero(keep))
            lines.append(line[keep])
            too_long.append(line[~keep])
            bar.update(len(pairs))
    starts = {
        f"{side}_starts": np.concatenate([[0], np.cumsum(np.concatenate(parts))])
        for side, parts in lengths.items()
    }
    columns = {**sides, "record": records, "line": lines, "too_long": too_long}
    arrays = {**starts, **{name: np.concatenate(parts) for name, parts in columns.items()}}
    return {name: arrays[name].astype(dtype) for name, dtype in _ARRAYS.items()}


def _chunks(corpus: Corpus) -> Iterator[tuple[int, list[Pair]]]:
    pairs = iter(corpus)
    # One chunk at least, so that there is something to join.
    for first in range(0, max(len(corpus), 1), _CHUNK):
        yield first, list(itertools.islice(pairs, _CHUNK))


def _ids(vocab: Vocabulary, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts in one array, EOS after each, and each text's number of ids."""
    ids = vocab.encode_all(texts)
    for text in ids:
        text.append(EOS)
    lengths = np.array([len(text) for text in ids], np.int64)
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def _read(folder: Path) -> Encoded | None:
    """What `_write` left in a folder; None if there is nothing whole."""
    arrays = {}
    for name, dtype in _ARRAYS.items():
        try:
            array = np.load(folder / f"{name}.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return None
        if array.ndim != 1 or array.dtype != dtype:
            return None
        arrays[name] = array.view(np.ndarray)
    if len(arrays["line"]) != len(arrays["record"]):
        return None
    for side in ("source", "target"):
        starts, ids = arrays[f"{side}_starts"], arrays[f"{side}_ids"]
        if len(starts) != len(arrays["record"]) + 1 or starts[-1] != len(ids):
            return None
    return _from_arrays(arrays)


def _write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        if folder.exists() and _read(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            # A folder appears whole or not at all.
            os.replace(partial, folder)
        except OSError:
            if _read(folder) is None:  # else another process made the same one first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _from_arrays(arrays: dict[str, np.ndarray]) -> Encoded:
    return Encoded(**{**arrays, "too_long": arrays["too_long"].tolist()})
