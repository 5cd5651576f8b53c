"""Dropout by explicit keys: what is dropped at which rate, and the masks' randomness.

Decides how a mask is drawn. Must not know any layer: whoever drops folds its own
number into the key, so that no two places share a mask.

A mask belongs to a pair, not to a row of a batch: it depends on the key, the place, the
pair's number and the position within the pair, and on nothing else. So a batch may be
sorted, padded further, cut into pieces or spread over devices, and nothing changes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from s2s.nn.bound import common_max

Rate = float | jax.Array


class Dropout(NamedTuple):
    """Rates of one forward pass and what its masks come from.

    Attributes:
      key: randomness; None drops nothing.
      rows_B: the number of the pair in each row of the batch; integers. Rows of one number share masks.
      embedding: rate on source and target embeddings.
      layer: rate between layers, and not after the last.
      attentional: rate on the attentional vector on its way to the softmax.
    """

    key: jax.Array | None
    rows_B: jax.Array | None
    embedding: Rate
    layer: Rate
    attentional: Rate

    def at(self, place: int | jax.Array) -> Dropout:
        """The same rates with a key of this place's own (a site, a layer, a time step)."""
        return self if self.key is None else self._replace(key=jax.random.fold_in(self.key, place))


OFF = Dropout(None, None, 0.0, 0.0, 0.0)

# Half a random word an entry: rates are multiples of 2**-16, and drawing takes half the time.
_LEVELS = 1 << 16


def drop(x: jax.Array, rate: Rate, dropout: Dropout, rows_axis: int = 0) -> jax.Array:
    """Zeroes each entry with probability ``rate`` and divides the others by ``1 - rate``.

    Srivastava et al. 2014, scaled in training so that evaluation needs nothing. The rate is
    rounded to a multiple of 2**-16, in both places.

    Args:
      x: any array with an axis of the batch's rows; of the others, the first may be longer
        (padded) without a change to what is before.
      rate: in [0, 1); a number, or a traced scalar.
      dropout: key and rows of the masks; its rates are not read. ``OFF``, or a rate that is the
        number 0, gives ``x`` back.
      rows_axis: the axis of the rows.
    """
    key, rows_B = dropout.key, dropout.rows_B
    if key is None or rows_B is None or (isinstance(rate, (int, float)) and rate == 0):
        return x
    shape = x.shape[:rows_axis] + x.shape[rows_axis + 1 :]
    size = math.prod(shape)

    def draw(row: jax.Array) -> jax.Array:
        words = jax.random.bits(jax.random.fold_in(key, row), (-(-size // 2),), jnp.uint32)
        halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
        return halves.reshape(-1)[:size].reshape(shape)

    level = jax.vmap(draw, out_axes=rows_axis)(rows_B).astype(jnp.int32)
    kept = jnp.maximum(jnp.round((1 - jnp.asarray(rate, jnp.float32)) * _LEVELS), 1.0)
    x = jnp.where(level < kept.astype(jnp.int32), x * (_LEVELS / kept).astype(x.dtype), jnp.zeros_like(x))
    return _once(x, rows_B)


def _once(x: jax.Array, rows_B: jax.Array) -> jax.Array:
    """The array itself, which XLA cannot compute again wherever it is read.

    Else it draws the masks anew inside every transposed copy that a weight gradient reads: 17 ms
    instead of 2 for 2,048 positions of 512 units. What a loop gives is computed once; this one
    makes no turn, but that is only known at run time.
    """
    never = common_max(jnp.minimum(jnp.max(rows_B), -1))
    return _no_turn(never, x)


@jax.custom_vjp
def _no_turn(turns: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, turns, lambda _, x: -x, x)


_no_turn.defvjp(lambda turns, x: (_no_turn(turns, x), None), lambda _, gradient: (None, gradient))
