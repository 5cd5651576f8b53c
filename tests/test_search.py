from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from s2s import search
from s2s.batch import BOS, EOS, PAD
from s2s.search.pick import survey

_spec = importlib.util.spec_from_file_location("search_oracle", Path(__file__).with_name("search_oracle.py"))
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

BUCKETS = 11


class Stand:
    """A random table for a model: log p(next | all tokens before, row), by a hash of the history.

    The context is the row. The state carries the row too, the step and the hash, so it is wrong after
    a wrong reordering, and tokens are impossible where it is not that of the context.
    """

    def __init__(self, seed: int, B=4, V=7, S=5, T=8, sharpness=1.5):
        rng = np.random.default_rng(seed)
        self.B, self.V, self.S, self.T = B, V, S, T
        logits = sharpness * rng.normal(size=(B, BUCKETS, T, V))
        logits[..., EOS] += 0.5
        self.log_probs = np.array(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))
        length = rng.integers(2, S + 1, B)
        self.mask = np.arange(S)[None] < length[:, None]
        weights = rng.random((B, BUCKETS, T, S)) ** 3 * self.mask[:, None, None]
        self.align = np.asarray(weights / weights.sum(-1, keepdims=True), np.float32)

    def start(self, rows=None):
        """The context and the first state, as searches take them."""
        rows = jnp.asarray(np.arange(self.B) if rows is None else rows, jnp.int32)
        row = rows[:, None]
        return rows, {
            "row": row,
            "at": (jnp.zeros_like(row), jnp.zeros_like(row)),
            "empty": jnp.zeros((*row.shape, 0)),
            "wide": jnp.zeros((*row.shape, 2, 3)),
        }

    def advance(self, context, state, token_NK):
        return advance_by((self.log_probs, self.align), context, state, token_NK)

    def model(self, row):
        def next_(prefix):
            seen = 0
            for token in (BOS, *prefix):
                seen = (seen * 5 + token) % BUCKETS
            here = (row, seen, min(len(prefix), self.T - 1))
            return self.log_probs[here].astype(np.float64), self.align[here].astype(np.float64)

        return next_

    def run(self, name, K=1, rows=None, **kw):
        """Searches under jit; every argument that may be traced is."""
        rows = list(range(self.B)) if rows is None else list(rows)
        static = {"max_length": kw.pop("max_length", self.T)}
        static |= {option: kw.pop(option) for option in ("n_best", "top_k", "places") if option in kw}
        kw.setdefault("source_mask_BS", self.mask[rows])
        kw.setdefault("limit_B", np.full(len(rows), self.T, np.int32))
        if name != "greedy":
            static[{"beam": "beam", "sample": "samples"}[name]] = K
        if name == "sample":
            kw.setdefault("index_B", np.asarray(rows, np.int32))
            kw.setdefault("key", jax.random.key(0))
        found = jitted(name, tuple(static.items()))
        return jax.tree.map(np.asarray, found((self.log_probs, self.align), self.start(rows), kw))


def advance_by(tables, context, state, token_NK):
    log_probs, align = map(jnp.asarray, tables)
    step, seen = state["at"]
    seen = (seen * 5 + token_NK) % BUCKETS
    place = (state["row"], seen, jnp.minimum(step, log_probs.shape[2] - 1))
    own = state["row"] == context[:, None]
    log_probs_NKV = jnp.where(own[..., None], log_probs[place], -jnp.inf)
    return {**state, "at": (step + 1, seen)}, of_log_probs(log_probs_NKV), align[place]


def of_log_probs(log_probs):
    """As they are, whatever their sum."""
    return survey(log_probs)._replace(total=jnp.zeros(log_probs.shape[:-1]))


@functools.cache
def jitted(name, static):
    """One compilation for all tests with the same shapes."""

    def run(tables, start, kw):
        advance = functools.partial(advance_by, tables)
        return getattr(search, name)(advance, *start, **dict(static), **kw)

    return jax.jit(run)


