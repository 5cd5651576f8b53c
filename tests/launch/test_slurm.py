"""A real Slurm of one node: arrays through submitit, warnings, preemption, and one run of two tasks."""

import json
import os
import signal
import subprocess
import sys

import pytest

from s2s.infra import launchers
from s2s.infra.launchers import Job, Stopped, launch_slurm
from tests.launch.conftest import (
    OVERRIDES,
    PLAIN,
    ROOT,
    STEPS,
    assert_same_numbers,
    steps_saved,
    training,
    until,
)

pytestmark = pytest.mark.slow

# Counts to 60 in six seconds; saves on SIGTERM and goes on from there. A file for every start, made when
# there is something to save.
COUNTER = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
saved = folder / "saved"
count = int(saved.read_text()) if saved.exists() else 0
begun = count
def save(number, frame):
    saved.write_text(str(count))
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
while count < 60:
    time.sleep(0.1)
    count += 1
    (folder / f"started at {begun}").touch()
"""


def counter(tmp_path, name):
    return Job(name, [sys.executable, "-c", COUNTER, str(tmp_path / name)], tmp_path / f"{name}.log")


def starts(tmp_path, name):
    """The counts from which a counter was started."""
    return sorted(int(path.name.split()[-1]) for path in (tmp_path / name).glob("started at *"))


def asked(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def in_queue(folder, name):
    """The number that a job has in Slurm."""
    return json.loads((folder / "submitted.json").read_text())[name]["id"]


@pytest.fixture(autouse=True)
def look_often(monkeypatch):
    monkeypatch.setattr(launchers, "_QUEUE_S", 1.0)
    # What sbatch hands on to the jobs: that of a user, with one CPU device.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("S2S_PYTHON", sys.executable)


def test_jobs_warned_preempted_cancelled_and_left_alone(tmp_path, slurm):
    """The array outlives the process that submitted it; each job ends as Slurm's doings let it."""
    names = ["straight", "warned", "preempted", "cancelled", "failing"]
    jobs = [counter(tmp_path, name) for name in names[:4]]
    jobs.append(Job("failing", ["bash", "-c", "echo no; exit 3"], tmp_path / "failing.log"))
    folder = tmp_path / "slurm"
    done, warning = [], []

    def leave(states):
        if states["straight"] == "running":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=r"jobs go on in Slurm"):
        launch_slurm(jobs, folder, {"timeout_min": 5, "slurm_array_parallelism": 2}, leave)

    def meddle(states):
        if "warned" not in done and starts(tmp_path, "warned"):
            # What Slurm sends some time before a job's time is up.
            warning.append(subprocess.Popen(["scancel", "--signal=USR2", in_queue(folder, "warned")]))
            done.append("warned")
        if warning and (tmp_path / "warned" / "saved").exists():
            # As the job is being queued, scancel would say it again every few seconds, and at last to a
            # Python that has only just begun: that it does not survive, nor does Slurm warn so early.
            warning[0].kill()
            warning.pop().wait()
        if "preempted" not in done and starts(tmp_path, "preempted"):
            # The whole machine, and with more right to it.
            asked("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
            done.append("preempted")
        if "cancelled" not in done and "preempted" in done and starts(tmp_path, "cancelled"):
            asked("scancel", in_queue(folder, "cancelled"))
            done.append("cancelled")

    codes = launch_slurm(jobs, folder, {"timeout_min": 5}, meddle)
    assert codes == {"straight": 0, "warned": 0, "preempted": 0, "cancelled": 137, "failing": 3}
    assert sorted(done) == ["cancelled", "preempted", "warned"]
    for name in ("warned", "preempted"):
        first, *later = starts(tmp_path, name)
        assert first == 0 and later and min(later) > 0, f"{name} began anew"
    assert "Slurm ended the job" in jobs[3].log.read_text()
    assert jobs[4].log.read_text() == "no\n"


def test_srun_trains_with_two_tasks_and_goes_on_after_a_warning(tmp_path, cache, slurm, single):
    """launch/slurm/train.sbatch as a person would submit it, warned as if its time were up."""
    work = tmp_path / "work"
    _, _, _, *arguments = training(cache, work, **OVERRIDES)
    number = asked(
        "sbatch", "--parsable", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={tmp_path}/log",
        "--chdir", str(ROOT), "launch/slurm/train.sbatch", *arguments,
    ).strip()  # fmt: skip
    until(lambda: steps_saved(work) >= 15, 300, "15 updates")
    warning = subprocess.Popen(["scancel", "--signal=TERM", number])
    state = lambda: asked("squeue", "--noheader", f"--jobs={number}", "--states=all", "--format=%T").strip()  # noqa: E731
    until(lambda: state() == "PENDING", 60, "saving")
    warning.kill()
    warning.wait()
    saved = steps_saved(work)
    assert 15 <= saved < STEPS and not (work / "results.json").exists()
    until(lambda: state() in ("COMPLETED", "FAILED"), 300, "the rest of the run")
    assert state() == "COMPLETED", (tmp_path / "log").read_text()
    assert "stopped by SIGTERM at step" in (tmp_path / "log").read_text()
    assert_same_numbers(single, work)
