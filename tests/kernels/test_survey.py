"""What a search asks of logits, in one call: against NumPy in float64 and against XLA, at every size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2s
from s2s.kernels import library
from s2s.kernels.survey import available, survey
from s2s.search import pick

# Around the edges of vectors (16 wide, four at a time) and of chunks.
ENTRIES = (1, 7, 15, 16, 17, 33, 63, 64, 65, 81, 131, 1025, 8004)
CHUNKS = (1, 5, 16, 40, 64, 100)
# Around the edges of units of work (8 rows).
ROWS = (1, 7, 8, 9, 25)

pytestmark = pytest.mark.skipif(library.load() is None, reason="no library on this machine")


def example(rows, entries, *, scale=3.0, seed=0):
    rng = np.random.default_rng([seed, rows, entries])
    product, bias = rng.standard_normal((rows, entries)) * scale, rng.standard_normal(entries)
    return product.astype("f"), bias.astype("f")


def parts_of(logits, chunk):
    return [logits[:, first : first + chunk] for first in range(0, logits.shape[1], chunk)]


def oracle(product, bias, chunk):
    """Logits, which are float32; of them log sum exp and the highest of every chunk, exactly."""
    logits = product + bias
    highest = np.stack([part.max(axis=1) for part in parts_of(logits, chunk)], axis=1)
    most = np.where(np.isfinite(logits.max(axis=1)), logits.max(axis=1), 0).astype(np.float64)
    with np.errstate(divide="ignore"):
        total = np.log(np.exp(logits - most[:, None]).sum(axis=1)) + most
    return logits, np.where(total > -np.inf, total, 0), highest


call = jax.jit(survey, static_argnums=2)


def assert_near(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[2], expected[2])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("rows", ROWS)
def test_is_the_equation(rows, chunk):
    for entries in ENTRIES:
        one = example(rows, entries)
        assert_near(call(*one, chunk), oracle(*one, chunk))


@pytest.mark.parametrize("entries", ENTRIES)
def test_every_entry_may_be_the_highest(entries):
    """And the only possible one."""
    few = min(entries, 200)
    at = np.unique(np.r_[np.arange(few), entries - 1 - np.arange(few)])
    product = np.full((len(at), entries), -np.inf, np.float32)
    product[np.arange(len(at)), at] = at % 7 - 3
    for chunk in (16, 40, 64):
        one = product, np.ones(entries, np.float32), chunk
        assert_near(call(*one), oracle(*one))


def test_where_nothing_is_possible():
    product, bias = example(20, 150)
    product[3], product[5, :149], product[7, 64:128], product[19] = (-np.inf,) * 4
    found = call(product, bias, 64)
    assert_near(found, oracle(product, bias, 64))
    assert found[1][3] == found[1][19] == 0 and (np.asarray(found[2])[[3, 19]] == -np.inf).all()


@pytest.mark.parametrize("entries", [17, 200])
def test_logits_of_any_size(entries):
    product, bias = example(64, entries, scale=1.0)
    product = np.where(np.abs(product) > 1, np.sign(product) * np.float32(1e4), product)
    product[5] = np.finfo(np.float32).min
    bias[3] = 0
    one = product, np.where(bias > 1, np.float32(0), bias), 64
    assert_near(call(*one), oracle(*one))


@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_row_and_chunk(what):
    product, bias = example(20, 150)
    sane = call(product, bias, 64)
    for row, at in ((2, 0), (5, 70), (8, 149), (13, 127)):
        product[row, at] = what
    product[11] = np.nan
    product[13, 5] = -np.inf
    product[14, [3, 140]] = np.nan, np.inf
    logits, total, highest = (np.asarray(x) for x in call(product, bias, 64))
    odd = [2, 5, 8, 11, 13, 14]
    for found, before in zip((logits, total, highest), sane, strict=True):
        np.testing.assert_array_equal(np.delete(found, odd, axis=0), np.delete(before, odd, axis=0))
    np.testing.assert_array_equal(logits, product + bias)
    expected = np.stack([part.max(axis=1) for part in parts_of(product + bias, 64)], axis=1)
    np.testing.assert_array_equal(highest, expected)
    unknown = np.isnan(logits).any(axis=1)
    np.testing.assert_array_equal(total[odd], np.where(unknown, 0, np.inf)[odd])


@pytest.mark.parametrize("V", [3, 60, 64, 131, 1030])
def test_gives_what_is_given_without_it(V, monkeypatch):
    product, bias = example(12, V)
    product[1], product[2, :2], product[3, V // 2] = -np.inf, -np.inf, np.inf
    product = product.reshape(4, 3, V)
    found = jax.jit(pick.survey)(product, bias)
    monkeypatch.setattr(library, "load", lambda: None)
    expected = jax.jit(lambda *arrays: pick.survey(*arrays))(product, bias)
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.highest, expected.highest)
    np.testing.assert_allclose(found.total, expected.total, rtol=1e-6, atol=1e-6)


def test_the_product_is_left_alone_if_anything_else_reads_it():
    product, bias = example(24, 40)

    @jax.jit
    def function(product, bias):
        doubled = product * 2
        return doubled, survey(doubled, bias, 16)

    given = jnp.asarray(product)
    doubled, found = function(given, bias)
    np.testing.assert_array_equal(doubled, product * 2)
    np.testing.assert_array_equal(given, product)
    assert_near(found, oracle(product * 2, bias, 16))


@pytest.mark.parametrize("shared", [False, True])
def test_replicas_are_calls_of_their_own(shared):
    """Of one and of two leading axes."""
    examples = [example(11, 70, seed=seed) for seed in range(6)]
    product, bias = map(np.stack, zip(*examples, strict=True))
    axes = (0, None if shared else 0)
    bias = bias[0] if shared else bias

    def one(product, bias):
        return survey(product, bias, 32)

    together = jax.jit(jax.vmap(one, axes))(product, bias)
    pairs = [x.reshape(3, 2, *x.shape[1:]) if axis == 0 else x for x, axis in ((product, 0), (bias, axes[1]))]
    nested = jax.jit(jax.vmap(jax.vmap(one, axes), axes))(*pairs)
    for r in range(6):
        own = call(product[r], bias if shared else bias[r], 32)
        for mine, in_pairs, alone in zip(together, nested, own, strict=True):
            np.testing.assert_array_equal(mine[r], alone)
            np.testing.assert_array_equal(in_pairs[r // 2, r % 2], alone)


DIGEST = """
import hashlib
import jax, jax.numpy as jnp, numpy as np
from s2s.kernels import library
from s2s.kernels.survey import survey
assert library.load()
rng = np.random.default_rng(0)
digest = hashlib.sha256()
for rows, entries in ((5, 8004), (321, 8004), (500, 131)):
    product, bias = rng.normal(size=(rows, entries)) * 3, rng.normal(size=entries)
    found = jax.jit(survey, static_argnums=2)(jnp.asarray(product, "f"), jnp.asarray(bias, "f"), 58)
    for one in found:
        digest.update(np.asarray(one).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are as many as cores")
def test_threads_change_no_bit():
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
    assert available(jnp.float32) and available(jnp.dtype("float32"))
    assert not available(jnp.float64) and not available(jnp.bfloat16)
