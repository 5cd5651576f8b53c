"""What a search asks of rows of logits, in one call.

Decides in which order a row is read and sums are made. Must not know where products come from, nor what
chunks are for.

As XLA's fusions, each of which takes all rows from memory, this takes half as long as the product before it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2s.kernels import library


def available(product: Any) -> bool:
    """Whether the library takes products of this dtype."""
    return library.load() is not None and product == jnp.float32


def survey(product_CV: jax.Array, bias_V: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits, and what a search asks of them first.

    The same bits for any number of threads. A NaN stays in its row.

    Args:
      product_CV: logits are this and the bias, float32.
      bias_V: any float type.
      chunk: entries of a chunk; the last one may have fewer.

    Returns:
      logits_CV, which take the place of the product; log sum exp of each row [C], 0 where all are -inf or one
      is NaN; the highest logit of every chunk [C, chunks], NaN where there is one.
    """
    rows, entries = product_CV.shape
    shapes = (rows, entries), (rows,), (rows, -(-entries // chunk))
    out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    call = library.call("s2s_survey", out, {0: 0})
    logits, total, highest = call(product_CV, bias_V.astype(jnp.float32), chunk=np.int64(chunk))
    return logits, total, highest
