"""The loss against its equation, written with loops in float64, and against automatic differentiation."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from s2s.learn import loss
from s2s.learn.loss import Sums, cross_entropy, token_log_probs
from s2s.nn.softmax import Softmax
from tests.model_variants import quick_jit

# Enough tokens for several chunks.
B, T, H, V = 40, 16, 5, 7
LENGTHS = {
    "some": np.arange(B) * 7 % (T + 1),
    "all": np.full(B, T),
    "none": np.zeros(B, int),
    "one": np.arange(B) == 3,
    "whole chunks": np.arange(B) * 2 < B,
}


def example(seed=0, scale=1.5, lengths="some", vocab_axis=1, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x_BTH = (rng.normal(size=(B, T, H)) * scale).astype(dtype)
    kernel = rng.normal(size=(H, V) if vocab_axis else (V, H)).astype(dtype)
    softmax = Softmax(jnp.asarray(kernel), jnp.asarray(rng.normal(size=V).astype(dtype)), vocab_axis)
    target_BT = rng.integers(0, V, size=(B, T))
    mask_BT = np.arange(T)[None, :] < LENGTHS[lengths][:, None]
    return jnp.asarray(x_BTH), softmax, target_BT, mask_BT


def logits_of(x_BTH, softmax):
    kernel_HV = softmax.kernel if softmax.vocab_axis else softmax.kernel.T
    return np.asarray(x_BTH, np.float64) @ np.asarray(kernel_HV, np.float64) + np.asarray(softmax.bias_V)


def oracle(logits_BTV, target_BT, mask_BT, smoothing):
    """-sum_v q(v) log p(v), token by token."""
    loss = nll = correct = tokens = 0.0
    for b, t in zip(*np.nonzero(mask_BT), strict=True):
        row = logits_BTV[b, t].astype(np.float64)
        log_p = row - row.max() - np.log(np.sum(np.exp(row - row.max())))
        q = np.full(row.size, smoothing / row.size)
        q[target_BT[b, t]] += 1 - smoothing
        loss -= np.sum(q * log_p)
        nll -= log_p[target_BT[b, t]]
        correct += np.argmax(row) == target_BT[b, t]
        tokens += 1
    return loss, nll, correct, tokens


def plain(x_BTH, softmax, target_BT, mask_BT, smoothing):
    """The loss as one writes it down, with all logits at once."""
    kernel_HV = softmax.kernel if softmax.vocab_axis else softmax.kernel.T
    log_p_BTV = jax.nn.log_softmax(x_BTH @ kernel_HV + softmax.bias_V[None, None])
    q_BTV = (1 - smoothing) * jax.nn.one_hot(target_BT, V) + smoothing / V
    return -jnp.sum(jnp.where(mask_BT[:, :, None], q_BTV * log_p_BTV, 0))


def fused(x_BTH, softmax, target_BT, mask_BT, smoothing):
    return cross_entropy(x_BTH, softmax, target_BT, mask_BT, smoothing).loss


def assert_same(one, other, **tolerance):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, **tolerance)


EXACT = {"rtol": 1e-10, "atol": 1e-12}


sums_of = quick_jit(cross_entropy)
slopes_of = quick_jit(jax.grad(fused, (0, 1, 4)))
plain_slopes_of = quick_jit(jax.grad(plain, (0, 1, 4)))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_matches_the_equation(lengths, smoothing):
    arrays = example(lengths=lengths, dtype=np.float32)
    sums = sums_of(*arrays, smoothing)
    np.testing.assert_allclose(sums, oracle(logits_of(*arrays[:2]), *arrays[2:], smoothing), rtol=2e-6)
    assert all(value.dtype == jnp.float32 and value.shape == () for value in sums)


@pytest.mark.parametrize("vocab_axis", [1, 0])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_are_those_of_automatic_differentiation(x64, lengths, vocab_axis):
    arrays = example(lengths=lengths, vocab_axis=vocab_axis)
    for smoothing in (0.0, 0.3):
        assert_same(slopes_of(*arrays, smoothing), plain_slopes_of(*arrays, smoothing), **EXACT)


@pytest.mark.parametrize("vocab_axis", [1, 0])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_in_float32(lengths, vocab_axis):
    """Made another way than in float64, where the library is."""
    arrays = example(lengths=lengths, vocab_axis=vocab_axis, dtype=np.float32)
    for smoothing in (0.0, 0.3):
        assert_same(slopes_of(*arrays, smoothing), plain_slopes_of(*arrays, smoothing), rtol=1e-4, atol=1e-4)


def test_gradients_outside_jit_and_of_functions_of_the_loss(x64):
    arrays = example()
    assert_same(jax.grad(fused, (0, 1, 4))(*arrays, 0.3), plain_slopes_of(*arrays, 0.3), **EXACT)
    bent = [
        jax.grad(lambda x, f=f: f(x, *arrays[1:], 0.3) ** 2 + jnp.sum(x))(arrays[0]) for f in (fused, plain)
    ]
    assert_same(*bent, **EXACT)


@pytest.mark.parametrize("shared", [False, True])
def test_replicas_are_losses_of_their_own(x64, shared):
    """With kernels and smoothing of their own, and batches that have other numbers of real tokens."""
    replicas = [
        example(seed, lengths=lengths) for seed, lengths in enumerate(("some", "none", "all", "whole chunks"))
    ]
    rates = np.array([0.0, 0.1, 0.2, 0.3])
    if shared:
        replicas = [(x, softmax, *replicas[0][2:]) for x, softmax, *_ in replicas]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *replicas)
    axes = 0, 0, None if shared else 0, None if shared else 0, 0
    arrays = (*stacked[:2], *(replicas[0] if shared else stacked)[2:], rates)
    both = quick_jit(jax.vmap(lambda *one: (cross_entropy(*one), jax.grad(fused, (0, 1, 4))(*one)), axes))
    together = both(*arrays)
    for r, (own, rate) in enumerate(zip(replicas, rates, strict=True)):
        mine = jax.tree.map(lambda leaf, r=r: leaf[r], together)
        assert_same(mine, (sums_of(*own, rate), slopes_of(*own, rate)), **EXACT)


def equations(jaxpr):
    """All of them, however deep."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_replicas_share_one_condition():
    """Each with one of its own would select between old and new gradients, chunk by chunk."""
    arrays = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), example(dtype=np.float32))
    graded = jax.vmap(jax.grad(lambda *one: fused(*one, 0.1), (0, 1)))
    loops = [e for e in equations(jax.make_jaxpr(graded)(*arrays).jaxpr) if e.primitive.name == "while"]
    assert [[aval.shape for aval in loop.params["cond_jaxpr"].out_avals] for loop in loops] == [[()]]


