"""Sweeps: only what is missing is done, and what fails takes nothing with it."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from s2s import axes, train
from s2s import config as config_lib
from s2s.sweep import cells, cost, grouping, watch
from s2s.sweep import running as sweeping
from s2s.workdir import Workdir
from tests.system.conftest import ROOT, command, small

EXPERIMENT = """
from s2s import axes
from s2s import config as config_lib


def get_config(seeds="3"):
    config = config_lib.default()
    config.name = "tiny"
    config.data.train = config.data.dev = "{data}"
    config.data.source, config.data.target = "0", "1"
    config.data.batch_tokens = 128
    config.data.max_shapes = 1
    config.data.vocab.kind = "symbols"
    config.data.vocab.source_separator = " "
    config.model.embedding = 8
    config.model.hidden = 16
    config.run.steps = 120
    config.run.log_every = 5
    config.run.save_every = 5
    config.run.eval_sentences = 20
    return config


def sweep(seeds="3"):
    return axes.product(axes.grid({"optim.learning_rate": [0.01]}), axes.seeds(int(seeds)))
"""


class Machine:
    """Jobs that run in this process, so that only what is tested takes time."""

    def __init__(self, folder):
        self.folder, self.launched = folder, []

    def __call__(self, jobs, watching):
        codes = {}
        for job in jobs:
            self.launched.append(job.name)
            watching({job.name: "running"})
            codes[job.name] = sweeping.train_program(self.folder, job.command[-1])
        return codes


def swept(folder, cache, points, machine, **options):
    """Plans and runs a sweep of tiny models as the command does; its plan."""
    base = small(data__cache=str(cache), data__task_size=400, run__steps=4, run__eval_sentences=10,
                 model__embedding=8, model__hidden=16, data__max_shapes=1, run__log_every=1)  # fmt: skip
    made, frozen = cells.make_cells(base.to_dict(), points), config_lib.freeze(base)
    old = grouping.read_plan(folder)
    if old is not None:
        made, _ = cells.settle(made, old.cells, cells.home(folder), frozen, old.base)
    costs = {cell.name: cost.Cost(1, 4, 1.0, 1.0, 0.01, 1.0, 1.0) for cell in made}
    programs = grouping.programs(made, old, costs, cost.this_cpu(), **options)
    plan = grouping.make_plan(frozen, made, programs, costs)
    return sweeping.run(folder, plan, machine, ["train"])


def states(plan, folder):
    return {cell.name: cells.state(cell, cells.home(folder)) for cell in plan.cells}


RATES = axes.axis("optim.learning_rate", [0.01, 0.02])


@pytest.fixture
def trainer(monkeypatch):
    """Training without any: a run is done at once, or diverges where its learning rate is high."""

    def one(cfg, folder):
        work, rate = Workdir(folder), cfg.optim.learning_rate
        work.write_config(cfg)
        if rate > 1:
            raise train.Diverged("the loss is not finite")
        scores = [{"part": part, "search": "greedy", "loss": rate} for part in ("dev", "test")]
        work.results.write_text(json.dumps({"scores": scores, "parameters": 1}))

    def together(runs):
        for each in runs:
            try:
                one(*each)
            except train.Diverged as error:
                Workdir(each.folder).write_failure(str(error))

    monkeypatch.setattr(train, "run_together", together)
    monkeypatch.setattr(train, "run", one)


def test_cells_are_done_once(tmp_path, cache, trainer):
    machine = Machine(tmp_path)
    plan = swept(tmp_path, cache, RATES, machine)
    assert machine.launched == ["p001"] and set(states(plan, tmp_path).values()) == {cells.DONE}
    swept(tmp_path, cache, RATES, machine)
    assert machine.launched == ["p001"], "nothing is missing"
    # More cells: only they are trained.
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/results.json")}
    plan = swept(tmp_path, cache, axes.axis("optim.learning_rate", [0.01, 0.03, 0.02]), machine)
    assert machine.launched == ["p001", "p002"] and len(states(plan, tmp_path)) == 3
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
    text, code = watch.ending(plan, tmp_path)
    assert code == 0 and "learning_rate=0.03" in text and "best on dev: learning_rate=0.01" in text


def test_a_cell_that_diverges_takes_no_other_with_it(tmp_path, cache, trainer):
    machine = Machine(tmp_path)
    points = axes.product(axes.axis("optim.learning_rate", [0.01, 1e30]), axes.axis("optim.name", ["sgd"]))
    plan = swept(tmp_path, cache, points, machine)
    good, bad = plan.cells
    assert states(plan, tmp_path) == {good.name: cells.DONE, bad.name: cells.FAILED}
    text, code = watch.ending(plan, tmp_path)
    assert code == 1 and "1 of 2 cells failed; --retry_failed" in text and "not finite" in text
    swept(tmp_path, cache, points, machine)
    assert machine.launched == ["p001"], "what failed is not tried again by itself"
    cells.forgive([bad], cells.home(tmp_path))
    plan = swept(tmp_path, cache, points, machine, apart=[bad.name])
    assert machine.launched == ["p001", "p002"] and plan.programs[1].cells == (bad.name,)


def test_what_cannot_be_trained_together_is_trained_one_by_one(tmp_path, cache, monkeypatch):
    def fails(runs):
        raise RuntimeError("out of memory")

    def one(cfg, folder):
        if cfg.optim.learning_rate == 0.02:
            raise ValueError("no such corpus")
        Workdir(folder).write_config(cfg)
        (Workdir(folder).path / "results.json").write_text("{}")

    monkeypatch.setattr(train, "run_together", fails)
    monkeypatch.setattr(train, "run", one)
    plan = swept(tmp_path, cache, RATES, Machine(tmp_path))
    good, bad = plan.cells
    assert states(plan, tmp_path) == {good.name: cells.DONE, bad.name: cells.FAILED}
    assert cells.failure(bad, cells.home(tmp_path)) == "no such corpus"


def test_a_program_that_dies_is_taken_apart_and_then_given_up(tmp_path, cache):
    launched = []

    def machine(jobs, watching):
        for job in jobs:
            launched.append(job.name)
            job.log.write_text("first\nno more memory\n")
        return {job.name: 137 for job in jobs}

    plan = swept(tmp_path, cache, RATES, machine)
    assert launched == ["p001", "p002", "p003"]
    assert set(states(plan, tmp_path).values()) == {cells.FAILED}
    told = cells.failure(plan.cells[0], cells.home(tmp_path))
    assert "exit code 137, killed: out of memory?" in told and told.endswith("first\nno more memory")


def test_a_program_that_was_stopped_has_not_failed(tmp_path, cache):
    plan = swept(tmp_path, cache, RATES, lambda jobs, watching: {job.name: 143 for job in jobs})
    assert set(states(plan, tmp_path).values()) == {cells.TO_COME}
    text, code = watch.ending(plan, tmp_path)
    assert code == 1 and "2 cells were stopped; the same command goes on" in text


def test_progress_is_that_of_all_cells(tmp_path, cache):
    plan = swept(tmp_path, cache, RATES, lambda jobs, watching: {job.name: 143 for job in jobs})
    home = cells.home(tmp_path)
    one, other = (home / cell.name for cell in plan.cells)
    for folder, step in ((one, 2), (other, 1)):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(f'{{"step": {step}, "train/loss": 1}}\n{{"step": 9, "tr')
    watching = watch.Watch(plan, home)
    assert watching.share() == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert watching.states({"p001": "running"}) == ["running", "running"]
    cells.fail(plan.cells[0], home, "x")
    assert watching.states({"p001": "running"}) == ["failed", "running"]
    # What has failed is behind us as well.
    line = watching.line((0, 1, 1, 0), now=10.0)
    assert line == "2 cells: 0 done, 1 running, 1 failed, 0 to come  62 %  ? left"
    (other / "metrics.jsonl").write_text('{"step": 2}\n')
    assert watching.line((0, 1, 1, 0), now=20.0).endswith("75 %  0:20 left")


def test_two_sweeps_do_not_share_a_work_directory(tmp_path):
    with sweeping.alone(tmp_path), pytest.raises(cells.SweepError, match="swept by another process"):
        with sweeping.alone(tmp_path):
            pass


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux gives cores away")
def test_programs_side_by_side_keep_to_cores_of_their_own(tmp_path):
    (tmp_path / "programs").mkdir()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("there is one core")
    with (tmp_path / "programs" / "cores-0.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with sweeping._own_cores(tmp_path, 2):
            assert sorted(os.sched_getaffinity(0)) == cores[1::2]
    with sweeping._own_cores(tmp_path, 2):
        assert sorted(os.sched_getaffinity(0)) == cores[0::2]
    assert sorted(os.sched_getaffinity(0)) == cores


def arguments(tmp_path, cache, *more, seeds="3"):
    experiment, data = tmp_path / "tiny.py", tmp_path / "pairs.tsv"
    data.write_text("".join(f"{a} {b}\t{b} {a}\n" for a in "abcdefgh" for b in "abcdefgh"))
    experiment.write_text(EXPERIMENT.replace("{data}", str(data)))
    return [
        "--config", f"{experiment}:{seeds}", "--workdir", tmp_path / "w", f"--config.data.cache={cache}",
        *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_plans_and_tells_what_is_wrong(tmp_path, cache):
    done = command("s2s.sweep", *arguments(tmp_path, cache, "--dry_run", seeds="6"))
    out = done.stdout.decode()
    assert "learning_rate=0.01_seed=1  p001     to come" in out
    assert "6 of 6 cells to train in 1 program," in out
    assert not (tmp_path / "w").exists(), "a dry run leaves nothing"
    for override, told in (
        ("--config.optim.learning_rate=1", "leave the override out"),
        ("--config.model.attention=genral", "did you mean 'general'"),
    ):
        done = command("s2s.sweep", *arguments(tmp_path, cache, "--dry_run", override), check=False)
        assert done.returncode == 2 and told in done.stderr.decode()
    done = command("s2s.sweep", "--config", "experiments/g2p.py", "--workdir", tmp_path / "w", check=False)
    assert done.returncode == 2 and "g2p.py has no sweep()" in done.stderr.decode()


@pytest.mark.slow
def test_killed_and_started_again_only_what_is_missing_is_done(tmp_path, cache):
    """Killed by SIGKILL in the first program, stopped by SIGTERM in the second, and finished."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)

    def start():
        more = arguments(tmp_path, cache, "--max_replicas=2")
        return subprocess.Popen(
            [sys.executable, "-m", "s2s.sweep", *map(str, more)], cwd=ROOT, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def wait(cell):
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            saved = tmp_path / "w" / "cells" / cell / "checkpoints"
            if any(path.name.isdigit() and int(path.name) >= 10 for path in saved.glob("*")):
                return
            time.sleep(0.02)
        raise AssertionError(process.communicate()[1].decode())

    process = start()
    wait("learning_rate=0.01_seed=1")
    process.kill()
    process.communicate()
    process = start()
    wait("learning_rate=0.01_seed=3")
    first = [tmp_path / "w" / "cells" / f"learning_rate=0.01_seed={seed}" / "results.json" for seed in (1, 2)]
    when = [path.stat().st_mtime_ns for path in first]
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err.decode()
    assert b"the same command goes on from there" in err
    process = start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    assert [path.stat().st_mtime_ns for path in first] == when
    for cell in grouping.read_plan(tmp_path / "w").cells:
        work = Workdir(tmp_path / "w" / "cells" / cell.name)
        assert work.load()[0] == cell.cfg, "an ordinary run"
        assert json.loads(work.results.read_text())["steps"] == 120
    assert "going on from step" in (tmp_path / "w" / "programs" / "p001.log").read_text()
    assert b"3 cells: 3 done" in err and "± " in out.decode()
