"""Training of vocabularies: determinism, small corpora, sizes that cannot be met, and the cache."""

from __future__ import annotations

import pytest

from s2s.batch import SPECIALS, UNK
from s2s.config import VocabConfig
from s2s.data import vocab_training
from s2s.data.vocab import VocabularyError
from s2s.data.vocab_training import train_vocabularies as train
from tests.data.sentences import CORPUS, SOURCES, TEXT_KINDS, corpus_of


@pytest.mark.parametrize("kind", (*TEXT_KINDS, "symbols"))
def test_deterministic_and_content_addressed(kind):
    cfg = VocabConfig(kind=kind, size=120)
    one, two = train(CORPUS, cfg, seed=1), train(CORPUS, cfg, seed=1)
    assert one.source.fingerprint == two.source.fingerprint != one.target.fingerprint
    assert train(CORPUS[:2], cfg, seed=1).source.fingerprint != one.source.fingerprint


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
    monkeypatch.setattr(vocab_training, "TRAIN_PAIRS", 3)
    corpus = corpus_of(*[(chr(0x4E00 + i), "x") for i in range(50)])
    cfg = VocabConfig(kind="char", size=100)
    one, two = train(corpus, cfg, seed=1), train(corpus, cfg, seed=2)
    assert one.source.size == 4 + 1 + 3
    assert one.source.fingerprint == train(corpus, cfg, seed=1).source.fingerprint
    assert one.source.fingerprint != two.source.fingerprint


def test_symbols_by_frequency_then_text():
    vocab = train(corpus_of(("cabba", "x  y x")), VocabConfig(kind="symbols"), seed=1)
    assert vocab.source.tokens(range(4, vocab.source.size)) == ["a", "b", "c"]
    assert vocab.target.tokens(range(4, vocab.target.size)) == ["x", "y"]
    assert vocab.target.decode(vocab.target.encode("  y   z x ")) == "y ⁇ x"


class Named(list):
    """A corpus that is known by a fingerprint."""

    fingerprint = "of these pairs"


def test_vocabularies_are_trained_once(tmp_path, monkeypatch):
    trained = []

    def counted(corpus, cfg, **options):
        trained.append((corpus.fingerprint, cfg.size, options["seed"]))
        return train(corpus, cfg, **options)

    monkeypatch.setattr(vocab_training, "train_vocabularies", counted)
    corpus, cfg = Named(CORPUS), VocabConfig(size=120)

    def prints(**changes):
        given = {"corpus": corpus, "cfg": cfg, "seed": 1, **changes}
        vocabs = vocab_training.open_vocabularies(**given, cache=str(tmp_path), progress=False)
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
        vocab_training.open_vocabularies(
            Named(CORPUS), VocabConfig(size=120), seed=1, cache=str(tmp_path / "file"), progress=False
        )
