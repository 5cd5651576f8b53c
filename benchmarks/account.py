"""Where time goes: every piece of an update and of a search's step, alone, and the whole.

    python -m benchmarks.account --cores 0 1 --output benchmarks/results/account.md

The model is that of `benchmarks.compare` against PyTorch (2 x 512 LSTM each side, general attention,
8,000 entries, float32). An update is of 64 pairs of 32 x 32 tokens without pads, without input feeding and
with it; a step of a search has 64 sources of 16 tokens with 5 hypotheses each. Each piece is timed in a loop
of its own, as s2s computes it (`s2s.kernels`) and as XLA does; what the pieces do not explain is everything
else: softmax, attention's small products, optimizer, choice of tokens, and waiting for each other. The
floor is what a piece's FLOPs take at the rate of the library's largest product.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

BATCH, LENGTH, HIDDEN, ENTRIES, LAYERS = 64, 32, 512, 8000, 4
BEAMS, SOURCE = 5, 16
_GATES = 4 * HIDDEN


class Piece(NamedTuple):
    """Work of an update or of a step.

    Attributes:
      what: in words.
      count: times it is done.
      flops: of once, in products with weights.
      bytes: of once: operands and results in float32, a loop's weights at every step.
      seconds: (whether the library computes it) -> of once.
    """

    what: str
    count: int
    flops: float
    bytes: float
    seconds: Callable[[bool], float]


def product(
    what: str,
    count: int,
    m: int,
    n: int,
    k: int,
    left_axis: int = 1,
    right_axis: int = 0,
    constant: bool = False,
) -> Piece:
    """A product [m, k] x [k, n].

    Args:
      what, count: as of a piece.
      m, n, k: sizes.
      left_axis, right_axis: summed over.
      constant: the right operand is the same every time, and laid out once.
    """

    def seconds(ours: bool) -> float:
        import jax
        import jax.numpy as jnp

        from s2s.kernels.contract import contract, with_constant

        left = _numbers(m, k) if left_axis else _numbers(k, m)
        right = _numbers(n, k) if right_axis else _numbers(k, n)
        times = int(np.clip(1e10 / (m * n * k), 4, 500))

        def multiplication(right: jax.Array) -> Callable[[jax.Array], jax.Array]:
            if not ours:
                axes = ((left_axis,), (right_axis,)), ((), ())
                return lambda left: jax.lax.dot_general(left, right, axes)
            if constant:
                return with_constant(right, right_axis, m, jnp.float32)
            return lambda left: contract(left, right, (left_axis,), (right_axis,), jnp.float32)

        @jax.jit
        def loop(left: jax.Array, right: jax.Array) -> jax.Array:
            multiply = multiplication(right)

            def turn(_: jax.Array, left: jax.Array) -> jax.Array:
                # What comes out changes a number of what goes in: no turn can be left out.
                return left.at[0, 0].add(1e-30 * multiply(left)[0, 0])

            return jax.lax.fori_loop(0, times, turn, left)

        return _median(loop, left, right) / times

    return Piece(what, count, 2.0 * m * n * k, 4.0 * (m * k + k * n + m * n), seconds)


def recurrences(count: int) -> list[Piece]:
    """The LSTM over projected inputs, there and back; the gradient of its kernel is a product of its own."""
    flops = 2.0 * LENGTH * BATCH * HIDDEN * _GATES
    moved = 4.0 * LENGTH * (HIDDEN * _GATES + 3 * BATCH * _GATES)

    def seconds(back: bool, ours: bool) -> float:
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from s2s.nn import recurrent
        from s2s.nn.cells import LSTM

        cell = LSTM(HIDDEN, HIDDEN, rngs=nnx.Rngs(0))
        zero = cell.zero_state((BATCH,))

        def outputs(gates: jax.Array) -> jax.Array:
            return recurrent.walk([cell], [gates], [zero], jnp.asarray(LENGTH))[0]

        return _there_or_back(outputs, back, ours, _numbers(LENGTH, BATCH, _GATES))

    return [
        Piece("LSTM, all positions", count, flops, moved, lambda ours: seconds(False, ours)),
        Piece("LSTM, back through all positions", count, flops, moved, lambda ours: seconds(True, ours)),
    ]


def fed_decoder() -> list[Piece]:
    """The decoder with input feeding over embedded tokens, there and back, without its kernels' gradients."""
    matrices = 2 * LAYERS // 2 * HIDDEN * _GATES + 2 * HIDDEN * HIDDEN
    flops = 2.0 * LENGTH * BATCH * matrices
    moved = 4.0 * LENGTH * (matrices + BATCH * (3 * LAYERS // 2 * _GATES + 2 * LENGTH * HIDDEN))

    def seconds(back: bool, ours: bool) -> float:
        import jax

        decoder, memory = _decoder(LENGTH)

        def outputs(y: jax.Array) -> jax.Array:
            return decoder.run(memory, y)[0]

        return _there_or_back(outputs, back, ours, _numbers(BATCH, LENGTH, HIDDEN))

    return [
        Piece("decoder, all positions", 1, flops, moved, lambda ours: seconds(False, ours)),
        Piece("decoder, back through all positions", 1, flops, moved, lambda ours: seconds(True, ours)),
    ]


def decoder_step() -> Piece:
    """The decoder's next position in a search, from its hypotheses' embedded tokens."""
    rows = BATCH * BEAMS
    matrices = 2 * LAYERS // 2 * HIDDEN * _GATES + 2 * HIDDEN * HIDDEN

    def seconds(ours: bool) -> float:
        import jax

        from s2s.nn.equations import ready

        decoder, memory = _decoder(SOURCE)
        times = 20

        @jax.jit
        def loop(gates: jax.Array) -> jax.Array:
            state = decoder.start(memory, BEAMS)
            step = ready(lambda state: decoder.step(memory, state, gates)[0], state)
            return jax.lax.fori_loop(0, times, lambda _, state: step(state), state).feed_BKH

        with _library(ours):
            return _median(loop, _numbers(BATCH, BEAMS, _GATES)) / times

    moved = 4.0 * (matrices + rows * 2 * (SOURCE * HIDDEN + _GATES))
    return Piece("decoder, a position", 1, 2.0 * rows * matrices, moved, seconds)


def _decoder(source: int) -> tuple[Any, Any]:
    """A decoder with input feeding, and a memory of sources of so many tokens."""
    import jax.numpy as jnp
    from flax import nnx

    from s2s.config import ModelConfig
    from s2s.nn.decoder import Decoder
    from s2s.nn.encoder import Memory

    cfg = ModelConfig(
        embedding=HIDDEN,
        hidden=HIDDEN,
        layers=LAYERS // 2,
        bidirectional=False,
        bridge="copy",
        attention="general",
        input_feeding=True,
        dropout=0.0,
    )
    decoder = Decoder(cfg, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    memory = _numbers(BATCH, source, HIDDEN)
    states = ((_numbers(BATCH, HIDDEN),) * 2,) * (LAYERS // 2)
    mask = jnp.ones((BATCH, source), bool)
    return decoder, Memory(memory, mask, decoder.attention.prepare(memory), states[-1][0], states)


def _numbers(*shape: int) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), "f4") * 0.1


def _library(ours: bool) -> Any:
    """What is traced within is computed by the library, or is not."""
    from s2s.kernels import library

    loaded = library.load()
    return mock.patch.object(library, "load", lambda: loaded if ours else None)


def _there_or_back(outputs: Callable[[Any], Any], back: bool, ours: bool, x: Any) -> float:
    """Seconds of a function as a gradient needs it, or of its gradient without that."""
    import jax

    there = jax.jit(lambda x: jax.vjp(outputs, x))
    both = jax.jit(lambda x: jax.vjp(outputs, x)[1](_numbers(*jax.eval_shape(outputs, x).shape)))
    with _library(ours):
        once = _median(there, x)
        return _median(both, x) - once if back else once


def _median(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of a call of a compiled function, of 9 calls."""
    import jax

    jax.block_until_ready(function(*arguments))
    taken = []
    for _ in range(9):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def update_pieces(feeding: bool) -> list[Piece]:
    """All work of an update in products with weights."""
    from s2s.learn.loss import _chunk_size

    tokens = BATCH * LENGTH
    chunk = _chunk_size(tokens)
    chunks = -(-tokens // chunk)
    # With input feeding the decoder's layers read within the loop, but for its first one's tokens.
    outside = LAYERS - (LAYERS // 2 - 1 if feeding else 0)
    pieces = [
        product("gates from inputs", outside, tokens, _GATES, HIDDEN),
        *recurrences(LAYERS // 2 if feeding else LAYERS),
        product("gradient by inputs", outside, tokens, HIDDEN, _GATES, 1, 1),
        product("gradient by kernels", 2 * LAYERS + feeding, HIDDEN, _GATES, tokens, 0, 0),
        product("keys", 1, tokens, HIDDEN, HIDDEN),
        product("keys, gradients", 2, tokens, HIDDEN, HIDDEN, 1, 1),
    ]
    if feeding:
        pieces += [
            *fed_decoder(),
            product("attentional vectors, gradient by kernel", 2, HIDDEN, HIDDEN, tokens, 0, 0),
        ]
    else:
        pieces += [
            product("attentional vectors", 1, tokens, HIDDEN, 2 * HIDDEN),
            product("attentional vectors, gradient by inputs", 1, tokens, 2 * HIDDEN, HIDDEN, 1, 1),
            product("attentional vectors, gradient by kernel", 1, 2 * HIDDEN, HIDDEN, tokens, 0, 0),
        ]
    return [
        *pieces,
        product("logits, a chunk", chunks, chunk, ENTRIES, HIDDEN, constant=True),
        product("logits, gradient by inputs, a chunk", chunks, chunk, HIDDEN, ENTRIES, 1, 1, constant=True),
        product("logits, gradient by kernel, a chunk", chunks, HIDDEN, ENTRIES, chunk, 0, 0),
    ]


def search_pieces() -> list[Piece]:
    """All work of a step of a search in products with weights."""
    rows = BATCH * BEAMS
    return [
        decoder_step(),
        product("logits", 1, rows, ENTRIES, HIDDEN, constant=True),
    ]


def update(feeding: bool) -> float:
    """Seconds of an update, median of 15."""
    from benchmarks import data
    from benchmarks.compare import luong
    from benchmarks.worker_s2s import Worker

    worker = Worker()
    with tempfile.TemporaryDirectory() as scratch:
        batches = Path(scratch) / "full.npz"
        data.save_batches(batches, [data.full_batch(BATCH, LENGTH, LENGTH, ENTRIES)])
        worker.load(luong(HIDDEN, feeding, "float32"), batches=str(batches), vocab_sizes=(ENTRIES, ENTRIES))
    worker.warm_up()
    return float(np.median([worker.train(1)["seconds"] for _ in range(15)]))


def search_step() -> float:
    """Seconds of a step of a search, all hypotheses 30 tokens long, the encoder's work among them."""
    import jax
    from flax import nnx

    from benchmarks import data
    from benchmarks.compare import luong
    from s2s import config
    from s2s.batch import Batch
    from s2s.ensemble import assemble
    from s2s.learn import step as step_lib
    from s2s.nn.seq2seq import Seq2Seq
    from s2s.search import beam

    steps = 30
    made = config.default()
    made.update_from_flattened_dict(luong(HIDDEN, True, "float32"))
    model = Seq2Seq(config.freeze(made).model, ENTRIES, ENTRIES, rngs=nnx.Rngs(0))
    graphdef, params = step_lib.split(model)
    batch = data.full_batch(BATCH, SOURCE, LENGTH, ENTRIES)

    @jax.jit
    def search(params: Any, batch: Batch) -> Any:
        speaker = assemble(graphdef, params)
        memory, gates_VG = speaker.encode(batch), speaker.read_all()
        return beam(
            functools.partial(speaker.advance, gates=gates_VG),
            memory,
            speaker.start(memory),
            beam=BEAMS,
            max_length=steps,
            min_length=steps - 1,
            source_mask_BS=memory.mask_BS,
        )

    return _median(search, params, jax.tree.map(jax.numpy.asarray, batch)) / steps


def table_of(title: str, whole: float, pieces: Sequence[Piece], peak: float) -> tuple[str, dict[str, Any]]:
    """Markdown, and what is in it."""
    from s2s.infra.report import table

    rows, found = [], []
    for piece in pieces:
        ours, xla = piece.seconds(True), piece.seconds(False)
        print(f"{title}: {piece.what}: {1e3 * ours * piece.count:.1f} ms", file=sys.stderr)
        found.append({**piece._asdict(), "seconds": ours, "seconds of XLA": xla})
        rows.append(
            [
                piece.what,
                piece.count,
                piece.count * piece.flops / 1e9,
                piece.count * piece.bytes / 1e6,
                1e3 * piece.count * piece.flops / peak,
                1e3 * piece.count * ours,
                piece.flops / ours / 1e9,
                1e3 * piece.count * xla,
            ]
        )
    flops, floor, explained, by_xla = (sum(row[column] for row in rows) for column in (2, 4, 5, 7))
    text = (
        f"## {title}\n\n{1e3 * whole:.1f} ms. Its products with weights are {flops:.1f} GFLOP, "
        f"{floor:.1f} ms at the highest rate of a product; its pieces alone take {explained:.1f} ms "
        f"({by_xla:.1f} ms through XLA); everything else, and waiting, {1e3 * whole - explained:.1f} ms.\n\n"
    )
    headers = ["piece", "times", "GFLOP", "MB", "floor (ms)", "ms", "GFLOP/s", "ms, XLA"]
    return text + table(rows, headers, markdown=True), {"seconds": whole, "pieces": found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.account", description=__doc__.split("\n")[0])
    parser.add_argument("--cores", type=int, nargs="+", metavar="C", help="CPU cores to use")
    parser.add_argument("--output", metavar="F", help="Markdown file to write; the JSON file lies beside it")
    args = parser.parse_args()
    if args.cores:
        os.sched_setaffinity(0, args.cores)

    from s2s.commandline import with_kept_memory

    with_kept_memory()
    largest = product("the largest", 1, 2048, 2048, 2048)
    peak = largest.flops / largest.seconds(True)
    parts = [
        table_of("An update", update(False), update_pieces(False), peak),
        table_of("An update with input feeding", update(True), update_pieces(True), peak),
        table_of("A step of beam 5", search_step(), search_pieces(), peak),
    ]
    cores = len(os.sched_getaffinity(0))
    text = f"# Where time goes\n\n{cores} CPU cores; highest rate of a product {peak / 1e9:.0f} GFLOP/s.\n\n"
    text += "\n\n".join(part for part, _ in parts)
    print(text)
    if args.output:
        Path(args.output).write_text(text + "\n", encoding="utf-8")
        Path(args.output).with_suffix(".json").write_text(
            json.dumps([record for _, record in parts], indent=2, default=str) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
