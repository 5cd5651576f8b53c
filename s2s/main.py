"""The training command: flags to a frozen config to the training driver.

    python -m s2s.main --config experiments/luong_general.py --workdir runs/mine --config.model.hidden=512

Decides only what a command line means. Must not import a driver (or jax) before the
flags are read: help and mistakes answer at once, and the worker processes of a data
loader import this module again.
"""

from __future__ import annotations

import os
import sys
import time
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from s2s import config as config_lib

# Before everything that takes long to import.
_BEGAN = time.monotonic()

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file with get_config(), such as experiments/luong_general.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where everything is kept; runs/NAME of the config by default."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for several processes.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.")
_PROCESS = flags.DEFINE_integer("process", None, "Number of this process, from 0.")


def main(argv: list[str]) -> None:
    """Trains what ``--config`` says, or goes on where an earlier run of it stopped."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; overrides look like --config.model.hidden=512")
    if _CONFIG.value is None:
        raise app.UsageError("give --config FILE, such as --config experiments/luong_general.py")
    try:
        cfg = config_lib.freeze(_CONFIG.value)
    except config_lib.ConfigError as error:
        _refuse(error)
    # JAX tells of every kind of device it does not find.
    logging.set_verbosity(logging.WARNING)
    workdir = _WORKDIR.value or os.path.join("runs", cfg.name)

    from s2s import train
    from s2s.data.corpora import CorpusError
    from s2s.data.vocab import VocabularyError
    from s2s.infra import distributed
    from s2s.infra.checkpoint import CheckpointError
    from s2s.workdir import WorkdirError

    try:
        distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
        train.run(cfg, workdir, began=_BEGAN)
    except train.Interrupted as stop:
        print(f"s2s: {stop}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    except (
        config_lib.ConfigError, CorpusError, VocabularyError, CheckpointError, WorkdirError, train.Diverged,
        distributed.DistributedError,
    ) as error:  # fmt: skip
        _refuse(error)
    except Exception:
        if distributed.process_count() == 1:
            raise
        # Most often another process is gone, for which JAX would wait at a usual exit.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _refuse(error: Exception) -> None:
    print(f"s2s: {error}", file=sys.stderr)
    sys.exit(2)


def _start() -> None:
    from s2s import commandline

    commandline.run(main)


if __name__ == "__main__":
    _start()
