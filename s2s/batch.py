"""The batch: what flows from the data pipeline into the model, and its reserved ids.

Decides the layout of a batch and which ids mean what. Must not know how a batch
was made (files, vocabularies) nor what is done with it (models, losses).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")


class Batch(NamedTuple):
    """Sentence pairs padded to one shape: NumPy arrays on the host, JAX arrays on a device.

    Rows with both lengths 0 fill a batch up to its shape and count for nothing.

    Attributes:
      source_BS: source ids, EOS last, then PAD; int32. Float frames have one more
        axis, [B, S, F], and no EOS.
      source_length_B: real source positions, EOS included; int32.
      target_BT: target ids to predict, EOS last, then PAD; int32.
      target_length_B: real target positions, EOS included; int32.
      index_B: position of the pair in its corpus, -1 on filler rows; int32.
    """

    source_BS: Any
    source_length_B: Any
    target_BT: Any
    target_length_B: Any
    index_B: Any

    @property
    def source_mask_BS(self) -> Any:
        """True on real source positions."""
        return np.arange(self.source_BS.shape[1])[None, :] < self.source_length_B[:, None]

    @property
    def target_mask_BT(self) -> Any:
        """True on real target positions, EOS among them."""
        return np.arange(self.target_BT.shape[1])[None, :] < self.target_length_B[:, None]