def same(found, b, k, path):
    """Hypothesis k of row b is the oracle's path."""
    n = len(path.tokens)
    assert found.tokens_BKT[b, k].tolist() == [*path.tokens, *[PAD] * (found.tokens_BKT.shape[2] - n)]
    assert found.length_BK[b, k] == n
    np.testing.assert_allclose(found.log_prob_BK[b, k], path.log_prob, rtol=2e-6)
    np.testing.assert_allclose(found.score_BK[b, k], path.score, rtol=2e-5)
    np.testing.assert_allclose(found.token_log_prob_BKT[b, k, :n], path.token_log_probs, rtol=1e-6)
    np.testing.assert_allclose(found.align_BKTS[b, k, :n], np.array(path.aligns), rtol=1e-6)
    assert not found.token_log_prob_BKT[b, k, n:].any() and not found.align_BKTS[b, k, n:].any()


def missing(found, b, k):
    assert found.length_BK[b, k] == 0 and not found.tokens_BKT[b, k].any()
    assert found.score_BK[b, k] == found.log_prob_BK[b, k] == -np.inf
    assert not found.token_log_prob_BKT[b, k].any() and not found.align_BKTS[b, k].any()


LIMITS = np.array([8, 3, 1, 6], np.int32)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("min_length", [0, 2])
def test_greedy_is_the_oracle(seed, min_length):
    stand = Stand(seed, V=[7, 150][seed % 2])
    found = stand.run("greedy", limit_B=jnp.asarray(LIMITS), min_length=min_length)
    for b in range(stand.B):
        same(found, b, 0, oracle.greedy(stand.model(b), int(LIMITS[b]), min_length))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("alpha, beta", [(0.0, 0.0), (1.0, 0.0), (0.6, 0.2), (1.5, 1.0)])
