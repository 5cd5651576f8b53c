"""The batch plan: every pair once, in a shape that holds it, for few shapes and little padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s2s.data import buckets as buckets_lib
from s2s.data.plan import choose_shapes, make_plan, walk


@st.composite
def lengths(draw, max_pairs=200):
    """Lengths of both sides, with a few long ones."""
    side = st.one_of(st.integers(1, 12), st.integers(1, 90))
    pairs = draw(st.lists(st.tuples(side, side), min_size=1, max_size=max_pairs))
    return np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])


OPTIONS = st.fixed_dictionaries(
    {
        "batch_tokens": st.integers(1, 300),
        "max_shapes": st.integers(1, 5),
        "rows_multiple": st.integers(1, 4),
        "seed": st.integers(0, 2**31),
        "shuffle": st.booleans(),
    }
)


def like_a_corpus(pairs, seed=0):
    """Lengths distributed as those of a translation corpus: skewed, and correlated."""
    rng = np.random.default_rng(seed)
    source = np.clip(np.round(rng.gamma(9.0, 1.8, pairs)), 3, 100)
    target = np.clip(np.round(source * rng.lognormal(-0.02, 0.17, pairs)), 3, 100)
    return source.astype(np.int32), target.astype(np.int32)


def same(left, right):
    return len(left) == len(right) and all(
        one.bucket == two.bucket and np.array_equal(one.ids, two.ids)
        for one, two in zip(left, right, strict=True)
    )


@given(lengths(), OPTIONS, st.integers(0, 1000))
def test_every_pair_once_where_it_fits(both, options, epoch):
    source, target = both
    plan = make_plan(source, target, **options)
    batches = plan.epoch(epoch)
    assert len(batches) == plan.batches_per_epoch
    assert sorted(np.concatenate([batch.ids for batch in batches]).tolist()) == list(range(len(source)))
    filled = {}
    for batch in batches:
        bucket = plan.buckets[batch.bucket]
        assert 1 <= len(batch.ids) <= bucket.rows
        assert source[batch.ids].max() <= bucket.source and target[batch.ids].max() <= bucket.target
        filled.setdefault(batch.bucket, []).append(len(batch.ids))
    assert all(max(sizes) - min(sizes) <= 1 for sizes in filled.values())


@given(lengths(), OPTIONS)
def test_padding_is_what_a_count_finds(both, options):
    source, target = both
    plan = make_plan(source, target, **options)
    walked = walked_empty = cells = empty = 0
    for index, ids in plan.epoch(0):
        rows, high, wide = plan.buckets[index]
        for lengths, width in ((source, high), (target, wide)):
            longest = max(lengths[id] for id in ids)
            for row in range(rows):
                length = lengths[ids[row]] if row < len(ids) else 0
                walked, walked_empty = walked + longest, walked_empty + longest - length
                cells, empty = cells + width, empty + width - length
    assert plan.padding == pytest.approx(walked_empty / walked)
    assert plan.array_padding == pytest.approx(empty / cells)
    assert plan.padding <= plan.array_padding


@given(lengths(), OPTIONS)
def test_shapes_are_within_bounds(both, options):
    source, target = both
    plan = make_plan(source, target, **options)
    multiple = options["rows_multiple"]
    assert 1 <= len(plan.buckets) <= options["max_shapes"]
    assert len(set(plan.buckets)) == len(plan.buckets)
    assert {batch.bucket for batch in plan.epoch(0)} == set(range(len(plan.buckets)))
    for rows, _, columns in plan.buckets:
        assert rows % multiple == 0
        assert rows == multiple or rows * columns <= options["batch_tokens"]


@example(  # One shape shrinks so far that it becomes the cheapest for a pair of another.
    (np.array([1, 1, 1, 2, 11, 52, 65]), np.array([1, 39, 67, 1, 30, 6, 12])),
    {"batch_tokens": 1, "max_shapes": 3, "rows_multiple": 2, "seed": 0, "shuffle": False},
    0,
)
@given(lengths(), OPTIONS, st.integers(0, 1000))
def test_pairs_are_in_their_cheapest_shape(both, options, epoch):
    source, target = both
    plan = make_plan(source, target, **options)
    for batch in plan.epoch(epoch):
        own = plan.buckets[batch.bucket]
        for id in batch.ids:
            holding = [b for b in plan.buckets if b.source >= source[id] and b.target >= target[id]]
            assert own.source + own.target == min(b.source + b.target for b in holding)


@given(lengths(), OPTIONS, st.integers(0, 1000))
def test_plan_is_pure(both, options, epoch):
    plan, again = (make_plan(*both, **options) for _ in range(2))
    assert plan.buckets == again.buckets
    first = plan.epoch(epoch)
    plan.epoch(epoch + 1)
    assert same(first, again.epoch(epoch)) and same(first, plan.epoch(epoch))


def test_epochs_and_seeds_differ():
    source, target = like_a_corpus(3000)
    plan = make_plan(source, target, batch_tokens=600, max_shapes=4, seed=1)
    other = make_plan(source, target, batch_tokens=600, max_shapes=4, seed=2)
    zero, one, seeded = plan.epoch(0), plan.epoch(1), other.epoch(0)
    # Runs of any seeds have batches of one shape at a time.
    assert [batch.bucket for batch in zero] == [batch.bucket for batch in seeded]
    assert [batch.bucket for batch in zero] != [batch.bucket for batch in one]
    for left, right in ((zero, one), (zero, seeded)):
        companies = {frozenset(batch.ids.tolist()) for batch in left}
        assert not companies & {frozenset(batch.ids.tolist()) for batch in right}
    # Shuffled over the whole epoch, not shape by shape.
    changes = sum(a.bucket != b.bucket for a, b in itertools.pairwise(zero))
    assert changes > len(zero) / 2


def test_without_shuffling_the_order_is_fixed():
    source, target = like_a_corpus(5000)
    plan = make_plan(source, target, batch_tokens=600, max_shapes=4, seed=1, shuffle=False)
    other = make_plan(source, target, batch_tokens=600, max_shapes=4, seed=2, shuffle=False)
    assert same(plan.epoch(0), plan.epoch(5)) and same(plan.epoch(0), other.epoch(0))
    buckets = [batch.bucket for batch in plan.epoch(0)]
    assert buckets == sorted(buckets)
    shuffled = make_plan(source, target, batch_tokens=600, max_shapes=4, seed=1)
    assert plan.buckets == shuffled.buckets and plan.padding < shuffled.padding


def test_padding_of_a_realistic_corpus():
    source, target = like_a_corpus(30000)
    of_arrays = []
    for max_shapes in (1, 2, 4, 8):
        plan = make_plan(source, target, batch_tokens=1200, max_shapes=max_shapes, seed=1)
        assert len(plan.buckets) == max_shapes
        of_arrays.append(plan.array_padding)
        for epoch in range(3):
            walked = sum(
                plan.buckets[index].rows * (source[ids].max() + target[ids].max())
                for index, ids in plan.epoch(epoch)
            )
            padding = 1 - (source.sum() + target.sum()) / walked
            assert padding < 0.8 * plan.array_padding
            # Multi30k's own lengths, which these imitate, pad 9.5 %.
            assert padding <= 0.105 or max_shapes < 8
    assert of_arrays == sorted(of_arrays, reverse=True)
    assert of_arrays[-1] < 0.14


def test_pairs_of_like_lengths_meet():
    # Four kinds of pairs, of which only both lengths together tell.
    source, target = np.tile([5, 5, 40, 40], 250), np.tile([5, 40, 5, 40], 250)
    plan = make_plan(source, target, batch_tokens=200, max_shapes=1, seed=1, shuffle=False)
    assert plan.buckets == ((5, 40, 40),)
    assert plan.padding == 0.0


@pytest.mark.parametrize("max_shapes", (1, 4, 8))
def test_pairs_meet_others_in_the_next_epoch(max_shapes):
    source, target = like_a_corpus(30000)
    plan = make_plan(source, target, batch_tokens=1200, max_shapes=max_shapes, seed=1)
    batch_of, next_of = np.empty(len(source), np.int64), np.empty(len(source), np.int64)
    for epoch, place in ((0, batch_of), (1, next_of)):
        for number, batch in enumerate(plan.epoch(epoch)):
            place[batch.ids] = number
    together = np.unique(batch_of, return_counts=True)[1]
    again = np.unique(batch_of * plan.batches_per_epoch + next_of, return_counts=True)[1]
    assert (again * (again - 1)).sum() / (together * (together - 1)).sum() < 0.1


def test_two_lengths_need_two_shapes_and_no_padding():
    source = np.repeat([5, 40], 1000)
    plan = make_plan(source, source, batch_tokens=200, max_shapes=8, seed=1)
    assert plan.buckets == ((40, 5, 5), (5, 40, 40))
    assert plan.padding == 0.0


def test_search_finds_the_best_two_shapes():
    rng = np.random.default_rng(3)
    source, target = rng.integers(1, 9, (2, 4000))
    plan = make_plan(source, target, batch_tokens=64, max_shapes=2, seed=1)

    def cells(corner):
        inside = (source <= corner[0]) & (target <= corner[1])
        total = 0
        for size, (high, wide) in ((inside.sum(), corner), ((~inside).sum(), (8, 8))):
            batches = -(-size // (64 // wide))
            total += batches * -(-size // max(batches, 1)) * (high + wide)
        return total

    best = min(cells(corner) for corner in itertools.product(range(1, 9), repeat=2))
    tokens = source.sum() + target.sum()
    assert plan.array_padding == pytest.approx(1 - tokens / best)


@pytest.mark.parametrize("pairs, most", ((10, 1), (200, 1), (1000, 3), (4000, 4)))
def test_small_corpora_get_few_shapes(pairs, most):
    plan = make_plan(*like_a_corpus(pairs), batch_tokens=1200, max_shapes=8, seed=1)
    assert len(plan.buckets) <= most


def test_batches_of_a_shape_are_evenly_full():
    source = np.full(50, 10)
    plan = make_plan(source, source, batch_tokens=400, max_shapes=8, seed=1)
    assert [len(batch.ids) for batch in plan.epoch(0)] == [25, 25]
    assert plan.padding == 0.0
    plan = make_plan(source, source, batch_tokens=400, max_shapes=8, rows_multiple=8, seed=1)
    assert plan.buckets == ((32, 10, 10),)


def test_pair_longer_than_the_budget():
    source, target = np.array([3, 500, 4]), np.array([3, 700, 4])
    plan = make_plan(source, target, batch_tokens=100, max_shapes=8, rows_multiple=2, seed=1)
    assert sorted(np.concatenate([batch.ids for batch in plan.epoch(0)])) == [0, 1, 2]
    assert max(plan.buckets) == (2, 500, 700)


def test_many_different_lengths_lose_little(monkeypatch):
    rng = np.random.default_rng(0)
    source = np.minimum(rng.lognormal(4.0, 1.0, 5000).astype(int) + 1, 3000)
    target = np.minimum((source * rng.lognormal(0, 0.2, 5000)).astype(int) + 1, 3000)
    assert len(np.unique(source)) > 4 * buckets_lib._GRID
    plan = make_plan(source, target, batch_tokens=4000, max_shapes=4, seed=1)
    assert plan.buckets[-1].source == source.max() and plan.buckets[-1].target == target.max()
    monkeypatch.setattr(buckets_lib, "_GRID", 4 * buckets_lib._GRID)
    fine = make_plan(source, target, batch_tokens=4000, max_shapes=4, seed=1)
    assert plan.array_padding < fine.array_padding + 0.01


@settings(max_examples=25)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=500))
def test_grid_holds_the_longest(values):
    grid = buckets_lib._grid(np.array(values))
    assert len(grid) <= buckets_lib._GRID and (np.diff(grid) > 0).all()
    assert grid[-1] == max(values) and set(grid.tolist()) <= set(values)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no pairs"):
        make_plan(np.array([]), np.array([]), batch_tokens=10, max_shapes=1, seed=1)
    with pytest.raises(ValueError, match=r"\(2,\) source lengths but \(1,\)"):
        make_plan(np.array([1, 2]), np.array([1]), batch_tokens=10, max_shapes=1, seed=1)
    for name in ("batch_tokens", "max_shapes", "rows_multiple"):
        options = {"batch_tokens": 10, "max_shapes": 1, "rows_multiple": 1, name: 0}
        with pytest.raises(ValueError, match=f"{name}=0"):
            make_plan(np.array([1]), np.array([1]), seed=1, **options)


@settings(max_examples=50)
@given(st.lists(lengths(60), min_size=1, max_size=3), OPTIONS, st.integers(0, 100))
def test_shapes_for_several_corpora_hold_all_of_them(corpora, options, epoch):
    sizes = {name: options[name] for name in ("batch_tokens", "max_shapes", "rows_multiple")}
    shapes = choose_shapes(corpora, **sizes)
    assert len(shapes) <= options["max_shapes"]
    used = set()
    for source, target in corpora:
        plan = make_plan(source, target, **options, shapes=shapes)
        assert plan.buckets == shapes
        batches = plan.epoch(epoch)
        assert sorted(np.concatenate([batch.ids for batch in batches]).tolist()) == list(range(len(source)))
        for batch in batches:
            bucket = plan.buckets[batch.bucket]
            used.add(batch.bucket)
            assert 1 <= len(batch.ids) <= bucket.rows
            assert source[batch.ids].max() <= bucket.source and target[batch.ids].max() <= bucket.target
    assert used == set(range(len(shapes)))


@settings(max_examples=50)
@given(lengths(), OPTIONS, st.integers(1, 3))
def test_a_corpus_that_is_there_again_changes_no_shape(both, options, times):
    sizes = {name: options[name] for name in ("batch_tokens", "max_shapes", "rows_multiple")}
    shapes = choose_shapes([both] * times, **sizes)
    assert shapes == make_plan(*both, **options).buckets
    assert same(make_plan(*both, **options, shapes=shapes).epoch(3), make_plan(*both, **options).epoch(3))


def test_a_pair_that_fits_no_given_shape_is_told():
    shapes = choose_shapes([like_a_corpus(100)], batch_tokens=300, max_shapes=2)
    with pytest.raises(ValueError, match="a pair of 200 and 3 ids fits none"):
        make_plan(np.array([3, 200]), np.array([3, 3]), batch_tokens=300, max_shapes=2, seed=1, shapes=shapes)


def plans_of(*pairs):
    corpora = [like_a_corpus(number, seed) for seed, number in enumerate(pairs)]
    sizes = dict(batch_tokens=300, max_shapes=4)
    shapes = choose_shapes(corpora, **sizes)
    return [make_plan(*both, **sizes, seed=n, shapes=shapes) for n, both in enumerate(corpora)]


def test_walked_together_each_run_has_its_own_epoch():
    plans = plans_of(3000, 900, 3000)
    epoch, ticks = walk(plans, [(2, 0), (2, 0), (2, 0)])
    assert epoch == 2
    for run, plan in enumerate(plans):
        own = [tick for tick in ticks if tick.numbers[run] is not None]
        assert [tick.numbers[run] for tick in own] == list(range(plan.batches_per_epoch))
        assert [tick.bucket for tick in own] == [batch.bucket for batch in plan.epoch(2)]
    # A place apart would cost an update of all.
    most = [max(batches.count(b) for batches in ([p.bucket for p in plan.epoch(2)] for plan in plans))
            for b in range(len(plans[0].buckets))]  # fmt: skip
    assert len(ticks) == sum(most)


def test_those_behind_come_first():
    source, target = like_a_corpus(2000)
    plans = [make_plan(source, target, batch_tokens=300, max_shapes=4, seed=seed) for seed in (1, 2, 3, 4)]
    epoch, ticks = walk(plans, [(1, 7), (1, 4), None, (2, 0)])
    assert epoch == 1
    assert [tick.numbers for tick in ticks[:5]] == [
        (None, 4, None, None),
        (None, 5, None, None),
        (None, 6, None, None),
        (7, 7, None, None),
        (8, 8, None, None),
    ]
    assert walk(plans, [None, None, None, (2, 3)])[0] == 2
