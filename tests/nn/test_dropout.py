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


def dropping(rows):
    """Dropout of a batch with these pairs."""
    return Dropout(KEY, jnp.asarray(rows), 0.5, 0.5, 0.5)


def test_no_key_or_no_rate_drops_nothing():
    x = jnp.ones((3, 4))
    some = dropping(range(3))
    assert drop(x, 0.5, OFF) is x
    assert drop(x, 0.0, some) is x
    np.testing.assert_array_equal(jax.jit(drop)(x, 0.0, some), x)
    assert OFF.at(3) is OFF


@pytest.mark.parametrize("rate", [0.3, 0.001, 0.999])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_drops_the_rate_and_keeps_the_mean(dtype, rate):
    x = jnp.full((400, 501), 2, dtype)
    dropped = jax.jit(drop)(x, jnp.float32(rate), dropping(range(400)))
    assert dropped.dtype == dtype
    kept = np.asarray(dropped != 0)
    # Four standard errors of 200,400 draws.
    error = 4 * (rate * (1 - rate) / kept.size) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < error
    np.testing.assert_allclose(np.asarray(dropped, np.float32)[kept], 2 / (1 - rate), rtol=0.01)
    assert abs(np.asarray(dropped, np.float32).mean() - 2) < (2 * error + 0.01) / (1 - rate)
    # And nowhere more than elsewhere.
    for axis in (0, 1):
        share = kept.mean(axis)
        assert np.abs(share - (1 - rate)).max() < 5 * (rate * (1 - rate) / kept.shape[axis]) ** 0.5 + 0.005


def test_places_have_their_own_masks():
    dropout = dropping(range(2))
    x = jnp.ones((2, 64))
    masks = [drop(x, 0.5, dropout.at(place)) for place in range(4)]
    assert len({np.asarray(mask).tobytes() for mask in masks}) == 4
    np.testing.assert_array_equal(masks[1], drop(x, 0.5, dropout.at(jnp.int32(1))))


def test_a_mask_belongs_to_a_pair():
    """Not to its row, nor to who is beside it; and what is padded further keeps the mask it had."""
    x = jnp.ones((5, 7, 33))
    masks = drop(x, 0.5, dropping([0, 1, 2, 70_000, -1]))
    assert len({np.asarray(mask).tobytes() for mask in masks}) == 5
    moved = drop(jnp.ones((3, 9, 33)), 0.5, dropping([70_000, 1, 70_000]))
    np.testing.assert_array_equal(moved[:, :7], masks[jnp.array([3, 1, 3])])
    time_first = drop(jnp.swapaxes(x, 0, 1), 0.5, dropping([0, 1, 2, 70_000, -1]), rows_axis=1)
    np.testing.assert_array_equal(jnp.swapaxes(time_first, 0, 1), masks)


def test_falls_between_layers_only():
    for layers, changes in ((1, False), (2, True)):
        stack = Stack("tanh", 3, 4, layers, rngs=nnx.Rngs(0))
        gates_TBG = stack.project(jax.random.normal(KEY, (5, 2, 3)))
        states = tuple(cell.zero_state((2,)) for cell in stack.cells)
        plain, _ = stack.run(gates_TBG, states)
        dropped, _ = stack.run(gates_TBG, states, dropping(range(2)))
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
    differing, _ = decoder.run(memory, jnp.ones((1, 3, 3)), dropping([0]))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(differing[0, one] - differing[0, other]).max() > 1e-3


def test_every_rate_has_its_places():
    """One rate at a time: what of encoder, decoder and softmax it reaches."""
    cfg = ModelConfig(embedding=4, hidden=6, layers=2, input_feeding=True)
    model, batch = Seq2Seq(cfg, VOCAB, VOCAB, rngs=nnx.Rngs(0)), make_batch()

    @jax.jit
    def passes(rates):
        dropout = Dropout(KEY, batch.index_B, *rates)
        whole, dropped = model.encode(batch), model.encode(batch, dropout)
        output_BTH, align_BTS = model.teacher_forced(whole, batch.target_BT, batch.target_length_B, dropout)
        return dropped.memory_BSM, align_BTS, output_BTH

    plain = passes(jnp.zeros(3))
    for place, reached in enumerate([(True, True, True), (True, True, True), (False, False, True)]):
        outputs = passes(jnp.zeros(3).at[place].set(0.5))
        changed = [np.abs(one - other).max() > 1e-6 for one, other in zip(plain, outputs, strict=True)]
        assert tuple(changed) == reached, Dropout._fields[place + 1]
