"""Many programs: as processes of this machine, or as jobs of a Slurm cluster.

Decides which run when, who is told, and what an interruption means: here the running programs are asked to
save and are waited for, on a cluster they go on without us. A program is a command that saves its state on
SIGTERM and goes on from it when it is started again, as `s2s.main` does. Must not know what it computes.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from s2s.infra import slurm
from s2s.infra.processes import Job, LaunchError, finish, signals, start

__all__ = ["Job", "LaunchError", "Stopped", "Watch", "launch_local", "launch_slurm"]

# Seconds between two looks at processes, at the results of Slurm's jobs, and at Slurm's queue, whose server
# has other people to answer; and between two calls of `watch` while nothing happens.
_LOOK_S, _RESULTS_S, _QUEUE_S, _TELL_S = 0.1, 0.5, 5.0, 1.0

# Is told, at every change and about once a second, each job's state:
# "waiting", "running", "finished" (exit code 0) or "failed".
Watch = Callable[[dict[str, str]], None]


class Stopped(Exception):
    """A signal asked this process to stop before all jobs had ended.

    Attributes:
      signal: the signal's number.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


def _nobody(states: dict[str, str]) -> None:
    """Watches nothing."""


def launch_local(jobs: Sequence[Job], at_once: int, watch: Watch = _nobody) -> dict[str, int]:
    """Runs jobs as processes of this machine and waits for all of them.

    One that fails takes no other with it. SIGINT and SIGTERM are passed on to those that run, no more are
    started, and all are waited for. Must be called in the main thread: signals come there.

    Args:
      jobs: started in this order.
      at_once: most processes at the same time.
      watch: told of every job's state.

    Returns:
      Exit codes by name; 128 and a signal's number where one ended the process, as shells say; 127 where
      there is no such command.

    Raises:
      LaunchError: names that are not unique, or no process is allowed.
      Stopped: a signal asked to stop; no process is left.
    """
    _check(jobs)
    if at_once < 1:
        raise LaunchError(f"at_once={at_once} lets no job run: it must be 1 or more")
    waiting = deque(jobs)
    running: dict[str, subprocess.Popen[bytes]] = {}
    codes: dict[str, int] = {}
    tell = _Teller(jobs, watch)
    with signals() as asked:
        passed_on = 0
        try:
            while running or (waiting and not asked):
                while waiting and len(running) < at_once and not asked:
                    job = waiting.popleft()
                    running[job.name] = start(job.command, job.log)
                for number in asked[passed_on:]:
                    passed_on += 1
                    for child in running.values():
                        child.send_signal(number)
                for name, child in list(running.items()):
                    if child.poll() is not None:
                        codes[name] = finish(running.pop(name))
                tell(running, codes)
                if running:
                    time.sleep(_LOOK_S)
        finally:
            for child in running.values():
                child.terminate()
            for child in running.values():
                finish(child)
    if asked:
        undone = len(jobs) - sum(code == 0 for code in codes.values())
        raise Stopped(
            asked[0],
            f"stopped by {signal.Signals(asked[0]).name} with {undone} of {len(jobs)} jobs to do; "
            "the same command goes on from there",
        )
    return {job.name: codes[job.name] for job in jobs}


def launch_slurm(
    jobs: Sequence[Job], folder: str | Path, parameters: Mapping[str, Any], watch: Watch = _nobody
) -> dict[str, int]:
    """Runs jobs as arrays of a Slurm cluster, through submitit, and waits for all of them.

    A job that is preempted or comes to the end of its time saves its state, is queued again and goes on.
    A signal to this process, or its death, leaves the jobs where they are: called again with the same
    folder it finds them, and submits only those that are neither queued nor running nor ended since.
    Must be called in the main thread: signals come there.

    Args:
      jobs: their logs must be on a file system that all nodes share.
      folder: where submitit keeps its files, and this what it has submitted; shared as well.
      parameters: of submitit's `AutoExecutor`: timeout_min, mem_gb, cpus_per_task, gpus_per_node, nodes,
        tasks_per_node, slurm_partition, slurm_array_parallelism, ...; slurm_max_num_timeout is how often
        a job may come to the end of its time. Where a job has several tasks, each runs the command.
      watch: told of every job's state.

    Returns:
      Exit codes by name, as of `launch_local`; 137 where Slurm ended a job and did not queue it again
      (cancelled, out of memory), which the job's log tells.

    Raises:
      LaunchError: there is no submitit or no Slurm here, Slurm refuses the jobs, another process watches
        the folder, or a job of the same name and another command is still there.
      Stopped: a signal asked to stop; the jobs go on.
    """
    _check(jobs)
    folder = Path(folder).absolute()
    codes: dict[str, int] = {}
    tell = _Teller(jobs, watch)
    with slurm.alone(folder), signals() as asked:
        cluster = slurm.Cluster(folder, parameters)
        cluster.find()
        cluster.submit(jobs)
        clock = time.monotonic()
        while len(codes) < len(jobs) and not asked:
            if time.monotonic() - clock >= _QUEUE_S:
                cluster.look()
                clock = time.monotonic()
            for job in jobs:
                if job.name not in codes and (code := cluster.code(job)) is not None:
                    codes[job.name] = code
            tell(cluster.running, codes)
            if len(codes) < len(jobs):
                time.sleep(_RESULTS_S)
    if len(codes) < len(jobs):
        raise Stopped(
            asked[0],
            f"stopped by {signal.Signals(asked[0]).name}; {len(jobs) - len(codes)} of {len(jobs)} jobs go on "
            "in Slurm, and the same command waits for them again",
        )
    return {job.name: codes[job.name] for job in jobs}


def _check(jobs: Sequence[Job]) -> None:
    names = [job.name for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise LaunchError(f"two jobs are called {twice[0]!r}: every job needs a name of its own")
    for job in jobs:
        if not job.command:
            raise LaunchError(f"job {job.name!r} has no command")


class _Teller:
    """Calls ``watch`` at every change, and every `_TELL_S` seconds."""

    def __init__(self, jobs: Sequence[Job], watch: Watch):
        self._names, self._watch = [job.name for job in jobs], watch
        self._told: dict[str, str] = {}
        self._when = 0.0

    def __call__(self, running: Collection[str], codes: Mapping[str, int]) -> None:
        states = {
            name: ("failed" if codes[name] else "finished")
            if name in codes
            else ("running" if name in running else "waiting")
            for name in self._names
        }
        now = time.monotonic()
        if states != self._told or now - self._when >= _TELL_S:
            self._told, self._when = states, now
            self._watch(dict(states))
