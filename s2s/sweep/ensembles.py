"""Ensembles of a sweep: the seeds of a row answer as one, and are a row of the report.

Decides which cells make an ensemble. Must not know how one is decoded (evaluate).

    W/ensembles/ROW/      scores and outputs of the seeds of a row together
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from s2s.data.tasks import TASKS
from s2s.infra.launchers import Job
from s2s.sweep import cells as cells_lib
from s2s.sweep.cells import DONE, Cell


def jobs(cells: Sequence[Cell], folder: Path) -> list[Job]:
    """What is still to be done: rows of two seeds or more that are finished and learned from the same pairs.

    Args:
      cells: of the sweep.
      folder: its work directory.
    """
    home, rows = cells_lib.home(folder), dict[str, list[Cell]]()
    for cell in cells:
        # A generated task has other pairs, so other vocabularies, for every seed.
        if cell.cfg.data.train not in TASKS and cells_lib.state(cell, home) == DONE:
            rows.setdefault(cell.row, []).append(cell)
    found = []
    for row, members in rows.items():
        into, names = folder / "ensembles" / row, [str(home / cell.name) for cell in members]
        if len(names) < 2 or _members(into) == names:
            continue
        command = [sys.executable, "-m", "s2s.evaluate", "--workdir", *names, "--record", str(into)]
        found.append(Job(row, command, folder / "programs" / f"ensemble_{row}.log"))
    return found


def _members(into: Path) -> list[str] | None:
    """Who made the ensemble that is there."""
    try:
        found: list[str] = json.loads((into / "results.json").read_text(encoding="utf-8"))["members"]
        return found
    except (OSError, ValueError, KeyError):
        return None
