"""The input pipeline: padded batches against a loop, host slices, resumption."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s.batch import EOS, PAD, Batch
from s2s.data.encode import Encoded
from s2s.data.pipeline import batches, pad_batch, stacked
from s2s.data.plan import Bucket, choose_shapes, make_plan, walk


def encoded_of(source_lengths, target_lengths, seed=0):
    """Random ids of the given lengths; the corpus skips every third record."""
    rng = np.random.default_rng(seed)

    def side(lengths):
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ids = rng.integers(4, 1000, starts[-1]).astype(np.int32)
        ids[starts[1:] - 1] = EOS
        return ids, starts

    record = np.arange(len(source_lengths), dtype=np.int64) * 3 // 2
    return Encoded(*side(source_lengths), *side(target_lengths), record, record + 1, [])


def setup(pairs=60, seed=0, **options):
    rng = np.random.default_rng(seed)
    encoded = encoded_of(rng.integers(1, 20, pairs), rng.integers(1, 20, pairs))
    options = {"batch_tokens": 80, "max_shapes": 3, "rows_multiple": 4, "seed": 5, **options}
    return encoded, make_plan(encoded.source_lengths, encoded.target_lengths, **options)


def padded_by_loop(encoded, ids, bucket):
    source, target = [], []
    for side, rows, width in (
        ("source", source, bucket.source),
        ("target", target, bucket.target),
    ):
        values, starts = getattr(encoded, f"{side}_ids"), getattr(encoded, f"{side}_starts")
        for row in range(bucket.rows):
            own = values[starts[ids[row]] : starts[ids[row] + 1]].tolist() if row < len(ids) else []
            rows.append((own + [PAD] * (width - len(own)), len(own)))
    filler = [-1] * (bucket.rows - len(ids))
    return Batch(
        np.array([row for row, _ in source]),
        np.array([length for _, length in source]),
        np.array([row for row, _ in target]),
        np.array([length for _, length in target]),
        np.array([int(encoded.record[id]) for id in ids] + filler),
    )


def assert_same(left, right):
    for one, two in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, two, strict=False)


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(0, 100), st.integers(1, 4), st.integers(0, 3))
def test_batches_are_the_planned_ones(pairs, seed, multiple, epoch):
    encoded, plan = setup(pairs, seed, rows_multiple=multiple)
    made = list(batches(encoded, plan, epoch=epoch))
    assert len(made) == plan.batches_per_epoch
    for batch, (index, ids) in zip(made, plan.epoch(epoch), strict=True):
        bucket = plan.buckets[index]
        assert_same(batch, padded_by_loop(encoded, ids, bucket))
        assert all(array.dtype == np.int32 for array in batch)
        assert batch.source_BS.shape == (bucket.rows, bucket.source)
        assert batch.target_BT.shape == (bucket.rows, bucket.target)
        filler = np.arange(bucket.rows) >= len(ids)
        assert (batch.index_B[filler] == -1).all() and (batch.index_B[~filler] >= 0).all()
        assert not batch.source_length_B[filler].any() and not batch.target_length_B[filler].any()
        assert not batch.source_mask_BS[filler].any() and not batch.target_BT[filler].any()
    seen = np.concatenate([batch.index_B for batch in made])
    assert sorted(seen[seen >= 0]) == sorted(encoded.record)


@pytest.mark.parametrize("processes", (1, 2, 4))
def test_host_slices_make_the_whole(processes):
    encoded, plan = setup(pairs=61, rows_multiple=8)
    whole = list(batches(encoded, plan, epoch=2))
    assert any((batch.index_B == -1).any() for batch in whole)
    shares = [
        list(batches(encoded, plan, epoch=2, process_index=index, process_count=processes))
        for index in range(processes)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert len({part.source_BS.shape for part in parts}) == 1
        assert_same(batch, (np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


@pytest.mark.parametrize("start", (0, 1, 7))
@pytest.mark.parametrize("prefetch", (1, 16))
def test_resuming_gives_the_rest(start, prefetch):
    encoded, plan = setup()
    whole = list(batches(encoded, plan, epoch=1))
    rest = list(batches(encoded, plan, epoch=1, start=start, prefetch=prefetch))
    assert len(rest) == len(whole) - start
    for one, two in zip(whole[start:], rest, strict=True):
        assert_same(one, two)


def test_resuming_at_the_end_gives_nothing():
    encoded, plan = setup()
    assert list(batches(encoded, plan, epoch=1, start=plan.batches_per_epoch)) == []


def test_uneven_shares_are_refused():
    encoded, plan = setup(rows_multiple=4)
    with pytest.raises(ValueError, match="rows cannot be shared by 3 processes"):
        batches(encoded, plan, epoch=0, process_count=3)
    for index in (-1, 2):
        with pytest.raises(ValueError, match=f"process_index={index}"):
            batches(encoded, plan, epoch=0, process_index=index, process_count=2)


def test_what_does_not_fit_is_refused():
    encoded, _ = setup()
    longest = np.array([int(encoded.source_lengths.argmax())])
    with pytest.raises(ValueError, match="does not fit 5 positions"):
        pad_batch(encoded, longest, Bucket(2, 5, 50))
    with pytest.raises(ValueError, match="3 pairs do not fit"):
        pad_batch(encoded, np.arange(3), Bucket(2, 50, 50))


def test_an_abandoned_epoch_leaves_no_thread():
    encoded, plan = setup()
    before = threading.active_count()
    iterator = batches(encoded, plan, epoch=0)
    next(iterator)
    del iterator
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before


@pytest.mark.parametrize("processes", (1, 2))
def test_side_by_side_each_run_has_its_own_batches(processes):
    rng = np.random.default_rng(3)
    encoded = [encoded_of(rng.integers(1, 20, pairs), rng.integers(1, 20, pairs)) for pairs in (90, 40)]
    sizes = dict(batch_tokens=80, max_shapes=3, rows_multiple=4)
    shapes = choose_shapes([(one.source_lengths, one.target_lengths) for one in encoded], **sizes)
    plans = [
        make_plan(one.source_lengths, one.target_lengths, **sizes, seed=seed, shapes=shapes)
        for seed, one in enumerate(encoded)
    ]
    epoch, ticks = walk(plans, [(1, 0), (1, 2)])
    for process in range(processes):
        share = dict(epoch=epoch, process_index=process, process_count=processes)
        own = [list(batches(*both, **share)) for both in zip(encoded, plans, strict=True)]
        made = list(stacked(encoded, plans, ticks, **share))
        assert len(made) == len(ticks) > max(plan.batches_per_epoch for plan in plans) - 1
        idle = 0
        for tick, batch in zip(ticks, made, strict=True):
            for run, number in enumerate(tick.numbers):
                mine = Batch(*(array[run] for array in batch))
                if number is None:
                    idle += 1
                    assert not mine.source_length_B.any() and not mine.target_BT.any()
                    assert (mine.index_B == -1).all()
                else:
                    assert_same(mine, own[run][number])
        assert idle
