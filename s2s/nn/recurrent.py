"""A cell over time: scans, masks, directions, and layers of cells.

Decides how time is walked. Must not know which cell it walks, nor whether the
sequence is a source or a target.

Loops are not unrolled: on 2 CPU cores (512 units, 64 sentences, 18 tokens) unrolling
2, 4 and 8 steps made a training step 1, 7 and 12 % slower and compilation 1.4, 3 and 5
times longer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from s2s.nn.cells import CELLS, Cell, State
from s2s.nn.dropout import OFF, Dropout, drop


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
      read, whatever the padding.
    """
    gates_SBG = cell.project(jnp.swapaxes(x_BSE, 0, 1))
    mask_SB = None if mask_BS is None else mask_BS.T
    outputs_SBH, state = scan(cell, gates_SBG, mask_SB, state, reverse=reverse)
    return jnp.swapaxes(outputs_SBH, 0, 1), state


def scan(
    cell: Cell, gates_SBG: jax.Array, mask_SB: jax.Array | None, state: State, *, reverse: bool = False
) -> tuple[jax.Array, State]:
    """The recurrent part of `run`, time first: projected inputs -> outputs_SBH and the last state."""

    def free(state: State, gates_BG: jax.Array) -> tuple[State, jax.Array]:
        state = cell.step(state, gates_BG)
        return state, state[0]

    def masked(state: State, inputs: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
        gates_BG, mask_B = inputs
        real_B1 = mask_B[:, None]
        new = cell.step(state, gates_BG)
        output_BH = jnp.where(real_B1, new[0], jnp.zeros_like(new[0]))
        return tuple(jnp.where(real_B1, n, s) for n, s in zip(new, state, strict=True)), output_BH

    body: Any = free if mask_SB is None else masked
    inputs = gates_SBG if mask_SB is None else (gates_SBG, mask_SB)
    state, outputs_SBH = jax.lax.scan(body, state, inputs, reverse=reverse)
    return outputs_SBH, state


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
        self, gates_TBG: jax.Array, states: tuple[State, ...], dropout: Dropout = OFF
    ) -> tuple[jax.Array, tuple[State, ...]]:
        """All positions, time first: top outputs_TBH and every layer's last state."""
        x_TBH, last = scan(self.cells[0], gates_TBG, None, states[0])
        lasts = [last]
        for layer in range(1, len(self.cells)):
            cell = self.cells[layer]
            x_TBH = drop(x_TBH, dropout.layer, dropout.at(layer).key)
            x_TBH, last = scan(cell, cell.project(x_TBH), None, states[layer])
            lasts.append(last)
        return x_TBH, tuple(lasts)

    def step(self, states: tuple[State, ...], gates: jax.Array, dropout: Dropout = OFF) -> tuple[State, ...]:
        """One position: every layer's next state, from the first layer's gates [..., G]."""
        new = [self.cells[0].step(states[0], gates)]
        for layer in range(1, len(self.cells)):
            cell = self.cells[layer]
            x = drop(new[-1][0], dropout.layer, dropout.at(layer).key)
            new.append(cell.step(states[layer], cell.project(x)))
        return tuple(new)