def test_rows_may_be_spread_over_devices(x64):
    arrays = example()
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "data")
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    spread = jax.device_put(arrays, (rows, whole, rows, rows))
    assert_same(slopes_of(*spread, 0.1), slopes_of(*arrays, 0.1), **EXACT)


def test_smoothing_may_be_traced():
    arrays = example(dtype=np.float32)
    logits_BTV = logits_of(*arrays[:2])
    traced = sums_of(*arrays, 0.3)
    np.testing.assert_allclose(traced, oracle(logits_BTV, *arrays[2:], 0.3), rtol=2e-6)
    rates = jnp.array([0.0, 0.1, 0.5])
    losses = quick_jit(jax.vmap(lambda rate: cross_entropy(*arrays, rate).loss))(rates)
    wanted = [oracle(logits_BTV, *arrays[2:], rate)[0] for rate in (0.0, 0.1, 0.5)]
    np.testing.assert_allclose(losses, wanted, rtol=2e-6)


def test_the_other_sums_are_constants():
    x_BTH, *rest = example(dtype=np.float32)
    slopes = quick_jit(jax.jacrev(lambda x_BTH: cross_entropy(x_BTH, *rest)))(x_BTH)
    assert [bool(jnp.any(slope)) for slope in slopes] == [True, False, False, False]


