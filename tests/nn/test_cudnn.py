"""The cuDNN layer against our loop: on a CPU through JAX's reference of cuDNN, on a GPU through cuDNN."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import rnn

from s2s.config import Config, ConfigError, ModelConfig
from s2s.nn import cudnn
from s2s.nn.cells import LSTM
from s2s.nn.recurrent import run
from tests.model_variants import Built, make_batch

FEATURES, HIDDEN, STEPS = 3, 4, 6
# A full row, a short one, the shortest, and a filler.
MASK_BS = np.arange(STEPS)[None, :] < np.array([6, 4, 1, 0])[:, None]


def reference(x, h_0, c_0, weights, seq_lengths, input_size, hidden_size, num_layers, dropout, bidirectional):
    """`rnn.lstm` in plain JAX, by JAX's own reading of cuDNN's packed vector."""
    sizes = input_size, hidden_size, num_layers, bidirectional
    parts = rnn.unpack_lstm_weights(weights, *sizes)
    assert weights.size == rnn.get_num_params_in_lstm(*sizes)
    return rnn.lstm_ref(x, h_0, c_0, *parts, seq_lengths, *sizes[:3], dropout, bidirectional)


def layer(directions: int, dtype):
    """Cells moved away from their start, inputs, and a state for each cell."""
    rngs, rng = nnx.Rngs(0), np.random.default_rng(0)
    graphdef, params = nnx.split(
        nnx.List(
            [LSTM(FEATURES, HIDDEN, rngs=rngs, dtype=dtype, param_dtype=dtype) for _ in range(directions)]
        )
    )
    params = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.3 * rng.standard_normal(leaf.shape), dtype), params
    )
    x_BSE = jnp.asarray(rng.standard_normal((len(MASK_BS), STEPS, FEATURES)), dtype)
    states = jnp.asarray(rng.standard_normal((directions, 2, len(MASK_BS), HIDDEN)), dtype)
    return graphdef, params, x_BSE, states


def ours(cells, x_BSE, mask_BS, states):
    return run(cells, x_BSE, np.ones(x_BSE.shape[:2], bool) if mask_BS is None else mask_BS, states)


def results_and_gradients(how, graphdef, params, x_BSE, mask_BS, states):
    """Everything a layer gives, and the gradient of a sum that weighs every number of it differently."""

    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def weighed(params, x_BSE, states):
        found = how(nnx.merge(graphdef, params), x_BSE, mask_BS, [tuple(state) for state in states])
        leaves = jax.tree.leaves(found)
        rng = np.random.default_rng(1)
        return sum(
            jnp.vdot(rng.standard_normal(leaf.shape).astype(leaf.dtype), leaf) for leaf in leaves
        ), found

    (_, found), gradients = jax.jit(weighed)(params, x_BSE, states)
    return jax.tree.leaves((found, gradients))


def assert_same(case, mask_BS, tolerance):
    expected = results_and_gradients(ours, case[0], case[1], case[2], mask_BS, case[3])
    found = results_and_gradients(cudnn.read, case[0], case[1], case[2], mask_BS, case[3])
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mask_BS", [MASK_BS, None], ids=["padded", "full"])
@pytest.mark.parametrize("directions", [1, 2])
def test_the_packed_layer_is_ours(monkeypatch, x64, directions, mask_BS):
    monkeypatch.setattr(rnn, "lstm", reference)
    # The reference adds a bias [1, H] in a loop of its own ranks.
    with jax.numpy_rank_promotion("allow"):
        assert_same(layer(directions, jnp.float64), mask_BS, 1e-12)


@pytest.mark.parametrize("directions", [1, 2])
def test_what_is_on_pads_does_not_matter(monkeypatch, x64, directions):
    monkeypatch.setattr(rnn, "lstm", reference)
    graphdef, params, x_BSE, states = layer(directions, jnp.float64)
    dirty_BSE = jnp.where(MASK_BS[:, :, None], x_BSE, jnp.nan)
    clean, dirty = (
        results_and_gradients(cudnn.read, graphdef, params, x, MASK_BS, states) for x in (x_BSE, dirty_BSE)
    )
    for one, other in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.asarray(clean[0])[~MASK_BS].any()


@pytest.mark.parametrize("attention", ["general", "fixed"])
@pytest.mark.parametrize("feeding", [False, True], ids=["plain", "feeding"])
def test_a_model_is_the_same_through_cudnn(monkeypatch, x64, attention, feeding):
    """Losses and every gradient; the decoder goes through cuDNN where its gates are the cell's alone."""
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return reference(*arguments, **options)

    monkeypatch.setattr(cudnn, "available", lambda: True)
    monkeypatch.setattr(rnn, "lstm", counted)
    batch, found = make_batch(), []
    for recurrence in ("scan", "cudnn"):
        cfg = ModelConfig(
            embedding=4, hidden=6, layers=2, dropout=0.0, attention=attention, input_feeding=feeding,
            recurrence=recurrence,
        )  # fmt: skip
        model = Built(cfg, jnp.float64, jnp.float64)
        with jax.numpy_rank_promotion("allow"):
            found.append(jax.tree.leaves(model.graded(model.params, batch)))
    decoder_layers = 2 if attention == "general" and not feeding else 0
    assert [call["bidirectional"] for call in calls] == [True] * 2 + [False] * decoder_layers
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.skipif(cudnn.available(), reason="this machine has a GPU")
def test_training_through_cudnn_without_a_gpu_is_refused_before_anything_is_made(tmp_path):
    from s2s import train

    cfg = dataclasses.replace(Config(), model=ModelConfig(recurrence="cudnn"))
    with pytest.raises(ConfigError, match="'cudnn' needs an NVIDIA GPU, and JAX runs on none"):
        train.run(cfg, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_call_is_one_that_jax_takes(monkeypatch):
    """Traced to cuDNN's own operations, forward and backward, without a GPU to run them."""
    if not cudnn.available():
        monkeypatch.setattr(
            rnn.gpu_rnn, "compute_rnn_workspace_reserve_space_sizes", lambda *_: (8, 8), raising=False
        )
    graphdef, params, x_BSE, states = layer(2, jnp.float32)

    def loss(params, x_BSE, states):
        cells = nnx.merge(graphdef, params)
        return cudnn.read(cells, x_BSE, MASK_BS, tuple(states))[0].sum()

    program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(params, x_BSE, states))
    assert program.count("rnn_fwd[") == 1 and program.count("rnn_bwd[") == 1


@pytest.mark.skipif(not cudnn.available(), reason="cuDNN needs an NVIDIA GPU, and JAX runs without one here")
@pytest.mark.parametrize("mask_BS", [MASK_BS, None], ids=["padded", "full"])
@pytest.mark.parametrize("directions", [1, 2])
def test_cudnn_is_ours(directions, mask_BS):
    with jax.default_matmul_precision("highest"):
        assert_same(layer(directions, jnp.float32), mask_BS, 1e-4)
