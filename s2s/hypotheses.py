"""Hypotheses: how they are held while a search runs, and given back when it ends.

Decides the bookkeeping: K slots a sentence, a history that is written once a step and never
reordered, and the way back through it. Must not know how tokens are chosen or ranked.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from s2s.batch import BOS, PAD
from s2s.pick import take_rows
from s2s.shapes import check_shapes

State = Any


class Hypotheses(NamedTuple):
    """What a search found.

    Attributes:
      tokens_BKT: target ids, EOS last, then PAD; int32.
      length_BK: target tokens, EOS included; 0 where there is no hypothesis; int32.
      score_BK: what hypotheses are ranked by; -inf where there is none.
      log_prob_BK: log P(tokens | source) under the model, in nats.
      align_BKTS: attention weights while each token was produced; zeros after the end.
      token_log_prob_BKT: each token's share of ``log_prob_BK``, in nats; zeros after the end.
    """

    tokens_BKT: jax.Array
    length_BK: jax.Array
    score_BK: jax.Array
    log_prob_BK: jax.Array
    align_BKTS: jax.Array
    token_log_prob_BKT: jax.Array


class History(NamedTuple):
    """What went into every slot at every step, T first; `trace_back` finds the way through."""

    token_TBK: jax.Array
    parent_TBK: jax.Array
    token_log_prob_TBK: jax.Array
    align_TBKS: jax.Array  # in the order of the parents


class Slots(NamedTuple):
    """K slots a sentence: live, finished, or (log-probability -inf, not finished) empty."""

    state: State
    token_BK: jax.Array
    length_BK: jax.Array
    log_prob_BK: jax.Array
    score_BK: jax.Array
    finished_BK: jax.Array
    coverage_BKS: jax.Array

    @property
    def live_BK(self) -> jax.Array:
        return ~self.finished_BK & (self.log_prob_BK > -jnp.inf)


def begin(
    state: State,
    K: int,
    max_length: int,
    source_mask_BS: jax.Array,
    limit_B: jax.Array | None,
) -> tuple[jax.Array, Slots, History]:
    """The limits, K slots that hold the empty hypothesis, and a history with room for T steps."""
    B, S = source_mask_BS.shape
    T = max_length
    if T < 1 or K < 1:
        raise ValueError(f"max_length={T} and the number of hypotheses a sentence, {K}, must be at least 1")
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.shape[:2] != (B, K):
            raise ValueError(
                f"state{jax.tree_util.keystr(path)} has shape {leaf.shape}: leaves must begin with "
                f"[sentences, hypotheses] = [{B}, {K}]"
            )
    if limit_B is None:
        limit_B = jnp.full((B,), T, jnp.int32)
    check_shapes(source_mask_BS=source_mask_BS, limit_B=limit_B)
    limit_B = jnp.where(jnp.any(source_mask_BS, axis=1), jnp.clip(limit_B, 0, T), 0)
    nothing_BK = jnp.broadcast_to((limit_B == 0)[:, None], (B, K))
    slots = Slots(
        state=state,
        token_BK=jnp.full((B, K), BOS, jnp.int32),
        length_BK=jnp.zeros((B, K), jnp.int32),
        log_prob_BK=jnp.zeros((B, K), jnp.float32),
        score_BK=jnp.where(nothing_BK, jnp.float32(0.0), -jnp.inf),
        finished_BK=nothing_BK,
        coverage_BKS=jnp.zeros((B, K, S), jnp.float32),
    )
    history = History(
        token_TBK=jnp.full((T, B, K), PAD, jnp.int32),
        # Steps that are never taken lead straight back.
        parent_TBK=jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[None, None], (T, B, K)),
        token_log_prob_TBK=jnp.zeros((T, B, K), jnp.float32),
        align_TBKS=jnp.zeros((T, B, K, S), jnp.float32),
    )
    return limit_B, slots, history


def record(history: History, t: jax.Array, *step: jax.Array) -> History:
    put = functools.partial(lax.dynamic_update_index_in_dim, index=t, axis=0)
    return History(*(put(all_, new.astype(all_.dtype)) for all_, new in zip(history, step, strict=True)))


def trace_back(slots: Slots, history: History, slot_BK: jax.Array) -> Hypotheses:
    """Follows parents from the given last slots to the first step and collects what they passed."""

    def back(slot_BK: jax.Array, parent_BK: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        before_BK = take_rows(parent_BK, slot_BK)
        return before_BK, (slot_BK, before_BK)

    finished_BK = take_rows(slots.finished_BK, slot_BK)
    length_BK = jnp.where(finished_BK, take_rows(slots.length_BK, slot_BK), 0)
    slot_BK = slot_BK.astype(jnp.int32)
    _, (slot_TBK, parent_TBK) = lax.scan(back, slot_BK, history.parent_TBK, reverse=True)
    T = slot_TBK.shape[0]
    real_TBK = jnp.arange(T)[:, None, None] < length_BK[None]
    pick = jax.vmap(take_rows)
    token_TBK = jnp.where(real_TBK, pick(history.token_TBK, slot_TBK), PAD)
    token_log_prob_TBK = jnp.where(real_TBK, pick(history.token_log_prob_TBK, slot_TBK), 0.0)
    align_TBKS = jnp.where(real_TBK[..., None], pick(history.align_TBKS, parent_TBK), 0.0)
    return Hypotheses(
        tokens_BKT=jnp.transpose(token_TBK, (1, 2, 0)),
        length_BK=length_BK,
        score_BK=take_rows(slots.score_BK, slot_BK),
        log_prob_BK=jnp.where(finished_BK, take_rows(slots.log_prob_BK, slot_BK), -jnp.inf),
        align_BKTS=jnp.transpose(align_TBKS, (1, 2, 0, 3)),
        token_log_prob_BKT=jnp.transpose(token_log_prob_TBK, (1, 2, 0)),
    )
