"""Search: which target sequence a model's next-token distributions lead to.

Decides how hypotheses grow, end, compete and are ranked: greedy, beam, sampling. Must
not know the model: it sees what the model remembers of the sentences (``context``, a pytree
whose leaves begin with B), its state (leaves begin with [B, K]) and ``advance(context, state,
token_NK) -> (state, distribution_NK, align_NKS)`` for any N of the sentences, as `survey` gives
distributions: so log-probabilities of a whole vocabulary need not exist. Every function is pure
and meant to be jitted as a whole by its caller.

Rules that all three share. The first input is BOS. PAD and BOS are never produced. EOS is
forbidden before ``min_length`` other tokens. At ``limit_B`` tokens, EOS included, EOS is
forced at its own log-probability; the limit wins over ``min_length``. So every hypothesis
ends in EOS. Rows with limit 0 or without a real source position are done at once: length
0, score 0. A token of log-probability -inf is impossible, and a hypothesis that does not
exist has length 0 and score -inf. A row's result depends neither on the other rows nor on
``places``, how many sentences are searched at a time (`s2s.search.places`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from s2s.batch import BOS, EOS, PAD
from s2s.search.hypotheses import Hypotheses, Slots, State, Step, trace_back
from s2s.search.pick import Distribution, best_tokens, draw, nucleus, softmax, take_rows
from s2s.search.places import Context, Task, Work, make_task, search_all
from s2s.shapes import check_shapes

Advance = Callable[[Context, State, jax.Array], tuple[State, Distribution, jax.Array]]


def greedy(
    advance: Advance,
    context: Context,
    state: State,
    *,
    max_length: int,
    source_mask_BS: jax.Array,
    limit_B: jax.Array | None = None,
    min_length: int | jax.Array = 0,
    places: int | None = None,
) -> Hypotheses:
    """Takes the likeliest token at every step, the lowest id among equals.

    Args:
      advance: the model's next step, for K = 1.
      context: what it reads of the sentences; leaves [B, ...].
      state: its first state; leaves [B, 1, ...].
      max_length: target tokens T there is room for, EOS included.
      source_mask_BS: True on real source positions.
      limit_B: target tokens at most, EOS included; None: ``max_length``.
      min_length: target tokens at least, EOS not counted.
      places: static; sentences searched at a time, in the order of their rows; None: all.

    Returns:
      One hypothesis a sentence, its score its log-probability.
    """

    def choose(work: Work, next_NK: Distribution, may_end_NK: jax.Array) -> jax.Array:
        return _best_of_each(next_NK, may_end_NK, 1)[1][..., 0]

    task = make_task(context, state, max_length=max_length, source_mask_BS=source_mask_BS, limit_B=limit_B)
    return _roll(advance, task, choose, 1, max_length, min_length, places)


def sample(
    advance: Advance,
    context: Context,
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
    places: int | None = None,
) -> Hypotheses:
    """Draws independent samples from the model's distribution, tempered, then truncated.

    p(y) is proportional to exp(log p(y) / temperature) over the ``top_k`` likeliest tokens (Fan et
    al. 2018), of these over the fewest likeliest whose renormalised probability reaches
    ``top_p`` (Holtzman et al. 2020, eq. 2-3; at least one). The lowest id goes first among equals.

    Args:
      advance: the model's next step, for K = ``samples``.
      context: what it reads of the sentences; leaves [B, ...].
      state: its first state, the same for all samples; leaves [B, 1, ...].
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
      places: static; sentences searched at a time, in the order of their rows; None: all.

    Returns:
      Samples in the order of their drawing, not sorted. Log-probabilities, and the score, are the
      model's own: of temperature 1 and not truncated.
    """

    def choose(work: Work, next_NK: Distribution, may_end_NK: jax.Array) -> jax.Array:
        # A division by what is above 0 keeps the order.
        next_NK = jax.tree.map(lambda x: x / temperature, next_NK)
        logits_NKV = next_NK.logits
        uniform_NK = _uniform(key, work.task.index_B, samples, work.t_N)
        if top_k > 0:
            best, token = _best_of_each(next_NK, may_end_NK, min(top_k, logits_NKV.shape[-1]))
            kept = nucleus(softmax(best), top_p)
            return jnp.take_along_axis(token, draw(kept, uniform_NK)[..., None], 2)[..., 0]
        special = jnp.arange(logits_NKV.shape[-1])[None, None]
        forbidden = (special == PAD) | (special == BOS) | ((special == EOS) & ~may_end_NK[..., None])
        return draw(nucleus(softmax(jnp.where(forbidden, -jnp.inf, logits_NKV)), top_p), uniform_NK)

    task = make_task(
        context,
        state,
        max_length=max_length,
        source_mask_BS=source_mask_BS,
        limit_B=limit_B,
        index_B=index_B,
    )
    return _roll(advance, task, choose, samples, max_length, min_length, places)


def beam(
    advance: Advance,
    context: Context,
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
    places: int | None = None,
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
      advance: the model's next step, for K = ``beam``.
      context: what it reads of the sentences; leaves [B, ...].
      state: its first state, that of the empty hypothesis; leaves [B, 1, ...].
      beam: slots a sentence, K.
      max_length: target tokens T there is room for, EOS included.
      source_mask_BS: True on real source positions.
      limit_B: target tokens at most, EOS included; None: ``max_length``.
      min_length: target tokens at least, EOS not counted.
      length_penalty: alpha of `gnmt_score`, at least 0; may be traced.
      coverage_penalty: beta of `gnmt_score`, at least 0; may be traced.
      n_best: hypotheses to return; None: all K. With fewer, a sentence is done as soon as no live
        hypothesis can beat its n-th best: what is returned stays the same.
      places: static; sentences searched at a time, in the order of their rows; None: all.

    Returns:
      The ``n_best`` best hypotheses of each sentence, all different, best first; among equal scores
      the one that ended first. [B, n_best, ...].
    """
    K = beam
    n_best = K if n_best is None else n_best
    if not 1 <= n_best <= K:
        raise ValueError(f"n_best={n_best} must be at least 1 and at most beam={K}")
    task = make_task(context, state, max_length=max_length, source_mask_BS=source_mask_BS, limit_B=limit_B)

    def one_live(slots: Slots) -> Slots:
        # All slots begin alike: one of them expands, or each hypothesis would appear K times.
        lives_NK = (jnp.arange(K) == 0)[None] | slots.finished_NK
        return slots._replace(log_prob_NK=jnp.where(lives_NK, 0.0, -jnp.inf))

    def step(work: Work) -> tuple[Slots, Step]:
        own, t_N, old = work.task, work.t_N, work.slots
        state, (logits_NKV, total_NK, highest_NKC), align_NKS = _advance(advance, work)
        live_NK = old.live_NK
        last_NK = jnp.broadcast_to((t_N + 1 >= own.limit_B)[:, None], live_NK.shape)
        # Relative to the best, K = 1 compares bare logits as greedy search does, and long
        # hypotheses lose no precision.
        base_NK = jnp.where(live_NK, old.log_prob_NK - total_NK, -jnp.inf)
        best_N = jnp.max(base_NK, axis=1, keepdims=True)
        base_NK = base_NK - jnp.where(best_N > -jnp.inf, best_N, 0.0)
        # Finished slots have one continuation that nothing beats, hypotheses at their limit have EOS.
        ending_NK = jnp.where(last_NK, base_NK + logits_NKV[:, :, EOS], -jnp.inf)
        only_NK = jnp.where(old.finished_NK, jnp.inf, ending_NK)
        only_token_NK = jnp.where(old.finished_NK, PAD, EOS)
        may_end_NK = jnp.broadcast_to((t_N >= min_length)[:, None], live_NK.shape)
        open_NK, parent_NK, token_NK = best_tokens(
            logits_NKV, highest_NKC, jnp.where(last_NK, -jnp.inf, base_NK), may_end_NK, K
        )
        value_NK, place_NK = lax.top_k(jnp.concatenate([only_NK, open_NK], axis=1), K)
        slot_NK = jnp.broadcast_to(jnp.arange(K)[None], live_NK.shape)
        parent_NK = take_rows(jnp.concatenate([slot_NK, parent_NK], axis=1), place_NK)
        token_NK = take_rows(jnp.concatenate([only_token_NK, token_NK], axis=1), place_NK)

        was_finished_NK = take_rows(old.finished_NK, parent_NK)
        grows_NK = ~was_finished_NK & (value_NK > -jnp.inf)
        token_NK = jnp.where(grows_NK, token_NK, PAD)
        token_logit_NK = jax.vmap(lambda x, parent, token: x[parent, token])(logits_NKV, parent_NK, token_NK)
        token_log_prob_NK = jnp.where(grows_NK, token_logit_NK - take_rows(total_NK, parent_NK), 0.0)
        log_prob_NK = take_rows(old.log_prob_NK, parent_NK) + token_log_prob_NK
        ends_NK = grows_NK & (token_NK == EOS)
        length_NK = take_rows(old.length_NK, parent_NK) + grows_NK
        coverage_NKS = take_rows(old.coverage_NKS + align_NKS, parent_NK)
        score_NK = gnmt_score(
            log_prob_NK, length_NK, coverage_NKS, own.source_mask_BS, length_penalty, coverage_penalty
        )
        slots = Slots(
            state=jax.tree.map(lambda leaf: take_rows(leaf, parent_NK), state),
            token_NK=token_NK,
            length_NK=length_NK,
            log_prob_NK=jnp.where(grows_NK | was_finished_NK, log_prob_NK, -jnp.inf),
            score_NK=jnp.where(ends_NK, score_NK, take_rows(old.score_NK, parent_NK)),
            finished_NK=was_finished_NK | ends_NK,
            coverage_NKS=coverage_NKS,
        )
        if n_best < K:
            slots = _give_up(slots, own.limit_B, length_penalty, n_best)
        return slots, Step(token_NK, parent_NK, token_log_prob_NK, align_NKS)

    ends, history = search_all(step, one_live, task, K, places, max_length)
    _, order_BK = lax.top_k(ends.score_BK, n_best)
    return trace_back(ends, history, order_BK)


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


