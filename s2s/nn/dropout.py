"""Dropout by explicit keys: what is dropped at which rate, and the masks' randomness.

Decides how a mask is drawn. Must not know any layer: whoever drops folds its own
number into the key, so that no two places share a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Rate = float | jax.Array


class Dropout(NamedTuple):
    """Rates of one forward pass and the key its masks come from.

    Attributes:
      key: randomness; None drops nothing.
      embedding: rate on source and target embeddings.
      layer: rate between layers, and not after the last.
      attentional: rate on the attentional vector on its way to the softmax.
    """

    key: jax.Array | None
    embedding: Rate
    layer: Rate
    attentional: Rate

    def at(self, place: int | jax.Array) -> Dropout:
        """The same rates with a key of this place's own (a site, a layer, a time step)."""
        return self if self.key is None else self._replace(key=jax.random.fold_in(self.key, place))


OFF = Dropout(None, 0.0, 0.0, 0.0)


def drop(x: jax.Array, rate: Rate, key: jax.Array | None) -> jax.Array:
    """Zeroes each entry with probability ``rate`` and divides the others by ``1 - rate``.

    Srivastava et al. 2014, scaled in training so that evaluation needs nothing.

    Args:
      x: any array.
      rate: in [0, 1); a number, or a traced scalar.
      key: None, or a rate that is the number 0, gives ``x`` back.
    """
    if key is None or (isinstance(rate, (int, float)) and rate == 0):
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros_like(x))
