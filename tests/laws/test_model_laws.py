"""What must hold for every model, whatever its cell, attention, bridge, feeding and ties."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2s.batch import BOS
from s2s.nn.attention import SCORES
from s2s.nn.bridge import BRIDGES
from s2s.nn.cells import CELLS
from tests.model_variants import VARIANTS, VOCAB, Built, built, make_batch

BATCH = make_batch()
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(autouse=True)
def double_precision(request):
    with jax.enable_x64("half_precision" not in request.node.name):
        yield


@pytest.fixture(params=VARIANTS)
def model(request, double_precision) -> Built:
    return built(request.param)


def test_variants_cover_every_name():
    seen = VARIANTS.values()
    assert {cfg.cell for cfg in seen} == set(CELLS)
    assert {cfg.bridge for cfg in seen} == set(BRIDGES)
    assert {cfg.attention for cfg in seen} == {*SCORES, "none", "fixed"}


def test_padding_changes_nothing(model):
    _, (logits_BTV, align_BTS) = model.graded(model.params, BATCH)[0]
    longer = make_batch(sources=7, targets=6)
    more_BTV, more_BTS = model.forward(model.params, longer)
    np.testing.assert_allclose(more_BTV[:, :4], logits_BTV, **CLOSE)
    np.testing.assert_allclose(more_BTS[:, :4, :5], align_BTS, **CLOSE)
    np.testing.assert_array_equal(more_BTS[:, :, 5:], 0)


def test_ids_on_source_pads_change_nothing(model):
    (loss, _), gradient = model.graded(model.params, BATCH)
    source_BS = np.where(BATCH.source_mask_BS, BATCH.source_BS, 1)
    assert (source_BS != BATCH.source_BS).any()
    (other_loss, _), other_gradient = model.graded(model.params, BATCH._replace(source_BS=source_BS))
    assert loss == other_loss
    jax.tree.map(np.testing.assert_array_equal, gradient, other_gradient)


def test_permuting_the_batch_permutes_the_result(model):
    order = np.array([2, 0, 3, 1])
    results = model.graded(model.params, BATCH)[0][1]
    permuted = model.graded(model.params, jax.tree.map(lambda x: x[order], BATCH))[0][1]
    for result, other in zip(results, permuted, strict=True):
        np.testing.assert_allclose(other, result[order], **CLOSE)


def test_weights_are_a_distribution_over_real_positions(model):
    _, (_, align_BTS) = model.graded(model.params, BATCH)[0]
    assert (align_BTS >= 0).all()
    np.testing.assert_array_equal(np.where(BATCH.source_mask_BS[:, None, :], 0, align_BTS), 0)
    attentive = model.cfg.attention in SCORES
    total_B = np.array([1, 1, 1, 0]) * attentive
    np.testing.assert_allclose(align_BTS.sum(-1), np.broadcast_to(total_B[:, None], (4, 4)), **CLOSE)


def test_teacher_forced_is_step_by_step_for_every_beam(model):
    other = BATCH._replace(target_BT=np.roll(BATCH.target_BT, 1, axis=1))
    forced = [model.graded(model.params, batch)[0][1] for batch in (BATCH, other)]
    target_BTK = np.stack([BATCH.target_BT, other.target_BT], axis=-1)
    memory, state = model.start(model.params, BATCH)
    token_BK = np.full_like(target_BTK[:, 0], BOS)
    for t in range(4):
        state, logits_BKV, align_BKS = model.advance(model.params, memory, state, token_BK)
        token_BK = target_BTK[:, t]
        for beam, (logits_BTV, align_BTS) in enumerate(forced):
            np.testing.assert_allclose(logits_BKV[:, beam], logits_BTV[:, t], **CLOSE)
            np.testing.assert_allclose(align_BKS[:, beam], align_BTS[:, t], **CLOSE)
    for leaf in jax.tree.leaves(state):
        assert leaf.shape[:2] == (4, 2)


def test_a_token_is_predicted_from_those_before_it(model):
    target_BT = np.array(BATCH.target_BT)
    target_BT[:, 1] = (target_BT[:, 1] + 1) % VOCAB
    _, (before_BTV, _) = model.graded(model.params, BATCH)[0]
    _, (after_BTV, _) = model.graded(model.params, BATCH._replace(target_BT=target_BT))[0]
    np.testing.assert_array_equal(after_BTV[:, :2], before_BTV[:, :2])
    assert (after_BTV[:, 2:] != before_BTV[:, 2:]).any(axis=-1).all()


def test_every_parameter_learns_and_fillers_stay_finite(model):
    (loss, (logits_BTV, align_BTS)), gradient = model.graded(model.params, BATCH)
    assert np.isfinite(loss) and np.isfinite(logits_BTV).all() and np.isfinite(align_BTS).all()
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert np.abs(leaf).max() > 1e-9, f"{jax.tree_util.keystr(path)} never learns"


def test_fillers_change_no_gradient(model):
    _, gradient = model.graded(model.params, BATCH)
    target_BT = np.array(BATCH.target_BT)
    target_BT[3] = 5
    _, other = model.graded(model.params, BATCH._replace(target_BT=target_BT))
    jax.tree.map(np.testing.assert_array_equal, gradient, other)


def test_jit_is_no_jit(model):
    _, compiled = model.graded(model.params, BATCH)[0]
    for one, other in zip(compiled, model.plain_forward(model.params, BATCH), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


def test_replicas_are_models_of_their_own(model):
    """One program over stacked parameters, keys and rates; dropout needs a key and a rate."""
    halved = jax.tree.map(lambda x: 0.5 * x, model.params)
    one, two = jax.random.key(1), jax.random.key(2)
    replicas = [(model.params, one, 0.0), (halved, two, 0.0)]
    replicas += [(model.params, key, rate) for key, rate in ((one, 0.5), (two, 0.5), (one, 0.5), (one, 0.1))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[params for params, _, _ in replicas])
    keys, rates = jnp.stack([key for _, key, _ in replicas]), jnp.array([rate for _, _, rate in replicas])
    logits_RBTV, align_RBTS = model.replicated(stacked, BATCH, keys, rates)
    for replica, params in enumerate((model.params, halved)):
        _, (logits_BTV, align_BTS) = model.graded(params, BATCH)[0]
        np.testing.assert_allclose(logits_RBTV[replica], logits_BTV, **CLOSE)
        np.testing.assert_allclose(align_RBTS[replica], align_BTS, **CLOSE)
    np.testing.assert_array_equal(logits_RBTV[2], logits_RBTV[4])
    for one_replica, other in ((0, 2), (0, 5), (2, 3), (2, 5)):
        assert np.abs(logits_RBTV[one_replica] - logits_RBTV[other]).max() > 1e-6


@pytest.mark.parametrize("name", ["concat", "general-feeding"])
def test_replicas_drop_what_a_model_alone_drops(name):
    model = built(name)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), model.params)
    keys, rates = jax.random.split(jax.random.key(5), 2), jnp.array([0.2, 0.6])
    together = model.replicated(stacked, BATCH, keys, rates)
    for replica in range(2):
        params = jax.tree.map(lambda x, r=replica: x[r], stacked)
        alone = model.forward(params, BATCH, keys[replica], rates[replica])
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(other[replica], one, **CLOSE)


def test_no_two_names_are_the_same_model():
    outputs = {name: built(name).graded(built(name).initial, BATCH)[0][1][0] for name in VARIANTS}
    for one, other in itertools.combinations(VARIANTS, 2):
        assert np.abs(outputs[one] - outputs[other])[:3].max() > 1e-6, f"{one} is {other}"


@pytest.mark.parametrize(
    "name", ["none", "fixed", "dot", "concat", "general-feeding", "gru-copy", "tanh-zero", "relu-dense"]
)
def test_half_precision_is_close(name):
    single = Built(VARIANTS[name], jnp.float32, jnp.float32)
    half = Built(VARIANTS[name], jnp.bfloat16, jnp.float32)
    # Halved, or the states of a relu RNN grow to where bfloat16 numbers lie 0.1 apart.
    params = jax.tree.map(lambda x: 0.5 * x, single.params)
    exact = single.forward(params, BATCH)
    (_, rough), gradient = half.graded(params, BATCH)
    for one, other in zip(exact, rough, strict=True):
        assert one.dtype == other.dtype == jnp.float32
        np.testing.assert_allclose(other, one, atol=0.02)
    for leaf in jax.tree.leaves((half.initial, gradient)):
        assert leaf.dtype == jnp.float32 and np.isfinite(leaf).all()
    memory, state = half.start(params, BATCH)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}
    after, logits_BKV, _ = half.advance(params, memory, state, np.full((4, 2), BOS, np.int32))
    assert logits_BKV.dtype == jnp.float32
    before, after = (jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, after))
    assert before == after
