"""Devices: which of them holds which rows, and the only file that counts them.

Decides that parameters are replicated and batches cut by rows over one mesh axis,
"data"; and that replicas, where a program trains several models, are dealt out over
another, "replica". Must not know what a step computes.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from s2s.infra import distributed

Tree = TypeVar("Tree")

AXIS = "data"
REPLICAS = "replica"
_WHOLE_AND_ROWS = PartitionSpec(), PartitionSpec(AXIS)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of all devices of all processes, in the order of the processes.

    That order makes the rows of process 0 the first rows of the batch, those of
    process 1 the next, and so on.

    Args:
      devices: only these, such as `jax.local_devices` for work that each process does alone.

    Raises:
      ValueError: the processes hold different numbers of devices.
    """
    # Explicit axes, the default, refuse a scan whose carry starts as zeros.
    return Mesh(_by_process(devices or jax.devices()).ravel(), (AXIS,), axis_types=(AxisType.Auto,))


def use_cores(replicas: int) -> None:
    """Makes the cores of a CPU devices, on which several models can be trained side by side.

    An update of a small model cannot keep several cores busy, but two updates can: 8 models of 128 units
    (batches of 32 pairs of 16 tokens) took 0.62 to 0.67 of the time on 2 cores. There are as many devices as
    cores, or more where the replicas could not be dealt out evenly. Must come before anything asks for
    devices, else nothing changes; accelerators stay as they are.

    Args:
      replicas: models in the program.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = min(n for n in range(1, replicas + 1) if replicas % n == 0 and n >= min(cores, replicas))
    if devices == 1 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    # JAX refuses where it has begun.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)


def make_replicas_mesh(replicas: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh of a program that trains several models.

    Of each process's devices, the most that replicas can be dealt out to evenly are the axis "replica";
    the rest of them, and the processes, are the axis "data". Replicas never leave a process, as all of
    them are evaluated and saved in each. Rows are in the order of the processes, as in `make_mesh`.

    Args:
      replicas: models in the program.
      devices: only these.

    Raises:
      ValueError: the processes hold different numbers of devices.
    """
    held = _by_process(devices or jax.devices())
    dealt = math.gcd(replicas, held.shape[1])
    return Mesh(held.reshape(-1, dealt).T, (REPLICAS, AXIS), axis_types=(AxisType.Auto,) * 2)


def _by_process(devices: Sequence[jax.Device]) -> np.ndarray:
    """[processes, devices of each]."""
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    held = np.unique([device.process_index for device in devices], return_counts=True)[1]
    if np.any(held != held[0]):
        raise ValueError(f"every process must hold the same number of devices, but they hold {held.tolist()}")
    return np.array(devices).reshape(len(held), held[0])


def local_mesh() -> Mesh:
    """Makes the mesh of this process's own devices, for work that each process does alone."""
    return make_mesh(jax.local_devices())


def device_kind(mesh: Mesh) -> str:
    """What the devices are, for people: "2 cpu"."""
    return f"{mesh.size} {mesh.devices.flat[0].platform}"


def is_wide(mesh: Mesh) -> bool:
    """Whether a device does much at once: an accelerator, which many small arrays together fill."""
    return bool(mesh.devices.flat[0].platform != "cpu")


