"""cuDNN's LSTM in place of our loop over time: one layer, both directions in one call.

Decides how cells' parameters become cuDNN's packed vector, and what pads and rows
without a real position mean. Must not know what a layer belongs to.

It needs an NVIDIA GPU and float32 (`jax.experimental.rnn` offers no more), and follows
``jax_default_matmul_precision``: TF32 by default, as our own products there. JAX has no
rule for it under ``jax.vmap``, and copies the lengths to the host at every call, which
waits for the device and leaves the call out of CUDA graphs. Spread over several devices, each
computes the whole batch. Parameters are the same either way, so a model that was trained with it
runs anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from s2s.nn.cells import Cell, State


def available() -> bool:
    """Whether programs of this process run on a GPU."""
    return jax.default_backend() == "gpu"


def pack(cells: Sequence[Cell]) -> jax.Array:
    """A layer's parameters as cuDNN reads them: one vector, in the dtype of computation.

    cuDNN wants gates as [i; f; g; o], and multiplies from the left, so kernels are transposed.
    Kernels of all directions come first (input's, then state's), biases after them. cuDNN adds two
    biases where one does: ours, and zeros.

    Args:
      cells: the forward cell, and the backward one where there are two directions.
    """
    kernels = [kernel[...] for cell in cells for kernel in (cell.input_kernel, cell.recurrent_kernel)]
    biases = [bias for cell in cells for bias in (cell.bias[...], jnp.zeros_like(cell.bias[...]))]
    parts = [_reordered(part).T.ravel() for part in (*kernels, *biases)]
    return jnp.concatenate(parts).astype(cells[0].dtype)


def _reordered(part: jax.Array) -> jax.Array:
    """From our gates, [i; f; o; g] along the last axis, to cuDNN's."""
    i, f, o, g = jnp.split(part, 4, axis=-1)
    return jnp.concatenate([i, f, g, o], axis=-1)


def read(
    cells: Sequence[Cell], x_BSE: jax.Array, mask_BS: jax.Array | None, states: Sequence[State]
) -> tuple[jax.Array, list[State]]:
    """Runs a layer over a sequence, in each of its directions.

    Args:
      cells: the forward cell, and the backward one where there are two directions.
      x_BSE: inputs.
      mask_BS: True on real positions, which come first; None: all are real.
      states: for each cell, its state before the first position it reads, leaves [B, H].

    Returns:
      Outputs, directions joined [B, S, N H], zeros on pads; and for each cell the state after the last real
      position it reads, whatever the padding. What `s2s.nn.recurrent.run` gives.
    """
    rows, steps, features = x_BSE.shape
    hidden = cells[0].hidden
    length_B = jnp.full((rows,), steps, jnp.int32)
    if mask_BS is not None:
        length_B = jnp.sum(mask_BS, axis=1, dtype=jnp.int32)
        # What cuDNN leaves of the gradient on pads is not documented: this makes it zero.
        x_BSE = jnp.where(mask_BS[:, :, None], x_BSE, jnp.zeros_like(x_BSE))
    # The leading axis is the directions.
    starts = [jnp.stack(parts) for parts in zip(*states, strict=True)]
    outputs, *lasts = rnn.lstm(
        x_BSE,
        *starts,
        pack(cells),
        # A row without a real position reads one pad, and what comes of it is left out below.
        seq_lengths=jnp.maximum(length_B, 1),
        input_size=features,
        hidden_size=hidden,
        num_layers=1,
        dropout=0.0,
        bidirectional=len(cells) == 2,
    )
    if mask_BS is not None:
        outputs = jnp.where(mask_BS[:, :, None], outputs, jnp.zeros_like(outputs))
        some_B1 = (length_B > 0)[:, None]
        lasts = [jnp.where(some_B1, last, start) for last, start in zip(lasts, starts, strict=True)]
    return outputs, [tuple(last[way] for last in lasts) for way in range(len(cells))]
