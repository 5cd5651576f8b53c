"""The LSTM in one call: right at every size and length, in every transformation, and always the same."""

from __future__ import annotations

import concurrent.futures
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import s2s
from s2s.kernels import library, lstm
from s2s.kernels.lstm import Direction
from s2s.nn import recurrent
from s2s.nn.cells import CELLS

ROOT = Path(s2s.__file__).parents[1]
SOURCE = ROOT / "s2s" / "kernels" / "source"
BOTH = (False, True)

# Steps, rows, hidden: around the edges of vectors (16), of panels (8, 32), of units of work (256 rows; 12,
# 24, 32 or 48 hidden units) and of what is packed together (128 deep).
SIZES = [
    (1, 8, 1),
    (2, 9, 2),
    (5, 8, 7),
    (3, 15, 12),
    (3, 16, 15),
    (4, 31, 16),
    (6, 33, 17),
    (2, 8, 24),
    (3, 40, 31),
    (7, 32, 32),
    (2, 17, 33),
    (3, 8, 47),
    (4, 23, 48),
    (3, 24, 49),
    (1, 65, 64),
    (4, 12, 97),
    (3, 257, 20),
    (2, 8, 127),
    (3, 255, 40),
    (2, 31, 128),
    (4, 300, 129),
    (2, 520, 260),
]

# Largest errors, of an array's largest number; found: 1e-6 and 1.1e-2.
BOUNDS = {"float32": 4e-6, "bfloat16": 3e-2}


def numbers(*shape, seed=0, dtype="float32"):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(jnp.dtype(dtype))


def problem(steps, rows, hidden, ways=2, dtype="float32", replicas=()):
    """Lengths, directions, and gradients by all that comes of them."""
    draw = np.random.default_rng([steps, rows, hidden])
    # Of replicas, only the last has a row of all positions.
    lengths = draw.integers(0, steps if replicas else steps + 1, (*replicas, rows)).astype(np.int32)
    lengths[..., -1] = 0
    lengths[(-1,) * len(replicas)][..., 0] = steps
    make = partial(numbers, *replicas, dtype=dtype)
    directions = [
        Direction(
            (make(hidden, 4 * hidden, seed=4 * way) / np.sqrt(hidden)).astype(jnp.dtype(dtype)),
            make(steps, rows, 4 * hidden, seed=4 * way + 1),
            make(rows, hidden, seed=4 * way + 2),
            make(rows, hidden, seed=4 * way + 3),
        )
        for way in range(ways)
    ]
    states = [(make(rows, hidden, seed=20 + way), make(rows, hidden, seed=30 + way)) for way in range(ways)]
    return lengths, directions, (make(steps, rows, ways * hidden, seed=40), states)


def derivatives(lengths, directions, gradients):
    """What comes of directions, and gradients by them."""
    ways = BOTH[: len(directions)]
    out, pull = jax.vjp(lambda directions: lstm.lstm(ways, lengths, directions), directions)
    return out, pull(gradients)[0]


def compiled(*args):
    """`derivatives` in a program of its own."""
    return jax.jit(lambda *args: derivatives(*args))(*args)


# ---- an oracle ----


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def walked(reverse, lengths, direction):
    """One direction in float64: outputs, the last state, and at each position what its gradient needs."""
    kernel, gates, h, c = (np.asarray(x, np.float64) for x in direction)
    outputs, kept = np.zeros((len(gates), *h.shape)), {}
    for t in reversed(range(len(gates))) if reverse else range(len(gates)):
        i, f, o, g = np.split(gates[t] + h @ kernel, 4, axis=1)
        i, f, o, g = sigmoid(i), sigmoid(f), sigmoid(o), np.tanh(g)
        real = (t < lengths)[:, None]
        new = f * c + i * g
        kept[t] = real, h, c, i, f, o, g, np.tanh(new)
        outputs[t] = np.where(real, o * np.tanh(new), 0)
        h, c = np.where(real, o * np.tanh(new), h), np.where(real, new, c)
    return outputs, (h, c), kept


