"""Metrics of generated text against references, over a whole corpus.

Decides what each name in `s2s.config.METRICS` measures. Must not know how the
text was generated, nor any array library: strings come in, a float goes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from sacrebleu.metrics import BLEU, CHRF, TER

from s2s import config


class Units(NamedTuple):
    """What error rates count; both are methods of a target vocabulary.

    Attributes:
      symbols: splits a text into units of the symbol error rate.
      words: splits a text into units of the word error rate.
    """

    symbols: Callable[[str], Sequence[str]]
    words: Callable[[str], Sequence[str]]


References = Sequence[Sequence[str]]
# (hypotheses, references of each sentence: one or more, units) -> corpus score.
TextMetric = Callable[[Sequence[str], References, Units], float]

# force: only silences a warning about hypotheses that look tokenized.
SACREBLEU: dict[str, Callable[..., BLEU | CHRF | TER]] = {
    "bleu": lambda **kwargs: BLEU(force=True, **kwargs),
    "chrf": CHRF,
    "ter": TER,
}


def bleu(hypotheses: Sequence[str], references: References, units: Units) -> float:
    """Corpus BLEU in [0, 100] as sacrebleu defines it (Papineni et al. 2002; Post 2018)."""
    return _sacrebleu("bleu", hypotheses, references)


def chrf(hypotheses: Sequence[str], references: References, units: Units) -> float:
    """Corpus chrF2 in [0, 100] as sacrebleu defines it (Popovic 2015)."""
    return _sacrebleu("chrf", hypotheses, references)


def ter(hypotheses: Sequence[str], references: References, units: Units) -> float:
    """Corpus translation edit rate in % as sacrebleu defines it (Snover et al. 2006)."""
    return _sacrebleu("ter", hypotheses, references)


def exact_match(hypotheses: Sequence[str], references: References, units: Units) -> float:
    """Share of hypotheses that equal one of their references, surrounding blanks aside, in %."""
    _check(hypotheses, references)
    equal = sum(
        hypothesis.strip() in [reference.strip() for reference in wanted]
        for hypothesis, wanted in zip(hypotheses, references, strict=True)
    )
    return 100.0 * equal / len(hypotheses)


def symbol_error_rate(hypotheses: Sequence[str], references: References, units: Units) -> float:
    """Edits of symbols over reference symbols, in % (phoneme or character error rate)."""
    return _error_rate(hypotheses, references, units.symbols)


def word_error_rate(hypotheses: Sequence[str], references: References, units: Units) -> float:
    """Edits of words over reference words, in %."""
    return _error_rate(hypotheses, references, units.words)


TEXT_METRICS: dict[str, TextMetric] = {
    "bleu": bleu,
    "chrf": chrf,
    "ter": ter,
    "exact_match": exact_match,
    "symbol_error_rate": symbol_error_rate,
    "word_error_rate": word_error_rate,
}


def signatures(references: References, names: Iterable[str]) -> dict[str, str]:
    """sacrebleu's signature, which makes a score comparable, of each named metric that has one."""
    wanted = streams(references)
    known = (name for name in names if name in SACREBLEU)
    return {name: str(SACREBLEU[name](references=wanted).get_signature()) for name in known}


def better(metric: str, a: float, b: float) -> bool:
    """Whether score ``a`` beats score ``b``; a number beats NaN, and NaN beats nothing."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(b) and not math.isnan(a)
    return a > b if config.METRICS[metric] else a < b


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Fewest insertions, deletions and substitutions that turn ``a`` into ``b`` (Levenshtein 1966).

    One column of the table of distances is two integers, whose bit i says whether the
    distance rises or falls from row i to row i + 1 (Myers 1999, in the form of Hyyro 2003):
    a handful of integer operations an item of ``a`` instead of a loop over ``b``.
    """
    if not a or not b:
        return len(a) + len(b)
    places: dict[Hashable, int] = {}
    for row, item in enumerate(b):
        places[item] = places.get(item, 0) | 1 << row
    full, last = (1 << len(b)) - 1, 1 << (len(b) - 1)
    rises, falls, distance = full, 0, len(b)
    for item in a:
        match = places.get(item, 0)
        diagonal = (((match & rises) + rises) ^ rises) | match | falls
        right_up = falls | ~(diagonal | rises)
        right_down = diagonal & rises
        if right_up & last:
            distance += 1
        elif right_down & last:
            distance -= 1
        right_up = right_up << 1 | 1
        rises = (right_down << 1 | ~(diagonal | right_up)) & full
        falls = right_up & diagonal & full
    return distance


def _error_rate(
    hypotheses: Sequence[str], references: References, split: Callable[[str], Sequence[str]]
) -> float:
    """Summed `error_counts`: edits over reference lengths, in %.

    With no unit in any chosen reference, every edit counts as against one unit.
    """
    _check(hypotheses, references)
    edits = length = 0
    for hypothesis, wanted in zip(hypotheses, references, strict=True):
        counts = error_counts(hypothesis, wanted, split)
        edits, length = edits + counts[0], length + counts[1]
    return 100.0 * edits / max(length, 1)


def error_counts(
    hypothesis: str, references: Sequence[str], split: Callable[[str], Sequence[str]]
) -> tuple[int, int]:
    """Edits to the reference of lowest rate of one sentence, and that reference's length.

    An empty reference has rate 0 for an empty hypothesis and the worst for any other.
    """
    units = split(hypothesis)
    return min(
        ((edit_distance(units, reference), len(reference)) for reference in map(split, references)), key=_rate
    )


def _rate(pair: tuple[int, int]) -> float:
    edits, length = pair
    if length == 0:
        return 0.0 if edits == 0 else math.inf
    return edits / length


def _sacrebleu(name: str, hypotheses: Sequence[str], references: References) -> float:
    _check(hypotheses, references)
    return float(SACREBLEU[name]().corpus_score(list(hypotheses), streams(references)).score)


def streams(references: References) -> list[list[Any]]:
    """References of each sentence as sacrebleu's streams; None where a sentence has fewer than others."""
    most = max(len(wanted) for wanted in references)
    return [[wanted[n] if n < len(wanted) else None for wanted in references] for n in range(most)]


def _check(hypotheses: Sequence[str], references: References) -> None:
    if len(hypotheses) != len(references):
        raise ValueError(
            f"{len(hypotheses)} hypotheses but references of {len(references)} sentences: "
            "give one hypothesis and one list of references a sentence"
        )
    if not hypotheses:
        raise ValueError("no sentences: a text metric needs at least one hypothesis")
    bare = [number for number, wanted in enumerate(references, 1) if not wanted]
    if bare:
        raise ValueError(f"sentence {bare[0]} has no reference ({len(bare)} such sentences): give each one")
