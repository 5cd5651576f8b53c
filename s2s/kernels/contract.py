"""The sum over axes of two arrays, by the fastest way there is; what all products go through.

Decides which products are given to the library of C functions, and in how many parts float32
is multiplied there. Must not know whose weights these are.

On a processor with a matrix unit (AMX) a float32 is multiplied in fixed point, 24 bits of the largest
in its row: the gradient of a large model is then as exact as through XLA, of a small one within a few
times its error (`benchmarks.precision` shows it). JAX's ``jax_default_matmul_precision`` says otherwise
where it is set: "highest" is three bfloat16 and six products, which keeps the digits of every single
number; "high" two and three (relative error 2^-16), "bfloat16" one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from s2s.kernels import library

# A product of fewer rows or columns is left to XLA: the library works on blocks of 8 or 32.
FEWEST = 8

_PARTS = {
    "highest": 3,
    "float32": 3,
    "high": 2,
    "bfloat16_3x": 2,
    "tensorfloat32": 2,
    "bfloat16": 1,
    "fastest": 1,
}
# Not so many parts, but three digits of a number in fixed point.
_DIGITS = 4

contract_p = core.Primitive("contract")
_pack_p = core.Primitive("pack")
_contract_packed_p = core.Primitive("contract_packed")


def contract(
    left: jax.Array, right: jax.Array, left_axes: Sequence[int], right_axes: Sequence[int], dtype: Any
) -> jax.Array:
    """The sum over axes of both: the free axes of left, then those of right.

    Args:
      left, right: of one dtype.
      left_axes, right_axes: summed over, in pairs.
      dtype: of the result, which is rounded once, at its end.
    """
    axes = tuple(map(int, left_axes)), tuple(map(int, right_axes))
    return contract_p.bind(
        left, right, dimension_numbers=(axes, ((), ())), dtype=jnp.dtype(dtype), parts=parts_of(left.dtype)
    )


def pack(equation: Any, side: int, constant: jax.Array) -> jax.Array | None:
    """A constant laid out for many products with it; None if that is of no use.

    Args:
      equation: the product, of `contract`.
      side: which operand is constant.
    """
    left, params = equation.invars[0].aval, equation.params
    if side == 0 or equation.primitive is not contract_p:
        return None
    (left_axes, axes), _ = params["dimension_numbers"]
    if (
        constant.ndim != 2
        or len(axes) != 1
        or left_axes != (left.ndim - 1,)
        or 0 in (*left.shape, *constant.shape)
    ):
        return None
    (axis,), parts = axes, params["parts"]
    rows = math.prod(left.shape[:-1])
    if not _multiplied(left.dtype, constant.dtype, params["dtype"], parts):
        return None
    if not _worth(rows, constant.shape[1 - axis], parts, packed=True):
        return None
    return _pack_p.bind(constant, axis=axis, parts=parts)


def with_constant(right: jax.Array, axis: int, rows: int, dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """A function x -> `contract`(x, right, last axis of x, axis) for a loop, with right laid out here.

    Args:
      right: [K, N], or the other way around.
      axis: of right, summed over.
      rows: of x [rows, K].
      dtype: of the result.
    """

    def multiply(x: jax.Array) -> jax.Array:
        return contract(x, right, (x.ndim - 1,), (axis,), dtype)

    x = jax.ShapeDtypeStruct((rows, right.shape[axis]), right.dtype)
    (equation,) = jax.make_jaxpr(lambda x, right: contract(x, right, (1,), (axis,), dtype))(x, right).eqns
    packed = pack(equation, 1, right)
    return multiply if packed is None else lambda x: contract_packed(equation, x, right, packed)


def contract_packed(equation: Any, left: Any, right: Any, packed: jax.Array) -> jax.Array:
    """`contract` as in an equation, whose right operand has been packed."""
    return _contract_packed_p.bind(left, right, packed, **equation.params)


def parts_of(dtype: Any) -> int:
    """How many bfloat16 an operand is made of on the matrix unit; 0: it is multiplied as it is."""
    loaded = library.load()
    if loaded is None or not loaded.has_matrix_unit:
        return 0
    if dtype == jnp.bfloat16:
        return 1
    if dtype != jnp.float32:
        return 0
    return _PARTS.get(jax.config.jax_default_matmul_precision or "", _DIGITS)  # type: ignore[attr-defined]


def _worth(rows: int, columns: int, parts: int, packed: bool = False) -> bool:
    """Whether the library is faster than XLA, where XLA's program is for a CPU."""
    loaded = library.load()
    if loaded is None or min(rows, columns) < FEWEST:
        return False
    # Fused multiply-adds XLA does as well, but packs a weight anew at every step.
    return parts > 0 or (packed and loaded.has_wide_vectors)


def _multiplied(left: Any, right: Any, out: Any, parts: int) -> bool:
    """Whether the library multiplies these dtypes."""
    known = (jnp.float32, jnp.bfloat16) if parts else (jnp.float32,)
    return left == right and left in known and out in known


def _plain(left: jax.Array, right: jax.Array, *, dimension_numbers: Any, dtype: Any, **_: Any) -> jax.Array:
    precise = jnp.promote_types(left.dtype, jnp.float32) if jnp.issubdtype(left.dtype, jnp.inexact) else dtype
    return jax.lax.dot_general(left, right, dimension_numbers, preferred_element_type=precise).astype(dtype)


def _shape(left: Any, right: Any, *_: Any, **params: Any) -> Any:
    return jax.typeof(jax.eval_shape(lambda left, right: _plain(left, right, **params), left, right))


