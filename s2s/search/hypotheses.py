"""Hypotheses: how they are held while a search runs, and given back when it ends.

Decides the bookkeeping: K slots a sentence, a history that is written once a step and never
reordered, and the way back through it. Must not know how tokens are chosen or ranked, nor
which sentences are searched when.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from s2s.batch import BOS, PAD
from s2s.nn.bound import common_max
from s2s.search.pick import take_rows

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


class Step(NamedTuple):
    """What went into the slots of N sentences at one step, as `History` keeps it."""

    token_NK: jax.Array
    parent_NK: jax.Array
    token_log_prob_NK: jax.Array
    align_NKS: jax.Array


class Slots(NamedTuple):
    """K slots for each of N sentences: live, finished, or (log-probability -inf, not finished) empty."""

    state: State
    token_NK: jax.Array
    length_NK: jax.Array
    log_prob_NK: jax.Array
    score_NK: jax.Array
    finished_NK: jax.Array
    coverage_NKS: jax.Array

    @property
    def live_NK(self) -> jax.Array:
        return ~self.finished_NK & (self.log_prob_NK > -jnp.inf)


class Ends(NamedTuple):
    """How the slots of all B sentences ended, and after how many steps."""

    steps_B: jax.Array
    length_BK: jax.Array
    log_prob_BK: jax.Array
    score_BK: jax.Array
    finished_BK: jax.Array


def first_slots(state: State, K: int, limit_N: jax.Array, S: int) -> Slots:
    """K slots that hold the empty hypothesis, live, or finished where the limit is 0.

    Args:
      state: of the empty hypothesis, leaves [N, 1, ...].
      K: slots a sentence.
      limit_N: most tokens.
      S: source positions.
    """
    (N,) = limit_N.shape
    nothing_NK = jnp.broadcast_to((limit_N == 0)[:, None], (N, K))
    return Slots(
        state=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (N, K, *leaf.shape[2:])), state),
        token_NK=jnp.full((N, K), BOS, jnp.int32),
        length_NK=jnp.zeros((N, K), jnp.int32),
        log_prob_NK=jnp.zeros((N, K), jnp.float32),
        score_NK=jnp.where(nothing_NK, jnp.float32(0.0), -jnp.inf),
        finished_NK=nothing_NK,
        coverage_NKS=jnp.zeros((N, K, S), jnp.float32),
    )


def no_ends(K: int, limit_B: jax.Array) -> Ends:
    """The ends before any search: there are none but those of sentences with limit 0."""
    (B,) = limit_B.shape
    nothing_BK = jnp.broadcast_to((limit_B == 0)[:, None], (B, K))
    return Ends(
        steps_B=jnp.zeros((B,), jnp.int32),
        length_BK=jnp.zeros((B, K), jnp.int32),
        log_prob_BK=jnp.zeros((B, K), jnp.float32),
        score_BK=jnp.where(nothing_BK, jnp.float32(0.0), -jnp.inf),
        finished_BK=nothing_BK,
    )


def no_history(T: int, B: int, K: int, S: int) -> History:
    """Room for T steps of B sentences."""
    return History(
        token_TBK=jnp.full((T, B, K), PAD, jnp.int32),
        # Steps that are never taken lead straight back.
        parent_TBK=jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32)[None, None], (T, B, K)),
        token_log_prob_TBK=jnp.zeros((T, B, K), jnp.float32),
        align_TBKS=jnp.zeros((T, B, K, S), jnp.float32),
    )


def record(history: History, t_N: jax.Array, row_N: jax.Array, step: Step) -> History:
    """Writes down step t_N of the sentences in rows row_N; rows beyond the last are nobody's."""

    def put(all_: jax.Array, new: jax.Array) -> jax.Array:
        return all_.at[t_N, row_N].set(new.astype(all_.dtype), mode="drop")

    return History(*(put(all_, new) for all_, new in zip(history, step, strict=True)))


def settle(ends: Ends, row_N: jax.Array, t_N: jax.Array, slots: Slots) -> Ends:
    """Writes down how the slots of the sentences in rows row_N are after t_N steps."""
    now = Ends(t_N, slots.length_NK, slots.log_prob_NK, slots.score_NK, slots.finished_NK)
    return jax.tree.map(lambda all_, new: all_.at[row_N].set(new, mode="drop"), ends, now)


def trace_back(ends: Ends, history: History, slot_BK: jax.Array) -> Hypotheses:
    """Follows parents from the given last slots to the first step and collects what they passed."""
    finished_BK = take_rows(ends.finished_BK, slot_BK)
    length_BK = jnp.where(finished_BK, take_rows(ends.length_BK, slot_BK), 0)
    # There is room for far more steps than most searches take.
    steps = common_max(jnp.max(ends.steps_B))

    def back(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slot_BK, *passed = carry
        t = steps - 1 - number
        token_BK, parent_BK, token_log_prob_BK, align_BKS = (all_[t] for all_ in history)
        before_BK = take_rows(parent_BK, slot_BK)
        real_BK = t < length_BK
        here = (
            jnp.where(real_BK, take_rows(token_BK, slot_BK), PAD),
            jnp.where(real_BK, take_rows(token_log_prob_BK, slot_BK), 0.0),
            jnp.where(real_BK[..., None], take_rows(align_BKS, before_BK), 0.0),
        )
        return before_BK, *(all_.at[t].set(one) for all_, one in zip(passed, here, strict=True))

    T, _, _, S = history.align_TBKS.shape
    _, token_TBK, token_log_prob_TBK, align_TBKS = lax.fori_loop(
        0,
        steps,
        back,
        (
            slot_BK.astype(jnp.int32),
            jnp.full((T, *slot_BK.shape), PAD, jnp.int32),
            jnp.zeros((T, *slot_BK.shape), jnp.float32),
            jnp.zeros((T, *slot_BK.shape, S), jnp.float32),
        ),
    )
    return Hypotheses(
        tokens_BKT=jnp.transpose(token_TBK, (1, 2, 0)),
        length_BK=length_BK,
        score_BK=take_rows(ends.score_BK, slot_BK),
        log_prob_BK=jnp.where(finished_BK, take_rows(ends.log_prob_BK, slot_BK), -jnp.inf),
        align_BKTS=jnp.transpose(align_TBKS, (1, 2, 0, 3)),
        token_log_prob_BKT=jnp.transpose(token_log_prob_TBK, (1, 2, 0)),
    )
