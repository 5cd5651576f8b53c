"""Ways through one LSTM layer: all give the same numbers, at different speeds.

Decides how the candidates walk over time. `package` and `cudnn` are what a model runs; the
others are what they are measured against. Must not know what is timed, or on what.

A way is a function of a cell, x_BSE and mask_BS that gives outputs_BSH, zeros on pads.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.gpu.kernel import fused_step
from s2s.nn import cudnn, decoder, recurrent, scan
from s2s.nn.cells import LSTM


@contextlib.contextmanager
def walking(walk: str, unroll: int = 1) -> Iterator[None]:
    """What is traced inside walks over time so, in the package's own modules.

    Args:
      walk: "package"; "counted", the same with a trip count that the compiler knows: every position,
        pads or not; or "autodiff", ``jax.lax.scan`` with its weight gradients in the loop.
      unroll: steps a turn, "autodiff" only.
    """

    def counted(step: Any, carry: Any, xs: Any, turns: Any, *, reverse: bool = False) -> Any:
        return scan.scan(step, carry, xs, jnp.asarray(len(jax.tree.leaves(xs)[0])), reverse=reverse)

    def autodiff(step: Any, carry: Any, xs: Any, turns: Any, *, reverse: bool = False) -> Any:
        return jax.lax.scan(step, carry, xs, reverse=reverse, unroll=unroll)

    chosen = {"package": scan.scan, "counted": counted, "autodiff": autodiff}[walk]
    with mock.patch.object(recurrent, "scan", chosen), mock.patch.object(decoder, "scan", chosen):
        yield


def package(cell: LSTM, x_BSE: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """What s2s runs by default."""
    return recurrent.run([cell], x_BSE, mask_BS, [cell.zero_state(x_BSE.shape[:1])])[0]


def counted(cell: LSTM, x_BSE: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """The same with a trip count that the compiler knows."""
    with walking("counted"):
        return package(cell, x_BSE, mask_BS)


def through_cudnn(cell: LSTM, x_BSE: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """What s2s runs with config.model.recurrence="cudnn"."""
    if not cudnn.available():
        raise RuntimeError("cuDNN needs an NVIDIA GPU")
    return cudnn.read([cell], x_BSE, mask_BS, [cell.zero_state(x_BSE.shape[:1])])[0]


def naive(cell: LSTM, x_BSE: jax.Array, mask_BS: jax.Array, unroll: int = 1) -> jax.Array:
    """The textbook's scan, as autodiff takes it: both products, and all their gradients, in the loop."""

    def body(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        h_BH, c_BH = state
        x_BE, mask_B = inputs
        kernels = cell.input_kernel[...].astype(cell.dtype), cell.recurrent_kernel[...].astype(cell.dtype)
        gates_BG = x_BE @ kernels[0] + h_BH @ kernels[1] + cell.bias[...].astype(cell.dtype)[None]
        *new, _ = _move(gates_BG, c_BH)
        real_B1 = mask_B[:, None]
        state = jnp.where(real_B1, new[0], h_BH), jnp.where(real_B1, new[1], c_BH)
        return state, jnp.where(real_B1, new[0], 0)

    xs = jnp.swapaxes(x_BSE, 0, 1), mask_BS.T
    _, outputs_SBH = jax.lax.scan(body, cell.zero_state(x_BSE.shape[:1]), xs, unroll=unroll)
    return jnp.swapaxes(outputs_SBH, 0, 1)


def static(cell: LSTM, x_BSE: jax.Array, mask_BS: jax.Array, unroll: int = 1) -> jax.Array:
    """Weight gradients deferred out of a loop whose trip count is the array's length, pads and all."""
    return _deferred(cell, x_BSE, mask_BS, unroll, False)


def fused(cell: LSTM, x_BSE: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """As `static`, the forward step being one Pallas kernel."""
    return _deferred(cell, x_BSE, mask_BS, 1, True)


WAYS: dict[str, Any] = {
    "package": package,
    "counted": counted,
    "cudnn": through_cudnn,
    "naive": naive,
    "static": static,
    "fused": fused,
}


def _deferred(cell: LSTM, x_BSE: jax.Array, mask_BS: jax.Array, unroll: int, kernel: bool) -> jax.Array:
    gates_SBG = cell.project(jnp.swapaxes(x_BSE, 0, 1))
    weights_HG = cell.recurrent_kernel[...].astype(cell.dtype)
    return jnp.swapaxes(_walk(gates_SBG, weights_HG, mask_BS.T, unroll, kernel), 0, 1)


def _move(gates_BG: jax.Array, c_BH: jax.Array) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """h, c and the activations i, f, o, g, from whole gates."""
    i, f, o, g = jnp.split(gates_BG, 4, axis=-1)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    c_BH = f * c_BH + i * g
    return o * jnp.tanh(c_BH), c_BH, (i, f, o, g)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _walk(
    gates_SBG: jax.Array, weights_HG: jax.Array, mask_SB: jax.Array, unroll: int, kernel: bool
) -> jax.Array:
    return _walk_forward(gates_SBG, weights_HG, mask_SB, unroll, kernel)[0]


def _walk_forward(
    gates_SBG: jax.Array, weights_HG: jax.Array, mask_SB: jax.Array, unroll: int, kernel: bool
) -> tuple[jax.Array, Any]:
    def body(state: Any, inputs: Any) -> tuple[Any, Any]:
        h_BH, c_BH = state
        gates_BG, mask_B = inputs
        if kernel:
            new_h, new_c, acts = fused_step(h_BH, c_BH, gates_BG, weights_HG)
        else:
            new_h, new_c, acts = _move(gates_BG + h_BH @ weights_HG, c_BH)
        real_B1 = mask_B[:, None]
        state = jnp.where(real_B1, new_h, h_BH), jnp.where(real_B1, new_c, c_BH)
        return state, (jnp.where(real_B1, new_h, 0), h_BH, c_BH, new_c, acts)

    rows, hidden = gates_SBG.shape[1], weights_HG.shape[0]
    zeros = (jnp.zeros((rows, hidden), gates_SBG.dtype),) * 2
    _, (outputs_SBH, *kept) = jax.lax.scan(body, zeros, (gates_SBG, mask_SB), unroll=unroll)
    return outputs_SBH, (weights_HG, mask_SB, *kept)


def _walk_backward(unroll: int, kernel: bool, kept: Any, d_outputs_SBH: jax.Array) -> Any:
    weights_HG, mask_SB, before_SBH, *rest = kept

    def body(state: Any, inputs: Any) -> tuple[Any, jax.Array]:
        dh_BH, dc_BH = state
        dout_BH, mask_B, c_before, c_after, (i, f, o, g) = inputs
        real_B1 = mask_B[:, None]
        dh, tanh_c = dout_BH + dh_BH, jnp.tanh(c_after)
        dc = dc_BH + dh * o * (1 - tanh_c * tanh_c)
        parts = (
            dc * g * i * (1 - i),
            dc * c_before * f * (1 - f),
            dh * tanh_c * o * (1 - o),
            dc * i * (1 - g * g),
        )
        d_gates_BG = jnp.where(real_B1, jnp.concatenate(parts, axis=-1), 0)
        dh_before = jnp.where(real_B1, d_gates_BG @ weights_HG.T, dh_BH)
        return (dh_before, jnp.where(real_B1, dc * f, dc_BH)), d_gates_BG

    zeros = (jnp.zeros_like(d_outputs_SBH[0]),) * 2
    inputs = d_outputs_SBH, mask_SB, *rest
    _, d_gates_SBG = jax.lax.scan(body, zeros, inputs, reverse=True, unroll=unroll)
    d_weights_HG = jnp.einsum("SBH,SBG->HG", before_SBH, d_gates_SBG)
    return d_gates_SBG, d_weights_HG.astype(weights_HG.dtype), None


_walk.defvjp(_walk_forward, _walk_backward)
