"""The decoder with input feeding over time in one call: layers of LSTM, attention, attentional vector.

Decides what is kept of the way there for the way back, and the gradients of all weights from that. Must
not know embeddings, encoders or losses.

With input feeding a step waits for the attention of the step before, so nothing of it leaves the loop, and
a loop of XLA's starts some thirty programs a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2s.kernels import library, lstm
from s2s.kernels.contract import contract, parts_of

_MOST_LAYERS = 16


class Layer(NamedTuple):
    """A layer of the decoder.

    Attributes:
      kernel: U [H, 4 H], columns [i; f; o; g] as in `s2s.nn.cells.LSTM`.
      input_kernel: [H, 4 H]: of the first layer, what reads the attentional vector of the step before;
        of the others, what reads the layer below.
      bias: [4 H]; None for the first layer, whose gates come in with it.
      factor_TBH: multiplies what is read of the layer below (dropout); None: 1. A constant to derivatives.
      h_BH, c_BH: the state before the first position.
    """

    kernel: jax.Array
    input_kernel: jax.Array
    bias: jax.Array | None
    factor_TBH: jax.Array | None
    h_BH: jax.Array
    c_BH: jax.Array


class Source(NamedTuple):
    """What is attended to, and how.

    Attributes:
      memory_BSM: read by the weights.
      keys_BSH: compared with queries.
      kernel: [M + H, H], of the attentional vector tanh([context; h] W).
      asked: W [H, H] and v [H], where scores are v . tanh(q W + k) (concat); nothing where they are q . k.
    """

    memory_BSM: jax.Array
    keys_BSH: jax.Array
    kernel: jax.Array
    asked: tuple[jax.Array, ...]


def available(rows: int, dtype: Any, layers: int) -> bool:
    """Whether the library walks so many rows in this dtype through so many layers."""
    return lstm.available(rows, dtype) and layers <= _MOST_LAYERS


@jax.custom_vjp
def decode(
    turns: jax.Array, length_B: jax.Array, gates_TBG: jax.Array, source: Source, layers: Sequence[Layer]
) -> tuple[jax.Array, jax.Array]:
    """All positions of a decoder that reads its last attentional vector; zeros at first.

    Args:
      turns: int32 scalar, positions walked, the first ones.
      length_B: int32, positions of each source, the first ones; no weight falls on others.
      gates_TBG: what the first layer's gates get from tokens, with its bias.
      source: what is attended to.
      layers: from the first to the top.

    Returns:
      attentional_TBH, and align_TBS in float32; zeros from position ``turns`` on.
    """
    (attentional, align, *_), _ = _call(turns, length_B, gates_TBG, source, layers)
    return attentional, align


def _call(
    turns: jax.Array, length_B: jax.Array, gates_TBG: jax.Array, source: Source, layers: Sequence[Layer]
) -> tuple[Any, Any]:
    """Attentional vectors, weights, contexts and queries; and of each layer cells, h and opened gates."""
    steps, rows, width = gates_TBG.shape
    hidden, dtype, asks = width // 4, gates_TBG.dtype, bool(source.asked)
    memory = source.memory_BSM.shape[2]

    def numbers(width: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct((steps, rows, width), dtype)

    out = [numbers(hidden), numbers(source.memory_BSM.shape[1], jnp.float32), numbers(memory)]
    out += [numbers(hidden)] if asks else []
    each = [numbers(hidden), numbers(hidden), numbers(width)]
    given = [turns, length_B, source.memory_BSM, source.keys_BSH, source.kernel, gates_TBG]
    given += source.asked
    for layer in layers:
        given += [layer.kernel, layer.input_kernel, layer.h_BH, layer.c_BH]
        given += [array for array in (layer.bias, layer.factor_TBH) if array is not None]
    # Opened gates take the place of what came in.
    function = library.call("s2s_decoder", [*out, *each * len(layers)], {5: len(out) + 2})
    made = list(function(*given, **_attributes(source, layers, dtype)))
    common, rest = made[: len(out)], made[len(out) :]
    attentional, align, context, *query = common
    kept = [rest[at : at + len(each)] for at in range(0, len(rest), len(each))]
    return (attentional, align, context, query[0] if query else None), kept


def pack(source: Source, layers: Sequence[Layer]) -> jax.Array:
    """All weights of a decoder, laid out for many steps (`step`)."""
    loaded = library.load()
    assert loaded is not None
    dtype, asks = source.kernel.dtype, bool(source.asked)
    hidden, memory = source.kernel.shape[1], source.kernel.shape[0] - source.kernel.shape[1]
    size = loaded.decoder_bytes(hidden, memory, len(layers), asks, parts_of(dtype))
    out = jax.ShapeDtypeStruct((size // 4,), jnp.uint32)
    given = [source.kernel, *source.asked[:1]]
    for layer in layers:
        given += [layer.kernel, layer.input_kernel]
    packed: jax.Array = library.call("s2s_decoder_pack", out)(*given, **_attributes(source, layers, dtype))
    return packed


def step(
    packed: jax.Array,
    length_B: jax.Array,
    gates_BKG: jax.Array,
    source: Source,
    layers: Sequence[Layer],
    feed_BKH: jax.Array,
) -> tuple[jax.Array, jax.Array, list[tuple[jax.Array, jax.Array]]]:
    """One position of a search, which has no derivative.

    Args:
      packed: the weights, from `pack`; those in ``source`` and ``layers`` are not read.
      length_B: int32, positions of each source, the first ones.
      gates_BKG: what the first layer's gates get from tokens, with its bias; K rows read each source.
      source: what is attended to.
      layers: from the first to the top, with states [B, K, H].
      feed_BKH: the attentional vector of the step before.

    Returns:
      attentional_BKH, align_BKS in float32, and every layer's next h and c.
    """
    sources, beams, width = gates_BKG.shape
    rows, hidden, dtype = sources * beams, width // 4, gates_BKG.dtype

    def numbers(width: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct((1, rows, width), dtype)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(rows, x.shape[-1])

    memory_BSM = source.memory_BSM
    out = [numbers(hidden), numbers(memory_BSM.shape[1], jnp.float32), numbers(memory_BSM.shape[2])]
    out += [numbers(hidden)] if source.asked else []
    given = [jnp.asarray(1, jnp.int32), length_B, memory_BSM, source.keys_BSH, packed]
    given += [flat(gates_BKG)[None], flat(feed_BKH), *source.asked[1:]]
    for layer in layers:
        given += [flat(layer.h_BH), flat(layer.c_BH)]
        given += [] if layer.bias is None else [layer.bias]
    function = library.call("s2s_decoder_step", [*out, *[numbers(hidden)] * (2 * len(layers))])
    made = function(*given, **_attributes(source, layers, dtype))
    attentional, align, *rest = (x.reshape(sources, beams, x.shape[-1]) for x in made)
    states = rest[-2 * len(layers) :]
    return attentional, align, list(zip(states[1::2], states[::2], strict=True))


def _attributes(source: Source, layers: Sequence[Layer], dtype: Any) -> dict[str, Any]:
    return {
        "layers": np.int64(len(layers)),
        "asks": np.int64(bool(source.asked)),
        "drops": np.int64(layers[-1].factor_TBH is not None),
        "parts": np.int64(parts_of(dtype)),
    }


def _forward(
    turns: jax.Array, length_B: jax.Array, gates_TBG: jax.Array, source: Source, layers: Sequence[Layer]
) -> tuple[Any, Any]:
    common, kept = _call(turns, length_B, gates_TBG, source, layers)
    return common[:2], (turns, length_B, source, list(layers), common, kept)


def _backward(residuals: Any, gradients: Any) -> Any:
    turns, length_B, source, layers, (attentional, align, context, query), kept = residuals
    d_attentional, d_align = gradients
    dtype, asks = attentional.dtype, query is not None
    given = [turns, length_B, source.memory_BSM, source.keys_BSH, source.kernel]
    given += [d_attentional, d_align, attentional, align]
    given += [*source.asked, query] if asks else []
    out = [_like(attentional), _like(context), _like(align)]
    d_asked: tuple[jax.Array, ...]
    if asks:
        rows, _, hidden = source.keys_BSH.shape
        sums = [(source.keys_BSH.shape, jnp.float32), ((rows, hidden), jnp.float32)]
        out += [_like(query), *(jax.ShapeDtypeStruct(*each) for each in sums)]
    common, aliases = len(out), {}
    for layer, (cells, _, opened) in zip(layers, kept, strict=True):
        # Gradients by gates take the place of the gates.
        aliases[len(given) + 2] = len(out)
        given += [layer.kernel, layer.input_kernel, opened, cells, layer.c_BH]
        given += [] if layer.factor_TBH is None else [layer.factor_TBH]
        out += [_like(opened), _like(layer.h_BH), _like(layer.c_BH)]
    function = library.call("s2s_decoder_back", out, aliases)
    made = list(function(*given, **_attributes(source, layers, dtype)))
    d_outer, d_context, d_scores, *by_query = made[:common]
    d_layers = [made[at : at + 3] for at in range(common, len(made), 3)]
    outputs = [h for _, h, _ in kept]

    # What the first layer's input kernel reads, and what the others' read.
    read = [_before(jnp.zeros_like(layers[0].h_BH), attentional)]
    for layer, below in zip(layers[1:], outputs, strict=False):
        read.append(below if layer.factor_TBH is None else below * layer.factor_TBH)
    found = [
        Layer(
            _summed(_before(layer.h_BH, h), d_gates),
            _summed(own, d_gates),
            None if layer.bias is None else _summed(jnp.ones((*h.shape[:2], 1), dtype), d_gates)[0],
            None if layer.factor_TBH is None else jnp.zeros_like(layer.factor_TBH),
            d_h,
            d_c,
        )
        for layer, h, own, (d_gates, d_h, d_c) in zip(layers, outputs, read, d_layers, strict=True)
    ]
    d_memory = jnp.einsum("TBS,TBM->BSM", align.astype(dtype), d_context, preferred_element_type=jnp.float32)
    if asks:
        d_query, d_keys, d_vector = by_query
        # A product: XLA adds up rows in an order that depends on the number of threads.
        d_vector = contract(jnp.ones(len(d_vector), jnp.float32), d_vector, (0,), (0,), jnp.float32)
        d_asked = _summed(outputs[-1], d_query), d_vector.astype(dtype)
    else:
        d_asked = ()
        d_keys = jnp.einsum(
            "TBS,TBH->BSH", d_scores.astype(dtype), outputs[-1], preferred_element_type=jnp.float32
        )
    d_kernel = jnp.concatenate([_summed(context, d_outer), _summed(outputs[-1], d_outer)])
    d_source = Source(d_memory.astype(dtype), d_keys.astype(dtype), d_kernel, d_asked)
    return None, None, d_layers[0][0], d_source, found


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _before(first_BH: jax.Array, x_TBH: jax.Array) -> jax.Array:
    """What each position finds of the one before."""
    return jnp.concatenate([first_BH[None], x_TBH[:-1]])[: len(x_TBH)]


def _summed(read_TBE: jax.Array, gradient_TBG: jax.Array) -> jax.Array:
    """A kernel's gradient, from all positions in one product."""
    return contract(read_TBE, gradient_TBG, (0, 1), (0, 1), gradient_TBG.dtype)


decode.defvjp(_forward, _backward)
