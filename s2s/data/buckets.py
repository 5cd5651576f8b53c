"""Batch shapes: the few rectangles that batches are padded to.

Decides them from lengths alone; each costs a compilation, and padding costs arithmetic. Must not
know texts, files, devices, nor which pairs will share a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

# Lengths a shape may have, a side; finer than this, a search costs more than it saves.
_GRID = 64
# Rounds of moves from one start; the search nearly always rests earlier.
_ROUNDS = 20
# Random starts for each number of shapes.
_STARTS = 6
# What an epoch costs, in cells walked. A cell of the arrays: embeddings, input projections and
# attention are computed for the whole rectangle, and are about half as dear as the recurrences.
_ARRAY_CELL = 0.5
# An update beside its cells, as a share of a full batch's: the optimizer reads every parameter.
_UPDATE = 0.1
# A shape, in full batches: a compilation takes as long as some twenty updates on a CPU, over ten epochs.
_COMPILATION = 2.0

Corner = tuple[int, int]


class Bucket(NamedTuple):
    """One batch shape.

    Attributes:
      rows: pairs in a batch, B, filler rows included.
      source: source positions, S.
      target: target positions, T.
    """

    rows: int
    source: int
    target: int


def choose_shapes(
    corpora: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    batch_tokens: int,
    max_shapes: int,
    rows_multiple: int = 1,
) -> tuple[Bucket, ...]:
    """Chooses the batch shapes for the lengths of a corpus, or of several that share them.

    A shape is a rectangle of S source and T target positions with at most batch_tokens / T
    rows, rounded down to a multiple of ``rows_multiple`` but at least that; no more rows than
    the corpus with most pairs in it needs when they are spread evenly over as few batches as possible.

    The search adds rectangles one at a time. For each number of them it moves one after
    another to where an epoch's arrays have the fewest cells (source and target, padding and
    filler rows included) until no move helps, from a few starts, and keeps the best; all places
    of one rectangle are compared at once through sums over the histogram of lengths. Of several
    corpora the histogram is the sum; one that is there again, as for runs that differ in their
    seed, counts once, so that such runs have the shapes of a run alone.

    A shape must pay for its compilation, so a small corpus gets few: the number of shapes
    minimises what an epoch costs. That counts the cells of the arrays, the updates (many, where
    a rectangle is so long that few rows fit the budget) and the shapes, at the prices above; the
    cells walked are left out, as they hardly depend on the shapes.

    Args:
      corpora: (source positions, target positions) of each pair, EOS included, for each corpus.
      batch_tokens: target positions in a batch, padding included. A longer pair gets a
        batch of ``rows_multiple`` rows all the same.
      max_shapes: most shapes.
      rows_multiple: rows of every batch are a multiple of this (devices, micro-batches).

    Returns:
      The shapes, smallest first.

    Raises:
      ValueError: there are no pairs, lengths differ in number, or an option is below 1.
    """
    different: dict[tuple[bytes, bytes], tuple[np.ndarray, np.ndarray]] = {}
    for lengths in corpora:
        sides = checked(*lengths)
        different.setdefault((sides[0].tobytes(), sides[1].tobytes()), sides)
    source, target = (np.concatenate(side) for side in zip(*different.values(), strict=True))
    options = {"batch_tokens": batch_tokens, "max_shapes": max_shapes, "rows_multiple": rows_multiple}
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")

    source_grid, target_grid = _grid(source), _grid(target)
    row, column = np.searchsorted(source_grid, source), np.searchsorted(target_grid, target)
    flat = row * len(target_grid) + column
    pairs = np.bincount(flat, minlength=len(source_grid) * len(target_grid))
    pairs_ST = pairs.reshape(len(source_grid), len(target_grid))
    search = _Search(source_grid, target_grid, pairs_ST, batch_tokens, rows_multiple)
    corners = [(int(source_grid[row]), int(target_grid[column])) for row, column in search.run(max_shapes)]
    shapes = _tight(corners, source, target)
    pairs_of = [np.bincount(cheapest(shapes, *sides), minlength=len(shapes)) for sides in different.values()]
    buckets = []
    for index, (high, wide) in enumerate(shapes):
        most = _most_rows(wide, batch_tokens, rows_multiple)
        rows = max(int(_even_rows(int(pairs[index]), most, rows_multiple)) for pairs in pairs_of)
        buckets.append(Bucket(rows, high, wide))
    return tuple(buckets)


def checked(source_lengths: np.ndarray, target_lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of both sides as int64 arrays; ValueError where they do not fit together or are none."""
    source = np.asarray(source_lengths, np.int64)
    target = np.asarray(target_lengths, np.int64)
    if source.shape != target.shape or source.ndim != 1:
        raise ValueError(
            f"{source.shape} source lengths but {target.shape} target lengths: give one each a pair"
        )
    if len(source) == 0:
        raise ValueError("no pairs to make batches from: the corpus is empty or every pair was left out")
    return source, target


