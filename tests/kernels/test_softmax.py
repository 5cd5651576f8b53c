"""The softmax in one call: against its equation in float64, at every size and in every transformation."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import s2s
from s2s.kernels import library
from s2s.kernels.softmax import available, softmax

# Around the edges of vectors (16 wide, four at a time), of groups of rows (8), of what threads share out.
ENTRIES = (1, 7, 16, 17, 33, 64, 81, 1025, 8000)
ROWS = (1, 5, 64)
LOWEST = np.finfo(np.float32).min

pytestmark = pytest.mark.skipif(library.load() is None, reason="no library on this machine")


def example(rows, entries, *, scale=3.0, ties=False, seed=0):
    """Products, biases and targets; with ties, logits are small whole numbers."""
    rng = np.random.default_rng([seed, rows, entries])
    product, bias = rng.standard_normal((rows, entries)) * scale, rng.standard_normal(entries)
    if ties:
        product, bias = np.round(product / 2), np.round(bias)
    return product.astype("f"), bias.astype("f"), rng.integers(0, entries, rows, dtype=np.int32)


def oracle(product, bias, target, real, size=None, smoothing=0.0):
    """-log p(target), -mean(log p), argmax = target; gradients by logits and by the bias. Row by row."""
    rows, entries = product.shape
    size = entries if size is None else size
    parts, slope = np.zeros((3, rows)), np.zeros((rows, entries))
    for row in range(min(rows, real)):
        # Logits are float32; all that follows is exact.
        logits = (product[row] + bias)[:size].astype(np.float64)
        shifted = logits - logits.max()
        log_p = shifted - np.log(np.sum(np.exp(shifted)))
        parts[:, row] = -log_p[target[row]], -np.mean(log_p), np.argmax(logits) == target[row]
        slope[row, :size] = np.exp(log_p) - smoothing / size
        slope[row, target[row]] -= 1 - smoothing
    return parts, slope, slope.sum(0)


def call(product, bias, target, real, size=None, smoothing=0.0, dtype=jnp.float32):
    """Parts [3, C], and gradients by logits and by the bias."""

    def one(product, bias, target, real, size, smoothing):
        parts, slopes = softmax(product, bias, target, real, size, smoothing, dtype)
        return jnp.stack(parts), *(slopes or ())

    size = None if size is None else jnp.int32(size)
    smoothing = None if smoothing is None else jnp.float32(smoothing)
    return jax.jit(one)(product, bias, target, jnp.int32(real), size, smoothing)


def assert_near(found, expected, size, rounded=0.0):
    """Errors are those of sums in float32."""
    parts, slope, d_bias = found
    np.testing.assert_allclose(parts, expected[0], rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(parts[2], expected[0][2])
    slope = np.asarray(slope, np.float64)
    assert (np.abs(slope - expected[1]) <= rounded * np.abs(expected[1]) + 1e-6).all()
    np.testing.assert_allclose(d_bias, expected[2], rtol=0, atol=3e-7 * max(1, len(slope)))
    assert not slope[:, size:].any() and not np.asarray(d_bias)[size:].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_is_the_equation(rows, ties, smoothing):
    for entries in ENTRIES:
        arrays = example(rows, entries, ties=ties)
        for real, size in itertools.product({rows, rows // 2}, {entries, max(1, entries - 3)}):
            one = *arrays[:2], arrays[2] % size, real
            expected = oracle(*one, size, smoothing)
            found = call(*one, size, smoothing)
            assert_near(found, expected, size)
            if size == entries:
                np.testing.assert_array_equal(found[1], call(*one, None, smoothing)[1])
            (parts,) = call(*one, size, None)
            np.testing.assert_array_equal(parts, found[0])


def test_slopes_in_bfloat16():
    """Each rounded once, to the nearest; their sums are not rounded."""
    for rows, entries in itertools.product(ROWS, ENTRIES):
        one = *example(rows, entries), rows
        low, high = (call(*one, smoothing=0.1, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
        assert low[1].dtype == jnp.bfloat16
        np.testing.assert_array_equal(low[1], np.asarray(high[1]).astype(ml_dtypes.bfloat16))
        for number in (0, 2):
            np.testing.assert_array_equal(low[number], high[number])


@pytest.mark.parametrize("entries", [17, 70])
def test_targets_everywhere(entries):
    product, bias, _ = example(entries, entries, ties=True)
    for target in (np.arange(entries), np.argmax(product + bias, axis=1)):
        one = product, bias, target, entries
        assert_near(call(*one, smoothing=0.1), oracle(*one, smoothing=0.1), entries)


@pytest.mark.parametrize("entries", [7, 100])
def test_the_first_of_equal_logits_is_the_greatest(entries):
    product, bias = np.zeros((entries, entries), np.float32), np.zeros(entries, np.float32)
    product[:, 3], product[:, entries - 1] = 1, 1
    parts, *_ = call(product, bias, np.arange(entries), entries)
    assert np.flatnonzero(parts[2]).tolist() == [3]
    # What is no entry does not win, nor share.
    assert np.flatnonzero(call(product, bias, np.arange(entries) % 3, entries, 3)[0][2])[0] == 0
    np.testing.assert_allclose(call(product, bias, np.zeros(entries, int), entries, 3)[0][0], np.log(3))


@pytest.mark.parametrize("entries", [17, 200])
def test_logits_of_any_size(entries):
    """From +-10,000 down to the lowest number there is, which has no share at all."""
    product, bias, target = example(64, entries, scale=1.0)
    product = np.where(np.abs(product) > 1, np.sign(product) * np.float32(1e4), product)
    one = product, bias, target, 64
    expected = oracle(*one, smoothing=0.1)
    parts, slope, d_bias = call(*one, smoothing=0.1)
    np.testing.assert_allclose(parts, expected[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope, expected[1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(d_bias, expected[2], rtol=0, atol=1e-5)

    product[:, 1:] = LOWEST
    product[3], bias[:] = LOWEST, 0
    parts, slope, _ = call(product, bias, np.zeros(64, int), 64)
    np.testing.assert_array_equal(parts[2], 1)
    np.testing.assert_allclose(parts[0], np.log(np.where(np.arange(64) == 3, entries, 1)), rtol=1e-6)
    assert not np.delete(slope, 3, axis=0)[:, 1:].any()
    np.testing.assert_allclose(slope[3], 1 / entries - (np.arange(entries) == 0), rtol=1e-6)


def test_the_smallest_shares():
    """Beside the greatest logit, down to where a share is nothing."""
    below = np.linspace(0, 200, 801, dtype=np.float32)
    one = -below[None], np.zeros_like(below), np.array([0]), 1
    _, slope, _ = call(*one)
    expected = oracle(*one)[1]
    kept = (below > 0) & (below < 80)
    np.testing.assert_allclose(slope[0, kept], expected[0, kept], rtol=1e-6)
    assert (np.abs(slope[0, below >= 80]) < 1e-34).all() and not slope[0, below > 88].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_no_number_stays_in_its_row(dtype):
    product, bias, target = example(20, 50)
    sane = call(product, bias, target, 17, smoothing=0.1, dtype=dtype)
    product[5, 20], product[18] = np.nan, np.nan
    target[7], target[9], target[19] = -1, 50, 1 << 30
    parts, slope, _ = call(product, bias, target, 17, smoothing=0.1, dtype=dtype)
    assert (
        np.isnan(parts[0, [5, 7, 9]]).all() and np.isnan(parts[1, 5]) and np.isnan(slope[5].astype("f")).all()
    )
    others = np.delete(np.arange(20), [5, 7, 9])
    np.testing.assert_array_equal(parts[:, others], sane[0][:, others])
    np.testing.assert_array_equal(slope[others], sane[1][others])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_is_left_alone_if_anything_else_reads_it(dtype):
    product, bias, target = example(24, 40)

    def function(product, bias, target):
        doubled = product * 2
        parts, slopes = softmax(doubled, bias, target, jnp.int32(24), None, jnp.float32(0.1), dtype)
        return doubled, parts, slopes

    arrays = jnp.asarray(product), jnp.asarray(bias), jnp.asarray(target)
    doubled, parts, (slope, d_bias) = jax.jit(function)(*arrays)
    np.testing.assert_array_equal(doubled, product * 2)
    np.testing.assert_array_equal(arrays[0], product)
    expected = call(product * 2, bias, target, 24, smoothing=0.1, dtype=dtype)
    for one, other in zip((jnp.stack(parts), slope, d_bias), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "no slope"])
@pytest.mark.parametrize("shared", [False, True])
def test_replicas_are_calls_of_their_own(shared, wanted):
    """Of one and of two leading axes, with sizes, numbers of rows and smoothing of their own."""
    cases = [(rows, size) for rows in (0, 5, 21) for size in (3, 40)]
    examples = [example(21, 40, seed=0 if shared else seed) for seed in range(len(cases))]
    product, bias, target = map(np.stack, zip(*examples, strict=True))
    target %= 3
    real, size = np.array(cases).T
    smoothing = np.linspace(0, 0.5, len(cases), dtype=np.float32)
    dtype = jnp.bfloat16 if wanted == "bfloat16" else jnp.float32

    def one(product, bias, target, real, size, smoothing):
        rate = None if wanted == "no slope" else smoothing
        parts, slopes = softmax(product, bias, target, real, size, rate, dtype)
        return jnp.stack(parts), *(slopes or ())

    axes = (0, None if shared else 0, None if shared else 0, 0, 0, 0)
    arrays = product, bias[0] if shared else bias, target[0] if shared else target, real, size, smoothing
    together = jax.jit(jax.vmap(one, axes))(*arrays)
    pairs = [x.reshape(3, 2, *x.shape[1:]) if axis == 0 else x for x, axis in zip(arrays, axes, strict=True)]
    nested = jax.jit(jax.vmap(jax.vmap(one, axes), axes))(*pairs)
    for r in range(len(cases)):
        rate = None if wanted == "no slope" else smoothing[r]
        own = call(product[r], bias[r], target[r], real[r], size[r], rate, dtype)
        for mine, in_pairs, alone in zip(together, nested, own, strict=True):
            np.testing.assert_array_equal(mine[r], alone)
            np.testing.assert_array_equal(in_pairs[r // 2, r % 2], alone)


def test_inside_of_a_loop():
    """Whose every turn has its own rows, and fewer of them."""
    product, bias, target = example(24, 40)
    turns = 3

    def turn(number, carry):
        parts, slope = carry
        shifted = jnp.asarray(product) + number
        found, (more, _) = softmax(
            shifted, jnp.asarray(bias), jnp.asarray(target), 20 - number, None, jnp.float32(0), jnp.float32
        )
        return parts + jnp.stack(found), slope + more

    start = jnp.zeros((3, 24)), jnp.zeros((24, 40))
    found = jax.jit(lambda: jax.lax.fori_loop(0, turns, turn, start))()
    each = [oracle(product + np.float32(n), bias, target, 20 - n) for n in range(turns)]
    for one, expected in zip(found, map(sum, zip(*[case[:2] for case in each], strict=True)), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5)


def test_on_eight_devices():
    """Each with a share of the rows; the bias's gradients are added up."""
    product, bias, target = example(8 * 9, 40)
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def share(product, bias, target):
        parts, (slope, d_bias) = softmax(
            product, bias, target, jnp.int32(9), None, jnp.float32(0.1), jnp.float32
        )
        return jnp.stack(parts), slope, jax.lax.psum(d_bias, "data")

    apart = jax.shard_map(
        share, mesh=Mesh(np.array(jax.devices()), ("data",)), in_specs=(rows, whole, rows),
        out_specs=(PartitionSpec(None, "data"), rows, whole), check_vma=False,
    )  # fmt: skip
    expected = oracle(product, bias, target, len(product), smoothing=0.1)
    assert_near(jax.jit(apart)(product, bias, target), expected, 40)


