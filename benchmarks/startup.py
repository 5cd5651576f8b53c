"""Start-up: seconds from starting the process to the end of the first update, cold and warm.

Cold: the cache folder is empty, so the corpus is made, vocabularies are trained and every program is
compiled. Warm: the cache folder is the one the cold run left; the work directory is new both times.
Each run is a process of its own, timed from outside; what it says of itself is printed beside.

    python -m benchmarks.startup --config experiments/luong_general.py --repeats 3

Prints a Markdown table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from s2s.infra.report import METRICS_FILE, table


def first_update(workdir: Path, cache: Path, config: str, overrides: list[str]) -> tuple[float, float]:
    """Starts a run and ends it after its first update.

    Returns:
      Seconds from the start of the process to the end of the first update, and what the run says they
      were, which begins some imports later.

    Raises:
      RuntimeError: the run ended before its first update.
    """
    command = [sys.executable, "-m", "s2s.main", "--config", config, "--workdir", str(workdir)]
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    metrics = workdir / METRICS_FILE
    with tempfile.TemporaryFile() as said:
        began = time.time()
        process = subprocess.Popen(
            [*command, f"--config.data.cache={cache}", *overrides],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while True:
                lines = metrics.read_text().splitlines() if metrics.exists() else []
                if lines:
                    first = json.loads(lines[0])
                    return first["time"] - began, first["start/seconds_to_first_step"]
                if process.poll() is not None:
                    said.seek(0)
                    raise RuntimeError(f"{' '.join(command)} ended early:\n{said.read().decode()}")
                time.sleep(0.01)
        finally:
            # It saves its state and keeps the program that it is compiling.
            process.terminate()
            process.wait()


def main() -> None:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="experiments/luong_general.py")
    parser.add_argument("--repeats", type=int, default=3, help="cold and warm runs; the median is printed")
    parser.add_argument("overrides", nargs="*", help="--config.NAME=VALUE, after --")
    args = parser.parse_args()

    rows = []
    result: dict[str, object] = {"benchmark": "startup", "config": args.config, "cores": cores()}
    seconds: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="s2s-startup-") as folder:
            for kind, runs in seconds.items():
                workdir, cache = Path(folder, kind), Path(folder, "cache")
                runs.append(first_update(workdir, cache, args.config, args.overrides))
    for kind, runs in seconds.items():
        outside, inside = (statistics.median(values) for values in zip(*runs, strict=True))
        rows.append([kind, outside, min(run[0] for run in runs), inside])
        result[kind] = [round(run[0], 3) for run in runs]
    headers = ["start", "first update after (s)", "at best (s)", "as the run says (s)"]
    print(table(rows, headers, markdown=True))
    print("\n" + json.dumps(result))


def cores() -> int | None:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


if __name__ == "__main__":
    main()
