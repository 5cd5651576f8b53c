"""Search: which target sequence a model's next-token distributions lead to.

Decides how hypotheses grow, end, compete and are ranked: greedy, beam, sampling. Must
not know the model: it sees a state, a pytree whose leaves begin with the axes [B, K],
and ``advance(state, token_BK) -> (state, log_probs_BKV, align_BKS)``. Every function is
pure and meant to be jitted as a whole by its caller.

Rules that all three share. The first input is BOS. PAD and BOS are never produced. EOS is
forbidden before ``min_length`` other tokens. At ``limit_B`` tokens, EOS included, EOS is
forced at its own log-probability; the limit wins over ``min_length``. So every hypothesis
ends in EOS. Rows with limit 0 or without a real source position are done at once: length
0, score 0. A token of log-probability -inf is impossible, and a hypothesis that does not
exist has length 0 and score -inf. A row's result does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from s2s.batch import BOS, EOS, PAD
from s2s.hypotheses import History, Hypotheses, Slots, State, begin, record, trace_back
from s2s.pick import best_tokens, draw, nucleus, softmax, take_rows
from s2s.shapes import check_shapes

Advance = Callable[[State, jax.Array], tuple[State, jax.Array, jax.Array]]


def greedy(
    advance: Advance,
    state: State,
    *,
    max_length: int,
    source_mask_BS: jax.Array,
    limit_B: jax.Array | None = None,
    min_length: int | jax.Array = 0,
) -> Hypotheses:
    """Takes the likeliest token at every step, the lowest id among equals.

    Args:
      advance: the model's next step, for K = 1.
      state: its first state; leaves [B, 1, ...].
      max_length: target tokens T there is room for, EOS included.
      source_mask_BS: True on real source positions.
      limit_B: target tokens at most, EOS included; None: ``max_length``.
      min_length: target tokens at least, EOS not counted.

    Returns:
      One hypothesis a sentence, its score its log-probability.
    """

    def choose(log_probs_BKV: jax.Array, may_end_BK: jax.Array, t: jax.Array) -> jax.Array:
        base_BK = jnp.zeros(may_end_BK.shape)[..., None]
        return best_tokens(log_probs_BKV[:, :, None], base_BK, may_end_BK[..., None], 1)[2][..., 0]

    return _roll(advance, state, choose, 1, max_length, source_mask_BS, limit_B, min_length)


def sample(
    advance: Advance,
    state: State,
    *,
    samples: int,
    max_length: int,
    source_mask_BS: jax.Array,
    key: jax.Array,
    index_B: jax.Array,
    limit_B: jax.Array | None = None,
    min_length: int | jax.Array = 0,
    temperature: float | jax.Array = 1.0,
    top_k: int = 0,
    top_p: float | jax.Array = 1.0,
) -> Hypotheses:
    """Draws independent samples from the model's distribution, tempered, then truncated.

    p(y) is proportional to exp(log p(y) / temperature) over the ``top_k`` likeliest tokens (Fan et
    al. 2018), of these over the fewest likeliest whose renormalised probability reaches
    ``top_p`` (Holtzman et al. 2020, eq. 2-3; at least one). The lowest id goes first among equals.

    Args:
      advance: the model's next step, for K = ``samples``.
      state: its first state; leaves [B, samples, ...].
      samples: hypotheses a sentence, K.
      max_length: target tokens T there is room for, EOS included.
      source_mask_BS: True on real source positions.
      key: of the whole run; batches need no keys of their own.
      index_B: a number for each sentence, int32, unique in the run. The draws of a sentence depend on
        ``key``, this number and the number of the sample alone: not on batch, row or ``samples``.
      limit_B: target tokens at most, EOS included; None: ``max_length``.
      min_length: target tokens at least, EOS not counted.
      temperature: above 0; may be traced.
      top_k: static; 0: all tokens.
      top_p: above 0; 1: all tokens; may be traced.

    Returns:
      Samples in the order of their drawing, not sorted. Log-probabilities, and the score, are the
      model's own: of temperature 1 and not truncated.
    """

    def choose(log_probs_BKV: jax.Array, may_end_BK: jax.Array, t: jax.Array) -> jax.Array:
        logits_BKV = log_probs_BKV / temperature
        uniform_BK = _uniform(key, index_B, samples, t)
        if top_k > 0:
            base_BK = jnp.zeros(may_end_BK.shape)[..., None]
            k = min(top_k, log_probs_BKV.shape[-1])
            best, _, token = best_tokens(logits_BKV[:, :, None], base_BK, may_end_BK[..., None], k)
            kept = nucleus(softmax(best), top_p)
            return jnp.take_along_axis(token, draw(kept, uniform_BK)[..., None], 2)[..., 0]
        special = jnp.arange(logits_BKV.shape[-1])[None, None]
        forbidden = (special == PAD) | (special == BOS) | ((special == EOS) & ~may_end_BK[..., None])
        return draw(nucleus(softmax(jnp.where(forbidden, -jnp.inf, logits_BKV)), top_p), uniform_BK)

    return _roll(advance, state, choose, samples, max_length, source_mask_BS, limit_B, min_length)


def beam(
    advance: Advance,
    state: State,
    *,
    beam: int,
    max_length: int,
    source_mask_BS: jax.Array,
    limit_B: jax.Array | None = None,
    min_length: int | jax.Array = 0,
    length_penalty: float | jax.Array = 0.0,
    coverage_penalty: float | jax.Array = 0.0,
    n_best: int | None = None,
) -> Hypotheses:
    """Keeps the K likeliest hypotheses of every length; those that end keep their slots.

    K slots a sentence. At every step the continuations of all live hypotheses compete, by
    log-probability, for the slots without a finished one. What ends in EOS leaves the beam
    (Sutskever et al. 2014, section 3.2) and its slot goes with it, as in the search of dl4mt and
    Nematus. So K = 1 is greedy search, K as large as the number of hypotheses is exhaustive, and every
    search ends with K finished hypotheses where K exist. A finished set beside a beam that stays
    K wide (GNMT) has neither the first property nor, without a bound on time, the last.
    Competing continuations have one length, so penalties cannot change who
    survives by length; they rank what is finished, by `gnmt_score`.

    Args:
      advance: the model's next step.
      state: its first state; leaves [B, beam, ...], the slots alike.
      beam: slots a sentence, K.
      max_length: target tokens T there is room for, EOS included.
      source_mask_BS: True on real source positions.
      limit_B: target tokens at most, EOS included; None: ``max_length``.
      min_length: target tokens at least, EOS not counted.
      length_penalty: alpha of `gnmt_score`, at least 0; may be traced.
      coverage_penalty: beta of `gnmt_score`, at least 0; may be traced.
      n_best: hypotheses to return; None: all K. With fewer, a sentence is done as soon as no live
        hypothesis can beat its n-th best: what is returned stays the same.

    Returns:
      The ``n_best`` best hypotheses of each sentence, all different, best first; among equal scores
      the one that ended first. [B, n_best, ...].
    """
    K = beam
    n_best = K if n_best is None else n_best
    if not 1 <= n_best <= K:
        raise ValueError(f"n_best={n_best} must be at least 1 and at most beam={K}")
    limit_B, slots, history = begin(state, K, max_length, source_mask_BS, limit_B)
    # All slots begin alike: one of them expands, or each hypothesis would appear K times.
    slots = slots._replace(
        log_prob_BK=jnp.where((jnp.arange(K) == 0)[None] | slots.finished_BK, 0.0, -jnp.inf)
    )

    def step(carry: tuple[jax.Array, Slots, History]) -> tuple[jax.Array, Slots, History]:
        t, old, history = carry
        state, log_probs_BKV, align_BKS = advance(old.state, old.token_BK)
        log_probs_BKV, align_BKS = log_probs_BKV.astype(jnp.float32), align_BKS.astype(jnp.float32)
        live_BK = old.live_BK
        last_BK = jnp.broadcast_to((t + 1 >= limit_B)[:, None], live_BK.shape)
        # Relative to the best, K = 1 compares bare token log-probabilities as greedy search does,
        # and long hypotheses lose no precision.
        best_B = jnp.max(jnp.where(live_BK, old.log_prob_BK, -jnp.inf), axis=1)
        best_B = jnp.where(best_B > -jnp.inf, best_B, 0.0)
        base_BK = jnp.where(live_BK, old.log_prob_BK - best_B[:, None], -jnp.inf)
        # Finished slots have one continuation that nothing beats, hypotheses at their limit have EOS.
        ending_BK = jnp.where(last_BK, base_BK + log_probs_BKV[:, :, EOS], -jnp.inf)
        only_BK = jnp.where(old.finished_BK, jnp.inf, ending_BK)
        only_token_BK = jnp.where(old.finished_BK, PAD, EOS)
        may_end_BK = jnp.broadcast_to(t >= min_length, live_BK.shape)
        open_BK, parent_BK, token_BK = best_tokens(
            log_probs_BKV, jnp.where(last_BK, -jnp.inf, base_BK), may_end_BK, K
        )
        value_BK, place_BK = lax.top_k(jnp.concatenate([only_BK, open_BK], axis=1), K)
        slot_BK = jnp.broadcast_to(jnp.arange(K)[None], live_BK.shape)
        parent_BK = take_rows(jnp.concatenate([slot_BK, parent_BK], axis=1), place_BK)
        token_BK = take_rows(jnp.concatenate([only_token_BK, token_BK], axis=1), place_BK)

        was_finished_BK = take_rows(old.finished_BK, parent_BK)
        grows_BK = ~was_finished_BK & (value_BK > -jnp.inf)
        token_BK = jnp.where(grows_BK, token_BK, PAD)
        token_log_prob_BK = jax.vmap(lambda x, parent, token: x[parent, token])(
            log_probs_BKV, parent_BK, token_BK
        )
        token_log_prob_BK = jnp.where(grows_BK, token_log_prob_BK, 0.0)
        log_prob_BK = take_rows(old.log_prob_BK, parent_BK) + token_log_prob_BK
        ends_BK = grows_BK & (token_BK == EOS)
        length_BK = take_rows(old.length_BK, parent_BK) + grows_BK
        coverage_BKS = take_rows(old.coverage_BKS + align_BKS, parent_BK)
        score_BK = gnmt_score(
            log_prob_BK, length_BK, coverage_BKS, source_mask_BS, length_penalty, coverage_penalty
        )
        slots = Slots(
            state=jax.tree.map(lambda leaf: take_rows(leaf, parent_BK), state),
            token_BK=token_BK,
            length_BK=length_BK,
            log_prob_BK=jnp.where(grows_BK | was_finished_BK, log_prob_BK, -jnp.inf),
            score_BK=jnp.where(ends_BK, score_BK, take_rows(old.score_BK, parent_BK)),
            finished_BK=was_finished_BK | ends_BK,
            coverage_BKS=coverage_BKS,
        )
        if n_best < K:
            slots = _give_up(slots, limit_B, length_penalty, n_best)
        return t + 1, slots, record(history, t, token_BK, parent_BK, token_log_prob_BK, align_BKS)

    _, slots, history = lax.while_loop(
        lambda carry: jnp.any(carry[1].live_BK), step, (jnp.int32(0), slots, history)
    )
    _, order_BK = lax.top_k(slots.score_BK, n_best)
    return trace_back(slots, history, order_BK)


def gnmt_score(
    log_prob_BK: jax.Array,
    length_BK: jax.Array,
    coverage_BKS: jax.Array,
    source_mask_BS: jax.Array,
    alpha: float | jax.Array,
    beta: float | jax.Array,
) -> jax.Array:
    """Scores whole hypotheses so that long ones may win (Wu et al. 2016, eq. 14).

    s(Y, X) = log P(Y | X) / lp(Y) + cp(X; Y);  lp(Y) = (5 + |Y|)^alpha / (5 + 1)^alpha;
    cp(X; Y) = beta * sum_i log(min(sum_j p_ij, 1)), p_ij the weight of source i at target j.
    |Y| counts EOS. A source position never looked at counts as the smallest float, not as
    log 0, so a model without attention is still ranked, and beta 0 is no penalty.

    Args:
      log_prob_BK: log P(Y | X), in nats.
      length_BK: |Y|, target tokens with EOS.
      coverage_BKS: attention weights summed over target positions.
      source_mask_BS: True on real source positions.
      alpha: strength of the length penalty.
      beta: strength of the coverage penalty.

    Returns:
      score_BK.
    """
    check_shapes(log_prob_BK=log_prob_BK, coverage_BKS=coverage_BKS, source_mask_BS=source_mask_BS)
    covered_BKS = jnp.log(jnp.clip(coverage_BKS, jnp.finfo(jnp.float32).tiny, 1.0))
    missed_BK = jnp.sum(jnp.where(source_mask_BS[:, None], covered_BKS, 0.0), axis=2)
    return log_prob_BK / _length_penalty(length_BK, alpha) + beta * missed_BK


def _length_penalty(length: jax.Array, alpha: float | jax.Array) -> jax.Array:
    return ((5.0 + length) / 6.0) ** jnp.asarray(alpha, jnp.float32)


def _give_up(slots: Slots, limit_B: jax.Array, alpha: float | jax.Array, n_best: int) -> Slots:
    """Empties the live slots of sentences whose n-th best nothing live can beat any more.

    Log-probabilities only fall and cp <= 0, so a live hypothesis scores at most its
    log-probability now over the largest lp to come, that of its limit.
    """
    worst_B = lax.top_k(slots.score_BK, n_best)[0][:, -1]
    hope_B = jnp.max(jnp.where(slots.live_BK, slots.log_prob_BK, -jnp.inf), axis=1)
    done_BK = (hope_B / _length_penalty(limit_B, alpha) <= worst_B)[:, None] & slots.live_BK
    return slots._replace(log_prob_BK=jnp.where(done_BK, -jnp.inf, slots.log_prob_BK))


def _roll(
    advance: Advance,
    state: State,
    choose: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    K: int,
    max_length: int,
    source_mask_BS: jax.Array,
    limit_B: jax.Array | None,
    min_length: int | jax.Array,
) -> Hypotheses:
    """Grows K hypotheses a sentence that never meet, each by the token ``choose`` gives."""
    limit_B, slots, history = begin(state, K, max_length, source_mask_BS, limit_B)
    slot_BK = jnp.broadcast_to(jnp.arange(K)[None], slots.token_BK.shape)

    def step(carry: tuple[jax.Array, Slots, History]) -> tuple[jax.Array, Slots, History]:
        t, old, history = carry
        state, log_probs_BKV, align_BKS = advance(old.state, old.token_BK)
        log_probs_BKV, align_BKS = log_probs_BKV.astype(jnp.float32), align_BKS.astype(jnp.float32)
        live_BK = old.live_BK
        may_end_BK = jnp.broadcast_to(t >= min_length, live_BK.shape)
        token_BK = jnp.where((t + 1 >= limit_B)[:, None], EOS, choose(log_probs_BKV, may_end_BK, t))
        token_log_prob_BK = jnp.take_along_axis(log_probs_BKV, token_BK[..., None], axis=2)[..., 0]
        possible_BK = live_BK & (token_log_prob_BK > -jnp.inf)
        token_BK = jnp.where(possible_BK, token_BK, PAD)
        log_prob_BK = old.log_prob_BK + jnp.where(live_BK, token_log_prob_BK, 0.0)
        ends_BK = possible_BK & (token_BK == EOS)
        slots = old._replace(
            state=state,
            token_BK=token_BK,
            length_BK=old.length_BK + possible_BK,
            log_prob_BK=log_prob_BK,
            score_BK=jnp.where(ends_BK, log_prob_BK, old.score_BK),
            finished_BK=old.finished_BK | ends_BK,
        )
        return t + 1, slots, record(history, t, token_BK, slot_BK, token_log_prob_BK, align_BKS)

    _, slots, history = lax.while_loop(
        lambda carry: jnp.any(carry[1].live_BK), step, (jnp.int32(0), slots, history)
    )
    return trace_back(slots, history, slot_BK)


def _uniform(key: jax.Array, index_B: jax.Array, K: int, t: jax.Array) -> jax.Array:
    def one(index: jax.Array, k: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, index), k), t)
        return jax.random.uniform(own)

    return jax.vmap(lambda index: jax.vmap(lambda k: one(index, k))(jnp.arange(K)))(index_B)
