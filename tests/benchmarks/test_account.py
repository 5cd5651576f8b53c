"""The products that an update's time is explained by are those that its FLOPs are counted from."""

from __future__ import annotations

import pytest

from benchmarks import account
from benchmarks.compare import luong
from s2s import config as config_lib
from s2s.sweep import flops


def test_the_products_are_all_there_are():
    mutable = config_lib.default()
    for name, value in luong(account.HIDDEN, False, "float32").items():
        mutable.update_from_flattened_dict({name: value})
    tokens = account.BATCH * account.LENGTH
    counted = flops.train_flops(
        config_lib.freeze(mutable).model,
        account.ENTRIES,
        # Attention's own, of every pair of tokens, are left out there.
        flops.Tokens(account.BATCH, tokens, tokens, looks=0),
    )
    assert sum(product.flops for product in account.products()) == pytest.approx(counted, rel=0.01)
