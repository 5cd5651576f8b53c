"""A model taken apart is the model: its parts lead to what it computes, by the equations of the papers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2s.batch import BOS
from s2s.nn import anatomy
from s2s.nn.attention import SCORES
from s2s.nn.cells import CELLS
from tests import oracles
from tests.model_variants import VARIANTS, Built, built, make_batch, quick_jit

BATCH = make_batch()
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def double_precision(request):
    with jax.enable_x64("half_precision" not in request.node.name):
        yield


def taken_apart(model: Built, steps: int = 3):
    """The reading; the states between steps; every step's moment and what the model itself gives.

    Two rows a sentence read the true target tokens.
    """
    read = quick_jit(lambda params: anatomy.read(model.model(params), BATCH))
    step = quick_jit(lambda params, *arguments: anatomy.step(model.model(params), *arguments))
    reading = read(model.params)
    memory, state = model.start(model.params, BATCH)
    states, moments = [state], []
    token_B = np.full_like(BATCH.target_BT[:, 0], BOS)
    for t in range(steps):
        token_BK = np.stack([token_B] * 2, axis=1)
        own = model.advance(model.params, memory, state, token_BK)
        state, moment = step(model.params, reading.memory, state, token_BK)
        for one, other in zip(jax.tree.leaves(own[0]), jax.tree.leaves(state), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
        token_B = BATCH.target_BT[:, t]
        states.append(state)
        moments.append((moment, own))
    return reading, states, moments


@pytest.fixture(params=VARIANTS)
def model(request, double_precision) -> Built:
    return built(request.param)


def recombined(cell: str, gates, before, after):
    """The state after, by the cell's equation, from its gates and the state before."""
    gates = dict(zip(CELLS[cell].gate_names, (np.asarray(gate) for gate in gates), strict=True))
    if cell == "lstm":
        c = gates["forget"] * before[1] + gates["input"] * gates["candidate"]
        return gates["output"] * np.tanh(c), c
    if cell == "gru":
        return ((1 - gates["update"]) * gates["candidate"] + gates["update"] * before[0],)
    return after


def test_the_parts_of_a_model_lead_to_what_it_computes(model):
    cfg = model.cfg
    reading, states, moments = taken_apart(model)
    memory, start = model.start(model.params, BATCH)
    mask_BS = BATCH.source_mask_BS

    # The encoder: what is kept of every position ends in the memory.
    tops = [way.state[0] for way in reading.layers[-1]]
    np.testing.assert_allclose(np.concatenate(tops, axis=-1), memory.memory_BSM, **CLOSE)
    assert len(reading.layers) == cfg.encoder_depth
    for ways in reading.layers:
        assert len(ways) == 1 + cfg.bidirectional
        for backward, way in enumerate(ways):
            assert len(way.gates) == len(CELLS[cfg.cell].gate_names)
            state = tuple(np.asarray(leaf) for leaf in way.state)
            for row, length in enumerate(BATCH.source_length_B):
                before = oracles.zero_state(cfg.cell, cfg.encoder_units)
                for s in reversed(range(length)) if backward else range(length):
                    now = tuple(leaf[row, s] for leaf in state)
                    made = recombined(cfg.cell, [gate[row, s] for gate in way.gates], before, now)
                    for one, other in zip(made, now, strict=True):
                        np.testing.assert_allclose(one, other, **CLOSE)
                    before = now

    # The bridge: where the decoder starts.
    for one, other in zip(jax.tree.leaves(reading.first), jax.tree.leaves(start.cells), strict=True):
        np.testing.assert_allclose(one, other[:, 0], **CLOSE)

    # The decoder: every step's parts lead to the next step and to the logits.
    for t, (moment, (state, logits_BKV, align_BKS)) in enumerate(moments):
        np.testing.assert_allclose(moment.logits_BKV, logits_BKV, **CLOSE)
        np.testing.assert_allclose(moment.align_BKS, align_BKS, **CLOSE)
        for one, other in zip(jax.tree.leaves(states[t + 1]), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(one, other, **CLOSE)
        assert len(moment.layers) == cfg.layers
        for number, layer in enumerate(moment.layers):
            before = tuple(np.asarray(leaf) for leaf in states[t].cells[number])
            after = states[t + 1].cells[number]
            assert len(layer.gates) == len(CELLS[cfg.cell].gate_names)
            made = recombined(cfg.cell, layer.gates, before, after)
            for one, other, kept in zip(made, after, layer.state, strict=True):
                np.testing.assert_allclose(one, other, **CLOSE)
                np.testing.assert_array_equal(kept, other)
        s_t, c_t = np.asarray(moment.layers[-1].state[0]), np.asarray(moment.context_BKM)
        assert (moment.scores_BKS is not None) == (cfg.attention in SCORES)
        if moment.scores_BKS is not None:
            scores = np.where(mask_BS[:, None], moment.scores_BKS, -np.inf)[:3]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights = weights / weights.sum(-1, keepdims=True)
            np.testing.assert_allclose(weights, moment.align_BKS[:3], **CLOSE)
            mean = np.einsum("BKS,BSM->BKM", weights, np.asarray(memory.memory_BSM)[:3])
            np.testing.assert_allclose(mean, c_t[:3], **CLOSE)
        assert c_t.shape[-1] == (0 if cfg.attention == "none" else cfg.memory)
        W_c = np.asarray(model.params["decoder"]["attentional_kernel"])
        s_tilde = np.tanh(np.concatenate([c_t, s_t], axis=-1) @ W_c)
        np.testing.assert_allclose(moment.attentional_BKH, s_tilde, **CLOSE)
        if cfg.input_feeding:
            np.testing.assert_array_equal(states[t + 1].feed_BKH, moment.attentional_BKH)

    # The vectors read are the tables' rows.
    target_VE = np.asarray(model.params["target_embedding"])
    source_VE = target_VE if cfg.tie == "all" else np.asarray(model.params["source_embedding"])
    np.testing.assert_array_equal(reading.embedding_BSE, source_VE[BATCH.source_BS])
    np.testing.assert_array_equal(moments[0][0].embedding_BKE[2, 1], target_VE[BOS])
    np.testing.assert_array_equal(moments[1][0].embedding_BKE[:, 1], target_VE[BATCH.target_BT[:, 0]])


@pytest.mark.parametrize("name", ["general-feeding"])
def test_half_precision_is_taken_apart_too(name):
    half = Built(VARIANTS[name], jnp.bfloat16, jnp.float32)
    reading, _, moments = taken_apart(half, steps=2)
    for moment, (_, logits_BKV, align_BKS) in moments:
        assert {leaf.dtype for leaf in jax.tree.leaves(moment.layers)} == {jnp.dtype(jnp.bfloat16)}
        np.testing.assert_allclose(moment.logits_BKV, logits_BKV, atol=0.05)
        np.testing.assert_allclose(moment.align_BKS, align_BKS, atol=0.02)
    assert reading.embedding_BSE.dtype == jnp.bfloat16
