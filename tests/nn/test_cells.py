"""How cells start, and that their two halves hold for any leading axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from s2s.nn.cells import CELLS


@pytest.mark.parametrize("name", CELLS)
def test_leading_axes_are_free(name):
    cell = CELLS[name](3, 4, rngs=nnx.Rngs(0))
    x_BKE = jax.random.normal(jax.random.key(0), (2, 5, 3))
    state = cell.step(cell.zero_state((2, 5)), cell.project(x_BKE))
    flat = cell.step(cell.zero_state((10,)), cell.project(x_BKE.reshape(10, 3)))
    assert len(state) == cell.state_size
    for one, other in zip(state, flat, strict=True):
        assert one.shape == (2, 5, cell.hidden)
        np.testing.assert_allclose(one.reshape(10, 4), other, atol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_kernels_start_orthogonal_gate_by_gate(name):
    cell = CELLS[name](3, 4, rngs=nnx.Rngs(0))
    blocks = np.split(np.asarray(cell.recurrent_kernel[...]), cell.gates, axis=1)
    for block in blocks:
        np.testing.assert_allclose(block.T @ block, np.eye(4), atol=1e-5)
        assert np.allclose(block, np.eye(4)) == (name == "relu")
    assert len({block.tobytes() for block in blocks}) == cell.gates


@pytest.mark.parametrize("name", CELLS)
def test_input_kernels_start_glorot_gate_by_gate(name):
    kernel = np.asarray(CELLS[name](30, 50, rngs=nnx.Rngs(0)).input_kernel[...])
    bound = np.sqrt(6 / 80)
    assert 0.97 * bound < np.abs(kernel).max() <= bound


@pytest.mark.parametrize("name", CELLS)
def test_only_the_forget_gate_starts_biased(name):
    cell = CELLS[name](3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    expected = np.zeros(cell.gates * 4)
    if name == "lstm":
        expected[4:8] = 1
    np.testing.assert_array_equal(cell.bias[...], expected)
