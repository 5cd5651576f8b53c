"""How an update's time and a process's memory grow with processes and replicas: measured, and foretold.

    python -m benchmarks.scaling [--quick] [--only processes replicas] [--cores 0 1 2 3]

A model of a few constants (launch/README.md) is fitted to some of the points and foretells the others; the
table has both, and how far they are apart. Every process has one core of its own, so that processes stand
for hosts. Each point is the command of a user; points take turns, round by round. Writes Markdown and JSON
to benchmarks/results. On a machine with a GPU: --only replicas.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from benchmarks.harness import ROOT, Spread, machine, spread
from s2s.infra.report import METRICS_FILE, table

# Windows of updates that are not timed: programs are still being loaded, files opened.
_WARM_UP = 2
_FLOAT = 4
# Terms of the model of time, and of that of memory, with their units.
TIME = ("fixed (s)", "a token (s)", "a hop (s)", "a byte moved (s)")
MEMORY = ("fixed (GiB)", "a parameter (bytes)", "a token (bytes)")


class Point(NamedTuple):
    """One size of run.

    Attributes:
      processes: that share each batch.
      replicas: models in one program.
      tokens: `config.data.batch_tokens`: of a batch, of each replica.
      fitted: whether the model's constants are taken from it; else it is foretold.
    """

    processes: int
    replicas: int
    tokens: int
    fitted: bool


class Measured(NamedTuple):
    """What a point took: seconds of an update in each round, and bytes of the largest process."""

    point: Point
    seconds: list[float]
    memory: list[int]
    parameters: int

    @property
    def update(self) -> Spread:
        """Seconds of an update."""
        return spread(self.seconds)


POINTS = {
    "processes": [
        Point(1, 1, 1024, True), Point(1, 1, 4096, True), Point(2, 1, 1024, True), Point(4, 1, 1024, True),
        Point(2, 1, 4096, False), Point(4, 1, 4096, False),
    ],
    "replicas": [
        Point(1, 1, 256, True), Point(1, 2, 256, False), Point(1, 4, 256, True), Point(1, 8, 256, False),
        Point(1, 16, 256, True),
    ],
}  # fmt: skip


def time_terms(point: Point, parameters: int) -> list[float]:
    """What the constants of `TIME` are multiplied by.

    A ring's all-reduce over P processes has 2(P - 1) hops, and every process sends 2(P - 1)/P times the
    array (Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms for clusters of workstations).
    """
    hops = 2 * (point.processes - 1)
    moved = hops / point.processes * point.replicas * parameters * _FLOAT
    return [1.0, point.replicas * point.tokens / point.processes, float(hops), moved]


def memory_terms(point: Point, parameters: int) -> list[float]:
    """What the constants of `MEMORY` are multiplied by; the first is in bytes as well."""
    return [1.0, float(point.replicas * parameters), point.replicas * point.tokens / point.processes]


def fit(terms: Sequence[Sequence[float]], values: Sequence[float]) -> np.ndarray:
    """Constants, none below zero, with the least squares of relative errors."""
    design = np.array(terms) / np.array(values)[:, None]
    # Columns of like size: seconds a byte and seconds an update are nine orders apart.
    size = np.where(np.abs(design).max(0) > 0, np.abs(design).max(0), 1.0)
    return optimize.nnls(design / size, np.ones(len(values)))[0] / size


def update_seconds(metrics: Path) -> float:
    """Median seconds of an update, between the lines that a run wrote.

    Raises:
      ValueError: too few lines.
    """
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    seen = [(line["step"], line["time"]) for line in lines if "train/loss" in line][_WARM_UP:]
    windows = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(seen, seen[1:], strict=False)]
    if not windows:
        raise ValueError(f"{metrics} has too few windows of updates to time any")
    return statistics.median(windows)


def run(
    point: Point, cores: Sequence[int], updates: int, folder: Path, cache: Path
) -> tuple[float, int, int]:
    """Trains for a while.

    Returns:
      Seconds of an update, bytes of the largest process, parameters of a model.

    Raises:
      RuntimeError: the command failed.
    """
    every = max(updates // 10, 1)
    # An evaluation is no update: there is one, after the last.
    fields: dict[str, Any] = {
        "data.train": "reverse", "data.task_size": 20000, "data.batch_tokens": point.tokens,
        "data.max_shapes": 1, "data.vocab.kind": "symbols", "data.vocab.source_separator": " ",
        "data.cache": cache, "model.embedding": 128, "model.hidden": 128, "run.steps": updates,
        "run.eval_every": updates, "run.log_every": every, "run.metric": "loss",
    }  # fmt: skip
    if point.replicas > 1:
        fields["run.replicas"] = point.replicas
    command = [
        sys.executable, "-m", "s2s.main", "--config", "experiments/luong_general.py",
        f"--workdir={folder / 'work'}", *(f"--config.{name}={value}" for name, value in fields.items()),
    ]  # fmt: skip
    if point.processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        command += [f"--coordinator=localhost:{port}", f"--processes={point.processes}"]
    children = []
    for number in range(point.processes):
        pin = ["taskset", "-c", str(cores[number])] if shutil.which("taskset") else []
        own = [f"--process={number}"] if point.processes > 1 else []
        with (folder / f"{number}.log").open("ab") as log:
            child = subprocess.Popen([*pin, *command, *own], cwd=ROOT, stdout=log, stderr=log)
        children.append(child)
    largest = 0
    for number, child in enumerate(children):
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        largest = max(largest, used.ru_maxrss * 1024)
        if child.returncode:
            said = (folder / f"{number}.log").read_text(encoding="utf-8").strip().splitlines()
            for other in children[number + 1 :]:
                other.kill()
                other.wait()
            raise RuntimeError(said[-1] if said else f"exit code {child.returncode}")
    own = folder / "work" / "replica_01" if point.replicas > 1 else folder / "work"
    parameters = json.loads((own / "results.json").read_text(encoding="utf-8"))["parameters"]
    return update_seconds(own / METRICS_FILE), largest, parameters


def measure(
    points: Sequence[Point], cores: Sequence[int], rounds: int, updates: int
) -> tuple[list[Measured], list[str]]:
    """Measures points in turns; a point that fails is told and takes no other with it."""
    found: dict[Point, list[tuple[float, int, int]]] = {point: [] for point in points}
    failures: dict[Point, str] = {}
    with tempfile.TemporaryDirectory(prefix="s2s-scaling-") as scratch:
        for turn in range(rounds):
            for place, point in enumerate(points):
                if point in failures:
                    continue
                tell(f"round {turn + 1} of {rounds}: {point}")
                folder = Path(scratch) / f"{turn}-{place}"
                folder.mkdir()
                try:
                    found[point].append(run(point, cores, updates, folder, Path(scratch) / "cache"))
                except (RuntimeError, OSError, ValueError, KeyError) as error:
                    failures[point] = str(error)
                shutil.rmtree(folder)
    measured = [
        Measured(point, [one[0] for one in got], [one[1] for one in got], got[0][2])
        for point, got in found.items()
        if got and point not in failures
    ]
    return measured, [f"{point}: {said}" for point, said in failures.items()]


def foretell(measured: Sequence[Measured]) -> tuple[dict[str, float], dict[str, float], list[list[Any]]]:
    """Fits both models.

    Returns:
      The constants of time, those of memory, and the rows of the table.

    Raises:
      ValueError: no point to be fitted to was measured.
    """
    base = [one for one in measured if one.point.fitted]
    if not base:
        raise ValueError("no point that the model is fitted to could be measured")
    constants = fit(
        [time_terms(one.point, one.parameters) for one in base], [one.update.median for one in base]
    )
    memory = fit(
        [memory_terms(one.point, one.parameters) for one in base],
        [statistics.median(one.memory) for one in base],
    )
    rows = []
    for one in measured:
        point = one.point
        seconds, room = one.update.median, statistics.median(one.memory)
        model = float(np.dot(constants, time_terms(point, one.parameters)))
        model_room = float(np.dot(memory, memory_terms(point, one.parameters)))
        rows.append(
            [
                point.processes, point.replicas, point.tokens, 1e3 * seconds,
                f"{1e3 * one.update.low:.1f} to {1e3 * one.update.high:.1f}", 1e3 * model,
                100 * (model / seconds - 1), point.replicas * point.tokens / seconds, room / 2**30,
                model_room / 2**30, "fitted" if point.fitted else "foretold",
            ]
        )  # fmt: skip
    names = dict(zip(TIME, map(float, constants), strict=True))
    return names, dict(zip(MEMORY, [float(memory[0]) / 2**30, *map(float, memory[1:])], strict=True)), rows


HEADERS = [
    "processes", "replicas", "tokens", "update (ms)", "rounds (ms)", "model (ms)", "error (%)", "tokens/s",
    "memory (GiB)", "model (GiB)", "",
]  # fmt: skip


def tell(sentence: str) -> None:
    """Progress, on standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {sentence}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help. 0 if all ran, 1 if something failed, 2 if nothing could begin."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0] if __doc__ else None
    )
    parser.add_argument("--quick", action="store_true", help="one round, few updates: rough figures")
    parser.add_argument("--only", nargs="+", choices=list(POINTS), default=list(POINTS), metavar="PART")
    parser.add_argument("--cores", type=int, nargs="+", help="processor cores, one for each process")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="a folder")
    parser.add_argument("--name", default="scaling", help="of the two files in it")
    args = parser.parse_args(argv)

    cores = args.cores or sorted(os.sched_getaffinity(0))
    facts = machine(cores)
    rounds, updates = (1, 40) if args.quick else (3, 200)
    began = time.monotonic()
    sections, failures, raw = [], [], {}
    for part in args.only:
        points = [point for point in POINTS[part] if point.processes <= len(cores)]
        left_out = len(POINTS[part]) - len(points)
        measured, failed = measure(points, cores, rounds, updates)
        failures += [f"{part}: {said}" for said in failed]
        if left_out:
            failures.append(f"{part}: {left_out} points need more cores than {len(cores)}")
        if not measured:
            continue
        try:
            constants, memory, rows = foretell(measured)
        except ValueError as error:
            failures.append(f"{part}: {error}")
            continue
        raw[part] = {
            "constants": {**constants, **memory},
            "measured": [{**one.point._asdict(), **one._asdict(), "point": None} for one in measured],
        }
        listed = [[name, f"{value:.3g}"] for name, value in {**constants, **memory}.items()]
        sections += [f"## {part}", "", table(rows, HEADERS, markdown=True), ""]
        sections += [table(listed, ["constant", "value"], markdown=True), ""]
    minutes = (time.monotonic() - began) / 60
    settings = (
        f"`python -m benchmarks.scaling{' --quick' if args.quick else ''}`: {rounds} rounds of {updates} "
        f"updates, {minutes:.0f} minutes; one core a process; the model is that of launch/README.md."
    )
    lines = ["# Scaling", "", settings, ""]
    lines += [*(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()), "", *sections]
    if failures:
        lines += ["## Failed", "", *(f"- {said}" for said in failures), ""]
    args.output.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    (args.output / f"{args.name}.md").write_text(text, encoding="utf-8")
    whole = {"settings": settings, "machine": facts, "parts": raw, "failures": failures}
    (args.output / f"{args.name}.json").write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    print(text)
    tell(f"written to {args.output / args.name}.md and .json")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
