"""The measurements: what one cell of the programme is asked, answered on this process's device.

Decides how times are taken and what counts as equal. Must not know other cells, files or
limits. Every function takes a cell's options and gives its figures: seconds, bytes, or numbers of things a
second.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu.layers import WAYS, walking
from s2s import search
from s2s.batch import Batch
from s2s.config import Config, ModelConfig, validate
from s2s.ensemble import assemble
from s2s.learn import optim
from s2s.learn import step as step_lib
from s2s.nn import cudnn
from s2s.nn.cells import LSTM
from s2s.sweep.flops import Tokens, train_flops

Figures = dict[str, Any]

_PRECISIONS = {"float32": "highest", "tf32": None, "bfloat16": None}
_DTYPES = {"float32": jnp.float32, "tf32": jnp.float32, "bfloat16": jnp.bfloat16}


def seconds(call: Callable[[], Any], enough: float = 0.4) -> Figures:
    """Median and least seconds of a call, of at least five rounds that wait for the device at their end.

    Args:
      call: starts the work, and gives something to wait for.
      enough: seconds of measurement, at least.
    """
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    calls = max(1, min(1000, round(0.05 / (time.perf_counter() - began))))
    rounds: list[float] = []
    while len(rounds) < 5 or sum(rounds) * calls < enough:
        began = time.perf_counter()
        for _ in range(calls):
            last = call()
        jax.block_until_ready(last)
        rounds.append((time.perf_counter() - began) / calls)
    return {"seconds": statistics.median(rounds), "least": min(rounds), "rounds": len(rounds), "calls": calls}


def peak(numbers: str, side: int) -> Figures:
    """FLOP/s of a large square product."""
    with jax.default_matmul_precision(_PRECISIONS[numbers]):
        x = jnp.ones((side, side), _DTYPES[numbers])
        product = jax.jit(jnp.matmul).lower(x, x).compile()
    found = seconds(lambda: product(x, x))
    return found | {"flops": 2 * side**3 / found["seconds"]}


def bandwidth(megabytes: int) -> Figures:
    """Bytes a second, read and written, of adding one to a large array."""
    x = jnp.zeros(megabytes * 2**18, jnp.float32)
    add = jax.jit(lambda x: x + 1).lower(x).compile()
    found = seconds(lambda: add(x))
    return found | {"bytes_per_second": 2 * x.nbytes / found["seconds"]}


def loop(turns: int) -> Figures:
    """Seconds a turn of a loop that does next to nothing, its count known when compiled, or not."""
    x = jnp.zeros((16, 16), jnp.float32)

    def body(_: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x) + 1

    programs = {
        "static": lambda x, n: jax.lax.fori_loop(0, turns, body, x),
        "dynamic": lambda x, n: jax.lax.fori_loop(0, n, body, x),
    }
    found: Figures = {}
    for name, program in programs.items():
        compiled = jax.jit(program).lower(x, jnp.int32(turns)).compile()
        call = functools.partial(compiled, x, jnp.int32(turns))
        found[f"{name}_seconds_a_turn"] = seconds(call)["seconds"] / turns
    return found


def layer(
    way: str, numbers: str, shape: dict[str, int], filled: float = 1.0, unroll: int = 1, size: str = ""
) -> Figures:
    """Forward pass alone, and forward pass with all gradients, of one LSTM layer in one direction.

    Args:
      way: a key of `WAYS`.
      numbers: "float32", "tf32" or "bfloat16".
      shape: a size of the plan.
      filled: share of the positions that are real, in every row.
      unroll: steps a turn of the loop, where the way has a loop of ours.
      size: the shape's name.
    """
    run = functools.partial(WAYS[way], unroll=unroll) if way in ("naive", "static") else WAYS[way]
    graphdef, *arguments = _layer_case(shape, _DTYPES[numbers], filled)

    # The mask is an argument, or the compiler would count the steps itself.
    def forward(params: Any, x_BSE: jax.Array, mask_BS: jax.Array, weight_BSH: jax.Array) -> jax.Array:
        return run(nnx.merge(graphdef, params), x_BSE, mask_BS)

    def gradient(params: Any, x_BSE: jax.Array, mask_BS: jax.Array, weight_BSH: jax.Array) -> Any:
        return jax.vjp(lambda *read: forward(*read, mask_BS, weight_BSH), params, x_BSE)[1](weight_BSH)

    found: Figures = {}
    with jax.default_matmul_precision(_PRECISIONS[numbers]):
        for name, function in (("forward", forward), ("gradient", gradient)):
            began = time.perf_counter()
            compiled = jax.jit(function).lower(*arguments).compile()
            found[f"{name}_compile_seconds"] = time.perf_counter() - began
            found[f"{name}_seconds"] = seconds(functools.partial(compiled, *arguments))["seconds"]
            found[f"{name}_temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    H, tokens = shape["hidden"], shape["rows"] * shape["steps"]
    return found | {"gradient_flops": 3 * 2 * tokens * 2 * H * 4 * H / found["gradient_seconds"]}


def train(
    numbers: str,
    shape: dict[str, int],
    recurrence: str = "scan",
    feeding: bool = False,
    filled: float = 1.0,
    walk: str = "package",
    unroll: int = 1,
    size: str = "",
) -> Figures:
    """One update of the whole model, general attention, dropout 0.2, Adam.

    Args:
      numbers: "float32", "tf32" or "bfloat16".
      shape: a size of the plan.
      recurrence: of the config.
      feeding: input feeding.
      filled: share of the positions that are real, in every row.
      walk: how loops over time are made, as in `walking`.
      unroll: steps a turn of these loops, as in `walking`.
      size: the shape's name.
    """
    with jax.default_matmul_precision(_PRECISIONS[numbers]), walking(walk, unroll):
        update, state, batch = _trainer(numbers, shape, recurrence, feeding, filled)
        began = time.perf_counter()
        lowered = jax.jit(update, donate_argnums=0).lower(state, batch)
        if recurrence == "cudnn" and "cudnn_rnn" not in lowered.as_text():
            raise RuntimeError("the model was asked to go through cuDNN, and does not")
        compiled = lowered.compile()
        found: Figures = {"compile_seconds": time.perf_counter() - began}
    metrics: Any = None

    def call() -> Any:
        nonlocal state, metrics
        state, metrics = compiled(state, batch)
        return metrics

    found |= seconds(call)
    length_B, tokens = np.asarray(batch.source_length_B), float(metrics.sums.tokens)
    real = Tokens(len(length_B), int(length_B.sum()), int(tokens), int((length_B**2).sum()))
    model = _config(numbers, shape, recurrence, feeding).model
    return found | {
        "loss": float(metrics.sums.loss) / tokens,
        "tokens_per_second": tokens / found["seconds"],
        "flops": train_flops(model, shape["vocab"], real) / found["seconds"],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    }


def beam(numbers: str, shape: dict[str, int], beams: int = 5, size: str = "") -> Figures:
    """Sentences a second of beam search, every output as long as the source has positions."""
    with jax.default_matmul_precision(_PRECISIONS[numbers]):
        cfg = _config(numbers, shape, "scan", False)
        graphdef, state = _state(cfg, shape)
        batch, steps = _batch(shape, 1.0), shape["steps"]

        def decode(params: Any, batch: Batch) -> Any:
            speaker = assemble(graphdef, params)
            memory = speaker.encode(batch)
            return search.beam(
                speaker.advance,
                memory,
                speaker.start(memory),
                beam=beams,
                max_length=steps,
                source_mask_BS=batch.source_mask_BS,
                min_length=steps - 1,
                length_penalty=1.0,
                n_best=1,
            )

        began = time.perf_counter()
        compiled = jax.jit(decode).lower(state.params, batch).compile()
        found: Figures = {"compile_seconds": time.perf_counter() - began}
    found |= seconds(lambda: compiled(state.params, batch))
    return found | {
        "sentences_per_second": shape["rows"] / found["seconds"],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def check(name: str, shape: dict[str, int], size: str = "") -> Figures:
    """A law the figures stand on: how far apart two ways are, how far they may be, and whether they pass."""
    distance, bound = CHECKS[name](shape)
    return {"distance": distance, "bound": bound, "passed": bool(distance <= bound)}


# ---- cases ----


def _mask(shape: dict[str, int], filled: float) -> np.ndarray:
    return np.arange(shape["steps"])[None, :] < np.full((shape["rows"], 1), round(shape["steps"] * filled))


def _layer_case(shape: dict[str, int], dtype: Any, filled: float) -> Any:
    """A cell's structure and parameters, its inputs, their mask, and a weight for each output.

    The same float32 numbers whatever the dtype; parameters are float32 at least.
    """
    H, B, S = shape["hidden"], shape["rows"], shape["steps"]
    rng = np.random.default_rng(0)

    def draw(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes).astype(np.float32)

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: LSTM(H, H, rngs=nnx.Rngs(0), dtype=dtype)))
    precise = jnp.promote_types(dtype, jnp.float32)
    params = jax.tree.map(lambda leaf: jnp.asarray(draw(*leaf.shape) / H**0.5, precise), abstract)
    x_BSE, weight_BSH = (jnp.asarray(draw(B, S, H), dtype) for _ in range(2))
    return graphdef, params, x_BSE, jnp.asarray(_mask(shape, filled)), weight_BSH


def _config(numbers: str, shape: dict[str, int], recurrence: str, feeding: bool) -> Config:
    model = ModelConfig(
        embedding=shape["hidden"],
        hidden=shape["hidden"],
        layers=shape["layers"],
        dtype="bfloat16" if numbers == "bfloat16" else "float32",
        input_feeding=feeding,
        recurrence=recurrence,
    )
    cfg = dataclasses.replace(Config(), model=model)
    validate(cfg)
    return cfg


def _optimizer(cfg: Config) -> Any:
    return optim.make_optimizer(
        cfg.optim, optim.make_schedule(cfg.optim, steps_per_epoch=1000, total_steps=1000)
    )


def _batch(shape: dict[str, int], filled: float) -> Batch:
    rng, mask_BS = np.random.default_rng(0), _mask(shape, filled)
    length_B = mask_BS.sum(axis=1).astype(np.int32)
    source_BS, target_BT = (
        np.where(mask_BS, rng.integers(4, shape["vocab"], mask_BS.shape), 0).astype(np.int32)
        for _ in range(2)
    )
    index_B = np.arange(len(length_B), dtype=np.int32)
    return jax.tree.map(jnp.asarray, Batch(source_BS, length_B, target_BT, length_B, index_B))


def _trainer(numbers: str, shape: dict[str, int], recurrence: str, feeding: bool, filled: float) -> Any:
    if recurrence == "cudnn" and not cudnn.available():
        raise RuntimeError("cuDNN needs an NVIDIA GPU")
    cfg = _config(numbers, shape, recurrence, feeding)
    optimizer = _optimizer(cfg)
    graphdef, state = _state(cfg, shape)
    return step_lib.make_train_step(graphdef, cfg, optimizer), state, _batch(shape, filled)


def _state(cfg: Config, shape: dict[str, int]) -> Any:
    """The structure of a model and its first state, made by one program."""
    vocabs = (shape["vocab"],) * 2
    graphdef, _ = step_lib.abstract_params(cfg.model, *vocabs)
    return graphdef, jax.jit(lambda: step_lib.init_state(cfg, *vocabs, _optimizer(cfg), 0)[1])()


# ---- checks: each gives a distance and its bound ----


def _apart(found: Any, expected: Any) -> float:
    """The greatest distance of two arrays, of their lists, relative to the second one's length."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    wide = ((np.asarray(one, np.float64), np.asarray(other, np.float64)) for one, other in pairs)
    return max(float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in wide)


