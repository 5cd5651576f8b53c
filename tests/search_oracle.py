"""Search by exhaustive Python lists, in float64, from the same rules and none of the same code.

A model is a function ``next(prefix) -> (log-probabilities of V tokens, attention weights of S)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

PAD, BOS, EOS = 0, 1, 2
Next = Callable[[tuple[int, ...]], tuple[np.ndarray, np.ndarray]]


class Path(NamedTuple):
    tokens: tuple[int, ...] = ()
    token_log_probs: tuple[float, ...] = ()
    aligns: tuple[np.ndarray, ...] = ()
    score: float = 0.0

    @property
    def log_prob(self) -> float:
        return sum(self.token_log_probs)

    @property
    def ended(self) -> bool:
        return self.tokens[-1:] == (EOS,)


def continuations(model: Next, path: Path, limit: int, min_length: int) -> list[Path]:
    """All paths one token longer, by rising token id."""
    log_probs, align = model(path.tokens)
    if len(path.tokens) + 1 == limit:
        tokens = [EOS]
    elif len(path.tokens) < min_length:
        tokens = list(range(3, len(log_probs)))
    else:
        tokens = list(range(2, len(log_probs)))
    return [
        Path((*path.tokens, v), (*path.token_log_probs, float(log_probs[v])), (*path.aligns, align))
        for v in tokens
        if log_probs[v] > -math.inf
    ]


def score(path: Path, mask: Sequence[bool], alpha: float, beta: float) -> float:
    """Wu et al. 2016, eq. 14."""
    penalty = (5 + len(path.tokens)) ** alpha / (5 + 1) ** alpha
    total = path.log_prob / penalty
    if beta:
        for i, real in enumerate(mask):
            if real:
                total += beta * math.log(min(sum(float(align[i]) for align in path.aligns), 1.0))
    return total


def greedy(model: Next, limit: int, min_length: int) -> Path:
    path = Path()
    while not path.ended:
        path = max(continuations(model, path, limit, min_length), key=lambda p: p.token_log_probs[-1])
    return path._replace(score=path.log_prob)


def beam(model, K, limit, min_length, mask, alpha, beta) -> list[Path]:
    live, ended = [Path()], []
    while live:
        longer = [new for path in live for new in continuations(model, path, limit, min_length)]
        longer = sorted(longer, key=lambda p: -p.log_prob)[: K - len(ended)]
        ended += [path for path in longer if path.ended]
        live = [path for path in longer if not path.ended]
    return ranked(ended, mask, alpha, beta)


def everything(model, limit, min_length, mask, alpha, beta) -> list[Path]:
    """Every hypothesis there is, best first."""
    live, ended = [Path()], []
    while live:
        longer = [new for path in live for new in continuations(model, path, limit, min_length)]
        ended += [path for path in longer if path.ended]
        live = [path for path in longer if not path.ended]
    return ranked(ended, mask, alpha, beta)


def ranked(paths: list[Path], mask, alpha: float, beta: float) -> list[Path]:
    paths = [path._replace(score=score(path, mask, alpha, beta)) for path in paths]
    return sorted(paths, key=lambda p: -p.score)


def truncated(log_probs, allowed, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distribution that a sample's next token comes from."""
    weights = np.where(allowed, np.exp(np.asarray(log_probs, np.float64) / temperature), 0.0)
    order = sorted(range(len(weights)), key=lambda v: (-weights[v], v))
    if top_k:
        weights[order[top_k:]] = 0.0
    weights /= weights.sum()
    reached = 0.0
    for v in order:
        if reached >= top_p:
            weights[v] = 0.0
        reached += weights[v]
    return weights / weights.sum()
