"""The pieces that an update's time is explained by have the FLOPs that are counted for it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import account
from benchmarks.compare import luong
from s2s import config as config_lib
from s2s.sweep import flops


@pytest.mark.parametrize("feeding", [False, True])
def test_the_pieces_are_all_there_is(feeding):
    mutable = config_lib.default()
    mutable.update_from_flattened_dict(luong(account.HIDDEN, feeding, "float32"))
    tokens = account.BATCH * account.LENGTH
    counted = flops.train_flops(
        config_lib.freeze(mutable).model,
        account.ENTRIES,
        # Attention's own, of every pair of tokens, are left out there.
        flops.Tokens(account.BATCH, tokens, tokens, looks=0),
    )
    pieces = account.update_pieces(feeding)
    assert sum(piece.count * piece.flops for piece in pieces) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("ours", [False, True])
def test_a_piece_is_timed_with_the_library_and_without(ours, monkeypatch):
    for name, value in {"BATCH": 8, "LENGTH": 3, "SOURCE": 3, "HIDDEN": 16, "_GATES": 64, "BEAMS": 2}.items():
        monkeypatch.setattr(account, name, value)
    pieces = [*account.recurrences(1), *account.fed_decoder(), account.decoder_step()]
    assert all(np.isfinite(piece.seconds(ours)) for piece in pieces)
    assert all(piece.flops > 0 and piece.bytes > 0 for piece in pieces)
