"""Checkpoints: saved beside the training, proved on the way back, the best and the last kept.

Decides which checkpoints are kept, and what is done about a damaged one. Must not know
what the arrays of a state mean, nor how one checkpoint lies on the disk.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from s2s.infra import distributed
from s2s.infra.snapshot import (
    CheckpointError,
    Damaged,
    first_line,
    read,
    read_arrays,
    read_record,
    rebuild,
    silence_orbax,
    to_save,
    wanted_arrays,
)

__all__ = ["CheckpointError", "CheckpointWarning", "Checkpoints", "load_params", "save_params"]


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was left out."""


class Checkpoints:
    """The checkpoints of one run: FOLDER/STEP/.

    Every process of the run must make the same calls; process 0 writes. Saving runs
    beside the training, and a checkpoint appears under its name only when complete.

    Args:
      folder: made when first saved to.
      keep_best: checkpoints kept for their metric.
      keep_last: checkpoints kept for their step, evaluated or not.
      keep_evaluated: evaluated checkpoints kept for their step, for `mean_of_last`.
      metric: name in ``metrics`` that says which is best.
      higher_is_better: of that metric.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_best: int = 1,
        keep_last: int = 2,
        keep_evaluated: int = 0,
        metric: str = "loss",
        higher_is_better: bool = False,
    ) -> None:
        self.folder = Path(folder).absolute()
        self._keep_best, self._keep_last, self._keep_evaluated = keep_best, keep_last, keep_evaluated
        self._metric, self._sign = metric, 1.0 if higher_is_better else -1.0
        self._metrics: dict[int, dict[str, float] | None] = {}
        self._manager: ocp.CheckpointManager | None = None
        silence_orbax()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(
        self, step: int, state: Any, progress: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Saves in the background; returns when the arrays are copied and may be donated.

        A step already saved stays as it is, unless only now there are metrics for it.

        Args:
          step: updates done.
          state: a pytree of arrays, replicated over the devices.
          progress: what else resuming needs; must be fit for JSON.
          metrics: of an evaluation at this step; without them it is never a best one.

        Raises:
          CheckpointError: this or the save before could not be written.
          ValueError: the metrics lack the one that picks the best.
        """
        if metrics is not None and self._metric not in metrics:
            raise ValueError(f"metrics lack {self._metric!r}, which picks the best: {', '.join(metrics)}")
        exists = step in self.all_steps()
        if exists and (metrics is None or self.metrics(step) is not None):
            return
        scores = None if metrics is None else {name: float(value) for name, value in metrics.items()}
        args = to_save(state, dict(progress), scores)
        self._metrics[step] = scores
        try:
            manager = self._open()
            if exists:
                manager.delete(step)
            manager.save(step, args=args, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Waits until everything saved is on the disk.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
                self._manager.check_for_errors()
            except (OSError, ValueError, RuntimeError) as error:
                raise self._unwritten(error) from error

    def close(self) -> None:
        """Waits and lets go of the folder."""
        if self._manager is not None:
            try:
                self.wait()
            finally:
                self._manager.close()
                self._manager = None

    def restore_latest(self, abstract: Any) -> tuple[Any, dict[str, Any], int] | None:
        """Restores the last checkpoint that is exactly what was saved.

        A damaged one is named in a `CheckpointWarning`, and its folder is renamed to
        STEP.damaged, so that training can save that step again.

        Args:
          abstract: a state of the same structure: arrays, or ShapeDtypeStructs whose
            shardings say where the arrays go.

        Returns:
          (state, progress, step), or None if nothing was ever saved.

        Raises:
          CheckpointError: every checkpoint is damaged, or the state does not fit.
        """
        found = _newest(self.folder, self.all_steps(), abstract)
        if found is None:
            return None
        state, progress, step, damaged = found
        if damaged:
            if distributed.is_main_process():
                for bad in damaged:
                    _set_aside(self.folder / str(bad))
            distributed.barrier("damaged checkpoints set aside")
            if self._manager is not None:
                self._manager.reload()
        return state, progress, step

    def restore(self, step: int, abstract: Any, part: str = "") -> tuple[Any, dict[str, Any]]:
        """Restores one checkpoint, or a part of one.

        Args:
          step: of `all_steps`.
          abstract: as in `restore_latest`, for the part alone.
          part: name of the part of the state, such as "params"; "" for all of it.

        Returns:
          (state, progress).

        Raises:
          CheckpointError: there is no such step, it is damaged, or the state does not fit.
        """
        if step not in self.all_steps():
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}, only {self.all_steps()}")
        try:
            return read(self.folder / str(step), abstract, part)
        except Damaged as error:
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} is damaged ({error}): "
                f"use another of {self.all_steps()}"
            ) from error

    def all_steps(self) -> list[int]:
        """Steps of the checkpoints, oldest first; waits for the one being saved."""
        self.wait()
        return _steps(self.folder)

    def metrics(self, step: int) -> dict[str, float] | None:
        """The metrics saved with a step; None without an evaluation or if they are unreadable."""
        if step not in self._metrics:
            try:
                self._metrics[step] = read_record(self.folder / str(step))["metrics"]
            except Damaged:
                return None
        return self._metrics[step]

    def evaluated_steps(self) -> list[int]:
        """Steps that have metrics, oldest first."""
        return [step for step in self.all_steps() if self.metrics(step) is not None]

    def best_steps(self) -> list[int]:
        """Evaluated steps, best first, the earlier of two equal ones first; NaN is never among them."""
        return self._ranked(self.evaluated_steps())

    def best_step(self) -> int | None:
        """The step with the best metric; None if nothing was evaluated."""
        return next(iter(self.best_steps()), None)

    def mean_of_last(self, n: int, abstract: Any, part: str = "params") -> tuple[Any, list[int]]:
        """Averages a part of the last ``n`` evaluated checkpoints, in double precision.

        Only what is kept can be averaged: see ``keep_evaluated``. Damaged checkpoints
        are named in a warning and left out. Arrays of integers come from the last one.

        Returns:
          (the mean, the steps it was made of, newest first).

        Raises:
          CheckpointError: no evaluated checkpoint can be read, or the part does not fit.
        """
        names = wanted_arrays(abstract, part)
        sums: dict[str, np.ndarray] = {}
        used: list[int] = []
        for step in reversed(self.evaluated_steps()):
            if len(used) == n:
                break
            try:
                _, arrays = read_arrays(self.folder / str(step), abstract, part)
            except Damaged as error:
                _warn(self.folder / str(step), error)
                continue
            for name, array in arrays.items():
                if not jax.numpy.issubdtype(array.dtype, np.floating):
                    sums.setdefault(name, array)
                elif name in sums:
                    sums[name] += array
                else:
                    sums[name] = array.astype(np.float64)
            used.append(step)
        if not used:
            raise CheckpointError(
                f"{self.folder} has no readable evaluated checkpoint to average: "
                "set config.run.average_last=0"
            )
        means = {
            name: (array / len(used)).astype(names[name][1]) if array.dtype == np.float64 else array
            for name, array in sums.items()
        }
        return rebuild(abstract, part, means), used

    def _ranked(self, steps: Sequence[int]) -> list[int]:
        values = {step: (self.metrics(step) or {}).get(self._metric, math.nan) for step in steps}
        return sorted(
            (step for step in steps if not math.isnan(values[step])),
            key=lambda step: (-self._sign * values[step], step),
        )

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Says to orbax which checkpoints stay (its PreservationPolicy protocol)."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        evaluated = [step for step in steps if self.metrics(step) is not None]
        kept = {
            *steps[max(len(steps) - self._keep_last, 0) :],
            *evaluated[max(len(evaluated) - self._keep_evaluated, 0) :],
            *self._ranked(evaluated)[: self._keep_best],
        }
        return [step in kept for step in steps]

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                epath.Path(self.folder),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self,
                    # What a killed process left half written.
                    cleanup_tmp_directories=True,
                    # Orbax's own per-step metadata is unused: reading it could only fail.
                    lightweight_initialize=True,
                    save_root_metadata=False,
                ),
            )
        return self._manager

    def _unwritten(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder}: {first_line(error)}; "
            "look at the free space and the permissions there, then start again: the run resumes"
        )


