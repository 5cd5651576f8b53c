"""Whole commands on tiny tasks."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from s2s import config as config_lib
from s2s import train

ROOT = Path(__file__).parents[2]


def small(**overrides):
    """A model and a task small enough to train in seconds; overrides by dotted name."""
    config = config_lib.default()
    config.data.train = "reverse"
    config.data.task_size = 2000
    config.data.batch_tokens = 512
    config.data.max_shapes = 2
    config.data.vocab.kind = "symbols"
    config.data.vocab.source_separator = " "
    config.model.embedding = 16
    config.model.hidden = 32
    config.optim.learning_rate = 0.01
    config.run.epochs = 1.0
    config.run.log_every = 10
    for name, value in overrides.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


def command(module, *arguments, stdin="", cache=None, check=True, **environment):
    """Runs ``python -m module`` as a user would: one CPU device, nothing of pytest's."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    env.pop("XLA_FLAGS", None)
    if cache is not None:
        env["XDG_CACHE_HOME"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        cwd=ROOT,
        env=env,
        timeout=600,
    )
    if check and done.returncode:
        raise AssertionError(f"{module} exited with {done.returncode}:\n{done.stderr.decode()}")
    return done


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder of prepared corpora that all system tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, cache):
    """The work directory of a small model that has learned to reverse somewhat; not to be changed."""
    root = tmp_path_factory.getbasetemp()
    # One for all processes of a test run: whoever comes first trains it.
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "trained"
    with (root / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        config = small(data__cache=str(cache), run__epochs=2.0, run__metric="exact_match")
        if not (folder / "results.json").exists():
            train.run(config_lib.freeze(config), folder)
    assert json.loads((folder / "results.json").read_text())["steps"] > 0
    return folder


@pytest.fixture
def free_port():
    """A TCP port on this machine that nothing listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
