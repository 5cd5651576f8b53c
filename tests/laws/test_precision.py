"""A model's gradient from the library's float32 is about as near to that in float64 as from XLA's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from s2s.batch import Batch
from s2s.config import ModelConfig
from s2s.kernels import library
from s2s.nn.attention import SCORES
from s2s.nn.seq2seq import Seq2Seq
from tests.model_variants import quick_jit

ROWS, SOURCES, TARGETS, VOCABULARY = 24, 12, 10, 60


def batch():
    """Sources and targets of all lengths but none."""
    rng = np.random.default_rng(0)
    return Batch(
        rng.integers(4, VOCABULARY, (ROWS, SOURCES)).astype(np.int32),
        (1 + np.arange(ROWS) % SOURCES).astype(np.int32),
        rng.integers(4, VOCABULARY, (ROWS, TARGETS)).astype(np.int32),
        (1 + np.arange(ROWS) % TARGETS).astype(np.int32),
        np.arange(ROWS, dtype=np.int32),
    )


def gradient(cfg, leaves, dtype):
    """Of the loss by every parameter, in float64; all products in one dtype."""
    with jax.enable_x64(dtype == "float64"):
        dtype = jnp.dtype(dtype)
        model = Seq2Seq(cfg, VOCABULARY, VOCABULARY, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
        graphdef, like = nnx.split(model, nnx.Param)
        given = jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(leaf, dtype) for leaf in leaves])

        def loss(params, batch):
            model = nnx.merge(graphdef, params)
            logits_BTV = model.softmax().logits(model(batch)[0])
            nll_BT = -jnp.take_along_axis(
                jax.nn.log_softmax(logits_BTV), jnp.asarray(batch.target_BT)[..., None], axis=-1
            )[..., 0]
            return jnp.where(batch.target_mask_BT, nll_BT, 0).sum()

        found = quick_jit(jax.grad(loss))(given, batch())
        return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found)]


def errors(found, exact):
    """Of every parameter, of the norm of what is exact."""
    return np.array(
        [np.linalg.norm(x - right) / np.linalg.norm(right) for x, right in zip(found, exact, strict=True)]
    )


@pytest.mark.parametrize("feeding", [False, True], ids=["no feeding", "feeding"])
@pytest.mark.parametrize("attention", SCORES)
def test_a_gradient_errs_as_one_through_xla_does(attention, feeding, monkeypatch):
    if library.load() is None:
        pytest.skip("no library on this machine")
    cfg = ModelConfig(
        embedding=64, hidden=96, layers=1, attention=attention, input_feeding=feeding, dropout=0.0
    )
    start = nnx.split(Seq2Seq(cfg, VOCABULARY, VOCABULARY, rngs=nnx.Rngs(0)), nnx.Param)[1]
    rng = np.random.default_rng(1)
    leaves = [np.asarray(x) + 0.05 * rng.standard_normal(x.shape) for x in jax.tree.leaves(start)]
    leaves = [leaf.astype(np.float32) for leaf in leaves]
    ours, exact = (gradient(cfg, leaves, dtype) for dtype in ("float32", "float64"))
    monkeypatch.setattr(library, "load", lambda: None)
    xlas = gradient(cfg, leaves, "float32")
    times = errors(ours, exact) / errors(xlas, exact)
    # Found in fixed point: 2.6 to 2.8 in the middle, 3.3 to 3.6 at most.
    assert np.median(times) < 4 and times.max() < 6