def _layer_results(way: str, numbers: str, shape: dict[str, int], double: bool = False) -> Any:
    """Outputs of a layer over rows of all lengths, and their gradients."""
    with jax.enable_x64(double), jax.default_matmul_precision(_PRECISIONS[numbers]):
        dtype = jnp.float64 if double else _DTYPES[numbers]
        graphdef, params, x_BSE, _, weight_BSH = _layer_case(shape, dtype, 1.0)
        steps = shape["steps"]
        mask_BS = jnp.asarray(np.arange(steps)[None] < (np.arange(shape["rows"]) % (steps + 1))[:, None])

        def results(params: Any, x_BSE: jax.Array) -> Any:
            outputs, pull = jax.vjp(
                lambda params, x_BSE: WAYS[way](nnx.merge(graphdef, params), x_BSE, mask_BS), params, x_BSE
            )
            return outputs, pull(weight_BSH)

        return jax.device_get(jax.jit(results)(params, x_BSE))


def _learned(numbers: str, shape: dict[str, int], recurrence: str = "scan") -> float:
    """Loss a token after twenty updates on one batch."""
    with jax.default_matmul_precision(_PRECISIONS[numbers]):
        update, state, batch = _trainer(numbers, shape, recurrence, False, 1.0)
        update = jax.jit(update, donate_argnums=0)
        for _ in range(20):
            state, metrics = update(state, batch)
        return float(metrics.sums.loss) / float(metrics.sums.tokens)


