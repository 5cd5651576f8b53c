"""Rows of a report: runs that differ in their seed alone, named by what sets them apart.

Decides which runs are one row, how a row is named, which row is chosen on dev, and what is compared
between two rows. Must not know where runs lie (collect), how a test is computed
(`s2s.learn.significance`) or how anything is shown (report).
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from s2s.config import METRICS, TEXT_METRICS, Config, differences, flat
from s2s.learn import metrics as metrics_lib
from s2s.learn import significance
from s2s.report.collect import Outputs, OutputsError, Run, Trouble

# What makes no other experiment of a run: its name, its seed, its speed, what it keeps.
_NO_MATTER = (
    "name",
    "run.seed",
    "run.replicas",
    "run.log_every",
    "run.save_every",
    "run.keep_best",
    "run.keep_last",
    "data.cache",
    "data.prefetch",
    "search.batch_sentences",
)
# Parts of one corpus change together: the first says it for all.
_FOLLOWS = {"data.dev": "data.train", "data.test": "data.train"}
# Shown where nothing is asked for: the first of these that most runs have.
_FIRST_METRICS = ("bleu", "word_error_rate", "symbol_error_rate", "chrf", "exact_match", "loss")


class ReportError(ValueError):
    """A question that the runs at hand cannot answer."""


class Row(NamedTuple):
    """Runs with one configuration, of different seeds.

    Attributes:
      number: from 1, the row's name on the command line.
      fields: dotted names and values of what sets it apart.
      shown: the same for people: without the folder that all rows' files have in common.
      runs: one a seed, by seed.
      kind: "" or the ensemble's name.
    """

    number: int
    fields: dict[str, Any]
    shown: dict[str, str]
    runs: list[Run]
    kind: str

    @property
    def cfg(self) -> Config:
        """The configuration of the first seed."""
        return self.runs[0].cfg

    @property
    def label(self) -> str:
        """What sets it apart, in one line."""
        parts = [f"{short(name)}={value}" for name, value in self.shown.items()]
        return ", ".join(parts + [self.kind] * bool(self.kind)) or self.cfg.name

    def values(self, part: str, search: str | None, metric: str) -> dict[int, float]:
        """One figure a seed, where there is one."""
        scores = {run.cfg.run.seed: run.score(part, search, metric) for run in self.runs}
        return {seed: value for seed, value in scores.items() if not math.isnan(value)}

    def interval(self, part: str, search: str | None, metric: str) -> significance.Interval:
        """Mean and spread over seeds."""
        return significance.interval(list(self.values(part, search, metric).values()))


def rows(runs: Sequence[Run], by: Sequence[str] = ()) -> tuple[list[Row], list[Trouble]]:
    """Groups runs into rows.

    Args:
      runs: in any order.
      by: fields to name rows by, in this order; (): those in which they differ.

    Returns:
      The rows, sorted by their fields, and runs left out because another has their configuration and seed.

    Raises:
      ReportError: a field does not exist.
    """
    names = [field(name) for name in by]
    groups: dict[tuple[Any, ...], dict[int, Run]] = {}
    repeated: list[Trouble] = []
    for run in sorted(runs, key=lambda run: (str(run.folder), run.kind)):
        values = flat(run.cfg)
        key = (*(repr(values[name]) for name in values if name not in _NO_MATTER), run.kind)
        seeds = groups.setdefault(key, {})
        if run.cfg.run.seed in seeds:
            twin = seeds[run.cfg.run.seed].folder
            repeated.append(
                Trouble(str(run.folder), "repeated", f"{twin} has the same configuration and seed")
            )
        else:
            seeds[run.cfg.run.seed] = run
    members = [[seeds[seed] for seed in sorted(seeds)] for seeds in groups.values()]
    names = names or _apart([same[0].cfg for same in members])
    unsorted = []
    for same in members:
        values = flat(same[0].cfg)
        unsorted.append(Row(0, {name: values[name] for name in names}, {}, same, same[0].kind))
    everything = list(flat(Config()))

    def order(row: Row) -> list[Any]:
        values = flat(row.cfg)
        return [_order(values[name]) for name in [*names, *everything] if name not in _NO_MATTER] + [row.kind]

    ordered = sorted(unsorted, key=order)
    columns = {name: _shown([row.fields[name] for row in ordered]) for name in names}
    numbered = [
        row._replace(number=at + 1, shown={name: texts[at] for name, texts in columns.items()})
        for at, row in enumerate(ordered)
    ]
    return numbered, repeated


def _shown(values: Sequence[Any]) -> list[str]:
    """Values of one field as people write them."""
    words = {True: "yes", False: "no", None: "-"}
    texts = [words[value] if value is None or isinstance(value, bool) else str(value) for value in values]
    common = os.path.commonprefix(texts) if len(texts) > 1 else ""
    return [text[common.rfind("/") + 1 :] for text in texts]


def field(name: str) -> str:
    """The dotted name that a user means by "hidden", "model.hidden" or "config.model.hidden".

    Raises:
      ReportError: there is none, or more than one.
    """
    names = list(flat(Config()))
    wanted = name.removeprefix("config.")
    if wanted in names:
        return wanted
    found = [one for one in names if one.endswith("." + wanted)]
    if len(found) == 1:
        return found[0]
    lasts = {one.rpartition(".")[2]: one for one in names}
    close = found or [lasts.get(one, one) for one in difflib.get_close_matches(wanted, [*names, *lasts], 1)]
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ReportError(f"a config has no one field {name!r}{hint}")


def short(name: str) -> str:
    """The last part of a dotted name where that says it all."""
    last = name.rpartition(".")[2]
    return last if [one.rpartition(".")[2] for one in flat(Config())].count(last) == 1 else name


def find(table: Sequence[Row], name: str) -> Row:
    """The row that a user means by its number or by part of its label.

    Raises:
      ReportError: there is none, or more than one.
    """
    exact = [row for row in table if name.removeprefix("#") == str(row.number) or name == row.label]
    found = exact or [row for row in table if name in row.label]
    if len(found) == 1:
        return found[0]
    listed = "\n".join(f"  {row.number}: {row.label}" for row in found or table)
    raise ReportError(f"{'more than one row is' if found else 'no row is'} {name!r}:\n{listed}")


def metrics_of(table: Sequence[Row]) -> list[str]:
    """Metrics that some run has, in the order of `s2s.config.METRICS`."""
    known = {name for row in table for run in row.runs for scores in run.scores for name in scores}
    return [name for name in METRICS if name in known]


def first_metric(table: Sequence[Row]) -> str:
    """What is shown where nothing is asked for.

    Raises:
      ReportError: no run has any known metric.
    """
    runs = [run for row in table for run in row.runs]
    counts = {name: sum(any(name in row for row in run.scores) for run in runs) for name in _FIRST_METRICS}
    best = max(_FIRST_METRICS, key=lambda name: counts[name])
    if not counts[best]:
        raise ReportError("no run has a score to show")
    return best


class Choice(NamedTuple):
    """The row of a group that is best on dev; its other figures had no say."""

    group: dict[str, Any]
    row: Row
    among: int


def best_on_dev(table: Sequence[Row], fields: Sequence[str], search: str | None, metric: str) -> list[Choice]:
    """Chooses by the mean over seeds on dev: one row for each value of ``fields``, or one of all.

    Equal means: the first row. Rows without a figure on dev cannot be chosen.
    """
    names = [field(name) for name in fields]
    groups: dict[str, list[Row]] = {}
    for row in table:
        values = flat(row.cfg)
        groups.setdefault(repr([values[name] for name in names]), []).append(row)
    choices = []
    for members in groups.values():
        best: tuple[float, Row] | None = None
        for row in members:
            mean = row.interval("dev", search, metric).mean
            if not math.isnan(mean) and (best is None or metrics_lib.better(metric, mean, best[0])):
                best = mean, row
        if best:
            values = flat(best[1].cfg)
            choices.append(Choice({name: values[name] for name in names}, best[1], len(members)))
    return sorted(choices, key=lambda choice: [_order(value) for value in choice.group.values()])


class Comparison(NamedTuple):
    """Two rows by one metric on one part.

    Attributes:
      a, b: the rows; differences are b minus a.
      seeds: of each side in the tests over sentences.
      sentences: in those tests; 0 without them.
      paired: tests over sentences, the models given; None without them.
      without: why there are none.
      welch: test over seeds, the sentences given.
      seeds_p: the same by randomisation.
      holm: p of paired randomisation, adjusted to the number of comparisons; NaN without.
    """

    a: Row
    b: Row
    seeds: tuple[int, ...]
    sentences: int
    paired: significance.Paired | None
    without: str
    welch: significance.Welch
    seeds_p: float
    holm: float = math.nan


class Comparer:
    """Compares rows; reads each run's outputs once.

    Args:
      part, search, metric: what of.
      samples: of approximate randomisation.
      resamples: of the bootstrap.
    """

    def __init__(self, part: str, search: str | None, metric: str, *, samples: int, resamples: int):
        self._part, self._search, self._metric = part, search, metric
        self._samples, self._resamples = samples, resamples
        self._read: dict[Any, tuple[Outputs, significance.Statistics]] = {}

    def __call__(self, a: Row, b: Row) -> Comparison:
        left, right = (row.values(self._part, self._search, self._metric) for row in (a, b))
        ours, theirs = list(left.values()), list(right.values())
        welch = significance.welch(ours, theirs)
        seeds_p = math.nan
        if min(len(ours), len(theirs)) > 1:
            seeds_p = significance.seed_randomisation(ours, theirs, samples=self._samples)
        try:
            seeds, sides, sentences = self._sides(a, b)
        except ValueError as error:
            return Comparison(a, b, (), 0, None, str(error), welch, seeds_p)
        paired = significance.paired(*sides, samples=self._samples, resamples=self._resamples)
        return Comparison(a, b, seeds, sentences, paired, "", welch, seeds_p)

    def all(self, pairs: Sequence[tuple[Row, Row]]) -> list[Comparison]:
        """Several comparisons, which share one chance of being misled (`significance.holm`)."""
        found = [self(a, b) for a, b in pairs]
        ps = [one.paired.randomisation if one.paired else math.nan for one in found]
        return [one._replace(holm=p) for one, p in zip(found, significance.holm(ps), strict=True)]

    def read(self, run: Run) -> tuple[Outputs, significance.Statistics]:
        """A run's outputs and what the metric says of each.

        Raises:
          ValueError: they are not there, or the metric is none of texts.
        """
        key = (run.folder, run.kind)
        if key not in self._read:
            if self._metric not in TEXT_METRICS:
                raise OutputsError(f"{self._metric} is no metric of texts")
            found = run.outputs(self._part, self._search)
            counted = significance.statistics(self._metric, found.outputs, found.references, run.units())
            self._read[key] = found, counted
        return self._read[key]

    def _sides(
        self, a: Row, b: Row
    ) -> tuple[tuple[int, ...], tuple[significance.Statistics, significance.Statistics], int]:
        """Statistics of both rows on the seeds that both have; of unlike seeds, of equally many."""
        ours, theirs = ({run.cfg.run.seed: run for run in row.runs} for row in (a, b))
        common = sorted(ours.keys() & theirs.keys())
        pairs = [(ours[seed], theirs[seed]) for seed in common] or list(
            zip(ours.values(), theirs.values(), strict=False)
        )
        sides: tuple[list[significance.Statistics], list[significance.Statistics]] = ([], [])
        texts = []
        for pair in pairs:
            read = [self.read(run) for run in pair]
            one, other = ((found.sources, found.references) for found, _ in read)
            if one != other:
                raise OutputsError(f"{pair[0].folder} and {pair[1].folder} were tested on other sentences")
            texts.append(one)
            for (_, counted), side in zip(read, sides, strict=True):
                side.append(counted)
        same = all(text == texts[0] for text in texts)
        if not same and any(text == other for text, other in itertools.combinations(texts, 2)):
            raise OutputsError("some seeds were tested on the same sentences, and some on others")
        both = significance.over_seeds(sides[0], same), significance.over_seeds(sides[1], same)
        return tuple(run.cfg.run.seed for run, _ in pairs), both, len(both[0].counts)


def varied_numbers(table: Sequence[Row]) -> list[str]:
    """Numeric fields that take more than one value among the rows."""
    found = []
    for name in _apart([row.cfg for row in table]):
        values = [flat(row.cfg)[name] for row in table]
        numbers = {
            value for value in values if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if len(numbers) > 1:
            found.append(name)
    return found


def _apart(configs: Sequence[Config]) -> list[str]:
    """Fields in which configurations differ, in the order of `Config`."""
    apart: set[str] = set()
    for cfg in configs[1:]:
        apart |= differences(configs[0], cfg).keys()
    names = [name for name in flat(Config()) if name in apart and name not in _NO_MATTER]
    tables = [flat(cfg) for cfg in configs]

    def follows(name: str) -> bool:
        leader = _FOLLOWS.get(name, name)
        both = {(repr(values[leader]), repr(values[name])) for values in tables}
        return leader != name and leader in names and len(both) == len({repr(v[leader]) for v in tables})

    return [name for name in names if not follows(name)]


def _order(value: Any) -> tuple[int, float, list[Any]]:
    """Numbers by size, texts by letters and the numbers in them."""
    if isinstance(value, int | float):
        return 1, float(value), []
    if value is None:
        return 0, 0.0, []
    pieces = re.split(r"(\d+)", str(value))
    return 2, 0.0, [(piece.isdecimal(), int(piece) if piece.isdecimal() else 0, piece) for piece in pieces]
