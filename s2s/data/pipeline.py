"""The input pipeline: planned batches to padded arrays, made ahead by threads.

Decides how a batch is filled and which rows of it a process loads. Must not know how
the batches were chosen, nor anything of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from s2s.batch import PAD, Batch
from s2s.data.encode import Encoded
from s2s.data.plan import Bucket, Plan, Tick

# Making a batch is a fraction of a millisecond of NumPy under Python's lock: more threads are slower.
_THREADS = 1


def batches(
    encoded: Encoded,
    plan: Plan,
    *,
    epoch: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 16,
) -> Iterator[Batch]:
    """One epoch of padded batches, in the plan's order.

    Process p of P gets rows p * rows / P up to (p + 1) * rows / P of every batch; the
    processes' batches, one after another, are the whole batch.

    Args:
      encoded: the pairs that the plan was made for.
      plan: the batches.
      epoch: number of the epoch, from 0.
      start: batches to pass over, as an interrupted epoch had already given them.
      process_index: number of this process, p.
      process_count: number of processes, P.
      prefetch: batches made ahead of need.

    Raises:
      ValueError: the rows of a shape cannot be shared evenly by the processes, or there
        is no such process.
    """
    planned = plan.epoch(epoch)

    def load(number: int) -> Batch:
        bucket, ids = planned[number]
        return pad_batch(encoded, ids, plan.buckets[bucket], rows[bucket])

    rows = _rows(plan.buckets, process_index, process_count)
    return _ahead(load, range(start, len(planned)), prefetch)


def stacked(
    encoded: Sequence[Encoded],
    plans: Sequence[Plan],
    ticks: Sequence[Tick],
    *,
    epoch: int,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 16,
) -> Iterator[Batch]:
    """The batches of several runs side by side: arrays have one more axis in front, the run's.

    Run r's part of a tick is the batch that `batches` gives it alone; one that takes no part has a batch
    of fillers.

    Args:
      encoded: the pairs of each run.
      plans: the batches of each run, all of the same shapes.
      ticks: of `s2s.data.plan.walk`.
      epoch: that they are of.
      process_index, process_count, prefetch: as in `batches`.

    Raises:
      ValueError: as `batches`.
    """
    planned = [
        plan.epoch(epoch) if any(tick.numbers[run] is not None for tick in ticks) else []
        for run, plan in enumerate(plans)
    ]
    nothing = np.zeros(0, np.int64)

    def load(number: int) -> Batch:
        bucket, numbers = ticks[number]
        shape, own = plans[0].buckets[bucket], rows[bucket]
        parts = [
            pad_batch(pairs, nothing if which is None else order[which].ids, shape, own)
            for pairs, order, which in zip(encoded, planned, numbers, strict=True)
        ]
        return Batch(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))

    rows = _rows(plans[0].buckets, process_index, process_count)
    return _ahead(load, range(len(ticks)), prefetch)


def _rows(buckets: Sequence[Bucket], process_index: int, process_count: int) -> list[slice]:
    """The rows of each shape that a process loads."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be from 0 to {process_count - 1}")
    slices = []
    for bucket in buckets:
        share, rest = divmod(bucket.rows, process_count)
        if rest:
            raise ValueError(
                f"batches of {bucket.rows} rows cannot be shared by {process_count} processes: "
                "make the plan with a rows_multiple that they divide"
            )
        slices.append(slice(process_index * share, (process_index + 1) * share))
    return slices


def _ahead(load: Callable[[int], Batch], numbers: range, prefetch: int) -> Iterator[Batch]:
    """Loads one number after another in a thread."""
    order = grain.MapDataset.source(numbers).map(load)
    return iter(order.to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=prefetch)))


def pad_batch(encoded: Encoded, ids: np.ndarray, bucket: Bucket, rows: slice | None = None) -> Batch:
    """Pads pairs to a shape; rows without a pair have length 0 and index -1.

    Args:
      encoded: the pairs.
      ids: positions of the batch's pairs in ``encoded``, at most ``bucket.rows``.
      bucket: the shape of the whole batch.
      rows: the rows to make; None: all.

    Raises:
      ValueError: there are more pairs than rows, or a pair is longer than the shape.
    """
    if len(ids) > bucket.rows:
        raise ValueError(f"{len(ids)} pairs do not fit {bucket}")
    first, end, _ = (rows or slice(None)).indices(bucket.rows)
    ids = ids[first:end]
    source_BS, source_length_B = _pad(
        encoded.source_ids, encoded.source_starts, ids, (end - first, bucket.source)
    )
    target_BT, target_length_B = _pad(
        encoded.target_ids, encoded.target_starts, ids, (end - first, bucket.target)
    )
    index_B = np.full(end - first, -1, np.int32)
    index_B[: len(ids)] = encoded.record[ids]
    return Batch(source_BS, source_length_B, target_BT, target_length_B, index_B)


def _pad(
    values: np.ndarray, starts: np.ndarray, ids: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    rows, width = shape
    length_B = np.zeros(rows, np.int32)
    length_B[: len(ids)] = starts[ids + 1] - starts[ids]
    if length_B.max(initial=0) > width:
        raise ValueError(f"a pair of {length_B.max()} ids does not fit {width} positions")
    first_B = np.zeros(rows, np.int64)
    first_B[: len(ids)] = starts[ids]
    position = np.arange(width)
    real = position[None, :] < length_B[:, None]
    padded = np.full(shape, PAD, np.int32)
    padded[real] = values[(first_B[:, None] + position[None, :])[real]]
    return padded, length_B
