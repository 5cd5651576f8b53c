"""Where the time of an update goes: every matrix product in it alone, and the update itself.

    python -m benchmarks.account --cores 0 1 --output benchmarks/results/account.md

The update is that of `benchmarks.compare` against PyTorch (2 x 512 LSTM each side, general attention, no
feeding, 8,000 entries, float32, 64 pairs of 32 x 32 tokens without pads). Each product is timed in a loop of
its own, as s2s makes it (`s2s.kernels`) and as XLA does; what the products do not explain is everything else:
gates, softmax, attention's small products, optimizer, and waiting for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

BATCH, LENGTH, HIDDEN, ENTRIES, LAYERS = 64, 32, 512, 8000, 4


class Product(NamedTuple):
    """A product [m, k] x [k, n] of an update.

    Attributes:
      what: in words.
      count: times an update makes it.
      m, n, k: sizes.
      left_axis, right_axis: summed over.
      constant: the right operand is the same every time, and laid out once.
    """

    what: str
    count: int
    m: int
    n: int
    k: int
    left_axis: int = 1
    right_axis: int = 0
    constant: bool = False

    @property
    def flops(self) -> float:
        """Of all its times."""
        return 2.0 * self.count * self.m * self.n * self.k

    @property
    def bytes(self) -> float:
        """Of operands and results of all its times, in float32."""
        return 4.0 * self.count * (self.m * self.k + self.k * self.n + self.m * self.n)


def products() -> list[Product]:
    """The products of an update, but attention's own small ones."""
    from s2s.learn.loss import _chunk_size

    tokens, gates = BATCH * LENGTH, 4 * HIDDEN
    chunk = _chunk_size(tokens)
    chunks = -(-tokens // chunk)
    return [
        Product("gates from inputs", LAYERS, tokens, gates, HIDDEN),
        Product("gates from states, a step", LAYERS * LENGTH, BATCH, gates, HIDDEN, constant=True),
        Product("gradient by states, a step", LAYERS * LENGTH, BATCH, HIDDEN, gates, 1, 1, constant=True),
        Product("gradient by inputs", LAYERS, tokens, HIDDEN, gates, 1, 1),
        Product("gradient by kernels", 2 * LAYERS, HIDDEN, gates, tokens, 0, 0),
        Product("keys", 1, tokens, HIDDEN, HIDDEN),
        Product("keys, gradients", 2, tokens, HIDDEN, HIDDEN, 1, 1),
        Product("attentional vectors", 1, tokens, HIDDEN, 2 * HIDDEN),
        Product("attentional vectors, gradient by inputs", 1, tokens, 2 * HIDDEN, HIDDEN, 1, 1),
        Product("attentional vectors, gradient by kernel", 1, 2 * HIDDEN, HIDDEN, tokens, 0, 0),
        Product("logits, a chunk", chunks, chunk, ENTRIES, HIDDEN, constant=True),
        Product("logits, gradient by inputs, a chunk", chunks, chunk, HIDDEN, ENTRIES, 1, 1, constant=True),
        Product("logits, gradient by kernel, a chunk", chunks, HIDDEN, ENTRIES, chunk, 0, 0),
    ]


def seconds(product: Product, ours: bool) -> float:
    """Of one time, in a loop of many on warm memory; the median of five loops."""
    import jax
    import jax.numpy as jnp

    from s2s.kernels.contract import contract, with_constant

    p = product
    left = jnp.asarray(np.random.default_rng(1).normal(size=(p.m, p.k) if p.left_axis else (p.k, p.m)), "f4")
    right = jnp.asarray(
        np.random.default_rng(2).normal(size=(p.n, p.k) if p.right_axis else (p.k, p.n)), "f4"
    )
    times = int(np.clip(2e10 / (p.flops / p.count), 4, 500))

    def multiplication(right: jax.Array) -> Callable[[jax.Array], jax.Array]:
        if not ours:
            axes = ((p.left_axis,), (p.right_axis,)), ((), ())
            return lambda left: jax.lax.dot_general(left, right, axes)
        if p.constant:
            return with_constant(right, p.right_axis, p.m, jnp.float32)
        return lambda left: contract(left, right, (p.left_axis,), (p.right_axis,), jnp.float32)

    @jax.jit
    def loop(left: jax.Array, right: jax.Array) -> jax.Array:
        multiply = multiplication(right)

        def turn(_: jax.Array, left: jax.Array) -> jax.Array:
            # What comes out changes a number of what goes in: no turn can be left out.
            return left.at[0, 0].add(1e-30 * multiply(left)[0, 0])

        return jax.lax.fori_loop(0, times, turn, left)

    loop(left, right).block_until_ready()
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        loop(left, right).block_until_ready()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken)) / times


def update() -> tuple[float, float]:
    """Seconds of an update, median of 15, and its FLOPs by formula."""
    from benchmarks import data
    from benchmarks.compare import luong
    from benchmarks.worker_s2s import Worker

    worker = Worker()
    with tempfile.TemporaryDirectory() as scratch:
        batches = Path(scratch) / "full.npz"
        data.save_batches(batches, [data.full_batch(BATCH, LENGTH, LENGTH, ENTRIES)])
        worker.load(luong(HIDDEN, False, "float32"), batches=str(batches), vocab_sizes=(ENTRIES, ENTRIES))
    worker.warm_up()
    answers = [worker.train(1) for _ in range(15)]
    return float(np.median([answer["seconds"] for answer in answers])), answers[0]["flops"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.account", description=__doc__.split("\n")[0])
    parser.add_argument("--cores", type=int, nargs="+", metavar="C", help="CPU cores to use")
    parser.add_argument("--output", metavar="F", help="Markdown file to write; the JSON file lies beside it")
    args = parser.parse_args()
    if args.cores:
        os.sched_setaffinity(0, args.cores)

    from s2s.commandline import with_large_pages
    from s2s.infra.report import table

    with_large_pages()
    whole, flops = update()
    rows, found = [], []
    for product in products():
        ours, xla = seconds(product, True), seconds(product, False)
        print(f"{product.what}: {1e3 * ours * product.count:.1f} ms", file=sys.stderr)
        found.append({**product._asdict(), "seconds": ours, "seconds of XLA": xla})
        per = product.flops / product.count / 1e9
        rows.append(
            [
                product.what,
                product.count,
                f"{product.m} x {product.n} x {product.k}",
                product.flops / 1e9,
                product.bytes / 1e6,
                1e3 * ours * product.count,
                per / ours,
                1e3 * xla * product.count,
                per / xla,
            ]
        )
    explained, by_xla = (sum(row[column] for row in rows) for column in (5, 7))
    headers = ["product", "times", "m x n x k", "GFLOP", "MB", "ms", "GFLOP/s", "ms, XLA", "GFLOP/s, XLA"]
    text = (
        f"An update takes {1e3 * whole:.0f} ms on {len(os.sched_getaffinity(0))} CPU cores: "
        f"{flops / 1e9:.1f} GFLOP, {flops / whole / 1e9:.0f} GFLOP/s. Its products alone take "
        f"{explained:.0f} ms ({by_xla:.0f} ms through XLA); everything else, and waiting, "
        f"{1e3 * whole - explained:.0f} ms.\n\n" + table(rows, headers, markdown=True)
    )
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
        record = {"seconds": whole, "flops": flops, "products": found}
        Path(args.output).with_suffix(".json").write_text(
            json.dumps(record, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
