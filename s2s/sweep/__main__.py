"""The sweeping command: an experiment's axes to cells, cells to programs, programs to jobs.

    python -m s2s.sweep --config experiments/ablation_scores.py --workdir runs/scores --dry_run

Decides what a command line means. Must not import a driver (or jax) before the flags are read:
help and mistakes answer at once.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from s2s import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "A file with get_config() and sweep(), such as experiments/ablation_scores.py; what follows a colon "
    "is given to both.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the sweep is kept; runs/NAME of the config by default."
)
_DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print the plan, and train nothing.")
_LAUNCHER = flags.DEFINE_enum("launcher", "local", ["local", "slurm"], "Who runs the programs.")
_JOBS = flags.DEFINE_integer(
    "jobs", None, "Programs at a time; by default one here, and what Slurm allows there.", lower_bound=1
)
_MAX_REPLICAS = flags.DEFINE_integer(
    "max_replicas", None, "Most cells in one program; by default what fills the machine.", lower_bound=1
)
_MACHINE = flags.DEFINE_string(
    "machine",
    None,
    "What a program runs on, PLATFORM[:GIB[:UNITS]], such as gpu:80; by default this machine.",
)
_SLURM = flags.DEFINE_multi_string(
    "slurm", [], "NAME=VALUE of submitit's AutoExecutor, such as timeout_min=600 or gpus_per_node=1."
)
_RETRY_FAILED = flags.DEFINE_boolean("retry_failed", False, "Try cells that failed again, each alone.")
_PROGRAM = flags.DEFINE_string("program", None, "Train this program of --workdir's plan: what a job does.")

# Run in a process of its own: whoever plans must leave the device to those who train.
_LOOK = (
    "import json; from s2s.infra import sharding; mesh = sharding.make_mesh(); one = mesh.devices.flat[0]; "
    "print(json.dumps([one.platform, mesh.size, (one.memory_stats() or {}).get('bytes_limit', 0)]))"
)


def main(argv: list[str]) -> None:
    """Plans a sweep and trains what is missing of it."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; overrides look like --config.model.hidden=512")
    # JAX tells of every kind of device it does not find.
    logging.set_verbosity(logging.WARNING)
    try:
        sys.exit(_train(_PROGRAM.value) if _PROGRAM.value else _sweep())
    except ValueError as error:
        print(f"s2s: {error}", file=sys.stderr)
        sys.exit(2)


def _train(program: str) -> int:
    """What a job does."""
    if not _WORKDIR.value:
        raise app.UsageError("--program needs the --workdir of its sweep")

    from s2s import train
    from s2s.sweep import running as sweeping

    try:
        return sweeping.train_program(Path(_WORKDIR.value), program, _JOBS.value or 1)
    except train.Interrupted as stop:
        print(f"s2s: {stop}", file=sys.stderr)
        return 128 + stop.signal


