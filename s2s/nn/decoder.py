"""The decoder: from embedded target tokens to attentional vectors.

Decides the order of recurrence, attention and feeding, for all positions at once
and for one step. Must not know a vocabulary: it reads vectors and gives vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from s2s.config import ModelConfig
from s2s.kernels import decoder
from s2s.nn import cudnn
from s2s.nn.attention import Attention, Concat, Dot, General, Global, make_attention
from s2s.nn.bridge import BRIDGES
from s2s.nn.cells import LSTM, State, init_gates
from s2s.nn.dropout import OFF, Dropout, drop
from s2s.nn.encoder import Memory
from s2s.nn.product import product
from s2s.nn.recurrent import Stack
from s2s.nn.scan import scan

_glorot = initializers.glorot_uniform()


class DecoderState(NamedTuple):
    """What a decoder carries from one step to the next.

    Attributes:
      cells: by layer, the cell's state, leaves [B, K, H].
      feed_BKH: the attentional vector of the step before; no features without input feeding.
    """

    cells: tuple[State, ...]
    feed_BKH: jax.Array


class Decoder(nnx.Module):
    """Luong et al. 2015, sections 3 and 3.3.

    s_t = RNN_dec([y_{t-1}; s~_{t-1}], s_{t-1});  s~_t = tanh(W_c [c_t; s_t]) (eq. 5)

    s~_{t-1} is read with input feeding only (zeros first). With attention "fixed", the
    summary joins the input at every step as well (Cho et al. 2014); with "none",
    c_t has no features. The input kernel is kept in blocks, one for each thing read,
    so that the products of y and of the summary leave the loop over time.
    """

    def __init__(self, cfg: ModelConfig, **keywords: Any):
        rngs, param_dtype = keywords["rngs"], keywords["param_dtype"]
        self.dtype = jnp.dtype(keywords["dtype"])
        self.feeds = cfg.hidden if cfg.input_feeding else 0
        self.stack = Stack(cfg.cell, cfg.embedding, cfg.hidden, cfg.layers, **keywords)
        cell = self.stack.cells[0]
        if cfg.input_feeding:
            self.feed_kernel = init_gates(_glorot, rngs, cfg.hidden, cfg.hidden, cell.gates, param_dtype)
        self.reads_summary = cfg.attention == "fixed"
        if self.reads_summary:
            self.summary_kernel = init_gates(_glorot, rngs, cfg.memory, cfg.hidden, cell.gates, param_dtype)
        # What joins the gates at every step from outside is nothing that cuDNN could add.
        self.recurrence = "scan" if cfg.input_feeding or self.reads_summary else cfg.recurrence
        self.bridge = BRIDGES[cfg.bridge](
            cfg.encoder_depth, cfg.layers, cell.state_size, cfg.memory, cfg.hidden, **keywords
        )
        self.attention = make_attention(cfg.attention, cfg.window, cfg.hidden, cfg.memory, **keywords)
        read = self.attention.features + cfg.hidden
        self.attentional_kernel = nnx.Param(_glorot(rngs.params(), (read, cfg.hidden), param_dtype))

    def start(self, memory: Memory, beams: int) -> DecoderState:
        """The state before the first token, the same for every beam."""
        sentences = memory.mask_BS.shape[0]
        cells = jax.tree.map(
            lambda state_BH: jnp.broadcast_to(state_BH[:, None, :], (sentences, beams, state_BH.shape[1])),
            self.bridge(memory.states),
        )
        return DecoderState(cells, jnp.zeros((sentences, beams, self.feeds), self.dtype))

    def read(self, y: jax.Array) -> jax.Array:
        """What embedded tokens add to the first layer's gates whatever came before: [..., E] -> [..., G]."""
        return self.stack.project(y)

    def step(
        self, memory: Memory, state: DecoderState, gates_BKG: jax.Array
    ) -> tuple[DecoderState, jax.Array, jax.Array]:
        """One token for every beam, by its `read`: the next state, attentional_BKH and align_BKS."""
        if self.feeds and self._is_known_to_library(gates_BKG.shape[0] * gates_BKG.shape[1]):
            source, layers = self._for_library(memory, state.cells)
            attentional_BKH, align_BKS, cells = decoder.step(
                decoder.pack(source, layers), _lengths(memory), gates_BKG, source, layers, state.feed_BKH
            )
            return DecoderState(tuple(cells), attentional_BKH), attentional_BKH, align_BKS
        return self._step(memory, state, self._with_summary(memory, gates_BKG, same_axis=1), OFF)

    def run(
        self, memory: Memory, y_BTE: jax.Array, dropout: Dropout = OFF, turns: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """All tokens at once.

        Without input feeding nothing in the recurrence depends on attention, which is
        then one batched product over all positions.

        Args:
          memory: of the sources.
          y_BTE: embedded tokens, as read.
          dropout: rates and masks.
          turns: positions walked, as in `s2s.nn.scan.scan`; None: all.

        Returns:
          attentional_BTH and align_BTS; from position ``turns`` on they mean nothing.
        """
        if self.recurrence == "cudnn" and cudnn.available():
            return self._attend(memory, self.stack.read(y_BTE, self.bridge(memory.states), dropout))
        gates_TBG = self._with_summary(memory, self.read(jnp.swapaxes(y_BTE, 0, 1)), same_axis=0)
        if not self.feeds:
            query_TBH, _ = self.stack.run(gates_TBG, self.bridge(memory.states), dropout, turns)
            return self._attend(memory, jnp.swapaxes(query_TBH, 0, 1))

        turns = jnp.asarray(y_BTE.shape[1]) if turns is None else turns
        if self._is_known_to_library(gates_TBG.shape[1]):
            source, layers = self._for_library(memory, self.bridge(memory.states))
            layers = [
                layer._replace(factor_TBH=self._factors(number, gates_TBG, dropout) if number else None)
                for number, layer in enumerate(layers)
            ]
            turns = turns.astype(jnp.int32)
            outputs = decoder.decode(turns, _lengths(memory), gates_TBG, source, layers)
            attentional_BTH, align_BTS = (jnp.swapaxes(output_TB, 0, 1) for output_TB in outputs)
            return attentional_BTH, align_BTS

        def body(state: DecoderState, inputs: tuple[jax.Array, jax.Array]) -> tuple[DecoderState, Any]:
            gates_BG, t = inputs
            state, *outputs = self._step(memory, state, gates_BG[:, None, :], dropout.at(t))
            return state, [output_BK[:, 0] for output_BK in outputs]

        steps = gates_TBG, jnp.arange(y_BTE.shape[1])
        _, outputs = scan(body, self.start(memory, 1), steps, turns)
        attentional_BTH, align_BTS = (jnp.swapaxes(output_TB, 0, 1) for output_TB in outputs)
        return attentional_BTH, align_BTS

    def _is_known_to_library(self, rows: int) -> bool:
        """Whether `s2s.kernels.decoder` has this decoder's equations, dtype and so many rows."""
        cells, attention = self.stack.cells, self.attention
        return (
            all(type(cell) is LSTM for cell in cells)
            and type(attention) is Attention
            and type(attention.score) in (Dot, General, Concat)
            and type(attention.window) is Global
            and decoder.available(rows, self.dtype, len(cells))
        )

    def _for_library(
        self, memory: Memory, states: tuple[State, ...]
    ) -> tuple[decoder.Source, list[decoder.Layer]]:
        """What is attended to, and the layers without dropout, in the dtype of computation."""
        assert isinstance(self.attention, Attention)
        score, cells = self.attention.score, self.stack.cells

        def low(parameter: nnx.Param) -> jax.Array:
            return parameter[...].astype(self.dtype)

        asked = (low(score.query_kernel), low(score.vector)) if isinstance(score, Concat) else ()
        source = decoder.Source(memory.memory_BSM, memory.keys, low(self.attentional_kernel), asked)
        inputs = [self.feed_kernel, *(cell.input_kernel for cell in cells[1:])]
        biases = [None, *(low(cell.bias) for cell in cells[1:])]
        layers = [
            decoder.Layer(low(cell.recurrent_kernel), low(kernel), bias, None, *state)
            for cell, kernel, bias, state in zip(cells, inputs, biases, states, strict=True)
        ]
        return source, layers

    def _factors(self, layer: int, gates_TBG: jax.Array, dropout: Dropout) -> jax.Array | None:
        """What `drop` multiplies with below a layer, at all positions [T, B, H]; None: nothing is dropped."""
        ones_BKH = jnp.ones((gates_TBG.shape[1], 1, self.stack.cells[0].hidden), gates_TBG.dtype)
        if drop(ones_BKH, dropout.layer, dropout) is ones_BKH:
            return None
        masks = jax.vmap(lambda t: drop(ones_BKH, dropout.layer, dropout.at(t).at(layer)))
        return masks(jnp.arange(len(gates_TBG)))[:, :, 0]

    def _with_summary(self, memory: Memory, gates: jax.Array, *, same_axis: int) -> jax.Array:
        """The share of the first layer's gates that needs no state.

        Args:
          memory: of the sources.
          gates: that of the tokens, gates_TBG or gates_BKG.
          same_axis: the axis of T or K, along which the summary is the same.
        """
        if self.reads_summary:
            summary_BG = product(memory.summary_BM, self.summary_kernel[...].astype(self.dtype))
            gates = gates + jnp.expand_dims(summary_BG, same_axis)
        return gates

    def _step(
        self, memory: Memory, state: DecoderState, gates_BKG: jax.Array, dropout: Dropout
    ) -> tuple[DecoderState, jax.Array, jax.Array]:
        if self.feeds:
            gates_BKG = gates_BKG + product(state.feed_BKH, self.feed_kernel[...].astype(self.dtype))
        cells = self.stack.step(state.cells, gates_BKG, dropout)
        attentional_BKH, align_BKS = self._attend(memory, cells[-1][0])
        feed_BKH = attentional_BKH if self.feeds else state.feed_BKH
        return DecoderState(cells, feed_BKH), attentional_BKH, align_BKS

    def _attend(self, memory: Memory, query_BTH: jax.Array) -> tuple[jax.Array, jax.Array]:
        context_BTM, align_BTS = self.attention(query_BTH, memory)
        read_BTE = jnp.concatenate([context_BTM, query_BTH], axis=-1)
        return jnp.tanh(product(read_BTE, self.attentional_kernel[...].astype(self.dtype))), align_BTS


def _lengths(memory: Memory) -> jax.Array:
    """Real positions of every source, which come first: int32 [B]."""
    return jnp.sum(memory.mask_BS, axis=1, dtype=jnp.int32)
