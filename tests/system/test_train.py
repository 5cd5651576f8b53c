"""Whole runs: what they leave, what they refuse, and what they survive."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from s2s import config as config_lib
from s2s import train
from s2s.data import corpora
from s2s.infra import checkpoint
from s2s.workdir import Workdir, WorkdirError
from tests.system.conftest import ROOT, command, small


def parameters(folder):
    """The finished model's parameters, flat."""
    _, _, _, params = Workdir(folder).load()
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(params)}


def assert_same_model(one, other):
    left, right = parameters(one), parameters(other)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def stop_at(monkeypatch, step):
    """Sends this process SIGTERM after so many updates, where the loop looks for it."""
    real, seen = train.distributed.any_process, []

    def look(flag):
        seen.append(flag)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            return True
        return real(flag)

    monkeypatch.setattr(train.distributed, "any_process", look)


def settings(cache, **overrides):
    return config_lib.freeze(small(data__cache=str(cache), **overrides))


def flags(cache, workdir, **overrides):
    """The command line of `settings`."""
    given = {
        "data.train": "reverse", "data.task_size": 2000, "data.batch_tokens": 512, "data.max_shapes": 2,
        "data.vocab.kind": "symbols", "data.vocab.source_separator": " ", "data.cache": cache,
        "model.embedding": 16, "model.hidden": 32, "optim.learning_rate": 0.01, "run.log_every": 10,
        "run.metric": "loss", **overrides,
    }  # fmt: skip
    return [
        "--config", "experiments/luong_general.py", "--workdir", workdir,
        *(f"--config.{name}={value}" for name, value in given.items()),
    ]  # fmt: skip


def test_a_run_leaves_everything_it_promises(trained, capsys):
    kept = "config.json vocab checkpoints model metrics.jsonl tensorboard results.json"
    for name in [*kept.split(), "attention.png", "learning_curve.png"]:
        assert (trained / name).exists(), name
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == sorted(set(steps))
    losses = [line["dev/loss"] for line in lines if "dev/loss" in line]
    assert losses[-1] < losses[0]
    waits = [line["train/input_wait"] for line in lines if "train/loss" in line]
    assert all(0 <= wait < 1 for wait in waits)
    results = json.loads((trained / "results.json").read_text())
    assert 0 <= results["input_wait"] < 1
    assert 0 < results["padding"] <= results["array_padding"]
    # The same command again has nothing to do and says so.
    cfg = Workdir(trained).read_config()
    train.run(cfg, trained)
    assert "is finished" in capsys.readouterr().out


def test_another_experiment_is_not_trained_over(trained):
    config = small(**{"model__hidden": 64})
    with pytest.raises(WorkdirError, match=r"config.model.hidden: 32 there, 64 now"):
        train.run(config_lib.freeze(config), trained)


def test_stopped_by_a_signal_and_resumed_is_uninterrupted(tmp_path, cache, monkeypatch):
    cfg = settings(cache, run__steps=23, run__eval_every=10, optim__ema=0.9)
    train.run(cfg, tmp_path / "straight")
    # In the middle of an epoch and between two logged steps.
    stop_at(monkeypatch, 13)
    with pytest.raises(train.Interrupted, match="SIGTERM at step 13, saved"):
        train.run(cfg, tmp_path / "stopped")
    monkeypatch.undo()
    results = train.run(cfg, tmp_path / "stopped")
    assert results["steps"] == 23
    assert_same_model(tmp_path / "straight", tmp_path / "stopped")
    history = [
        json.loads((tmp_path / name / "results.json").read_text())["history"]
        for name in ("straight", "stopped")
    ]
    assert history[0] == history[1]