def _layers_apart(one: Any, other: Any, bound: float) -> Callable[[dict[str, int]], tuple[float, float]]:
    return lambda shape: (_apart(_layer_results(*one, shape), _layer_results(*other, shape)), bound)


def _losses_apart(one: Any, other: Any, bound: float) -> Callable[[dict[str, int]], tuple[float, float]]:
    def distance(shape: dict[str, int]) -> tuple[float, float]:
        first, second = (_learned(way[0], shape, *way[1:]) for way in (one, other))
        return abs(first / second - 1), bound

    return distance


CHECKS: dict[str, Callable[[dict[str, int]], tuple[float, float]]] = {
    "package_is_float64": lambda shape: (
        _apart(_layer_results("package", "float32", shape), _layer_results("naive", "float32", shape, True)),
        2e-5,
    ),
    "cudnn_is_package": _layers_apart(("cudnn", "float32"), ("package", "float32"), 2e-5),
    "static_is_package": _layers_apart(("static", "float32"), ("package", "float32"), 2e-5),
    "fused_is_static": _layers_apart(("fused", "float32"), ("static", "float32"), 2e-5),
    "tf32_near_float32": _layers_apart(("package", "tf32"), ("package", "float32"), 5e-3),
    "bfloat16_near_float32": _layers_apart(("package", "bfloat16"), ("package", "float32"), 3e-2),
    "cudnn_learns_as_scan": _losses_apart(("float32", "cudnn"), ("float32", "scan"), 1e-3),
    "bfloat16_learns_as_float32": _losses_apart(("bfloat16",), ("float32",), 2e-2),
}

MEASURES: dict[str, Callable[..., Figures]] = {
    "check": check,
    "peak": peak,
    "bandwidth": bandwidth,
    "loop": loop,
    "layer": layer,
    "train": train,
    "beam": beam,
}
