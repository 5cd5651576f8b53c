"""Vocabularies: round trips, reserved ids, files and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s.batch import BOS, EOS, PAD, SPECIALS, UNK
from s2s.config import VocabConfig
from s2s.data.vocab import SymbolVocabulary, VocabularyError, load_vocabularies, save_vocabularies
from s2s.data.vocab_training import train_vocabularies as train
from tests.data.sentences import CORPUS, SOURCES, TARGETS, TEXT_KINDS, corpus_of


@pytest.mark.parametrize("kind", TEXT_KINDS)
@pytest.mark.parametrize("shared", (False, True))
def test_text_round_trip(kind, shared):
    vocabs = train(CORPUS, VocabConfig(kind=kind, size=120, shared=shared), seed=1)
    assert (vocabs.source is vocabs.target) == shared
    for vocab, texts in ((vocabs.source, SOURCES), (vocabs.target, TARGETS)):
        assert vocab.size <= 120
        assert tuple(vocab.tokens([PAD, BOS, EOS, UNK])) == SPECIALS
        assert [vocab.encode(text) for text in texts] == vocab.encode_all(texts)
        for text in texts:
            ids = vocab.encode(text)
            assert UNK not in ids and min(ids) > UNK and max(ids) < vocab.size
            assert vocab.decode(ids) == text
            assert vocab.decode([BOS, *ids, EOS, *ids, PAD]) == text
            assert len(vocab.tokens(ids)) == len(ids) and all(vocab.tokens(ids))
            assert vocab.symbols(text) == list(text) and vocab.words(text) == text.split()


@pytest.mark.parametrize("kind", (*TEXT_KINDS, "symbols"))
def test_blank_and_unknown(kind):
    vocab = train(CORPUS, VocabConfig(kind=kind, size=120), seed=1).target
    assert vocab.encode("") == [] and vocab.decode([]) == ""
    ids = vocab.encode("a 漢 man" if kind != "char" else "a 漢man")
    assert ids.count(UNK) == 1
    assert "⁇" in vocab.decode(ids) and vocab.decode(ids).startswith("a ⁇")
    assert "<unk>" in vocab.tokens(ids)


def test_neighbouring_unknown_words_stay_apart():
    vocab = train(CORPUS, VocabConfig(kind="word", size=100), seed=1).target
    ids = vocab.encode("zebra gnu men yak")
    assert [id == UNK for id in ids] == [True, True, False, True]
    assert vocab.decode(ids) == "⁇ ⁇ men ⁇"


def test_unknown_inside_a_word_adds_no_space():
    vocab = train(CORPUS, VocabConfig(kind="char"), seed=1).target
    assert vocab.decode(vocab.encode("me漢n")) == "me⁇n"


def test_fingerprint_tells_separators_apart():
    symbols = ["a", "b"]
    assert SymbolVocabulary(symbols, "").fingerprint != SymbolVocabulary(symbols, " ").fingerprint


SEPARATORS = st.sampled_from(["", " ", "|", "\t", "::"])


@given(st.data(), SEPARATORS)
def test_symbols_are_lossless(data, separator):
    if separator == "":
        symbol = st.characters()
    else:
        alphabet = st.characters(exclude_characters=" |\t:")
        symbol = st.text(alphabet, min_size=1 if separator == " " else 0)
    lines = data.draw(st.lists(st.lists(symbol, min_size=1).map(separator.join), min_size=1))
    shared = data.draw(st.booleans())
    cfg = VocabConfig(kind="symbols", source_separator=separator, target_separator=separator, shared=shared)
    vocab = train(corpus_of(*((line, line) for line in lines)), cfg, seed=1).target
    for line in lines:
        ids = vocab.encode(line)
        assert UNK not in ids
        assert vocab.decode([BOS, *ids, EOS, UNK]) == line
        assert vocab.words(line) == [line] and len(vocab.symbols(line)) == len(ids)


@pytest.mark.parametrize("kind", (*TEXT_KINDS, "symbols"))
@pytest.mark.parametrize("shared", (False, True))
def test_save_and_load(tmp_path, kind, shared):
    cfg = VocabConfig(kind=kind, size=120, shared=shared, target_separator="")
    vocabs = train(CORPUS, cfg, seed=1)
    save_vocabularies(vocabs, tmp_path / "vocab")
    suffix = ".json" if kind == "symbols" else ".model"
    names = {"shared"} if shared else {"source", "target"}
    assert {path.name for path in (tmp_path / "vocab").iterdir()} == {name + suffix for name in names}
    loaded = load_vocabularies(tmp_path / "vocab", cfg)
    assert (loaded.source is loaded.target) == shared
    for before, after in zip(vocabs, loaded, strict=True):
        assert before.fingerprint == after.fingerprint and before.size == after.size
        assert before.encode("Ein Mann.") == after.encode("Ein Mann.")


@pytest.mark.parametrize("kind", ("bpe", "symbols"))
def test_missing_and_damaged_files(tmp_path, kind):
    cfg = VocabConfig(kind=kind, size=120)
    with pytest.raises(VocabularyError, match=r"source\.(model|json).*No such file"):
        load_vocabularies(tmp_path, cfg)
    save_vocabularies(train(CORPUS, cfg, seed=1), tmp_path)
    (path,) = tmp_path.glob("target.*")
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\xff\xfe\x00garbage"):
        path.write_bytes(damaged)
        with pytest.raises(VocabularyError, match=rf"{path.name} is damaged"):
            load_vocabularies(tmp_path, cfg)


@pytest.mark.parametrize("content", ({"a": 1}, ["a", 5], ["a", "a"], ["a", "bc"], "abc"))
def test_symbol_tables_that_are_none(tmp_path, content):
    for side in ("source", "target"):
        Path(tmp_path / f"{side}.json").write_text(json.dumps(content))
    with pytest.raises(VocabularyError, match=r"source\.json is damaged"):
        load_vocabularies(tmp_path, VocabConfig(kind="symbols", source_separator="", target_separator=""))


@settings(max_examples=30)
@given(st.text(), st.sampled_from(TEXT_KINDS))
def test_any_text_encodes(text, kind):
    vocab = _small(kind)
    ids = vocab.encode(text)
    assert all(UNK <= id < vocab.size for id in ids)
    assert isinstance(vocab.decode(ids), str) and len(vocab.tokens(ids)) == len(ids)


_SMALL: dict = {}


def _small(kind):
    if kind not in _SMALL:
        _SMALL[kind] = train(CORPUS, VocabConfig(kind=kind, size=100), seed=1).target
    return _SMALL[kind]
