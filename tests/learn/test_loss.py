"""The loss against its equation, written with loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from s2s.learn.loss import Sums, cross_entropy

B, T, V = 3, 4, 7


def example(seed=0, scale=3.0):
    rng = np.random.default_rng(seed)
    logits_BTV = rng.normal(size=(B, T, V)) * scale
    target_BT = rng.integers(0, V, size=(B, T))
    mask_BT = np.arange(T)[None, :] < np.array([4, 2, 0])[:, None]
    return logits_BTV, target_BT, mask_BT


def oracle(logits_BTV, target_BT, mask_BT, smoothing):
    """-sum_v q(v) log p(v), token by token."""
    loss = nll = correct = tokens = 0.0
    for b, t in zip(*np.nonzero(mask_BT), strict=True):
        row = logits_BTV[b, t].astype(np.float64)
        log_p = row - row.max() - np.log(np.sum(np.exp(row - row.max())))
        q = np.full(V, smoothing / V)
        q[target_BT[b, t]] += 1 - smoothing
        loss -= np.sum(q * log_p)
        nll -= log_p[target_BT[b, t]]
        correct += np.argmax(row) == target_BT[b, t]
        tokens += 1
    return loss, nll, correct, tokens


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_matches_the_equation(seed, smoothing):
    arrays = example(seed)
    sums = cross_entropy(*arrays, smoothing)
    np.testing.assert_allclose(sums, oracle(*arrays, smoothing), rtol=2e-6)
    assert all(value.dtype == jnp.float32 and value.shape == () for value in sums)


def test_smoothing_may_be_traced():
    arrays = example()
    traced = jax.jit(cross_entropy)(*arrays, 0.3)
    np.testing.assert_allclose(traced, oracle(*arrays, 0.3), rtol=2e-6)
    rates = jnp.array([0.0, 0.1, 0.5])
    losses = jax.vmap(lambda rate: cross_entropy(*arrays, rate).loss)(rates)
    np.testing.assert_allclose(losses, [oracle(*arrays, rate)[0] for rate in (0.0, 0.1, 0.5)], rtol=2e-6)


def test_gradient(x64):
    logits_BTV, target_BT, mask_BT = example()
    check_grads(
        lambda logits_BTV: cross_entropy(logits_BTV, target_BT, mask_BT, 0.1).loss,
        (logits_BTV,),
        order=1,
        modes=["fwd", "rev"],
    )


def test_gradient_is_p_minus_q_on_real_tokens_and_zero_on_padding(x64):
    logits_BTV, target_BT, mask_BT = example()
    smoothing = 0.2
    grad_BTV = jax.grad(lambda x: cross_entropy(x, target_BT, mask_BT, smoothing).loss)(
        jnp.asarray(logits_BTV)
    )
    p_BTV = np.exp(logits_BTV) / np.exp(logits_BTV).sum(-1, keepdims=True)
    q_BTV = (1 - smoothing) * np.eye(V)[target_BT] + smoothing / V
    np.testing.assert_allclose(grad_BTV, (p_BTV - q_BTV) * mask_BT[:, :, None], rtol=1e-12, atol=1e-14)


def test_padding_counts_for_nothing():
    logits_BTV, target_BT, mask_BT = example()
    sums = cross_entropy(logits_BTV, target_BT, mask_BT, 0.1)
    changed_BTV = np.where(mask_BT[:, :, None], logits_BTV, 1e4)
    changed_BT = np.where(mask_BT, target_BT, 0)
    np.testing.assert_array_equal(cross_entropy(changed_BTV, changed_BT, mask_BT, 0.1), sums)


def test_parts_add_up_to_the_whole():
    arrays = example()
    whole = cross_entropy(*arrays, 0.1)
    parts = Sums.zero()
    for row in range(B):
        parts = parts.add(cross_entropy(*(array[row : row + 1] for array in arrays), 0.1))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_correct_takes_the_first_of_equal_logits():
    logits_BTV = np.array([[[1.0, 2.0, 2.0], [1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [3.0, 2.0, 1.0]]])
    target_BT = np.array([[1, 2, 0, 1]])
    sums = cross_entropy(logits_BTV, target_BT, np.ones((1, 4), bool))
    assert sums.correct == np.sum(np.argmax(logits_BTV, -1) == target_BT) == 2


def test_low_precision_logits_are_summed_in_float32():
    logits_BTV, target_BT, mask_BT = example()
    low_BTV = jnp.asarray(logits_BTV, jnp.bfloat16)
    sums = cross_entropy(low_BTV, target_BT, mask_BT, 0.1)
    expected = oracle(np.asarray(low_BTV, np.float64), target_BT, mask_BT, 0.1)
    np.testing.assert_allclose(sums, expected, rtol=2e-6)


def test_large_logits_stay_finite():
    logits_BTV = np.array([[[1e4, -1e4, 0.0]]])
    sums = cross_entropy(logits_BTV, np.array([[1]]), np.ones((1, 1), bool))
    assert sums.nll == 2e4


def test_disagreeing_shapes_are_refused():
    logits_BTV, target_BT, mask_BT = example()
    with pytest.raises(ValueError, match="mask_BT has T=3"):
        cross_entropy(logits_BTV, target_BT, mask_BT[:, :3])
