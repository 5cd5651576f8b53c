"""The batch: masks from lengths, on both kinds of array, and the reserved ids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2s.batch import BOS, EOS, PAD, SPECIALS, UNK, Batch


def batch(xp=np) -> Batch:
    return Batch(
        source_BS=xp.asarray([[7, 8, EOS, PAD], [9, EOS, PAD, PAD], [PAD] * 4], dtype=xp.int32),
        source_length_B=xp.asarray([3, 2, 0], dtype=xp.int32),
        target_BT=xp.asarray([[5, EOS, PAD], [6, 7, EOS], [PAD] * 3], dtype=xp.int32),
        target_length_B=xp.asarray([2, 3, 0], dtype=xp.int32),
        index_B=xp.asarray([4, 11, -1], dtype=xp.int32),
    )


@pytest.mark.parametrize("xp", [np, jnp])
def test_masks_are_true_on_real_tokens_eos_among_them(xp):
    made = batch(xp)
    np.testing.assert_array_equal(made.source_mask_BS, np.asarray(made.source_BS) != PAD)
    np.testing.assert_array_equal(made.target_mask_BT, np.asarray(made.target_BT) != PAD)
    assert made.source_mask_BS.dtype == bool and made.target_mask_BT.dtype == bool


def test_masks_follow_lengths_not_ids():
    """A pad id inside a sentence, or float frames, cannot be told from padding by value."""
    made = batch()._replace(source_BS=np.zeros((3, 4, 2)), target_BT=np.zeros((3, 3), np.int32))
    assert made.source_mask_BS.tolist() == [[True] * 3 + [False], [True, True, False, False], [False] * 4]
    assert made.target_mask_BT.sum() == 5


def test_filler_rows_count_for_nothing():
    assert not batch().source_mask_BS[2].any() and not batch().target_mask_BT[2].any()


def test_masks_work_under_jit():
    made = batch(jnp)
    got = jax.jit(lambda made: (made.source_mask_BS, made.target_mask_BT))(made)
    np.testing.assert_array_equal(got[0], batch().source_mask_BS)
    np.testing.assert_array_equal(got[1], batch().target_mask_BT)


def test_host_masks_are_numpy():
    assert isinstance(batch().source_mask_BS, np.ndarray)


def test_reserved_ids():
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    assert len(SPECIALS) == len(set(SPECIALS)) == 4
