"""Trains every attention with and without input feeding and prints the table.

    python -m benchmarks.attention_table --workdir runs/attention_table --config experiments/g2p.py \
        --seeds 1 2 3 -- --config.data.train=... --config.data.dev=... --config.data.test=...

Interrupted and started again, it goes on where it was: each cell is a work directory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from s2s import config as config_lib
from s2s.evaluate import label
from s2s.infra import report


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
    parser.add_argument("--metrics", nargs="+", default=["word_error_rate", "symbol_error_rate"])
    parser.add_argument("overrides", nargs="*", help="after --: overrides for every cell")
    args = parser.parse_args()
    rows = []
    for attention in args.attentions:
        for feeding in (False, True):
            results = [run_cell(args, attention, feeding, seed) for seed in args.seeds]
            cells = [[row for row in result["scores"] if row["part"] == "test"][-1] for result in results]
            rows.append(
                [
                    attention,
                    "yes" if feeding else "no",
                    f"{results[0]['parameters'] / 1e6:.2f} M",
                    *(spread([cell[name] for cell in cells]) for name in args.metrics),
                    spread([cell["perplexity"] for cell in cells]),
                    f"{statistics.median(result['training_seconds'] for result in results):.0f}",
                ]
            )
    headers = [
        "attention",
        "input feeding",
        "parameters",
        *map(label, args.metrics),
        label("perplexity"),
        "training (s)",
    ]
    print(report.table(rows, headers))
    return 0


def run_cell(args: argparse.Namespace, attention: str, feeding: bool, seed: int) -> dict:
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
        print(" ".join(command), file=sys.stderr)
        subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def spread(values: list[float]) -> str:
    """ "mean ± standard deviation", or the value where there is one."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    sys.exit(main())
