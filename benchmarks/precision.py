"""How exact a model's gradient is, beside one in float64, and what single products lose.

    python -m benchmarks.precision --data FOLDER --cores 0 1 --output benchmarks/results/precision.md

Decides the ways of multiplying that are compared. The model is that of `benchmarks.compare` against PyTorch
(2 x 512 LSTM each side, general attention), after some updates on its planned batches of sentences; the
gradient is of a batch that it was not trained on, from the same parameters in every way. A tensor's error
is the norm of the gradient's difference from that in float64, over the norm of the latter. Errors of single
products, of numbers spread narrowly and widely, are told beside those of NumPy in float32. On a processor
without a matrix unit a precision changes nothing of what s2s multiplies in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROWS, DEPTH, COLUMNS = 256, 2048, 256  # of a single product


class Way(NamedTuple):
    """A way to multiply.

    Attributes:
      dtype: of a model and its products.
      precision: as jax_default_matmul_precision has it.
      library: s2s's own (`s2s.kernels`); XLA otherwise.
    """

    dtype: str = "float32"
    precision: str | None = None
    library: bool = True


EXACT = Way("float64", library=False)
WAYS = {
    "float32, XLA": Way(library=False),
    "float32": Way(),
    "float32, precision highest": Way(precision="highest"),
    "float32, precision high": Way(precision="high"),
    "bfloat16": Way("bfloat16"),
}


@contextlib.contextmanager
def multiplied(way: Way) -> Iterator[None]:
    """What is traced within multiplies in one way."""
    import jax

    from benchmarks.account import _library

    jax.clear_caches()
    with (
        jax.enable_x64(way.dtype == "float64"),
        jax.default_matmul_precision(way.precision),
        _library(way.library),
    ):
        yield


def trained(
    feeding: bool, data: Path | None, hidden: int, updates: int
) -> tuple[Any, dict[str, Any], Any, float]:
    """A model's config, its parameters after training, a batch it has not seen; the last update's loss."""
    import jax

    from benchmarks import data as data_lib
    from benchmarks.compare import BENCH, luong
    from benchmarks.worker_s2s import Worker
    from s2s.data import plan

    encoded = data_lib.encoded_sentences(data_lib.prepare(BENCH / "data", data).mt, BENCH / "data" / "cache")
    make = functools.partial(
        plan.make_plan, encoded.source_lengths, encoded.target_lengths, max_shapes=8, rows_multiple=8, seed=1
    )
    layout = data_lib.plan_of_sentences(make, len(encoded), float(encoded.target_lengths.mean()), 64)
    *batches, held = data_lib.planned_batches(encoded, layout, updates + 1)
    worker = Worker()
    with tempfile.TemporaryDirectory() as scratch:
        data_lib.save_batches(Path(scratch) / "planned.npz", batches)
        worker.load(
            luong(hidden, feeding, "float32"),
            batches=f"{scratch}/planned.npz",
            vocab_sizes=(data_lib.VOCABULARY, data_lib.VOCABULARY),
        )
    loss = worker.train(updates)["losses"][-1]
    return worker.cfg.model, jax.device_get(worker.state.params), held, loss


def gradient(way: Way, cfg: Any, params: dict[str, Any], batch: Any) -> tuple[float, list[np.ndarray]]:
    """The loss and its gradient by every parameter, in one way."""
    import jax

    from benchmarks.data import VOCABULARY
    from s2s.learn import step

    with multiplied(way):
        graphdef, like = step.abstract_params(
            dataclasses.replace(cfg, dtype=way.dtype), VOCABULARY, VOCABULARY
        )
        evaluate = step.make_eval_step(graphdef)
        given = jax.tree.map(lambda x, leaf: jax.numpy.asarray(x, leaf.dtype), params, like)
        loss, found = jax.jit(jax.value_and_grad(lambda params: evaluate(params, batch).loss))(given)
        return float(loss), [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found)]


def errors_of_gradients(feeding: bool, data: Path | None, hidden: int, updates: int) -> dict[str, Any]:
    """For every way errors of the loss, and by parameter of its gradient; and what the model had learnt."""
    import jax

    cfg, params, held, trained_loss = trained(feeding, data, hidden, updates)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    exact_loss, exact = gradient(EXACT, cfg, params, held)
    ways = {}
    for name, way in WAYS.items():
        loss, found = gradient(way, cfg, params, held)
        errors = [
            float(np.linalg.norm(x - right) / np.linalg.norm(right))
            for x, right in zip(found, exact, strict=True)
        ]
        ways[name] = {
            "loss": abs(loss - exact_loss) / exact_loss,
            "gradient": dict(zip(names, errors, strict=True)),
        }
        print(f"{name}: largest error {max(errors):.1e}", file=sys.stderr)
    return {"feeding": feeding, "updates": updates, "trained": trained_loss, "ways": ways}


def operands() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pairs [rows, depth], [depth, columns] of several kinds of numbers."""
    rng = np.random.default_rng(1)
    normal = [rng.normal(size=shape) for shape in ((ROWS, DEPTH), (DEPTH, COLUMNS))]
    wide = [x * np.exp(2 * rng.normal(size=x.shape)) for x in normal]
    by_logits = np.exp(2 * rng.normal(size=(ROWS, DEPTH)))
    by_logits /= by_logits.sum(1, keepdims=True)
    by_logits[np.arange(ROWS), rng.integers(DEPTH, size=ROWS)] -= 1
    pairs = {
        "normal": normal,
        "log-normal, sigma 2, either sign": wide,
        "softmax minus one-hot, times normal": [by_logits, normal[1]],
    }
    return {name: (left.astype("f4"), right.astype("f4")) for name, (left, right) in pairs.items()}


