"""Processes of one run: how they find each other, who is the main one, and waiting for all.

Decides where a run of several processes is told of: flags, environment or launcher. Must not know which
devices a process has nor what is on them (sharding).
"""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

# Number of processes, as launchers tell it to each process they start.
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


class DistributedError(ValueError):
    """Processes that cannot find each other; the message says what is missing."""


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of one run; a run of one process needs nothing and gets nothing.

    Must come before anything that asks for devices. Values not given are read from
    the environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
    what Slurm, Open MPI or a TPU pod set by themselves.

    Args:
      coordinator: host:port of process 0.
      num_processes: processes in the run.
      process_id: this process, from 0.

    Raises:
      DistributedError: some of the three are known and others are not, or one is no number.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = _number("JAX_PROCESS_ID") if process_id is None else process_id
    if coordinator is None and num_processes is None and process_id is None:
        pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
        if pod or any(int(os.environ.get(name, "1")) > 1 for name in _LAUNCHERS):
            jax.distributed.initialize()
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise DistributedError(
            f"a run of several processes needs all of coordinator={coordinator!r}, num_processes="
            f"{num_processes} and process_id={process_id}: give them, or set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    if num_processes > 1:
        jax.distributed.initialize(coordinator, num_processes, process_id)


def _number(name: str) -> int | None:
    """A whole number of the environment; None: it is not there."""
    value = os.environ.get(name)
    try:
        return None if value is None else int(value)
    except ValueError as error:
        raise DistributedError(f"{name}={value!r} in the environment must be a whole number") from error


def process_index() -> int:
    """This process, from 0."""
    return jax.process_index()


def process_count() -> int:
    """Processes in the run."""
    return jax.process_count()


def is_main_process() -> bool:
    """True in the one process that prints and writes."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """True in every process if the flag is true in any.

    Every process must call it, at the same place: it waits for all of them and for the
    steps already dispatched, so ask now and then, not at every step.
    """
    if process_count() == 1:
        return bool(flag)
    with jax.transfer_guard("allow"):
        return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def barrier(name: str) -> None:
    """Waits until every process has come here."""
    if process_count() > 1:
        multihost_utils.sync_global_devices(name)
