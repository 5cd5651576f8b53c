"""A cell over time: masks, directions, and layers of cells.

Decides in which order a sequence is read and what pads do to a state. Must not know
which cell it walks (but whether the library of C functions has its equation), nor whether the
sequence is a source or a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from s2s.kernels import lstm
from s2s.nn import cudnn
from s2s.nn.bound import common_max
from s2s.nn.cells import CELLS, LSTM, Cell, State
from s2s.nn.dropout import OFF, Dropout, drop
from s2s.nn.scan import scan


def longest(length_B: jax.Array) -> jax.Array:
    """Positions that a loop over a batch has to walk; under ``jax.vmap``, over all replicas' batches."""
    return common_max(jnp.max(length_B))


def run(
    cells: Sequence[Cell], x_BSE: jax.Array, mask_BS: jax.Array, states: Sequence[State]
) -> tuple[jax.Array, list[State]]:
    """Runs a layer over a sequence, in each of its directions, all input products done first.

    Args:
      cells: the forward cell, and the backward one where there are two directions.
      x_BSE: inputs.
      mask_BS: True on real positions, which come first.
      states: for each cell, its state before the first position it reads, leaves [B, H].

    Returns:
      Outputs, directions joined [B, S, N H], zeros on pads; and for each cell the state after the
      last real position it reads, whatever the padding. Positions that are pads in every row cost no step.
    """
    x_SBE = jnp.swapaxes(x_BSE, 0, 1)
    length_B = jnp.sum(mask_BS, axis=1, dtype=jnp.int32)
    outputs_SBM, lasts = walk(
        cells, [cell.project(x_SBE) for cell in cells], states, longest(length_B), length_B
    )
    return jnp.swapaxes(outputs_SBM, 0, 1), lasts


def walk(
    cells: Sequence[Cell],
    gates: Sequence[jax.Array],
    states: Sequence[State],
    turns: jax.Array,
    length_B: jax.Array | None = None,
) -> tuple[jax.Array, list[State]]:
    """A layer over projected inputs, time first.

    Args:
      cells: the forward cell, and one that reads from the last position to the first where there are
        two directions.
      gates: for each cell, the input's share of the gates [T, B, G].
      states: for each cell, before the first position it reads, leaves [B, H].
      turns: positions walked, the first ones, as in `s2s.nn.scan.scan`.
      length_B: positions of each row, at most ``turns``; None: all.

    Returns:
      Outputs, directions joined [T, B, N H], zeros where not walked; and every cell's last state.
    """
    h_BH = states[0][0]
    if lstm.available(len(h_BH), h_BH.dtype) and all(type(cell) is LSTM for cell in cells):
        directions = [
            lstm.Direction(cell.recurrent_kernel[...].astype(cell.dtype), own, *state)
            for cell, own, state in zip(cells, gates, states, strict=True)
        ]
        if length_B is None:
            length_B = jnp.full(len(h_BH), turns, jnp.int32)
        return lstm.lstm(_WAYS[: len(cells)], length_B, directions)
    ways = [
        _walk_one(cell, own, state, turns, length_B, reverse)
        for reverse, cell, own, state in zip(_WAYS, cells, gates, states, strict=False)
    ]
    return jnp.concatenate([outputs for outputs, _ in ways], axis=-1), [last for _, last in ways]


# Whether a layer's first and second direction read from the last position to the first.
_WAYS = (False, True)


def _walk_one(
    cell: Cell,
    gates_TBG: jax.Array,
    state: State,
    turns: jax.Array,
    length_B: jax.Array | None,
    reverse: bool,
) -> tuple[jax.Array, State]:
    def step(state: State, inputs: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
        gates_BG, t = inputs
        new = cell.step(state, gates_BG)
        if length_B is None:
            return new, new[0]
        real_B1 = (t < length_B)[:, None]
        output_BH = jnp.where(real_B1, new[0], jnp.zeros_like(new[0]))
        return tuple(jnp.where(real_B1, n, s) for n, s in zip(new, state, strict=True)), output_BH

    xs = gates_TBG, jnp.arange(len(gates_TBG))
    state, outputs_TBH = scan(step, state, xs, turns, reverse=reverse)
    return outputs_TBH, state


class Stack(nnx.Module):
    """Cells on top of each other, one direction: together a cell, with a state for each layer.

    Dropout falls between layers. `run` walks layer by layer, so that every layer's
    input product leaves the loop; `step` moves all layers by one position.
    """

    def __init__(self, name: str, in_features: int, hidden: int, layers: int, **keywords: Any):
        sizes = [in_features] + [hidden] * (layers - 1)
        self.cells = nnx.List([CELLS[name](size, hidden, **keywords) for size in sizes])

    def project(self, x: jax.Array) -> jax.Array:
        """The input's share of the first layer's gates: [..., E] -> [..., G]."""
        return self.cells[0].project(x)

    def run(
        self,
        gates_TBG: jax.Array,
        states: tuple[State, ...],
        dropout: Dropout = OFF,
        turns: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[State, ...]]:
        """All positions (the first ``turns``), time first: top outputs_TBH and every layer's last state."""
        turns = jnp.asarray(len(gates_TBG)) if turns is None else turns
        x_TBH, lasts = walk(self.cells[:1], [gates_TBG], states[:1], turns)
        for layer in range(1, len(self.cells)):
            cell = self.cells[layer]
            x_TBH = drop(x_TBH, dropout.layer, dropout.at(layer), rows_axis=1)
            x_TBH, last = walk([cell], [cell.project(x_TBH)], states[layer : layer + 1], turns)
            lasts += last
        return x_TBH, tuple(lasts)

    def read(self, x_BTE: jax.Array, states: tuple[State, ...], dropout: Dropout = OFF) -> jax.Array:
        """Through cuDNN, all positions from what is read: top outputs_BTH."""
        for layer, cell in enumerate(self.cells):
            if layer:
                x_BTE = drop(x_BTE, dropout.layer, dropout.at(layer))
            x_BTE, _ = cudnn.read([cell], x_BTE, None, [states[layer]])
        return x_BTE

    def step(self, states: tuple[State, ...], gates: jax.Array, dropout: Dropout = OFF) -> tuple[State, ...]:
        """One position: every layer's next state, from the first layer's gates [..., G]."""
        new = [self.cells[0].step(states[0], gates)]
        for layer in range(1, len(self.cells)):
            cell = self.cells[layer]
            x = drop(new[-1][0], dropout.layer, dropout.at(layer))
            new.append(cell.step(states[layer], cell.project(x)))
        return tuple(new)
