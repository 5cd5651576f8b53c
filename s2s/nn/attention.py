"""Attention: how alike a query and each source position are, and what is read there.

Decides scores, windows and the weighted mean. Must not know where a query comes
from: its second axis T holds target positions in training, beams or samples in a
search, and `keys` are made once a sentence, whichever.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from s2s.nn.encoder import Memory
from s2s.nn.product import product

_glorot = initializers.glorot_uniform()


class Dot(nnx.Module):
    """score(s_t, h_j) = s_t . h_j (Luong et al. 2015, eq. 8); both sizes must be equal."""

    def __init__(
        self,
        query_features: int,
        memory_features: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        if query_features != memory_features:
            raise ValueError(
                f"dot needs equal sizes, not queries of {query_features} and memory of {memory_features} "
                "features: make them equal, or use general"
            )

    def prepare(self, memory_BSM: jax.Array) -> jax.Array:
        """The memory itself."""
        return memory_BSM

    def __call__(self, query_BTH: jax.Array, keys_BSH: jax.Array) -> jax.Array:
        """scores_BTS."""
        return jnp.einsum("BTH,BSH->BTS", query_BTH, keys_BSH)


class General(nnx.Module):
    """score(s_t, h_j) = s_t . W_a h_j (Luong et al. 2015, eq. 8)."""

    def __init__(
        self,
        query_features: int,
        memory_features: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        self.dtype = jnp.dtype(dtype)
        self.memory_kernel = nnx.Param(_glorot(rngs.params(), (memory_features, query_features), param_dtype))

    def prepare(self, memory_BSM: jax.Array) -> jax.Array:
        """keys_BSH: W_a h_j."""
        return product(memory_BSM, self.memory_kernel[...].astype(self.dtype))

    def __call__(self, query_BTH: jax.Array, keys_BSH: jax.Array) -> jax.Array:
        """scores_BTS."""
        return jnp.einsum("BTH,BSH->BTS", query_BTH, keys_BSH)


class Concat(nnx.Module):
    """score(s_t, h_j) = v_a . tanh(W_a [s_t; h_j]) (Luong et al. 2015, eq. 8).

    W_a is kept as its two blocks, so that the memory's product is made once a
    sentence; its width is the query's. The sum before tanh is [B, T, S, H].
    """

    def __init__(
        self,
        query_features: int,
        memory_features: int,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        self.dtype = jnp.dtype(dtype)
        width = query_features
        self.query_kernel = nnx.Param(_glorot(rngs.params(), (query_features, width), param_dtype))
        self.memory_kernel = nnx.Param(_glorot(rngs.params(), (memory_features, width), param_dtype))
        self.vector = nnx.Param(_glorot(rngs.params(), (width, 1), param_dtype)[:, 0])

    def prepare(self, memory_BSM: jax.Array) -> jax.Array:
        """keys_BSH: the memory's share of W_a [s_t; h_j]."""
        return product(memory_BSM, self.memory_kernel[...].astype(self.dtype))

    def __call__(self, query_BTH: jax.Array, keys_BSH: jax.Array) -> jax.Array:
        """scores_BTS."""
        query_BTH = product(query_BTH, self.query_kernel[...].astype(self.dtype))
        hidden_BTSH = jnp.tanh(query_BTH[:, :, None, :] + keys_BSH[:, None, :, :])
        return hidden_BTSH @ self.vector[...].astype(self.dtype)


SCORES: dict[str, type] = {"dot": Dot, "general": General, "concat": Concat}


class Global(nnx.Module):
    """Every real position is looked at (Luong et al. 2015, section 3.1)."""

    def __call__(self, mask_BS: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The positions looked at, broadcastable to [B, T, S], and a factor on their weights or None."""
        return mask_BS[:, None, :], None


WINDOWS: dict[str, type] = {"global": Global}


def attend(
    scores_BTS: jax.Array, mask_BTS: jax.Array, memory_BSM: jax.Array, factor_BTS: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Reads the memory by softmax weights over the positions looked at.

    a_tj = softmax_j(e_tj);  c_t = sum_j a_tj h_j (Luong et al. 2015, eq. 7)

    Args:
      scores_BTS: e, any real numbers.
      mask_BTS: True on positions looked at; T may be 1 for all.
      memory_BSM: h.
      factor_BTS: multiplies the weights, without renormalisation (eq. 10); None: 1.

    Returns:
      context_BTM in the memory's dtype, and align_BTS in float32 at least. Where no
      position is looked at, both are zeros.
    """
    scores_BTS = scores_BTS.astype(jnp.promote_types(scores_BTS.dtype, jnp.float32))
    mask_BTS = jnp.broadcast_to(mask_BTS, scores_BTS.shape)
    # The lowest number, not -inf: a row without any position makes no NaN, not even a hidden one.
    scores_BTS = jnp.where(mask_BTS, scores_BTS, jnp.finfo(scores_BTS.dtype).min)
    align_BTS = jnp.where(mask_BTS, jax.nn.softmax(scores_BTS, axis=-1), 0)
    if factor_BTS is not None:
        align_BTS = align_BTS * factor_BTS
    return jnp.einsum("BTS,BSM->BTM", align_BTS.astype(memory_BSM.dtype), memory_BSM), align_BTS


class Attention(nnx.Module):
    """A score and a window: the context is a weighted mean of the memory."""

    def __init__(self, score: str, window: str, hidden: int, memory: int, **keywords: Any):
        self.features = memory
        self.score = SCORES[score](hidden, memory, **keywords)
        self.window = WINDOWS[window]()

    def prepare(self, memory_BSM: jax.Array) -> Any:
        """What the score needs of the memory, made once a sentence."""
        return self.score.prepare(memory_BSM)

    def __call__(self, query_BTH: jax.Array, memory: Memory) -> tuple[jax.Array, jax.Array]:
        """context_BTM and align_BTS."""
        mask_BTS, factor_BTS = self.window(memory.mask_BS)
        return attend(self.score(query_BTH, memory.keys), mask_BTS, memory.memory_BSM, factor_BTS)


class FixedContext(nnx.Module):
    """The same context at every step: the encoder's summary (Cho et al. 2014, eq. 7 and 8)."""

    def __init__(self, features: int):
        self.features = features

    def prepare(self, memory_BSM: jax.Array) -> tuple[()]:
        """Nothing."""
        return ()

    def __call__(self, query_BTH: jax.Array, memory: Memory) -> tuple[jax.Array, jax.Array]:
        """context_BTM, and zeros for align_BTS: nothing is looked at."""
        summary_B1M = memory.summary_BM[:, None, : self.features]
        context_BTM = jnp.broadcast_to(summary_B1M, (*query_BTH.shape[:2], self.features))
        align_dtype = jnp.promote_types(query_BTH.dtype, jnp.float32)
        return context_BTM, jnp.zeros((*query_BTH.shape[:2], memory.mask_BS.shape[1]), align_dtype)


def make_attention(
    name: str, window: str, hidden: int, memory: int, **keywords: Any
) -> Attention | FixedContext:
    """The attention of a config: a score's name, "fixed", or "none" (a context of no features)."""
    if name in SCORES:
        return Attention(name, window, hidden, memory, **keywords)
    return FixedContext({"fixed": memory, "none": 0}[name])
