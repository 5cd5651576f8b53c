"""A cell over time: masks, directions, and layers of cells.

Decides in which order a sequence is read and what pads do to a state. Must not know
which cell it walks, nor whether the sequence is a source or a target.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from s2s.nn import cudnn
from s2s.nn.bound import common_max
from s2s.nn.cells import CELLS, Cell, State
from s2s.nn.dropout import OFF, Dropout, drop
from s2s.nn.scan import scan


def longest(length_B: jax.Array) -> jax.Array:
    """Positions that a loop over a batch has to walk; under ``jax.vmap``, over all replicas' batches."""
    return common_max(jnp.max(length_B))


def run(
    cell: Cell, x_BSE: jax.Array, mask_BS: jax.Array | None, state: State, *, reverse: bool = False
) -> tuple[jax.Array, State]:
    """Runs a cell over a sequence, all input products done first as one.

    Args:
      cell: the cell.
      x_BSE: inputs.
      mask_BS: True on real positions, which come first; None: all are real.
      state: before the first position read, leaves [B, H].
      reverse: read from the last position to the first.

    Returns:
      outputs_BSH, zeros on pads; and the state after the last real position
      read, whatever the padding. Positions that are pads in every row cost no step.
    """
    gates_SBG = cell.project(jnp.swapaxes(x_BSE, 0, 1))
    if mask_BS is None:
        outputs_SBH, state = walk(cell, gates_SBG, state, None, reverse=reverse)
        return jnp.swapaxes(outputs_SBH, 0, 1), state

    def step(state: State, inputs: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
        gates_BG, mask_B = inputs
        real_B1 = mask_B[:, None]
        new = cell.step(state, gates_BG)
        output_BH = jnp.where(real_B1, new[0], jnp.zeros_like(new[0]))
        return tuple(jnp.where(real_B1, n, s) for n, s in zip(new, state, strict=True)), output_BH

    turns = longest(jnp.sum(mask_BS, axis=1))
    state, outputs_SBH = scan(step, state, (gates_SBG, mask_BS.T), turns, reverse=reverse)
    return jnp.swapaxes(outputs_SBH, 0, 1), state


def walk(
    cell: Cell, gates_TBG: jax.Array, state: State, turns: jax.Array | None, *, reverse: bool = False
) -> tuple[jax.Array, State]:
    """A cell over projected inputs, time first, without a mask.

    Args:
      cell: the cell.
      gates_TBG: the input's share of the gates.
      state: before the first position read, leaves [B, H].
      turns: positions walked, the first ones, as in `s2s.nn.scan.scan`; None: all.
      reverse: read from the last position to the first.

    Returns:
      outputs_TBH, zeros where not walked, and the last state.
    """

    def step(state: State, gates_BG: jax.Array) -> tuple[State, jax.Array]:
        state = cell.step(state, gates_BG)
        return state, state[0]

    turns = jnp.asarray(gates_TBG.shape[0]) if turns is None else turns
    state, outputs_TBH = scan(step, state, gates_TBG, turns, reverse=reverse)
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
        x_TBH, last = walk(self.cells[0], gates_TBG, states[0], turns)
        lasts = [last]
        for layer in range(1, len(self.cells)):
            cell = self.cells[layer]
            x_TBH = drop(x_TBH, dropout.layer, dropout.at(layer), rows_axis=1)
            x_TBH, last = walk(cell, cell.project(x_TBH), states[layer], turns)
            lasts.append(last)
        return x_TBH, tuple(lasts)

    def read(self, x_BTE: jax.Array, states: tuple[State, ...], dropout: Dropout = OFF) -> jax.Array:
        """Through cuDNN, all positions from what is read: top outputs_BTH."""
        for layer, cell in enumerate(self.cells):
            if layer:
                x_BTE = drop(x_BTE, dropout.layer, dropout.at(layer))
            ((x_BTE, _),) = cudnn.read([cell], x_BTE, None, [states[layer]])
        return x_BTE

    def step(self, states: tuple[State, ...], gates: jax.Array, dropout: Dropout = OFF) -> tuple[State, ...]:
        """One position: every layer's next state, from the first layer's gates [..., G]."""
        new = [self.cells[0].step(states[0], gates)]
        for layer in range(1, len(self.cells)):
            cell = self.cells[layer]
            x = drop(new[-1][0], dropout.layer, dropout.at(layer))
            new.append(cell.step(states[layer], cell.project(x)))
        return tuple(new)
