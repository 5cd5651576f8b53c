"""Model FLOPs: the products a step cannot do without, counted from the config.

Decides what counts: matrix products (2 FLOPs a multiply and add) on real tokens, forward once and
backward twice (the gradients of both factors). Padding, recomputation, element-wise work, the
optimizer and embedding look-ups count for nothing, so time divided into them flatters nobody.
Must not know how a step is computed.
"""

from __future__ import annotations

from typing import NamedTuple

from s2s.config import ModelConfig

_GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


class Tokens(NamedTuple):
    """Real tokens of a batch, EOS among them.

    Attributes:
      sentences: pairs.
      source: source tokens.
      target: target tokens.
      looks: (target token, source token) pairs within a sentence, which attention compares.
    """

    sentences: int
    source: int
    target: int
    looks: int


def forward_flops(cfg: ModelConfig, target_vocab: int, tokens: Tokens) -> float:
    """FLOPs of the products of one teacher-forced forward pass.

    Args:
      cfg: attention "dot" or "general", and any cell, layers and directions.
      target_vocab: entries of the softmax.
      tokens: of the batch.

    Raises:
      ValueError: the products of this attention are not counted here.
    """
    if cfg.attention not in ("dot", "general"):
        raise ValueError(f"attention {cfg.attention!r} is not counted: use 'dot' or 'general'")
    gates = _GATES[cfg.cell]
    hidden, memory, units = cfg.hidden, cfg.memory, cfg.encoder_units
    directions = 2 if cfg.bidirectional else 1
    feeding = hidden if cfg.input_feeding else 0

    inputs = [cfg.embedding] + [memory] * (cfg.encoder_depth - 1)
    encoder = sum(directions * gates * units * (size + units) for size in inputs)
    inputs = [cfg.embedding + feeding] + [hidden] * (cfg.layers - 1)
    decoder = sum(gates * hidden * (size + hidden) for size in inputs)
    keys = memory * hidden if cfg.attention == "general" else 0
    attentional = (memory + hidden) * hidden
    softmax = hidden * target_vocab
    if cfg.tie != "none":
        softmax = cfg.embedding * target_vocab + (hidden * cfg.embedding if cfg.embedding != hidden else 0)
    states = 2 if cfg.cell == "lstm" else 1
    bridge = states * cfg.layers * memory * hidden if cfg.bridge == "dense" else 0
    return 2.0 * (
        tokens.sentences * bridge
        + tokens.source * (encoder + keys)
        + tokens.target * (decoder + attentional + softmax)
        + tokens.looks * (hidden + memory)
    )


def train_flops(cfg: ModelConfig, target_vocab: int, tokens: Tokens) -> float:
    """FLOPs of the products of one update: forward, and twice that backward."""
    return 3.0 * forward_flops(cfg, target_vocab, tokens)
