"""Training, told from top to bottom: data, states, loop, results; of one run, or of several as one program.

Decides the order of things in a run and what a run survives. Interrupted at any moment
and started again by the same command, it ends with the same parameters. Must not know
how a batch is laid out, how a model computes, or how a file is written.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from s2s import variation
from s2s.config import Config, ConfigError
from s2s.data.tasks import TASKS
from s2s.infra import distributed, report, sharding
from s2s.judge import record_ensemble
from s2s.nn import cudnn
from s2s.train import summary
from s2s.train.loop import Interrupted, Loop
from s2s.train.member import Diverged, Member
from s2s.train.prepare import prepare
from s2s.workdir import Workdir

__all__ = ["Diverged", "Interrupted", "Outcome", "Run", "run", "run_together"]


class Run(NamedTuple):
    """A run to be trained: its configuration and its work directory."""

    cfg: Config
    folder: str


class Outcome(NamedTuple):
    """What became of a run.

    Attributes:
      folder: its work directory.
      results: what is in its results.json; None: it has none.
      failure: why it was given up; None: it was not.
    """

    folder: str
    results: dict[str, Any] | None
    failure: str | None


def run(cfg: Config, folder: str, *, began: float | None = None) -> dict[str, Any]:
    """Trains a model, or goes on where an earlier run in this folder stopped.

    With ``cfg.run.replicas`` above 1 there are so many models, trained together, each in a work
    directory of its own in this folder.

    Args:
      cfg: the experiment.
      folder: its work directory.
      began: `time.monotonic` when the command began; None: now.

    Returns:
      The results that are also in results.json.

    Raises:
      Interrupted: a signal asked to stop; the state is saved.
      Diverged: the loss is no longer finite (of replicas: that of every one).
      ConfigError, WorkdirError, CorpusError, VocabularyError, CheckpointError: as their names say.
    """
    began = time.monotonic() if began is None else began
    if cfg.run.replicas > 1:
        sharding.use_cores(cfg.run.replicas)
    work, chief = Workdir(folder), distributed.is_main_process()
    changed = work.check(cfg)
    finished = _is_finished(work, changed)
    if not finished and cfg.run.replicas > 1:
        _run_replicas(cfg, work, began)
    elif not finished:
        _train([(cfg, work)], began, alone=True)
    elif chief:
        print(
            f"{work.path} is finished: delete it or give another --workdir to train afresh; "
            "for other data or another search there is s2s.evaluate.\n"
        )
    results = work.read_results()
    if chief:
        (summary.show_replicas if cfg.run.replicas > 1 else summary.show)(results, work)
    return results


def run_together(runs: Sequence[Run], *, began: float | None = None) -> list[Outcome]:
    """Trains several runs as the replicas of one program, or goes on where they stopped.

    Runs on one corpus end as each of them would end alone, up to the rounding of another order of sums: they
    see the same batches at the same steps, whatever their seeds. Runs on several corpora share batch shapes
    that suit them all, which a run alone would choose for its own corpus: they end as one alone would
    with these shapes. Runs need not keep step: those behind, after a kill, come first.

    A run that diverges is left as it is and told in its folder's failure.json; the others go on. Delete that
    file to try again. Runs that are finished are not trained again, and those on which updates are still to
    be made may be any of those they were begun with.

    Args:
      runs: each with a folder of its own; `s2s.variation.apart` says which fit together.
      began: `time.monotonic` when the command began; None: now.

    Returns:
      One outcome a run, in order.

    Raises:
      Interrupted: a signal asked to stop; all states are saved.
      ConfigError: the runs do not fit together.
      WorkdirError, CorpusError, VocabularyError, CheckpointError: as their names say.
    """
    _check_together(runs)
    sharding.use_cores(len(runs))
    return _together(runs, time.monotonic() if began is None else began)


def _together(
    runs: Sequence[Run], began: float, prepared: Callable[[], None] = lambda: None
) -> list[Outcome]:
    works = [Workdir(each.folder) for each in runs]
    todo = [
        (each.cfg, work)
        for each, work in zip(runs, works, strict=True)
        if not _is_finished(work, work.check(each.cfg))
    ]
    # Those given up stay in the program, at rest, as another number of runs might round otherwise.
    if any(work.read_failure() is None for _, work in todo):
        _train(todo, began, alone=False, prepared=prepared)
    return [
        Outcome(each.folder, work.read_results() if work.results.exists() else None, work.read_failure())
        for each, work in zip(runs, works, strict=True)
    ]


def _run_replicas(cfg: Config, work: Workdir, began: float) -> None:
    """Trains the replicas of a configuration, and writes what became of all of them."""
    runs = [
        Run(each, str(work.replica(number).path))
        for number, each in enumerate(variation.expand(cfg), start=1)
    ]
    _check_together(runs)

    def prepared() -> None:
        if distributed.is_main_process():
            work.write_config(cfg)

    outcomes = _together(runs, began, prepared)
    if all(outcome.failure for outcome in outcomes):
        raise Diverged("\n".join(f"{each.folder}: {each.failure}" for each in outcomes))
    if distributed.is_main_process():
        seeds = [each.cfg.run.seed for each in runs]
        found = [(Path(each.folder).name, each.results, each.failure) for each in outcomes]
        work.write_results(summary.of_replicas(cfg.name, seeds, found))
        # A generated task has other pairs, so other vocabularies, for every seed.
        if cfg.data.train not in TASKS and not any(each.failure for each in outcomes):
            record_ensemble([work.path], work.ensemble)
    distributed.barrier("results of the replicas saved")


def _check_together(runs: Sequence[Run]) -> None:
    if not runs:
        raise ConfigError("there is no run to train: give one at least")
    for number, each in enumerate(runs):
        if each.cfg.run.replicas != 1:
            raise ConfigError(
                f"{each.folder}: config.run.replicas={each.cfg.run.replicas} must be 1 for a run among others"
            )
        if each.folder in [other.folder for other in runs[:number]]:
            raise ConfigError(f"{each.folder} is the folder of two runs: give each its own")
        if names := variation.apart(runs[0].cfg, each.cfg):
            raise ConfigError(
                f"{runs[0].folder} and {each.folder} cannot be trained as one program: they differ in "
                f"{', '.join(f'config.{name}' for name in names)}"
            )


def _is_finished(work: Workdir, changed: dict[str, Any]) -> bool:
    return work.results.exists() and not any(name.startswith("run.") for name in changed)


def _train(
    runs: Sequence[tuple[Config, Workdir]],
    began: float,
    *,
    alone: bool,
    prepared: Callable[[], None] = lambda: None,
) -> None:
    """Trains runs to their ends as one program; what they leave is in their work directories.

    Args:
      runs: that fit together.
      began: as in `run`.
      alone: whether to raise `Diverged`, where runs among others are given up.
      prepared: called when all that the runs need is known to be good.
    """
    if runs[0][0].model.recurrence == "cudnn" and not cudnn.available():
        raise ConfigError(
            "config.model.recurrence='cudnn' needs an NVIDIA GPU, and JAX runs on none: "
            "install s2s[cuda], or use 'scan', which learns the same parameters"
        )
    chief = distributed.is_main_process()
    for text in dict.fromkeys(
        f"config.{name}: was {there!r}, is {now!r} from here on"
        for cfg, work in runs
        for name, (there, now) in work.check(cfg).items()
    ):
        _tell(text)
    ready = prepare(runs, sharding.make_mesh(), _tell)
    prepared()

    def diverged(member: Member, error: Diverged) -> None:
        if alone:
            raise error
        member.failure = str(error)
        if chief:
            member.work.write_failure(member.failure)
        display.say(f"{member.work.path.name}: {member.failure}; it is given up, the others go on")

    with contextlib.ExitStack() as held:
        for member in ready.members:
            held.enter_context(member.reporter)
            held.enter_context(member.checkpoints)
            member.failure = None if alone else member.work.read_failure()
        held.enter_context(ready.program.compiled)
        display = ready.members[0].reporter
        if len(ready.members) > 1:
            total = max(member.total_steps for member in ready.members)
            first = max(member.step for member in ready.members)
            display = held.enter_context(
                report.Reporter(None, total, main_process=chief, restored_step=first)
            )
        display.say(ready.summary)
        first_update = Loop(ready.members, ready.program, display, began=began, diverged=diverged).run()
        for number, member in enumerate(ready.members):
            if member.failure is None:
                member.checkpoints.wait()
                member.finish(
                    ready.program.own_params(number),
                    began=began,
                    seconds_to_first_step=first_update,
                    writes=chief,
                )
    distributed.barrier("results saved")


def _tell(text: str) -> None:
    if distributed.is_main_process():
        print(text, file=sys.stderr)
