"""What figures of a few seeds and a few sentences allow to say: intervals, and tests of a difference.

Two kinds of chance stand behind a difference between two systems, and each has its own tests here.

- Which sentences the test part happens to hold: paired approximate randomisation (Noreen 1989; Riezler and
  Maxwell 2005) and the paired bootstrap (Koehn 2004), over statistics of each sentence. The trained models
  are given; a sentence is drawn or swapped as a whole, with what all seeds made of it, for the seeds' outputs
  of one sentence are no independent evidence. The figure tested is the mean over seeds of the corpus score.
- Which seeds the models happen to have (Clark et al. 2011; Dror et al. 2018): Welch's t-test and
  randomisation over the seeds' scores. The sentences are given.

Must not know files, configurations or how a result is shown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sacrebleu.metrics.base import Score
from sacrebleu.significance import PairedTest
from scipy import linalg, special

from s2s.learn import metrics as metrics_lib

# Statistics that add up over sentences, [..., K] -> corpus scores, [...].
ScoreOf = Callable[[np.ndarray], np.ndarray]

# Differences that rounding alone tells apart are equal: ties count against significance.
_TIE = 1e-9
# Floats of one block of resamples.
_BLOCK = 4_000_000


class Interval(NamedTuple):
    """A mean over seeds.

    Attributes:
      size: how many values are finite numbers.
      mean: NaN without values.
      sd: of the sample (divisor size - 1); NaN below two values.
      low, high: bounds of the mean's confidence interval; NaN below two values.
    """

    size: int
    mean: float
    sd: float
    low: float
    high: float


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean, spread and Student's t interval of the mean; values that are no finite number are left out."""
    # Sorted: a sum must not depend on the order in which runs were found.
    known = np.sort([value for value in values if math.isfinite(value)])
    count = len(known)
    mean = float(known.mean()) if count else math.nan
    if count < 2:
        return Interval(count, mean, math.nan, math.nan, math.nan)
    sd = float(known.std(ddof=1))
    half = float(special.stdtrit(count - 1, (1 + confidence) / 2)) * sd / math.sqrt(count)
    return Interval(count, mean, sd, mean - half, mean + half)


class Welch(NamedTuple):
    """Mean of b minus mean of a, its confidence interval and two-sided p; NaN where spread is unknown."""

    difference: float
    low: float
    high: float
    p: float