def _as_matrix(x: Any, axes: tuple[int, ...]) -> tuple[tuple[int, int], int] | None:
    """The matrix that an array is when summed over these axes, and the axis summed over; or None."""
    summed = math.prod(x.shape[axis] for axis in axes)
    count = len(axes)
    if axes == tuple(range(count)):
        return (summed, math.prod(x.shape[count:])), 0
    if axes == tuple(range(x.ndim - count, x.ndim)):
        return (math.prod(x.shape[: x.ndim - count]), summed), 1
    return None


def _on_cpu(
    left: jax.Array, right: jax.Array, *, dimension_numbers: Any, dtype: Any, parts: int
) -> jax.Array:
    params = {"dimension_numbers": dimension_numbers, "dtype": dtype}
    (left_axes, right_axes), _ = dimension_numbers
    one, other = _as_matrix(left, left_axes), _as_matrix(right, right_axes)
    if not _multiplied(left.dtype, right.dtype, dtype, parts) or one is None or other is None:
        return _plain(left, right, **params)
    (left_shape, left_axis), (right_shape, right_axis) = one, other
    rows, columns = left_shape[1 - left_axis], right_shape[1 - right_axis]
    if not _worth(rows, columns, parts) or left_shape[left_axis] == 0:
        return _plain(left, right, **params)
    out = jax.ffi.ffi_call("s2s_product", jax.ShapeDtypeStruct((rows, columns), dtype))(
        left.reshape(left_shape),
        right.reshape(right_shape),
        left_axis=np.int64(left_axis),
        right_axis=np.int64(right_axis),
        parts=np.int64(parts),
    )
    return out.reshape(_shape(left, right, **params).shape)


def _packed_shape(constant: Any, *, axis: int, parts: int) -> Any:
    loaded = library.load()
    assert loaded is not None
    size = loaded.packed_bytes(constant.shape[axis], constant.shape[1 - axis], parts)
    return jax.core.ShapedArray((size // 4,), jnp.dtype(jnp.uint32))


def _pack(constant: jax.Array, *, axis: int, parts: int) -> jax.Array:
    out = jax.ShapeDtypeStruct(_packed_shape(constant, axis=axis, parts=parts).shape, jnp.uint32)
    return jax.ffi.ffi_call("s2s_pack", out)(constant, right_axis=np.int64(axis), parts=np.int64(parts))


def _packed_on_cpu(
    left: jax.Array, right: jax.Array, packed: jax.Array, *, dimension_numbers: Any, dtype: Any, parts: int
) -> jax.Array:
    shape = _shape(left, right, dimension_numbers=dimension_numbers, dtype=dtype).shape
    out = jax.ShapeDtypeStruct((math.prod(shape[:-1]), shape[-1]), dtype)
    flat = left.reshape(-1, left.shape[-1])
    return jax.ffi.ffi_call("s2s_stationary", out)(flat, packed, parts=np.int64(parts)).reshape(shape)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    """The tangent by XLA's products, which it can transpose."""
    _, tangent = jax.jvp(lambda *operands: _plain(*operands, **params), primals, _concrete(primals, tangents))
    return contract_p.bind(*primals, **params), tangent


def _concrete(primals: Any, tangents: Any) -> Any:
    return tuple(
        jnp.zeros_like(primal) if isinstance(tangent, ad.Zero) else tangent
        for primal, tangent in zip(primals, tangents, strict=True)
    )


def _batched(arguments: Any, axes: Any, **params: Any) -> Any:
    """Replicas: XLA's products of stacks of matrices."""
    mapped = jax.vmap(lambda left, right: _plain(left, right, **params), in_axes=tuple(axes[:2]))
    return mapped(*arguments[:2]), 0


def _pack_batched(arguments: Any, axes: Any, **params: Any) -> Any:
    """What nothing reads: `_batched` takes the constant itself."""
    (constant,), (axis,) = arguments, axes
    one = jax.ShapeDtypeStruct(tuple(np.delete(constant.shape, axis)), constant.dtype)
    return jnp.zeros(_packed_shape(one, **params).shape, jnp.uint32), None


def _define(primitive: core.Primitive, shape: Any, everywhere: Any, on_cpu: Any, batched: Any) -> None:
    """Tells JAX what a primitive is."""

    @functools.cache
    def program(**params: Any) -> Any:
        return jax.jit(functools.partial(primitive.bind, **params))

    def at_once(*arguments: Any, **params: Any) -> Any:
        return program(**params)(*arguments)

    primitive.def_impl(at_once)
    primitive.def_abstract_eval(shape)
    mlir.register_lowering(primitive, mlir.lower_fun(everywhere, multiple_results=False))
    mlir.register_lowering(primitive, mlir.lower_fun(on_cpu, multiple_results=False), platform="cpu")
    batching.primitive_batchers[primitive] = batched


def _unpacked(left: jax.Array, right: jax.Array, packed: jax.Array, **params: Any) -> jax.Array:
    return _plain(left, right, **params)


def _not_packed(constant: jax.Array, **params: Any) -> jax.Array:
    return jnp.zeros(_packed_shape(constant, **params).shape, jnp.uint32)


_define(contract_p, _shape, _plain, _on_cpu, _batched)
_define(_contract_packed_p, _shape, _unpacked, _packed_on_cpu, _batched)
_define(_pack_p, _packed_shape, _not_packed, _pack, _pack_batched)
ad.primitive_jvps[contract_p] = _jvp
