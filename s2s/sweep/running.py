"""A sweep under way: its programs as jobs, one after another or side by side.

Decides what a job does, and what counts as a failure and of whom. Must not know how cells became
programs, how a job is started (launchers), nor how the whole is shown (watch).

The work directory W of a sweep:

    sweep.json            the plan
    cells/NAME/           a cell: an ordinary work directory
    programs/NAME.log     what a program said
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from s2s.infra.launchers import Job
from s2s.infra.processes import STOPPED
from s2s.sweep import cells as cells_lib
from s2s.sweep import grouping, watch
from s2s.sweep.cells import DONE, TO_COME, Cell, SweepError
from s2s.sweep.grouping import Plan

# Lines of the end of a log that are quoted.
_LOG_LINES = 5

Launch = Callable[[Sequence[Job], Callable[[dict[str, str]], None]], dict[str, int]]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the sweep's work directory, so that nobody else starts its jobs.

    Raises:
      SweepError: somebody does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sweep.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SweepError(f"{folder} is being swept by another process: wait for it, or stop it") from None
        yield


def train_program(folder: Path, name: str, slots: int = 1) -> int:
    """Trains what is to be done of a program: the work of one job.

    A run that cannot be trained is noted in its own folder and takes no other with it: if training
    them together fails as a whole, they are trained one by one.

    Args:
      folder: the sweep's work directory.
      name: of the program.
      slots: jobs that share this machine's cores; each keeps to its own.

    Returns:
      The exit code: 0 if all its cells are done, 1 if some failed.

    Raises:
      train.Interrupted: a signal asked to stop; the states are saved.
      SweepError: there is no such program.
    """
    plan = grouping.read_plan(folder)
    if plan is None:
        raise SweepError(f"{folder} holds no sweep: it has no {grouping.PLAN}")
    plan.program(name)
    latest = plan.latest()
    cells = [cell for cell in plan.cells if latest[cell.name] == name]
    home = cells_lib.home(folder)
    with _held(folder / "programs" / f"{name}.lock"), _own_cores(folder, slots):
        coming = [cell for cell in cells if cells_lib.state(cell, home) == TO_COME]
        if len(coming) > 1:
            _together(coming, home)
            coming = [cell for cell in coming if cells_lib.state(cell, home) == TO_COME]
        for cell in coming:
            _one(cell, home)
    return int(any(cells_lib.state(cell, home) != DONE for cell in cells))


def _together(cells: Sequence[Cell], home: Path) -> None:
    from s2s import train

    try:
        train.run_together([train.Run(cell.cfg, str(home / cell.name)) for cell in cells])
    except train.Interrupted:
        raise
    except Exception as error:  # Whatever it was, most of the cells are not to blame.
        print(f"s2s: cannot be trained together, so one by one: {_reason(error)}", file=sys.stderr)


def _one(cell: Cell, home: Path) -> None:
    from s2s import train

    try:
        train.run(cell.cfg, str(home / cell.name))
    except train.Interrupted:
        raise
    except Exception as error:
        cells_lib.fail(cell, home, _reason(error))
        print(f"s2s: {cell.name} failed: {_reason(error)}", file=sys.stderr)


def _reason(error: Exception) -> str:
    # Errors made for people need no name.
    return str(error) if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"


def run(folder: Path, plan: Plan, launch: Launch, command: Sequence[str]) -> Plan:
    """Trains all cells that are to come.

    Programs of several cells that ended without a word, as one does that runs out of memory, are
    tried again with their cells apart; a cell that ends so alone has failed. A program that somebody
    asked to stop is left as it is.

    Args:
      folder: the sweep's work directory.
      plan: what is to be done; written there.
      launch: runs jobs and returns their exit codes.
      command: the beginning of each job's command; the name of its program follows.

    Returns:
      The plan, with the programs that were made on the way.
    """
    home = cells_lib.home(folder)
    stopped: set[str] = set()
    while True:
        grouping.write_plan(folder, plan)
        latest = plan.latest()
        coming = [cell for cell in plan.cells if cells_lib.state(cell, home) == TO_COME]
        wanted = dict.fromkeys(name for cell in coming if (name := latest[cell.name]) not in stopped)
        if not wanted:
            return plan
        jobs = [Job(name, [*command, name], folder / "programs" / f"{name}.log") for name in wanted]
        (folder / "programs").mkdir(exist_ok=True)
        with watch.Watch(plan, home) as watching:
            codes = launch(jobs, watching)
        apart: list[tuple[str, ...]] = []
        for name in wanted:
            left = [
                cell
                for cell in coming
                if latest[cell.name] == name and cells_lib.state(cell, home) == TO_COME
            ]
            if codes[name] in STOPPED:
                stopped.add(name)
            elif len(plan.program(name).cells) > 1:
                apart += [(cell.name,) for cell in left]
            else:
                for cell in left:
                    cells_lib.fail(cell, home, _ended(codes[name], folder / "programs" / f"{name}.log"))
        plan = plan._replace(programs=[*plan.programs, *grouping.named(apart, len(plan.programs))])


def _ended(code: int, log: Path) -> str:
    said: list[str] = []
    with contextlib.suppress(OSError):
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    why = {137: ", killed: out of memory?", 139: ", a fault in memory"}.get(code, "")
    return "\n".join([f"its program ended with exit code {code}{why}; {log} ends:", *said])


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Waits until nobody else trains the program: an earlier job of it may still be saving its state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _own_cores(folder: Path, slots: int) -> Iterator[None]:
    """Keeps this process to its share of the cores: programs that use all of them hold up each other."""
    if slots == 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as files:
        for slot in range(min(slots, len(cores))):
            file: IO[str] = files.enter_context((folder / "programs" / f"cores-{slot}.lock").open("w"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.sched_setaffinity(0, cores[slot :: min(slots, len(cores))])
                break
        yield
        os.sched_setaffinity(0, cores)
