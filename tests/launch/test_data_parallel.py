"""Several processes over the network stack (gloo on CPU): the numbers of one, and no end without the dead."""

import signal
import subprocess
import time

import pytest

from tests.launch.conftest import (
    OVERRIDES,
    ROOT,
    STEPS,
    assert_same_numbers,
    one_device,
    steps_saved,
    training,
    until,
)  # fmt: skip

pytestmark = pytest.mark.slow


def start(count, cache, folder, port):
    """Starts the processes of one run."""
    processes = []
    for number in range(count):
        where = [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={number}"]
        with (folder.parent / f"{number}.log").open("ab") as log:
            processes.append(
                subprocess.Popen(
                    [*training(cache, folder, **OVERRIDES), *where],
                    cwd=ROOT, env=one_device(), stdout=log, stderr=log,
                )
            )  # fmt: skip
    return processes


def test_four_processes_one_of_them_killed_learn_what_one_learns(tmp_path, cache, free_port, single):
    """A dead process ends the others, and the same commands again go on to the end."""
    work = tmp_path / "work"
    four = start(4, cache, work, free_port)
    try:
        until(lambda: steps_saved(work) >= 15 or four[2].poll() is not None, 400, "15 updates")
        four[2].send_signal(signal.SIGKILL)
        # JAX takes a process for dead that is silent for 100 seconds; what launches them may be faster.
        deadline = time.monotonic() + 200
        for process in four:
            assert process.wait(timeout=max(deadline - time.monotonic(), 0)) != 0
    finally:
        for process in four:
            process.kill()
            process.wait()
    assert 15 <= steps_saved(work) < STEPS and not (work / "results.json").exists()
    for number, process in enumerate(start(4, cache, work, free_port)):
        assert process.wait(timeout=400) == 0, (tmp_path / f"{number}.log").read_text()
    assert_same_numbers(single, work)
