"""Jobs of a Slurm cluster, through submitit: submitted once, found again, stopped with their state saved.

Decides what is remembered of a submission, what a node does with a job, and when a job is lost. Slurm is
asked with squeue, which needs no accounting database. Must not know who waits for the jobs.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from s2s.infra.processes import STOPPED, Job, LaunchError, finish, note, start

# Jobs of one array; Slurm refuses more than MaxArraySize, 1001 unless it was told otherwise.
_ARRAY = 500
# What jobs get where the caller says nothing, in submitit's names. One that comes to the end of its time
# is queued again and goes on: these say how often that happens, and how long a job may take to save.
_PARAMETERS: dict[str, Any] = {
    "name": "s2s",
    "timeout_min": 240,
    "slurm_signal_delay_s": 120,
    "slurm_max_num_timeout": 100,
}
# What submitit takes for Slurm's warning that a job's time is nearly up.
_WARNING = signal.SIGUSR2
# States of squeue after which a job does not run again.
_ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
          "REVOKED", "TIMEOUT")  # fmt: skip
# States of squeue in which a job's processes run; in the second a signal is on its way to them.
_RUNNING = ("RUNNING", "SIGNALING")
# So often must a job be found ended without a result: its result may come here later than that news.
_GONE = 2


class Cluster:
    """The jobs that were submitted from one folder.

    Attributes:
      running: names of the jobs that run, when squeue was last asked.

    Args:
      folder: of submitit's files and of the list of what was submitted.
      parameters: of submitit's `AutoExecutor`.

    Raises:
      LaunchError: there is no submitit or no Slurm here, or a parameter does not exist.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Any]):
        try:
            import submitit
        except ImportError as error:
            raise LaunchError(
                "jobs go to Slurm through submitit, which is not installed: pip install 's2s[cluster]'"
            ) from error
        missing = [name for name in ("sbatch", "squeue", "srun") if shutil.which(name) is None]
        if missing:
            raise LaunchError(f"there is no Slurm on this machine: no {missing[0]} in PATH")
        self._folder = folder
        given = {**_PARAMETERS, **parameters}
        timeouts = given.pop("slurm_max_num_timeout")
        more = {"requeue": True, **(given.pop("slurm_additional_parameters", None) or {})}
        self._name = given.pop("name")
        # A quarter of the time between Slurm's warning and its end is left for submitit.
        self._grace = 0.75 * given["slurm_signal_delay_s"]
        self._tasks = given.get("nodes", 1) * max(1, given.get("tasks_per_node", 1))
        try:
            self._executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
            self._executor.update_parameters(**given, slurm_additional_parameters=more)
        except (NameError, ValueError, AssertionError) as error:
            raise LaunchError(f"submitit does not take these parameters: {error}") from error
        self._job = submitit.SlurmJob
        self._list = folder / "submitted.json"
        self._known: dict[str, dict[str, Any]] = {}
        self._states: dict[str, str] = {}
        self._gone: collections.Counter[str] = collections.Counter()
        self.running: set[str] = set()

    def find(self) -> None:
        """Reads what was submitted from here before, and forgets what is neither in the queue nor ended.

        Raises:
          LaunchError: Slurm does not answer.
        """
        if self._list.exists():
            self._known = json.loads(self._list.read_text(encoding="utf-8"))
        rows = _squeue()
        self._note_states(rows)
        base = {row["name"]: row["array"] for row in rows}
        torn = set()
        for name, one in list(self._known.items()):
            if one["id"] is None and one["token"] in base:
                # Killed between the submission and its note. Jobs that lack their program end in a minute.
                one["id"] = base[one["token"]] + ("" if one["of"] == 1 else f"_{one['place']}")
                if not self._at(name).paths.submitted_pickle.exists():
                    torn.add(base[one["token"]])
                    one["id"] = None
            if one["id"] is None or not (self._active(name) or self._results(name)):
                del self._known[name]
        for number in sorted(torn):
            subprocess.run(["scancel", number], check=False, capture_output=True)
        self._remember()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Submits those of the jobs that `find` did not find.

        Raises:
          LaunchError: Slurm refuses them, or a job of that name but another command is still there.
        """
        for job in jobs:
            there = self._known.get(job.name)
            if there and there["command"] != job.command:
                if self._active(job.name):
                    raise LaunchError(
                        f"job {job.name!r} is there already, as Slurm's job {there['id']} with the command "
                        f"{' '.join(there['command'])!r}: let it end, or end it with scancel {there['id']}"
                    )
                del self._known[job.name]
        fresh = [job for job in jobs if job.name not in self._known]
        for first in range(0, len(fresh), _ARRAY):
            array = fresh[first : first + _ARRAY]
            token = f"{self._name}-{uuid.uuid4().hex[:8]}"
            for place, job in enumerate(array):
                self._known[job.name] = {
                    "id": None, "command": job.command, "token": token, "place": place, "of": len(array),
                    "tasks": self._tasks,
                }  # fmt: skip
            # Before: whoever is killed in the next line finds the jobs again by their token.
            self._remember()
            self._executor.update_parameters(name=token)
            try:
                submitted = self._executor.submit_array(
                    [Program(job.command, job.log.absolute(), self._grace) for job in array]
                )
            except Exception as error:
                for job in array:
                    del self._known[job.name]
                self._remember()
                raise LaunchError(f"Slurm refuses the jobs: {error}") from error
            for job, one in zip(array, submitted, strict=True):
                self._known[job.name]["id"] = one.job_id
            self._remember()

    def look(self) -> None:
        """Asks Slurm how its jobs are; where it does not answer, they are as before."""
        with contextlib.suppress(LaunchError):
            self._note_states(_squeue())
            for name in self._known:
                self._gone[name] = 0 if self._active(name) else self._gone[name] + 1

    def code(self, job: Job) -> int | None:
        """The exit code of a submitted job, which is then forgotten; None while there is none."""
        code = None
        if self._results(job.name):
            there = self._at(job.name)
            error = there.exception()
            if error is not None:
                note(job.log, f"the job {there.job_id} failed: {str(error).strip().splitlines()[-1]}")
            code = 1 if error is not None else max(there.results())
        elif self._gone[job.name] >= _GONE:
            number = self._known[job.name]["id"]
            state = self._states.get(number, "no longer in its queue")
            note(job.log, f"Slurm ended the job {number} and does not run it again: {state}")
            code = 128 + signal.SIGKILL
        if code is not None:
            del self._known[job.name]
            self._remember()
        return code

    def _note_states(self, rows: list[dict[str, str]]) -> None:
        self._states = {row["id"]: row["state"] for row in rows}
        self.running = {name for name, one in self._known.items() if self._states.get(one["id"]) in _RUNNING}

    def _active(self, name: str) -> bool:
        return self._states.get(self._known[name]["id"], "CANCELLED") not in _ENDED

    def _at(self, name: str) -> Any:
        one = self._known[name]
        return self._job(folder=self._folder, job_id=one["id"], tasks=list(range(one["tasks"])))

    def _results(self, name: str) -> bool:
        """Whether all tasks of a job have left their results."""
        there = self._at(name)
        return all(there.task(n).paths.result_pickle.exists() for n in range(there.num_tasks))

    def _remember(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._list.with_suffix(".draft")
        draft.write_text(json.dumps(self._known, indent=1) + "\n", encoding="utf-8")
        draft.replace(self._list)


class Program:
    """What a node does with a job: runs the command, and has it save its state when the time is up.

    submitit calls it, and on Slurm's warning `checkpoint`; then it queues the job again.

    Args:
      command: the words of the command.
      log: of the first task; the others write beside it.
      grace: seconds that the command has for saving its state.
    """

    def __init__(self, command: Sequence[str], log: Path, grace: float):
        self.command, self.log, self.grace = list(command), log, grace
        self._child: int | None = None

    def __call__(self) -> int:
        """Returns the command's exit code; leaves without one if the command was stopped from outside."""
        rank = os.environ.get("SLURM_PROCID", "0")
        log = self.log if rank == "0" else self.log.with_suffix(f".{rank}{self.log.suffix}")
        child = start(self.command, log)
        self._child = child.pid
        # Slurm's own way to end a job, be it cancelled or preempted.
        signal.signal(signal.SIGTERM, lambda number, frame: os.kill(child.pid, signal.SIGTERM))
        # Not `Popen.wait`, whose lock `checkpoint` would meet inside this same thread.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        _let_slurm_ask_in_vain()
        self._child = None
        code = finish(child)
        if code in STOPPED:
            if _runs_still():
                # Preempted with some time of grace: Slurm takes a job that uses it to end for a failed one.
                signal.raise_signal(_WARNING)  # submitit's handler queues the job again and leaves
            # No result: whether the job runs again is for Slurm to say.
            raise SystemExit(code)
        return code

    def checkpoint(self) -> Any:
        """Stops the command; returns what submitit queues again."""
        from submitit.helpers import DelayedSubmission

        if self._child is not None:
            os.kill(self._child, signal.SIGTERM)
            deadline = time.monotonic() + self.grace
            how = os.WEXITED | os.WNOWAIT | os.WNOHANG
            while os.waitid(os.P_PID, self._child, how) is None and time.monotonic() < deadline:
                time.sleep(0.1)
        _let_slurm_ask_in_vain()
        return DelayedSubmission(Program(self.command, self.log, self.grace))


