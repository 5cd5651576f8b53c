"""Choice among a vocabulary: the best k, the nucleus, one draw.

Decides how to choose exactly, and among equals the lowest index, at the price of about
one pass over the numbers. Must not know what a hypothesis is: numbers in, indices out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from s2s.batch import BOS, EOS, PAD
from s2s.kernels import survey as fused

# Measured on 4 CPU cores, best 5 of 5 * 32,000, 64 sentences: 1 ms in chunks of 32 to 256 tokens,
# 12 ms by lax.top_k. Masking or padding the whole vocabulary first would cost as much again, and so
# would cutting it where chunks leave a rest: hence a size that leaves none, where there is one.
_CHUNK = 64
_CHUNKS = sorted(range(_CHUNK // 2, 2 * _CHUNK + 1), key=lambda size: abs(size - _CHUNK))


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[b, index[b, k]] for all b, k: whole slices, one gather."""
    return jax.vmap(lambda row, at: row[at])(x, index)


def _chunk_of(V: int) -> int:
    """Entries in a chunk of V."""
    return next((size for size in _CHUNKS if V % size == 0), _CHUNK)


def _chunk_reduce(x: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """Reduces the last axis in chunks of consecutive entries, a shorter one last."""
    chunk = _chunk_of(x.shape[-1])
    whole = x.shape[-1] // chunk * chunk
    parts = []
    if whole:
        parts.append(reduce(x[..., :whole].reshape(*x.shape[:-1], -1, chunk), axis=-1))
    if whole < x.shape[-1]:
        parts.append(reduce(x[..., whole:], axis=-1)[..., None])
    return jnp.concatenate(parts, axis=-1)


class Distribution(NamedTuple):
    """A distribution over V tokens: log p = logits - total.

    Attributes:
      logits: [..., V].
      total: [...].
      highest: the highest logit of every chunk, [..., C].
    """

    logits: jax.Array
    total: jax.Array
    highest: jax.Array


def survey(product: jax.Array, bias_V: jax.Array | None = None) -> Distribution:
    """The distribution whose logits are a product [..., V] and a bias; None: 0.

    Its total is log sum exp of the logits; 0 where nothing is possible, so that logits - total stay -inf.
    """
    *rows, V = product.shape
    bias_V = jnp.zeros((V,), product.dtype) if bias_V is None else bias_V.astype(product.dtype)
    if fused.available(product.dtype):
        found = fused.survey(product.reshape(-1, V), bias_V, _chunk_of(V))
        return Distribution(*(x.reshape(*rows, *x.shape[1:]) for x in found))
    logits = product + jnp.broadcast_to(bias_V, product.shape)
    # Without the barrier XLA takes the maximum of maxima as one of all entries, a second pass.
    maxima = lax.optimization_barrier(_chunk_reduce(logits, jnp.max))
    highest = jnp.max(maxima, axis=-1, keepdims=True)
    highest = jnp.where(highest > -jnp.inf, highest, 0.0)
    total = jnp.sum(jnp.exp(logits - highest), axis=-1)
    return Distribution(logits, jnp.where(total > 0, jnp.log(total), 0.0) + highest[..., 0], maxima)


def best_tokens(
    logits: jax.Array, highest: jax.Array, base: jax.Array, may_end: jax.Array, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k best of base[..., j] + logits[..., j, v] over all j, v, exactly as `lax.top_k`.

    Leaves out PAD and BOS, and EOS where ``may_end[..., j]`` is False. The k best lie in the k chunks
    with the highest maxima; taken in the order of their positions, ties fall to the lowest.

    Args:
      logits: [..., J, V].
      highest: of every chunk of them, as in `Distribution`.
      base: [..., J].
      may_end: [..., J].
      k: static.

    Returns:
      Values (best first; -inf beyond what exists), j and v, [..., k] each.
    """
    if logits.ndim > 3:
        return jax.vmap(functools.partial(best_tokens, k=k))(logits, highest, base, may_end)
    B, J, V = logits.shape

    def allowed(values: jax.Array, v: jax.Array, may_end: jax.Array) -> jax.Array:
        forbidden = (v == PAD) | (v == BOS) | ((v == EOS) & ~may_end)
        return jnp.where(forbidden, -jnp.inf, values)

    size = min(_chunk_of(V), V)
    head = jnp.arange(size)[None, None]
    first_BJ = jnp.max(allowed(logits[:, :, :size], head, may_end[..., None]), axis=-1)
    best_BJC = base[..., None] + highest.at[:, :, 0].set(first_BJ)
    C = best_BJC.shape[-1]
    _, chunk = lax.top_k(best_BJC.reshape(B, J * C), min(k, J * C))
    chunk = jnp.sort(chunk, axis=-1)
    j, begin = chunk // C, chunk % C * size
    # Whole slices are taken: what a shorter one has of the chunk before it is left out again.
    first = jnp.minimum(begin, V - size)
    v = first[..., None] + jnp.arange(size)[None, None]
    slice_at = functools.partial(lax.dynamic_slice, slice_sizes=(1, size))
    values = jax.vmap(jax.vmap(slice_at, (None, 0)))(logits, (j, first)).reshape(v.shape)
    values = take_rows(base, j)[..., None] + allowed(values, v, take_rows(may_end, j)[..., None])
    values = jnp.where(v >= begin[..., None], values, -jnp.inf).reshape(B, -1)
    values, place = lax.top_k(values, min(k, values.shape[-1]))
    return values, take_rows(j, place // size), take_rows(v.reshape(B, -1), place)


def softmax(logits: jax.Array) -> jax.Array:
    """Softmax over the last axis that gives zeros, not NaN, where nothing is possible."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(highest > -jnp.inf, highest, 0.0))
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def nucleus(probs: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Zeroes all but the fewest likeliest entries whose sum reaches top_p.

    Bisects the bits of the threshold, whose order is that of non-negative floats: a sort of
    64 * 5 * 32,000 entries takes 2 s on 4 CPU cores.
    """
    if isinstance(top_p, int | float) and top_p >= 1.0:
        return probs

    def mass_of(kept: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(kept, probs, 0.0), axis=-1, keepdims=True)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = mass_of(probs >= lax.bitcast_convert_type(middle, jnp.float32)) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((*probs.shape[:-1], 1), jnp.int32)
    high = jnp.full_like(low, 0x3F800001)  # the float above 1.0
    low, _ = lax.fori_loop(0, 31, halve, (low, high))
    threshold = lax.bitcast_convert_type(low, jnp.float32)
    above, equal = probs > threshold, probs == threshold
    rank = jnp.cumsum(equal, axis=-1) - equal
    return jnp.where(above | (equal & (mass_of(above) + rank * threshold < top_p)), probs, 0.0)


def draw(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The entry of the last axis that ``uniform`` in [0, 1) falls on: first the chunk, then the entry."""
    mass, size = _chunk_reduce(weights, jnp.sum), _chunk_of(weights.shape[-1])
    chunk, left = _fall(mass, uniform * jnp.sum(mass, axis=-1))
    at = chunk[..., None] * size + jnp.arange(size)[(None,) * uniform.ndim]
    # Repeating the last entry is harmless: it is the answer wherever a repetition would be.
    at = jnp.minimum(at, weights.shape[-1] - 1)
    part = jnp.take_along_axis(weights, at, axis=-1)
    return jnp.take_along_axis(at, _fall(part, left)[0][..., None], axis=-1)[..., 0]


def _fall(weights: jax.Array, point: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first entry at which the running sum passes ``point``, and how far into it the point lies."""
    total = jnp.cumsum(weights, axis=-1)
    hit = (total > point[..., None]) & (weights > 0)
    # Rounding may put the point at the very end: then the heaviest entry, never an impossible one.
    place = jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), jnp.argmax(weights, axis=-1))
    before = jnp.take_along_axis(total - weights, place[..., None], axis=-1)[..., 0]
    return place, jnp.maximum(point - before, 0.0)