def save_params(folder: str | os.PathLike[str], params: Any, meta: Mapping[str, Any]) -> None:
    """Writes final parameters, replacing those there only once the new ones are complete.

    Args:
      folder: of this model alone.
      params: a pytree of arrays.
      meta: what to know about them; must be fit for JSON.

    Raises:
      CheckpointError: they could not be written.
    """
    with Checkpoints(folder, keep_best=0, keep_last=1) as checkpoints:
        checkpoints.save(max(checkpoints.all_steps(), default=-1) + 1, params, meta)


def load_params(folder: str | os.PathLike[str], abstract: Any) -> tuple[Any, dict[str, Any]]:
    """Reads what `save_params` wrote, proved by its digests; changes nothing on the disk.

    Returns:
      (params, meta).

    Raises:
      CheckpointError: there is nothing, it is damaged, or it does not fit ``abstract``.
    """
    silence_orbax()
    folder = Path(folder).absolute()
    found = _newest(folder, _steps(folder), abstract)
    if found is None:
        raise CheckpointError(f"{folder} holds no model: train one first, or name another folder")
    return found[0], found[1]


def _newest(
    folder: Path, steps: list[int], abstract: Any
) -> tuple[Any, dict[str, Any], int, list[int]] | None:
    """(state, progress, step, damaged steps) of the newest intact checkpoint."""
    damaged: list[int] = []
    for step in reversed(steps):
        problem: Damaged | None = None
        try:
            state, progress = read(folder / str(step), abstract, "")
        except Damaged as error:
            problem = error
        # All processes must go on from the same step.
        if not distributed.any_process(problem is not None):
            return state, progress, step, damaged
        _warn(folder / str(step), problem or "another process could not read it")
        damaged.append(step)
    if damaged:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({', '.join(map(str, damaged))}): "
            "put back a copy of one, or remove the folder to begin anew"
        )
    return None


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def _set_aside(path: Path) -> None:
    target, number = path.with_name(f"{path.name}.damaged"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged{number}")
    path.rename(target)


def _warn(path: Path, problem: object) -> None:
    warnings.warn(f"checkpoint {path} is damaged and left out: {problem}", CheckpointWarning, stacklevel=4)
