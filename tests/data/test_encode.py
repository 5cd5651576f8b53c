"""Encoded corpora: the same ids as the vocabulary gives, limits, and a cache that is right or remade."""

from __future__ import annotations

import numpy as np
import pytest

from s2s.batch import EOS
from s2s.config import VocabConfig
from s2s.data import encode as encode_lib
from s2s.data.corpora import CorpusError
from s2s.data.encode import encode_corpus
from s2s.data.vocab_training import train_vocabularies


class FakeCorpus(list):
    """Pairs in memory; line numbers have gaps, as after blank lines."""

    name = "fake"
    rejected: dict = {}
    partial: list = []

    def __init__(self, pairs, fingerprint="one"):
        super().__init__(
            {"source": source, "targets": [target, "other"], "line": 2 * number + 1}
            for number, (source, target) in enumerate(pairs)
        )
        self.fingerprint = fingerprint
        self.read = 0

    def __iter__(self):
        self.read += 1
        return super().__iter__()


PAIRS = [("abc", "x y"), ("a", "x y z x"), ("abcabcab", "z"), ("cb", "y y"), ("b", "z z z z z z z")]


@pytest.fixture
def corpus():
    return FakeCorpus(PAIRS)


@pytest.fixture
def vocabs():
    return train_vocabularies(FakeCorpus(PAIRS), VocabConfig(kind="symbols"), seed=1)


def encode(corpus, vocabs, cache, max_source=None, max_target=None):
    return encode_corpus(
        corpus, vocabs, max_source=max_source, max_target=max_target, cache=str(cache), progress=False
    )


def check(encoded, corpus, vocabs, kept):
    assert len(encoded) == len(kept)
    assert encoded.record.tolist() == kept
    assert encoded.line.tolist() == [corpus[index]["line"] for index in kept]
    for side, vocab, texts in (
        ("source", vocabs.source, [corpus[index]["source"] for index in kept]),
        ("target", vocabs.target, [corpus[index]["targets"][0] for index in kept]),
    ):
        ids, starts = getattr(encoded, f"{side}_ids"), getattr(encoded, f"{side}_starts")
        lengths = getattr(encoded, f"{side}_lengths")
        assert ids.dtype == np.int32 and starts.dtype == np.int64 and lengths.dtype == np.int32
        for n, text in enumerate(texts):
            expected = [*vocab.encode(text), EOS]
            assert ids[starts[n] : starts[n + 1]].tolist() == expected and lengths[n] == len(expected)
        assert starts[-1] == len(ids)


@pytest.mark.parametrize("chunk", (1, 2, 5, 100))
def test_ids_are_those_of_the_vocabulary(tmp_path, corpus, vocabs, monkeypatch, chunk):
    monkeypatch.setattr(encode_lib, "_CHUNK", chunk)
    encoded = encode(corpus, vocabs, tmp_path)
    check(encoded, corpus, vocabs, [0, 1, 2, 3, 4])
    assert encoded.too_long == []


@pytest.mark.parametrize("chunk", (1, 2, 100))
def test_too_long_pairs_are_left_out_by_line(tmp_path, corpus, vocabs, monkeypatch, chunk):
    monkeypatch.setattr(encode_lib, "_CHUNK", chunk)
    encoded = encode(corpus, vocabs, tmp_path, max_source=8, max_target=8)
    check(encoded, corpus, vocabs, [0, 1, 3, 4])
    assert encoded.too_long == [5]
    encoded = encode(corpus, vocabs, tmp_path, max_source=9, max_target=7)
    check(encoded, corpus, vocabs, [0, 1, 2, 3])
    assert encoded.too_long == [9]


def test_everything_too_long(tmp_path, corpus, vocabs):
    for _ in range(2):  # made, and from the cache
        with pytest.raises(CorpusError, match=r"all 5 pairs .*max_source_length=1 "):
            encode(corpus, vocabs, tmp_path, max_source=1)


