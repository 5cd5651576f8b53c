"""Intervals and tests against scipy, sacreBLEU, and all possibilities counted one by one."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.significance import PairedTest
from scipy import stats

from s2s.learn import metrics, significance

UNITS = metrics.Units(symbols=list, words=str.split)
WORDS = "a house the tree small big runs sleeps in on of and it was there".split()


def texts(seed, count, noise):
    """References, and outputs in which a share of the words is another."""
    rng = np.random.default_rng(seed)
    references = [list(rng.choice(WORDS, size=rng.integers(4, 12))) for _ in range(count)]
    outputs = [
        " ".join(str(rng.choice(WORDS)) if rng.random() < noise else str(word) for word in words)
        for words in references
    ]
    return [[" ".join(map(str, words))] for words in references], outputs


def systems(name, count=60, noises=(0.2, 0.3)):
    references, one = texts(0, count, noises[0])
    rng = np.random.default_rng(7)
    other = [
        " ".join(word if rng.random() > noises[1] else str(rng.choice(WORDS)) for word in wanted[0].split())
        for wanted in references
    ]
    made = [significance.statistics(name, output, references, UNITS) for output in (one, other)]
    return references, one, other, *made


def ratio(a):
    """Statistics whose score is that of an error rate."""
    return significance.Statistics(np.array(a, dtype=float), lambda sums: sums[..., 0] / sums[..., 1])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
@settings(max_examples=60, deadline=None)
def test_interval_is_students(values):
    found = significance.interval(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.sd == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    if found.sd > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert (found.low, found.high) == (pytest.approx(low, rel=1e-9), pytest.approx(high, rel=1e-9))
    assert significance.interval(values[::-1]) == found, "the order of runs is nothing"


def test_interval_of_few_and_of_broken_values():
    assert significance.interval([3.0])[:2] == (1, 3.0) and math.isnan(significance.interval([3.0]).low)
    assert significance.interval([])[0] == 0 and math.isnan(significance.interval([]).mean)
    assert significance.interval([1.0, math.nan, 3.0, math.inf])[:2] == (2, 2.0)


def test_welch_is_scipys():
    a, b = [11.1, 11.6, 11.3], [12.9, 12.1, 13.3, 12.0]
    found, wanted = significance.welch(a, b), stats.ttest_ind(b, a, equal_var=False)
    bounds = wanted.confidence_interval()
    assert found == pytest.approx((np.mean(b) - np.mean(a), bounds.low, bounds.high, wanted.pvalue), rel=1e-9)


def test_welch_without_spread_claims_nothing():
    assert math.isnan(significance.welch([1.0], [2.0, 3.0]).p)
    found = significance.welch([1.0, 1.0], [2.0, 2.0])
    assert found.difference == 1 and math.isnan(found.p)


def test_seed_randomisation_is_scipys_permutation_test():
    a, b = [11.1, 11.6, 11.3, 10.9], [12.9, 11.2, 13.3, 12.0]
    wanted = stats.permutation_test((a, b), lambda x, y: np.mean(x) - np.mean(y), n_resamples=np.inf).pvalue
    assert significance.seed_randomisation(a, b, samples=100) == pytest.approx(wanted)
    drawn = significance.seed_randomisation(a, b, samples=69)
    assert drawn == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / 69) + 1 / 70)
    assert significance.seed_randomisation([1, 2, 3], [4, 5, 6], samples=100) == pytest.approx(2 / 20)
    assert significance.seed_randomisation([1, 1], [1, 1], samples=100) == 1


@pytest.mark.parametrize("name", metrics.TEXT_METRICS)
def test_statistics_add_up_to_the_metric(name):
    references, one, _, counted, _ = systems(name)
    references = [[*wanted, "another one"] if at % 3 else wanted for at, wanted in enumerate(references)]
    counted = significance.statistics(name, one, references, UNITS)
    assert counted.score(counted.counts.sum(0)) == pytest.approx(
        metrics.TEXT_METRICS[name](one, references, UNITS), abs=1e-9
    )
    part = [3, 4, 17]
    assert counted.score(counted.counts[part].sum(0)) == pytest.approx(
        metrics.TEXT_METRICS[name]([one[n] for n in part], [references[n] for n in part], UNITS), abs=1e-9
    )


def test_score_over_seeds_is_the_mean_of_scores():
    _, _, _, a, b = systems("bleu")
    both = significance.over_seeds([a, b])
    scores = [float(one.score(one.counts.sum(0))) for one in (a, b)]
    assert float(both.score(both.counts.sum(0))) == pytest.approx(np.mean(scores))
    sums = np.stack([both.counts.sum(0), both.counts[:9].sum(0)])
    assert both.score(sums).shape == (2,)


def test_seeds_with_sentences_of_their_own():
    """The score is the mean of theirs, and swaps are those of every sentence of every seed."""
    rng = np.random.default_rng(3)
    sides = [
        [ratio(np.stack([rng.integers(0, 4, size) + shift, np.full(size, 6)], 1)) for size in (4, 6)]
        for shift in (0, 1)
    ]
    a, b = (significance.over_seeds(side, same_sentences=False) for side in sides)
    assert len(a.counts) == 10
    assert float(a.score(a.counts.sum(0))) == pytest.approx(
        np.mean([float(one.score(one.counts.sum(0))) for one in sides[0]])
    )
    wanted = exact_randomisation(a, b)
    found = significance.paired(a, b, samples=4000, resamples=10)
    assert found.randomisation == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / 4000))


def exact_randomisation(a, b):
    """p over every one of the 2^n ways to swap."""
    observed = abs(a.score(a.counts.sum(0)) - b.score(b.counts.sum(0)))
    extreme = total = 0
    for swaps in itertools.product((False, True), repeat=len(a.counts)):
        mask = np.array(swaps)[:, None]
        left, right = np.where(mask, b.counts, a.counts), np.where(mask, a.counts, b.counts)
        extreme += abs(a.score(left.sum(0)) - b.score(right.sum(0))) >= observed - 1e-9
        total += 1
    return extreme / total


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("draw", range(3))
def test_randomisation_is_that_of_all_swaps(draw, seeds):
    rng = np.random.default_rng(draw + 20)
    lengths = rng.integers(3, 9, size=10)
    sides = []
    for shift in (0, 1):
        runs = [ratio(np.stack([rng.integers(0, 4, 10) + shift, lengths], 1)) for _ in range(seeds)]
        sides.append(significance.over_seeds(runs))
    wanted, samples = exact_randomisation(*sides), 4000
    found = significance.paired(*sides, samples=samples, resamples=10)
    assert found.randomisation == pytest.approx(
        wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / samples) + 2 / samples
    )
    assert 0 < wanted < 1


@pytest.mark.parametrize("name", ["bleu", "word_error_rate"])
def test_a_seed_told_twice_is_no_more_evidence(name):
    *_, a, b = systems(name)
    once = significance.paired(a, b, samples=300, resamples=300)
    twice = significance.paired(
        significance.over_seeds([a, a]), significance.over_seeds([b, b]), samples=300, resamples=300
    )
    assert twice == pytest.approx(once)


def test_a_system_beside_itself_is_not_different():
    a = ratio([[1, 5], [0, 4], [3, 6]])
    found = significance.paired(a, a, samples=200, resamples=200)
    assert found == (0, 0, 0, 1, 1)
    bleu = systems("bleu")[3]
    assert significance.paired(bleu, bleu, samples=20, resamples=20)[:3] == (0, 0, 0)


def test_bootstrap_interval_covers_the_truth():
    """Of 300 samples with a known difference, about 95 % of the intervals hold it; p below 5 % is as rare."""
    rng = np.random.default_rng(5)
    covered = rejected = 0
    for _ in range(300):
        one, other = rng.random(150) < 0.4, rng.random(150) < 0.3
        ones = np.ones(150)
        a, b = ratio(np.stack([one, ones], 1)), ratio(np.stack([other, ones], 1))
        found = significance.paired(a, b, samples=10, resamples=400)
        covered += found.low <= -0.1 <= found.high
        same = ratio(np.stack([rng.random(150) < 0.4, ones], 1))
        rejected += significance.paired(a, same, samples=10, resamples=400).bootstrap <= 0.05
    assert 0.91 <= covered / 300 <= 0.99
    assert rejected / 300 <= 0.09


@pytest.mark.parametrize("name", ["bleu", "chrf", "ter"])
def test_randomisation_of_one_seed_is_sacrebleus(name):
    references, one, other, a, b = systems(name, 40)
    found = significance.paired(a, b, samples=300, resamples=20)
    metric, named = metrics.SACREBLEU[name](), [("a", one), ("b", other)]
    _, scores = PairedTest(named, {name: metric}, metrics.streams(references), "ar", 300)()
    (wanted,) = (value for key, value in scores.items() if key != "System")
    assert found.randomisation == wanted[1].p_value
    assert found.difference == pytest.approx(wanted[1].score - wanted[0].score)


def test_our_swaps_are_sacrebleus():
    """The same statistics through both tests: one p, but for ties, which sacreBLEU counts as smaller."""
    _, _, _, a, b = systems("bleu")
    theirs = significance.paired(a, b, samples=400, resamples=10)
    ours = significance.paired(
        a._replace(sacrebleu=None), b._replace(sacrebleu=None), samples=400, resamples=10
    )
    assert ours.randomisation == pytest.approx(theirs.randomisation, abs=2 / 401)
    assert (ours.low, ours.high) == (theirs.low, theirs.high)


def test_order_of_the_sides_turns_the_sign_alone():
    _, _, _, a, b = systems("word_error_rate")
    one, other = (significance.paired(*sides, samples=500, resamples=500) for sides in ((a, b), (b, a)))
    assert one.difference == -other.difference and one.low == pytest.approx(-other.high)
    assert one.randomisation == other.randomisation and one.bootstrap == other.bootstrap


def test_a_difference_that_is_there_is_found():
    _, _, _, a, b = systems("word_error_rate", 100, (0.05, 0.4))
    found = significance.paired(a, b, samples=500, resamples=500)
    assert found.randomisation == found.bootstrap * 1 == 1 / 501
    assert 0 < found.low < found.difference < found.high


def test_unlike_sides_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        significance.paired(ratio([[1, 2]]), ratio([[1, 2], [1, 3]]))


def test_holm():
    # Holm 1979, by hand: 0.01 * 3, then max with 0.02 * 2, then with 0.5 * 1.
    assert significance.holm([0.02, 0.01, 0.5]) == pytest.approx([0.04, 0.03, 0.5])
    assert significance.holm([0.03, 0.02]) == pytest.approx([0.04, 0.04])
    assert significance.holm([]) == []
    found = significance.holm([math.nan, 0.9, 0.8])
    assert math.isnan(found[0]) and found[1:] == [1, 1]
