"""What comes back from a checkpoint is exactly what was saved, or nothing at all."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2s.infra import checkpoint, sharding
from s2s.infra.checkpoint import CheckpointError, Checkpoints, CheckpointWarning, load_params, save_params


class Moments(NamedTuple):
    count: Any
    mu: Any


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    key: Any


def make_state(seed, width=3):
    rng = np.random.default_rng(seed)
    params = {
        "cells": {0: rng.normal(size=(4, width)).astype(np.float32), 1: np.float32(seed)},
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "empty": np.zeros((0, 2), np.float32),
    }
    params = jax.device_put(params)
    moments = Moments(jnp.int32(seed), jax.tree.map(lambda leaf: leaf * 2, params))
    return State(jnp.int32(seed), params, (moments, ()), None, jax.random.key(seed))


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    return True


def abstract(width=3):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        make_state(0, width),
    )


def test_a_state_comes_back_with_its_structure_types_and_values(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore_latest(abstract()) is None
        assert checkpoints.all_steps() == [] and checkpoints.best_step() is None
        progress = {"epoch": 2, "index": 7, "best": 0.1, "history": [{"loss": 1.5}], "name": "ü"}
        checkpoints.save(7, make_state(7), progress, {"loss": 0.1, "bleu": 12})
        state, restored, step = checkpoints.restore_latest(abstract())
        assert (restored, step) == (progress, 7)
        assert same(state, make_state(7))
        assert checkpoints.metrics(7) == {"loss": 0.1, "bleu": 12.0}
    # And in the eyes of the next process, from shapes that say nothing of devices.
    with Checkpoints(tmp_path / "c") as checkpoints:
        bare = jax.eval_shape(lambda: make_state(0))
        assert same(checkpoints.restore_latest(bare)[0], make_state(7))
        assert same(checkpoints.restore_latest(make_state(1))[0], make_state(7))
        assert checkpoints.metrics(7) == {"loss": 0.1, "bleu": 12.0}
        key = checkpoints.restore_latest(bare)[0].key
        np.testing.assert_array_equal(
            jax.random.uniform(key, (3,)), jax.random.uniform(make_state(7).key, (3,))
        )


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_generator_come_back(tmp_path, impl):
    keys = jax.random.split(jax.random.key(5, impl=impl), 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"keys": keys}, {})
        state, _, _ = checkpoints.restore_latest(jax.eval_shape(lambda: {"keys": keys}))
    assert state["keys"].dtype == keys.dtype
    np.testing.assert_array_equal(jax.random.key_data(state["keys"]), jax.random.key_data(keys))


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    state = jax.device_put(
        {f"w{i}": np.full((300, 1000), i, np.float32) for i in range(10)}, jax.devices()[0]
    )
    with Checkpoints(tmp_path, keep_last=4) as checkpoints:
        for step in range(3):
            checkpoints.save(step, state, {})
            state = jax.block_until_ready(spoil(state))
            restored = checkpoints.restore(step, jax.eval_shape(lambda state=state: state))[0]
            for i in range(10):
                wanted = i if step == 0 else -1
                np.testing.assert_array_equal(restored[f"w{i}"], np.full((300, 1000), wanted, np.float32))


def test_eight_devices_and_one_read_each_other(tmp_path):
    mesh = sharding.make_mesh()
    wide = sharding.replicate(make_state(3), mesh)
    like_narrow = abstract()
    like_wide = sharding.abstract_replicated(jax.eval_shape(lambda: make_state(0)), mesh)
    with jax.transfer_guard("disallow"):
        with Checkpoints(tmp_path / "wide") as checkpoints:
            checkpoints.save(3, wide, {})
            narrow, _, _ = checkpoints.restore_latest(like_narrow)
        with Checkpoints(tmp_path / "narrow") as checkpoints:
            checkpoints.save(3, narrow, {})
            back, _, _ = checkpoints.restore_latest(like_wide)
    assert same(narrow, make_state(3))
    assert same(back, make_state(3))
    assert len(narrow.params["half"].sharding.device_set) == 1
    for leaf in jax.tree.leaves(back):
        assert len(leaf.sharding.device_set) == 8 and leaf.sharding.is_fully_replicated


def test_the_best_and_the_last_are_kept(tmp_path):
    losses = {1: 0.5, 2: 0.3, 3: None, 4: 0.3, 5: float("nan"), 6: 0.9, 7: None, 8: 0.8}
    with Checkpoints(tmp_path / "low", keep_best=2, keep_last=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, {"w": jnp.float32(step)}, {}, None if loss is None else {"loss": loss})
        checkpoints.wait()
        assert checkpoints.all_steps() == [2, 4, 7, 8]
        assert checkpoints.best_steps() == [2, 4, 8]
        assert checkpoints.best_step() == 2
        assert checkpoints.evaluated_steps() == [2, 4, 8]
    # Another process goes on with the same bests.
    with Checkpoints(tmp_path / "low", keep_best=2, keep_last=1) as checkpoints:
        checkpoints.save(9, {"w": jnp.float32(9)}, {}, {"loss": 0.1})
        checkpoints.wait()
        assert checkpoints.all_steps() == [2, 9]
    with Checkpoints(
        tmp_path / "high", keep_best=1, keep_last=1, metric="bleu", higher_is_better=True
    ) as checkpoints:
        for step, bleu in ((1, 10.0), (2, 30.0), (3, 20.0), (4, None)):
            checkpoints.save(step, {"w": jnp.float32(step)}, {}, None if bleu is None else {"bleu": bleu})
        checkpoints.wait()
        assert checkpoints.all_steps() == [2, 4]
        assert checkpoints.best_step() == 2
        with pytest.raises(ValueError, match="lack 'bleu'.*: loss"):
            checkpoints.save(5, {"w": jnp.float32(0)}, {}, {"loss": 1.0})


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    with Checkpoints(tmp_path, keep_last=4) as checkpoints:
        checkpoints.save(1, {"w": jnp.float32(1)}, {}, {"loss": float("nan")})
        assert checkpoints.best_step() is None
        checkpoints.save(2, {"w": jnp.float32(2)}, {}, {"loss": float("inf")})
        checkpoints.save(3, {"w": jnp.float32(3)}, {}, {"loss": 5.0})
        checkpoints.save(4, {"w": jnp.float32(4)}, {}, {"loss": float("nan")})
        checkpoints.wait()
        assert checkpoints.best_steps() == [3, 2]
        assert checkpoints.evaluated_steps() == [1, 2, 3, 4]


def test_a_step_saved_twice_takes_the_metrics_that_come_later(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.float32(1)}, {"index": 1})
        checkpoints.save(1, {"w": jnp.float32(2)}, {"index": 2})
        assert checkpoints.restore(1, {"w": jnp.float32(0)})[1] == {"index": 1}
        checkpoints.save(1, {"w": jnp.float32(1)}, {"index": 3}, {"loss": 4.0})
        state, progress = checkpoints.restore(1, {"w": jnp.float32(0)})
        assert (float(state["w"]), progress, checkpoints.metrics(1)) == (1.0, {"index": 3}, {"loss": 4.0})
        assert checkpoints.all_steps() == [1]


def test_the_mean_is_that_of_the_last_evaluated(tmp_path):
    with Checkpoints(tmp_path, keep_last=1, keep_best=1, keep_evaluated=3) as checkpoints:
        # 2**24 + 1 is no float32: only a double precision sum keeps the ones.
        values = {1: 100.0, 2: 2.0**24, 3: 1.0, 5: 1.0, 6: 1.0}
        for step in range(1, 8):
            state = {"params": {"w": jnp.float32(values.get(step, 0)), "n": jnp.int32(step)}, "step": step}
            metrics = {"loss": 1.0 / step} if step in values else None
            checkpoints.save(step, state, {}, metrics)
        checkpoints.wait()
        assert checkpoints.all_steps() == [3, 5, 6, 7]
        like = {"w": jnp.float32(0), "n": jnp.int32(0)}
        mean, steps = checkpoints.mean_of_last(2, like)
        assert steps == [6, 5] and float(mean["w"]) == 1.0 and int(mean["n"]) == 6
        assert checkpoints.mean_of_last(9, like)[1] == [6, 5, 3]
    with Checkpoints(tmp_path / "wide", keep_last=4) as checkpoints:
        for step, value in ((1, 2.0), (2, 1.0), (3, 1.0), (4, 2.0**24)):
            checkpoints.save(step, {"params": jnp.float32(value)}, {}, {"loss": 0.0})
        mean, steps = checkpoints.mean_of_last(4, jnp.float32(0))
        assert steps == [4, 3, 2, 1] and float(mean) == 2.0**22 + 1 and mean.dtype == jnp.float32
    with Checkpoints(tmp_path / "none") as checkpoints:
        with pytest.raises(CheckpointError, match="average_last=0"):
            checkpoints.mean_of_last(2, jnp.float32(0))


def test_a_part_is_read_alone(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, make_state(4), {"epoch": 1})
        params, progress = checkpoints.restore(4, abstract().params, "params")
        assert same(params, make_state(4).params) and progress == {"epoch": 1}
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 5, only \[4\]"):
            checkpoints.restore(5, abstract())


def test_another_architecture_is_refused_by_name_and_shape(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        with pytest.raises(
            CheckpointError,
            match=r"params/cells/0 is float32\[4, 3\] there and float32\[4, 5\] here.*directory",
        ):
            checkpoints.restore_latest(abstract(width=5))
        like = abstract()
        longer = like._replace(params={**like.params, "more": jax.ShapeDtypeStruct((2,), jnp.float32)})
        with pytest.raises(CheckpointError, match=r"params/more is missing there and float32\[2\] here"):
            checkpoints.restore_latest(longer)
        shorter = like._replace(params={k: v for k, v in like.params.items() if k != "half"})
        with pytest.raises(CheckpointError, match=r"params/half is bfloat16\[5\] there and missing here"):
            checkpoints.restore_latest(shorter)
        other = like._replace(step=jax.ShapeDtypeStruct((), jnp.float32))
        with pytest.raises(CheckpointError, match=r"step is int32\[\] there and float32\[\] here"):
            checkpoints.restore_latest(other)
        assert checkpoints.all_steps() == [1]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), {"epoch": step}, {"loss": float(step)})
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def flip_all_through(path):
    data = bytearray(path.read_bytes())
    for place in range(0, len(data), max(1, len(data) // 7)):
        data[place] ^= 0x01
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, empty, flip, flip_all_through, Path.unlink])
def test_no_damage_gives_wrong_values(two_steps, tmp_path, damage):
    files = [path.relative_to(two_steps) for path in sorted((two_steps / "2").rglob("*")) if path.is_file()]
    assert len(files) >= 6
    fell_back = set()
    for number, name in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(two_steps, folder)
        if damage in (flip, flip_all_through) and not (folder / name).stat().st_size:
            continue
        damage(folder / name)
        with warnings.catch_warnings(record=True) as caught, Checkpoints(folder) as checkpoints:
            warnings.simplefilter("always")
            state, progress, step = checkpoints.restore_latest(abstract())
            assert step in (1, 2), name
            assert progress == {"epoch": step}, name
            assert same(state, make_state(step)), name
            told = [str(warning.message) for warning in caught]
            if step == 1:
                fell_back.add(str(name))
                assert len(told) == 1 and f"{folder}{os.sep}2 is damaged" in told[0]
                assert caught[0].category is CheckpointWarning
                assert checkpoints.all_steps() == [1]
                assert (folder / "2.damaged").is_dir()
            else:
                assert told == [] and checkpoints.all_steps() == [1, 2]
            # Training goes on and saves the lost step again.
            checkpoints.save(2, make_state(2), {"epoch": 2}, {"loss": 2.0})
            checkpoints.save(3, make_state(3), {"epoch": 3}, {"loss": 0.5})
            assert same(checkpoints.restore_latest(abstract())[0], make_state(3))
            assert checkpoints.best_step() == 3
    assert any(name.endswith("record/metadata") for name in fell_back)
    assert any("/d/" in name for name in fell_back)


def test_a_run_goes_back_and_on_again(tmp_path):
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"epoch": step})
        checkpoints.wait()
        empty(tmp_path / "3" / "record" / "metadata")
        with pytest.warns(CheckpointWarning, match="/3 is damaged"):
            assert checkpoints.restore_latest(abstract())[2] == 2
        checkpoints.save(3, make_state(4), {"epoch": 4})
        state, progress, step = checkpoints.restore_latest(abstract())
        assert (progress, step) == ({"epoch": 4}, 3) and same(state, make_state(4))
        # Metrics for a step that is no longer the last one.
        checkpoints.save(2, make_state(2), {"epoch": 2}, {"loss": 1.0})
        assert checkpoints.best_step() == 2 and checkpoints.all_steps() == [1, 2, 3]


def test_values_altered_without_a_trace_are_noticed(two_steps, tmp_path):
    """The other arrays of a state whose files are all sound and well formed."""
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(2, make_state(2)._replace(step=jnp.int32(9)), {})
    shutil.rmtree(tmp_path / "2" / "state")
    shutil.copytree(tmp_path / "other" / "2" / "state", tmp_path / "2" / "state")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=r"2 is damaged \(step is not what was saved\)"):
            checkpoints.restore(2, abstract())
        with pytest.warns(CheckpointWarning, match="step is not what was saved"):
            assert checkpoints.restore_latest(abstract())[2] == 1


def test_a_changed_record_is_noticed(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    record = tmp_path / "2" / "record" / "metadata"
    text = record.read_text()
    changed = text.replace('\\"epoch\\": 2', '\\"epoch\\": 7')
    assert changed != text
    record.write_text(changed)
    with Checkpoints(tmp_path) as checkpoints, pytest.warns(CheckpointWarning, match="record is not"):
        assert checkpoints.restore_latest(abstract())[1] == {"epoch": 1}


def test_a_best_step_with_an_unreadable_record_is_none(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    empty(tmp_path / "1" / "record" / "metadata")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() == 2
        assert checkpoints.metrics(1) is None


def test_when_all_are_damaged_the_error_says_where_and_what_to_do(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for step in ("1", "2"):
        empty(tmp_path / step / "record" / "metadata")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(CheckpointWarning):
            with pytest.raises(
                CheckpointError, match="every checkpoint in .* is damaged .2, 1.: put back a copy"
            ):
                checkpoints.restore_latest(abstract())
        # Nothing is moved when nothing is gained by it.
        assert checkpoints.all_steps() == [1, 2]
        with pytest.raises(CheckpointError, match="no readable evaluated checkpoint"):
            checkpoints.mean_of_last(2, abstract().params)


def test_the_mean_leaves_out_a_damaged_checkpoint(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "2" / "state").rglob("d/*"):
        flip_all_through(path)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(CheckpointWarning, match="/2 is damaged"):
            mean, steps = checkpoints.mean_of_last(2, abstract().params)
    assert steps == [1] and same(mean, make_state(1).params)


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match=f"could not be written to {tmp_path / 'file'}"):
        Checkpoints(tmp_path / "file").save(1, {"w": jnp.float32(1)}, {})


def test_a_write_that_fails_in_the_background_is_reported(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()

    async def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    import orbax.checkpoint as ocp

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", full, raising=True)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoints.save(2, make_state(2), {})
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints._manager = None
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_latest(abstract())[2] == 1


def test_final_parameters_replace_each_other_and_are_proved(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(CheckpointError, match="holds no model"):
        load_params(folder, abstract().params)
    for seed in (1, 2):
        save_params(folder, make_state(seed).params, {"step": seed})
    params, meta = load_params(folder, abstract().params)
    assert same(params, make_state(2).params) and meta == {"step": 2}
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1
    with pytest.raises(CheckpointError, match=r"cells/0 is float32\[4, 3\] there"):
        load_params(folder, abstract(width=6).params)
    for path in folder.glob("*/state/d/*"):
        flip_all_through(path)
    before = sorted(folder.rglob("*"))
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match="damaged"):
        load_params(folder, abstract().params)
    assert sorted(folder.rglob("*")) == before


def test_saving_and_restoring_say_nothing(tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG, "absl")
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(4):
            checkpoints.save(step, make_state(step), {}, {"loss": 1.0})
        checkpoints.restore_latest(abstract())
    said = capfd.readouterr()
    assert said.out == said.err == ""
    assert [record.getMessage() for record in caplog.records if record.name == "absl"] == []


VICTIM = textwrap.dedent(
    """
    import sys
    import jax
    import numpy as np
    from s2s.infra.checkpoint import Checkpoints

    checkpoints = Checkpoints(sys.argv[1], keep_last=2)
    like = {f"w{i}": np.zeros((500, 1000), np.float32) for i in range(20)}
    found = checkpoints.restore_latest(like)
    step = 0 if found is None else found[2]
    if found is not None:
        assert all((leaf == step).all() for leaf in found[0].values())
    print("ready", step, flush=True)
    while True:
        step += 1
        state = jax.device_put({name: np.full((500, 1000), step, np.float32) for name in like})
        checkpoints.save(step, state, {"step": step}, {"loss": 1.0 / step})
        print("saved", step, flush=True)
    """
)


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "error"}
    reached = 0
    for after in (0.0, 0.05, 0.15, 0.3):
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        started = victim.stdout.readline().split()
        assert started and started[0] == "ready", victim.stderr.read()
        assert int(started[1]) >= reached
        for _ in range(3):
            reached = int(victim.stdout.readline().split()[1])
        # The save of this step has just begun; the one before it is complete.
        time.sleep(after)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        like = {f"w{i}": np.zeros((500, 1000), np.float32) for i in range(20)}
        with Checkpoints(tmp_path) as checkpoints:
            state, progress, step = checkpoints.restore_latest(like)
        assert step >= reached - 1 and progress == {"step": step}
        assert all((leaf == step).all() for leaf in state.values())
        reached = step
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(reached + 1, state, {})
    assert all(path.name.isdecimal() for path in tmp_path.iterdir() if path.is_dir())


PAIR = textwrap.dedent(
    """
    import os, sys
    process, address, folder = int(sys.argv[1]), *sys.argv[2:]
    import jax
    import numpy as np
    from s2s.infra import distributed, sharding
    from s2s.infra.checkpoint import Checkpoints

    distributed.initialize(address, 2, process)
    mesh = sharding.make_mesh()
    state = sharding.replicate({"w": np.arange(6, dtype=np.float32), "n": np.int32(4)}, mesh)
    like = sharding.abstract_replicated(jax.eval_shape(lambda: state), mesh)
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore_latest(like)
        if found is not None:
            assert found[1:] == ({"epoch": 1}, 1), found[1:]
            assert found[0]["w"].sharding == state["w"].sharding
            np.testing.assert_array_equal(sharding.to_host(found[0])["w"], np.arange(6))
        for step in (1, 2):
            checkpoints.save(step, state, {"epoch": step}, {"loss": 1.0})
    """
)


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path):
    import socket

    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }

    def run():
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", PAIR, str(process), address, str(tmp_path)],
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for process in range(2)
        ]
        errors = [worker.communicate(timeout=180)[1] for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)

    run()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.all_steps() == [1, 2]
        state, _, _ = checkpoints.restore_latest({"w": jnp.zeros(6), "n": jnp.int32(0)})
        np.testing.assert_array_equal(state["w"], np.arange(6))
    empty(tmp_path / "2" / "record" / "metadata")
    run()
    assert checkpoint.Checkpoints(tmp_path).all_steps() == [1, 2]
