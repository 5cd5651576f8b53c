"""Products through the library: right at every size and in every transformation, and always the same."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from s2s.kernels import library
from s2s.kernels.contract import contract, with_constant
from s2s.nn import recurrent
from s2s.nn.cells import CELLS
from s2s.nn.equations import ready
from s2s.nn.product import product

# Around the edges of blocks (8, 16, 24, 32, 48 wide) and of what is packed together (32, 128, 512 deep).
WIDTHS = (8, 9, 31, 32, 33, 48, 49, 64, 65)
DEPTHS = (1, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1025)
SIZES = [
    (rows, WIDTHS[(row * 4 + number) % len(WIDTHS)], depth)
    for row, rows in enumerate(WIDTHS)
    for number, depth in enumerate(DEPTHS)
    if (row + number) % 3 == 0
]
SIZES += [(small, 9 - small, depth) for small, depth in itertools.product(range(1, 9), (1, 33))]
SIZES += [(small, 40, 33) for small in range(1, 8)] + [(40, small, 33) for small in range(1, 8)]
# More rows and columns than one unit of work has.
SIZES += [(330, 2085, 40), (700, 50, 520)]

# Largest error, of the sum of the products' magnitudes.
FLOAT32 = 1e-6
BOUNDS = {None: FLOAT32, "highest": FLOAT32, "high": 2e-5, "bfloat16": 1e-2}
# A float32 rounded to bfloat16.
ROUNDED = 2.0**-8

BOTH_AXES = (0, 1)


def numbers(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def operands(rows, columns, depth, left_axis, right_axis, dtype=np.float32):
    left = numbers(*((rows, depth) if left_axis else (depth, rows)), seed=1, dtype=dtype)
    right = numbers(*((columns, depth) if right_axis else (depth, columns)), seed=2, dtype=dtype)
    return left, right


def exact(left, right, left_axes, right_axes):
    """The product in float64, and that of magnitudes."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    axes = (left_axes, right_axes)
    return np.tensordot(left, right, axes), np.tensordot(np.abs(left), np.abs(right), axes)


def assert_near(found, left, right, left_axes, right_axes, bound=FLOAT32, rounded=0.0):
    expected, magnitude = exact(left, right, left_axes, right_axes)
    assert found.shape == expected.shape
    error = np.abs(np.asarray(found, np.float64) - expected)
    allowed = bound * magnitude + rounded * np.abs(expected)
    assert (error <= allowed).all(), f"{np.max(error / np.maximum(allowed, 1e-300))} times the bound"


def matmul_precision(name):
    return contextlib.nullcontext() if name is None else jax.default_matmul_precision(name)


def products(sizes, left_axis, right_axis, dtype=np.float32, result=None, constant=False):
    """Operands of all sizes, and what they give in one program."""
    pairs = [operands(*size, left_axis, right_axis, dtype) for size in sizes]
    result = result or dtype

    def multiply(left, right):
        if constant:
            return with_constant(right, right_axis, left.shape[0], result)(left)
        return contract(left, right, (left_axis,), (right_axis,), result)

    found = jax.jit(lambda pairs: [multiply(*pair) for pair in pairs])(pairs)
    assert all(product.dtype == result for product in found)
    return [(*pair, product) for pair, product in zip(pairs, found, strict=True)]


def primitives(jaxpr, inside=None):
    """Names of the primitives of a jaxpr and of all that it calls; only what is inside of ``inside``."""
    found = []

    def visit(jaxpr, counts):
        for equation in jaxpr.eqns:
            if counts:
                found.append(equation.primitive.name)
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    visit(inner, counts or equation.primitive.name == inside)

    visit(jaxpr, inside is None)
    return found


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


@pytest.fixture(params=["as it is", "without a matrix unit", "without the library"])
def machine(request, monkeypatch):
    """Every kind of machine that this one can pass for; what a test compiles must be its own function."""
    if request.param == "without the library":
        monkeypatch.setattr(library, "load", lambda: None)
    elif request.param == "without a matrix unit":
        monkeypatch.setattr(request.getfixturevalue("loaded"), "has_matrix_unit", False)
    return request.param


