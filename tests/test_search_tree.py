"""The tree of a beam search holds the search itself: the same hypotheses, and what they beat."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from s2s.batch import BOS, EOS, PAD
from s2s.search.pick import survey
from s2s.search.tree import beam_tree
from tests.test_search import Stand

SETTINGS = [
    {"K": 1},
    {"K": 2},
    {"K": 4, "length_penalty": 1.0},
    {"K": 3, "length_penalty": 0.6, "coverage_penalty": 0.4, "min_length": 2},
    {"K": 7, "limit": 3},
    {"K": 5, "limit": 1},
]


def grown(stand: Stand, row: int, *, K: int, limit: int, **rules):
    context, state = stand.start([row])
    return beam_tree(
        stand.advance, context, state, beam=K, limit=limit, source_mask_BS=stand.mask[[row]], **rules
    )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", [0])
def test_the_tree_ends_in_what_beam_search_finds(seed, settings):
    stand = Stand(seed)
    rules = {"limit": stand.T, **settings}
    K, limit = rules.pop("K"), rules.pop("limit")
    found = stand.run("beam", K, limit_B=np.full(stand.B, limit, np.int32), **rules)
    for row in range(stand.B):
        tree = grown(stand, row, K=K, limit=limit, **rules)
        lengths = [length for length in found.length_BK[row] if length]
        assert len(tree.ends) == len(lengths)
        for k, (end, length) in enumerate(zip(tree.ends, lengths, strict=True)):
            assert tree.tokens(end) == found.tokens_BKT[row, k, :length].tolist()
            np.testing.assert_allclose(tree.nodes[end].score, found.score_BK[row, k], rtol=1e-5)
            np.testing.assert_allclose(tree.nodes[end].total, found.log_prob_BK[row, k], rtol=1e-5)
            np.testing.assert_allclose(
                [tree.nodes[number].log_prob for number in tree.path(end)],
                found.token_log_prob_BKT[row, k, :length],
                rtol=1e-5,
                atol=1e-6,
            )


def test_the_tree_keeps_what_was_beaten():
    stand, K = Stand(3), 3
    tree = grown(stand, 0, K=K, limit=stand.T)
    assert tree.nodes[0].token == BOS and tree.nodes[0].parent is None
    parents = {node.parent for node in tree.nodes}
    dropped = 0
    for t in range(max(node.t for node in tree.nodes) + 1):
        step = [(number, node) for number, node in enumerate(tree.nodes) if node.t == t]
        assert [node.rank for _, node in step] == list(range(len(step)))
        totals = [node.total for _, node in step]
        assert totals == sorted(totals, reverse=True)
        ended = sum(tree.nodes[end].t < t for end in tree.ends)
        assert sum(node.kept for _, node in step) <= K - ended
        for number, node in step:
            parent = tree.nodes[node.parent]
            assert parent.kept and parent.t == t - 1 and parent.token != EOS and node.token not in (PAD, BOS)
            np.testing.assert_allclose(node.total, parent.total + node.log_prob, rtol=1e-12)
            assert node.kept or (number not in parents and node.score is None)
            assert (node.score is not None) == (node.kept and node.token == EOS)
            dropped += not node.kept
    assert dropped > K
    scores = [tree.nodes[end].score for end in tree.ends]
    assert scores == sorted(scores, reverse=True) and len(scores) == K


def test_a_search_that_can_go_nowhere_has_no_end():
    def advance(context, state, token_NK):
        nothing = jnp.full((*token_NK.shape, 5), -jnp.inf)
        return state, survey(nothing), jnp.zeros((*token_NK.shape, 2))

    mask_BS = np.ones((1, 2), bool)
    tree = beam_tree(advance, jnp.zeros(1), jnp.zeros((1, 1)), beam=2, limit=4, source_mask_BS=mask_BS)
    assert tree.ends == [] and len(tree.nodes) == 1
