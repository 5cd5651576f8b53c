"""Processes of one run: alone, and told too little about each other."""

import pytest

from s2s.infra import distributed
from s2s.infra.distributed import DistributedError
from tests.system.conftest import command


@pytest.fixture(autouse=True)
def told_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_the_main_one_and_asks_nobody():
    distributed.initialize()
    assert (distributed.process_index(), distributed.process_count()) == (0, 1)
    assert distributed.is_main_process()
    assert distributed.any_process(True) is True
    assert distributed.any_process(False) is False
    distributed.barrier("nobody else")


def test_half_an_address_is_refused():
    with pytest.raises(
        DistributedError, match="coordinator='localhost:1', num_processes=2 and process_id=None"
    ):
        distributed.initialize("localhost:1", 2)
    with pytest.raises(DistributedError, match="JAX_COORDINATOR_ADDRESS"):
        distributed.initialize(num_processes=2, process_id=0)
    distributed.initialize("localhost:1", 1, 0)
    assert distributed.process_count() == 1


@pytest.mark.parametrize("name", ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_half_an_environment_is_refused(monkeypatch, name):
    """Else each process would train by itself, all of them into one work directory."""
    monkeypatch.setenv(name, "1")
    with pytest.raises(DistributedError, match="needs all of"):
        distributed.initialize()


def test_a_number_that_is_none_is_told(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(DistributedError, match="JAX_NUM_PROCESSES='two' in the environment must be a whole"):
        distributed.initialize("localhost:1", process_id=0)


@pytest.mark.slow
def test_the_command_tells_and_does_not_trace():
    done = command("s2s.main", "--config=experiments/luong_general.py", "--processes=2", check=False)
    told = done.stderr.decode()
    assert done.returncode == 2 and told.startswith("s2s: a run of several processes needs all of")