def test_token_log_probs():
    x_BTH, softmax, target_BT, mask_BT = arrays = example(dtype=np.float32)
    log_p_BT = quick_jit(token_log_probs)(*arrays)
    logits_BTV = logits_of(x_BTH, softmax)
    wanted_BTV = logits_BTV - np.log(np.sum(np.exp(logits_BTV), -1, keepdims=True))
    wanted_BT = np.where(mask_BT, np.take_along_axis(wanted_BTV, target_BT[..., None], -1)[..., 0], 0)
    np.testing.assert_allclose(log_p_BT, wanted_BT, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(-np.sum(log_p_BT), sums_of(*arrays).nll, rtol=1e-6)


def test_padding_counts_for_nothing():
    x_BTH, softmax, target_BT, mask_BT = example(dtype=np.float32)
    changed_BTH = jnp.where(mask_BT[:, :, None], x_BTH, 1e4)
    changed_BT = np.where(mask_BT, target_BT, -1)
    graded = quick_jit(jax.value_and_grad(fused, (0, 1)))
    assert_same(
        graded(changed_BTH, softmax, changed_BT, mask_BT, 0.1),
        graded(x_BTH, softmax, target_BT, mask_BT, 0.1),
        rtol=0,
    )


def turns_of(monkeypatch, lengths):
    """How many chunks were computed, by what reached the host from inside the loop."""
    seen = []
    of_chunk = loss._of_chunk

    def counted(product, *rest):
        jax.debug.callback(lambda size: seen.append(int(size)), product.shape[0])
        return of_chunk(product, *rest)

    monkeypatch.setattr(loss, "_of_chunk", counted)
    jax.block_until_ready(cross_entropy(*example(lengths=lengths, dtype=np.float32)))
    jax.effects_barrier()
    return seen


@pytest.mark.parametrize("lengths", LENGTHS)
def test_pads_cost_no_product(monkeypatch, lengths):
    sizes = turns_of(monkeypatch, lengths)
    size = loss._chunk_size(B * T)
    assert size < B * T / 2
    assert sizes == [size] * -(-int(LENGTHS[lengths].sum()) // size)


@pytest.mark.parametrize("tokens", [1, 7, 8, 100, 1170, 2048, 65536])
def test_chunks_have_room_for_all_tokens_and_little_more(tokens):
    size = loss._chunk_size(tokens)
    assert size % 8 == 0
    chunks = -(-tokens // size)
    assert tokens <= size * chunks < tokens + 8 * chunks + 8


def test_no_array_of_all_logits_is_made():
    x_BTH, softmax, target_BT, mask_BT = example()
    wide = Softmax(jnp.zeros((H, 1000)), jnp.zeros(1000))
    jaxpr = jax.make_jaxpr(jax.grad(fused, (0, 1)))(x_BTH, wide, target_BT, mask_BT, 0.1).jaxpr
    sizes = [value.aval.size for equation in equations(jaxpr) for value in equation.outvars]
    assert max(sizes) == loss._chunk_size(B * T) * 1000 < B * T * 1000 / 2


def test_parts_add_up_to_the_whole():
    x_BTH, softmax, target_BT, mask_BT = example(dtype=np.float32)
    whole = sums_of(x_BTH, softmax, target_BT, mask_BT, 0.1)
    parts = Sums.zero()
    for row in range(B):
        own = slice(row, row + 1)
        parts = parts.add(sums_of(x_BTH[own], softmax, target_BT[own], mask_BT[own], 0.1))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


def given(logits_BTV, dtype=jnp.float32):
    """Logits as the product of a row each with the identity."""
    vocab = logits_BTV.shape[-1]
    return jnp.asarray(logits_BTV, dtype), Softmax(jnp.eye(vocab), jnp.zeros(vocab))


def test_correct_takes_the_first_of_equal_logits():
    logits_BTV = np.array([[[1.0, 2.0, 2.0], [1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [3.0, 2.0, 1.0]]])
    target_BT = np.array([[1, 2, 0, 1]])
    sums = cross_entropy(*given(logits_BTV), target_BT, np.ones((1, 4), bool))
    assert sums.correct == np.sum(np.argmax(logits_BTV, -1) == target_BT) == 2


def test_low_precision_is_summed_in_float32():
    x_BTH, softmax, target_BT, mask_BT = example(dtype=np.float32)
    low_BTH = x_BTH.astype(jnp.bfloat16)
    sums, slopes = quick_jit(jax.value_and_grad(fused, (0, 1)))(low_BTH, softmax, target_BT, mask_BT, 0.1)
    low = Softmax(softmax.kernel.astype(jnp.bfloat16).astype(jnp.float32), softmax.bias_V)
    exact = low_BTH.astype(jnp.float32), low, target_BT, mask_BT, 0.1
    wanted, wanted_slopes = jax.value_and_grad(plain, (0, 1))(*exact)
    np.testing.assert_allclose(sums, wanted, rtol=2e-6)
    assert [leaf.dtype for leaf in jax.tree.leaves(slopes)] == [jnp.bfloat16, jnp.float32, jnp.float32]
    # Slopes of logits are rounded to 8 bits, their sums are not.
    np.testing.assert_allclose(slopes[1].bias_V, wanted_slopes[1].bias_V, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(slopes[1].kernel, wanted_slopes[1].kernel, rtol=0.01, atol=0.1)
    np.testing.assert_allclose(slopes[0].astype(np.float32), wanted_slopes[0], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_three_products_of_the_inputs_dtype_summed_in_float32(dtype):
    """Three a chunk, the least a gradient takes: logits are not made again."""
    x_BTH, *rest = example(dtype=np.float32)
    graded = jax.make_jaxpr(jax.value_and_grad(fused, (0, 1)))(x_BTH.astype(dtype), *rest, 0.1)
    products = [e for e in equations(graded.jaxpr) if e.primitive.name in ("contract", "contract_packed")]
    assert [{value.aval.dtype for value in e.invars[:2]} for e in products] == [{jnp.dtype(dtype)}] * 3
    assert [e.outvars[0].aval.dtype for e in products] == [jnp.float32] * 3


def test_large_logits_stay_finite():
    logits_BTV = np.array([[[1e4, -1e4, 0.0]]])
    arrays = *given(logits_BTV), np.array([[1]]), np.ones((1, 1), bool)
    assert cross_entropy(*arrays).nll == 2e4
    np.testing.assert_allclose(jax.grad(fused)(*arrays, 0.0), [[[1.0, -1.0, 0.0]]])


def test_disagreeing_shapes_are_refused():
    x_BTH, softmax, target_BT, mask_BT = example()
    with pytest.raises(ValueError, match="mask_BT has T=3"):
        cross_entropy(x_BTH, softmax, target_BT, mask_BT[:, :3])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_entries_that_only_pad_a_vocabulary_do_not_exist(x64, vocab_axis, dtype):
    """Whatever stands there: the same sums and gradients, and none of it theirs."""
    x_BTH, softmax, target_BT, mask_BT = example(vocab_axis=vocab_axis, dtype=dtype)
    # Of products of other widths, which are summed in another order.
    tolerance = {"rtol": 1e-11, "atol": 1e-13} if dtype == np.float64 else {"rtol": 1e-5, "atol": 1e-5}
    widths = ((0, 0), (0, 3)) if vocab_axis else ((0, 3), (0, 0))
    padded = Softmax(
        jnp.pad(softmax.kernel, widths, constant_values=5.0),
        jnp.pad(softmax.bias_V, (0, 3), constant_values=1e3),
        vocab_axis,
        jnp.int32(V),
    )

    def loss(x_BTH, kernel, bias_V, like):
        trained = dataclasses.replace(like, kernel=kernel, bias_V=bias_V)
        sums = cross_entropy(x_BTH, trained, target_BT, mask_BT, 0.25)
        return sums.loss, sums

    graded = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, wanted), (dx_BTH, dkernel, dbias_V) = graded(x_BTH, softmax.kernel, softmax.bias_V, softmax)
    (_, got), (dx_padded, dkernel_padded, dbias_padded) = graded(x_BTH, padded.kernel, padded.bias_V, padded)
    np.testing.assert_allclose(got, wanted, **tolerance)
    np.testing.assert_allclose(dx_padded, dx_BTH, **tolerance)
    np.testing.assert_allclose(dkernel_padded, jnp.pad(dkernel, widths), **tolerance)
    np.testing.assert_allclose(dbias_padded, jnp.pad(dbias_V, (0, 3)), **tolerance)
    assert not np.any(dbias_padded[V:])
    np.testing.assert_array_equal(jax.nn.softmax(padded.logits(x_BTH))[..., V:], 0)
