"""One mesh axis over all devices: the same numbers, whatever the number of devices and processes."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from s2s.batch import Batch
from s2s.infra import sharding


def make_batch(rows, seed=0):
    rng = np.random.default_rng(seed)
    ids = lambda *shape: rng.integers(1, 9, shape).astype(np.int32)  # noqa: E731
    return Batch(ids(rows, 5), ids(rows), ids(rows, 4), ids(rows), np.arange(rows, dtype=np.int32))


def step(state, batch, total=lambda tree: tree):
    """Ends with numbers of all rows, and does with its own rows what cannot be done across devices."""

    def loss(weights):
        hidden = jnp.tanh(batch.source_BS.astype(jnp.float32) @ weights)
        return jnp.sum(hidden**2), jnp.sum(hidden)

    (value, hidden), gradient = total(jax.value_and_grad(loss, has_aux=True)(state["w"]))
    return {"w": state["w"] - 0.01 * gradient, "n": state["n"] + 1}, (value, hidden)


def replicas_step(state_R, numbers_R, active_R, batch_R, total=lambda tree: tree):
    return jax.vmap(lambda state, batch: step(state, batch, total))(state_R, batch_R)


def start():
    return {"w": np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3), "n": np.int32(0)}


def test_the_mesh_has_every_device_on_one_auto_axis():
    mesh = sharding.make_mesh()
    assert mesh.axis_names == ("data",)
    assert mesh.size == sharding.rows_multiple(mesh) == len(jax.devices()) == 8
    assert mesh.axis_types == (AxisType.Auto,)


@pytest.mark.parametrize(
    ("replicas", "devices", "shape"), [(8, 8, (8, 1)), (12, 8, (4, 2)), (3, 2, (1, 2)), (3, 1, (1, 1))]
)
def test_replicas_get_the_devices_that_they_can_be_dealt_out_to(replicas, devices, shape):
    mesh = sharding.make_replicas_mesh(replicas, jax.devices()[:devices])
    assert dict(mesh.shape) == dict(zip(("replica", "data"), shape, strict=True))
    assert sharding.rows_multiple(mesh) == shape[1]
    assert sorted(device.id for device in mesh.devices.flat) == list(range(devices))
    batch = jax.tree.map(lambda leaf: np.stack([leaf] * replicas), make_batch(16))
    cut = sharding.replicas_to_global(batch, mesh)
    assert cut.source_BS.addressable_shards[0].data.shape == (replicas // shape[0], 16 // shape[1], 5)
    np.testing.assert_array_equal(sharding.to_host(cut).source_BS, batch.source_BS)


def test_rows_are_cut_over_the_devices_in_order_under_the_transfer_guard():
    mesh = sharding.make_mesh()
    batch = make_batch(16)
    with jax.transfer_guard("disallow"):
        cut = sharding.to_global(batch, mesh)
    assert isinstance(cut, Batch)
    for shard, device in zip(cut.index_B.addressable_shards, mesh.devices.flat, strict=True):
        assert shard.device == device
    np.testing.assert_array_equal(
        np.concatenate([shard.data for shard in cut.index_B.addressable_shards]), np.arange(16)
    )
    assert cut.source_BS.addressable_shards[0].data.shape == (2, 5)
    for got, wanted in zip(sharding.to_host(cut), batch, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_rows_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match="12 rows .* multiple of 8"):
        sharding.to_global(make_batch(12), sharding.make_mesh())


def test_eight_devices_train_as_one_does():
    mesh = sharding.make_mesh()
    state = sharding.replicate(start(), mesh)
    train = sharding.jit_train_step(step, mesh)
    reference = jax.device_put(start(), jax.devices()[0])
    for seed in range(3):
        batch = make_batch(16, seed)
        before = state
        state, (value, total) = train(state, sharding.to_global(batch, mesh))
        assert before["w"].is_deleted()
        reference, (wanted, wanted_total) = jax.jit(step)(reference, batch)
        np.testing.assert_allclose(sharding.to_host(value), wanted, rtol=1e-6)
        np.testing.assert_allclose(sharding.to_host(total), wanted_total, rtol=1e-5)
    assert state["w"].sharding.is_fully_replicated
    assert len(state["w"].sharding.device_set) == 8
    np.testing.assert_allclose(sharding.to_host(state)["w"], reference["w"], rtol=1e-5, atol=1e-6)
    assert train._cache_size() == 1


def test_evaluation_sums_over_all_rows_and_decoding_keeps_the_rows_apart():
    mesh = sharding.make_mesh()
    state = sharding.replicate(start(), mesh)
    batch = sharding.to_global(make_batch(16), mesh)
    sums = sharding.jit_eval_step(lambda params, batch: jnp.sum(batch.index_B), mesh)(state, batch)
    assert sums.sharding.is_fully_replicated
    assert int(sums) == sum(range(16))
    decode = sharding.jit_rows_step(lambda params, batch, shift: {"rows": batch.index_B * 2 + shift}, mesh)
    rows = decode(state, batch, np.int32(1))
    assert rows["rows"].sharding == sharding.by_rows(mesh)
    np.testing.assert_array_equal(sharding.to_host(rows)["rows"], np.arange(16) * 2 + 1)


WORKER = textwrap.dedent(
    """
    import os, sys
    process, address, devices, out, here, root = int(sys.argv[1]), *sys.argv[2:]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [root, here]
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from s2s.infra import distributed, sharding
    from test_sharding import make_batch, replicas_step, start, step

    distributed.initialize(address, 2, process)
    mesh = sharding.make_mesh()
    assert distributed.process_count() == 2 and mesh.size == 2 * int(devices)
    assert distributed.is_main_process() == (process == 0)
    jax.config.update("jax_transfer_guard", "disallow")
    state = sharding.replicate(start(), mesh)
    train = sharding.jit_train_step(step, mesh)
    decode = sharding.jit_rows_step(lambda params, batch: batch.index_B * 2, mesh)
    values = []
    for seed in range(3):
        rows = slice(8 * process, 8 * process + 8)
        batch = sharding.to_global(type(make_batch(16))(*(part[rows] for part in make_batch(16, seed))), mesh)
        state, (value, total) = train(state, batch)
        values.append(sharding.to_host(value))
    with jax.transfer_guard("allow"):
        gathered = multihost_utils.process_allgather(decode(state, batch), tiled=True)
    stopped = [distributed.any_process(process == 1), distributed.any_process(False)]
    own = sharding.make_replicas_mesh(2)
    assert dict(own.shape) == {"replica": int(devices), "data": 2}
    pair = sharding.place_replicas(jax.tree.map(lambda leaf: np.stack([leaf, leaf + 1]), start()), own)
    nothing = sharding.place_replicas(np.zeros(2), own)
    train = sharding.jit_replicas_step(replicas_step, own)
    for seed in range(2):
        parts = zip(make_batch(16, seed), make_batch(16, seed + 7))
        batch = type(make_batch(16))(*(np.stack([a[rows], b[rows]]) for a, b in parts))
        pair, _ = train(pair, nothing, nothing, sharding.replicas_to_global(batch, own))
    pair = sharding.to_host(pair)["w"]
    distributed.barrier("end")
    weights = sharding.to_host(state)["w"]
    np.savez(f"{out}/{process}.npz", w=weights, values=values, rows=gathered, stopped=stopped, pair=pair)
    """
)


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_train_as_one_does(tmp_path, devices):
    address = free_address()
    here = os.path.dirname(__file__)
    root = os.path.dirname(os.path.dirname(here))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(process), address, str(devices), str(tmp_path), here, root],
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    errors = [worker.communicate(timeout=180)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)

    reference, wanted = start(), []
    for seed in range(3):
        reference, (value, _) = jax.jit(step)(reference, make_batch(16, seed))
        wanted.append(value)
    pair = [start(), jax.tree.map(lambda leaf: leaf + 1, start())]
    for number, shift in enumerate((0, 7)):
        for seed in range(2):
            pair[number], _ = jax.jit(step)(pair[number], make_batch(16, seed + shift))
    for process in range(2):
        got = np.load(tmp_path / f"{process}.npz")
        np.testing.assert_allclose(got["w"], reference["w"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got["values"], wanted, rtol=1e-6)
        np.testing.assert_allclose(got["pair"], [one["w"] for one in pair], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got["rows"], np.arange(16) * 2)
        assert got["stopped"].tolist() == [True, False]