def _give_up(slots: Slots, limit_N: jax.Array, alpha: float | jax.Array, n_best: int) -> Slots:
    """Empties the live slots of sentences whose n-th best nothing live can beat any more.

    Log-probabilities only fall and cp <= 0, so a live hypothesis scores at most its
    log-probability now over the largest lp to come, that of its limit.
    """
    worst_N = lax.top_k(slots.score_NK, n_best)[0][:, -1]
    hope_N = jnp.max(jnp.where(slots.live_NK, slots.log_prob_NK, -jnp.inf), axis=1)
    done_NK = (hope_N / _length_penalty(limit_N, alpha) <= worst_N)[:, None] & slots.live_NK
    return slots._replace(log_prob_NK=jnp.where(done_NK, -jnp.inf, slots.log_prob_NK))


def _roll(
    advance: Advance,
    task: Task,
    choose: Callable[[Work, Distribution, jax.Array], jax.Array],
    K: int,
    max_length: int,
    min_length: int | jax.Array,
    places: int | None,
) -> Hypotheses:
    """Grows K hypotheses a sentence that never meet, each by the token ``choose`` gives."""

    def step(work: Work) -> tuple[Slots, Step]:
        own, t_N, old = work.task, work.t_N, work.slots
        state, next_NK, align_NKS = _advance(advance, work)
        live_NK = old.live_NK
        may_end_NK = jnp.broadcast_to((t_N >= min_length)[:, None], live_NK.shape)
        token_NK = choose(work, next_NK, may_end_NK)
        token_NK = jnp.where((t_N + 1 >= own.limit_B)[:, None], EOS, token_NK)
        token_logit_NK = jnp.take_along_axis(next_NK.logits, token_NK[..., None], axis=2)[..., 0]
        token_log_prob_NK = token_logit_NK - next_NK.total
        possible_NK = live_NK & (token_log_prob_NK > -jnp.inf)
        token_NK = jnp.where(possible_NK, token_NK, PAD)
        log_prob_NK = old.log_prob_NK + jnp.where(live_NK, token_log_prob_NK, 0.0)
        ends_NK = possible_NK & (token_NK == EOS)
        slots = old._replace(
            state=state,
            token_NK=token_NK,
            length_NK=old.length_NK + possible_NK,
            log_prob_NK=log_prob_NK,
            score_NK=jnp.where(ends_NK, log_prob_NK, old.score_NK),
            finished_NK=old.finished_NK | ends_NK,
        )
        return slots, Step(token_NK, _own_slots(live_NK), token_log_prob_NK, align_NKS)

    ends, history = search_all(step, lambda slots: slots, task, K, places, max_length)
    return trace_back(ends, history, _own_slots(ends.finished_BK))