def spans_processes(mesh: Mesh) -> bool:
    """Whether devices of several processes are in the mesh."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def rows_multiple(mesh: Mesh) -> int:
    """What the rows of every batch must be a multiple of: the devices that they are cut over."""
    return mesh.shape[AXIS]


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters: all of it on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: the first axis cut over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def by_replica(mesh: Mesh) -> NamedSharding:
    """The sharding of what has one entry a replica, on the first axis: each on the devices of its own."""
    return NamedSharding(mesh, PartitionSpec(REPLICAS))


def by_replica_and_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch a replica: [R, B, ...]."""
    return NamedSharding(mesh, PartitionSpec(REPLICAS, AXIS))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts a whole tree, equal in all processes, on every device of the mesh."""
    return _put(tree, mesh, replicated(mesh))


def place_replicas(tree_R: Tree, mesh: Mesh) -> Tree:
    """Puts a tree of stacked replicas, equal in all processes, on the devices of `make_replicas_mesh`."""
    return _put(tree_R, mesh, by_replica(mesh))


def _put(tree: Tree, mesh: Mesh, sharding: NamedSharding) -> Tree:
    if not spans_processes(mesh):
        return jax.device_put(tree, sharding)
    # device_put would first compare the values over all processes, leaf by leaf.
    with jax.transfer_guard("allow"):
        return jax.jit(lambda leaves: leaves, out_shardings=sharding)(tree)


def to_global(batch: Tree, mesh: Mesh) -> Tree:
    """Makes this process's rows its part of global arrays, cut by rows over all devices.

    Args:
      batch: NumPy arrays whose first axis is this process's slice of the batch.
      mesh: of `make_mesh`.

    Returns:
      The same structure; first axes are ``distributed.process_count()`` times as long.

    Raises:
      ValueError: the rows cannot be shared out evenly over this process's devices.
    """
    return _from_own_rows(batch, mesh, by_rows(mesh), 0)


def replicas_to_global(batch_R: Tree, mesh: Mesh) -> Tree:
    """As `to_global` for a batch a replica.

    Args:
      batch_R: NumPy arrays [R, B, ...]: of every replica, this process's slice of its batch.
      mesh: of `make_replicas_mesh`.

    Raises:
      ValueError: as `to_global`.
    """
    return _from_own_rows(batch_R, mesh, by_replica_and_rows(mesh), 1)


def _from_own_rows(batch: Tree, mesh: Mesh, sharding: NamedSharding, axis: int) -> Tree:
    shared = spans_processes(mesh)
    own = rows_multiple(mesh) // (distributed.process_count() if shared else 1)
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[axis] % own:
            raise ValueError(
                f"{leaf.shape[axis]} rows cannot be shared out over the {own} devices of this process: "
                f"plan batches with a multiple of {rows_multiple(mesh)} rows"
            )
    if not shared:
        return jax.device_put(batch, sharding)
    # As explicit as device_put, but the guard does not know it.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), batch)


def jit_train_step(step: Callable[..., Any], mesh: Mesh) -> Any:
    """Compiles ``step(state, batch, total) -> (state, metrics)`` over the mesh.

    The state's memory is given away to the new state. Every device computes with its own rows alone,
    whatever order or loops the step makes of them; ``total`` turns a tree of sums over those rows into
    that over the rows of all devices of all processes. All that comes out must be made from totals.
    """

    def own_rows(state: Any, batch: Any) -> Any:
        return step(state, batch, _total(mesh))

    return jax.jit(
        _on_each_device(own_rows, mesh),
        in_shardings=(replicated(mesh), by_rows(mesh)),
        out_shardings=replicated(mesh),
        donate_argnums=0,
    )


def jit_eval_step(step: Callable[..., Any], mesh: Mesh) -> Any:
    """Compiles ``step(params, batch) -> sums`` over the mesh: sums over each device's own rows are added up.

    Every device gets the sums over all rows.
    """

    def own_rows(params: Any, batch: Any) -> Any:
        return _total(mesh)(step(params, batch))

    return jax.jit(
        _on_each_device(own_rows, mesh),
        in_shardings=(replicated(mesh), by_rows(mesh)),
        out_shardings=replicated(mesh),
    )


def jit_replicas_step(step: Callable[..., Any], mesh: Mesh) -> Any:
    """Compiles ``step(state_R, numbers_R, active_R, batch_R, total) -> (state_R, metrics_R)`` over the mesh.

    As `jit_train_step`, for the replicas that a device has: ``total`` adds up over the devices that have
    the other rows of the same replica's batch.
    """

    def own_share(state_R: Any, numbers_R: Any, active_R: Any, batch_R: Any) -> Any:
        return step(state_R, numbers_R, active_R, batch_R, _total(mesh))

    return _jit_replicas(own_share, mesh, arguments=3, donated=(0,))


def jit_replicas_eval_step(step: Callable[..., Any], mesh: Mesh) -> Any:
    """Compiles ``step(params_R, numbers_R, batch_R) -> sums_R``; sums over a replica's rows are added up."""

    def own_share(params_R: Any, numbers_R: Any, batch_R: Any) -> Any:
        return _total(mesh)(step(params_R, numbers_R, batch_R))

    return _jit_replicas(own_share, mesh, arguments=2)


