"""The softmax over the vocabulary: the product that makes logits, and its parameters.

Decides layout and precision of that product. Must not know what is read from logits
(a loss, a search), nor whether the kernel is an embedding table too.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from s2s.kernels.contract import contract


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax:
    """W_s and b_s of p(y) = softmax(W_s x + b_s) (Luong et al. 2015, eq. 6; the bias is ours). A pytree.

    Attributes:
      kernel: [H, V], or the other way around.
      bias_V: of the entries.
      vocab_axis: which axis of the kernel is V. A table of embeddings has 0: it is read as it is
        stored, and so is its gradient.
      size: how many entries there are, where V is padded; an integer scalar, which may be traced. None:
        all V. Those from there on have probability 0, and no gradient.
    """

    kernel: jax.Array
    bias_V: jax.Array
    vocab_axis: int = dataclasses.field(default=1, metadata={"static": True})
    size: jax.Array | None = None

    def logits(self, x: jax.Array) -> jax.Array:
        """Unnormalised log-probabilities: [..., H] -> [..., V], in float32 at least."""
        return self.finish(self.product(x))

    def product(self, x: jax.Array) -> jax.Array:
        """`logits` without their bias."""
        precise = jnp.promote_types(x.dtype, jnp.float32)
        return contract(x, self.kernel.astype(x.dtype), (x.ndim - 1,), (1 - self.vocab_axis,), precise)

    def finish(self, product: jax.Array) -> jax.Array:
        """`logits`, from the product alone."""
        logits = product + jnp.broadcast_to(self.bias_V.astype(product.dtype), product.shape)
        # The lowest number, not -inf: what is multiplied by 0 makes no NaN.
        return self.of_entries(logits, float(jnp.finfo(product.dtype).min))

    def of_entries(self, x: jax.Array, otherwise: float) -> jax.Array:
        """[..., V], with another value where V is only padding."""
        if self.size is None:
            return x
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) < self.size, x, otherwise)
