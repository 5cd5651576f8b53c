"""Seeds in one program beside the same seeds one after another: wall time of the commands, and their ends.

    python -m benchmarks.replicas --replicas 8 --cores 0 1 --output benchmarks/results/replicas.md -- \
        --config experiments/g2p.py --config.model.hidden=128 ...

What follows -- is the training command's own. Both sides begin with an empty cache of their own, which the
single runs share; they take turns only if asked for several rounds. Prints Markdown; --json too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import spread
from s2s.infra.report import table


def train(arguments: list[str], workdir: Path, cache: Path, **overrides: int) -> float:
    """Seconds that a training command takes, from start to end.

    Raises:
      RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "s2s.main", *arguments, f"--config.data.cache={cache}"]
    command += [f"--config.run.{name}={value}" for name, value in overrides.items()]
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    began = time.monotonic()
    done = subprocess.run([*command, "--workdir", str(workdir)], env=environment, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr.decode()[-2000:]}")
    return time.monotonic() - began


def final(workdir: Path) -> dict[str, Any]:
    """Steps, losses and the last row of scores of a run."""
    results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    return {"steps": results["steps"], "history": results["history"], **results["scores"][-1]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas", description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, default=8, metavar="R", help="seeds (8)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="turns of each side (1)")
    parser.add_argument("--cores", type=int, nargs="+", metavar="C", help="CPU cores to use, of both sides")
    parser.add_argument("--output", metavar="F", help="Markdown file to write")
    parser.add_argument("--json", metavar="F", help="JSON file to write")
    parser.add_argument("command", nargs="+", help="arguments of s2s.main, after --")
    args = parser.parse_args()
    if args.cores:
        os.sched_setaffinity(0, args.cores)
    times: dict[str, list[float]] = {"together": [], "apart": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.rounds):
            folder = Path(scratch) / str(number)
            seconds = train(args.command, folder / "together", folder / "cache1", replicas=args.replicas)
            times["together"].append(seconds)
            print(f"{args.replicas} in one program: {seconds:.1f} s", file=sys.stderr)
            apart = 0.0
            for seed in range(1, args.replicas + 1):
                apart += train(args.command, folder / f"seed{seed}", folder / "cache2", seed=seed)
                print(f"seed {seed} alone: {apart:.1f} s so far", file=sys.stderr)
            times["apart"].append(apart)
        pairs = [
            (final(folder / "together" / f"replica_{seed:02}"), final(folder / f"seed{seed}"))
            for seed in range(1, args.replicas + 1)
        ]
    ratio = spread([a / b for a, b in zip(times["apart"], times["together"], strict=True)])
    names = [name for name in pairs[0][0] if name not in ("steps", "history", "part", "pairs", "search")]
    rows = [
        [seed, one["steps"], *(value for name in names[:4] for value in (one[name], other[name]))]
        for seed, (one, other) in enumerate(pairs, start=1)
    ]
    headers = [
        "seed",
        "updates",
        *(f"{name}, {side}" for name in names[:4] for side in ("together", "alone")),
    ]
    text = (
        f"{args.replicas} seeds in one program: {spread(times['together'])} s; one after another: "
        f"{spread(times['apart'])} s; ratio {ratio}. {len(os.sched_getaffinity(0))} CPU cores.\n\n"
        + table(rows, headers, markdown=True)
    )
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
    if args.json:
        record = {"seconds": times, "runs": pairs}
        Path(args.json).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
