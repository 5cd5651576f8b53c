"""What both sides of a pair read: the same token files and the same arrays, real or made from a seed.

Decides the corpora of the comparison. Given a folder of data sets it reads Multi30k and the
Icelandic words of SIGMORPHON 2020 from there; without, it makes corpora of like sizes and lengths,
so that the comparison runs on any machine. Must not know models, peers or times.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from s2s.batch import EOS, Batch
from s2s.config import DataConfig, VocabConfig
from s2s.data import corpora, encode, plan, vocab_training
from s2s.data.pipeline import pad_batch

SOURCE, TARGET = "src", "trg"
VOCABULARY = 8000
# Two parts of a data folder, and what stands for them when there is none.
MULTI30K = ("multi30k/train.de.gz", "multi30k/train.en.gz", "multi30k/val.de.gz", "multi30k/val.en.gz")
WORDS = ("sigmorphon2020_g2p/train/ice_train.tsv.gz", "sigmorphon2020_g2p/dev/ice_dev.tsv")
_SEED = 1


class DataError(ValueError):
    """A data folder that lacks what the comparison reads."""


class Corpora(NamedTuple):
    """Where the prepared files lie.

    Attributes:
      mt: folder of train.src, train.trg, dev.src and dev.trg: tokens with spaces between.
      g2p: folder of train.tsv and dev.tsv: word, tab, symbols with spaces between; and dev.src.
      raw: prefix of the untouched Multi30k training text (PREFIX.de.gz, PREFIX.en.gz); None: made data.
      described: in words.
    """

    mt: Path
    g2p: Path
    raw: Path | None
    described: str


def prepare(folder: Path, data: Path | None) -> Corpora:
    """Writes the files of both corpora, or finds those of an earlier run.

    Args:
      folder: where they go.
      data: a folder with the files of `MULTI30K` and `WORDS`; None: make corpora from a seed.

    Raises:
      DataError: something is missing in ``data``.
    """
    name = "made" if data is None else "real"
    mt, g2p = folder / name / "mt", folder / name / "g2p"
    if data is not None:
        missing = [file for file in (*MULTI30K, *WORDS) if not (data / file).exists()]
        if missing:
            raise DataError(
                f"DATA={data} lacks {', '.join(missing)}: put the files there, or leave DATA away to measure "
                "on made corpora of the same sizes"
            )
    for made in (mt, g2p):
        made.mkdir(parents=True, exist_ok=True)
    if not (g2p / "dev.src").exists():  # written last
        if data is None:
            _make_sentences(mt)
            _make_words(g2p)
        else:
            _cut_sentences(mt, data, folder / "cache")
            for source, part in zip(WORDS, ("train", "dev"), strict=True):
                _write(g2p / f"{part}.tsv", _lines(data / source))
        _write(g2p / "dev.src", [line.split("\t")[0] for line in _lines(g2p / "dev.tsv")])
    described = (
        "corpora made from a seed, as long and as large as Multi30k and the words (no DATA was given)"
        if data is None
        else "Multi30k German to English, cut into 8,000 BPE pieces a side; SIGMORPHON 2020 Icelandic words"
    )
    return Corpora(mt, g2p, None if data is None else data / "multi30k" / "train", described)


def encoded_sentences(folder: Path, cache: Path) -> encode.Encoded:
    """The training pairs of a `Corpora.mt` folder as ids."""
    cfg = DataConfig(train=str(folder / "train"), source=SOURCE, target=TARGET, cache=str(cache))
    corpus = corpora.open_corpus(cfg, "train", seed=_SEED, progress=False)
    vocabs = vocab_training.train_vocabularies(
        corpus, VocabConfig(kind="symbols", source_separator=" ", target_separator=" "), seed=_SEED
    )
    return encode.encode_corpus(
        corpus, vocabs, max_source=100, max_target=100, cache=str(cache), progress=False
    )


def padding(cfg: DataConfig, cache: Path, seed: int) -> plan.Plan:
    """The batch plan of a config, from text to shapes as training makes it."""
    corpus = corpora.open_corpus(cfg, "train", seed=seed, progress=False)
    vocabs = vocab_training.train_vocabularies(corpus, cfg.vocab, seed=seed)
    encoded = encode.encode_corpus(
        corpus,
        vocabs,
        max_source=cfg.max_source_length,
        max_target=cfg.max_target_length,
        cache=str(cache),
        progress=False,
    )
    return plan.make_plan(
        encoded.source_lengths,
        encoded.target_lengths,
        batch_tokens=cfg.batch_tokens,
        max_shapes=cfg.max_shapes,
        rows_multiple=cfg.rows_multiple,
        seed=seed,
    )


def plan_of_sentences(
    make: Callable[..., plan.Plan], pairs: int, mean_length: float, sentences: int
) -> plan.Plan:
    """The plan whose batches hold ``sentences`` pairs on average, as near as a few trials come.

    Args:
      make: `s2s.data.plan.make_plan`, but for batch_tokens, which is searched for.
      pairs: in the corpus.
      mean_length: of a target.
      sentences: wanted in a batch.
    """
    tokens = sentences * mean_length
    trials = []
    for _ in range(6):
        layout = make(batch_tokens=math.ceil(tokens))
        held = pairs / layout.batches_per_epoch
        trials.append((abs(held - sentences), layout))
        tokens *= sentences / held
    return min(trials, key=lambda trial: trial[0])[1]


def planned_batches(encoded: encode.Encoded, layout: plan.Plan, number: int) -> list[Batch]:
    """The first batches of a plan's first epoch."""
    return [pad_batch(encoded, batch.ids, layout.buckets[batch.bucket]) for batch in layout.epoch(0)[:number]]