def walked_back(reverse, lengths, direction, d_outputs, d_state):
    """Gradients by a direction in float64."""
    kernel, gates = (np.asarray(x, np.float64) for x in direction[:2])
    *_, kept = walked(reverse, lengths, direction)
    d_h, d_c = (np.asarray(x, np.float64) for x in d_state)
    d_kernel, d_gates = np.zeros_like(kernel), np.zeros_like(gates)
    for t in range(len(gates)) if reverse else reversed(range(len(gates))):
        real, h, c, i, f, o, g, tanh_new = kept[t]
        d_out = d_h + np.asarray(d_outputs[t], np.float64)
        d_new = d_c + d_out * o * (1 - tanh_new**2)
        opened = d_new * g * i * (1 - i), d_new * c * f * (1 - f), d_out * tanh_new * o * (1 - o)
        d_gates[t] = np.where(real, np.concatenate([*opened, d_new * i * (1 - g**2)], axis=1), 0)
        d_kernel += h.T @ d_gates[t]
        d_h, d_c = np.where(real, d_gates[t] @ kernel.T, d_h), np.where(real, d_new * f, d_c)
    return Direction(d_kernel, d_gates, d_h, d_c)


def exact(lengths, directions, gradients):
    """`derivatives` in float64."""
    d_outputs, d_states = gradients
    parts = np.split(d_outputs, len(directions), axis=2)
    each = [walked(way, lengths, direction) for way, direction in zip(BOTH, directions, strict=False)]
    back = [
        walked_back(way, lengths, *rest)
        for way, *rest in zip(BOTH, directions, parts, d_states, strict=False)
    ]
    return (np.concatenate([outputs for outputs, *_ in each], 2), [state for _, state, _ in each]), back


def assert_near(found, expected, bound):
    """Relative to the largest."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        other = np.asarray(other, np.float64)
        error = np.abs(np.asarray(one, np.float64) - other).max(initial=0)
        assert error <= bound * np.abs(other).max(initial=0), f"{error / np.abs(other).max(initial=0):.1e}"


def assert_same(found, expected):
    """Bit for bit."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, np.float64), np.asarray(other, np.float64))


def assert_pads_are_zeros(lengths, found):
    (outputs, _), directions = found
    pads = np.arange(len(outputs))[:, None] >= lengths
    for array in (outputs, *(direction.gates_TBG for direction in directions)):
        assert not np.asarray(array, np.float64)[pads].any()


@pytest.fixture
def loaded():
    """The library; no test of it without a compiler."""
    found = library.load()
    if found is None:
        pytest.skip("no library on this machine")
    return found


@pytest.fixture
def matrix_unit(loaded):
    if not loaded.has_matrix_unit:
        pytest.skip("no matrix unit")


@pytest.fixture(params=["as it is", "without a matrix unit"])
def machine(request, loaded, monkeypatch):
    """Every kind of machine with a library; what a test compiles must be its own function."""
    if request.param == "without a matrix unit":
        monkeypatch.setattr(loaded, "has_matrix_unit", False)
    return request.param


# ---- numbers ----


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_equations_at_every_size(size, machine):
    given = problem(*size, ways=1 if size in SIZES[::4] else 2)
    found = compiled(*given)
    assert_near(found, exact(*given), BOUNDS["float32"])
    assert_pads_are_zeros(given[0], found)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_equations_in_bfloat16(size, matrix_unit):
    given = problem(*size, dtype="bfloat16")
    found = compiled(*given)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(found))
    assert_near(found, exact(*given), BOUNDS["bfloat16"])
    assert_pads_are_zeros(given[0], found)


@pytest.mark.parametrize("precision, least, most", [("high", 1e-6, 1e-4), ("bfloat16", 1e-4, 3e-2)])
def test_a_lower_precision_is_taken_where_it_is_asked_for(precision, least, most, matrix_unit):
    given = problem(4, 33, 97)
    with jax.default_matmul_precision(precision):
        found = compiled(*given)
    assert_near(found, exact(*given), most)
    with pytest.raises(AssertionError):
        assert_near(found[0], exact(*given)[0], least)


