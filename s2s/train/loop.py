"""The training loop: ticks of a program, what is measured now and then, and signals.

Decides when the members of a program are updated, evaluated and saved, and what stops them. Must not
know how a state is laid out, nor what a run keeps.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from s2s.batch import Batch
from s2s.data import plan
from s2s.infra import distributed, report, sharding
from s2s.train.member import Diverged, Member
from s2s.train.program import Program


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved.

    Attributes:
      signal: the signal's number.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


class Loop:
    """Updates members until none has updates to come.

    Args:
      members: the runs, with their files open.
      program: with their states.
      display: shows progress to people; a single run's own reporter, or one for all.
      began: `time.monotonic` when the command began.
      diverged: does what is to be done about a run that diverged, or raises.
    """

    def __init__(
        self,
        members: Sequence[Member],
        program: Program,
        display: report.Reporter,
        *,
        began: float,
        diverged: Callable[[Member, Diverged], None],
    ):
        self._members, self._program, self._display = members, program, display
        self._began, self._diverged = began, diverged
        self._running = [member for member in members if member.training]
        # Metrics on the device, with who was updated; and seconds that the loop waited for batches.
        self._window: list[tuple[Any, tuple[bool, ...]]] = []
        self._waits: list[float] = []
        self._clock = time.monotonic()

    def run(self) -> float | None:
        """Trains.

        Returns:
          Seconds from the beginning to the first update done; None: there was none to do.

        Raises:
          Interrupted: a signal asked to stop; all states are saved.
        """
        to_first_update: float | None = None
        self._clock = time.monotonic()
        with _signals() as asked:
            for batch, active in self._updates():
                with jax.transfer_guard("disallow"):
                    metrics = self._program.update(batch, active)
                going = [number for number, goes in enumerate(active) if goes]
                for number in going:
                    self._members[number].advance()
                if to_first_update is None:
                    jax.block_until_ready(metrics)
                    to_first_update = round(time.monotonic() - self._began, 3)
                    for number in going:
                        told = {"seconds_to_first_step": to_first_update}
                        self._members[number].reporter.scalars(
                            self._members[number].step, told, group="start"
                        )
                self._after(metrics, active, going, asked)
        return to_first_update

    def _updates(self) -> Iterator[tuple[Batch, tuple[bool, ...]]]:
        """The batches of all updates, and whom each is for."""
        while self._running:
            epoch, ticks = plan.walk(
                [member.layout for member in self._members],
                [
                    (member.progress.epoch, member.progress.index) if member in self._running else None
                    for member in self._members
                ],
            )
            batches = functools.partial(self._program.batches, ticks, epoch)
            for tick, batch in zip(ticks, _timed(batches, self._waits), strict=False):
                active = tuple(
                    member in self._running and number is not None
                    for member, number in zip(self._members, tick.numbers, strict=True)
                )
                # Those it was made for may have ended meanwhile.
                if any(active):
                    yield batch, active
                if not self._running:
                    break

    def _after(self, metrics: Any, active: tuple[bool, ...], going: list[int], asked: list[int]) -> None:
        """What an update is followed by: nothing, most times.

        After the first, the metrics of an update are read after the next one is under way.
        """
        evaluated = [number for number in going if self._members[number].evaluation_due]
        saved = [number for number in going if self._members[number].save_due and number not in evaluated]
        leader = self._members[going[0]]
        due = leader.step % leader.cfg.run.log_every == 0
        if due and not evaluated:
            self._flush(pending=going)
        self._window.append((metrics, active))
        if evaluated or saved:
            self._flush()
        for number in evaluated:
            member = self._members[number]
            if member.failure is None:
                scores = member.evaluate(self._program.own_params(number), self._say_of(member))
                self._spend()
                self._save(number, scores)
        for number in saved:
            self._save(number)
        # Several processes must agree, which costs a collective: not at every step.
        together = distributed.process_count() == 1 or due
        if together and distributed.any_process(bool(asked)):
            self._stop(asked[0] if asked else signal.SIGTERM)
        self._running = [member for member in self._running if member.training]

    def _say_of(self, member: Member) -> Callable[[str], None]:
        """Says something of one member: of which, where there are several."""
        if len(self._members) == 1:
            return self._display.say
        return lambda text: self._display.say(f"{member.work.path.name}: {text}")

    def _flush(self, pending: Sequence[int] = ()) -> None:
        """Reads what the device measured since the last call, and checks it.

        Args:
          pending: members with one update more than the window tells of.
        """
        if not self._window:
            return
        host = sharding.to_host([metrics for metrics, _ in self._window])
        seconds, waited = self._spend(), sum(self._waits)
        found = []
        for number, member in enumerate(self._members):
            own = [
                self._program.own_metrics(metrics, number)
                for metrics, (_, active) in zip(host, self._window, strict=True)
                if active[number]
            ]
            if not own or member.failure is not None:
                continue
            last = member.step - (number in pending)
            try:
                found.append((last, member, *member.measured(last, own, seconds, waited)))
            except Diverged as error:
                self._diverged(member, error)
        if found:
            last, furthest = max(((last, member) for last, member, _, _ in found), key=lambda item: item[0])
            told: dict[str, float | str] = {
                "epoch": round(last / furthest.layout.batches_per_epoch, 2),
                "loss": report.spread([loss for _, _, loss, _ in found]),
            }
            self._display.progress(last, told, sum(tokens for _, _, _, tokens in found))
        self._window.clear()
        self._waits.clear()

    def _save(self, number: int, scores: dict[str, float] | None = None) -> None:
        member = self._members[number]
        if member.failure is None:
            member.save(self._program.own_state(number), scores)
            self._spend()

    def _spend(self) -> float:
        """Counts the seconds since the last call as training of all that run; returns them."""
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        for member in self._running:
            member.progress.seconds += seconds
        return seconds

    def _stop(self, number: int) -> None:
        self._flush()
        for which, member in enumerate(self._members):
            if member in self._running:
                self._save(which)
                member.checkpoints.wait()
        steps = sorted({member.step for member in self._running})
        where = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        raise Interrupted(
            number,
            f"stopped by {signal.Signals(number).name} at {where}, saved; "
            "the same command goes on from there",
        )


def _timed(batches: Callable[[], Iterator[Batch]], waits: list[float]) -> Iterator[Batch]:
    """Gives an epoch's batches, and notes for how many seconds each kept the loop waiting."""
    clock = time.monotonic()
    source = batches()
    while (batch := next(source, None)) is not None:
        waits.append(time.monotonic() - clock)
        yield batch
        clock = time.monotonic()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT for the loop to act on between two updates."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    kept = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
