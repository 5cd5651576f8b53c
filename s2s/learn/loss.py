"""The training loss as sums over real target tokens; whoever reports divides.

Decides what is summed, in which precision, and what is computed when. Must not know
which model made the vectors that the softmax reads, nor how sums become means.

The softmax is most of the work of a small model: every token meets every entry of the
vocabulary, once forward and twice backward. So pads are left out: real tokens are moved
to the front and taken in chunks, as many as there are. And logits live for one chunk
only: the gradients are made while they are there, and kept instead of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from s2s.kernels import softmax as fused
from s2s.kernels.contract import contract, with_constant
from s2s.nn.bound import common_max
from s2s.nn.softmax import Softmax
from s2s.shapes import check_shapes


class Sums(NamedTuple):
    """Sums over target tokens, float32 scalars; sums of parts add up to the sums of the whole.

    A mean is a sum divided by ``tokens``; perplexity is exp(nll / tokens). Long runs of
    sums (a corpus) belong in Python floats: float32 stops counting at 2**24.

    Attributes:
      loss: label-smoothed cross-entropy, nats.
      nll: negative log-likelihood of the targets, nats.
      correct: tokens whose target has the highest logit.
      tokens: real target tokens, EOS among them.
    """

    loss: jax.Array
    nll: jax.Array
    correct: jax.Array
    tokens: jax.Array

    def add(self, other: Sums) -> Sums:
        """The sums over both."""
        return Sums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @classmethod
    def zero(cls, dtype: Any = jnp.float32) -> Sums:
        """The sums over no token."""
        return cls(*(jnp.zeros((), dtype) for _ in cls._fields))


def cross_entropy(
    x_BTH: jax.Array,
    softmax: Softmax,
    target_BT: jax.Array,
    mask_BT: jax.Array,
    smoothing: float | jax.Array = 0.0,
) -> Sums:
    """Sums the label-smoothed cross-entropy of the real target tokens.

    loss = -sum_v q(v) log p(v) with p = softmax(logits) and
    q(v) = (1 - smoothing) [v = target] + smoothing / V (Szegedy et al. 2016, section 7),
    so (1 - smoothing) * (lse - logit[target]) + smoothing * (lse - mean(logits)) where
    lse = logsumexp(logits), and d loss / d logits = p - q.

    ``loss`` has derivatives (reverse mode, first order); the other sums are constants to them.

    Args:
      x_BTH: what the softmax reads; any float type. Any finite number where the mask is False.
      softmax: its parameters; logits are computed in float32 at least. With a ``size``, V is that.
      target_BT: ids; anything where the mask is False.
      mask_BT: True on real target positions.
      smoothing: share of probability spread evenly over the vocabulary, in [0, 1); may be traced.
    """
    check_shapes(x_BTH=x_BTH, target_BT=target_BT, mask_BT=mask_BT)
    tokens = x_BTH.reshape(-1, x_BTH.shape[2]), jnp.ravel(target_BT), jnp.ravel(mask_BT)
    return _sums(*tokens, softmax, jnp.asarray(smoothing, jnp.promote_types(x_BTH.dtype, jnp.float32)))


def token_log_probs(
    x_BTH: jax.Array, softmax: Softmax, target_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """log p(target) of every real target token in nats, 0 on the others: [B, T], float32 at least.

    Args: as `cross_entropy`.
    """
    check_shapes(x_BTH=x_BTH, target_BT=target_BT, mask_BT=mask_BT)
    found, _ = _sweep(x_BTH.reshape(-1, x_BTH.shape[2]), jnp.ravel(target_BT), jnp.ravel(mask_BT), softmax)
    return -found.nll_N.reshape(target_BT.shape)


class _Found(NamedTuple):
    """Of every token, 0 where the mask is False: -log p(target), -mean(log p), and whether it was right."""

    nll_N: jax.Array
    uniform_N: jax.Array
    right_N: jax.Array

    def sums(self, mask_N: jax.Array, smoothing: jax.Array) -> Sums:
        nll, uniform, right = (jnp.sum(part_N) for part_N in self)
        return Sums((1 - smoothing) * nll + smoothing * uniform, nll, right, jnp.sum(mask_N, dtype=nll.dtype))


@jax.custom_vjp
def _sums(
    x_NH: jax.Array, target_N: jax.Array, mask_N: jax.Array, softmax: Softmax, smoothing: jax.Array
) -> Sums:
    found, _ = _sweep(x_NH, target_N, mask_N, softmax)
    return found.sums(mask_N, smoothing)


def _sums_forward(
    x_NH: jax.Array, target_N: jax.Array, mask_N: jax.Array, softmax: Softmax, smoothing: jax.Array
) -> tuple[Sums, tuple[jax.Array, Softmax, jax.Array]]:
    found, gradients = _sweep(x_NH, target_N, mask_N, softmax, smoothing)
    assert gradients is not None
    slope = jnp.sum(found.uniform_N) - jnp.sum(found.nll_N)
    return found.sums(mask_N, smoothing), (*gradients, slope)


def _sums_backward(kept: tuple[jax.Array, Softmax, jax.Array], grad: Sums) -> tuple:
    dx_NH, dsoftmax, slope = jax.tree.map(lambda slope: (slope * grad.loss).astype(slope.dtype), kept)
    return dx_NH, None, None, dsoftmax, slope


_sums.defvjp(_sums_forward, _sums_backward)


def _chunk_size(tokens: int) -> int:
    """Tokens of a chunk when there are at most so many real ones.

    n chunks leave half a chunk, tokens / 2n, empty on average. On two CPU cores, with 512 units and 6,000 or
    8,000 entries, a chunk in itself (adding its share of the kernel's gradient to that of the chunks before)
    takes as long as about 50 tokens. The sum of both is least at n = sqrt(tokens / 100).
    """
    chunks = max(1, round((tokens / 100) ** 0.5))
    return -(-tokens // (8 * chunks)) * 8


def _sweep(
    x_NH: jax.Array,
    target_N: jax.Array,
    mask_N: jax.Array,
    softmax: Softmax,
    smoothing: jax.Array | None = None,
) -> tuple[_Found, tuple[jax.Array, Softmax] | None]:
    """Goes once through all real tokens, chunk by chunk.

    Returns:
      What was found; and given ``smoothing``, the gradients of the summed loss by x_NH and by the
      softmax's parameters, else None.
    """
    tokens, axis = len(mask_N), softmax.vocab_axis
    precise = jnp.promote_types(x_NH.dtype, jnp.float32)
    kernel = softmax.kernel.astype(x_NH.dtype)
    size = _chunk_size(tokens)
    spare = -tokens % size
    real = jnp.sum(mask_N)
    # The real tokens, in their order, then the others.
    order_N = jnp.pad(jnp.argsort(~mask_N, stable=True), (0, spare))

    product = with_constant(kernel, 1 - axis, size, precise)
    product_back = with_constant(kernel, axis, size, precise)

    def turn(chunk: jax.Array, carry: tuple[_Found, Any]) -> tuple[_Found, Any]:
        found, gradients = carry
        start = chunk * size
        at_C = jax.lax.dynamic_slice_in_dim(order_N, start, size)
        x_CH, target_C = x_NH[at_C], target_N[at_C]
        parts, slopes = _of_chunk(product(x_CH), softmax, target_C, real - start, smoothing, x_CH.dtype)
        found = jax.tree.map(lambda all_N, part_C: _put(all_N, part_C, start), found, _Found(*parts))
        if slopes is None:
            return found, None
        dx_NH, dkernel, dbias_V = gradients
        slope_CV, more_V = slopes
        dx_CH = product_back(slope_CV)
        one, other = (x_CH, slope_CV) if axis else (slope_CV, x_CH)
        dkernel = dkernel + contract(one, other, (0,), (0,), precise)
        return found, (_put(dx_NH, dx_CH, start), dkernel, dbias_V + more_V)

    empty_N = jnp.zeros(tokens + spare, precise)
    start: Any = None
    if smoothing is not None:
        parameters = jnp.zeros_like(softmax.kernel, precise), jnp.zeros_like(softmax.bias_V, precise)
        start = jnp.zeros((tokens + spare, x_NH.shape[1]), x_NH.dtype), *parameters
    turns = common_max((real + size - 1) // size)
    found, gradients = jax.lax.fori_loop(0, turns, turn, (_Found(*[empty_N] * 3), start))

    # Back to where each token was.
    place_N = jnp.cumsum(mask_N) - 1
    found = jax.tree.map(lambda part_N: jnp.where(mask_N, part_N[place_N], 0), found)
    if smoothing is None:
        return found, None
    dx_NH, dkernel, dbias_V = gradients
    dx_NH = jnp.where(mask_N[:, None], dx_NH[place_N], 0)
    trained = dataclasses.replace(softmax, size=None)
    return found, (
        dx_NH,
        jax.tree.map(lambda p, d: d.astype(p.dtype), trained, Softmax(dkernel, dbias_V, axis)),
    )


def _of_chunk(
    product_CV: jax.Array,
    softmax: Softmax,
    target_C: jax.Array,
    real: jax.Array,
    smoothing: jax.Array | None,
    dtype: Any,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array] | None]:
    """What is found of a chunk's tokens, of which the first ``real`` ones are tokens, and the slopes.

    Args:
      product_CV: `Softmax.finish` makes logits of it.
      dtype: of the slope by the logits.

    Returns:
      The parts of `_Found`, [C], anything on rows from ``real`` on. Given ``smoothing``, the slope of the
      chunk's loss by the logits [C, V], zeros on those rows, and by the bias [V], else None.
    """
    if fused.available(product_CV.dtype, dtype):
        return fused.softmax(product_CV, softmax.bias_V, target_C, real, softmax.size, smoothing, dtype)
    entry_1V, target_C1 = jnp.arange(len(softmax.bias_V))[None, :], target_C[:, None]
    entries = len(softmax.bias_V) if softmax.size is None else softmax.size.astype(product_CV.dtype)
    logits_CV = softmax.finish(product_CV)
    chosen_C1 = jnp.take_along_axis(logits_CV, target_C1, axis=-1)
    norm_C1 = jax.nn.logsumexp(logits_CV, axis=-1, keepdims=True)
    parts = (
        norm_C1 - chosen_C1,
        norm_C1 - jnp.sum(softmax.of_entries(logits_CV, 0), axis=-1, keepdims=True) / entries,
        _is_argmax(logits_CV, target_C1, chosen_C1),
    )
    found = tuple(part_C1[:, 0] for part_C1 in parts)
    if smoothing is None:
        return found, None
    even_1V = softmax.of_entries(jnp.full(entry_1V.shape, smoothing / entries), 0)
    q_CV = (1 - smoothing) * (entry_1V == target_C1) + even_1V
    real_C1 = (jnp.arange(len(target_C)) < real)[:, None]
    slope_CV = jnp.where(real_C1, jnp.exp(logits_CV - norm_C1) - q_CV, 0)
    return found, (slope_CV.astype(dtype), jnp.sum(slope_CV, axis=0))


def _put(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """The whole with the part from ``start`` on, along the first axis."""
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, 0)


def _is_argmax(logits_CV: jax.Array, target_C1: jax.Array, chosen_C1: jax.Array) -> jax.Array:
    """argmax(logits) == target, of equal logits the first; [C, 1].

    XLA's argmax on CPU does not fuse: loss, gradient and argmax of 2,048 tokens and 8,000 entries
    take 40 ms, and 24 ms when only asked whether any other entry wins.
    """
    earlier_CV = jnp.arange(logits_CV.shape[1])[None, :] < target_C1
    wins_CV = (logits_CV > chosen_C1) | ((logits_CV == chosen_C1) & earlier_CV)
    return ~jnp.any(wins_CV, axis=-1, keepdims=True)
