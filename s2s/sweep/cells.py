"""The cells of a sweep: one frozen config each, known by what it is and not by what it is called.

Decides which cells a sweep has, what becomes of those that an earlier start of it left behind, and
when one is done or has failed. Must not know which cells are trained together, nor how.

A cell is done when its work directory has results of its config, and failed when it has
failure.json, {"reason": ...}, instead.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from s2s import axes
from s2s import config as config_lib
from s2s.config import Config, ConfigError
from s2s.workdir import Workdir, WorkdirError

DONE, FAILED, TO_COME = "done", "failed", "to come"


class SweepError(ValueError):
    """A sweep that cannot be; the message says which cells, and what to do."""


class Cell(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: its own, and that of its folder.
      row: what it is called in tables, which cells of other seeds share.
      cfg: its configuration.
    """

    name: str
    row: str
    cfg: Config


def make_cells(base: Mapping[str, Any], points: Any, fixed: Collection[str] = ()) -> list[Cell]:
    """Makes the config of every cell.

    Args:
      base: the experiment's config, nested by parts.
      points: what `sweep()` gave.
      fixed: dotted names that the command line set; no axis may set them again.

    Raises:
      SweepError: with the problems of all cells.
    """
    if not isinstance(points, Sequence) or not all(isinstance(point, axes.Point) for point in points):
        raise SweepError("sweep() must return axes, such as axes.product(axes.grid({...}), axes.seeds(3))")
    if not points:
        raise SweepError("sweep() gave no cells: there is nothing to do")
    problems: dict[str, list[str]] = {}
    cells = []
    for name, row, point in zip(axes.names(points), axes.rows(points), points, strict=True):
        tree = json.loads(json.dumps(base))
        for field, value in point.changes.items():
            _put(tree, field, value)
            if field in fixed:
                told = f"config.{field} is set by an axis of the sweep: leave the override out"
                problems.setdefault(told, []).append(name)
        # Before it is a config: what an axis must not be may not be a field at all.
        if "run.replicas" in point.changes or tree.get("run", {}).get("replicas", 1) != 1:
            told = "config.run.replicas is what a sweep decides itself: use axes.seeds, and --max_replicas"
            problems.setdefault(told, []).append(name)
            continue
        tree["name"] = name
        try:
            cells.append(Cell(name, row, config_lib.from_json(json.dumps(tree))))
        except ConfigError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(name)
    if problems:
        raise SweepError(tell_problems(problems, len(points)))
    return cells


def tell_problems(problems: Mapping[str, Sequence[str]], total: int) -> str:
    """Problems and the names of the cells that have them, each problem once."""
    lines = []
    for told, names in problems.items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"{told}\n    in {'every cell' if len(names) == total > 1 else shown}")
    return "\n".join(lines)


def settle(
    cells: Sequence[Cell], old: Sequence[Cell], folder: Path, base: Config, old_base: Config
) -> tuple[list[Cell], list[str]]:
    """Gives cells that were there before the names they had, whatever the sweep calls them now.

    Args:
      cells: of the sweep as it is.
      old: of the sweep as it was.
      folder: of the cells' work directories.
      base, old_base: the config that all vary, and that they did.

    Returns:
      The cells, and remarks for people.

    Raises:
      SweepError: another sweep lives here.
    """
    by_key = {_key(cell.cfg): cell.name for cell in old}
    by_name = {cell.name for cell in old}
    taken = {by_key[key] for cell in cells if (key := _key(cell.cfg)) in by_key}
    if old and not taken and not any(cell.name in by_name for cell in cells):
        changed = [
            f"  config.{name}: {there!r} there, {now!r} now"
            for name, (there, now) in config_lib.differences(old_base, base).items()
        ]
        raise SweepError(
            f"{folder.parent} holds another sweep, of cells such as {old[0].name}; none of them is in this "
            "one\n" + "".join(f"{line}\n" for line in changed) + "give another --workdir"
        )
    settled: list[Cell] = []
    problems: dict[str, list[str]] = {}
    remarks: dict[str, list[str]] = {}
    for cell in cells:
        name = by_key.get(_key(cell.cfg))
        if name is None:
            name = _free(cell.name, taken)
        taken.add(name)
        cfg = dataclasses.replace(cell.cfg, name=name)
        settled.append(cell._replace(name=name, cfg=cfg))
        try:
            for field, (there, now) in Workdir(folder / name).check(cfg).items():
                told = f"config.{field}: was {there!r}, is {now!r} from here on"
                if field not in ("data.cache", "data.prefetch", "name"):
                    remarks.setdefault(told, []).append(name)
        except WorkdirError as error:
            for line in str(error).splitlines()[1:-1]:
                problems.setdefault(line.strip(), []).append(name)
    if problems:
        raise SweepError(
            f"{folder.parent} holds another experiment:\n{tell_problems(problems, len(cells))}\n"
            "give another --workdir"
        )
    gone = sorted(by_name - {cell.name for cell in settled})
    said = [f"{line} ({len(names)} of {len(cells)} cells)" for line, names in remarks.items()]
    if gone:
        said.append(f"no longer in the sweep, left as they are: {', '.join(gone)}")
    return settled, said


def home(folder: Path) -> Path:
    """Where the cells' work directories are in that of their sweep."""
    return folder / "cells"


def state(cell: Cell, folder: Path) -> str:
    """Whether a cell is `DONE`, `FAILED` or `TO_COME`; ``folder`` holds the cells' work directories."""
    work = Workdir(folder / cell.name)
    if work.results.exists() and not any(name.startswith("run.") for name in work.check(cell.cfg)):
        return DONE
    return TO_COME if work.read_failure() is None else FAILED


def fail(cell: Cell, folder: Path, reason: str) -> None:
    """Notes that a cell failed, and why."""
    Workdir(folder / cell.name).write_failure(reason)


def failure(cell: Cell, folder: Path) -> str:
    """Why a cell failed."""
    return Workdir(folder / cell.name).read_failure() or "no reason given"


def forgive(cells: Iterable[Cell], folder: Path) -> None:
    """Makes failed cells cells to come."""
    for cell in cells:
        Workdir(folder / cell.name).failure.unlink(missing_ok=True)


def _put(tree: dict[str, Any], field: str, value: Any) -> None:
    *parts, last = field.split(".")
    for part in parts:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise SweepError(f"an axis sets config.{field}, but config.{field.rsplit('.', 1)[0]} is no part")
    tree[last] = value


def _key(cfg: Config) -> str:
    """Equal for two configs that are the same run."""
    data = dataclasses.replace(cfg.data, cache=None, prefetch=1)
    return config_lib.to_json(dataclasses.replace(cfg, name="run", data=data))


def _free(name: str, taken: Collection[str]) -> str:
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found
