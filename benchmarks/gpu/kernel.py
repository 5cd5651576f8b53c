"""An experiment: one LSTM step, product and gates, as one Pallas kernel (Triton).

XLA makes of a step a matrix product, which writes its gates to memory, and a second kernel, which
reads them again. Here a program holds the four gates of a tile of units from the product to the new state.
It is no part of the package unless the programme's figures say that it wins.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Tiles: rows and units a program owns, and units it reads at a time. Triton's products need 16 of each.
ROWS, UNITS, READ = 32, 32, 64


def _step(h_ref, c_ref, gates_ref, weights_ref, h_out, c_out, *activations, read: int) -> None:
    def add(turn, sums):
        at = pl.ds(turn * read, read)
        h = h_ref[:, at]
        return tuple(total + pl.dot(h, weights_ref[at, gate, :]) for gate, total in enumerate(sums))

    sums = tuple(gates_ref[:, gate, :].astype(jnp.float32) for gate in range(4))
    i, f, o, g = jax.lax.fori_loop(0, h_ref.shape[1] // read, add, sums)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    c = f * c_ref[...].astype(jnp.float32) + i * g
    for ref, value in zip((h_out, c_out, *activations), (o * jnp.tanh(c), c, i, f, o, g), strict=True):
        ref[...] = value.astype(ref.dtype)


def fused_step(
    h_BH: jax.Array, c_BH: jax.Array, gates_BG: jax.Array, weights_HG: jax.Array
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """One step: the new h and c, and the activations i, f, o, g that a backward pass needs.

    Sums are float32. Away from a GPU the kernel is interpreted, slowly.

    Args:
      h_BH: the state's output; B and H are multiples of 16.
      c_BH: the state's memory.
      gates_BG: the input's share of the gates, [i; f; o; g].
      weights_HG: the recurrent kernel.
    """
    B, H = h_BH.shape
    rows, units, read = min(ROWS, B), min(UNITS, H), min(READ, H)
    if B % rows or H % units or H % read:
        raise ValueError(
            f"tiles of {rows} rows and {units} units, read {read} at a time, do not fill {B} x {H}"
        )
    tile = pl.BlockSpec((rows, units), lambda row, unit: (row, unit))
    outputs = pl.pallas_call(
        functools.partial(_step, read=read),
        grid=(B // rows, H // units),
        in_specs=[
            pl.BlockSpec((rows, H), lambda row, unit: (row, 0)),
            tile,
            pl.BlockSpec((rows, 4, units), lambda row, unit: (row, 0, unit)),
            pl.BlockSpec((H, 4, units), lambda row, unit: (0, 0, unit)),
        ],
        out_specs=[tile] * 6,
        out_shape=[jax.ShapeDtypeStruct((B, H), h_BH.dtype)] * 6,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=jax.default_backend() != "gpu",
    )(h_BH, c_BH, gates_BG.reshape(B, 4, H), weights_HG.reshape(H, 4, H))
    return outputs[0], outputs[1], tuple(outputs[2:])