def test_beam_is_the_oracle(seed, alpha, beta):
    stand = Stand(seed, V=[7, 150, 64, 5][seed % 4])
    K, min_length = [2, 3, 5, 12][seed % 4], [0, 0, 2, 4][seed // 2]
    found = stand.run(
        "beam",
        K,
        limit_B=jnp.asarray(LIMITS),
        min_length=min_length,
        length_penalty=alpha,
        coverage_penalty=beta,
    )
    for b in range(stand.B):
        paths = oracle.beam(stand.model(b), K, int(LIMITS[b]), min_length, stand.mask[b], alpha, beta)
        for k, path in enumerate(paths):
            same(found, b, k, path)
        for k in range(len(paths), K):
            missing(found, b, k)


@pytest.mark.parametrize("seed", range(10))
def test_beam_1_is_greedy(seed):
    stand = Stand(seed, B=8, V=[6, 100][seed % 2], T=12, sharpness=0.7)
    kw = dict(limit_B=jnp.asarray([12, 7, 1, 12, 12, 3, 0, 12]), min_length=seed % 3)
    greedy = stand.run("greedy", **kw)
    beam = stand.run("beam", 1, length_penalty=1.3, **kw)
    for field in ("tokens_BKT", "length_BK", "log_prob_BK", "token_log_prob_BKT", "align_BKTS"):
        np.testing.assert_array_equal(getattr(greedy, field), getattr(beam, field))


def test_beam_1_is_greedy_where_a_sum_would_round_away_the_difference():
    log_probs = np.full(6, -30.0, np.float32)
    log_probs[5] = -1e-7  # beats token 4, but not after -30 is added
    log_probs[4] = -2e-7
    first = np.full(6, -30.0, np.float32)

    def advance(context, state, token_NK):
        here = jnp.where((token_NK == BOS)[..., None], first[None, None], log_probs[None, None])
        return state, of_log_probs(here), jnp.ones((1, 1, 1))

    kw = dict(max_length=4, source_mask_BS=jnp.ones((1, 1), bool), min_length=3)
    greedy = search.greedy(advance, (), (), **kw)
    assert greedy.tokens_BKT[0, 0].tolist() == [3, 5, 5, EOS]
    np.testing.assert_array_equal(search.beam(advance, (), (), beam=1, **kw).tokens_BKT, greedy.tokens_BKT)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha, beta, min_length", [(0.0, 0.0, 0), (1.0, 0.3, 0), (0.7, 0.0, 2)])
def test_a_beam_as_wide_as_all_paths_finds_the_best_by_enumeration(seed, alpha, beta, min_length):
    stand = Stand(seed, B=2, V=6, T=4)
    paths = [oracle.everything(stand.model(b), 4, min_length, stand.mask[b], alpha, beta) for b in range(2)]
    K = len(paths[0]) + 2
    found = stand.run("beam", K, length_penalty=alpha, coverage_penalty=beta, min_length=min_length)
    for b in range(2):
        for k, path in enumerate(paths[b]):
            same(found, b, k, path)
        missing(found, b, K - 2)
        missing(found, b, K - 1)


@pytest.mark.parametrize("n_best", [1, 2, 4])
@pytest.mark.parametrize("alpha, beta", [(0.0, 0.0), (1.0, 0.0), (1.0, 0.4)])
def test_fewer_wanted_are_the_first_of_all(n_best, alpha, beta):
    for seed in range(5):
        stand = Stand(seed, T=10)
        kw = dict(length_penalty=alpha, coverage_penalty=beta, limit_B=jnp.asarray([10, 9, 1, 6]))
        whole = stand.run("beam", 6, **kw)
        some = stand.run("beam", 6, n_best=n_best, **kw)
        for left, right in zip(some, whole, strict=True):
            assert left.shape[1] == n_best
            np.testing.assert_array_equal(left, right[:, :n_best])


def steps_taken(search_, stand, *args, **kw):
    """Calls of advance, counted on the host."""
    calls = []

    def advance(context, state, token_NK):
        jax.debug.callback(lambda: calls.append(1))
        return stand.advance(context, state, token_NK)

    jax.block_until_ready(search_(advance, *args, **kw))
    jax.effects_barrier()
    return len(calls)


def test_search_stops_when_nothing_is_left_to_win():
    stand = Stand(0, B=2, T=50)
    stand.log_probs[:] = -20.0
    stand.log_probs[:, :, 0, 3] = stand.log_probs[:, :, 1:, EOS] = -0.1
    stand.log_probs[:, :, 1:, 3] = -2.4
    kw = dict(max_length=50, source_mask_BS=jnp.asarray(stand.mask))
    assert steps_taken(search.greedy, stand, *stand.start(), **kw) <= 2
    wide = steps_taken(search.beam, stand, *stand.start(), beam=4, n_best=4, **kw)
    assert steps_taken(search.beam, stand, *stand.start(), beam=4, n_best=1, **kw) <= 2 < wide < 10
    filler = {**kw, "source_mask_BS": jnp.zeros_like(kw["source_mask_BS"])}
    assert steps_taken(search.beam, stand, *stand.start(), beam=4, **filler) == 0
    assert steps_taken(search.greedy, stand, *stand.start(), limit_B=jnp.zeros(2, int), **kw) == 0


@pytest.mark.parametrize("first, wins, steps", [(-1.5, True, 6), (-1.9, False, 1)])
def test_the_bound_is_what_a_live_hypothesis_can_reach(first, wins, steps):
    # EOS at once scores -1; token 3, sure of itself until the limit of 6, scores first * 6 / 11.
    stand = Stand(0, B=1, V=5, T=6)
    stand.log_probs[:] = -20.0
    stand.log_probs[:, :, 0, EOS], stand.log_probs[:, :, 0, 3] = -1.0, first
    stand.log_probs[:, :, 1:, 3] = stand.log_probs[:, :, 5, EOS] = 0.0
    kw = dict(beam=2, max_length=6, source_mask_BS=stand.mask, length_penalty=1.0, n_best=1)
    found = search.beam(stand.advance, *stand.start(), **kw)
    assert found.length_BK.tolist() == [[6 if wins else 1]]
    np.testing.assert_allclose(found.score_BK, [[first * 6 / 11 if wins else -1.0]], rtol=1e-6)
    assert steps_taken(search.beam, stand, *stand.start(), **kw) == steps


@pytest.mark.parametrize("name", ["greedy", "beam", "sample"])
def test_other_rows_change_nothing(name):
    stand = Stand(3, B=6, T=9)
    K = 1 if name == "greedy" else 4
    limit = np.array([9, 2, 7, 9, 5, 9])
    extra = dict(length_penalty=1.0, coverage_penalty=0.1, n_best=2) if name == "beam" else {}
    whole = stand.run(name, K, limit_B=jnp.asarray(limit), **extra)
    order = [5, 2, 0, 4, 1, 3]
    mixed = stand.run(name, K, rows=order, limit_B=jnp.asarray(limit[order]), **extra)
    mask = np.concatenate([stand.mask[:2], np.zeros_like(stand.mask[:2])])
    padded = stand.run(
        name, K, rows=[0, 1, 4, 5], source_mask_BS=mask, limit_B=jnp.asarray([9, 2, 9, 9]), **extra
    )
    alone = stand.run(name, K, rows=[0], limit_B=jnp.asarray([9]), **extra)
    for field, value in whole._asdict().items():
        np.testing.assert_array_equal(getattr(mixed, field), value[order])
        np.testing.assert_array_equal(getattr(padded, field)[:2], value[:2])
        np.testing.assert_array_equal(getattr(alone, field), value[:1])
        assert not getattr(padded, field)[2:].any(), "filler rows: length 0, score 0"


@pytest.mark.parametrize("places", [1, 2, 5, 13])
@pytest.mark.parametrize("name", ["greedy", "beam", "sample"])
def test_how_many_are_searched_at_a_time_changes_nothing(name, places):
    stand = Stand(11, B=14, T=9, sharpness=0.7)
    stand.mask[6] = False
    K = 1 if name == "greedy" else 4
    limit = np.array([9, 2, 0, 7, 9, 5, 9, 1, 9, 8, 9, 3, 0, 0])
    kw = dict(limit_B=jnp.asarray(limit), min_length=1)
    kw |= dict(length_penalty=1.0, coverage_penalty=0.1, n_best=2) if name == "beam" else {}
    together = stand.run(name, K, **kw)
    assert len(set(together.length_BK[:, 0].tolist())) > 3
    for field, value in stand.run(name, K, places=places, **kw)._asdict().items():
        np.testing.assert_array_equal(value, getattr(together, field), err_msg=field)


def test_what_is_done_makes_room():
    stand = Stand(0, B=32, T=12)
    stand.log_probs[..., EOS] = -20.0
    kw = dict(max_length=12, source_mask_BS=jnp.asarray(stand.mask), limit_B=jnp.asarray([12, 1, 1, 1] * 8))
    by_fours = 8 * 12
    needed = (8 * 12 + 24 * 1) / 4
    for search_, extra in ((search.greedy, {}), (search.beam, {"beam": 3, "n_best": 1})):
        assert steps_taken(search_, stand, *stand.start(), **kw, **extra) == 12
        taken = steps_taken(search_, stand, *stand.start(), places=4, **kw, **extra)
        assert needed <= taken <= 1.4 * needed < by_fours


def test_a_sentence_that_is_done_stays_as_it_is():
    # Row 0 gives up 3 5 for 4 EOS, which is as likely and in the slot behind it; row 1 goes on.
    likely = {(0, BOS): (3, 4), (0, 3): (5,), (0, 4): (EOS,), (0, 5): (5,), (1, BOS): (5,), (1, 5): (5,)}
    log_probs = np.full((2, 6, 6), -20.0, np.float32)
    for (row, token), following in likely.items():
        log_probs[row, token, list(following)] = 0.0

    def advance(context, state, token_NK):
        logits_NKV = jnp.asarray(log_probs)[context[:, None], token_NK]
        return state, of_log_probs(logits_NKV), jnp.ones((*token_NK.shape, 1))

    kw = dict(beam=2, n_best=1, max_length=6, source_mask_BS=jnp.ones((2, 1), bool))
    found = search.beam(advance, jnp.arange(2), (), **kw)
    assert found.tokens_BKT[0, 0].tolist() == [4, EOS, PAD, PAD, PAD, PAD]


@pytest.mark.parametrize("name", ["greedy", "beam", "sample"])
def test_log_probabilities_are_logits_less_their_total(name):
    stand = Stand(9, V=30)
    kw = {} if name == "greedy" else {"beam": 4, "length_penalty": 1.0} if name == "beam" else {}
    kw |= dict(samples=3, key=jax.random.key(0), index_B=jnp.arange(4)) if name == "sample" else {}
    kw |= dict(max_length=8, source_mask_BS=jnp.asarray(stand.mask))

    def shifted(context, state, token_NK):
        state, next_NK, align_NKS = stand.advance(context, state, token_NK)
        by_NK = jnp.sin(state["at"][1] + 1.0) * 4
        moved_NK = survey(next_NK.logits + by_NK[..., None])
        return state, moved_NK._replace(total=next_NK.total + by_NK), align_NKS

    plain, moved = (getattr(search, name)(f, *stand.start(), **kw) for f in (stand.advance, shifted))
    for left, right in zip(plain, moved, strict=True):
        np.testing.assert_allclose(left, right, atol=5e-6)


@pytest.mark.parametrize("name", ["greedy", "beam", "sample"])
def test_every_hypothesis_keeps_the_rules(name):
    K = 1 if name == "greedy" else 6
    for seed in range(4):
        stand = Stand(seed, B=4, V=9, T=12, sharpness=3.0)
        stand.log_probs[..., [PAD, BOS]] = -1e-6  # tempting
        limit, least = np.array([12, 5, 2, 1]), 4
        found = stand.run(name, K, limit_B=jnp.asarray(limit), min_length=least)
        for b, k in itertools.product(range(4), range(K)):
            n, tokens = found.length_BK[b, k], found.tokens_BKT[b, k]
            if n == 0:
                missing(found, b, k)
                continue
            assert min(least + 1, limit[b]) <= n <= limit[b]
            assert tokens[n - 1] == EOS and (tokens[: n - 1] >= 3).all() and not tokens[n:].any()
            # The log-probability of these very tokens, from the table.
            model = stand.model(b)
            expected = [model(tuple(tokens[:i]))[0][tokens[i]] for i in range(n)]
            np.testing.assert_allclose(found.token_log_prob_BKT[b, k, :n], expected, rtol=1e-6)
            np.testing.assert_allclose(found.log_prob_BK[b, k], sum(expected), rtol=2e-6)
            # The attention of this very history: wrong if a parent is.
            expected = [model(tuple(tokens[:i]))[1] for i in range(n)]
            np.testing.assert_allclose(found.align_BKTS[b, k, :n], expected, rtol=1e-6)
        if name == "beam":
            assert (np.diff(found.score_BK[:2], axis=1) <= 0).all()
            for b in range(2):
                assert len({tuple(tokens) for tokens in found.tokens_BKT[b]}) == K


def test_one_slot_fills_where_only_one_hypothesis_exists():
    stand = Stand(0)
    found = stand.run("beam", 3, limit_B=jnp.asarray([1, 1, 1, 1]))
    for b in range(4):
        assert found.length_BK[b].tolist() == [1, 0, 0] and found.tokens_BKT[b, 0, 0] == EOS
        missing(found, b, 1)
        missing(found, b, 2)


def test_impossible_tokens_are_never_taken():
    stand = Stand(1, T=5)
    stand.log_probs[..., 4:] = -np.inf
    found = stand.run("beam", 8)
    assert set(found.tokens_BKT.ravel().tolist()) <= {PAD, EOS, 3}
    assert (found.length_BK > 0).sum(1).tolist() == [5] * 4, "EOS after 0 to 4 tokens"
    stand.log_probs[:] = -np.inf
    for name in ("greedy", "beam", "sample"):
        missing(stand.run(name, 2 if name != "greedy" else 1), 0, 0)


def test_equal_candidates_go_by_beam_then_token():
    def advance(context, state, token_NK):
        like = token_NK.shape
        return state, of_log_probs(jnp.full((*like, 200), -1.0)), jnp.zeros((*like, 1))

    kw = dict(max_length=3, source_mask_BS=jnp.ones((1, 1), bool), min_length=2)
    found = search.beam(advance, (), (), beam=3, **kw)
    assert found.tokens_BKT[0].tolist() == [[3, 3, EOS], [3, 4, EOS], [3, 5, EOS]]


def test_a_model_without_attention_is_ranked_by_log_probability():
    stand = Stand(2)
    stand.align[:] = 0.0
    plain = stand.run("beam", 4)
    for beta in (0.0, 0.5):
        found = stand.run("beam", 4, coverage_penalty=beta)
        np.testing.assert_array_equal(found.tokens_BKT, plain.tokens_BKT)
        assert np.isfinite(found.score_BK[[0, 1, 3]]).all()


def test_gnmt_score_by_hand():
    mask = jnp.asarray([[True, True, False]])
    coverage = jnp.asarray([[[0.5, 1.7, 0.0]]])
    found = search.gnmt_score(jnp.full((1, 1), -6.0), jnp.full((1, 1), 7), coverage, mask, 1.0, 0.2)
    np.testing.assert_allclose(found, [[-6.0 / 2.0 + 0.2 * math.log(0.5)]], rtol=1e-6)


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 2, 1.0), (1.3, 0, 0.6), (1.0, 3, 0.7)]
)
def test_samples_have_the_distribution_of_the_oracle(temperature, top_k, top_p):
    stand = Stand(5, B=2, V=6, T=3, sharpness=1.0)
    n = 4000
    found = stand.run("sample", n, temperature=temperature, top_k=top_k, top_p=top_p)
    allowed = np.arange(6) >= 2
    for b in range(2):
        expected = {}
        for path in oracle.everything(stand.model(b), 3, 0, stand.mask[b], 0.0, 0.0):
            p = 1.0
            for i, token in enumerate(path.tokens[:2]):
                log_probs, _ = stand.model(b)(path.tokens[:i])
                p *= oracle.truncated(log_probs, allowed, temperature, top_k, top_p)[token]
            expected[path.tokens] = p
        assert math.isclose(sum(expected.values()), 1.0, rel_tol=1e-6)
        counts = dict.fromkeys(expected, 0)
        for tokens, length in zip(found.tokens_BKT[b], found.length_BK[b], strict=True):
            counts[tuple(tokens[:length].tolist())] += 1
        for tokens, p in expected.items():
            if p == 0.0:
                assert counts[tokens] == 0, "outside the truncated support"
        likely = [t for t, p in expected.items() if n * p >= 5]
        chi2 = sum((counts[t] - n * expected[t]) ** 2 / (n * expected[t]) for t in likely)
        freedom = max(len(likely) - 1, 1)
        assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 4, "about one in 10,000"


