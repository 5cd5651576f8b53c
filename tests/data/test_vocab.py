"""Vocabularies: round trips, reserved ids, determinism, small corpora and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s.batch import BOS, EOS, PAD, SPECIALS, UNK
from s2s.config import VocabConfig
from s2s.data import vocab as vocab_lib
from s2s.data.vocab import SymbolVocabulary, VocabularyError, load_vocabularies, save_vocabularies
from s2s.data.vocab import train_vocabularies as train

SOURCES = [
    "Zwei junge weiße Männer sind im Freien .",
    "Ein kleines Mädchen klettert in ein Spielhaus .",
    "Ein Mann in einem blauen Hemd steht auf einer Leiter .",
    "Zwei Männer stehen am Herd und kochen Essen .",
]
TARGETS = [
    "Two young white men are outside .",
    "A little girl climbing into a playhouse .",
    "A man in a blue shirt is standing on a ladder .",
    "Two men are at the stove preparing food .",
]
CORPUS = [
    {"source": source, "targets": [target, "another reference"], "line": line}
    for line, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True), 1)
] * 5
TEXT_KINDS = ("unigram", "bpe", "char", "word")


def corpus_of(*pairs):
    return [{"source": source, "targets": [target], "line": 1} for source, target in pairs]


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


@pytest.mark.parametrize("kind", (*TEXT_KINDS, "symbols"))
def test_deterministic_and_content_addressed(kind):
    cfg = VocabConfig(kind=kind, size=120)
    one, two = train(CORPUS, cfg, seed=1), train(CORPUS, cfg, seed=1)
    assert one.source.fingerprint == two.source.fingerprint != one.target.fingerprint
    assert train(CORPUS[:2], cfg, seed=1).source.fingerprint != one.source.fingerprint


def test_fingerprint_tells_separators_apart():
    symbols = ["a", "b"]
    assert SymbolVocabulary(symbols, "").fingerprint != SymbolVocabulary(symbols, " ").fingerprint


def test_only_the_first_target_is_read():
    cfg = VocabConfig(kind="symbols", target_separator=" ")
    assert "reference" not in train(CORPUS, cfg, seed=1).target.tokens(range(4, 30))


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_large_size_on_a_small_corpus_gives_fewer(kind):
    vocab = train(CORPUS, VocabConfig(kind=kind, size=8000), seed=1).source
    assert 20 < vocab.size < 1000
    assert vocab.decode(vocab.encode(SOURCES[0])) == SOURCES[0]


@pytest.mark.parametrize("kind", ("unigram", "bpe"))
def test_size_below_the_characters_is_refused(kind):
    needed = len(set("".join(SOURCES)) - {" "}) + 1 + len(SPECIALS)
    with pytest.raises(VocabularyError, match=rf"vocab\.size=20 .* at least {needed}"):
        train(CORPUS, VocabConfig(kind=kind, size=20), seed=1)
    with pytest.raises(VocabularyError, match=r"vocab\.target_size=9 "):
        train(CORPUS, VocabConfig(kind=kind, size=200, target_size=9), seed=1)
    assert train(CORPUS, VocabConfig(kind=kind, size=needed), seed=1).source.size == needed


@pytest.mark.parametrize("kind", ("char", "word"))
def test_small_size_keeps_the_most_frequent(kind):
    vocab = train(corpus_of(*[("b b b c c a", "x")]), VocabConfig(kind=kind, size=6), seed=1).source
    assert vocab.size == 6
    assert UNK not in vocab.encode("b") and UNK in vocab.encode("a")


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_long_lines_count(kind):
    vocab = train(corpus_of(("ü a " * 5000, "x")), VocabConfig(kind=kind, size=50), seed=1).source
    assert UNK not in vocab.encode("ü a")


def test_no_text():
    with pytest.raises(VocabularyError, match="no pairs"):
        train([], VocabConfig(), seed=1)
    for blank in ("", " ", "\u3000"):
        with pytest.raises(VocabularyError, match="no text"):
            train(corpus_of((blank, blank)), VocabConfig(), seed=1)


def test_unknown_normalization_is_named():
    with pytest.raises(VocabularyError, match="normalization='klingon'"):
        train(CORPUS, VocabConfig(size=200, normalization="klingon"), seed=1)


def test_large_corpora_are_sampled(monkeypatch):
    monkeypatch.setattr(vocab_lib, "TRAIN_PAIRS", 3)
    corpus = corpus_of(*[(chr(0x4E00 + i), "x") for i in range(50)])
    cfg = VocabConfig(kind="char", size=100)
    one, two = train(corpus, cfg, seed=1), train(corpus, cfg, seed=2)
    assert one.source.size == 4 + 1 + 3
    assert one.source.fingerprint == train(corpus, cfg, seed=1).source.fingerprint
    assert one.source.fingerprint != two.source.fingerprint


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


def test_symbols_by_frequency_then_text():
    vocab = train(corpus_of(("cabba", "x  y x")), VocabConfig(kind="symbols"), seed=1)
    assert vocab.source.tokens(range(4, vocab.source.size)) == ["a", "b", "c"]
    assert vocab.target.tokens(range(4, vocab.target.size)) == ["x", "y"]
    assert vocab.target.decode(vocab.target.encode("  y   z x ")) == "y ⁇ x"


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


class Named(list):
    """A corpus that is known by a fingerprint."""

    fingerprint = "of these pairs"


def test_vocabularies_are_trained_once(tmp_path, monkeypatch):
    trained = []

    def counted(corpus, cfg, **options):
        trained.append((corpus.fingerprint, cfg.size, options["seed"]))
        return train(corpus, cfg, **options)

    monkeypatch.setattr(vocab_lib, "train_vocabularies", counted)
    corpus, cfg = Named(CORPUS), VocabConfig(size=120)

    def prints(**changes):
        given = {"corpus": corpus, "cfg": cfg, "seed": 1, **changes}
        vocabs = vocab_lib.open_vocabularies(**given, cache=str(tmp_path), progress=False)
        return [vocab.fingerprint for vocab in vocabs]

    first = prints()
    assert prints() == first and len(trained) == 1
    for path in tmp_path.rglob("target.model"):
        path.write_bytes(b"damaged")
    assert prints() == first and len(trained) == 2
    other = Named(CORPUS[:2])
    other.fingerprint = "of others"
    prints(corpus=other)
    prints(seed=2)
    prints(cfg=VocabConfig(size=100))
    assert len(trained) == len(set(trained)) + 1 == 5


def test_a_cache_of_vocabularies_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(VocabularyError, match="file/vocab cannot be written.*config.data.cache"):
        vocab_lib.open_vocabularies(
            Named(CORPUS), VocabConfig(size=120), seed=1, cache=str(tmp_path / "file"), progress=False
        )


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