class _Search:
    """Looks for the rectangles; a rectangle is a corner (row, column) of the histogram.

    Args:
      source_S: lengths of the histogram's rows, ascending.
      target_T: lengths of its columns.
      pairs_ST: pairs with more than the length before and at most this one, each side.
      batch_tokens, rows_multiple: as in `make_plan`.
    """

    def __init__(
        self,
        source_S: np.ndarray,
        target_T: np.ndarray,
        pairs_ST: np.ndarray,
        batch_tokens: int,
        rows_multiple: int,
    ):
        self._pairs_ST = pairs_ST
        self._pair_cells_ST = source_S[:, None] + target_T[None, :]
        self._most_rows_T = _most_rows(target_T, batch_tokens, rows_multiple)
        self._full_batch = 2 * batch_tokens
        self._rows_multiple = rows_multiple
        self._last: Corner = (len(source_S) - 1, len(target_T) - 1)

    def run(self, max_shapes: int) -> list[Corner]:
        """The corners that `make_plan` describes."""
        corners = best = [self._last]
        price = self._price(corners)
        for number in range(2, max_shapes + 1):
            starts = [[*corners, self._best_corner(corners)], *self._drawn(number)]
            corners = min((self._descend(start) for start in starts), key=lambda end: self._cost(end)[0])
            now = self._price(corners)
            if now < price:
                best, price = corners, now
        return best

    def _price(self, corners: list[Corner]) -> float:
        """What an epoch costs that depends on the shapes, in cells walked."""
        cells, batches = self._cost(corners)
        full_batches = _UPDATE * batches + _COMPILATION * len(corners)
        return _ARRAY_CELL * cells + full_batches * self._full_batch

    def assign(self, corners: list[Corner]) -> np.ndarray:
        """Index of the rectangle of fewest cells that holds each cell of the histogram, [S, T]."""
        assigned_ST = np.zeros(self._pairs_ST.shape, np.int64)
        # Dearest first: cheaper ones overwrite.
        for index in sorted(range(len(corners)), key=lambda index: -self._pair_cells_ST[corners[index]]):
            row, column = corners[index]
            assigned_ST[: row + 1, : column + 1] = index
        return assigned_ST

    def _drawn(self, number: int) -> Iterator[list[Corner]]:
        """Starts at corners drawn from the pairs, always the same ones."""
        rng = np.random.Generator(np.random.Philox(number))
        share = self._pairs_ST.ravel() / self._pairs_ST.sum()
        for _ in range(_STARTS):
            drawn = np.unravel_index(rng.choice(share.size, number - 1, p=share), self._pairs_ST.shape)
            yield [self._last, *((int(row), int(column)) for row, column in zip(*drawn, strict=True))]

    def _cost(self, corners: list[Corner]) -> tuple[int, int]:
        """Cells of an epoch's arrays, and its batches."""
        assigned_ST = self.assign(corners)
        pairs = np.bincount(assigned_ST.ravel(), self._pairs_ST.ravel(), len(corners)).astype(np.int64)
        cells = np.array([self._pair_cells_ST[corner] for corner in corners])
        most = np.array([self._most_rows_T[column] for _, column in corners])
        return int((self._rows(pairs, most) * cells).sum()), int((-(-pairs // most)).sum())

    def _descend(self, corners: list[Corner]) -> list[Corner]:
        """Moves one rectangle after another to its best place until none gains."""
        cost = self._cost(corners)[0]
        for _ in range(_ROUNDS):
            before = cost
            for index in range(len(corners)):
                others = corners[:index] + corners[index + 1 :]
                if self._last not in others:
                    continue  # something must hold the longest pair
                moved = [*corners[:index], self._best_corner(others), *corners[index + 1 :]]
                moved_cost = self._cost(moved)[0]
                if moved_cost < cost:
                    corners, cost = moved, moved_cost
            if cost == before:
                break
        return corners

    def _best_corner(self, others: list[Corner]) -> Corner:
        """Where one more rectangle leaves the fewest cells."""
        assigned_ST = self.assign(others)
        taken_ST = np.zeros_like(self._pairs_ST)
        cost_ST = np.zeros_like(self._pairs_ST)
        for index, (row, column) in enumerate(others):
            inside_ST = np.where(assigned_ST == index, self._pairs_ST, 0).cumsum(0).cumsum(1)
            # A new rectangle takes what it holds from all that cost more.
            moves_ST = np.where(self._pair_cells_ST < self._pair_cells_ST[row, column], inside_ST, 0)
            kept_ST = inside_ST[-1, -1] - moves_ST
            cost_ST += self._rows(kept_ST, self._most_rows_T[column]) * self._pair_cells_ST[row, column]
            taken_ST += moves_ST
        cost_ST += self._rows(taken_ST, self._most_rows_T[None, :]) * self._pair_cells_ST
        return divmod(int(cost_ST.argmin()), cost_ST.shape[1])

    def _rows(self, pairs: np.ndarray, most: np.ndarray) -> np.ndarray:
        """Rows of an epoch's batches for so many pairs."""
        return -(-pairs // most) * _even_rows(pairs, most, self._rows_multiple)


def _tight(shapes: list[tuple[int, int]], source: np.ndarray, target: np.ndarray) -> list[tuple[int, int]]:
    """The shapes, no longer than the pairs that have none with fewer cells; smallest first.

    A shape that shrinks may become the better one for pairs of another, which then shrinks too.
    """
    shapes = sorted(set(shapes), key=by_cells)
    while True:
        shape_of_pair = cheapest(shapes, source, target)
        members = [ids for index in range(len(shapes)) if len(ids := np.flatnonzero(shape_of_pair == index))]
        tight = sorted({(int(source[ids].max()), int(target[ids].max())) for ids in members}, key=by_cells)
        if tight == shapes:
            return shapes
        shapes = tight


def cheapest(shapes: Sequence[Sequence[int]], source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Index of the first of the shapes, smallest first, that holds each pair; -1: none does."""
    shape_of_pair = np.full(len(source), -1, np.int64)
    # Dearest first: cheaper ones overwrite.
    for index in reversed(range(len(shapes))):
        high, wide = shapes[index]
        shape_of_pair[(source <= high) & (target <= wide)] = index
    return shape_of_pair


def by_cells(shape: Sequence[int]) -> tuple[int, Sequence[int]]:
    """Sorts (source, target) shapes, those of fewest cells first."""
    return sum(shape), shape


def _most_rows(target: Any, batch_tokens: int, rows_multiple: int) -> Any:
    """Rows that the token budget allows at a target length."""
    return np.maximum(batch_tokens // target // rows_multiple, 1) * rows_multiple


def _even_rows(pairs: Any, most: Any, rows_multiple: int) -> Any:
    """Rows of a batch when pairs are spread evenly over as few batches as possible."""
    batches = np.maximum(-(-pairs // most), 1)
    return -(-pairs // (batches * rows_multiple)) * rows_multiple


def _grid(lengths: np.ndarray) -> np.ndarray:
    """The lengths that shapes may have: all that occur, or the most useful of them."""
    values = np.unique(lengths)
    if len(values) <= _GRID:
        return values
    # Half where the pairs are, half evenly over the tail.
    common = np.quantile(lengths, np.linspace(0, 1, _GRID // 2), method="higher")
    even = values[np.linspace(0, len(values) - 1, _GRID // 2).astype(np.int64)]
    return np.union1d(common, even).astype(np.int64)