def test_cache_is_used_and_mapped(tmp_path, corpus, vocabs):
    first = encode(corpus, vocabs, tmp_path)
    assert corpus.read == 1
    again = encode(corpus, vocabs, tmp_path)
    assert corpus.read == 1
    check(again, corpus, vocabs, [0, 1, 2, 3, 4])
    assert isinstance(first.source_ids.base, np.memmap) and isinstance(again.target_ids.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        again.source_ids[0] = 7
    assert not [path for path in (tmp_path / "encoded").iterdir() if path.name.startswith(".")]


def test_what_matters_makes_a_new_entry(tmp_path, corpus, vocabs):
    other = train_vocabularies(FakeCorpus(PAIRS[:2]), VocabConfig(kind="symbols"), seed=1)
    calls = [
        (FakeCorpus(PAIRS), vocabs, None, None),
        (FakeCorpus(PAIRS, "two"), vocabs, None, None),
        (FakeCorpus(PAIRS), vocabs._replace(source=other.source), None, None),
        (FakeCorpus(PAIRS), vocabs._replace(target=other.target), None, None),
        (FakeCorpus(PAIRS), vocabs, 100, None),
        (FakeCorpus(PAIRS), vocabs, None, 100),
    ]
    for number, (pairs, both, max_source, max_target) in enumerate(calls, 1):
        encode(pairs, both, tmp_path, max_source, max_target)
        assert pairs.read == 1 and len(list((tmp_path / "encoded").iterdir())) == number


@pytest.mark.parametrize("name", encode_lib._ARRAYS)
@pytest.mark.parametrize("damage", ("missing", "empty", "cut", "garbage"))
def test_damaged_cache_is_made_anew(tmp_path, corpus, vocabs, name, damage):
    encode(corpus, vocabs, tmp_path, max_source=8)
    (path,) = (tmp_path / "encoded").glob(f"*/{name}.npy")
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"empty": b"", "cut": whole[:-4], "garbage": b"\x00" * 50}[damage])
    encoded = encode(corpus, vocabs, tmp_path, max_source=8)
    assert corpus.read == 2
    check(encoded, corpus, vocabs, [0, 1, 3, 4])
    assert encoded.too_long == [5] and path.read_bytes() == whole


@pytest.mark.parametrize("name", [name for name in encode_lib._ARRAYS if name != "too_long"])
def test_arrays_that_disagree_are_made_anew(tmp_path, corpus, vocabs, name):
    encode(corpus, vocabs, tmp_path)
    (path,) = (tmp_path / "encoded").glob(f"*/{name}.npy")
    np.save(path, np.load(path)[:-1])
    check(encode(corpus, vocabs, tmp_path), corpus, vocabs, [0, 1, 2, 3, 4])
    assert corpus.read == 2


def test_interrupted_writing_leaves_nothing(tmp_path, corpus, vocabs, monkeypatch):
    saved = []

    def fail(path, array):
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(encode_lib.np, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        encode(corpus, vocabs, tmp_path)
    assert list((tmp_path / "encoded").iterdir()) == []


def test_two_processes_at_once(tmp_path, corpus, vocabs, monkeypatch):
    replace = encode_lib.os.replace

    def late(partial, folder):
        monkeypatch.setattr(encode_lib.os, "replace", replace)
        encode(FakeCorpus(PAIRS), vocabs, tmp_path)  # the other process is faster
        replace(partial, folder)

    monkeypatch.setattr(encode_lib.os, "replace", late)
    check(encode(corpus, vocabs, tmp_path), corpus, vocabs, [0, 1, 2, 3, 4])
    assert len(list((tmp_path / "encoded").iterdir())) == 1


def test_unwritable_cache_is_named(tmp_path, corpus, vocabs):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorpusError, match=r"file.* cannot be written .*config\.data\.cache"):
        encode(corpus, vocabs, tmp_path / "file")


def test_sentencepiece_in_batches(tmp_path):
    corpus = FakeCorpus([(f"der Satz Nummer {n}", f"the sentence number {n}") for n in range(40)])
    vocabs = train_vocabularies(corpus, VocabConfig(kind="bpe", size=60, shared=True), seed=1)
    check(encode(corpus, vocabs, tmp_path), corpus, vocabs, list(range(40)))