def test_without_a_gradient_the_outputs_are_the_same(machine):
    lengths, directions, gradients = problem(5, 40, 49)
    found = jax.jit(lambda *args: lstm.lstm(BOTH, *args))(lengths, directions)
    assert_same(found, compiled(lengths, directions, gradients)[0])


def test_rows_of_no_length_keep_their_state(machine):
    given, directions, gradients = problem(4, 33, 40)
    for lengths in (given, np.zeros_like(given)):
        (outputs, states), back = compiled(lengths, directions, gradients)
        before = [direction[2:] for direction in directions], gradients[1]
        after = states, [d_direction[2:] for d_direction in back]
        rows = lengths == 0
        assert_same(*(jax.tree.map(lambda x, rows=rows: x[rows], each) for each in (after, before)))
        assert not np.asarray(outputs)[:, rows].any()
    assert not any(np.asarray(x).any() for d_direction in back for x in d_direction[:2])


def test_lengths_beyond_the_last_position_end_there(machine):
    lengths, directions, gradients = problem(4, 33, 40)
    lengths[::3] = 4
    found = compiled(
        np.where(lengths == 4, 4 + np.arange(33, dtype=np.int32), lengths), directions, gradients
    )
    assert_same(found, compiled(lengths, directions, gradients))


@pytest.mark.parametrize("size", [(0, 9, 8), (3, 0, 8), (3, 9, 0), (0, 0, 0)])
def test_nothing_to_walk(size, loaded):
    steps, rows, hidden = size
    lengths = np.zeros(rows, np.int32)
    _, directions, gradients = problem(*(max(1, n) for n in size))

    def cut(array, *shape):
        return array[tuple(map(slice, shape))]

    state = rows, hidden
    directions = [
        Direction(
            cut(U, hidden, 4 * hidden), cut(gates, steps, rows, 4 * hidden), cut(h, *state), cut(c, *state)
        )
        for U, gates, h, c in directions
    ]
    d_states = [(cut(h, *state), cut(c, *state)) for h, c in gradients[1]]
    gradients = cut(gradients[0], steps, rows, 2 * hidden), d_states
    (outputs, states), back = compiled(lengths, directions, gradients)
    assert outputs.shape == (steps, rows, 2 * hidden)
    assert_same(states, [direction[2:] for direction in directions])
    assert_same([direction[2:] for direction in back], d_states)
    assert not any(np.asarray(x).any() for direction in back for x in direction[:2])