def errors_of_products() -> dict[str, dict[str, tuple[float, float]]]:
    """By operands and way: RMS errors over NumPy's; and the largest error, of the sum of magnitudes."""
    import jax
    import jax.numpy as jnp

    from s2s.kernels.contract import contract

    found: dict[str, dict[str, tuple[float, float]]] = {}
    for kind, (left, right) in operands().items():
        exact = left.astype(np.float64) @ right.astype(np.float64)
        magnitude = np.abs(left).astype(np.float64) @ np.abs(right).astype(np.float64)
        numpys = np.sqrt(np.mean((left @ right - exact) ** 2))
        found[kind] = {}
        for name, way in WAYS.items():
            with multiplied(way):
                given = jnp.asarray(left, way.dtype), jnp.asarray(right, way.dtype)
                made = jax.jit(lambda left, right: contract(left, right, (1,), (0,), jnp.float32))(*given)
            error = np.abs(np.asarray(made, np.float64) - exact)
            found[kind][name] = float(np.sqrt(np.mean(error**2)) / numpys), float((error / magnitude).max())
    return found


def tables(gradients: list[dict[str, Any]], products: dict[str, dict[str, tuple[float, float]]]) -> str:
    """All of it in Markdown."""
    from s2s.infra.report import table

    parts = ["# How exact products are"]
    for one in gradients:
        rows = []
        for name, way in one["ways"].items():
            errors = list(way["gradient"].values())
            rows.append([name, *(f"{x:.1e}" for x in (np.median(errors), max(errors), way["loss"]))])
        parts += [
            f"## A model's gradient, {'input feeding' if one['feeding'] else 'no feeding'}",
            f"After {one['updates']} updates, the last one's loss {one['trained']:.2f} nats a token; errors "
            "are relative to float64.",
            table(
                rows,
                ["products", "median of parameters", "largest of parameters", "loss"],
                markdown=True,
            ),
        ]
    rows = [
        [kind, name, f"{times:.2g}", f"2^{np.log2(most):.1f}"]
        for kind, ways in products.items()
        for name, (times, most) in ways.items()
    ]
    parts += [
        f"## A product of {ROWS} x {DEPTH} and {DEPTH} x {COLUMNS} numbers",
        "RMS error over that of NumPy in float32; and the largest error of a sum, as part of the sum of its "
        "terms' magnitudes.",
        table(rows, ["numbers", "products", "over NumPy's", "largest"], markdown=True),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="data sets; without, sentences are made")
    parser.add_argument("--cores", type=int, nargs="+", metavar="C", help="CPU cores to use")
    parser.add_argument("--hidden", type=int, default=512, metavar="H", help="units of a layer (512)")
    parser.add_argument("--updates", type=int, default=300, metavar="N", help="of the training (300)")
    parser.add_argument(
        "--output", type=Path, metavar="F", help="Markdown file; the JSON file lies beside it"
    )
    args = parser.parse_args()
    if args.cores:
        os.sched_setaffinity(0, args.cores)
    gradients = [
        errors_of_gradients(feeding, args.data, args.hidden, args.updates) for feeding in (False, True)
    ]
    products = errors_of_products()
    text = tables(gradients, products)
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
        record = {"gradients": gradients, "products": products}
        args.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
