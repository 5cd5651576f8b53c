"""Beam search as a tree that keeps what it drops: every candidate looked at, with its scores.

Decides nothing of its own: it is `s2s.search.beam` again for one sentence, by its rules, a step at a
time and in plain Python, to be looked at. Must not know the model: ``advance`` is that of a search.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2s.batch import BOS, EOS, PAD
from s2s.search import Advance, gnmt_score


class Node(NamedTuple):
    """One token of one hypothesis that was looked at.

    Attributes:
      parent: number of the node before it; None at the root, which is BOS.
      t: its position in the output; -1 at the root.
      token: its id.
      log_prob: its own log-probability in nats.
      total: with all tokens before it.
      score: by which it is ranked, penalties included, if it ends a hypothesis that was kept.
      kept: whether it got a place in the beam; candidates that did not have no children.
      rank: its place among the candidates of its step, from 0.
    """

    parent: int | None
    t: int
    token: int
    log_prob: float
    total: float
    score: float | None
    kept: bool
    rank: int


class Tree(NamedTuple):
    """A search.

    Attributes:
      nodes: a parent before its children.
      ends: numbers of the nodes that end a hypothesis, best first.
    """

    nodes: list[Node]
    ends: list[int]

    def path(self, node: int) -> list[int]:
        """Numbers of the nodes from the first token to ``node``."""
        numbers = []
        at: int | None = node
        while at is not None and self.nodes[at].parent is not None:
            numbers.append(at)
            at = self.nodes[at].parent
        return numbers[::-1]

    def tokens(self, node: int) -> list[int]:
        """Ids from the first token to ``node``."""
        return [self.nodes[number].token for number in self.path(node)]


def beam_tree(
    advance: Advance,
    context: Any,
    state: Any,
    *,
    beam: int,
    limit: int,
    source_mask_BS: Any,
    min_length: int = 0,
    length_penalty: float = 0.0,
    coverage_penalty: float = 0.0,
    dropped: int | None = None,
) -> Tree:
    """Searches one sentence as `s2s.search.beam` does, and keeps the tree.

    Args:
      advance: the model's next step, for N = 1 and K = ``beam``.
      context: what it reads of the sentence; leaves [1, ...].
      state: its first state; leaves [1, 1, ...].
      beam: hypotheses kept, K.
      limit: target tokens at most, EOS included; at least 1.
      source_mask_BS: True on real source positions, B = 1.
      min_length: target tokens at least, EOS not counted.
      length_penalty: alpha of `gnmt_score`.
      coverage_penalty: beta of `gnmt_score`.
      dropped: candidates of each step kept in the tree beyond the beam; None: K.

    Returns:
      The tree. Its ends are what `s2s.search.beam` returns with ``n_best=None``.
    """
    dropped = beam if dropped is None else dropped
    nodes = [Node(None, -1, BOS, 0.0, 0.0, None, True, 0)]
    # Of each hypothesis in the beam: its node, and the weights its tokens were chosen under.
    live = [(0, np.zeros(source_mask_BS.shape[1]))]
    finished: list[tuple[int, np.ndarray]] = []
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (1, beam, *leaf.shape[2:])), state)
    for t in range(limit):
        token_NK = np.full((1, beam), PAD, np.int32)
        token_NK[0, : len(live)] = [nodes[node].token for node, _ in live]
        state, next_NK, align_NKS = advance(context, state, jnp.asarray(token_NK))
        logits_NKV, total_NK, _ = (np.asarray(x, np.float64) for x in next_NK)
        log_probs_KV = logits_NKV[0] - total_NK[0, :, None]
        align_KS = np.asarray(align_NKS, np.float64)[0]
        log_probs_KV[:, [PAD, BOS]] = -np.inf
        if t + 1 >= limit:
            log_probs_KV[:, np.arange(log_probs_KV.shape[1]) != EOS] = -np.inf
        elif t < min_length:
            log_probs_KV[:, EOS] = -np.inf
        before = np.array([nodes[node].total for node, _ in live])
        totals = (before[:, None] + log_probs_KV[: len(live)]).ravel()
        free = beam - len(finished)
        # Stable: among equals the lower slot, then the lower id, as in the search.
        best = np.argsort(-totals, kind="stable")[: free + dropped]
        survivors: list[tuple[int, np.ndarray]] = []
        slots = []
        for rank, place in enumerate(best[np.isfinite(totals[best])]):
            slot, token = divmod(int(place), log_probs_KV.shape[1])
            parent, coverage_S = live[slot]
            log_prob = float(log_probs_KV[slot, token])
            nodes.append(Node(parent, t, token, log_prob, float(totals[place]), None, rank < free, rank))
            if rank >= free:
                continue
            grown = (len(nodes) - 1, coverage_S + align_KS[slot])
            if token == EOS:
                finished.append(grown)
            else:
                survivors.append(grown)
                slots.append(slot)
        live = survivors
        if not live:
            break
        own = jnp.asarray(slots + [0] * (beam - len(slots)))
        state = jax.tree.map(lambda leaf, own=own: jnp.take(leaf, own, axis=1), state)
    return _ranked(nodes, finished, source_mask_BS, length_penalty, coverage_penalty)


def _ranked(
    nodes: list[Node],
    finished: list[tuple[int, np.ndarray]],
    source_mask_BS: Any,
    length_penalty: float,
    coverage_penalty: float,
) -> Tree:
    """Scores what is finished; among equals the one that ended first is the better."""
    if not finished:
        return Tree(nodes, [])
    ends = [nodes[number] for number, _ in finished]
    score_BK = gnmt_score(
        jnp.asarray([[end.total for end in ends]], jnp.float32),
        jnp.asarray([[end.t + 1 for end in ends]]),
        jnp.asarray(np.stack([coverage_S for _, coverage_S in finished])[None], jnp.float32),
        jnp.asarray(source_mask_BS),
        length_penalty,
        coverage_penalty,
    )
    for (number, _), score in zip(finished, np.asarray(score_BK)[0].tolist(), strict=True):
        nodes[number] = nodes[number]._replace(score=score)
    order = sorted((number for number, _ in finished), key=lambda number: -(nodes[number].score or 0.0))
    return Tree(nodes, order)
