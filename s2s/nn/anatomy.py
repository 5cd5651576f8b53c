"""A model taken apart: every quantity of its equations, where running it gives only the last.

Decides which quantities have a name, and asks the model's own layers for each of them. Must not
compute an equation in its own way, nor know text, search or pages. Meant for one sentence and a few
steps: it keeps everything.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2s.batch import Batch
from s2s.nn.attention import Attention
from s2s.nn.cells import Cell, State
from s2s.nn.dropout import OFF
from s2s.nn.product import product
from s2s.nn.seq2seq import DecoderState, Memory, Seq2Seq


class Layer(NamedTuple):
    """What a cell went through; leaves [..., H], leading axes those of what it read.

    Attributes:
      gates: by `Cell.gate_names`, after their nonlinearities.
      state: the state they led to: h, and an LSTM's c.
    """

    gates: tuple[jax.Array, ...]
    state: State


class Reading(NamedTuple):
    """An encoder on a batch of sources; real positions only mean something.

    Attributes:
      embedding_BSE: x.
      layers: by layer, by direction (forward first): after each position, leaves [B, S, H].
      memory: as `Seq2Seq.encode` gives it.
      first: by decoder layer, the state that the bridge made; leaves [B, H].
    """

    embedding_BSE: jax.Array
    layers: list[list[Layer]]
    memory: Memory
    first: tuple[State, ...]


class Moment(NamedTuple):
    """A decoder's step, in the order of the equations; K rows a sentence.

    Attributes:
      embedding_BKE: of the token read.
      layers: by layer; leaves [B, K, H]. The top state is s_t.
      scores_BKS: e_tj; None where nothing is scored.
      align_BKS: a_tj; zeros where nothing is looked at.
      context_BKM: c_t; no features where there is none.
      attentional_BKH: s~_t.
      output_BKE: what the softmax reads: s~_t, or its map to a table's features.
      logits_BKV: float32 at least.
    """

    embedding_BKE: jax.Array
    layers: list[Layer]
    scores_BKS: jax.Array | None
    align_BKS: jax.Array
    context_BKM: jax.Array
    attentional_BKH: jax.Array
    output_BKE: jax.Array
    logits_BKV: jax.Array


def read(model: Seq2Seq, batch: Batch) -> Reading:
    """The encoder position by position, and what it hands over."""
    encoder = model.encoder
    table_VE = model.target_embedding if model.tie == "all" else model.source_embedding
    x_BSE = embedding_BSE = model._embed(table_VE, batch.source_BS, OFF)
    layers = []
    for number, forward in enumerate(encoder.forward):
        ways = [_walk(forward, x_BSE, batch.source_mask_BS)]
        if encoder.backward:
            ways.append(_walk(encoder.backward[number], x_BSE, batch.source_mask_BS, reverse=True))
        x_BSE = jnp.concatenate([way.state[0] for way in ways], axis=-1)
        layers.append(ways)
    memory = model.encode(batch)
    return Reading(embedding_BSE, layers, memory, model.decoder.bridge(memory.states))


def _walk(cell: Cell, x_BSE: jax.Array, mask_BS: jax.Array, *, reverse: bool = False) -> Layer:
    """A cell over a sequence, as `s2s.nn.recurrent.run`, but every position's gates and state are kept."""

    def step(state: State, inputs: tuple[jax.Array, jax.Array]) -> tuple[State, Layer]:
        gates_BG, mask_B = inputs
        new = cell.step(state, gates_BG)
        new = tuple(jnp.where(mask_B[:, None], n, s) for n, s in zip(new, state, strict=True))
        kept = tuple(jnp.where(mask_B[:, None], n, jnp.zeros_like(n)) for n in new)
        return new, Layer(cell.opened(state, gates_BG), kept)

    gates_SBG = cell.project(jnp.swapaxes(x_BSE, 0, 1))
    zero = cell.zero_state(x_BSE.shape[:1])
    _, layer = jax.lax.scan(step, zero, (gates_SBG, jnp.asarray(mask_BS).T), reverse=reverse)
    return jax.tree.map(lambda leaf_SBH: jnp.swapaxes(leaf_SBH, 0, 1), layer)


def step(
    model: Seq2Seq, memory: Memory, state: DecoderState, token_BK: jax.Array
) -> tuple[DecoderState, Moment]:
    """The decoder reads one token a row: the next state, as `Seq2Seq.advance` gives it, and the way there."""
    decoder = model.decoder
    embedding_BKE = model._embed(model.target_embedding, token_BK, OFF)
    read_BKG = decoder.read(embedding_BKE)
    new, attentional_BKH, align_BKS = decoder.step(memory, state, read_BKG)

    # The first layer reads all that joins its gates; each layer above, the state below it.
    gates = decoder._with_summary(memory, read_BKG, same_axis=1)
    if decoder.feeds:
        gates = gates + product(state.feed_BKH, decoder.feed_kernel[...].astype(decoder.dtype))
    layers = []
    for number, cell in enumerate(decoder.stack.cells):
        if number:
            gates = cell.project(new.cells[number - 1][0])
        layers.append(Layer(cell.opened(state.cells[number], gates), new.cells[number]))

    query_BKH = new.cells[-1][0]
    attention = decoder.attention
    scores_BKS = attention.score(query_BKH, memory.keys) if isinstance(attention, Attention) else None
    context_BKM, _ = attention(query_BKH, memory)
    output_BKE = model._output(attentional_BKH)
    return new, Moment(
        embedding_BKE=embedding_BKE,
        layers=layers,
        scores_BKS=scores_BKS,
        align_BKS=align_BKS,
        context_BKM=context_BKM,
        attentional_BKH=attentional_BKH,
        output_BKE=output_BKE,
        logits_BKV=model.softmax().logits(output_BKE),
    )
