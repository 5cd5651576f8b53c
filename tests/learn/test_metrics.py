"""Text metrics against values worked out by hand, sacrebleu itself, and the table of distances."""

import random

import hypothesis
import hypothesis.strategies as st
import pytest
import sacrebleu

from s2s import config
from s2s.learn import metrics

UNITS = metrics.Units(symbols=list, words=str.split)


def table_distance(a, b):
    """Levenshtein's recurrence, the whole table."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(
                table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            )
    return table[-1][-1]


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance_of_known_words(a, b, distance):
    assert metrics.edit_distance(a, b) == distance


@hypothesis.given(st.text("abc", max_size=12), st.text("abc", max_size=12))
@hypothesis.settings(max_examples=300, deadline=None)
def test_edit_distance_is_the_table_of_distances(a, b):
    assert metrics.edit_distance(a, b) == table_distance(a, b)


def test_edit_distance_of_long_sequences_of_words():
    rng = random.Random(0)
    a, b = ([rng.choice(["AH", "B", "K", "T", "IY"]) for _ in range(length)] for length in (190, 150))
    assert metrics.edit_distance(a, b) == table_distance(a, b)


def test_names_are_those_of_the_config():
    assert set(metrics.TEXT_METRICS) == set(config.METRICS) - {"loss", "perplexity"}


@pytest.mark.parametrize("name", metrics.TEXT_METRICS)
def test_every_metric_tells_a_perfect_corpus_from_a_wrong_one(name):
    references = [["the cat sat on the mat"], ["there is a dog in the park"]]
    right = [wanted[0] for wanted in references]
    wrong = ["no idea", "at all"]
    measure = metrics.TEXT_METRICS[name]
    assert measure(right, references, UNITS) == pytest.approx(100.0 if config.METRICS[name] else 0.0)
    assert metrics.better(name, measure(right, references, UNITS), measure(wrong, references, UNITS))


def test_no_two_metrics_agree():
    hypotheses = ["the cat sat on the mat today", "a dog is in the park", "yes"]
    references = [["the cat sat on a mat"], ["there is a dog in the park"], ["yes"]]
    values = [measure(hypotheses, references, UNITS) for measure in metrics.TEXT_METRICS.values()]
    assert len({round(value, 6) for value in values}) == len(values)


def test_sacrebleu_metrics_are_sacrebleu():
    hypotheses = ["the cat sat on the mat today .", "a dog is in the park"]
    references = [["the cat sat on a mat .", "a cat sat on the mat ."], ["there is a dog", "a dog in a park"]]
    streams = [list(stream) for stream in zip(*references, strict=True)]
    for name, corpus_score in (
        ("bleu", sacrebleu.corpus_bleu),
        ("chrf", sacrebleu.corpus_chrf),
        ("ter", sacrebleu.corpus_ter),
    ):
        expected = corpus_score(hypotheses, streams).score
        assert metrics.TEXT_METRICS[name](hypotheses, references, UNITS) == expected


def test_bleu_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; no brevity penalty.
    value = metrics.bleu(["the cat sat on the mat"], [["the cat sat on a mat"]], UNITS)
    assert value == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


@pytest.mark.parametrize("name", ["bleu", "chrf", "ter"])
def test_sentences_may_have_different_numbers_of_references(name):
    hypotheses = ["the cat sat on the mat today", "a dog is in the park"]
    uneven = [["the cat sat on a mat"], ["there is a dog in the park", "a dog is in this park"]]
    even = [uneven[0] * 2, uneven[1]]
    measure = metrics.TEXT_METRICS[name]
    assert measure(hypotheses, uneven, UNITS) == pytest.approx(measure(hypotheses, even, UNITS))
    one = [wanted[:1] for wanted in uneven]
    assert metrics.better(name, measure(hypotheses, uneven, UNITS), measure(hypotheses, one, UNITS))


def test_signatures():
    found = metrics.signatures([["a b", "c"], ["d"]], ["bleu", "exact_match", "ter"])
    assert list(found) == ["bleu", "ter"]
    assert found["bleu"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert metrics.signatures([["a"], ["d"]], ["chrf"])["chrf"].startswith("nrefs:1|")


def test_exact_match_takes_any_reference():
    assert metrics.exact_match(["a b", " c ", "d", ""], [["x", "a b"], ["c"], ["D"], ["e"]], UNITS) == 50.0


def test_error_rates_sum_edits_over_reference_lengths():
    hypotheses, references = ["a b c", "d"], [["a x c y"], ["d"]]
    # Words: 2 edits and 0, of 4 and 1. Symbols, blanks among them: 3 edits and 0, of 7 and 1.
    assert metrics.word_error_rate(hypotheses, references, UNITS) == pytest.approx(100 * 2 / 5)
    assert metrics.symbol_error_rate(hypotheses, references, UNITS) == pytest.approx(100 * 3 / 8)


def test_error_rates_take_the_reference_of_lowest_rate():
    # 1 edit of 2 words against 2 edits of 6: the second has the lower rate though it has more edits.
    assert metrics.word_error_rate(["a b c d"], [["a b"]], UNITS) == pytest.approx(100 * 2 / 2)
    references = [["a b x", "a b c d e f"]]
    assert metrics.word_error_rate(["a b c d"], references, UNITS) == pytest.approx(100 * 2 / 6)
    assert metrics.word_error_rate(["a b c d"], [references[0][::-1]], UNITS) == pytest.approx(100 * 2 / 6)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "rate"),
    [("", "", 0.0), ("", "a b", 100.0), ("a", "", 100.0), ("a b", "", 200.0)],
)
def test_error_rates_of_empty_texts(hypothesis, reference, rate):
    assert metrics.word_error_rate([hypothesis], [[reference]], UNITS) == rate


@pytest.mark.parametrize("name", metrics.TEXT_METRICS)
def test_empty_hypotheses_have_a_score(name):
    value = metrics.TEXT_METRICS[name](["", ""], [["a b c"], ["d"]], UNITS)
    assert value == (0.0 if config.METRICS[name] else 100.0)


@pytest.mark.parametrize("name", metrics.TEXT_METRICS)
def test_what_cannot_be_scored_is_refused(name):
    measure = metrics.TEXT_METRICS[name]
    with pytest.raises(ValueError, match="2 hypotheses but references of 1 sentences"):
        measure(["a", "b"], [["a"]], UNITS)
    with pytest.raises(ValueError, match="no sentences"):
        measure([], [], UNITS)
    with pytest.raises(ValueError, match="sentence 2 has no reference"):
        measure(["a", "b"], [["a"], []], UNITS)


def test_better_follows_the_direction_of_the_metric():
    assert metrics.better("bleu", 2.0, 1.0) and not metrics.better("bleu", 1.0, 2.0)
    assert metrics.better("loss", 1.0, 2.0) and not metrics.better("loss", 2.0, 1.0)
    for name in config.METRICS:
        assert not metrics.better(name, 1.0, 1.0)
        assert metrics.better(name, 1.0, float("nan"))
        assert not metrics.better(name, float("nan"), 1.0)
        assert not metrics.better(name, float("nan"), float("nan"))