# ---- numbers ----


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("right_axis", BOTH_AXES)
@pytest.mark.parametrize("left_axis", BOTH_AXES)
def test_float32_at_every_size_and_orientation(left_axis, right_axis, precision):
    sizes = SIZES if precision is None else SIZES[::3]
    with matmul_precision(precision):
        found = products(sizes, left_axis, right_axis)
    for left, right, product_ in found:
        assert_near(product_, left, right, (left_axis,), (right_axis,), BOUNDS[precision])


@pytest.mark.parametrize("precision, bound", [("highest", 4), (None, 8)])
def test_float32_errs_as_numpy_does(precision, bound):
    errors = []
    with matmul_precision(precision):
        found = products([(65, 64, depth) for depth in DEPTHS], 1, 0)
    for left, right, product_ in found:
        expected, _ = exact(left, right, (1,), (0,))
        own, numpys = (np.sqrt(np.mean((x - expected) ** 2)) for x in (np.asarray(product_), left @ right))
        errors.append(own / numpys)
    assert max(errors) < bound


def uneven(*shape, seed):
    """Numbers of which the largest is thousands of times the middle one."""
    return numbers(*shape, seed=seed) * np.exp(2 * numbers(*shape, seed=seed + 1)).astype(np.float32)


# Positions over which a row is measured.
MEASURED = 256


@pytest.mark.parametrize("depth", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("right_axis", BOTH_AXES)
@pytest.mark.parametrize("left_axis", BOTH_AXES)
def test_fixed_point_errs_by_the_largest_of_a_row(left_axis, right_axis, depth, matrix_unit):
    """Each position by less than 2^-20 of both largest numbers, with those of other positions far away."""
    left, right = uneven(40, depth, seed=1), uneven(depth, 50, seed=3)
    left[3] *= 1e-20
    given = left if left_axis else left.T.copy(), right.T.copy() if right_axis else right
    found = jax.jit(lambda *given: contract(*given, (left_axis,), (right_axis,), jnp.float32))(*given)
    expected, magnitude = exact(left, right, (1,), (0,))
    allowed = 2.0**-22 * magnitude  # of adding up what was measured apart
    for k in range(0, depth, MEASURED):
        one, other = np.abs(left[:, k : k + MEASURED]), np.abs(right[k : k + MEASURED])
        allowed += 2.0**-20 * one.shape[1] * one.max(1)[:, None] * other.max(0)[None].astype(np.float64)
    assert (np.abs(found - expected) <= allowed).all()


def test_the_highest_precision_is_that_of_every_number(matrix_unit):
    """Also where the largest of a row meets a zero; only then."""
    left, right = uneven(40, 300, seed=1), uneven(300, 50, seed=3)
    found = {}
    for precision in ("highest", None):
        with matmul_precision(precision):
            found[precision] = jax.jit(lambda: contract(left, right, (1,), (0,), jnp.float32))()
    assert_near(found["highest"], left, right, (1,), (0,))
    with pytest.raises(AssertionError):
        assert_near(found[None], left, right, (1,), (0,))


def test_small_integers_are_multiplied_exactly_in_float32():
    left, right = (
        np.random.default_rng(n).integers(-180, 180, (300, 300)).astype(np.float32) for n in (0, 1)
    )
    found = jax.jit(lambda: contract(left, right, (1,), (0,), jnp.float32))()
    np.testing.assert_array_equal(found, left @ right)


@pytest.mark.parametrize(
    "largest", [8355711, 8355712, 8388607, 8388608, 16711421, 16711422, 16711423, 16777215]
)
def test_rows_whose_largest_just_fits(largest):
    """24 bits, of which the highest digit must not round to 128."""
    left = numbers(40, 70)
    left[:, 5], left[::2, 6] = largest * 2.0**-22, -largest * 2.0**-22
    right = np.zeros((70, 70), np.float32)
    right[range(70), range(70)] = 1
    found = jax.jit(lambda: contract(left, right, (1,), (0,), jnp.float32))()
    np.testing.assert_allclose(found, left, rtol=0, atol=largest * 2.0**-22 * 2.0**-22)


@pytest.mark.parametrize("precision", ["high", "bfloat16"])
def test_a_lower_precision_is_taken_where_it_is_asked_for(precision, matrix_unit):
    """Only then is it faster."""
    left, right = operands(64, 64, 128, 1, 0)
    with matmul_precision(precision):
        found = jax.jit(lambda: contract(left, right, (1,), (0,), jnp.float32))()
    with pytest.raises(AssertionError):
        assert_near(found, left, right, (1,), (0,), BOUNDS[precision] / 100)


@pytest.mark.parametrize("result", ["float32", "bfloat16"])
@pytest.mark.parametrize("right_axis", BOTH_AXES)
@pytest.mark.parametrize("left_axis", BOTH_AXES)
def test_bfloat16_is_summed_in_float32_and_rounded_once(left_axis, right_axis, result):
    found = products(SIZES[::2], left_axis, right_axis, ml_dtypes.bfloat16, jnp.dtype(result))
    rounded = ROUNDED if result == "bfloat16" else 0.0
    for left, right, product_ in found:
        assert_near(product_, left, right, (left_axis,), (right_axis,), rounded=rounded)


def test_float32_into_bfloat16():
    for left, right, found in products([(40, 50, depth) for depth in DEPTHS], 1, 0, result=jnp.bfloat16):
        assert_near(found, left, right, (1,), (0,), rounded=ROUNDED)


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "bfloat16 into float32", "float32 into bfloat16"])
@pytest.mark.parametrize("axis", BOTH_AXES)
def test_a_constant_at_every_size_on_every_machine(axis, dtypes, machine):
    dtype, result = (getattr(ml_dtypes, name, name) for name in (dtypes.split()[0], dtypes.split()[-1]))
    sizes = [(rows + 8, columns, depth) for rows, columns, depth in SIZES[:: 4 if library.load() else 16]]
    found = products(sizes, 1, axis, jnp.dtype(dtype), jnp.dtype(result), constant=True)
    rounded = ROUNDED if result == ml_dtypes.bfloat16 else 0.0
    for left, right, product_ in found:
        assert_near(product_, left, right, (1,), (axis,), rounded=rounded)


