"""Programs: which cells of a sweep are trained together, and what that is going to take.

Decides how cells become programs, and the file that remembers it: sweep.json. A program once
planned stays as it is, for a job of it may be waiting in a queue; cells that come later make
programs of their own. Must not know how a program is started.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from s2s import config as config_lib
from s2s.config import Config
from s2s.infra import report
from s2s.sweep import cost as cost_lib
from s2s.sweep.cells import TO_COME, Cell, SweepError, tell_problems
from s2s.sweep.cost import Cost, Machine, Sizes
from s2s.variation import apart as apart_in

PLAN = "sweep.json"


class Program(NamedTuple):
    """Cells that are trained together.

    Attributes:
      name: its own, for good.
      cells: their names; each is a replica.
    """

    name: str
    cells: tuple[str, ...]


class Plan(NamedTuple):
    """A sweep as its work directory remembers it.

    Attributes:
      base: the config that the cells vary.
      cells: all of them.
      programs: all that ever were; a cell is in one, and again in later ones if it was tried again.
      seconds: cell to the time it is going to take, estimated, in a program.
      steps: cell to its updates.
    """

    base: Config
    cells: list[Cell]
    programs: list[Program]
    seconds: dict[str, float]
    steps: dict[str, int]

    def program(self, name: str) -> Program:
        """The program of that name.

        Raises:
          SweepError: there is none.
        """
        for program in self.programs:
            if program.name == name:
                return program
        known = ", ".join(program.name for program in self.programs)
        raise SweepError(f"there is no program {name!r}: they are {known}")

    def latest(self) -> dict[str, str]:
        """Cell to the program that it is trained by now."""
        return {cell: program.name for program in self.programs for cell in program.cells}


def costs(cells: Sequence[Cell], sizes: Callable[[Config], Sizes], machine: Machine) -> dict[str, Cost]:
    """Estimates what every cell costs, by name.

    Args:
      cells: of a sweep.
      sizes: what a config's corpus makes of its steps; may raise ValueError.
      machine: to train on.

    Raises:
      SweepError: the data of some cells cannot be had, with all problems.
    """
    found: dict[str, Cost] = {}
    problems: dict[str, list[str]] = {}
    for cell in cells:
        try:
            found[cell.name] = cost_lib.estimate(cell.cfg, sizes(cell.cfg), machine)
        except ValueError as error:
            problems.setdefault(str(error), []).append(cell.name)
    if problems:
        raise SweepError(tell_problems(problems, len(cells)))
    return found


def divide(
    cells: Sequence[Cell],
    costs: Mapping[str, Cost],
    machine: Machine,
    *,
    most: int | None = None,
    jobs: int = 1,
) -> list[tuple[str, ...]]:
    """Puts cells that fit together into as few programs as the machine is full with.

    Args:
      cells: to be trained.
      costs: of each.
      machine: what one program runs on.
      most: replicas a program may have; None: as many as `s2s.sweep.cost.replicas` says.
      jobs: programs that run at a time; so many are made of the cells, if there are so many.

    Returns:
      The names of each program's cells, in order.
    """
    groups: list[list[Cell]] = []
    for cell in cells:
        for group in groups:
            if not apart_in(group[0].cfg, cell.cfg):
                group.append(cell)
                break
        else:
            groups.append([cell])
    programs: list[tuple[str, ...]] = []
    for group in groups:
        # The dearest of a group: replicas of one program have one shape.
        limit = most or min(cost_lib.replicas(costs[cell.name], machine) for cell in group)
        share = math.ceil(jobs * len(group) / len(cells))
        number = max(math.ceil(len(group) / limit), min(share, len(group)) if jobs > 1 else 1)
        ends = [round(len(group) * part / number) for part in range(number + 1)]
        for first, end in zip(ends, ends[1:], strict=False):
            programs.append(tuple(cell.name for cell in group[first:end]))
    return programs


def named(programs: Sequence[tuple[str, ...]], taken: int) -> list[Program]:
    """Programs with names of their own, numbered from ``taken`` + 1 on."""
    return [Program(f"p{taken + number:03}", cells) for number, cells in enumerate(programs, start=1)]


def programs(
    cells: Sequence[Cell],
    old: Plan | None,
    costs: Mapping[str, Cost],
    machine: Machine,
    *,
    most: int | None = None,
    jobs: int = 1,
    apart: Collection[str] = (),
) -> list[Program]:
    """The programs there were, and new ones of the cells that had none.

    Args:
      cells: of the sweep as it is.
      old: the plan of an earlier start; None: this is the first.
      costs, machine, most, jobs: as of `divide`.
      apart: names of cells that get programs of their own, though they had one.
    """
    kept = list(old.programs) if old is not None else []
    by_name = {cell.name: cell for cell in cells}
    taken: set[str] = set()
    for program in kept:
        members = [by_name[name] for name in program.cells if name in by_name]
        # What fitted together when the program was made may do so no longer.
        if not any(apart_in(members[0].cfg, other.cfg) for other in members):
            taken |= set(program.cells)
    new = divide([cell for cell in cells if cell.name not in taken], costs, machine, most=most, jobs=jobs)
    return [*kept, *named([*new, *((cell.name,) for cell in cells if cell.name in apart)], len(kept))]


def make_plan(
    base: Config, cells: Sequence[Cell], programs: Sequence[Program], costs: Mapping[str, Cost]
) -> Plan:
    """The plan of these programs, with the time and the updates of every cell."""
    plan = Plan(base, list(cells), list(programs), {}, {name: cost.steps for name, cost in costs.items()})
    for name, program in plan.latest().items():
        members = [one for one in plan.program(program).cells if one in costs]
        if name in costs:
            plan.seconds[name] = seconds(members, costs) / len(members)
    return plan


def seconds(cells: Sequence[str], costs: Mapping[str, Cost]) -> float:
    """Seconds that the updates of a program take; evaluations and compilation are not counted."""
    found = [costs[name] for name in cells]
    dearest = max(found, key=lambda cost: cost.shared + cost.own)
    return max(one.steps for one in found) * cost_lib.step_seconds(dearest, len(found))


def told(plan: Plan, costs: Mapping[str, Cost], machine: Machine, states: Mapping[str, str]) -> str:
    """The plan as two tables, of cells and of programs.

    Args:
      plan, costs, machine: of the sweep.
      states: of the cells, by name.
    """
    latest = plan.latest()
    coming = [cell.name for cell in plan.cells if states[cell.name] == TO_COME]
    cells = []
    for cell in plan.cells:
        cost = costs[cell.name]
        numbers = cost.parameters, cost.flops / 1e9, cost.memory / 2**20, cost.steps
        cells.append([cell.name, latest[cell.name], states[cell.name], *numbers])
    rows, times = [], []
    for program in plan.programs:
        names = [name for name in program.cells if name in coming and latest[name] == program.name]
        if not names:
            continue
        times.append(seconds(names, costs))
        flops = sum(costs[name].flops for name in names) / 1e9
        memory = sum(costs[name].memory for name in names) / 2**20
        steps = max(costs[name].steps for name in names)
        shown = names[0] + (f" to {names[-1]}" if len(names) > 1 else "")
        rows.append([program.name, len(names), flops, memory, steps, report.clock(times[-1]), shown])
    sizes = ["GFLOP a step", "memory (MiB)", "steps"]
    return (
        report.table(cells, ["cell", "program", "state", "parameters", *sizes])
        + "\n\n"
        + report.table(rows, ["program", "replicas", *sizes, "updates (h:mm:ss)", "cells"])
        + f"\n\n{len(coming)} of {len(plan.cells)} cells to train in {len(rows)} "
        f"{'program' if len(rows) == 1 else 'programs'}, updates of {report.clock(sum(times))} "
        f"one program after another, on {machine}\n"
        "estimated from shapes, good to a factor of two; evaluation and compilation come on top"
    )


def read_plan(folder: Path) -> Plan | None:
    """The plan that a sweep left in its work directory; None if there is none.

    Raises:
      SweepError: the file is damaged.
    """
    path = folder / PLAN
    if not path.exists():
        return None
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Plan(
            config_lib.from_json(json.dumps(kept["base"])),
            [
                Cell(one["name"], one["row"], config_lib.from_json(json.dumps(one["config"])))
                for one in kept["cells"]
            ],
            [Program(one["name"], tuple(one["cells"])) for one in kept["programs"]],
            {one["name"]: float(one["seconds"]) for one in kept["cells"]},
            {one["name"]: int(one["steps"]) for one in kept["cells"]},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise SweepError(f"{path} is damaged: {error}; delete it, cells that are done stay so") from error


def write_plan(folder: Path, plan: Plan) -> None:
    """Keeps a plan in a sweep's work directory."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        "base": json.loads(config_lib.to_json(plan.base)),
        "programs": [{"name": one.name, "cells": list(one.cells)} for one in plan.programs],
        "cells": [
            {
                "name": cell.name,
                "row": cell.row,
                "steps": plan.steps[cell.name],
                "seconds": round(plan.seconds[cell.name], 3),
                "config": json.loads(config_lib.to_json(cell.cfg)),
            }
            for cell in plan.cells
        ],
    }
    draft = folder / f"{PLAN}.draft"
    draft.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(folder / PLAN)