def _sweep() -> int:
    if _CONFIG.value is None:
        raise app.UsageError("give --config FILE, such as --config experiments/ablation_scores.py")
    base = config_lib.freeze(_CONFIG.value)
    folder = Path(_WORKDIR.value or os.path.join("runs", base.name)).absolute()

    from s2s.infra import launchers
    from s2s.sweep import cells as cells_lib
    from s2s.sweep import ensembles, grouping, watch
    from s2s.sweep import running as sweeping
    from s2s.sweep.sizes import Measured

    flag = flags.FLAGS["config"]
    overridden = set(config_flags.get_override_values(flag))
    cells = cells_lib.make_cells(
        _CONFIG.value.to_dict(), _points(config_flags.get_config_filename(flag)), overridden
    )
    old = grouping.read_plan(folder)
    home = cells_lib.home(folder)
    if old is not None:
        cells, remarks = cells_lib.settle(cells, old.cells, home, base, old.base)
        for remark in remarks:
            print(remark, file=sys.stderr)
    machine = _machine()
    retried = {
        cell.name for cell in cells if _RETRY_FAILED.value and cells_lib.state(cell, home) == cells_lib.FAILED
    }
    costs = grouping.costs(cells, Measured(), machine)
    programs = grouping.programs(
        cells, old, costs, machine, most=_MAX_REPLICAS.value, jobs=_JOBS.value or 1, apart=retried
    )
    plan = grouping.make_plan(base, cells, programs, costs)
    if _DRY_RUN.value:
        states = {cell.name: cells_lib.state(cell, home) for cell in cells}
        states |= dict.fromkeys(retried, cells_lib.TO_COME)
        print(grouping.told(plan, costs, machine, states))
        return 0

    def launch(jobs: Sequence[Any], watching: Any) -> dict[str, int]:
        if _LAUNCHER.value == "slurm":
            return launchers.launch_slurm(jobs, folder / "slurm", _slurm_parameters(), watching)
        return launchers.launch_local(jobs, _JOBS.value or 1, watching)

    command = [sys.executable, "-m", "s2s.sweep", f"--workdir={folder}"]
    if _LAUNCHER.value == "local" and machine.platform == "cpu" and (_JOBS.value or 1) > 1:
        command.append(f"--jobs={_JOBS.value}")
    with sweeping.alone(folder):
        cells_lib.forgive([cell for cell in cells if cell.name in retried], home)
        try:
            plan = sweeping.run(folder, plan, launch, [*command, "--program"])
            if together := ensembles.jobs(plan.cells, folder):
                print(f"{len(together)} ensembles of seeds", file=sys.stderr)
                codes = launch(together, lambda states: None)
                for job in together:
                    if codes[job.name]:
                        print(f"s2s: no ensemble of {job.name}: see {job.log}", file=sys.stderr)
        except launchers.Stopped as stop:
            print(f"s2s: {stop}", file=sys.stderr)
            return 128 + stop.signal
    text, code = watch.ending(plan, folder)
    print(text)
    return code


def _points(config: str) -> Any:
    """Calls sweep() of the experiment's file, with what follows the colon if anything does.

    Raises:
      SweepError: the file has none.
    """
    from s2s.sweep.cells import SweepError

    path, colon, given = config.partition(":")
    spec = importlib.util.spec_from_file_location("experiment", path)
    assert spec is not None and spec.loader is not None  # the flag has read it before
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise SweepError(
            f"{path} has no sweep(): write one beside get_config() that returns axes, as "
            "experiments/ablation_scores.py does, or train its one run with s2s.main"
        )
    return module.sweep(*[given] if colon else [])


def _machine() -> Any:
    """What one program runs on."""
    from s2s.sweep import cost

    if _MACHINE.value is not None:
        return cost.read_machine(_MACHINE.value)
    jobs = (_JOBS.value or 1) if _LAUNCHER.value == "local" else 1
    found = cost.this_cpu()
    if not os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = subprocess.run([sys.executable, "-c", _LOOK], capture_output=True, text=True, env=environment)
        if done.returncode == 0 and done.stdout.strip():
            platform, units, memory = json.loads(done.stdout.splitlines()[-1])
            if platform in cost.PLATFORMS and platform != "cpu":
                return cost.Machine(platform, units, units * memory or cost.PLATFORMS[platform].memory)
    return cost.Machine("cpu", max(1, found.units // jobs), found.memory / jobs)


def _slurm_parameters() -> dict[str, Any]:
    """--slurm NAME=VALUE as submitit takes them.

    Raises:
      SweepError: one has no name or no value.
    """
    from s2s.sweep.cells import SweepError

    found: dict[str, Any] = {}
    if _JOBS.value:
        found["slurm_array_parallelism"] = _JOBS.value
    for given in _SLURM.value:
        name, equals, value = given.partition("=")
        if not name or not equals:
            raise SweepError(f"--slurm={given} is no NAME=VALUE, such as timeout_min=600")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _start() -> None:
    from s2s import commandline

    commandline.run(main)


if __name__ == "__main__":
    _start()
