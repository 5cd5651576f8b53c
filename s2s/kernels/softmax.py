"""The softmax of rows of logits beside their targets, and its gradient, in one call.

Decides in which order a row is read and sums are made. Must not know where products come from, nor which
tokens a chunk holds.

As XLA's fusions, each of which takes all rows from memory, this takes as long as a third of the products
around it. A row of logits fits into the first cache: here it comes from memory once, and its slope goes
back to where the product was.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from s2s.kernels import library


def available(product: Any, slope: Any) -> bool:
    """Whether the library takes products of this dtype, and makes slopes of this one."""
    return library.load() is not None and product == jnp.float32 and slope in (jnp.float32, jnp.bfloat16)


def softmax(
    product_CV: jax.Array,
    bias_V: jax.Array,
    target_C: jax.Array,
    real: jax.Array,
    size: jax.Array | None,
    smoothing: jax.Array | None,
    dtype: Any,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array] | None]:
    """What logits say of the targets, and the gradient of their label-smoothed cross-entropy.

    The same bits for any number of threads. A NaN stays in its row, but for the bias's gradient.

    Args:
      product_CV: logits are this and the bias, float32.
      bias_V: any float type.
      target_C: integers, 0 to the size, anything from row ``real`` on. A target that is no entry costs NaN.
      real: integer scalar, how many rows are tokens, the first ones; at others nothing is read.
      size: integer scalar, how many entries there are, the first ones; None: all V.
      smoothing: share of probability spread evenly over the entries; None: no gradient is wanted.
      dtype: of the gradient by logits, float32 or bfloat16.

    Returns:
      -log p(target), -mean(log p), and 1 where the target has the highest logit (of equal ones the first),
      else 0: float32 [C], zeros from row ``real`` on. And given ``smoothing``, the gradients of the summed
      loss by logits [C, V], zeros from row ``real`` and entry ``size`` on, and by the bias, float32 [V];
      else None.
    """
    rows, entries = product_CV.shape
    row = jax.ShapeDtypeStruct((rows,), jnp.float32)
    given = [
        product_CV,
        bias_V.astype(jnp.float32),
        target_C.astype(jnp.int32),
        jnp.asarray(entries if size is None else size, jnp.int32),
        real.astype(jnp.int32),
    ]
    if smoothing is None:
        return tuple(library.call("s2s_softmax", [row] * 3)(*given)), None
    out = [
        row,
        row,
        row,
        jax.ShapeDtypeStruct((rows, entries), dtype),
        jax.ShapeDtypeStruct((entries,), jnp.float32),
    ]
    given.append(smoothing.astype(jnp.float32))
    # A slope takes the place of the product.
    aliases = {0: 3} if dtype == jnp.float32 else None
    nll, uniform, right, slope, d_bias = library.call("s2s_softmax", out, aliases)(*given)
    return (nll, uniform, right), (slope, d_bias)
