"""Runs the GPU programme: ``python -m benchmarks.gpu --output benchmarks/results/gpu.json``.

Decides when cells start, when they are stopped, and what is written after each. Must not know
what a cell measures. Imports no JAX: the device belongs to the processes it starts, one for
every set of XLA flags.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import plan, report

ROOT = Path(__file__).resolve().parent.parent.parent
# Seconds until a process has its device.
START_LIMIT = 90.0


class Stopped(Exception):
    """A process gave no answer: its time was over, or it ended."""


class Worker:
    """A process that measures under one set of XLA flags.

    Args:
      flags: a key of `plan.FLAGS`.
      log: file for what it prints.
    """

    def __init__(self, flags: str, log: Path):
        # No reservation of memory, so that processes stand beside each other on one device.
        environment = os.environ | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {plan.FLAGS[flags]}".strip(),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        with log.open("a", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.work"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                start_new_session=True,
            )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        self.machine: dict[str, Any] | None = None

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def wait_until_ready(self, limit: float) -> None:
        """Waits for the device.

        Raises:
          Stopped: there was none in time.
        """
        if self.machine is None:
            self.machine = self._read(limit)

    def measure(self, cell: plan.Cell, limit: float) -> dict[str, Any]:
        """The figures of a cell, or its error.

        Raises:
          Stopped: it gave none in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(cell.to_dict()) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Stopped("its process has ended: see the log") from None
        return self._read(limit)

    def _read(self, limit: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(limit, 0.0))
        except queue.Empty:
            raise Stopped(f"no answer within {limit:.3g} s") from None
        if not line:
            raise Stopped("its process ended: see the log")
        return json.loads(line)

    def end(self) -> None:
        """Ends the process and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def run(cells: Sequence[plan.Cell], output: Path, budget: float) -> dict[str, Any]:
    """Measures cells in order until the time is over, and writes the results after each.

    Args:
      cells: what to measure.
      output: the JSON file; tables go beside it (.md), and what processes print (.log).
      budget: seconds for all of it.

    Returns:
      What is in the file.
    """
    began = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    log = output.with_suffix(".log")
    log.unlink(missing_ok=True)
    rows = [cell.to_dict() | {"status": "not reached"} for cell in cells]
    results: dict[str, Any] = {
        "began": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        "commit": _said_by("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "gpu": _said_by(
            "nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"
        ),
        "machine": None,
        "budget": budget,
        "cells": rows,
    }
    workers: dict[str, Worker] = {}

    def left() -> float:
        return budget - (time.monotonic() - began)

    try:
        if left() > 0:
            # All at once: one measures while the others still import.
            workers |= {flags: Worker(flags, log) for flags in dict.fromkeys(cell.flags for cell in cells)}
        for number, (cell, row) in enumerate(zip(cells, rows, strict=True), start=1):
            if left() <= 0:
                break
            asked = time.monotonic()
            try:
                worker = workers.get(cell.flags) or workers.setdefault(cell.flags, Worker(cell.flags, log))
                worker.wait_until_ready(min(START_LIMIT, left()))
                results["machine"] = results["machine"] or worker.machine
                row |= worker.measure(cell, min(cell.limit, left()))
                row["status"] = "failed" if "error" in row else "done"
            except Stopped as stopped:
                row |= {"status": "failed", "error": str(stopped)}
                # Its next cell gets a new one.
                workers.pop(cell.flags).end()
            row["wall"] = time.monotonic() - asked
            print(
                f"{number:>3}/{len(cells)} {left():>5.0f} s left  {row['status']:<6}  {report.name_of(row)}",
                flush=True,
            )
            results["seconds"] = time.monotonic() - began
            report.write(results, output)
    finally:
        for worker in workers.values():
            worker.end()
    results["seconds"] = time.monotonic() - began
    report.write(results, output)
    return results


def _said_by(*command: str) -> str | None:
    """The first line a command prints, if there is such a command and it succeeds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and runs the programme."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/gpu.json"), help="the JSON file"
    )
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all of it (540)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, one cell of every sort: for a CPU")
    asked = parser.parse_args(arguments)
    results = run(plan.programme(asked.tiny), asked.output, asked.budget)
    said = [row["status"] for row in results["cells"]]
    print(
        f"{said.count('done')} cells done, {said.count('failed')} failed, "
        f"{said.count('not reached')} not reached, "
        f"in {results['seconds']:.0f} s: {asked.output}, {asked.output.with_suffix('.md')}"
    )


if __name__ == "__main__":
    main()
