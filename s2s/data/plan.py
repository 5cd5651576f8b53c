"""The batch plan: which pairs share a batch, and the shape they are padded to.

Decides the order of an epoch, from lengths alone. Must not know texts, files, devices or
hosts: every host that knows the lengths makes the same plan. The shapes of an epoch come in an
order that no seed changes, so that runs trained side by side have batches of one shape at a time.

Two measures of padding, for a batch costs two things. Its arrays are as large as its
shape, a rectangle of rows x (S + T) cells that was compiled for. Its recurrences stop at
the longest pair, so they walk only rows x (longest source + longest target in the batch).
The shapes are chosen for the first, the companions of a pair for the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from s2s.data.buckets import Bucket, by_cells, cheapest, checked, choose_shapes

# Batches of a pool, within which pairs of like lengths are put together. Larger pools pad less, but batches
# of one kind of pair teach less: with 2, 4 and 8 the model of experiments/luong_general.py ends at 99.7,
# 98.8 and 96.1 % exact match.
_POOL_BATCHES = 2


class PlannedBatch(NamedTuple):
    """One batch of an epoch.

    Attributes:
      bucket: index in `Plan.buckets`.
      ids: positions of the pairs among the encoded pairs; at most the bucket's rows.
    """

    bucket: int
    ids: np.ndarray


class Place(NamedTuple):
    """Where a batch stands in an epoch.

    Attributes:
      order: of no unit; batches come by it.
      bucket: index in `Plan.buckets`.
      turn: number of the batch among those of its shape.
    """

    order: float
    bucket: int
    turn: int


class Plan:
    """The batches of every epoch: made by `make_plan`.

    Args:
      buckets: the batch shapes.
      members: positions of each shape's pairs; may be none.
      source, target: lengths of all pairs.
      seed, shuffle: as in `make_plan`.

    Attributes:
      buckets: the batch shapes, smallest first.
      batches_per_epoch: batches in an epoch, the same in every epoch.
      padding: share of the cells walked in epoch 0 (rows, filler rows included, times the
        batch's longest source and longest target) that hold no token; a shuffled epoch differs
        from another by some thousandths.
      array_padding: share of the cells of an epoch's arrays that hold no token.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        members: Sequence[np.ndarray],
        source: np.ndarray,
        target: np.ndarray,
        *,
        seed: int,
        shuffle: bool,
    ):
        self.buckets = tuple(buckets)
        self._members = tuple(members)
        self._numbers = [-(-len(ids) // bucket.rows) for bucket, ids in zip(buckets, members, strict=True)]
        self._source, self._target = source, target
        self._seed = seed
        self._shuffle = shuffle
        first = self.epoch(0)
        tokens = int(source.sum() + target.sum())
        walked = sum(self.buckets[index].rows * self._longest(ids) for index, ids in first)
        cells = sum(rows * (S + T) for rows, S, T in (self.buckets[index] for index, _ in first))
        self.batches_per_epoch = len(first)
        self.padding = 1.0 - tokens / walked
        self.array_padding = 1.0 - tokens / cells

    def epoch(self, epoch: int) -> list[PlannedBatch]:
        """The batches of an epoch: a pure function of lengths, seed and epoch.

        Every pair is in exactly one batch, and a shape's batches have equally many pairs, give
        or take one in each. With shuffling, a shape's pairs are dealt into pools at random,
        pairs of like lengths are put together within a pool, and the batches of all shapes are
        mixed: so which pairs meet and the order of the batches change from epoch to epoch.
        A pair whose lengths are rare has few pairs to meet. The seed chooses the pairs of a batch,
        not its shape: see `places`. Without shuffling all epochs are the same, ordered by shape, and
        all pairs of a shape are one pool.

        Args:
          epoch: number of the epoch, from 0.
        """
        rng = _dice(self._seed, epoch)
        dealt = [
            list(self._deal(rng.permutation(ids) if self._shuffle else ids, number))
            for number, ids in zip(self._numbers, self._members, strict=True)
        ]
        return [PlannedBatch(index, dealt[index][turn]) for _, index, turn in self.places(epoch)]

    def places(self, epoch: int) -> list[Place]:
        """Where an epoch's batches stand, in order; no pair is looked at.

        The n-th batch of a shape stands at the same place in every plan of the same shapes, whatever
        its pairs and the seed. So plans with as many batches have one order of shapes, and others
        can be walked together, a place at a time.
        """
        places: list[Place] = []
        for index, number in enumerate(self._numbers):
            order = np.full(number, float(index))
            if self._shuffle:
                order = _dice(epoch, index, 1).random(number)
            places += [Place(place, index, turn) for turn, place in enumerate(order.tolist())]
        return sorted(places)

    def _deal(self, ids: np.ndarray, number: int) -> Iterator[np.ndarray]:
        """Spreads a shape's pairs over so many batches."""
        pools = max(number // _POOL_BATCHES, 1) if self._shuffle else 1
        start = 0
        for pool in range(pools if number else 0):
            end = number * (pool + 1) // pools
            yield from self._alike(ids[len(ids) * start // number : len(ids) * end // number], end - start)
            start = end

    def _alike(self, ids: np.ndarray, number: int) -> list[np.ndarray]:
        """Cuts pairs into so many batches of like lengths.

        Halves them by source or by target length, whichever leaves fewer cells to walk, and
        goes on with the halves (as a k-d tree does: Bentley 1975). Pairs of equal lengths stay
        in the order given.
        """
        if number == 1:
            return [ids]
        low = number // 2
        ways = []
        for lengths in (self._source, self._target):
            order = ids[np.argsort(lengths[ids], kind="stable")]
            halves = np.split(order, [len(ids) * low // number])
            ways.append((low * self._longest(halves[0]) + (number - low) * self._longest(halves[1]), halves))
        _, (short, long) = min(ways, key=lambda way: way[0])
        return self._alike(short, low) + self._alike(long, number - low)

    def _longest(self, ids: np.ndarray) -> int:
        """Cells a row walks in a batch of these pairs."""
        return int(self._source[ids].max()) + int(self._target[ids].max())


def _dice(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))


def make_plan(
    source_lengths: np.ndarray,
    target_lengths: np.ndarray,
    *,
    batch_tokens: int,
    max_shapes: int,
    rows_multiple: int = 1,
    seed: int,
    shuffle: bool = True,
    shapes: Sequence[Bucket] | None = None,
) -> Plan:
    """Plans the batches of pairs of the given lengths.

    A pair goes to the shape with the fewest cells S + T that holds it; a shape's pairs are spread
    evenly over as few batches as its rows allow, so its last batch is hardly emptier than the others.

    Args:
      source_lengths: source positions of each pair, EOS included.
      target_lengths: target positions of each pair, EOS included.
      batch_tokens, max_shapes, rows_multiple: as in `choose_shapes`.
      seed: of the shuffling.
      shuffle: shuffle every epoch; False: one fixed order, for evaluation.
      shapes: of `choose_shapes` for this corpus and others; None: chosen for this one.

    Raises:
      ValueError: a pair fits none of the given shapes, or as `choose_shapes`.
    """
    source, target = checked(source_lengths, target_lengths)
    if shapes is None:
        shapes = choose_shapes(
            [(source, target)],
            batch_tokens=batch_tokens,
            max_shapes=max_shapes,
            rows_multiple=rows_multiple,
        )
    buckets = sorted(shapes, key=lambda bucket: by_cells(bucket[1:]))
    bucket_of_pair = cheapest([bucket[1:] for bucket in buckets], source, target)
    if (bucket_of_pair < 0).any():
        pair = int(np.flatnonzero(bucket_of_pair < 0)[0])
        raise ValueError(
            f"a pair of {source[pair]} and {target[pair]} ids fits none of the shapes {list(buckets)}"
        )
    members = [np.flatnonzero(bucket_of_pair == index) for index in range(len(buckets))]
    return Plan(buckets, members, source, target, seed=seed, shuffle=shuffle)


class Tick(NamedTuple):
    """One update of runs that go through an epoch side by side.

    Attributes:
      bucket: index in `Plan.buckets`, which are the same in all their plans.
      numbers: for each run the number of its batch in the epoch; None: it has none here.
    """

    bucket: int
    numbers: tuple[int | None, ...]


def walk(plans: Sequence[Plan], positions: Sequence[tuple[int, int] | None]) -> tuple[int, list[Tick]]:
    """The rest of the earliest epoch that some run is in, for all runs in it.

    Batches at one place of the epoch are one tick: runs that stand at the same batch go on together,
    those behind come first, and a run with fewer batches of a shape than another lets some ticks pass.

    Args:
      plans: one a run, of the same shapes.
      positions: (epoch, next batch in it) of each run; None: it takes no part.

    Returns:
      The epoch, and its ticks in order; runs in later epochs have no batch in them.
    """
    epoch = min(position[0] for position in positions if position is not None)
    ticks: dict[Place, list[int | None]] = {}
    for run, (plan, position) in enumerate(zip(plans, positions, strict=True)):
        if position is not None and position[0] == epoch:
            for number, place in enumerate(plan.places(epoch)[position[1] :], position[1]):
                ticks.setdefault(place, [None] * len(plans))[run] = number
    return epoch, [Tick(place.bucket, tuple(numbers)) for place, numbers in sorted(ticks.items())]