def test_no_replicas(loaded):
    lengths, directions, gradients = problem(3, 9, 8, replicas=(1,))
    none = jax.tree.map(lambda x: x[:0], (lengths, directions, gradients))
    found = jax.jit(jax.vmap(derivatives))(*none)
    assert all(len(x) == 0 for x in jax.tree.leaves(found))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_on_pads_does_not_matter(dtype, wrong, machine):
    lengths, directions, gradients = problem(5, 40, 33, dtype=dtype)
    if not lstm.available(len(directions[0].h_BH), directions[0].h_BH.dtype):
        pytest.skip("not walked by the library")
    pads = (np.arange(5)[:, None] >= lengths)[:, :, None]

    def spoilt(x):
        return np.where(pads, np.asarray(wrong, x.dtype), x)

    other = [direction._replace(gates_TBG=spoilt(direction.gates_TBG)) for direction in directions]
    found = compiled(lengths, other, (spoilt(gradients[0]), gradients[1]))
    assert_same(found, compiled(lengths, directions, gradients))
    assert_pads_are_zeros(lengths, found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_not_a_number_stays_in_its_row(dtype, machine):
    lengths, directions, gradients = problem(5, 40, 33, dtype=dtype)
    if not lstm.available(len(directions[0].h_BH), directions[0].h_BH.dtype):
        pytest.skip("not walked by the library")
    lengths[3] = 4
    (outputs, states), back = compiled(lengths, directions, gradients)
    for direction in directions:
        direction.gates_TBG[1, 3, 5] = np.nan
    (broken, last), d_broken = compiled(lengths, directions, gradients)
    others = np.arange(40) != 3
    assert_same(jax.tree.map(lambda x: x[others], last), jax.tree.map(lambda x: x[others], states))
    for one, other in [
        (broken, outputs),
        (d_broken[0].gates_TBG, back[0].gates_TBG),
        (d_broken[1].gates_TBG, back[1].gates_TBG),
    ]:
        assert_same(one[:, others], other[:, others])
    broken = np.asarray(broken[:, 3], np.float64)
    # Forward from the second position on all of them, as the second reads the first and so on.
    assert np.isfinite(broken[0, :33]).all() and np.isnan(broken[2:4, :33]).all()
    assert np.isfinite(broken[2:4, 33:]).all() and np.isnan(broken[0, 33:]).all()


# ---- the same every time ----


def test_a_row_is_the_same_whatever_rows_are_beside_it(machine):
    lengths, directions, gradients = problem(4, 300, 49)
    (outputs, states), back = compiled(lengths, directions, gradients)

    def of(rows):
        own = [Direction(U, gates[:, rows], h[rows], c[rows]) for U, gates, h, c in directions]
        d_states = [(h[rows], c[rows]) for h, c in gradients[1]]
        (found, last), d_found = compiled(lengths[rows], own, (gradients[0][:, rows], d_states))
        assert_same(found, outputs[:, rows])
        assert_same(last, [(h[rows], c[rows]) for h, c in states])
        for one, other in zip(d_found, back, strict=True):
            assert_same(one[1:], (other.gates_TBG[:, rows], other.h_BH[rows], other.c_BH[rows]))

    of(slice(250, 267))
    of(np.random.default_rng(0).permutation(300))


def test_threads_do_not_disturb_each_other(machine):
    given = [problem(3, 40 + 90 * number, 20 + 30 * number) for number in range(4)]
    run = jax.jit(lambda *args: derivatives(*args))
    expected = [run(*one) for one in given]

    def again(number):
        for _ in range(5):
            assert_same(run(*given[number]), expected[number])

    with concurrent.futures.ThreadPoolExecutor(len(given)) as pool:
        list(pool.map(again, range(len(given))))


# A size that is worth several threads.
LARGE = (6, 300, 130)

ALONE = """
import importlib.util, os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
spec = importlib.util.spec_from_file_location("test_lstm", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
print(tests.digest())
"""


def digest():
    found = compiled(*problem(*LARGE))
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(found))).hexdigest()


def test_one_thread_makes_of_it_what_several_do(loaded):
    """These are eight, as there are eight devices."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ALONE, __file__]
    alone = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.strip() == digest() == digest()


# ---- transformations ----


def replica(tree, axes, *at):
    """One replica's part of each array, its axes of replicas given from the outermost on."""
    if not at:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    each = jax.tree.leaves(jax.tree.broadcast(axes[0], tree, is_leaf=_is_none), is_leaf=_is_none)
    own = [x if axis is None else np.take(x, at[0], axis) for x, axis in zip(leaves, each, strict=True)]
    return replica(jax.tree.unflatten(structure, own), axes[1:], *at[1:])


def _is_none(x):
    return x is None


def assert_replicas(given, axes, counts):
    """All of them in one program, and each by itself: the same bits.

    Only the gradient by the kernel, a stack of products of XLA's, is the same but for rounding.
    """
    function = derivatives
    for own in reversed(axes):
        function = jax.vmap(function, in_axes=own)
    found = jax.jit(function)(*given)
    one = jax.jit(lambda *args: derivatives(*args))
    for at in np.ndindex(*counts):
        out, back = jax.tree.map(lambda x, at=at: x[at], found)
        expected, d_expected = one(*replica(given, axes, *at))
        assert_same((out, [d[1:] for d in back]), (expected, [d[1:] for d in d_expected]))
        assert_near([d[0] for d in back], [d[0] for d in d_expected], 1e-5)


