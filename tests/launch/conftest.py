"""Several processes over the network stack, and a Slurm of one node that the tests start for themselves."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.system.conftest import ROOT, cache, free_port  # noqa: F401 - fixtures
from tests.system.test_train import flags, parameters

STEPS = 60
# Adam divides by the size of a gradient: what differs in its last digits only grows with the updates.
RTOL, ATOL = 2e-4, 2e-5
OVERRIDES = {
    "run.steps": STEPS, "run.eval_every": STEPS, "run.save_every": 5, "run.log_every": 5,
    "data.batch_tokens": 1024, "data.max_shapes": 1, "model.embedding": 8, "model.hidden": 16,
    "model.dropout": 0.2, "optim.learning_rate": 0.001,
}  # fmt: skip

# Every process compiles for itself, and these few updates are done sooner than programs are made better.
PLAIN = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "PYTHONPATH": str(ROOT)}

# What Slurm and the tests need to be told; the rest is Slurm's own default.
SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=2
"""
DAEMONS = ("munged", "slurmctld", "slurmd")


def a_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def until(what, seconds, told):
    """Waits for a true answer and returns it."""
    deadline = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < deadline, f"{told} took more than {seconds} s"
        time.sleep(0.1)
    return answer


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A Slurm of this machine alone, with a state, ports and a key of its own; ended with the tests."""
    missing = [name for name in (*DAEMONS, "sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"Slurm is not installed: no {missing[0]} (Debian: apt-get install slurm-wlm munge)")
    if os.geteuid():
        pytest.skip("slurmd starts jobs as their owner: it must be run as root")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(
        SLURM_CONF.format(
            host=socket.gethostname().split(".")[0], folder=folder, ctld=a_port(), slurmd=a_port(),
            cpus=os.cpu_count(),
        )
    )  # fmt: skip
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(conf))
    munge = {name: folder / f"munge.{name}" for name in ("key", "socket", "pid", "seed", "log")}
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={munge['key']}", f"--socket={munge['socket']}",
         f"--pid-file={munge['pid']}", f"--seed-file={munge['seed']}", f"--log-file={munge['log']}"],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf)],
    ]  # fmt: skip
    daemons = []
    try:
        for command in commands:
            with (folder / "daemons.log").open("ab") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            if command[0] == "munged":
                until(munge["socket"].exists, 20, "munged")

        def idle():
            asked = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
            return "idle" in asked.stdout

        until(idle, 60, f"Slurm's start (see {folder})")
        yield folder
    finally:
        subprocess.run(["scancel", "--me"], capture_output=True, timeout=30)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        patch.undo()


def training(cache, workdir, **overrides):  # noqa: F811
    """The command of a small training run, as a list of words."""
    return [sys.executable, "-m", "s2s.main", *map(str, flags(cache, workdir, **overrides))]


def one_device(**more):
    """The environment of a user: one CPU device, nothing of pytest's but its compiled programs."""
    environment = {**os.environ, **PLAIN, **more}
    environment.pop("XLA_FLAGS", None)
    return environment


def steps_saved(workdir):
    """The newest checkpoint's step."""
    return max(
        (int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=0
    )


def assert_same_numbers(one, other):
    left, right = parameters(one), parameters(other)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=RTOL, atol=ATOL, err_msg=name)


@pytest.fixture(scope="session")
def single(tmp_path_factory, cache):  # noqa: F811
    """What one process on one device learns."""
    folder = tmp_path_factory.mktemp("single") / "work"
    subprocess.run(
        training(cache, folder, **OVERRIDES), cwd=ROOT, env=one_device(), check=True, capture_output=True
    )
    return folder
