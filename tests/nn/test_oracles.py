"""Every cell, score, bridge, encoder and whole model against its equation in NumPy, and its gradient."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from s2s.batch import BOS
from s2s.nn.attention import SCORES, WINDOWS, attend
from s2s.nn.bridge import BRIDGES
from s2s.nn.cells import CELLS
from s2s.nn.encoder import Encoder
from s2s.nn.recurrent import Stack, run, walk
from tests import oracles
from tests.model_variants import VARIANTS, built, make_batch, perturbed, quick_jit

CLOSE = {"rtol": 1e-11, "atol": 1e-13}
DOUBLE = {"dtype": jnp.float64, "param_dtype": jnp.float64}
LENGTHS = (5, 3, 1, 0)
MASK_BS = np.arange(5)[None, :] < np.array(LENGTHS)[:, None]

pytestmark = pytest.mark.usefixtures("x64")


def numbers(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


def split(module):
    """The module as a function of its (perturbed) parameters, those, and the same for the oracle."""
    graphdef, params = nnx.split(module, nnx.Param)
    params = perturbed(params)
    return functools.partial(nnx.merge, graphdef), params, plain(params)


def plain(params):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(params))


def check(fn, *arguments):
    check_grads(jax.jit(fn), arguments, order=1, modes=["rev"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("directions", [1, 2])
def test_cell_over_time(name, directions):
    rngs = [nnx.Rngs(way) for way in range(directions)]
    merge, params, p = split(nnx.List([CELLS[name](3, 4, rngs=rng, **DOUBLE) for rng in rngs]))
    assert merge(params)[0].state_size == len(oracles.zero_state(name, 4))
    x_BSE = numbers(4, 5, 3)
    states = [
        tuple(numbers(4, 4, seed=10 * way + part + 2) for part in range(len(oracles.zero_state(name, 4))))
        for way in range(directions)
    ]

    def fn(params, x_BSE, states):
        return run(merge(params), x_BSE, MASK_BS, states)

    outputs_BSM, lasts = quick_jit(fn)(params, x_BSE, states)
    for way, (b, length) in itertools.product(range(directions), enumerate(LENGTHS)):
        first = tuple(part[b] for part in states[way])
        expected_SH, expected = oracles.run(name, p[way], x_BSE[b], length, first, bool(way))
        np.testing.assert_allclose(outputs_BSM[b, :, 4 * way : 4 * way + 4], expected_SH, **CLOSE)
        for one, other in zip(lasts[way], expected, strict=True):
            np.testing.assert_allclose(one[b], other, **CLOSE)
    check(fn, params, x_BSE, states)


def test_an_unmasked_walk_is_all_real():
    cell = CELLS["gru"](3, 4, rngs=nnx.Rngs(0), **DOUBLE)
    gates_TBG, states = cell.project(numbers(5, 2, 3)), [(numbers(2, 4),)]
    lengths = None, jnp.full(2, 5)
    bare, masked = (walk([cell], [gates_TBG], states, jnp.asarray(5), length_B) for length_B in lengths)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), bare, masked)


@pytest.mark.parametrize("name", CELLS)
def test_stack(name):
    merge, params, p = split(Stack(name, 3, 4, 2, rngs=nnx.Rngs(0), **DOUBLE))
    x_TE = numbers(5, 3)
    outputs_TH = x_TE
    for layer in range(2):
        outputs_TH, _ = oracles.run(name, p["cells"][layer], outputs_TH, 5, oracles.zero_state(name, 4))
    stack = merge(params)
    states = tuple(cell.zero_state((1,)) for cell in stack.cells)
    gates_TBG = stack.project(x_TE[:, None, :])
    run_TBH, last = stack.run(gates_TBG, states)
    np.testing.assert_allclose(run_TBH[:, 0], outputs_TH, **CLOSE)
    for t in range(5):
        states = stack.step(states, gates_TBG[t])
        np.testing.assert_allclose(states[-1][0], run_TBH[t], **CLOSE)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), states, last)


@pytest.mark.parametrize("name", SCORES)
def test_score(name):
    memory = 4 if name == "dot" else 6
    merge, params, p = split(SCORES[name](4, memory, rngs=nnx.Rngs(0), **DOUBLE))
    query_BTH, memory_BSM = numbers(2, 3, 4), numbers(2, 5, memory)

    def fn(params, query_BTH, memory_BSM):
        score = merge(params)
        return score(query_BTH, score.prepare(memory_BSM))

    scores_BTS = fn(params, query_BTH, memory_BSM)
    for b, t, j in np.ndindex(2, 3, 5):
        expected = oracles.SCORES[name](p, query_BTH[b, t], memory_BSM[b, j])
        np.testing.assert_allclose(scores_BTS[b, t, j], expected, **CLOSE)
    check(fn, params, query_BTH, memory_BSM)


def test_dot_refuses_unequal_sizes():
    with pytest.raises(ValueError, match="queries of 4 and memory of 6 .* use general"):
        SCORES["dot"](4, 6, rngs=nnx.Rngs(0))


def test_attend():
    scores_BTS, memory_BSM, factor_BTS = 30 * numbers(4, 3, 5), numbers(4, 5, 6), numbers(4, 3, 5) ** 2
    mask_BTS, factor = WINDOWS["global"]()(MASK_BS)
    assert factor is None
    context_BTM, align_BTS = attend(scores_BTS, mask_BTS, memory_BSM)
    _, scaled_BTS = attend(scores_BTS, mask_BTS, memory_BSM, factor_BTS)
    for b, t in np.ndindex(4, 3):
        context_M, align_S = oracles.attend(scores_BTS[b, t], LENGTHS[b], memory_BSM[b])
        np.testing.assert_allclose(context_BTM[b, t], context_M, **CLOSE)
        np.testing.assert_allclose(align_BTS[b, t], align_S, **CLOSE)
        np.testing.assert_allclose(scaled_BTS[b, t], align_S * factor_BTS[b, t], **CLOSE)
    check(lambda e, h, f: attend(e, mask_BTS, h, f), scores_BTS / 30, memory_BSM, factor_BTS)


@pytest.mark.parametrize("state_size", [1, 2])
@pytest.mark.parametrize(
    "name,encoder_layers", [("copy", 2), ("zero", 2), ("dense", 2), ("dense", 3), ("dense", 1)]
)
def test_bridge(name, encoder_layers, state_size):
    hidden = 6 if name == "copy" else 4
    merge, params, p = split(
        BRIDGES[name](encoder_layers, 2, state_size, 6, hidden, rngs=nnx.Rngs(0), **DOUBLE)
    )
    states = tuple(
        tuple(numbers(3, 6, seed=10 * layer + part) for part in range(state_size))
        for layer in range(encoder_layers)
    )

    def fn(params, states):
        return merge(params)(states)

    crossed = fn(params, states)
    for b in range(3):
        expected = oracles.bridge(name, p, jax.tree.map(lambda x, b=b: x[b], states), 2, hidden)
        assert len(crossed) == len(expected) == 2
        for new, layer in zip(crossed, expected, strict=True):
            for one, other in zip(new, layer, strict=True):
                np.testing.assert_allclose(one[b], other, **CLOSE)
    check(fn, params, states)


def test_copy_refuses_other_sizes():
    with pytest.raises(ValueError, match="copy hands 1 layers of 6 features to 2 layers of 6"):
        BRIDGES["copy"](1, 2, 1, 6, 6)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_encoder(name, bidirectional):
    merge, params, p = split(Encoder(name, 3, 4, 2, bidirectional, rngs=nnx.Rngs(0), **DOUBLE))
    x_BSE = numbers(4, 5, 3)
    memory = quick_jit(lambda params: merge(params)(x_BSE, MASK_BS))(params)
    for b, length in enumerate(LENGTHS):
        memory_SM, states = oracles.encoder(name, p, x_BSE[b], length)
        np.testing.assert_allclose(memory.memory_BSM[b], memory_SM, **CLOSE)
        if length:
            summary_M = np.concatenate([memory_SM[length - 1, :4], memory_SM[0, 4:]])
            np.testing.assert_allclose(memory.summary_BM[b], summary_M, **CLOSE)
        for new, layer in zip(memory.states, states, strict=True):
            for one, other in zip(new, layer, strict=True):
                np.testing.assert_allclose(one[b], other, **CLOSE)


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_model(name):
    model, batch = built(name), make_batch()
    (_, (logits_BTV, align_BTS)), _ = model.graded(model.params, batch)
    p = plain(model.params)
    for b, length in enumerate(batch.source_length_B):
        pair = batch.source_BS[b], length, batch.target_BT[b]
        logits_TV, align_TS = oracles.seq2seq(model.cfg, p, *pair, BOS)
        np.testing.assert_allclose(logits_BTV[b], logits_TV, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(align_BTS[b], align_TS, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_of_whole_model(name):
    """The derivative along a random direction, by central differences."""
    model, batch = built(name), make_batch()
    _, gradient = model.graded(model.params, batch)
    direction = jax.tree.map(lambda x: jnp.asarray(numbers(*x.shape, seed=x.size)), model.params)

    def loss(step):
        moved = jax.tree.map(lambda x, d: x + step * d, model.params, direction)
        return model.graded(moved, batch)[0][0]

    numerical = (loss(1e-6) - loss(-1e-6)) / 2e-6
    products = jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), numerical, rtol=1e-6)
