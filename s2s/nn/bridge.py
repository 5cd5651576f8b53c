"""Bridges: from the encoder's last states to the decoder's first.

Decides how states cross. Must not know what either side does with them. A cell's
second state (the LSTM's c) crosses by itself: c is no h.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from s2s.nn.cells import State


class Copy(nnx.Module):
    """Every decoder layer takes its encoder layer's state as it is (Sutskever et al. 2014)."""

    def __init__(self, encoder_layers: int, layers: int, state_size: int, memory: int, hidden: int, **_: Any):
        if (encoder_layers, memory) != (layers, hidden):
            raise ValueError(
                f"copy hands {encoder_layers} layers of {memory} features to {layers} layers of {hidden}: "
                "make them equal, or use dense"
            )

    def __call__(self, states: tuple[State, ...]) -> tuple[State, ...]:
        """Leaves [B, M] of encoder layers -> leaves [B, H] of decoder layers."""
        return states


class Dense(nnx.Module):
    """Every decoder layer learns a map of an encoder state (Bahdanau et al. 2015, A.2.2).

    h_0 = tanh(W h + b), and for an LSTM c_0 = W' c + b', which no tanh bounds. A
    layer reads the encoder layer beside it; if their numbers differ, all read the
    top one.
    """

    def __init__(
        self, encoder_layers: int, layers: int, state_size: int, memory: int, hidden: int, **keywords: Any
    ):
        self.beside = encoder_layers == layers
        self.hidden_maps = nnx.List(
            [nnx.Linear(memory, hidden, kernel_init=_glorot, **keywords) for _ in range(layers)]
        )
        self.cell_maps = nnx.List(
            [nnx.Linear(memory, hidden, kernel_init=_glorot, **keywords) for _ in range(layers)]
            if state_size == 2
            else []
        )

    def __call__(self, states: tuple[State, ...]) -> tuple[State, ...]:
        """Leaves [B, M] of encoder layers -> leaves [B, H] of decoder layers."""
        crossed = []
        for layer, hidden_map in enumerate(self.hidden_maps):
            h, *cell = states[layer if self.beside else -1]
            carried = [self.cell_maps[layer](c) for c in cell]
            crossed.append((jnp.tanh(hidden_map(h)), *carried))
        return tuple(crossed)


class Zero(nnx.Module):
    """The decoder starts at zero, and knows the source by attention alone."""

    def __init__(self, encoder_layers: int, layers: int, state_size: int, memory: int, hidden: int, **_: Any):
        self.layers, self.state_size, self.hidden = layers, state_size, hidden

    def __call__(self, states: tuple[State, ...]) -> tuple[State, ...]:
        """Leaves [B, M] of encoder layers -> leaves [B, H] of decoder layers."""
        h_BM = states[0][0]
        zero_BH = jnp.zeros((h_BM.shape[0], self.hidden), h_BM.dtype)
        return ((zero_BH,) * self.state_size,) * self.layers


_glorot = jax.nn.initializers.glorot_uniform()

BRIDGES: dict[str, type] = {"copy": Copy, "dense": Dense, "zero": Zero}