# Prints a digest of everything found, each time the same.
DIGEST = """
import hashlib
import jax, jax.numpy as jnp, numpy as np
from s2s.kernels.softmax import available, softmax
assert available(jnp.float32, jnp.float32)
rng = np.random.default_rng(0)
product, bias = rng.standard_normal((203, 3001)).astype("f"), rng.standard_normal(3001).astype("f")
target = rng.integers(0, 3001, 203)
one = jax.jit(lambda *x: softmax(*x, jnp.int32(190), None, jnp.float32(0.1), jnp.float32))
found = [jax.tree.leaves(one(product, bias, target)) for _ in range(20)]
(digest,) = {hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in each)).hexdigest() for each in found}
print(digest)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are as many as cores")
def test_threads_change_no_bit():
    """A group of rows has the same sums whoever makes them, and groups are added up in their order."""
    digests = set()
    for threads in (1, 8):
        # As many as cores, but one for each device at least.
        flags = f"--xla_force_host_platform_device_count={threads}"
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(s2s.__file__).parents[1])}
        on_one_core = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}])"
        command = [sys.executable, "-c", on_one_core + DIGEST]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


def test_only_for_what_it_can_read():
    assert available(jnp.float32, jnp.float32) and available(jnp.dtype("float32"), jnp.dtype("bfloat16"))
    assert not available(jnp.float64, jnp.float64) and not available(jnp.float32, jnp.float16)
