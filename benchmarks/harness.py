"""How two programmes are timed against each other on one machine.

Decides the fairness of a pair: each side a process of its own that lives through all rounds, on the
same cores with as many threads, taking turns (A B A B ...), never at work together; what is quoted
is the median over rounds of the ratio of neighbours. Must not know what is timed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from s2s.commandline import ALLOCATOR

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"

Answer = dict[str, Any]

# What a peer asks for and never imports, but PyTorch's own extras would: their builds need not fit torch's.
_WITHOUT = {"yoyodyne": ("torchaudio", "torchvision")}


class WorkerError(RuntimeError):
    """A worker that answered with an error, or died."""


class Spread(NamedTuple):
    """The median of some rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError where there is no value."""
    if not values:
        raise ValueError("no round was timed: there is no median of nothing")
    return Spread(statistics.median(values), min(values), max(values))


class Duel(NamedTuple):
    """What two sides did in the same rounds.

    Attributes:
      ours: units a second.
      theirs: the same.
      ratio: ours over theirs, round by round.
      rounds: the raw answers, [(ours, theirs), ...].
    """

    ours: Spread
    theirs: Spread
    ratio: Spread
    rounds: list[tuple[Answer, Answer]]


def duel(
    ours: Callable[[], Answer], theirs: Callable[[], Answer], rounds: int, unit: str, their_unit: str = ""
) -> Duel:
    """Lets two sides take turns.

    Args:
      ours: does a round's work and answers with "seconds" and ``unit``, the units of work done.
      theirs: the same for the other side.
      rounds: turns of each.
      unit: such as "tokens".
      their_unit: where it has another name there.
    """
    answers = [(ours(), theirs()) for _ in range(rounds)]
    mine = [one[unit] / one["seconds"] for one, _ in answers]
    other = [two[their_unit or unit] / two["seconds"] for _, two in answers]
    return Duel(
        spread(mine), spread(other), spread([a / b for a, b in zip(mine, other, strict=True)]), answers
    )


class Worker:
    """A process that answers requests (`benchmarks.peers.protocol`).

    Args:
      command: what to start.
      cores: the processor cores it may use; it is told to use as many threads.
      log: where its standard error goes.
    """

    def __init__(self, command: Sequence[str], cores: Sequence[int], log: Path):
        self._log = log
        threads = str(len(cores))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            # The allocator that s2s.main asks for: for both sides.
            "GLIBC_TUNABLES": ALLOCATOR,
            # A worker measures: it asks nobody, tells nobody and fetches nothing.
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
        }
        # taskset, so that the process is born on its cores: XLA and OpenMP count them early.
        pin = ["taskset", "-c", ",".join(map(str, cores))] if shutil.which("taskset") else []
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [*pin, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=ROOT,
                text=True,
            )

    def ask(self, do: str, **request: Any) -> Answer:
        """Sends a request and waits for its answer.

        Raises:
          WorkerError: the worker could not do it, or is no more.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the worker stopped at {do!r} with {self._process.wait()}; see {self._log}")
        answer = json.loads(line)
        if "error" in answer:
            with self._log.open("a") as stream:
                stream.write(answer["traceback"])
            raise WorkerError(f"{do!r} failed: {answer['error']}; see {self._log}")
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def environment(peer: str, folder: Path, tell: Callable[[str], None]) -> Path:
    """The Python of a peer's own environment, made on first use or when its versions change.

    Args:
      peer: named so in benchmarks/peers/PEER.txt, which pins its versions.
      folder: where environments lie.
      tell: is told what takes long.

    Raises:
      WorkerError: pip could not install it.
    """
    wanted = (PEERS / f"{peer}.txt").read_text(encoding="utf-8")
    home = folder / peer
    python, stamp = home / "bin" / "python", home / "installed.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    tell(f"installing {peer} into {home} (once, some minutes)")
    shutil.rmtree(home, ignore_errors=True)
    commands = [
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", "-r", str(PEERS / f"{peer}.txt")],
    ]
    if peer in _WITHOUT:
        commands.append([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *_WITHOUT[peer]])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise WorkerError(f"{' '.join(command)} failed: {lines[-1] if lines else done.returncode}")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def machine(cores: Sequence[int]) -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, systems, load at the start."""
    return {
        "processor": _processor(),
        "cores": list(cores),
        "cores_of_machine": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    wide = next((flag for flag in ("avx512f", "avx2", "avx") if flag in flags), "")
    return " ".join([names[0] if names else platform.machine(), *([f"({wide})"] if wide else [])])