def test_a_result_that_the_library_does_not_write():
    left, right = operands(16, 16, 16, 1, 0)
    found = jax.jit(
        lambda: [
            contract(left, right, (1,), (0,), jnp.float16),
            with_constant(jnp.asarray(right), 0, 16, jnp.float16)(left),
        ]
    )()
    for one in found:
        assert one.dtype == jnp.float16
        assert_near(one, left, right, (1,), (0,), rounded=2.0**-11)


def test_more_axes_than_two():
    x, kernel = numbers(7, 9, 33), numbers(33, 40)
    gradient = numbers(7, 9, 40, seed=3)

    @jax.jit
    def run(x, kernel, gradient):
        return (
            contract(x, kernel, (2,), (0,), jnp.float32),
            contract(x, gradient, (0, 1), (0, 1), jnp.float32),
            # A sum over an axis in the middle, and over axes in another order.
            contract(x, gradient, (1,), (1,), jnp.float32),
            contract(x, gradient, (1, 0), (1, 0), jnp.float32),
            contract(x, x, (1, 2), (1, 2), jnp.float32),
            contract(x, x, (0, 1, 2), (0, 1, 2), jnp.float32),
            contract(kernel, kernel, (), (), jnp.float32),
        )

    found = run(x, kernel, gradient)
    cases = [
        (x, kernel, (2,), (0,)),
        (x, gradient, (0, 1), (0, 1)),
        (x, gradient, (1,), (1,)),
        (x, gradient, (1, 0), (1, 0)),
        (x, x, (1, 2), (1, 2)),
        (x, x, (0, 1, 2), (0, 1, 2)),
        (kernel, kernel, (), ()),
    ]
    for one, case in zip(found, cases, strict=True):
        assert_near(one, *case)