def test_samples_depend_on_key_sentence_and_number_alone():
    stand = Stand(4, T=10)
    found = stand.run("sample", 5)
    np.testing.assert_array_equal(stand.run("sample", 3).tokens_BKT, found.tokens_BKT[:, :3])
    other = stand.run("sample", 5, key=jax.random.key(1))
    assert (other.tokens_BKT != found.tokens_BKT).any(axis=(1, 2)).all()
    # The same sentence under two numbers draws differently, and its samples differ.
    twice = stand.run("sample", 5, rows=[0, 0], index_B=jnp.asarray([0, -1]))
    np.testing.assert_array_equal(twice.tokens_BKT[0], found.tokens_BKT[0])
    assert (twice.tokens_BKT[0] != twice.tokens_BKT[1]).any()
    assert len({tuple(tokens) for tokens in found.tokens_BKT[0]}) > 1


def test_one_likeliest_token_is_greedy():
    stand = Stand(6, V=90)
    greedy = stand.run("greedy")
    for kw in (dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-4)):
        found = stand.run("sample", 2, **kw)
        for k in range(2):
            np.testing.assert_array_equal(found.tokens_BKT[:, k], greedy.tokens_BKT[:, 0])
            np.testing.assert_array_equal(found.log_prob_BK[:, k], greedy.log_prob_BK[:, 0])