def _jit_replicas(
    function: Callable[..., Any], mesh: Mesh, arguments: int, donated: tuple[int, ...] = ()
) -> Any:
    """Compiles ``function(*replicas, batch_R) -> replicas`` with so many arguments before the batch."""
    each, batch = by_replica(mesh), by_replica_and_rows(mesh)
    return jax.jit(
        _on_each_device(function, mesh, (*[each.spec] * arguments, batch.spec), each.spec),
        in_shardings=(*[each] * arguments, batch),
        out_shardings=each,
        donate_argnums=donated,
    )


def _on_each_device(
    function: Callable[..., Any],
    mesh: Mesh,
    inputs: tuple[PartitionSpec, ...] = _WHOLE_AND_ROWS,
    outputs: PartitionSpec = _WHOLE_AND_ROWS[0],
) -> Callable[..., Any]:
    """A function, unless told ``function(whole, rows) -> whole``, as what each device does by itself."""
    if mesh.size == 1:
        return function
    # Not checked: a loop that starts from zeros would have to be told that they differ between devices.
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def _total(mesh: Mesh) -> Callable[[Tree], Tree]:
    """Adds up over the devices that rows are cut over; on one it does nothing, where an all-reduce copies."""
    return (lambda tree: tree) if mesh.shape[AXIS] == 1 else (lambda tree: jax.lax.psum(tree, AXIS))


def jit_rows_step(step: Callable[..., Any], mesh: Mesh) -> Any:
    """Compiles ``step(params, batch, *rest)`` whose every output has the batch's rows first.

    For decoding on a `local_mesh`: every device works on its own rows alone, as long as these take, and
    outputs stay cut by rows. ``batch`` may be any tree of `to_global`; ``params`` and ``rest`` are whole.
    """

    def own_rows(params: Any, batch: Any, *rest: Any) -> Any:
        if mesh.size == 1:
            return step(params, batch, *rest)
        whole, rows = _WHOLE_AND_ROWS
        specs = (whole, rows, *[whole] * len(rest))
        spread = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
        return spread(params, batch, *rest)

    return jax.jit(own_rows, out_shardings=by_rows(mesh))


def abstract_replicated(tree: Tree, mesh: Mesh) -> Tree:
    """Shapes with the sharding of `replicate`, for arrays that are to be read from disk."""
    whole = replicated(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), tree)


def abstract_by_rows(batch: Tree, mesh: Mesh) -> Tree:
    """Shapes of a whole batch with the sharding of `to_global`, to compile for it ahead of it."""
    rows = by_rows(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows), batch)


def abstract_replicas(tree_R: Tree, mesh: Mesh) -> Tree:
    """Shapes with the sharding of `place_replicas`."""
    each = by_replica(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=each), tree_R)


def abstract_replicas_by_rows(batch_R: Tree, mesh: Mesh) -> Tree:
    """Shapes of whole batches [R, B, ...] with the sharding of `replicas_to_global`."""
    cut = by_replica_and_rows(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=cut), batch_R)


def jit_init(make: Callable[..., Any], mesh: Mesh) -> Any:
    """Compiles ``make(*arguments) -> state``; the state is born on every device."""
    return jax.jit(make, out_shardings=replicated(mesh))


def to_host(tree: Tree) -> Tree:
    """Copies arrays to NumPy arrays, all of which is on this host's devices: on each, or in parts."""
    return jax.tree.map(_to_host, tree) if distributed.process_count() > 1 else jax.device_get(tree)


def _to_host(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return jax.device_get(leaf)
    whole = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        whole[shard.index] = jax.device_get(shard.data)
    return whole
