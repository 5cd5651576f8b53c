"""The whole model: tokens in, logits out, for training and for search.

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
from s2s.shapes import check_shapes

__all__ = ["DecoderState", "Memory", "Seq2Seq"]

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
            cfg.cell, cfg.embedding, cfg.encoder_units, cfg.encoder_depth, cfg.bidirectional, **keywords
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
        """logits_BTV and align_BTS of a batch, the true target tokens being read."""
        check_shapes(
            source_BS=batch.source_BS,
            source_length_B=batch.source_length_B,
            target_BT=batch.target_BT,
            target_length_B=batch.target_length_B,
        )
        return self.teacher_forced(self.encode(batch, dropout), batch.target_BT, dropout)

    def encode(self, batch: Batch, dropout: Dropout | None = None) -> Memory:
        """The memory of the batch's sources; the decoder needs nothing else of them."""
        dropout = dropout or OFF
        table_VE = self.target_embedding if self.tie == "all" else self.source_embedding
        x_BSE = self._embed(table_VE, batch.source_BS, dropout.at(_SOURCE))
        memory = self.encoder(x_BSE, batch.source_mask_BS, dropout.at(_ENCODER))
        return memory._replace(keys=self.decoder.attention.prepare(memory.memory_BSM))

    def teacher_forced(
        self, memory: Memory, target_BT: jax.Array, dropout: Dropout | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Predicts every target token from the true ones before it.

        Args:
          memory: of the sources.
          target_BT: tokens to predict; what is read is BOS and all but the last.
          dropout: None: evaluation.

        Returns:
          logits_BTV and align_BTS, both float32 at least. Positions after EOS are
          finite and mean nothing.
        """
        dropout = dropout or OFF
        read_BT = jnp.concatenate([jnp.full_like(target_BT[:, :1], BOS), target_BT[:, :-1]], axis=1)
        y_BTE = self._embed(self.target_embedding, read_BT, dropout.at(_TARGET))
        attentional_BTH, align_BTS = self.decoder.run(memory, y_BTE, dropout.at(_DECODER))
        attentional_BTH = drop(attentional_BTH, dropout.attentional, dropout.at(_SOFTMAX).key)
        return self._logits(attentional_BTH), align_BTS

    def start(self, memory: Memory, beams: int) -> DecoderState:
        """The decoder's state before BOS is read, leaves [B, K, ...]."""
        return self.decoder.start(memory, beams)

    def advance(
        self, memory: Memory, state: DecoderState, token_BK: jax.Array
    ) -> tuple[DecoderState, jax.Array, jax.Array]:
        """Reads one token a beam.

        Returns:
          The next state; log_probs_BKV of the next token in nats; align_BKS. The memory
          is read by all beams of a sentence and never repeated.
        """
        y_BKE = self._embed(self.target_embedding, token_BK, OFF)
        state, attentional_BKH, align_BKS = self.decoder.step(memory, state, y_BKE)
        return state, jax.nn.log_softmax(self._logits(attentional_BKH), axis=-1), align_BKS

    def _embed(self, table_VE: nnx.Param, token: jax.Array, dropout: Dropout) -> jax.Array:
        embedded = jnp.take(table_VE[...], token, axis=0).astype(self.dtype)
        return drop(embedded, dropout.embedding, dropout.key)

    def _logits(self, attentional: jax.Array) -> jax.Array:
        """[..., H] -> [..., V], in float32 at least."""
        if self.tie == "none":
            kernel = self.softmax_kernel[...]
        else:
            kernel = self.target_embedding[...].T
            if hasattr(self, "to_embedding"):
                attentional = self.to_embedding(attentional)
        precise = jnp.promote_types(self.dtype, jnp.float32)
        logits = jnp.matmul(attentional, kernel.astype(self.dtype), preferred_element_type=precise)
        return logits + jnp.broadcast_to(self.softmax_bias[...].astype(precise), logits.shape)


_glorot = initializers.glorot_uniform()
