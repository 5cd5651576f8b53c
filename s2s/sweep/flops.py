"""Model FLOPs and parameters: counted from the config alone.

Decides what counts: matrix products (2 FLOPs a multiply and add) on real tokens, forward once and
backward twice (the gradients of both factors). Padding, recomputation, element-wise work, the
optimizer and embedding look-ups count for nothing, so time divided into them flatters nobody.
Must not know how a step is computed, nor how long it takes.
"""

from __future__ import annotations

from typing import NamedTuple

from s2s.config import ModelConfig

# Of a cell: blocks in its kernels, arrays in its state, and biases of each unit.
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
STATES = {"lstm": 2, "gru": 1, "tanh": 1, "relu": 1}
_BIASES = {"lstm": 4, "gru": 4, "tanh": 1, "relu": 1}


class Tokens(NamedTuple):
    """Real tokens of a batch, EOS among them; or those of an epoch, or their means over batches.

    Attributes:
      sentences: pairs.
      source: source tokens.
      target: target tokens.
      looks: (target token, source token) pairs within a sentence, which attention compares.
    """

    sentences: float
    source: float
    target: float
    looks: float


def forward_flops(cfg: ModelConfig, target_vocab: int, tokens: Tokens) -> float:
    """FLOPs of the products of one teacher-forced forward pass.

    Args:
      cfg: any cell, layers, directions and attention.
      target_vocab: entries of the softmax.
      tokens: of the batch.
    """
    one = _Products(cfg)
    softmax = cfg.hidden * target_vocab
    if cfg.tie != "none":
        softmax = cfg.embedding * target_vocab + one.to_embedding
    return 2.0 * (
        tokens.sentences * (one.bridge + one.summary)
        + tokens.source * (one.encoder + one.keys)
        + tokens.target * (one.decoder + one.query + one.attentional + softmax)
        + tokens.looks * one.look
    )


def train_flops(cfg: ModelConfig, target_vocab: int, tokens: Tokens) -> float:
    """FLOPs of the products of one update: forward, and twice that backward."""
    return 3.0 * forward_flops(cfg, target_vocab, tokens)


def parameters(cfg: ModelConfig, source_vocab: int, target_vocab: int) -> int:
    """Numbers in a model."""
    one = _Products(cfg)
    units = cfg.encoder_depth * cfg.memory + cfg.layers * cfg.hidden
    biases = _BIASES[cfg.cell] * units
    if cfg.bridge == "dense":
        biases += STATES[cfg.cell] * cfg.layers * cfg.hidden
    tables = (target_vocab if cfg.tie == "all" else source_vocab + target_vocab) * cfg.embedding
    softmax = target_vocab + (one.to_embedding if cfg.tie != "none" else cfg.hidden * target_vocab)
    vector = cfg.hidden if cfg.attention == "concat" else 0
    kernels = one.bridge + one.summary + one.encoder + one.keys + one.decoder + one.query + one.attentional
    return kernels + vector + biases + tables + softmax


class _Products:
    """Entries of every kernel, each of which is one multiply and add wherever it is used.

    Attributes:
      bridge, summary: used once a sentence.
      encoder, keys: once a source token.
      decoder, query, attentional: once a target token.
      to_embedding: once a target token, with a tied softmax.
      look: multiplies and adds for a target token's look at a source token.
    """

    def __init__(self, cfg: ModelConfig):
        gates, hidden, memory, units = GATES[cfg.cell], cfg.hidden, cfg.memory, cfg.encoder_units
        inputs = [cfg.embedding] + [memory] * (cfg.encoder_depth - 1)
        directions = 2 if cfg.bidirectional else 1
        self.encoder = sum(directions * gates * units * (size + units) for size in inputs)
        inputs = [cfg.embedding + (hidden if cfg.input_feeding else 0)] + [hidden] * (cfg.layers - 1)
        self.decoder = sum(gates * hidden * (size + hidden) for size in inputs)
        self.bridge = STATES[cfg.cell] * cfg.layers * memory * hidden if cfg.bridge == "dense" else 0
        self.summary = gates * memory * hidden if cfg.attention == "fixed" else 0
        looks = cfg.attention in ("dot", "general", "concat")
        self.keys = memory * hidden if cfg.attention in ("general", "concat") else 0
        self.query = hidden * hidden if cfg.attention == "concat" else 0
        self.attentional = ((0 if cfg.attention == "none" else memory) + hidden) * hidden
        self.to_embedding = hidden * cfg.embedding if cfg.embedding != hidden else 0
        self.look = hidden + memory if looks else 0