@pytest.mark.parametrize("kernel", [0, None])
@pytest.mark.parametrize("lengths", [0, None])
@pytest.mark.parametrize("gates", [0, 1, None])
def test_replicas_are_walked_as_one_after_the_other(kernel, lengths, gates, machine):
    all_lengths, directions, gradients = problem(5, 17, 33, replicas=(3,))
    lengths_given = all_lengths if lengths == 0 else all_lengths[0]
    axes = Direction(kernel, gates, 0, None)

    def laid(x, axis):
        return x[0] if axis is None else np.moveaxis(x, 0, axis)

    own = [Direction(*map(laid, direction, axes)) for direction in directions]
    assert_replicas((lengths_given, own, gradients), [(lengths, [axes, axes], 0)], (3,))


def test_replicas_of_replicas(machine):
    lengths, directions, gradients = problem(4, 9, 20, replicas=(2, 3))
    own = [Direction(U[:, 0], gates, h[0], c[0, 0]) for U, gates, h, c in directions]
    inner = Direction(None, 0, 0, None)
    outer = Direction(0, 0, None, None)
    assert_replicas((lengths[0], own, gradients), [(None, [outer, outer], 0), (0, [inner, inner], 0)], (2, 3))


def total(lengths, weights, directions):
    """A number that tells all that comes of directions apart."""
    out = lstm.lstm(BOTH[: len(directions)], lengths, directions)
    return sum(jnp.vdot(x, w) for x, w in zip(jax.tree.leaves(out), jax.tree.leaves(weights), strict=True))


def test_gradients_of_replicas_that_share_a_kernel(machine):
    lengths, directions, gradients = problem(5, 17, 33, replicas=(3,))
    own = [direction._replace(kernel=direction.kernel[0]) for direction in directions]
    each = Direction(None, 0, 0, 0)

    def sums(directions):
        return jnp.sum(jax.vmap(total, in_axes=(0, 0, [each, each]))(lengths, gradients, directions))

    found = jax.jit(jax.grad(sums))(own)
    for way in range(2):
        expected = [
            exact(*replica((lengths, own, gradients), [(0, [each, each], 0)], number))[1][way]
            for number in range(3)
        ]
        assert_near(found[way].kernel, sum(d.kernel for d in expected), BOUNDS["float32"])
        assert_near(found[way][1:], tuple(map(np.stack, zip(*expected, strict=True)))[1:], BOUNDS["float32"])


def test_inside_of_loops_and_checkpoints(machine):
    """Layers on top of each other, their states the next ones'; and eagerly."""
    lengths, directions, gradients = problem(4, 17, 40, 1)
    mix = numbers(40, 160) / 10

    def layer(direction):
        outputs, ((h, c),) = lstm.lstm((False,), lengths, [direction])
        return outputs, direction._replace(gates_TBG=outputs @ mix, h_BH=h, c_BH=c)

    def by_hand(direction):
        for _ in range(3):
            outputs, direction = layer(direction)
        return outputs

    def checkpoints(direction):
        for _ in range(3):
            outputs, direction = jax.checkpoint(layer)(direction)
        return outputs

    def scanned(direction):
        return jax.lax.scan(lambda d, _: layer(d)[::-1], direction, length=3)[1][-1]

    def counted(direction):
        _, direction = jax.lax.fori_loop(0, 2, lambda _, d: layer(d[1]), (jnp.zeros((4, 17, 40)), direction))
        return layer(direction)[0]

    def gradient(function):
        return jax.value_and_grad(lambda d: jnp.vdot(function(d), gradients[0]))(directions[0])

    expected = gradient(by_hand)
    for function in (by_hand, checkpoints, scanned):
        assert_near(jax.jit(lambda function=function: gradient(function))(), expected, 1e-5)
    assert_near(jax.jit(counted)(directions[0]), by_hand(directions[0]), 1e-6)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_as_programs_that_nobody_compiles(convert, machine):
    given = jax.tree.map(convert, problem(4, 17, 33))
    found = derivatives(*given)
    assert_near(found, exact(*problem(4, 17, 33)), BOUNDS["float32"])
    # What was given is still there, though gradients are written where gates were.
    assert_same(given, problem(4, 17, 33))


