"""What is told of a sweep: a line while it runs, a table in the end.

Decides how far a sweep is, from what its cells measured, and how long the rest will take. Must not
know how a cell is trained.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2s import config as config_lib
from s2s.infra import report
from s2s.sweep import cells as cells_lib
from s2s.sweep.cells import DONE, FAILED, TO_COME, Cell
from s2s.sweep.grouping import Plan

RUNNING = "running"
# Seconds between two looks at the cells' metrics, and between two plain lines where there is no terminal.
_LOOK_S, _LINE_S = 2.0, 30.0
# Of the end of a file of metrics that is read.
_TAIL_BYTES = 8192


class Watch:
    """Shows the whole sweep: a line that is drawn anew on a terminal, else a line now and then.

    Args:
      plan: the sweep.
      home: of its cells.
    """

    def __init__(self, plan: Plan, home: Path):
        self._plan, self._home = plan, home
        self._latest = plan.latest()
        self._settled: dict[str, str] = {}
        self._drawn = sys.stderr.isatty()
        self._told: tuple[int, ...] = ()
        self._look = self._line = 0.0
        self._first: tuple[float, float] | None = None
        self._width = 0

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: Any) -> None:
        self._look = self._line = 0.0
        self({})
        if self._drawn:
            print(file=sys.stderr)

    def __call__(self, programs: Mapping[str, str]) -> None:
        """Takes the state of every job."""
        now = time.monotonic()
        if now < self._look:
            return
        self._look = now + _LOOK_S
        states = self.states(programs)
        counts = tuple(states.count(state) for state in (DONE, RUNNING, FAILED, TO_COME))
        if not self._drawn and counts == self._told and now < self._line:
            return
        self._told, self._line = counts, now + _LINE_S
        text = self.line(counts, now)
        if self._drawn:
            print("\r" + text.ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def states(self, programs: Mapping[str, str]) -> list[str]:
        """The state of every cell; done and failed ones are looked at no more."""
        found = []
        for cell in self._plan.cells:
            state = self._settled.get(cell.name) or cells_lib.state(cell, self._home)
            if state != TO_COME:
                self._settled[cell.name] = state
            elif programs.get(self._latest[cell.name]) == RUNNING:
                state = RUNNING
            found.append(state)
        return found

    def line(self, counts: Sequence[int], now: float) -> str:
        """The sweep in a line: cells by state, the share that is done, and the time left."""
        done, running, failed, coming = counts
        share = self.share()
        if self._first is None and running:
            self._first = share, now
        left = math.inf
        if self._first is not None and share > self._first[0]:
            left = (1 - share) * (now - self._first[1]) / (share - self._first[0])
        return (
            f"{len(self._plan.cells)} cells: {done} done, {running} running, {failed} failed, "
            f"{coming} to come  {100 * share:.0f} %  {report.clock(left)} left"
        )

    def share(self) -> float:
        """How much of the sweep's work is behind us, by the plan's estimates of its cells."""
        behind = total = 0.0
        for cell in self._plan.cells:
            weight = self._plan.seconds[cell.name]
            total += weight
            over = cell.name in self._settled
            steps = self._plan.steps[cell.name]
            behind += weight * (1.0 if over else min(1.0, _last_step(self._home / cell.name) / steps))
        return behind / total if total else 1.0


def _last_step(folder: Path) -> int:
    """The last update that a run measured."""
    with contextlib.suppress(OSError), (folder / report.METRICS_FILE).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"])
    return 0


def ending(plan: Plan, folder: Path) -> tuple[str, int]:
    """What came of the sweep: a text for people, and an exit code, 1 if cells failed or were stopped."""
    home = cells_lib.home(folder)
    states = {cell.name: cells_lib.state(cell, home) for cell in plan.cells}
    failed = [cell for cell in plan.cells if states[cell.name] == FAILED]
    left = [name for name, state in states.items() if state == TO_COME]
    lines = [summary(plan, folder)]
    if failed:
        lines.append(f"\n{len(failed)} of {len(plan.cells)} cells failed; --retry_failed tries them again:")
    for cell in failed:
        reason = cells_lib.failure(cell, home).replace("\n", "\n      ")
        lines.append(f"  {cell.name}: {reason}")
    if left:
        lines.append(f"\n{len(left)} cells were stopped; the same command goes on: {', '.join(left)}")
    lines += [f"\n  {home}: a work directory each cell", f"  {folder / 'programs'}: what the programs said"]
    return "\n".join(lines), int(bool(failed or left))


def summary(plan: Plan, folder: Path) -> str:
    """The sweep as a table: a row for cells of other seeds, mean and standard deviation over them.

    Dev and test have columns of their own, by the metric that picks checkpoints, and the row that is
    best on dev is named: what is chosen by test is measured by nothing.
    """
    home = cells_lib.home(folder)
    finished: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell in plan.cells:
        if cells_lib.state(cell, home) == DONE:
            results = json.loads((home / cell.name / "results.json").read_text(encoding="utf-8"))
            finished.setdefault(cell.row, []).append((cell, results))
    if not finished:
        return ""
    metric = plan.base.run.metric
    table, on_dev = [], {}
    for row, found in finished.items():
        columns = []
        for part in ("dev", "test"):
            values = [value for _, results in found if (value := _score(results, part, metric)) is not None]
            columns.append(_spread(values))
            if part == "dev" and values:
                on_dev[row] = statistics.mean(values)
        parameters = max(results["parameters"] for _, results in found)
        table.append([row, len(found), parameters, *columns])
    better = "higher is better" if config_lib.METRICS[metric] else "lower is better"
    lines = [report.table(table, ["cells", "runs", "parameters", f"dev {metric}", f"test {metric}"])]
    if on_dev:
        best = (max if config_lib.METRICS[metric] else min)(on_dev, key=lambda row: on_dev[row])
        lines.append(f"best on dev: {best} ({better}; mean and standard deviation over runs)")
    return "\n".join(lines)


def _score(results: Mapping[str, Any], part: str, metric: str) -> float | None:
    """A run's score by the search it was made for, which is the last one."""
    rows = [row for row in results["scores"] if row["part"] == part and row.get(metric) is not None]
    return float(rows[-1][metric]) if rows else None


def _spread(values: Sequence[float]) -> str | None:
    if not values:
        return None
    mean = report.number(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2g}"
