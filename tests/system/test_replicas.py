"""Several runs as one program: each ends as it would alone, whatever becomes of the others."""

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from s2s import config as config_lib
from s2s import train
from s2s.config import ConfigError
from s2s.data import plan
from s2s.infra import sharding
from s2s.train.prepare import prepare
from s2s.workdir import Workdir, WorkdirError
from tests.system.conftest import ROOT, command, small
from tests.system.test_train import assert_same_model, flags, parameters, stop_at


def write_pairs(path, pairs, letters, longest, seed):
    """Words and their reverse."""
    rng = np.random.default_rng(seed)
    words = [rng.choice(list(letters), rng.integers(2, longest + 1)) for _ in range(pairs)]
    path.write_text("".join(f"{' '.join(word)}\t{' '.join(word[::-1])}\n" for word in words))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two corpora of different alphabets, lengths and sizes, with a dev part each."""
    folder = tmp_path_factory.mktemp("data")
    for name, letters, longest, pairs in (("one", "abcdefgh", 13, 700), ("two", "mnopqrstuvwxyz", 8, 300)):
        write_pairs(folder / f"{name}.tsv", pairs, letters, longest, 1)
        write_pairs(folder / f"{name}.dev.tsv", 40, letters, longest, 2)
    return folder


@pytest.fixture(scope="module")
def settings(data, cache):
    """Makes configurations of runs on a corpus; overrides by dotted name."""

    def make(corpus="one", **overrides):
        return config_lib.freeze(
            small(**{
                "data__cache": str(cache), "data__train": str(data / f"{corpus}.tsv"),
                "data__dev": str(data / f"{corpus}.dev.tsv"), "data__source": "0", "data__target": "1",
                "data__batch_tokens": 256, "data__max_shapes": 1, "run__steps": 24, "run__eval_every": 10,
                # Adam would make steps of 0.01 of gradients that are rounding alone.
                "run__log_every": 5, "optim__epsilon": 1e-4, **overrides,
            })
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def together(settings, tmp_path_factory):
    """The work directory of two replicas trained without a break."""
    folder = tmp_path_factory.mktemp("together") / "work"
    train.run(settings(run__replicas=2), str(folder))
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


def assert_like_models(one, other):
    """Equal up to the order of sums: float32, some tens of updates."""
    left, right = parameters(one), parameters(other)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-4, atol=1e-5, err_msg=name)


def assert_same_history(one, other):
    assert len(results(one)["history"]) == len(results(other)["history"]) > 0
    for mine, theirs in zip(results(one)["history"], results(other)["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_replicas_are_the_runs_that_they_would_be_alone(together, settings, tmp_path):
    for seed, replica in enumerate(Workdir(together).replicas, start=1):
        train.run(settings(run__seed=seed), tmp_path / str(seed))
        assert_like_models(tmp_path / str(seed), replica.path)
        assert_same_history(tmp_path / str(seed), replica.path)
        steps = [json.loads(line)["step"] for line in replica.metrics.read_text().splitlines()]
        alone = (tmp_path / str(seed) / "metrics.jsonl").read_text().splitlines()
        assert steps == [json.loads(line)["step"] for line in alone]
        assert replica.read_config() == settings(run__seed=seed)
    first, second = (parameters(replica.path) for replica in Workdir(together).replicas)
    assert any(np.abs(first[name] - second[name]).max() > 0.01 for name in first)


def test_replicas_leave_their_means_and_ordinary_work_directories(together, settings, capsys):
    assert [replica.path.name for replica in Workdir(together).replicas] == ["replica_01", "replica_02"]
    for replica in Workdir(together).replicas:
        kept = "config.json vocab checkpoints model metrics.jsonl tensorboard results.json"
        for name in [*kept.split(), "attention.png", "learning_curve.png"]:
            assert (replica.path / name).exists(), name
        assert not replica.replicas
    whole = results(together)
    assert [(each["folder"], each["seed"]) for each in whole["replicas"]] == [
        ("replica_01", 1),
        ("replica_02", 2),
    ]
    (row,) = whole["scores"]
    assert (row["part"], row["pairs"], row["search"]) == ("dev", 40, "greedy")
    values = [results(replica.path)["scores"][0]["loss"] for replica in Workdir(together).replicas]
    assert row["loss"] == {
        "mean": pytest.approx(np.mean(values)), "sd": pytest.approx(np.std(values, ddof=1)), "values": values
    }  # fmt: skip
    # The same command again has nothing to do and says so.
    train.run(settings(run__replicas=2), str(together))
    out = capsys.readouterr().out
    assert "is finished" in out and "replica_02" in out and "mean" in out
    with pytest.raises(WorkdirError, match=r"config.run.replicas: 2 there, 1 now"):
        train.run(settings(), str(together))


def test_a_replica_translates_alone(together, cache):
    done = command(
        "s2s.translate", "--workdir", Workdir(together).replicas[1].path, stdin="a b c\n", cache=cache
    )
    assert len(done.stdout.decode().splitlines()) == 1


def test_stopped_by_a_signal_and_resumed_is_uninterrupted(together, settings, tmp_path, monkeypatch):
    stop_at(monkeypatch, 13)
    with pytest.raises(train.Interrupted, match="SIGTERM at step 13, saved"):
        train.run(settings(run__replicas=2), str(tmp_path / "w"))
    monkeypatch.undo()
    train.run(settings(run__replicas=2), str(tmp_path / "w"))
    for one, other in zip(Workdir(together).replicas, Workdir(tmp_path / "w").replicas, strict=True):
        assert_same_model(one.path, other.path)
        assert results(one.path)["history"] == results(other.path)["history"]


def test_members_left_at_different_steps_catch_up(together, settings, tmp_path, monkeypatch, capfd):
    stop_at(monkeypatch, 16)
    with pytest.raises(train.Interrupted):
        train.run(settings(run__replicas=2), str(tmp_path / "w"))
    monkeypatch.undo()
    # As if the kill had come between the one's checkpoint and the other's.
    shutil.rmtree(tmp_path / "w" / "replica_01" / "checkpoints" / "16")
    train.run(settings(run__replicas=2), str(tmp_path / "w"))
    told = capfd.readouterr().err
    assert "going on from step 10" in told and "going on from step 16" in told
    for one, other in zip(Workdir(together).replicas, Workdir(tmp_path / "w").replicas, strict=True):
        assert_same_model(one.path, other.path)


def test_a_member_goes_on_alone_and_the_others_without_it(together, settings, tmp_path, monkeypatch):
    stop_at(monkeypatch, 13)
    with pytest.raises(train.Interrupted):
        train.run(settings(run__replicas=2), str(tmp_path / "w"))
    monkeypatch.undo()
    train.run(settings(run__seed=2), tmp_path / "w" / "replica_02")
    train.run(settings(run__replicas=2), str(tmp_path / "w"))
    for one, other in zip(Workdir(together).replicas, Workdir(tmp_path / "w").replicas, strict=True):
        assert_like_models(one.path, other.path)


def test_one_that_diverges_leaves_the_other_as_it_is(settings, tmp_path):
    common = {"optim__name": "sgd", "optim__clip_norm": 0.0}
    runs = [
        train.Run(settings(optim__learning_rate=rate, **common), str(tmp_path / str(number)))
        for number, rate in enumerate((1e38, 0.1))
    ]
    for _ in range(2):
        bad, good = train.run_together(runs)
        assert bad.results is None and "not finite somewhere in steps 1 to 4" in bad.failure
        assert json.loads((tmp_path / "0" / "failure.json").read_text()) == {"reason": bad.failure}
        assert good.failure is None and good.results["steps"] == 24
    train.run(runs[1].cfg, str(tmp_path / "alone"))
    assert_like_models(tmp_path / "1", tmp_path / "alone")


def test_each_stops_early_by_itself(settings, tmp_path, capsys):
    common = {"run__patience": 2, "run__eval_every": 5, "run__metric": "loss"}
    runs = [
        train.Run(settings(optim__learning_rate=rate, **common), str(tmp_path / str(number)))
        for number, rate in enumerate((0.01, 0.0))
    ]
    moving, resting = train.run_together(runs)
    assert (moving.results["steps"], resting.results["steps"]) == (24, 15)
    assert "1: stopped early" in capsys.readouterr().out
    assert resting.results["model"].startswith("that of step 5")


def test_two_corpora_with_vocabularies_of_their_own(settings, tmp_path, monkeypatch):
    def runs(name):
        length = {"run__steps": None, "run__epochs": 0.5}
        return [
            train.Run(settings(corpus, **length), str(tmp_path / name / corpus)) for corpus in ("one", "two")
        ]

    straight = train.run_together(runs("straight"))
    steps = [outcome.results["steps"] for outcome in straight]
    assert steps[0] > steps[1] > 5
    sizes = [parameters(outcome.folder)["['target_embedding']"].shape[0] for outcome in straight]
    assert sizes[1] > sizes[0]
    # Interrupted, and the smaller going on alone: with the batch shapes that suited both.
    stop_at(monkeypatch, 6)
    with pytest.raises(train.Interrupted):
        train.run_together(runs("stopped"))
    monkeypatch.undo()
    train.run(*runs("stopped")[1])
    assert_like_models(runs("stopped")[1].folder, straight[1].folder)


def test_one_compilation_a_batch_shape_for_all(settings, tmp_path):
    programs = []

    def listen(event, seconds, *, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(fun_name)

    runs = [(settings(run__seed=seed, data__max_shapes=2), Workdir(tmp_path / str(seed))) for seed in (1, 2)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        ready = prepare(runs, sharding.make_mesh(), print)
        layouts = [member.layout for member in ready.members]
        assert len(layouts[0].buckets) == 2
        with ready.members[0].reporter, ready.members[1].reporter, ready.program.compiled:
            for epoch in range(2):
                first_epoch = list(programs) if epoch else []
                _, ticks = plan.walk(layouts, [(epoch, 0), (epoch, 0)])
                assert len(ticks) == layouts[0].batches_per_epoch
                for batch in ready.program.batches(ticks, epoch):
                    with jax.transfer_guard("disallow"):
                        ready.program.update(batch, [True, True])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert programs == first_epoch
    # One first state, and one update a shape.
    assert sorted(collections.Counter(programs).values())[-1:] == [2], programs


def test_runs_that_do_not_fit_together_are_told(settings, tmp_path):
    one = train.Run(settings(), str(tmp_path / "one"))
    with pytest.raises(ConfigError, match=r"differ in config.model.hidden"):
        train.run_together([one, train.Run(settings(model__hidden=64), str(tmp_path / "two"))])
    with pytest.raises(ConfigError, match="folder of two runs"):
        train.run_together([one, one])
    with pytest.raises(ConfigError, match="replicas=2 must be 1"):
        train.run_together([train.Run(settings(run__replicas=2), str(tmp_path / "two"))])


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_ends_the_same(tmp_path, cache):
    def start(workdir):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        environment.pop("XLA_FLAGS", None)
        arguments = flags(
            cache,
            workdir,
            **{"run.steps": 120, "run.save_every": 10, "run.eval_every": 40, "run.replicas": 2},
        )
        return subprocess.Popen(
            [sys.executable, "-m", "s2s.main", *map(str, arguments)], cwd=ROOT, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(process):
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err.decode()

    finish(start(tmp_path / "straight"))
    for number, after in [(signal.SIGKILL, 20), (signal.SIGTERM, 60), (signal.SIGKILL, 90)]:
        process = start(tmp_path / "killed")
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            saved = (tmp_path / "killed").glob("replica_02/checkpoints/*")
            if max((int(path.name) for path in saved if path.name.isdigit()), default=0) >= after:
                break
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL, 128 + signal.SIGTERM), err.decode()
    finish(start(tmp_path / "killed"))
    pairs = zip(Workdir(tmp_path / "straight").replicas, Workdir(tmp_path / "killed").replicas, strict=True)
    for one, other in pairs:
        assert_same_model(one.path, other.path)
