"""What a report says: its tables, its drawings, its remarks.

Decides which figures stand side by side and in what words. Must not know where runs lie (collect), what a
row is (rows), how a test is computed (`s2s.learn.significance`), or what a format looks like
(`s2s.infra.formats`).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from s2s.config import TEXT_METRICS, flat
from s2s.infra import charts
from s2s.infra.formats import Document, Drawing, Table
from s2s.judge import by_length, label
from s2s.learn import metrics as metrics_lib
from s2s.learn.significance import Interval, interval
from s2s.report.rows import Choice, Comparer, Comparison, Row, short, varied_numbers


class Question(NamedTuple):
    """What a report is about.

    Attributes:
      rows: to show.
      metrics: the first is the one that chooses and is drawn.
      parts: "dev", "test" or both, in this order.
      search: as `Run.row` takes it.
      choices: rows chosen on dev; None: nothing was to be chosen.
      comparisons: by metric.
      compared: the part they are of.
    """

    rows: Sequence[Row]
    metrics: Sequence[str]
    parts: Sequence[str]
    search: str | None
    choices: Sequence[Choice] | None
    comparisons: dict[str, list[Comparison]]
    compared: str


def document(asked: Question, remarks: Sequence[str], comparer: Comparer | None = None) -> Document:
    """The whole report; with a comparer to read outputs by, also its drawings."""
    tables = [_scores(asked)]
    if asked.choices is not None:
        tables.append(_chosen(asked, asked.choices))
    for metric, comparisons in asked.comparisons.items():
        if comparisons:
            tables.append(_compared(metric, comparisons, asked.compared))
    runs = sum(len(row.runs) for row in asked.rows)
    title = f"{len(asked.rows)} configuration{'s' * (len(asked.rows) != 1)}, {runs} run{'s' * (runs != 1)}"
    drawings = _drawings(asked, comparer) if comparer else []
    return Document(title, tables, drawings, remarks)


def raw(asked: Question) -> str:
    """All figures unrounded, as CSV: a line for each row, part and metric."""
    names = list(asked.rows[0].fields)
    chosen = {choice.row.number for choice in asked.choices or ()}
    header = ["row", *names, "ensemble", "part", "search", "pairs", "metric", "seeds", "mean", "sd", "low"]
    header += ["high", "scores", "chosen", "baseline", "difference", "difference_low", "difference_high"]
    header += ["p_bootstrap", "p_randomisation", "p_holm", "p_welch", "p_seeds"]
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(header)
    for row in asked.rows:
        for part in asked.parts:
            for metric in asked.metrics:
                values = row.values(part, asked.search, metric)
                found = row.interval(part, asked.search, metric)
                first = row.runs[0].row(part, asked.search) or {}
                line = [row.number, *row.fields.values(), row.kind, part, first.get("search")]
                line += [first.get("pairs"), metric, *found]
                line += [" ".join(f"{seed}:{value!r}" for seed, value in values.items())]
                line += ["" if asked.choices is None else int(row.number in chosen)]
                line += _comparison_cells(row, part, metric, asked)
                writer.writerow(["" if _unknown(value) else value for value in line])
    return written.getvalue()


def _comparison_cells(row: Row, part: str, metric: str, asked: Question) -> list[Any]:
    for one in asked.comparisons.get(metric, ()) if part == asked.compared else ():
        if one.b.number == row.number:
            paired = list(one.paired or [one.welch.difference] + [math.nan] * 4)
            return [one.a.number, *paired, one.holm, one.welch.p, one.seeds_p]
    return [""] * 9


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _scores(asked: Question) -> Table:
    kinds = any(row.kind for row in asked.rows)
    searches = {
        (run.row(part, asked.search) or {}).get("search", "")
        for row in asked.rows
        for run in row.runs
        for part in asked.parts
    } - {""}
    several = len(searches) > 1
    fields = list(asked.rows[0].fields)
    headers = ["#", *map(short, fields)] + ["experiment"] * (not fields) + ["ensemble"] * kinds + ["seeds"]
    headers += ["search"] * several
    headers += [f"{part} {label(metric)}" for metric in asked.metrics for part in asked.parts]
    rows = []
    for row in asked.rows:
        cells = [str(row.number), *row.shown.values()]
        cells += [row.cfg.name] * (not fields) + [row.kind or "-"] * kinds + [str(len(row.runs))]
        if several:
            used = {(run.row(asked.parts[-1], asked.search) or {}).get("search", "-") for run in row.runs}
            cells.append(", ".join(sorted(used)))
        cells += [
            _mean(row.interval(part, asked.search, metric), metric, len(row.runs))
            for metric in asked.metrics
            for part in asked.parts
        ]
        rows.append(cells)
    notes = ["Mean ± standard deviation over seeds [95 % confidence interval of the mean, Student's t]."]
    if not several and searches:
        notes.append(f"Search: {searches.pop()}.")
    return Table("Scores", headers, rows, notes)


def _chosen(asked: Question, choices: Sequence[Choice]) -> Table:
    metric = asked.metrics[0]
    groups = list(choices[0].group) if choices else []
    others = [name for name in asked.rows[0].fields if name not in groups]
    headers = [*map(short, groups), "#", *map(short, others), "of", f"dev {label(metric)}"]
    headers += [f"test {label(one)}" for one in asked.metrics]
    rows = []
    for choice in choices:
        row = choice.row
        cells = [row.shown.get(name, str(value)) for name, value in choice.group.items()] + [str(row.number)]
        cells += [row.shown[name] for name in others] + [str(choice.among)]
        cells.append(_mean(row.interval("dev", asked.search, metric), metric, len(row.runs)))
        cells += [_mean(row.interval("test", asked.search, one), one, len(row.runs)) for one in asked.metrics]
        rows.append(cells)
    note = f"Chosen by the mean {_words(metric)} over seeds on dev alone; no figure on test had a say."
    if not choices:
        note = f"Nothing can be chosen: no run has {_words(metric)} on dev."
    return Table("Best on dev", headers, rows, [note])


def _compared(metric: str, comparisons: Sequence[Comparison], part: str) -> Table:
    several = len(comparisons) > 1
    headers = ["a", "b", "b − a", "95 % CI", "p bootstrap", "p randomisation"] + ["p Holm"] * several
    headers += ["seeds: 95 % CI", "p Welch", "p randomisation of seeds"]
    rows, notes = [], []
    for one in comparisons:
        first = f"#{one.a.number}" if several else f"#{one.a.number} {one.a.label}"
        cells = [first, f"#{one.b.number} {one.b.label}"]
        if one.paired:
            found = one.paired
            cells += [_signed(found.difference), f"[{_signed(found.low)}, {_signed(found.high)}]"]
            cells += [_p(found.bootstrap), _p(found.randomisation)]
        else:
            cells += [_signed(one.welch.difference), "-", "-", "-"]
        cells += [_p(one.holm)] * several
        spread = not math.isnan(one.welch.low)
        cells.append(f"[{_signed(one.welch.low)}, {_signed(one.welch.high)}]" if spread else "-")
        cells += [_p(one.welch.p), _p(one.seeds_p)]
        rows.append(cells)
        if one.without:
            notes.append(f"#{one.a.number} and #{one.b.number}: no test over sentences: {one.without}.")
    tested = sorted({(one.sentences, one.seeds) for one in comparisons if one.paired})
    for sentences, seeds in tested:
        notes.append(
            f"Tests over {sentences} sentences with the outputs of seeds {', '.join(map(str, seeds))}."
        )
    if tested:
        swapped = ", by sacreBLEU" * (metric in metrics_lib.SACREBLEU)
        notes.append(
            "Would other sentences tell the same? The figure is the mean over seeds of the corpus score; "
            "sentences are drawn (bootstrap and interval: Koehn 2004) or swapped (randomisation: Riezler and "
            f"Maxwell 2005{swapped}) whole, with what all seeds made of them; the models are given."
        )
        if several:
            notes.append("p Holm: p randomisation, adjusted to the number of comparisons (Holm 1979).")
    notes.append(
        "Would other seeds tell the same (Clark et al. 2011)? Welch's t-test and randomisation over the "
        "seeds' scores; the sentences are given. Every p is two-sided."
    )
    return Table(f"Differences in {part} {_words(metric)}", headers, rows, notes)


def _drawings(asked: Question, comparer: Comparer) -> list[Drawing]:
    metric, drawn = asked.metrics[0], _drawn(asked)
    of = "" if len(drawn) == len(asked.rows) else f"; the best {len(drawn)} of {len(asked.rows)} on dev"
    made = [_curves(metric, drawn, of)]
    if metric in TEXT_METRICS:
        made.append(_by_length(metric, drawn, of, asked, comparer))
    made.append(_fields(metric, asked))
    return [drawing for drawing in made if drawing]


def _drawn(asked: Question) -> list[Row]:
    """As many rows as a chart can hold: the best on dev."""
    metric = asked.metrics[0]
    worst = -math.inf if metrics_lib.better(metric, 1, 0) else math.inf

    def key(row: Row) -> float:
        mean = row.interval("dev", asked.search, metric).mean
        mean = worst if math.isnan(mean) else mean
        return -mean if worst < 0 else mean

    best = sorted(asked.rows, key=key)[: charts.MOST_LINES]
    return sorted(best, key=lambda row: row.number)


def _line_label(row: Row) -> str:
    text = f"#{row.number} {row.label}"
    return text if len(text) <= 90 else text[:89] + "…"


def _curves(metric: str, drawn: Sequence[Row], of: str) -> Drawing | None:
    known = [name for row in drawn for run in row.runs for line in run.history for name in line]
    name = next((one for one in (metric, drawn[0].cfg.run.metric, "loss") if one in known), None)
    if name is None:
        return None
    found = []
    for row in drawn:
        steps: dict[int, list[float]] = {}
        for run in row.runs:
            for line in run.history:
                value = line.get(name)
                if isinstance(value, int | float) and math.isfinite(value):
                    steps.setdefault(line["step"], []).append(value)
        if steps:
            at = sorted(steps)
            means = [interval(steps[step]) for step in at]
            found.append(
                charts.Line(_line_label(row), at, [one.mean for one in means], [one.sd for one in means])
            )
    drawing = charts.lines("curves", found, "step", f"dev {label(name)}")
    return Drawing(f"Learning curves: dev {_words(name)} by step, mean and standard deviation{of}.", drawing)


def _by_length(
    metric: str, drawn: Sequence[Row], of: str, asked: Question, comparer: Comparer
) -> Drawing | None:
    members: list[tuple[int, Any]] = []
    lengths: list[int] = []
    for at, row in enumerate(drawn):
        for run in row.runs:
            try:
                outputs, counted = comparer.read(run)
            except ValueError:
                continue
            members.append((at, counted))
            lengths += outputs.lengths
    if not members:
        return None
    begins = np.cumsum([0, *(len(counted.counts) for _, counted in members)])

    def score(numbers: list[int]) -> dict[str, Any]:
        chosen = np.array(numbers)
        values: list[list[float]] = [[] for _ in drawn]
        for (at, counted), begin, end in zip(members, begins, begins[1:], strict=False):
            own = chosen[(chosen >= begin) & (chosen < end)] - begin
            if len(own):
                values[at].append(float(counted.score(counted.counts[own].sum(0))))
        return {str(at): interval(found) for at, found in enumerate(values)}

    classes: list[dict[str, Any]] = by_length(lengths, score)  # type: ignore[arg-type]
    found = []
    for at, row in enumerate(drawn):
        means = [one[str(at)] for one in classes]
        if any(one.size for one in means):
            x = list(range(len(classes)))
            found.append(
                charts.Line(_line_label(row), x, [one.mean for one in means], [one.sd for one in means])
            )
    names = [one["length"] for one in classes]
    runs = sum(len(row.runs) for row in drawn)
    some = "" if len(members) == runs else f"; {runs - len(members)} of {runs} runs have no outputs"
    drawing = charts.lines("lengths", found, "source pieces", f"{asked.compared} {label(metric)}", names)
    return Drawing(
        f"{asked.compared.capitalize()} {_words(metric)} by source length, mean and standard deviation "
        f"over seeds{of}{some}.",
        drawing,
    )


def _fields(metric: str, asked: Question) -> Drawing | None:
    part = "dev" if "dev" in asked.parts else asked.parts[0]
    found = []
    for name in varied_numbers(asked.rows):
        points: list[tuple[float, Interval]] = []
        for row in asked.rows:
            value, mean = flat(row.cfg)[name], row.interval(part, asked.search, metric)
            if isinstance(value, int | float) and mean.size and not row.kind:
                points.append((value, mean))
        if points:
            x, means = zip(*points, strict=True)
            found.append(
                charts.Panel(short(name), charts.Line("", x, [m.mean for m in means], [m.sd for m in means]))
            )
    if not found:
        return None
    drawing = charts.panels("fields", found, f"{part} {label(metric)}")
    return Drawing(
        f"{part.capitalize()} {_words(metric)} by each number that varies: a point a row, standard deviation "
        "over seeds.",
        drawing,
    )


def _number(value: float, metric: str) -> str:
    return (f"{value:.2f}" if metric in TEXT_METRICS else f"{value:.4g}").replace("-", "−")


def _mean(found: Interval, metric: str, runs: int) -> str:
    if not found.size:
        return "-"
    text = _number(found.mean, metric)
    if found.size > 1:
        low, high = _number(found.low, metric), _number(found.high, metric)
        text += f" ± {_number(found.sd, metric)} [{low}, {high}]"
    return text if found.size == runs else f"{text} ({found.size} of {runs})"


def _words(metric: str) -> str:
    """A metric's name in a sentence: no arrow."""
    return label(metric).rstrip(" ↑↓")


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.3g}".replace("-", "−")


def _p(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
