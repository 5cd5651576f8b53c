"""Programs side by side: codes, logs, signals passed on, nothing left behind; kind refusals of Slurm."""

import os
import signal
import subprocess
import sys
import time

import pytest

from s2s.infra import launchers, processes, slurm
from s2s.infra.launchers import Job, LaunchError, Stopped, launch_local, launch_slurm


def shell(folder, name, script):
    return Job(name, ["bash", "-c", script], folder / "logs" / f"{name}.log")


def wait_for(path, seconds=20):
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)
    return path.read_text()


def alive(number):
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        with open(f"/proc/{number}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_jobs_have_their_codes_and_logs_and_fail_alone(tmp_path):
    seen = []
    jobs = [
        shell(tmp_path, "good", "echo out; echo err >&2"),
        shell(tmp_path, "bad", "exit 7"),
        shell(tmp_path, "killed", "kill -9 $$"),
        Job("missing", ["no-such-command"], tmp_path / "logs" / "missing.log"),
        shell(tmp_path, "last", "sleep 0.2"),
    ]
    codes = launch_local(jobs, 2, seen.append)
    assert codes == {"good": 0, "bad": 7, "killed": 137, "missing": 127, "last": 0}
    assert list(codes) == [job.name for job in jobs]
    assert jobs[0].log.read_text() == "out\nerr\n"
    assert jobs[3].log.read_text() == "s2s: no-such-command: No such file or directory\n"
    assert seen[-1] == {
        "good": "finished", "bad": "failed", "killed": "failed", "missing": "failed", "last": "finished"
    }  # fmt: skip
    for states in seen:
        assert list(states) == list(codes)
        assert sum(state == "running" for state in states.values()) <= 2
    # Another attempt adds to the log.
    launch_local(jobs[:1], 1)
    assert jobs[0].log.read_text() == "out\nerr\n" * 2


def test_no_more_at_once_than_allowed_and_as_many_as_allowed(tmp_path):
    together = "touch {0}.here; for n in $(seq 100); do [ -e {1}.here ] && exit 0; sleep 0.1; done; exit 1"
    pair = [
        shell(tmp_path, name, together.format(tmp_path / name, tmp_path / other))
        for name, other in (("a", "b"), ("b", "a"))
    ]
    assert launch_local(pair, 2) == {"a": 0, "b": 0}
    one_by_one = f"mkdir {tmp_path}/busy || exit 1; sleep 0.15; rmdir {tmp_path}/busy"
    jobs = [shell(tmp_path, f"{n}", one_by_one) for n in range(3)]
    assert set(launch_local(jobs, 1).values()) == {0}


LAUNCH = """
import sys
from pathlib import Path
from s2s.infra.launchers import Job, Stopped, launch_local
folder = Path(sys.argv[1])
script = (
    "save() {{ sleep 0.3; echo saved >> {log}; exit $1; }}; trap 'save 143' TERM; trap 'save 130' INT;"
    "sleep 300 & echo $$ $! > {pids}; wait"
)
jobs = [
    Job(str(n), ["bash", "-c", script.format(log=folder / f"{n}.saved", pids=folder / f"{n}.pids")],
        folder / f"{n}.log")
    for n in range(3)
]
try:
    launch_local(jobs, 2)
except Stopped as stop:
    print(stop)
    sys.exit(128 + stop.signal)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_launcher_leaves_nothing_behind(tmp_path, number):
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    pids = [int(word) for n in range(2) for word in wait_for(tmp_path / f"{n}.pids").split()]
    assert len(pids) == 4 and all(map(alive, pids))
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=30)
    if number == signal.SIGKILL:
        assert launcher.returncode == -signal.SIGKILL
        # Told by the kernel, nobody waits for them.
        for n in range(2):
            wait_for(tmp_path / f"{n}.saved")
    else:
        assert launcher.returncode == 128 + number
        assert f"stopped by {number.name} with 3 of 3 jobs to do" in out
        assert not any(map(alive, pids)), "what the jobs had started is gone too"
    assert [(tmp_path / f"{n}.saved").exists() for n in range(3)] == [True, True, False]
    for pid in pids[1::2]:
        if number == signal.SIGKILL:
            os.kill(pid, signal.SIGKILL)


def test_a_watcher_that_fails_ends_the_jobs(tmp_path):
    def watch(states):
        if (tmp_path / "pid").exists():
            raise RuntimeError("no more")

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="no more"):
        launch_local([shell(tmp_path, "long", f"echo $$ > {tmp_path}/pid; exec sleep 300")], 1, watch)
    assert time.monotonic() - began < 30
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_launcher_gives_signals_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    launch_local([shell(tmp_path, "a", "true")], 1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_jobs_that_cannot_be_told_apart_are_refused(tmp_path):
    twice = [shell(tmp_path, "a", "true"), shell(tmp_path, "a", "false")]
    with pytest.raises(LaunchError, match="two jobs are called 'a'"):
        launch_local(twice, 1)
    with pytest.raises(LaunchError, match="at_once=0"):
        launch_local(twice[:1], 0)
    with pytest.raises(LaunchError, match="'b' has no command"):
        launch_local([Job("b", [], tmp_path / "log")], 1)
    assert launch_local([], 1) == {}


def test_slurm_without_submitit_or_slurm_is_told(tmp_path, monkeypatch):
    job = shell(tmp_path, "a", "true")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        with pytest.raises(LaunchError, match=r"pip install 's2s\[cluster\]'"):
            launch_slurm([job], tmp_path, {})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no sbatch in PATH"):
        launch_slurm([job], tmp_path, {})


@pytest.fixture
def paper_slurm(tmp_path, monkeypatch):
    """A Slurm of shell scripts that accepts jobs and never runs them; `queue` is what squeue says."""
    pytest.importorskip("submitit")
    tools = tmp_path / "bin"
    tools.mkdir()
    queue = tmp_path / "queue"
    queue.write_text("")
    scripts = {
        "squeue": f"cat {queue}",
        "srun": "exit 1",
        "scancel": f"echo $1 >> {tmp_path}/cancelled",
        # Says no more than the number; the job's name is in the file.
        "sbatch": f"echo x >> {tmp_path}/submitted; n=$(wc -l < {tmp_path}/submitted); "
        f"name=$(grep -o 'job-name=.*' $1 | cut -d= -f2); "
        # Whoever is killed now must be able to find the jobs again.
        f"grep -q $name {tmp_path}/folder/submitted.json || exit 1; "
        f'for i in 0 1; do echo "${{n}}_$i|$n|PENDING|$name" >> {queue}; done; '
        "echo Submitted batch job $n",
    }
    for name, script in scripts.items():
        (tools / name).write_text(f"#!/bin/bash\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return queue


def stop_soon(states):
    os.kill(os.getpid(), signal.SIGTERM)


def test_jobs_are_submitted_once_and_found_again(tmp_path, paper_slurm):
    jobs = [shell(tmp_path, name, "true") for name in "ab"]
    for _ in range(3):
        with pytest.raises(Stopped, match="2 of 2 jobs go on in Slurm"):
            launch_slurm(jobs, tmp_path / "folder", {}, stop_soon)
    assert (tmp_path / "submitted").read_text() == "x\n"
    # Another command under the same name would be the wrong result.
    with pytest.raises(LaunchError, match=r"'b' is there already.*scancel 1_1"):
        launch_slurm([jobs[0], shell(tmp_path, "b", "false")], tmp_path / "folder", {}, stop_soon)
    # Gone while nobody looked: submitted again, alone.
    paper_slurm.write_text("1_0|1|PENDING|x\n1_1|1|FAILED|x\n")
    with pytest.raises(Stopped):
        launch_slurm(jobs, tmp_path / "folder", {}, stop_soon)
    assert (tmp_path / "submitted").read_text() == "x\nx\n"


def test_a_launcher_killed_while_it_submits_finds_the_jobs_by_their_token(tmp_path, paper_slurm):
    jobs = [shell(tmp_path, name, "true") for name in "ab"]
    folder = tmp_path / "folder"
    with pytest.raises(Stopped):
        launch_slurm(jobs, folder, {}, stop_soon)
    noted = (folder / "submitted.json").read_text()
    assert '"id": "1_0"' in noted
    torn = noted.replace('"id": "1_0"', '"id": null').replace('"id": "1_1"', '"id": null')
    (folder / "submitted.json").write_text(torn)
    with pytest.raises(Stopped):
        launch_slurm(jobs, folder, {}, stop_soon)
    assert (folder / "submitted.json").read_text() == noted
    # Killed before submitit had put the programs where the jobs look for them.
    (folder / "submitted.json").write_text(torn)
    (folder / "1_0_submitted.pkl").unlink()
    (folder / "1_1_submitted.pkl").unlink()
    with pytest.raises(Stopped):
        launch_slurm(jobs, folder, {}, stop_soon)
    assert (tmp_path / "cancelled").read_text() == "1\n"
    assert '"id": "2_1"' in (folder / "submitted.json").read_text()


def test_a_job_that_slurm_lost_is_told(tmp_path, paper_slurm, monkeypatch):
    monkeypatch.setattr(launchers, "_QUEUE_S", 0.0)
    jobs = [shell(tmp_path, name, "true") for name in "ab"]

    def lose(states):
        paper_slurm.write_text("1_0|1|OUT_OF_MEMORY|x\n")

    assert launch_slurm(jobs, tmp_path / "folder", {}, lose) == {"a": 137, "b": 137}
    assert (
        jobs[0].log.read_text() == "s2s: Slurm ended the job 1_0 and does not run it again: OUT_OF_MEMORY\n"
    )
    assert "no longer in its queue" in jobs[1].log.read_text()


def test_wrong_parameters_a_silent_slurm_and_a_second_launcher_are_told(tmp_path, paper_slurm):
    jobs = [shell(tmp_path, "a", "true")]
    with pytest.raises(LaunchError, match="submitit does not take these parameters.*slurm_partitoin"):
        launch_slurm(jobs, tmp_path / "folder", {"slurm_partitoin": "gpu"})
    with slurm.alone(tmp_path / "folder"), pytest.raises(LaunchError, match="another process is launching"):
        launch_slurm(jobs, tmp_path / "folder", {})
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\necho no such partition >&2; exit 1\n")
    with pytest.raises(LaunchError, match="Slurm refuses the jobs.*no such partition"):
        launch_slurm(jobs, tmp_path / "folder", {})
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\necho down >&2; exit 1\n")
    with pytest.raises(LaunchError, match="Slurm does not answer: down"):
        launch_slurm(jobs, tmp_path / "folder", {})


def test_a_program_stopped_from_outside_has_no_result(tmp_path):
    kept = signal.getsignal(signal.SIGTERM)
    try:
        assert slurm.Program(["bash", "-c", "exit 3"], tmp_path / "log", 5.0)() == 3
        with pytest.raises(SystemExit):
            slurm.Program(["bash", "-c", "exit 143"], tmp_path / "log", 5.0)()
    finally:
        signal.signal(signal.SIGTERM, kept)


@pytest.mark.parametrize("state", ["RUNNING", "SIGNALING"])
@pytest.mark.parametrize("told", [signal.SIGUSR2, signal.SIGTERM], ids=["warned", "preempted"])
def test_a_job_is_queued_again_though_slurm_stops_it_meanwhile(tmp_path, paper_slurm, told, state):
    """What Slurm does with a job that asks to be queued again: SIGTERM to it and to its scontrol."""
    folder = tmp_path / "folder"
    wait = f"trap 'exit 143' TERM; echo > {tmp_path}/started; while :; do sleep 0.05; done"
    with pytest.raises(Stopped):
        launch_slurm([shell(tmp_path, name, wait) for name in "ab"], folder, {}, stop_soon)
    paper_slurm.write_text(f"1_0|1|{state}|x\n1_1|1|PENDING|x\n")
    # Asked for 1, Slurm tells of the whole array.
    (tmp_path / "bin" / "squeue").write_text(f'#!/bin/bash\ngrep "^${{@: -1}}[_|]" {paper_slurm}\n')
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f"#!/bin/bash\nkill $PPID $$; sleep 0.2; echo $* > {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    number = {"SLURM_JOB_ID": "1", "SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "0"}
    job = subprocess.Popen(
        [sys.executable, "-m", "submitit.core._submit", str(folder)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, **number, "SUBMITIT_EXECUTOR": "slurm", "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    wait_for(tmp_path / "started")
    job.send_signal(told)
    _, err = job.communicate(timeout=30)
    assert (tmp_path / "asked").exists(), err
    assert (tmp_path / "asked").read_text() == "requeue 1_0\n"
    assert not (folder / "1_0_0_result.pkl").exists(), err


def test_a_child_ignores_the_warning_of_a_cluster(tmp_path):
    child = processes.start(["bash", "-c", "kill -USR2 $$; echo still here"], tmp_path / "log")
    assert processes.finish(child) == 0
    assert (tmp_path / "log").read_text() == "still here\n"