def test_penalties_and_limits_do_not_compile_again():
    stand = Stand(0)

    @jax.jit
    def run(start, mask, limit, alpha, beta, least):
        return search.beam(
            stand.advance,
            *start,
            beam=3,
            max_length=8,
            source_mask_BS=mask,
            limit_B=limit,
            min_length=least,
            length_penalty=alpha,
            coverage_penalty=beta,
        )

    for alpha, beta, least in ((0.0, 0.0, 0), (1.0, 0.2, 2)):
        traced = run(stand.start(), stand.mask, LIMITS, alpha, beta, least)
        direct = stand.run(
            "beam",
            3,
            limit_B=jnp.asarray(LIMITS),
            length_penalty=alpha,
            coverage_penalty=beta,
            min_length=least,
        )
        np.testing.assert_array_equal(traced.tokens_BKT, direct.tokens_BKT)
    assert run._cache_size() == 1


def by_replicas(name):
    """A search of four sentences by a table and limits of its own, and two replicas of these."""
    stand = Stand(0)
    tables = jnp.asarray(np.stack([Stand(seed).log_probs for seed in (0, 7)]))
    limits = jnp.asarray([[8, 8, 1, 8], [2, 1, 0, 0]])

    def one(table, limit_B):
        advance = functools.partial(advance_by, (table, stand.align))
        kw = {
            "greedy": {},
            "beam": dict(beam=3, length_penalty=1.0, n_best=2),
            "sample": dict(samples=3, key=jax.random.key(0), index_B=jnp.arange(4), top_p=0.8),
        }[name]
        kw |= dict(max_length=8, source_mask_BS=jnp.asarray(stand.mask), limit_B=limit_B, places=2)
        return getattr(search, name)(advance, *stand.start(), **kw)

    return one, tables, limits


