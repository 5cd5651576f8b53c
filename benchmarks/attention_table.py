"""Trains every attention with and without input feeding and prints the table.

    python -m benchmarks.attention_table --workdir runs/attention_table --config experiments/g2p.py \
        --seeds 1 2 3 -- --config.data.train=... --config.data.dev=... --config.data.test=...

Interrupted and started again, it goes on where it was: each cell is a work directory.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from s2s import config as config_lib
from s2s.infra import report
from s2s.judge import label


def main() -> int:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_table", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workdir", required=True, type=Path, help="a folder of work directories")
    parser.add_argument("--config", required=True, help="the experiment that the cells vary")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--attentions", nargs="+", default=list(config_lib.ATTENTIONS), choices=config_lib.ATTENTIONS
    )
    parser.add_argument("--feedings", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument("--metrics", nargs="+", default=["word_error_rate", "symbol_error_rate"])
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every cell")
    parser.add_argument(
        "--jobs", type=int, default=1, help="cells trained side by side, each on a core of its own"
    )
    args = parser.parse_args()
    cells = [
        (attention, feeding, seed)
        for attention in args.attentions
        for feeding in [{"no": False, "yes": True}[answer] for answer in args.feedings]
        for seed in args.seeds
    ]
    cores: queue.Queue[int | None] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0))[: args.jobs] if args.jobs > 1 else [None]:
        cores.put(core)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(cells, pool.map(lambda cell: run_cell(args, cores, *cell), cells), strict=True))
    rows = []
    for attention, feeding in dict.fromkeys((attention, feeding) for attention, feeding, _ in cells):
        runs = [results[attention, feeding, seed] for seed in args.seeds]
        test = [[row for row in run["scores"] if row["part"] == "test"][-1] for run in runs]
        rows.append(
            [
                attention,
                "yes" if feeding else "no",
                f"{runs[0]['parameters'] / 1e6:.2f} M",
                *(spread([row[name] for row in test]) for name in [*args.metrics, "perplexity"]),
                f"{statistics.median(run['training_seconds'] for run in runs):.0f}",
            ]
        )
    names = [label(name) for name in [*args.metrics, "perplexity"]]
    headers = ["attention", "input feeding", "parameters", *names, "training (s)"]
    print(report.table(rows, headers, markdown=True))
    return 0


def run_cell(
    args: argparse.Namespace, cores: queue.Queue[int | None], attention: str, feeding: bool, seed: int
) -> dict[str, Any]:
    """Trains one cell in a process of its own, or reads what an earlier call left."""
    folder = args.workdir / f"{attention}-{'feeding' if feeding else 'plain'}-{seed}"
    if not (folder / "results.json").exists():
        command = [
            *(sys.executable, "-m", "s2s.main", "--config", args.config, "--workdir", str(folder)),
            f"--config.model.attention={attention}",
            f"--config.model.input_feeding={feeding}",
            f"--config.run.seed={seed}",
            *args.overrides,
        ]
        core = cores.get()
        print(" ".join(command), file=sys.stderr)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        code = process.wait()
        cores.put(core)
        if code:
            raise SystemExit(f"{folder} failed with {code}; run its command to see why")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def spread(values: list[float]) -> str:
    """ "mean ± standard deviation", or the value where there is one."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    sys.exit(main())