def test_what_is_read_later_is_not_overwritten(machine):
    lengths, directions, gradients = problem(4, 17, 33)

    @jax.jit
    def run(directions):
        gates = [direction.gates_TBG * 2 for direction in directions]
        doubled = [
            direction._replace(gates_TBG=own) for direction, own in zip(directions, gates, strict=True)
        ]
        out, pull = jax.vjp(lambda directions: lstm.lstm(BOTH, lengths, directions), doubled)
        return gates, out, pull(gradients), pull(gradients), gates

    gates, _, once, twice, again = run(directions)
    assert_same(gates, [direction.gates_TBG * 2 for direction in directions])
    assert_same(again, gates)
    assert_same(twice, once)


def test_on_eight_devices(machine):
    """Each with a share of the rows; gradients by the kernel are added up."""
    lengths, directions, gradients = problem(4, 8 * 9, 33)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    whole, rows, later = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")
    each = [Direction(whole, later, rows, rows)] * 2

    def share(lengths, directions, gradients):
        out, back = derivatives(lengths, directions, gradients)
        return out, [d._replace(kernel=jax.lax.psum(d.kernel, "data")) for d in back]

    out = later, [(rows, rows)] * 2
    apart = jax.shard_map(
        share, mesh=mesh, in_specs=(rows, each, out), out_specs=(out, each), check_vma=False
    )
    found = jax.jit(apart)(lengths, directions, gradients)
    assert_near(found, exact(lengths, directions, gradients), BOUNDS["float32"])


# ---- cells ----


