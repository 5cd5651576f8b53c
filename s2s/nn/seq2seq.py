"""The whole model: tokens in, and out what a softmax makes of them, for training and for search.

Decides embeddings, the softmax, what they share, and where dropout falls. Must not
know losses, search or files.

Dropout falls on source and target embeddings, between the layers of both sides, and
on the attentional vector on its way to the softmax; the attentional vector fed to
the next step is whole.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from s2s.batch import BOS, Batch
from s2s.config import ModelConfig
from s2s.nn.decoder import Decoder, DecoderState
from s2s.nn.dropout import OFF, Dropout, drop
from s2s.nn.encoder import Encoder, Memory
from s2s.nn.recurrent import longest
from s2s.nn.softmax import Softmax
from s2s.shapes import check_shapes

__all__ = ["VOCABULARY_AXES", "DecoderState", "Memory", "Seq2Seq"]

# Parameters with an axis of a vocabulary: which axis, and whose vocabulary; all else of a model of these
# sizes has the same shapes whatever the vocabularies are.
VOCABULARY_AXES = {
    "source_embedding": (0, "source"),
    "target_embedding": (0, "target"),
    "softmax_kernel": (1, "target"),
    "softmax_bias": (0, "target"),
}

# Where masks are drawn: one number each, so that no two places share a key.
_SOURCE, _ENCODER, _TARGET, _DECODER, _SOFTMAX = range(5)


class Seq2Seq(nnx.Module):
    """Encoder, attention and decoder of Luong et al. 2015, between embeddings and a softmax.

    p(y_t | y_<t, x) = softmax(W_s s~_t + b_s) (eq. 6; the bias is ours)

    Tied, W_s is the target embedding (Press and Wolf 2017), and with "all" the source
    embedding too; s~_t then passes a linear map to E features if E is not H.

    Word vectors begin with features of variance 1, where Luong et al. begin with +-0.1: read
    by gates of Glorot scale, vectors that small leave attention nothing to tell words by.
    After 600 updates of experiments/luong_general.py, 95 % of dev match exactly instead of 16 %.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        source_vocab: int,
        target_vocab: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        """Draws the parameters.

        Args:
          cfg: the model's sizes and names.
          source_vocab: entries of the source vocabulary.
          target_vocab: entries of the target vocabulary.
          rngs: a key named "params".
          dtype: of activations; None: ``cfg.dtype``.
          param_dtype: of parameters.
        """
        self.dtype = jnp.dtype(dtype or cfg.dtype)
        keywords: dict[str, Any] = {"rngs": rngs, "dtype": self.dtype, "param_dtype": param_dtype}
        if cfg.tie == "all" and source_vocab != target_vocab:
            raise ValueError(
                f"tie='all' needs one vocabulary, not {source_vocab} source and {target_vocab} target entries"
            )

        def table(entries: int, spread: float) -> nnx.Param:
            return nnx.Param(
                initializers.normal(spread)(rngs.params(), (entries, cfg.embedding), param_dtype)
            )

        # A table that is also the softmax begins at the softmax's scale.
        self.target_embedding = table(target_vocab, 1.0 if cfg.tie == "none" else cfg.embedding**-0.5)
        if cfg.tie != "all":
            self.source_embedding = table(source_vocab, 1.0)
        self.encoder = Encoder(
            cfg.cell,
            cfg.embedding,
            cfg.encoder_units,
            cfg.encoder_depth,
            cfg.bidirectional,
            cfg.recurrence,
            **keywords,
        )
        self.decoder = Decoder(cfg, **keywords)
        if cfg.tie == "none":
            self.softmax_kernel = nnx.Param(_glorot(rngs.params(), (cfg.hidden, target_vocab), param_dtype))
        elif cfg.embedding != cfg.hidden:
            self.to_embedding = nnx.Linear(
                cfg.hidden, cfg.embedding, use_bias=False, kernel_init=_glorot, **keywords
            )
        self.softmax_bias = nnx.Param(jnp.zeros(target_vocab, param_dtype))
        self.tie = cfg.tie

    def __call__(self, batch: Batch, dropout: Dropout | None = None) -> tuple[jax.Array, jax.Array]:
        """What the softmax reads, and align_BTS, of a batch whose true target tokens are read."""
        check_shapes(
            source_BS=batch.source_BS,
            source_length_B=batch.source_length_B,
            target_BT=batch.target_BT,
            target_length_B=batch.target_length_B,
        )
        memory = self.encode(batch, dropout)
        return self.teacher_forced(memory, batch.target_BT, batch.target_length_B, dropout)

    def encode(self, batch: Batch, dropout: Dropout | None = None) -> Memory:
        """The memory of the batch's sources; the decoder needs nothing else of them."""
        dropout = dropout or OFF
        table_VE = self.target_embedding if self.tie == "all" else self.source_embedding
        x_BSE = self._embed(table_VE, batch.source_BS, dropout.at(_SOURCE))
        memory = self.encoder(x_BSE, batch.source_mask_BS, dropout.at(_ENCODER))
        return memory._replace(keys=self.decoder.attention.prepare(memory.memory_BSM))

    def teacher_forced(
        self,
        memory: Memory,
        target_BT: jax.Array,
        target_length_B: jax.Array,
        dropout: Dropout | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Predicts every target token from the true ones before it.

        Args:
          memory: of the sources.
          target_BT: tokens to predict; what is read is BOS and all but the last.
          target_length_B: real positions of each; the longest is as far as the decoder walks.
          dropout: None: evaluation.

        Returns:
          output_BTH, of which `softmax` makes the logits of the tokens to predict, and align_BTS,
          float32 at least. Positions after EOS are finite and mean nothing.
        """
        dropout = dropout or OFF
        read_BT = jnp.concatenate([jnp.full_like(target_BT[:, :1], BOS), target_BT[:, :-1]], axis=1)
        y_BTE = self._embed(self.target_embedding, read_BT, dropout.at(_TARGET))
        turns = longest(target_length_B)
        attentional_BTH, align_BTS = self.decoder.run(memory, y_BTE, dropout.at(_DECODER), turns)
        attentional_BTH = drop(attentional_BTH, dropout.attentional, dropout.at(_SOFTMAX))
        return self._output(attentional_BTH), align_BTS

    def softmax(self, size: jax.Array | None = None) -> Softmax:
        """The softmax over target tokens; a tied one is the embedding table as it is stored.

        Args:
          size: entries of the target vocabulary, where the parameters are padded to more.
        """
        if self.tie == "none":
            return Softmax(self.softmax_kernel[...], self.softmax_bias[...], size=size)
        return Softmax(self.target_embedding[...], self.softmax_bias[...], vocab_axis=0, size=size)

    def start(self, memory: Memory, beams: int) -> DecoderState:
        """The decoder's state before BOS is read, leaves [B, K, ...]."""
        return self.decoder.start(memory, beams)

    def read_all(self) -> jax.Array:
        """What each target token adds to the decoder's gates, gates_VG: cheaper once than step by step
        where more tokens are read than the vocabulary has.
        """
        return self.decoder.read(self.target_embedding[...].astype(self.dtype))

    def advance(
        self,
        memory: Memory,
        state: DecoderState,
        token_BK: jax.Array,
        gates_VG: jax.Array | None = None,
    ) -> tuple[DecoderState, jax.Array, jax.Array]:
        """Reads one token a beam.

        Args:
          memory: of the sources.
          state: before the tokens.
          token_BK: the tokens.
          gates_VG: `read_all`, from which they are looked up; None: they are read one by one.

        Returns:
          The next state; output_BKE, of which `softmax` makes the logits of the next token; align_BKS.
          The memory is read by all beams of a sentence and never repeated.
        """
        if gates_VG is None:
            gates_BKG = self.decoder.read(self._embed(self.target_embedding, token_BK, OFF))
        else:
            gates_BKG = jnp.take(gates_VG, token_BK, axis=0)
        state, attentional_BKH, align_BKS = self.decoder.step(memory, state, gates_BKG)
        return state, self._output(attentional_BKH), align_BKS

    def _embed(self, table_VE: nnx.Param, token: jax.Array, dropout: Dropout) -> jax.Array:
        embedded = jnp.take(table_VE[...], token, axis=0).astype(self.dtype)
        return drop(embedded, dropout.embedding, dropout)

    def _output(self, attentional: jax.Array) -> jax.Array:
        """What the softmax reads: the attentional vector, in a table's E features if they are not H."""
        return self.to_embedding(attentional) if hasattr(self, "to_embedding") else attentional


_glorot = initializers.glorot_uniform()
