"""The LSTM over time in one call: all positions, both directions and all replicas.

Decides what is kept of the way there for the way back, and what the kernel's gradient is. Must not
know where gates come from, nor what is made of outputs.

A loop of XLA's starts some ten programs a position, none of which keeps both cores busy. Here threads
meet once a position, and gates are opened while their sums are in the cache.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2s.kernels import library
from s2s.kernels.contract import FEWEST, contract, parts_of

_KINDS = 4


class Direction(NamedTuple):
    """One direction of a layer.

    Attributes:
      kernel: U [H, 4 H], columns [i; f; o; g] as in `s2s.nn.cells.LSTM`.
      gates_TBG: the inputs' share of the gates, in the kernel's dtype.
      h_BH, c_BH: the state before the first position walked.
    """

    kernel: jax.Array
    gates_TBG: jax.Array
    h_BH: jax.Array
    c_BH: jax.Array


def available(rows: int, dtype: Any) -> bool:
    """Whether the library walks so many rows in this dtype."""
    return library.load() is not None and rows >= FEWEST and (dtype == jnp.float32 or parts_of(dtype) > 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def lstm(
    reverse: tuple[bool, ...], length_B: jax.Array, directions: list[Direction]
) -> tuple[jax.Array, list[tuple[jax.Array, ...]]]:
    """Walks a layer's directions.

    Args:
      reverse: of each direction, whether it reads from the last position to the first.
      length_B: int32, positions of each row, the first ones (all where there are fewer); at others nothing
        is read.
      directions: one or two.

    Returns:
      Outputs, directions joined [T, B, N H], zeros from a row's length on; and for each direction h and
      c after the last position walked.
    """
    outputs, *states = _call(reverse, length_B, directions, keep=False)
    return outputs, list(zip(states[::2], states[1::2], strict=True))


def _call(
    reverse: tuple[bool, ...], length_B: jax.Array, directions: list[Direction], keep: bool
) -> list[jax.Array]:
    """Outputs, and for each direction: last h and c, and if they are to be kept, opened gates and cells."""
    _, gates_TBG, h_BH, _ = directions[0]
    steps, rows, hidden = *gates_TBG.shape[:2], h_BH.shape[1]
    dtype = gates_TBG.dtype
    state = jax.ShapeDtypeStruct((rows, hidden), dtype)
    kept = [jax.ShapeDtypeStruct((steps, rows, width), dtype) for width in (4 * hidden, hidden)]
    each = [state, state, *(kept if keep else [])]
    out = [jax.ShapeDtypeStruct((steps, rows, len(directions) * hidden), dtype), *each * len(directions)]
    given = [array for direction in directions for array in direction]
    # Opened gates take the place of what came in.
    aliases = {2 + _KINDS * n: 3 + _KINDS * n for n in range(len(directions))} if keep else None
    return list(library.call("s2s_lstm", out, aliases)(length_B, *given, **_attributes(reverse, dtype)))


def _attributes(reverse: tuple[bool, ...], dtype: Any) -> dict[str, Any]:
    bits = sum(way << number for number, way in enumerate(reverse))
    return {"reverse": np.int64(bits), "parts": np.int64(parts_of(dtype))}


def _forward(reverse: tuple[bool, ...], length_B: jax.Array, directions: list[Direction]) -> tuple[Any, Any]:
    outputs, *rest = _call(reverse, length_B, directions, keep=True)
    each = [rest[at : at + _KINDS] for at in range(0, len(rest), _KINDS)]
    kept = [(opened, cells) for _, _, opened, cells in each]
    starts = [(kernel, h_BH, c_BH) for kernel, _, h_BH, c_BH in directions]
    return (outputs, [(h, c) for h, c, _, _ in each]), (length_B, outputs, kept, starts)


def _backward(reverse: tuple[bool, ...], residuals: Any, gradients: Any) -> Any:
    length_B, outputs, kept, starts = residuals
    d_outputs, d_states = gradients
    given, out = [], []
    for (opened, cells), (kernel, _, c_BH), d_state in zip(kept, starts, d_states, strict=True):
        given += [kernel, opened, cells, c_BH, *d_state]
        out += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (opened, c_BH, c_BH)]
    # Gradients by gates take the place of the gates.
    aliases = {3 + 6 * n: 3 * n for n in range(len(kept))}
    d_gates_h_c = library.call("s2s_lstm_back", out, aliases)(
        length_B, d_outputs, *given, **_attributes(reverse, outputs.dtype)
    )
    directions = []
    for number, (way, (kernel, h_BH, _)) in enumerate(zip(reverse, starts, strict=True)):
        d_gates, d_h, d_c = d_gates_h_c[3 * number : 3 * number + 3]
        read = _read(way, length_B, outputs[..., number * h_BH.shape[1] :][..., : h_BH.shape[1]], h_BH)
        d_kernel = contract(read, d_gates, (0, 1), (0, 1), kernel.dtype)
        directions.append(Direction(d_kernel, d_gates, d_h, d_c))
    return None, directions


def _read(reverse: bool, length_B: jax.Array, outputs_TBH: jax.Array, first_BH: jax.Array) -> jax.Array:
    """The h that each position of a row read."""
    steps = len(outputs_TBH)
    if not reverse:
        return jnp.concatenate([first_BH[None], outputs_TBH[:-1]])[:steps]
    later = jnp.concatenate([outputs_TBH[1:], jnp.zeros_like(outputs_TBH[:1])])
    last_TB = jnp.arange(steps)[:, None] == jnp.minimum(length_B, steps)[None] - 1
    return jnp.where(last_TB[:, :, None], first_BH, later)


lstm.defvjp(_forward, _backward)