def test_float64_is_as_exact_as_it_is(x64):
    left, right = operands(40, 48, 513, 1, 0, np.float64)
    found = jax.jit(
        lambda left, right: [
            contract(left, right, (1,), (0,), jnp.float64),
            with_constant(right, 0, 40, jnp.float64)(left),
            product(left, right),
        ]
    )(left, right)
    for one in found:
        assert one.dtype == jnp.float64
        assert_near(one, left, right, (1,), (0,), 1e-12)


def test_integers_are_multiplied_exactly():
    left = np.random.default_rng(0).integers(-2000, 2000, (16, 65), np.int32)
    right = np.random.default_rng(1).integers(-2000, 2000, (65, 16), np.int32)
    found = jax.jit(lambda: contract(left, right, (1,), (0,), jnp.int32))()
    np.testing.assert_array_equal(found, left @ right)


@pytest.mark.parametrize("sizes", [(0, 16, 16), (16, 0, 16), (16, 16, 0), (0, 0, 0)])
def test_nothing_to_multiply(sizes):
    rows, columns, depth = sizes
    left, right = operands(*sizes, 1, 0)
    one, other = jax.jit(
        lambda: (
            contract(left, right, (1,), (0,), jnp.float32),
            with_constant(jnp.asarray(right), 0, rows, jnp.float32)(left),
        )
    )()
    np.testing.assert_array_equal(one, np.zeros((rows, columns)))
    np.testing.assert_array_equal(other, np.zeros((rows, columns)))


