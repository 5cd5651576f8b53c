"""Dropout: off when told, unbiased when on, and no two places or steps alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from s2s.config import ModelConfig
from s2s.nn.decoder import Decoder
from s2s.nn.dropout import OFF, Dropout, drop
from s2s.nn.encoder import Memory
from s2s.nn.recurrent import Stack
from s2s.nn.seq2seq import Seq2Seq
from tests.model_variants import VOCAB, make_batch

KEY = jax.random.key(0)


def test_no_key_or_no_rate_drops_nothing():
    x = jnp.ones((3, 4))
    assert drop(x, 0.5, None) is x
    assert drop(x, 0.0, KEY) is x
    np.testing.assert_array_equal(jax.jit(drop)(x, 0.0, KEY), x)
    assert OFF.at(3) is OFF


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_drops_the_rate_and_keeps_the_mean(dtype):
    x = jnp.full((400, 500), 2, dtype)
    dropped = jax.jit(drop)(x, jnp.float32(0.3), KEY)
    assert dropped.dtype == dtype
    kept = np.asarray(dropped != 0)
    # 200,000 draws: the standard error of the share is 0.001.
    assert abs(kept.mean() - 0.7) < 0.004
    np.testing.assert_allclose(np.asarray(dropped, np.float32)[kept], 2 / 0.7, rtol=0.01)
    assert abs(np.asarray(dropped, np.float32).mean() - 2) < 0.02


def test_places_have_their_own_masks():
    dropout = Dropout(KEY, 0.5, 0.5, 0.5)
    x = jnp.ones(64)
    masks = [drop(x, 0.5, dropout.at(place).key) for place in range(4)]
    assert len({tuple(np.asarray(mask)) for mask in masks}) == 4
    np.testing.assert_array_equal(masks[1], drop(x, 0.5, dropout.at(jnp.int32(1)).key))


def test_falls_between_layers_only():
    for layers, changes in ((1, False), (2, True)):
        stack = Stack("tanh", 3, 4, layers, rngs=nnx.Rngs(0))
        gates_TBG = stack.project(jax.random.normal(KEY, (5, 2, 3)))
        states = tuple(cell.zero_state((2,)) for cell in stack.cells)
        plain, _ = stack.run(gates_TBG, states)
        dropped, _ = stack.run(gates_TBG, states, Dropout(KEY, 0.0, 0.5, 0.0))
        assert (np.asarray(plain) != dropped).any() == changes


def test_steps_under_input_feeding_have_their_own_masks():
    """Steps that read the same must differ by their masks alone."""
    cfg = ModelConfig(embedding=3, hidden=64, layers=2, cell="tanh", bridge="zero", input_feeding=True)
    decoder = Decoder(cfg, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    for cell in decoder.stack.cells:
        cell.recurrent_kernel[...] = jnp.zeros((64, 64))
    decoder.feed_kernel[...] = jnp.zeros((64, 64))
    memory_BSM = jnp.ones((1, 2, 64))
    keys = decoder.attention.prepare(memory_BSM)
    memory = Memory(memory_BSM, jnp.ones((1, 2), bool), keys, memory_BSM[:, 0], ((memory_BSM[:, 0],),) * 2)
    same, _ = decoder.run(memory, jnp.ones((1, 3, 3)))
    np.testing.assert_allclose(same[0, 1:], same[0, :1].repeat(2, axis=0), atol=1e-6)
    differing, _ = decoder.run(memory, jnp.ones((1, 3, 3)), Dropout(KEY, 0.0, 0.5, 0.0))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(differing[0, one] - differing[0, other]).max() > 1e-3


def test_every_rate_has_its_places():
    """One rate at a time: what of encoder, decoder and softmax it reaches."""
    cfg = ModelConfig(embedding=4, hidden=6, layers=2, input_feeding=True)
    model, batch = Seq2Seq(cfg, VOCAB, VOCAB, rngs=nnx.Rngs(0)), make_batch()

    @jax.jit
    def passes(rates):
        dropout = Dropout(KEY, *rates)
        whole, dropped = model.encode(batch), model.encode(batch, dropout)
        logits_BTV, align_BTS = model.teacher_forced(whole, batch.target_BT, dropout)
        return dropped.memory_BSM, align_BTS, logits_BTV

    plain = passes(jnp.zeros(3))
    for place, reached in enumerate([(True, True, True), (True, True, True), (False, False, True)]):
        outputs = passes(jnp.zeros(3).at[place].set(0.5))
        changed = [np.abs(one - other).max() > 1e-6 for one, other in zip(plain, outputs, strict=True)]
        assert tuple(changed) == reached, Dropout._fields[place + 1]
