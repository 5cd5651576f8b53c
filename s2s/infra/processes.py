"""One program as a child of this process: started, asked to stop, and never left behind.

Decides whose signals a child gets and what its exit code means. This file is also run by itself, as the
first thing in the child, so it imports nothing but the standard library. Must not know what a program
computes or who wants it run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Of linux/prctl.h: which signal a process gets when its parent is no more.
_PR_SET_PDEATHSIG = 1

# Exit codes of programs that saved their state because they were asked to stop.
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)


class LaunchError(ValueError):
    """Jobs that cannot be started as asked."""


class Job(NamedTuple):
    """A program to be run.

    Attributes:
      name: its own among the jobs that are launched together.
      command: the words of the command.
      log: standard output and standard error are added to the end of this file.
    """

    name: str
    command: list[str]
    log: Path


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a command in a session of its own: what is typed at a terminal reaches it through its parent.

    It ignores SIGUSR2, with which clusters warn whole jobs. On Linux it gets SIGTERM when the thread that
    started it is no more, whatever ended it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(child: subprocess.Popen[bytes]) -> int:
    """Waits for a child, ends what it left running, and returns its exit code.

    128 and the signal's number where a signal ended it, as shells say.
    """
    returned = child.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    return returned if returned >= 0 else 128 - returned


def note(log: Path, sentence: str) -> None:
    """Adds a sentence of the launcher's own to a program's log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"s2s: {sentence}\n")


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, to be acted on between two looks."""
    asked: list[int] = []
    kept = {
        number: signal.signal(number, lambda number, frame: asked.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _become(parent: int, command: list[str]) -> None:
    """Turns this process, a fresh child, into the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before it could be asked to tell
            sys.exit(128 + signal.SIGTERM)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"s2s: {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