def test_damaged_checkpoint_is_skipped_and_the_run_ends_the_same(tmp_path, cache, monkeypatch):
    cfg = settings(cache, run__steps=20, run__save_every=5, run__eval_every=20)
    train.run(cfg, tmp_path / "straight")

    stop_at(monkeypatch, 12)
    with pytest.raises(train.Interrupted):
        train.run(cfg, tmp_path / "broken")
    monkeypatch.undo()
    newest = max((tmp_path / "broken" / "checkpoints").glob("*"), key=lambda path: int(path.name))
    assert newest.name == "12"
    largest = max(
        (path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.warns(checkpoint.CheckpointWarning, match="12"):
        train.run(cfg, tmp_path / "broken")
    assert_same_model(tmp_path / "straight", tmp_path / "broken")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, cache):
    cfg = settings(cache, run__steps=60, run__eval_every=5, optim__learning_rate=1e38, optim__name="sgd",
                   optim__clip_norm=0.0)  # fmt: skip
    with pytest.raises(train.Diverged, match=r"not finite somewhere in steps \d+ to \d+"):
        train.run(cfg, tmp_path / "work")
    for step in (tmp_path / "work" / "checkpoints").glob("*"):
        record = checkpoint.Checkpoints(tmp_path / "work" / "checkpoints").metrics(int(step.name))
        assert record is None or np.isfinite(record["loss"]), "what was saved was good"


def test_early_stopping_and_averaging(tmp_path, cache, capsys):
    cfg = settings(
        cache, run__epochs=50.0, run__eval_every=5, run__patience=2, run__average_last=2, run__keep_last=2,
        optim__learning_rate=0.0,
    )  # fmt: skip
    results = train.run(cfg, tmp_path / "work")
    assert results["steps"] == 15 and "stopped early" in capsys.readouterr().out
    assert results["model"] == "the mean of steps 15, 10"


def test_changed_training_data_is_not_resumed_on(tmp_path, cache):
    data = tmp_path / "pairs.tsv"

    def write(pairs):
        data.write_text("".join(f"{' '.join(word)}\t{' '.join(word[::-1])}\n" for word in pairs))

    words = [f"{a}{b}{c}" for a in "abcdef" for b in "abcdef" for c in "abcdef"]
    write(words)
    overrides = dict(data__train=str(data), data__source="0", data__target="1", run__metric="loss")
    train.run(settings(cache, run__steps=3, **overrides), tmp_path / "work")
    write(words[1:])
    with pytest.raises(WorkdirError, match="training data is not what"):
        train.run(settings(cache, run__steps=6, **overrides), tmp_path / "work")


def test_no_dev_part_keeps_the_last_model(tmp_path, cache):
    data = tmp_path / "pairs.tsv"
    data.write_text("".join(f"{a} {b}\t{b} {a}\n" for a in "abcdefgh" for b in "abcdefgh") + "\n\t\n")
    cfg = settings(cache, data__train=str(data), data__source="0", data__target="1", run__steps=4)
    results = train.run(cfg, tmp_path / "work")
    assert results["model"] == "the last" and results["scores"] == []
    assert parameters(tmp_path / "work")


@pytest.mark.parametrize("workdir", ["file", "file/work"])
def test_a_place_for_no_work_directory_is_told(tmp_path, cache, workdir):
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match=f"{workdir} cannot be made a work directory .*another --workdir"):
        train.run(settings(cache), tmp_path / workdir)


def test_missing_data_is_told(tmp_path, cache):
    cfg = settings(cache, data__train=str(tmp_path / "nothing"))
    with pytest.raises(corpora.CorpusError, match="nothing"):
        train.run(cfg, tmp_path / "work")


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_ends_the_same(tmp_path, cache):
    def start(workdir):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        environment.pop("XLA_FLAGS", None)
        arguments = flags(cache, workdir, **{"run.steps": 120, "run.save_every": 10, "run.eval_every": 40})
        return subprocess.Popen(
            [sys.executable, "-m", "s2s.main", *map(str, arguments)], cwd=ROOT, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(process):
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err.decode()

    finish(start(tmp_path / "straight"))
    stops = [(signal.SIGKILL, 20), (signal.SIGTERM, 60), (signal.SIGKILL, 90)]
    for number, after in stops:
        process = start(tmp_path / "killed")
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            steps = [int(p.name) for p in (tmp_path / "killed" / "checkpoints").glob("*") if p.name.isdigit()]
            if max(steps, default=0) >= after:
                break
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL, 128 + signal.SIGTERM), err.decode()
    finish(start(tmp_path / "killed"))
    assert_same_model(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.slow
def test_devices_and_processes_give_the_same_model(tmp_path, cache):
    overrides = {"run.steps": 12, "run.eval_every": 12, "data.batch_tokens": 1024, "model.dropout": 0.0}

    def arguments(name):
        return flags(cache, tmp_path / name, **overrides)

    command("s2s.main", *arguments("one"))
    # XLA_FLAGS of the command helper are removed, so this one brings its own.
    eight = subprocess.run(
        [sys.executable, "-m", "s2s.main", *map(str, arguments("eight"))], cwd=ROOT, capture_output=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )  # fmt: skip
    assert eight.returncode == 0, eight.stderr.decode()
    one, other = parameters(tmp_path / "one"), parameters(tmp_path / "eight")
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one_with_two_devices(tmp_path, cache, free_port):
    overrides = {"run.steps": 12, "run.eval_every": 12, "data.batch_tokens": 1024, "model.dropout": 0.2}
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)

    def start(name, *more, devices=1):
        env = {**environment, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        return subprocess.Popen(
            [sys.executable, "-m", "s2s.main", *map(str, flags(cache, tmp_path / name, **overrides)), *more],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    pair = [
        start("two", f"--coordinator=localhost:{free_port}", "--processes=2", f"--process={number}")
        for number in range(2)
    ]
    for process in [*pair, start("one", devices=2)]:
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out.decode()
    one, other = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--config.model.hiden=3"], """'hiden' Did you mean "hidden" instead of "hiden"?"""),
        (["--config.model.attention=genral"], "did you mean 'general'"),
        (["--config.model.attention=dot", "--config.model.encoder_hidden=10"], "use 'general'"),
        (["--config.data.train=no/such"], "no/such"),
    ],
)
def test_mistakes_on_the_command_line_are_told(tmp_path, arguments, told):
    done = command(
        "s2s.main", "--config", "experiments/luong_general.py", "--workdir", tmp_path / "w", *arguments,
        check=False, cache=tmp_path,
    )  # fmt: skip
    assert done.returncode != 0
    assert told in done.stderr.decode() + done.stdout.decode()
    assert not (tmp_path / "w" / "checkpoints").exists()
