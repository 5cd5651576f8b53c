"""The encoder: what is remembered of a source.

Decides layers and directions, and the form of the memory. Must not know what the
source was made of (it reads vectors) nor who reads the memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from s2s.nn import cudnn
from s2s.nn.cells import CELLS, State
from s2s.nn.dropout import OFF, Dropout, drop
from s2s.nn.recurrent import run


class Memory(NamedTuple):
    """All that a decoder may know of a batch of sources.

    Attributes:
      memory_BSM: the top layer's outputs, directions joined; zeros on pads.
      mask_BS: True on real positions.
      keys: what attention prepared of the memory, once a sentence.
      summary_BM: the last forward output joined with the first backward one.
      states: by layer, the cell's last state with directions joined, leaves [B, M].
    """

    memory_BSM: jax.Array
    mask_BS: jax.Array
    keys: Any
    summary_BM: jax.Array
    states: tuple[State, ...]


class Encoder(nnx.Module):
    """Layers of one cell, read forward or both ways (Schuster and Paliwal 1997).

    h_t = RNN_enc(x_t, h_{t-1}); a layer's directions are joined and feed the next
    layer, so that every layer sees both sides.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        hidden: int,
        layers: int,
        bidirectional: bool,
        recurrence: str = "scan",
        **keywords: Any,
    ):
        self.recurrence = recurrence
        outputs = 2 * hidden if bidirectional else hidden
        sizes = [in_features] + [outputs] * (layers - 1)
        self.forward = nnx.List([CELLS[name](size, hidden, **keywords) for size in sizes])
        if not bidirectional:
            sizes = []
        self.backward = nnx.List([CELLS[name](size, hidden, **keywords) for size in sizes])

    def __call__(self, x_BSE: jax.Array, mask_BS: jax.Array, dropout: Dropout = OFF) -> Memory:
        """Reads vectors into a memory that has no keys yet."""
        x, states = x_BSE, []
        for layer, forward in enumerate(self.forward):
            if layer:
                x = drop(x, dropout.layer, dropout.at(layer))
            zero = forward.zero_state(x.shape[:1])
            cells = [forward, self.backward[layer]] if self.backward else [forward]
            if self.recurrence == "cudnn" and cudnn.available():
                x, lasts = cudnn.read(cells, x, mask_BS, [zero] * len(cells))
            else:
                x, lasts = run(cells, x, mask_BS, [zero] * len(cells))
            states.append(tuple(jnp.concatenate(part, axis=-1) for part in zip(*lasts, strict=True)))
        return Memory(memory_BSM=x, mask_BS=mask_BS, keys=(), summary_BM=states[-1][0], states=tuple(states))