@pytest.mark.parametrize("name", ["greedy", "beam", "sample"])
def test_replicas_by_vmap(name):
    one, *replicas = by_replicas(name)
    run = jax.jit(one)
    both = jax.jit(jax.vmap(one))(*replicas)
    for r in range(2):
        alone = run(*(leaf[r] for leaf in replicas))
        for left, right in zip(both, alone, strict=True):
            np.testing.assert_allclose(left[r], right, rtol=1e-6)


def test_replicas_share_their_loops():
    """Of each its own, and every step would choose between old and new of all that the loop carries."""
    one, *replicas = by_replicas("beam")

    def conditions(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "while":
                yield from (aval.size for aval in equation.params["cond_jaxpr"].out_avals)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from conditions(inner)

    found = list(conditions(jax.make_jaxpr(jax.vmap(one))(*replicas).jaxpr))
    assert len(found) >= 3 and set(found) == {1}


def test_wrong_arguments_are_refused_by_name():
    stand = Stand(0)
    context, state = stand.start()
    kw = dict(beam=3, max_length=8, source_mask_BS=jnp.asarray(stand.mask))
    with pytest.raises(ValueError, match=r"state\['row'\] has shape \(4, 2\).*\[4, 1\]"):
        search.beam(stand.advance, context, {"row": jnp.tile(state["row"], (1, 2))}, **kw)
    with pytest.raises(ValueError, match=r"context has shape \(3,\).*\[4\]"):
        search.beam(stand.advance, context[:3], state, **kw)
    with pytest.raises(ValueError, match="places=0"):
        stand.run("beam", 3, places=0)
    with pytest.raises(ValueError, match="n_best=4"):
        stand.run("beam", 3, n_best=4)
    with pytest.raises(ValueError, match="max_length=0"):
        stand.run("greedy", max_length=0)