def welch(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Welch:
    """Welch's t-test (1947) of two means whose spreads may differ.

    With fewer than two values on a side, or no spread on both, there is a difference and nothing else.
    """
    left, right = interval(a), interval(b)
    difference = right.mean - left.mean
    if min(left.size, right.size) < 2 or left.sd == right.sd == 0:
        return Welch(difference, math.nan, math.nan, math.nan)
    one, other = left.sd**2 / left.size, right.sd**2 / right.size
    freedom = (one + other) ** 2 / (one**2 / (left.size - 1) + other**2 / (right.size - 1))
    error = math.sqrt(one + other)
    half = float(special.stdtrit(freedom, (1 + confidence) / 2)) * error
    p = 2 * float(special.stdtr(freedom, -abs(difference) / error))
    return Welch(difference, difference - half, difference + half, p)


def seed_randomisation(a: Sequence[float], b: Sequence[float], *, samples: int, seed: int = 0) -> float:
    """Two-sided p that the seeds of a and b are of one kind: how often other splits differ as much.

    All splits are tried where there are at most ``samples``, and p is then exact: with 3 seeds a side
    there are 20, so no p below 0.1. Else ``samples`` are drawn and p = (b + 1) / (n + 1).
    """
    pooled = np.concatenate([np.sort(a), np.sort(b)])
    size, both = len(a), len(a) + len(b)
    if not len(a) or not len(b):
        return math.nan
    observed = abs(pooled[:size].mean() - pooled[size:].mean())
    exact = math.comb(both, size) <= samples
    if exact:
        chosen = np.array(list(itertools.combinations(range(both), size)))
    else:
        rng = np.random.default_rng(seed)
        chosen = rng.permuted(np.tile(np.arange(both), (samples, 1)), axis=1)[:, :size]
    left = pooled[chosen].sum(1)
    differences = np.abs(left / size - (pooled.sum() - left) / len(b))
    extreme = int(np.sum(differences >= observed - _tie(observed)))
    return extreme / len(chosen) if exact else (extreme + 1) / (samples + 1)


class Statistics(NamedTuple):
    """What one metric knows of every sentence.

    Attributes:
      counts: [N, K] sums over sentences of which make the corpus score; [N, seeds * K] for several seeds.
      score: [..., K] of sums -> [...] scores, the mean over seeds where there are several.
      sacrebleu: sacreBLEU's own metric, where it is one of those.
    """

    counts: np.ndarray
    score: ScoreOf
    sacrebleu: Any = None


def statistics(
    name: str,
    hypotheses: Sequence[str],
    references: metrics_lib.References,
    units: metrics_lib.Units,
) -> Statistics:
    """Sentence statistics of a text metric: ``score(counts.sum(0))`` is what the metric says of the corpus.

    Args:
      name: one of `metrics.TEXT_METRICS`.
      hypotheses, references, units: as those take them.
    """
    if name in metrics_lib.SACREBLEU:
        metric: Any = metrics_lib.SACREBLEU[name](references=metrics_lib.streams(references))
        counts = np.array(metric._extract_corpus_statistics(list(hypotheses), None), dtype=np.float64)

        def score(sums: np.ndarray) -> np.ndarray:
            flat = sums.reshape(-1, sums.shape[-1])
            return np.array([metric._compute_score_from_stats(one).score for one in flat]).reshape(
                sums.shape[:-1]
            )

        return Statistics(counts, score, metric)
    if name == "exact_match":
        pairs = zip(hypotheses, references, strict=True)
        counts = np.array(
            [
                [metrics_lib.exact_match([hypothesis], [wanted], units) / 100, 1]
                for hypothesis, wanted in pairs
            ]
        )
    else:
        split = units.symbols if name == "symbol_error_rate" else units.words
        counts = np.array(
            [
                metrics_lib.error_counts(hypothesis, wanted, split)
                for hypothesis, wanted in zip(hypotheses, references, strict=True)
            ],
            dtype=np.float64,
        )
    return Statistics(counts, _percent)


def over_seeds(seeds: Sequence[Statistics], same_sentences: bool = True) -> Statistics:
    """Statistics whose score is the mean of these seeds' scores.

    Args:
      seeds: of one metric.
      same_sentences: every seed has the same ones, and a sentence's counts stay together; False: every
        seed has its own, and all are sentences of their own.
    """
    first, width = seeds[0], seeds[0].counts.shape[1]

    def score(sums: np.ndarray) -> np.ndarray:
        return first.score(sums.reshape(*sums.shape[:-1], -1, width)).mean(-1)

    counts = [one.counts for one in seeds]
    together = np.concatenate(counts, 1) if same_sentences else linalg.block_diag(*counts)
    return Statistics(together, score, first.sacrebleu)


class Paired(NamedTuple):
    """Two systems on the same sentences.

    Attributes:
      difference: score of b minus score of a.
      low, high: percentile bootstrap interval of it.
      bootstrap: p of the paired bootstrap.
      randomisation: p of paired approximate randomisation.
    """

    difference: float
    low: float
    high: float
    bootstrap: float
    randomisation: float


def paired(
    a: Statistics,
    b: Statistics,
    *,
    samples: int = 10000,
    resamples: int = 1000,
    seed: int = 12345,
    confidence: float = 0.95,
) -> Paired:
    """Both paired tests of b against a.

    Randomisation of BLEU, chrF and TER is sacreBLEU's. Its bootstrap is not used: it compares |d*| - mean
    |d*| with |d|, as Moses did, which is one-sided in effect; between systems of one kind it gave p <= 0.05
    in 15 % of 200 trials (chrF, 80 sentences), the bootstrap here in 6.5 %, randomisation in 6 %.

    Args:
      a, b: statistics of one metric, the same sentences and as many seeds.
      samples: of approximate randomisation.
      resamples: of the bootstrap.
      seed: of both, but that sacreBLEU takes its own: the variable SACREBLEU_SEED, or 12345.
      confidence: of the difference's interval.

    Raises:
      ValueError: the statistics are of different shapes.
    """
    if a.counts.shape != b.counts.shape:
        raise ValueError(
            f"statistics of {a.counts.shape} and {b.counts.shape} cannot be paired: "
            "give both the same sentences and as many seeds"
        )
    observed = float(b.score(b.counts.sum(0)) - a.score(a.counts.sum(0)))
    drawn = _bootstrap_differences(a, b, resamples, seed)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    # Two-sided by shifting (Noreen 1989; Riezler and Maxwell 2005).
    bootstrap = _p(np.abs(drawn - drawn.mean()), observed)
    if a.sacrebleu is None:
        randomisation = _p(_swapped_differences(a, b, samples, seed), observed)
    else:
        randomisation = _sacrebleu_p(a, b, samples)
    return Paired(observed, float(low), float(high), bootstrap, randomisation)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of several comparisons made together, adjusted by Holm (1979); NaN stays NaN."""
    known = sorted((p, at) for at, p in enumerate(ps) if not math.isnan(p))
    adjusted, highest = [math.nan] * len(ps), 0.0
    for rank, (p, at) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[at] = highest
    return adjusted


def _percent(sums: np.ndarray) -> np.ndarray:
    return 100.0 * sums[..., 0] / np.maximum(sums[..., 1], 1)


def _tie(observed: float) -> float:
    return _TIE * max(1.0, abs(observed))


def _p(differences: np.ndarray, observed: float) -> float:
    """(b + 1) / (n + 1), b of n differences being as large as the one observed (Riezler and Maxwell 2005)."""
    extreme = int(np.sum(differences >= abs(observed) - _tie(observed)))
    return (extreme + 1) / (len(differences) + 1)


def _swapped_differences(a: Statistics, b: Statistics, samples: int, seed: int) -> np.ndarray:
    """Absolute differences after sentences changed sides by the toss of a coin, [samples]."""
    count = len(a.counts)
    # The draw of sacreBLEU, so that one seed gives both the same swaps.
    kept = np.random.default_rng(seed).integers(2, size=(samples, count), dtype=bool)
    both = a.counts.sum(0) + b.counts.sum(0)
    block = max(1, _BLOCK // count)
    found = []
    for begin in range(0, samples, block):
        mask = kept[begin : begin + block].astype(np.float64)
        left = mask @ a.counts + (1 - mask) @ b.counts
        found.append(np.abs(a.score(left) - a.score(both - left)))
    return np.concatenate(found)


def _bootstrap_differences(a: Statistics, b: Statistics, resamples: int, seed: int) -> np.ndarray:
    """Differences b minus a on sentences drawn with replacement, [resamples]."""
    count, rng = len(a.counts), np.random.default_rng(seed)
    block = max(1, _BLOCK // count)
    found = []
    for begin in range(0, resamples, block):
        times = rng.multinomial(count, np.full(count, 1 / count), size=min(block, resamples - begin))
        found.append(b.score(times @ b.counts) - a.score(times @ a.counts))
    return np.concatenate(found)


class _MeanOverSeeds:
    """A metric for sacreBLEU's test, whose hypotheses are statistics made before.

    sacreBLEU's own metrics know one output a sentence. This one hands its test statistics of all seeds side
    by side, so that it draws and swaps whole sentences, and scores them by the mean over seeds.
    """

    def __init__(self, statistics: Statistics):
        self._statistics = statistics

    def _extract_corpus_statistics(self, hypotheses: np.ndarray, references: None) -> np.ndarray:
        return hypotheses

    def _aggregate_and_compute(self, stats: np.ndarray) -> Score:
        return self._compute_score_from_stats(np.asarray(stats).sum(0))

    def _compute_score_from_stats(self, stats: np.ndarray) -> Score:
        return Score("score", float(self._statistics.score(np.asarray(stats))))

    def get_signature(self) -> Any:
        return self._statistics.sacrebleu.get_signature()


def _sacrebleu_p(a: Statistics, b: Statistics, samples: int) -> float:
    systems: Any = [("a", a.counts), ("b", b.counts)]
    metric: Any = {"score": _MeanOverSeeds(a)}
    _, found = PairedTest(systems, metric, None, "ar", samples)()
    result: Any = found["score"][1]
    return float(result.p_value)
