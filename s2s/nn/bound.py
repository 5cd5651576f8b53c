"""How many turns a loop makes whose length depends on the data.

Decides how replicas (``jax.vmap``) share one trip count. Must not know what a loop does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


@custom_vmap
def common_max(turns: jax.Array) -> jax.Array:
    """The number itself; under ``jax.vmap`` the greatest of all replicas, one number for all.

    A loop whose condition differs from replica to replica becomes a loop over all of them that
    selects between the old and the new carry, array by array, turn by turn. With a common bound the
    condition stays a single one and nothing is selected; in exchange a replica makes turns that it
    does not need, so these must change nothing.

    Args:
      turns: an integer scalar.

    Returns:
      An integer scalar, not mapped over.
    """
    return turns


@common_max.def_vmap
def _(axis_size: int, mapped: list[bool], turns_R: jax.Array) -> tuple[jax.Array, bool]:
    # Again through `common_max`, for a vmap around this one.
    return common_max(jnp.max(turns_R)), False
