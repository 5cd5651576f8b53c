from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from s2s.search import pick


@pytest.mark.parametrize("V", [3, 5, 63, 64, 65, 128, 131, 200, 500])
@pytest.mark.parametrize("levels", [2, 9, 10**6])
@pytest.mark.parametrize("k", [1, 7])
def test_best_tokens_is_top_k_with_ties_to_the_lowest(V, levels, k):
    rng = np.random.default_rng(V + levels)
    B, J = 6, 4
    log_probs = jnp.asarray(-rng.integers(0, levels, (B, J, V)) / 8, jnp.float32)
    log_probs = log_probs.at[:3, :, :3].set(1.0)  # tempting, but often forbidden
    base = jnp.asarray(np.where(rng.random((B, J)) < 0.3, -np.inf, -rng.integers(0, 3, (B, J))), jnp.float32)
    may_end = jnp.asarray(rng.random((B, J)) < 0.5)

    @jax.jit
    def best(log_probs, base, may_end):
        logits, _, highest = pick.survey(log_probs)
        return pick.best_tokens(logits, highest, base, may_end, k)

    values, j, v = best(log_probs, base, may_end)

    whole = np.array(log_probs + base[..., None])
    whole[:, :, :2] = -np.inf
    whole[:, :, 2][~np.asarray(may_end)] = -np.inf
    expected, place = lax.top_k(jnp.asarray(whole.reshape(B, J * V)), k)
    np.testing.assert_array_equal(values, expected)
    exists = np.asarray(expected) > -np.inf
    np.testing.assert_array_equal(np.asarray(j * V + v)[exists], np.asarray(place)[exists])


@pytest.mark.parametrize("V", [3, 64, 150])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.77, 0.999])
def test_nucleus_keeps_the_fewest_likeliest(V, ties, top_p):
    rng = np.random.default_rng(V)
    probs = rng.integers(1, 4, (5, V)).astype(np.float64) if ties else rng.random((5, V))
    probs = np.asarray(probs / probs.sum(1, keepdims=True), np.float32)
    kept = np.asarray(jax.jit(pick.nucleus)(probs, top_p)) > 0
    for row, keep in zip(probs.astype(np.float64), kept, strict=True):
        order = sorted(range(V), key=lambda v: (-row[v], v))
        running = np.cumsum(row[order])
        count = int(np.searchsorted(running, top_p)) + 1
        assert sorted(np.flatnonzero(keep)) == sorted(order[:count])


def test_nucleus_of_everything_changes_nothing():
    probs = jnp.asarray([[0.5, 0.25, 0.25]])
    np.testing.assert_array_equal(pick.nucleus(probs, 1.0), probs)
    np.testing.assert_array_equal(pick.nucleus(probs, jnp.float32(1.0)), probs)


@pytest.mark.parametrize("V", [3, 64, 150])
def test_draw_inverts_the_running_sum(V):
    rng = np.random.default_rng(V)
    weights = np.where(rng.random((4, V)) < 0.4, 0.0, rng.random((4, V)))
    weights[:, 1] = 0.5
    uniform = rng.random((4, 300))
    found = jax.vmap(pick.draw, in_axes=(None, 1), out_axes=1)(
        jnp.asarray(weights, jnp.float32), jnp.asarray(uniform, jnp.float32)
    )
    running = np.cumsum(weights, axis=1)
    expected = [np.searchsorted(r, u * r[-1], side="right") for r, u in zip(running, uniform, strict=True)]
    np.testing.assert_array_equal(found, expected)


def test_draw_never_takes_the_impossible():
    weights = jnp.zeros((1, 150)).at[0, 70].set(1e-30)
    for uniform in (0.0, 0.5, float(np.nextafter(np.float32(1), np.float32(0)))):
        assert pick.draw(weights, jnp.full((1,), uniform)).tolist() == [70]


@pytest.mark.parametrize("V", [3, 64, 131, 600])
def test_a_distribution_has_the_logarithm_of_the_sum(V):
    logits = np.random.default_rng(V).normal(size=(4, 2, V), scale=30)
    logits[0, 0, : V - 1] = -np.inf
    expected = np.log(np.exp(logits - 100).sum(-1)) + 100
    found = jax.jit(pick.survey)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(found.total, expected, rtol=1e-6)
    assert pick.survey(jnp.full((1, V), -jnp.inf)).total == 0.0


def test_softmax_of_nothing_is_zeros():
    probs = pick.softmax(jnp.asarray([[-jnp.inf, -jnp.inf], [0.0, -jnp.inf]]))
    np.testing.assert_array_equal(probs, [[0.0, 0.0], [1.0, 0.0]])