@pytest.mark.parametrize("lengths", ["each its own", "all"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cells_are_walked_as_by_a_loop(dtype, lengths, machine, monkeypatch):
    """By which they are where there is no library, or none for bfloat16 without a matrix unit."""
    rows, hidden, length = 16, 24, 5
    made = [CELLS["lstm"](hidden, hidden, rngs=nnx.Rngs(seed), dtype=jnp.dtype(dtype)) for seed in range(2)]
    graphdef, params = nnx.split(nnx.List(made))
    _, directions, (weight, _) = problem(length + 2, rows, hidden, dtype=dtype)
    gates = [direction.gates_TBG for direction in directions]
    length_B = np.arange(rows, dtype=np.int32) % (length + 1) if lengths == "each its own" else None

    def walked(params, gates):
        cells = list(nnx.merge(graphdef, params))
        states = [cell.zero_state((rows,)) for cell in cells]
        outputs, states = recurrent.walk(cells, gates, states, jnp.asarray(length), length_B)
        return jnp.sum((outputs * weight).astype(jnp.float32)), (outputs, states)

    def run(*args):
        return jax.value_and_grad(walked, argnums=(0, 1), has_aux=True)(*args)

    def calls():
        return str(jax.make_jaxpr(lambda *args: run(*args))(params, gates)).count("target_name=s2s_lstm")

    assert calls() == (
        2 if dtype == "float32" or machine == "as it is" and lstm.parts_of(jnp.dtype(dtype)) else 0
    )
    found = jax.jit(lambda *args: run(*args))(params, gates)
    monkeypatch.setattr(library, "load", lambda: None)
    assert calls() == 0
    expected = jax.jit(lambda *args: run(*args))(params, gates)
    assert_near(found, expected, 1e-5 if dtype == "float32" else 6e-2)


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_other_cells_and_a_few_rows_are_not(cell, loaded):
    assert not lstm.available(7, jnp.float32)
    assert not lstm.available(8, jnp.float16)
    if cell not in CELLS:
        pytest.skip("no such cell")
    own = CELLS[cell](8, 8, rngs=nnx.Rngs(0))
    gates = numbers(3, 9, own.gates * 8)
    jaxpr = jax.make_jaxpr(lambda: recurrent.walk([own], [gates], [own.zero_state((9,))], jnp.asarray(3)))()
    assert "s2s_lstm" not in str(jaxpr)


def test_an_equation_of_ones_own_is_not(loaded):
    class Loud(CELLS["lstm"]):
        def step(self, state, gates):
            h, c = super().step(state, gates)
            return 2 * h, c

    own = Loud(8, 8, rngs=nnx.Rngs(0))
    gates = numbers(3, 9, 32)
    jaxpr = jax.make_jaxpr(lambda: recurrent.walk([own], [gates], [own.zero_state((9,))], jnp.asarray(3)))()
    assert "s2s_lstm" not in str(jaxpr)


# ---- other processors, and the parts by themselves ----

ON_X86 = shutil.which("gcc") is not None and platform.machine() == "x86_64" and sys.platform == "linux"

PARTS = r"""
#include <pthread.h>
#include "kernels.c"

void logistic_of(float *x, long count) {
  for (long i = 0; i < count; i += 16) store(x, i, 16, 0, logistic(load(x, i, 16, 0)));
}

void tanh_of(float *x, long count) {
  for (long i = 0; i < count; i += 16) store(x, i, 16, 0, hyperbolic_tangent(load(x, i, 16, 0)));
}

void rounded_of(const float *x, uint16_t *to, long count) {
  for (long i = 0; i < count; i += 16) store(to, i, 16, 1, load(x, i, 16, 0));
}

static long threads;
static int refuses;

static XLA_FFI_Error *count_threads(XLA_FFI_ThreadPool_NumThreads_Args *args) {
  *args->num_threads = threads;
  return NULL;
}

typedef struct {
  XLA_FFI_Task *task;
  void *data;
} Job;

static void *start(void *job) {
  Job own = *(Job *)job;
  free(job);
  own.task(own.data);
  return NULL;
}

static XLA_FFI_Error *schedule(XLA_FFI_ThreadPool_Schedule_Args *args) {
  if (refuses) return (XLA_FFI_Error *)&refuses;
  Job *job = malloc(sizeof(Job));
  *job = (Job){args->task, args->data};
  pthread_t thread;
  pthread_create(&thread, NULL, start, job);
  pthread_detach(thread);
  return NULL;
}

static void destroy(XLA_FFI_Error_Destroy_Args *args) { (void)args; }

typedef struct {
  const int64_t *sizes;
  uint8_t *times; /* that each unit was worked on, phase by phase */
  atomic_long done, early;
} Told;

static long told_size(long phase, const void *told) { return ((const Told *)told)->sizes[phase]; }

static void told_unit(long phase, long number, void *argument) {
  Told *told = argument;
  long before = 0;
  for (long n = 0; n < phase; n++) before += told->sizes[n];
  if (atomic_load(&told->done) < before) atomic_fetch_add(&told->early, 1);
  told->times[before + number]++;
  atomic_fetch_add(&told->done, 1);
}

/* Units that began before all those of an earlier phase had ended. */
long phases(long workers, int alone, long count, const int64_t *sizes, uint8_t *times) {
  XLA_FFI_Api api = {.XLA_FFI_ThreadPool_NumThreads = count_threads,
                     .XLA_FFI_ThreadPool_Schedule = schedule,
                     .XLA_FFI_Error_Destroy = destroy};
  XLA_FFI_CallFrame frame = {.api = &api};
  Told told = {.sizes = sizes, .times = times};
  threads = workers, refuses = alone;
  run_phases(&frame, thread_count(&frame), (Phases){count, 1, told_size, told_unit, &told});
  return told.early;
}
"""


def build_for(processor, folder):
    """The library for a processor, with what only tests call."""
    if not ON_X86:
        pytest.skip("no gcc for x86")
    if processor == "haswell" and " avx2 " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("no such vectors")
    (folder / "parts.c").write_text(PARTS)
    flags = ["-std=gnu11", "-O2", f"-march={processor}", "-shared", "-fPIC", "-pthread"]
    flags += [f"-I{SOURCE}", f"-I{jax.ffi.include_dir()}"]
    command = ["gcc", *flags, folder / "parts.c", "-o", folder / "parts.so"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = ctypes.CDLL(str(folder / "parts.so"))
    made.phases.restype = ctypes.c_long
    for name in ("s2s_lstm", "s2s_lstm_back"):
        capsule = jax.ffi.pycapsule(getattr(made, name))
        jax.ffi.register_ffi_target(f"{processor}_{name}", capsule, platform="cpu")
    made.prefix = processor + "_"
    return made


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return build_for("native", tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module", params=["native", "haswell", "x86-64"])
def build(request, tmp_path_factory):
    if request.param == "native":
        return request.getfixturevalue("native")
    return build_for(request.param, tmp_path_factory.mktemp("build"))


@pytest.mark.parametrize("size", SIZES[3::4], ids=str)
def test_the_equations_on_other_processors(size, build, loaded, monkeypatch):
    """Vectors of 16, 8 and 4 floats."""
    monkeypatch.setattr(loaded, "has_matrix_unit", False)
    call = library.call
    monkeypatch.setattr(library, "call", lambda name, *rest: call(build.prefix + name, *rest))
    given = problem(*size)
    assert_near(compiled(*given), exact(*given), BOUNDS["float32"])


def applied(function, x):
    x = np.array(x, np.float32)
    assert len(x) % 16 == 0
    function(x.ctypes.data_as(ctypes.c_void_p), ctypes.c_long(len(x)))
    return x


SPECIAL = np.array(
    [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1e-38, -1.2e-38, 1e-20, 0.625, -0.625, 3e38, -3e38]
    + [np.inf, -np.inf, np.nan, -np.nan],
    np.float32,
)


@pytest.mark.parametrize("name", ["logistic", "tanh"])
def test_activations_err_by_less_than_three_units_in_the_last_place(name, build):
    draw = np.random.default_rng(0)
    spread = [
        np.linspace(-100, 100, 160_000),
        draw.uniform(-1, 1, 160_000),
        10 ** draw.uniform(-44, 2, 160_000),
    ]
    x = np.concatenate([*spread, -spread[2], SPECIAL]).astype(np.float32)
    found = applied(getattr(build, f"{name}_of"), x)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (sigmoid if name == "logistic" else np.tanh)(x.astype(np.float64))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(x))
    numbers = ~np.isnan(x)
    found, expected = found[numbers], expected[numbers]
    error = np.abs(found - expected) / np.spacing(np.abs(expected).astype(np.float32))
    # Below its value at -87.3, a logistic that is not quite 0 is as good as one that is.
    error[(name == "logistic") & (x[numbers] < -87.3) & (found <= 1.3e-38)] = 0
    assert error.max() < 3
    if name == "tanh":
        np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))  # of -0 too
        assert np.abs(found).max() == 1


def test_rounded_to_bfloat16_as_elsewhere(build):
    bits = np.random.default_rng(0).integers(0, 2**32, 160_000, np.uint32)
    # Halfway between two, and what is no number, though only by bits that are rounded away.
    bits = np.concatenate([bits, bits & 0xFFFF0000 | 0x8000, bits & 0x807FFFFF | 0x7F800000])
    bits[:16] = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, *[0] * 9]
    x, found = bits.view(np.float32), np.zeros(len(bits), jnp.bfloat16)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (x, found))
    build.rounded_of(*pointers, ctypes.c_long(len(x)))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(jnp.bfloat16)
    unknown = np.isnan(x)
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), unknown)
    np.testing.assert_array_equal(found.view(np.uint16)[~unknown], expected.view(np.uint16)[~unknown])


@pytest.mark.parametrize("alone", [False, True], ids=["helped", "alone"])
@pytest.mark.parametrize("workers", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize(
    "sizes", [[1], [0, 3, 0, 0, 5, 1, 0], [70, 1] * 50, [2**20 - 1, 2**20, 2, 2**21 - 1]]
)
def test_every_unit_is_worked_on_once_and_after_the_phase_before(sizes, workers, alone, native):
    sizes, times = np.array(sizes, np.int64), np.zeros(sum(sizes), np.uint8)
    early = native.phases(
        ctypes.c_long(workers), alone, ctypes.c_long(len(sizes)),
        sizes.ctypes.data_as(ctypes.c_void_p), times.ctypes.data_as(ctypes.c_void_p),
    )  # fmt: skip
    assert early == 0
    assert (times == 1).all()
