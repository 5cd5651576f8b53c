"""The softmax over the vocabulary: the product that makes logits, and its parameters.

Decides layout and precision of that product. Must not know what is read from logits
(a loss, a search), nor whether the kernel is an embedding table too.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax:
    """W_s and b_s of p(y) = softmax(W_s x + b_s) (Luong et al. 2015, eq. 6; the bias is ours). A pytree.

    Attributes:
      kernel: [H, V], or the other way around.
      bias_V: of the entries.
      vocab_axis: which axis of the kernel is V. A table of embeddings has 0: it is read as it is
        stored, and so is its gradient.
    """

    kernel: jax.Array
    bias_V: jax.Array
    vocab_axis: int = dataclasses.field(default=1, metadata={"static": True})

    def logits(self, x: jax.Array) -> jax.Array:
        """Unnormalised log-probabilities: [..., H] -> [..., V], in float32 at least."""
        precise = jnp.promote_types(x.dtype, jnp.float32)
        contracted = ((x.ndim - 1,), (1 - self.vocab_axis,)), ((), ())
        kernel = self.kernel.astype(x.dtype)
        logits = jax.lax.dot_general(x, kernel, contracted, preferred_element_type=precise)
        return logits + jnp.broadcast_to(self.bias_V.astype(precise), logits.shape)