def full_batch(rows: int, source: int, target: int, entries: int) -> Batch:
    """A batch without a pad: random ids of a vocabulary of so many entries, EOS last."""
    rng = np.random.default_rng(_SEED)
    source_BS = rng.integers(4, entries, (rows, source), dtype=np.int32)
    target_BT = rng.integers(4, entries, (rows, target), dtype=np.int32)
    source_BS[:, -1] = target_BT[:, -1] = EOS
    lengths = (np.full(rows, source, np.int32), np.full(rows, target, np.int32))
    return Batch(source_BS, lengths[0], target_BT, lengths[1], np.arange(rows, dtype=np.int32))


def save_batches(file: Path, batches: Sequence[Batch]) -> None:
    """Writes batches for workers to read: source_0, source_length_0, target_0, ...; and their count."""
    arrays: dict[str, np.ndarray] = {"count": np.array(len(batches))}
    for number, batch in enumerate(batches):
        arrays[f"source_{number}"], arrays[f"source_length_{number}"] = batch.source_BS, batch.source_length_B
        arrays[f"target_{number}"], arrays[f"target_length_{number}"] = batch.target_BT, batch.target_length_B
    np.savez(file, **arrays)


def _cut_sentences(folder: Path, data: Path, cache: Path) -> None:
    """Both languages as BPE pieces, which either side then reads as plain words."""
    cfg = DataConfig(
        train=str(data / "multi30k" / "train"),
        source="de",
        target="en",
        cache=str(cache),
        vocab=VocabConfig(kind="bpe", size=VOCABULARY),
    )
    corpus = corpora.open_corpus(cfg, "train", seed=_SEED, progress=False)
    vocabs = vocab_training.train_vocabularies(corpus, cfg.vocab, seed=_SEED)
    for file, one, part, side in zip(
        MULTI30K, (*vocabs, *vocabs), ("train", "train", "dev", "dev"), (SOURCE, TARGET) * 2, strict=True
    ):
        ids = one.encode_all(_lines(data / file))
        _write(folder / f"{part}.{side}", [" ".join(one.tokens(line)) for line in ids])


def _make_sentences(folder: Path) -> None:
    """Pairs with Multi30k's size and lengths (pieces a side: 14 on average), words by Zipf's law."""
    rng = np.random.default_rng(_SEED)
    entries = VOCABULARY - 4
    frequency = 1.0 / np.arange(1, entries + 1)
    frequency /= frequency.sum()
    for part, pairs in (("train", 29000), ("dev", 1014)):
        source = np.clip(rng.lognormal(np.log(13.0), 0.33, pairs), 4, 45).astype(int)
        target = np.clip(source + rng.normal(0.5, 2.2, pairs), 4, 45).astype(int)
        for side, lengths in ((SOURCE, source), (TARGET, target)):
            words = rng.choice(entries, int(lengths.sum()), p=frequency)
            cuts = np.split(words, np.cumsum(lengths)[:-1])
            _write(folder / f"{part}.{side}", [" ".join(f"w{word}" for word in line) for line in cuts])


def _make_words(folder: Path) -> None:
    """Words of a made language whose every letter has a sound, but for some that sound with the next."""
    rng = np.random.default_rng(_SEED)
    letters = [chr(ord("a") + n) for n in range(26)] + list("áéíóúýæöðþ")
    for part, words in (("train", 3600), ("dev", 450)):
        lines = []
        for length in np.clip(rng.normal(8.0, 2.5, words), 2, 20).astype(int):
            word = rng.integers(0, len(letters), length)
            sounds = [
                f"s{letter}" if letter % 5 else f"s{letter}{after % 3}"
                for letter, after in zip(word, [*word[1:], 0], strict=True)
            ]
            lines.append("".join(letters[letter] for letter in word) + "\t" + " ".join(sounds))
        _write(folder / f"{part}.tsv", lines)


def _lines(file: Path) -> list[str]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8", newline="\n") as stream:
        return [line.rstrip("\n") for line in stream]


def _write(file: Path, lines: Iterable[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