def test_not_a_number_stays_where_it_belongs():
    left, right = operands(40, 50, 70, 1, 0)
    plain = jax.jit(lambda left: contract(left, right, (1,), (0,), jnp.float32))(left)
    for wrong in (np.nan, np.inf, -np.inf):
        broken = left.copy()
        broken[3, 5] = wrong
        found = np.asarray(jax.jit(lambda left: contract(left, right, (1,), (0,), jnp.float32))(broken))
        assert not np.isfinite(found[3]).any()
        np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(plain, 3, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_not_a_number_stays_one_when_it_is_rounded(dtype):
    left, right = operands(40, 50, 70, 1, 0, jnp.dtype(dtype))
    left[3, 5], left[4, 5] = np.nan, np.inf
    found = jax.jit(lambda: contract(left, right, (1,), (0,), jnp.bfloat16))()
    assert not np.isfinite(np.asarray(found[3:5], np.float32)).any()
    assert np.isnan(np.asarray(found[3], np.float32)).all()


def test_zeros_make_zeros():
    left, right = operands(40, 50, 70, 1, 0)
    left[3] = 0
    right[:, 4] = 0
    found = np.asarray(jax.jit(lambda: contract(left, right, (1,), (0,), jnp.float32))())
    assert not found[3].any() and not found[:, 4].any()
    assert np.delete(np.delete(found, 3, 0), 4, 1).all()


@pytest.mark.parametrize(
    "left_scale, right_scale", [(1e30, 1), (1e-30, 1), (1, 1e-30), (1e30, 1e-30), (1e18, 1e18)]
)
def test_large_and_small_numbers_are_as_exact_as_others(left_scale, right_scale):
    left, right = operands(40, 50, 70, 1, 0)
    left, right = left * np.float32(left_scale), right * np.float32(right_scale)
    found = jax.jit(lambda: contract(left, right, (1,), (0,), jnp.float32))()
    assert_near(found, left, right, (1,), (0,))


@pytest.mark.parametrize("precision", ["highest", None])
def test_numbers_near_the_ends_of_float32(precision):
    """What parts lose there: those below the smallest normal number are zeros, of operands and of products.

    So sums below 1e-33 are only exact to 1e-38 or so, and at the highest precision those from above the
    largest bfloat16, 3.39e38, to the largest float32, 3.40e38, may come out as not finite.
    """
    with matmul_precision(precision):
        smallest = float(np.finfo(np.float32).tiny)
        for one, other in [(1e-34, 1), (1e-36, 1), (1e-37, 1), (1e-36, 1e36), (1e-18, 1e-18), (1e30, 1e-37)]:
            left, right = operands(40, 50, 70, 1, 0)
            left, right = left * np.float32(one), right * np.float32(other)
            found = jax.jit(lambda left, right: contract(left, right, (1,), (0,), jnp.float32))(left, right)
            expected, magnitude = exact(left, right, (1,), (0,))
            lost = np.abs(left).sum(1)[:, None] + np.abs(right).sum(0)[None, :].astype(np.float64) + 6 * 70
            assert (np.abs(found - expected) <= FLOAT32 * magnitude + smallest * lost).all()
        left, right = operands(40, 50, 70, 1, 0)
        left[:] = 0
        left[:, 7] = 3.38e38
        right = np.clip(right, 0.1, 0.9)
        found = jax.jit(lambda left, right: contract(left, right, (1,), (0,), jnp.float32))(left, right)
        assert_near(found, left, right, (1,), (0,))


# ---- the same every time ----


def ways():
    """How products of [M, K] and [K, N] come about, where the library makes them."""
    found = library.load()
    if found is not None:
        yield lambda left, right: with_constant(right, 0, left.shape[0], jnp.float32)(left)
        if found.has_matrix_unit:
            yield lambda left, right: contract(left, right, (1,), (0,), jnp.float32)


@pytest.mark.parametrize("depth", [33, 700])
def test_the_same_whatever_else_is_multiplied(depth, loaded):
    left, right = operands(200, 330, depth, 1, 0)
    order = np.random.default_rng(0).permutation(200)
    for way in ways():
        multiply = jax.jit(way)
        whole = np.asarray(multiply(left, right))
        for _ in range(5):
            np.testing.assert_array_equal(multiply(left, right), whole)
        np.testing.assert_array_equal(multiply(left[order], right), whole[order])
        np.testing.assert_array_equal(multiply(left[17:26], right), whole[17:26])
        np.testing.assert_array_equal(multiply(left, right[:, 100:141]), whole[:, 100:141])
        np.testing.assert_array_equal(multiply(left[190:], right[:, 322:]), whole[190:, 322:])
        twice = np.broadcast_to(left[5], left.shape)
        np.testing.assert_array_equal(multiply(twice, right), np.broadcast_to(whole[5], whole.shape))


def test_threads_do_not_disturb_each_other(loaded):
    pairs = [operands(30 + 40 * number, 200, 300 * number + 40, 1, 0) for number in range(6)]
    multiply = [jax.jit(way) for way in ways()]
    expected = [[np.asarray(way(*pair)) for way in multiply] for pair in pairs]

    def again(number):
        for _ in range(10):
            for way, whole in zip(multiply, expected[number], strict=True):
                np.testing.assert_array_equal(way(*pairs[number]), whole)

    with concurrent.futures.ThreadPoolExecutor(len(pairs)) as pool:
        list(pool.map(again, range(len(pairs))))


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", BOTH_AXES)
def test_a_constant_laid_out_gives_the_same(axis, dtype, precision, matrix_unit):
    with matmul_precision(precision):
        sizes = [(rows + 8, columns + 8, depth) for rows, columns, depth in SIZES[::4]]
        one = products(sizes, 1, axis, jnp.dtype(dtype))
        other = products(sizes, 1, axis, jnp.dtype(dtype), constant=True)
    for (*_, found), (*_, expected) in zip(one, other, strict=True):
        np.testing.assert_array_equal(found, expected)


# ---- transformations ----


def weighted(function):
    """A number that tells all elements of a function's array apart."""

    def total(*args):
        out = function(*args)
        return jnp.sum(out * numbers(*out.shape, seed=9).astype(out.dtype))

    return total


def by_xla(left, right, left_axes, right_axes):
    numbers = ((left_axes, right_axes), ((), ()))
    return jax.lax.dot_general(left, right, numbers, preferred_element_type=jnp.float32)


def assert_close(found, expected, scale=2e-6):
    """Relative to the largest."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        other = np.asarray(other, np.float64)
        np.testing.assert_allclose(
            np.asarray(one, np.float64), other, rtol=0, atol=scale * np.abs(other).max()
        )


@pytest.mark.parametrize("right_axis", BOTH_AXES)
@pytest.mark.parametrize("left_axis", BOTH_AXES)
def test_derivatives_are_those_of_xlas_product(left_axis, right_axis, machine):
    left, right = operands(40, 50, 70, left_axis, right_axis)
    tangents = operands(40, 50, 70, left_axis, right_axis)[0] * 2, right * 3

    def own(left, right):
        return contract(left, right, (left_axis,), (right_axis,), jnp.float32)

    def xlas(left, right):
        return by_xla(left, right, (left_axis,), (right_axis,))

    def derivatives(function):
        return (
            jax.jvp(function, (left, right), tangents),
            jax.grad(weighted(function), argnums=(0, 1))(left, right),
            jax.grad(weighted(function), argnums=1)(left, right),
        )

    assert_close(jax.jit(lambda: derivatives(own))(), jax.jit(lambda: derivatives(xlas))())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_layers_product(dtype, machine):
    x, kernel = numbers(5, 9, 33, dtype=jnp.dtype(dtype)), numbers(33, 40, dtype=jnp.dtype(dtype))

    def xlas(x, kernel):
        return by_xla(x, kernel, (2,), (0,)).astype(x.dtype)

    found, expected = (
        jax.jit(lambda function=function: jax.grad(weighted(function), argnums=(0, 1))(x, kernel))()
        for function in (product, xlas)
    )
    assert_close(found, expected, 2e-6 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 2), (2, 1)])
def test_replicas_are_multiplied_as_one_after_the_other(axes, machine):
    count = 3
    shapes = [list(operand.shape) for operand in operands(16, 24, 40, 1, 0)]
    for shape, axis in zip(shapes, axes, strict=True):
        if axis is not None:
            shape.insert(axis, count)
    left, right = (numbers(*shape, seed=seed) for seed, shape in enumerate(shapes))

    def one(left, right):
        return contract(left, right, (1,), (0,), jnp.float32), with_constant(right, 0, 16, jnp.float32)(left)

    found = jax.jit(jax.vmap(one, in_axes=axes))(left, right)
    for number in range(count):
        pair = [
            x if axis is None else np.take(x, number, axis)
            for x, axis in zip((left, right), axes, strict=True)
        ]
        for product_ in found:
            assert_near(product_[number], *pair, (1,), (0,))


@pytest.mark.parametrize("axis", BOTH_AXES)
def test_gradients_of_replicas(axis):
    left, right = numbers(3, 16, 40), numbers(3, *((24, 40) if axis else (40, 24)))

    def derivatives(multiply):
        return jax.grad(weighted(jax.vmap(multiply)), argnums=(0, 1))(left, right)

    found = jax.jit(lambda: derivatives(lambda a, b: contract(a, b, (1,), (axis,), jnp.float32)))()
    expected = jax.jit(lambda: derivatives(lambda a, b: by_xla(a, b, (1,), (axis,))))()
    assert_close(found, expected)


def test_inside_of_loops_and_checkpoints(machine):
    """Powers of a matrix, and their gradient."""
    x, kernel = numbers(16, 24), numbers(24, 24) / 5

    def power(multiply, loop, x, kernel):
        if loop == "scan":
            return jax.lax.scan(lambda x, _: (multiply(x, kernel), None), x, length=3)[0]
        if loop == "while":
            return jax.lax.while_loop(
                lambda state: state[0] < 3, lambda state: (state[0] + 1, multiply(state[1], kernel)), (0, x)
            )[1]
        multiply = jax.checkpoint(multiply)
        return multiply(multiply(multiply(x, kernel), kernel), kernel)

    def derivatives(multiply):
        out = []
        for loop in ("scan", "while", "checkpoint"):
            out.append(power(multiply, loop, x, kernel))
            if loop != "while":
                total = weighted(lambda x, kernel, loop=loop: power(multiply, loop, x, kernel))
                out.append(jax.grad(total, argnums=(0, 1))(x, kernel))
        return out

    found = jax.jit(lambda: derivatives(lambda x, kernel: contract(x, kernel, (1,), (0,), jnp.float32)))()
    expected = jax.jit(lambda: derivatives(lambda x, kernel: by_xla(x, kernel, (1,), (0,))))()
    assert_close(found, expected, 1e-5)


def test_on_eight_devices(machine):
    """Each with a share of the rows; gradients are added up."""
    x, kernel = numbers(8 * 16, 24), numbers(24, 40)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def share(x, kernel):
        gradient = jax.lax.psum(jax.grad(weighted(product), argnums=1)(x, kernel), "data")
        return product(x, kernel), with_constant(kernel, 0, len(x), jnp.float32)(x), gradient

    apart = jax.shard_map(
        share, mesh=mesh, in_specs=(rows, whole), out_specs=(rows, rows, whole), check_vma=False
    )
    one, other, gradient = jax.jit(apart)(x, kernel)
    assert_near(one, x, kernel, (1,), (0,))
    assert_near(other, x, kernel, (1,), (0,))
    assert_near(gradient, x, np.tile(numbers(16, 40, seed=9), (8, 1)), (0,), (0,))


def test_what_varies_over_devices_varies_when_multiplied():
    """Else no loop over a share of the rows is of one type."""
    x, kernel = numbers(8 * 16, 24), numbers(24, 24) / 5
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def share(x, kernel):
        multiply = with_constant(kernel, 0, len(x), jnp.float32)
        return jax.lax.scan(lambda x, _: (multiply(product(x, kernel)), None), x, length=1)[0]

    apart = jax.jit(jax.shard_map(share, mesh=mesh, in_specs=(rows, whole), out_specs=rows))
    assert_near(apart(x, kernel), x, kernel @ kernel, (1,), (0,), 1e-5)


def test_as_programs_that_nobody_compiles():
    """Eagerly, also with arrays of NumPy."""
    left, right = operands(16, 24, 40, 1, 0)
    for convert in (np.asarray, jnp.asarray):
        found = contract(convert(left), convert(right), (1,), (0,), jnp.float32)
        assert_near(found, left, right, (1,), (0,))
    assert_near(with_constant(jnp.asarray(right), 0, 16, jnp.float32)(left), left, right, (1,), (0,))


# ---- constants of loops ----


def test_a_function_for_a_loop_is_the_function(machine):
    kernel, table = numbers(24, 24) / 5, numbers(24, 24, seed=5)
    scale = np.float32(0.5)

    def function(state):
        x, count = state["x"], state["count"]
        doubled = jnp.asarray(kernel) * 2
        x = jnp.tanh(product(x, doubled)) + contract(x, jnp.asarray(table), (1,), (1,), jnp.float32) * scale
        return {"x": x, "count": count + 1, "constant": jnp.asarray(table)[0]}

    def looped(step, x):
        def body(state):
            out = step(state)
            return {"x": out["x"], "count": out["count"]}

        return jax.lax.while_loop(lambda state: state["count"] < 4, body, {"x": x, "count": 0})["x"]

    x = numbers(16, 24, seed=7)

    def prepared(x):
        return looped(ready(function, {"x": x, "count": 0}), x)

    assert_close(jax.jit(prepared)(x), jax.jit(lambda x: looped(function, x))(x), 1e-5)
    out = jax.jit(lambda x: ready(function, {"x": x, "count": 0})({"x": x, "count": 0}))(x)
    assert_close(out, jax.jit(lambda x: function({"x": x, "count": 0}))(x), 1e-5)

    jaxpr = jax.make_jaxpr(prepared)(x).jaxpr
    inside = primitives(jaxpr, "while")
    assert "pack" not in inside
    if library.load() is not None:
        assert primitives(jaxpr).count("pack") == inside.count("contract_packed") == 2
        assert "contract" not in inside


@pytest.mark.parametrize(
    "axes", [((1,), (0,)), ((1, 2), (0, 1)), ((), ()), ((0,), (0,))], ids=["one", "both", "none", "first"]
)
def test_a_constant_may_be_multiplied_in_any_way(axes):
    constant = numbers(16, 24)
    x = numbers(*{1: (16, 16), 2: (9, 16, 24), 0: (9, 9)}[len(axes[0])], seed=4)

    def function(x):
        return contract(x, jnp.asarray(constant), *axes, jnp.float32)

    found = jax.jit(lambda x: ready(function, x)(x))(x)
    assert_near(found, x, constant, *axes)


def test_what_follows_on_a_product_is_not_lost():
    """A function with a gradient of its own may round what it multiplied."""

    @jax.custom_vjp
    def rounded(x, kernel):
        return contract(x, kernel, (1,), (0,), jnp.float32).astype(jnp.float16)

    rounded.defvjp(lambda x, kernel: (rounded(x, kernel), None), lambda _, d: (None, None))
    x, kernel = numbers(16, 24), numbers(24, 32)
    found = jax.jit(lambda x: ready(lambda x: rounded(x, jnp.asarray(kernel)), x)(x))(x)
    assert found.dtype == jnp.float16
    assert_near(found, x, kernel, (1,), (0,), rounded=2.0**-10)


@pytest.mark.parametrize("machine", ["as it is", "without a matrix unit"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recurrence_and_its_gradient_on_every_machine(dtype, machine, monkeypatch):
    rows, hidden, length = 16, 24, 5
    cell = CELLS["gru"](hidden, hidden, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))
    graphdef, params = nnx.split(cell)
    gates = numbers(length, rows, cell.gates * hidden, dtype=jnp.dtype(dtype))
    weight = numbers(length, rows, hidden, seed=3)

    def total(params, gates):
        cell = nnx.merge(graphdef, params)
        outputs, _ = recurrent.walk([cell], [gates], [cell.zero_state((rows,))], jnp.asarray(length))
        return jnp.sum(outputs * weight.astype(outputs.dtype)), outputs

    def derivatives(params, gates):
        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, gates), total(params, gates)

    found = jax.jit(lambda *args: derivatives(*args))(params, gates)
    monkeypatch.setattr(library, "load", lambda: None)
    expected = jax.jit(lambda *args: derivatives(*args))(params, gates)
    assert_close(found, expected, 1e-5 if dtype == "float32" else 4e-2)


def test_a_recurrence_multiplies_with_what_is_laid_out_before_it(loaded):
    rows, hidden, length = 16, 24, 5
    cell = CELLS["gru"](hidden, hidden, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(cell)

    def total(params, gates):
        cell = nnx.merge(graphdef, params)
        outputs, _ = recurrent.walk([cell], [gates], [cell.zero_state((rows,))], jnp.asarray(length))
        return jnp.sum(outputs)

    args = params, numbers(length, rows, cell.gates * hidden)
    gradient = jax.jit(jax.grad(total))
    jaxpr = jax.make_jaxpr(gradient)(*args).jaxpr
    inside = primitives(jaxpr, "while")
    # Forward by the recurrent kernel, and back by it from the other side.
    assert inside.count("contract_packed") == primitives(jaxpr).count("pack") == 2
    assert "pack" not in inside
    # What is left once nothing is computed in vain: beside them the kernel's gradient, from all positions.
    program = gradient.lower(*args).compile().as_text()
    calls = {
        name: program.count(f'custom_call_target="{name}"') for name in ("s2s_stationary", "s2s_product")
    }
    assert calls == {"s2s_stationary": 2, "s2s_product": int(loaded.has_matrix_unit)}