def _advance(advance: Advance, work: Work) -> tuple[State, Distribution, jax.Array]:
    """One step of the model, in float32 what is compared and kept."""
    state, next_NK, align_NKS = advance(work.task.context, work.slots.state, work.slots.token_NK)
    logits_NKV, highest_NKC = next_NK.logits.astype(jnp.float32), next_NK.highest.astype(jnp.float32)
    next_NK = next_NK._replace(logits=logits_NKV, highest=highest_NKC)
    return state, next_NK, align_NKS.astype(jnp.float32)


def _best_of_each(next_NK: Distribution, may_end_NK: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k highest logits of every hypothesis, and their tokens: [N, K, k]."""
    logits, highest, may_end = (x[:, :, None] for x in (next_NK.logits, next_NK.highest, may_end_NK))
    values, _, token = best_tokens(logits, highest, jnp.zeros(may_end.shape), may_end, k)
    return values, token


def _own_slots(like_NK: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(like_NK.shape[1], dtype=jnp.int32)[None], like_NK.shape)


def _uniform(key: jax.Array, index_N: jax.Array, K: int, t_N: jax.Array) -> jax.Array:
    def one(index: jax.Array, k: jax.Array, t: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, index), k), t)
        return jax.random.uniform(own)

    every = jax.vmap(jax.vmap(one, in_axes=(None, 0, None)), in_axes=(0, None, 0))
    return every(index_N, jnp.arange(K), t_N)