def _let_slurm_ask_in_vain() -> None:
    """Ignores SIGTERM from now on, when there is nothing left to stop.

    Slurm sends it to all processes of a job that is queued again, the scontrol that asked for it among
    them, which inherits this: were it ended before its answer, the job would be taken for failed.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _runs_still() -> bool:
    """Whether the job that this process is in is, for Slurm, neither cancelled nor queued again."""
    # A member of an array by its place: its other number may be that of the whole array.
    array, place = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    number = os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{place}"
    with contextlib.suppress(LaunchError):
        states = [row["state"] for row in _squeue("--jobs", number)] if number else []
        return len(states) == 1 and states[0] in _RUNNING
    return False


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a second process from submitting the same jobs from the same folder.

    Raises:
      LaunchError: another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LaunchError(
                f"another process is launching from {folder}: let it end, or stop it"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield


def _squeue(*which: str) -> list[dict[str, str]]:
    """This user's jobs, those that ended lately too, one row for each member of an array.

    Args:
      which: more arguments of squeue, to see only some of them.

    Raises:
      LaunchError: Slurm does not answer.
    """
    fields = {"id": "%i", "array": "%F", "state": "%T", "name": "%j"}
    command = [
        "squeue",
        "--me",
        "--noheader",
        "--array",
        "--states=all",
        f"--format={'|'.join(fields.values())}",
        *which,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        raise LaunchError(f"Slurm does not answer: {told.strip()}") from error
    lines = [line for line in done.stdout.splitlines() if line]
    return [dict(zip(fields, line.split("|", len(fields) - 1), strict=True)) for line in lines]
