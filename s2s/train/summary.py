"""What is said of finished runs: of one, and of replicas, their means and spreads.

Decides the tables at the end of training and what the results of replicas hold. Must not know how
anything was trained.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from s2s.infra import report
from s2s.judge import label
from s2s.workdir import Workdir

# What a row of scores is of; all else in it is a metric.
_OF = ("part", "pairs", "search")


def show(results: dict[str, Any], work: Workdir) -> None:
    """Prints a run's final table and where everything lies."""
    rows = results["scores"]
    if rows:
        names = _metrics(rows[0])
        print(
            report.table(
                [[*(row[name] for name in (*_OF, *names))] for row in rows], [*_OF, *map(label, names)]
            )
        )
    for name, text in results["signatures"].items():
        print(f"{name}: {text}")
    print(
        f"\n{results['parameters']:,} parameters, {results['steps']} updates ({results['epochs']} epochs), "
        f"{results['training_seconds']:.0f} s of training at {results['tokens_per_second']:,.0f} "
        f"target tokens/s, {results['process_seconds']:.0f} s in all; the model is {results['model']}\n"
    )
    for path, what in [
        (work.path, "everything: python -m s2s.translate --workdir needs this alone"),
        (work.picture, "where the model looked"),
        (work.curve, "the learning curve"),
        (work.metrics, "every measurement"),
    ]:
        if path.exists():
            print(f"  {path}: {what}")


def of_replicas(
    name: str, seeds: Sequence[int], found: Sequence[tuple[str, dict[str, Any] | None, str | None]]
) -> dict[str, Any]:
    """The results of runs that differ in their seed.

    Args:
      name: of the experiment.
      seeds: one a run.
      found: folder, results and failure of each run.

    Returns:
      "name"; "replicas", for each run its folder, seed, scores and, if it was given up, its failure;
      "scores", for each part and search the mean, the sample standard deviation (None of a single
      value) and the values of every metric, in the order of the runs that were not given up.
    """
    replicas, rows = [], []
    for seed, (folder, results, failure) in zip(seeds, found, strict=True):
        replicas.append({"folder": folder, "seed": seed, "scores": results["scores"] if results else []})
        if failure is not None:
            replicas[-1]["failure"] = failure
        if results:
            rows.append(results["scores"])
    scores = [
        {
            **{key: same[0][key] for key in _OF},
            **{metric: _spread([row[metric] for row in same]) for metric in _metrics(same[0])},
        }
        for same in zip(*rows, strict=True)
    ]
    return {"name": name, "replicas": replicas, "scores": scores}


def show_replicas(results: dict[str, Any], work: Workdir) -> None:
    """Prints the last row of scores of every replica, that of the test part where there is one."""
    if results["scores"]:
        last = results["scores"][-1]
        names = _metrics(last)
        rows: list[list[Any]] = [
            [each["folder"], each["seed"], *(each["scores"][-1][name] for name in names)]
            for each in results["replicas"]
            if each["scores"]
        ]
        for key in ("mean", "sd"):
            rows.append([key, None, *(last[name][key] for name in names)])
        print(f"{last['part']}, {last['pairs']} pairs, {last['search']}")
        print(report.table(rows, ["replica", "seed", *map(label, names)]))
    for each in results["replicas"]:
        if "failure" in each:
            print(f"{each['folder']} was given up: {each['failure']}")
    print(f"\n  {work.path}: a work directory for each replica, and their means in {work.results.name}")


def _metrics(row: dict[str, Any]) -> list[str]:
    return [name for name in row if name not in _OF]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "values": list(values)}
