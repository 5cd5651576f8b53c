"""The reporting command: what many runs say together.

    python -m s2s.report runs/sweep --metric bleu --baseline 1 --output report.html

Decides how the question is asked and where the answer goes. Must not know how it is found
(collect, rows) or told (tables).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

FORMATS = {"text": ".txt", "markdown": ".md", "latex": ".tex", "csv": ".csv", "html": ".html"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m s2s.report",
        description="One table of many runs: a row a configuration, with mean, spread and confidence "
        "interval over its seeds.",
    )
    parser.add_argument(
        "workdirs", nargs="+", metavar="W", help="runs, replicas, sweeps, or folders of these"
    )
    parser.add_argument("--metric", metavar="M,...", help="what to show; the first one chooses and is drawn")
    parser.add_argument("--part", choices=("dev", "test"), help="one part alone (default: both)")
    parser.add_argument(
        "--search", help='"greedy", "beam", "beam 5"... (default: what each run was made for)'
    )
    parser.add_argument("--by", metavar="FIELD,...", help="name rows by these fields (default: what differs)")
    parser.add_argument(
        "--best",
        nargs="?",
        const="",
        metavar="FIELD,...",
        help="choose the best row on dev, for each value of these fields where some are given",
    )
    group = parser.add_argument_group("significance (a row is its number, or part of its name)")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--compare", nargs=2, metavar=("A", "B"), help="test the difference of two rows")
    which.add_argument("--baseline", metavar="ROW", help="test every other row against this one")
    group.add_argument("--samples", type=int, default=10000, help="of approximate randomisation")
    group.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--format", choices=tuple(FORMATS), help="default: as --output ends, else text")
    parser.add_argument("--output", metavar="F", help="a file (default: standard output)")
    args = parser.parse_args(argv)
    try:
        told = _answer(args)
        if args.output:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(told, encoding="utf-8", errors="replace", newline="")
        else:
            sys.stdout.write(told.encode("utf-8", "replace").decode("utf-8"))
    except (ValueError, OSError) as error:
        from s2s.infra.formats import printable

        # Names of rows and folders may hold anything.
        print("\n".join(map(printable, f"s2s: {error}".split("\n"))), file=sys.stderr)
        return 2
    return 0


def _answer(args: argparse.Namespace) -> str:
    """The report as text of the format asked for.

    Raises:
      ReportError: the runs cannot answer.
    """
    from s2s.infra import formats
    from s2s.report import collect, rows, tables
    from s2s.report.rows import ReportError

    for name in ("samples", "resamples"):
        if getattr(args, name) < 1:
            raise ReportError(f"--{name} {getattr(args, name)} must be at least 1")
    suffix = Path(args.output or "").suffix
    form = args.format or next((form for form, ending in FORMATS.items() if ending == suffix), "text")

    runs, troubles = collect.collect(args.workdirs)
    table, repeated = rows.rows(runs, _names(args.by))
    told = [formats.printable(line) for line in collect.told([*troubles, *repeated])]
    if not table:
        raise ReportError("\n".join(["no finished run to report on", *told]))
    metrics, known = _names(args.metric) or [rows.first_metric(table)], rows.metrics_of(table)
    for name in metrics:
        if name not in known:
            raise ReportError(f"no run has --metric {name!r}: there are {', '.join(known)}")
    parts = [
        part
        for part in ((args.part,) if args.part else ("dev", "test"))
        if any(run.row(part, args.search) for run in runs)
    ]
    if not parts:
        there = ", ".join(sorted({row["search"] for run in runs for row in run.scores})) or "none"
        raise ReportError(
            f"no run has scores of {args.part or 'dev or test'} by --search {args.search!r}; "
            f"searches that there are: {there}"
        )
    part = parts[-1]
    pairs: list[tuple[rows.Row, rows.Row]] = []
    if args.compare:
        pairs = [(rows.find(table, args.compare[0]), rows.find(table, args.compare[1]))]
    elif args.baseline is not None:
        base = rows.find(table, args.baseline)
        pairs = [(base, row) for row in table if row.number != base.number]
    comparers = {
        metric: rows.Comparer(part, args.search, metric, samples=args.samples, resamples=args.resamples)
        for metric in metrics
    }
    choices = None
    if args.best is not None:
        choices = rows.best_on_dev(table, _names(args.best), args.search, metrics[0])
    asked = tables.Question(
        table,
        metrics,
        parts,
        args.search,
        choices,
        {metric: comparers[metric].all(pairs) for metric in metrics},
        part,
    )
    if form == "csv":
        print(*told, sep="\n", end="\n" * bool(told), file=sys.stderr)
        return tables.raw(asked)
    made = tables.document(asked, told, comparers[metrics[0]] if form == "html" else None)
    writers = {
        "text": formats.text,
        "markdown": formats.markdown,
        "latex": formats.latex,
        "html": formats.page,
    }
    return writers[form](made)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
