"""One snapshot on the disk: a pytree of arrays and a record that proves them.

Decides what is stored of a state, and that nothing comes back but what was saved:
the record holds the shape, type and SHA-256 of each array, and its own. Must not know
which snapshots are kept, nor when they are made.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

_STATE, _RECORD = "state", "record"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; the message names the folder and a remedy."""


class Damaged(Exception):
    """What is on the disk is not what was saved."""


def to_save(
    state: Any, progress: Mapping[str, Any], metrics: Mapping[str, float] | None
) -> ocp.args.Composite:
    """Copies a state to the host and describes it: what orbax shall write."""
    arrays = {name: _to_numpy(leaf) for name, leaf in _named(state).items()}
    body = {"arrays": _describe(arrays), "progress": progress, "metrics": metrics}
    text = json.dumps(body)
    record = {"body": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    # Arrays without elements cannot be stored, and need not be.
    stored = {name: array for name, array in arrays.items() if array.size}
    return ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(stored), _RECORD: ocp.args.JsonSave(record)})


def read(path: Path, abstract: Any, part: str) -> tuple[Any, dict[str, Any]]:
    """Reads (state, progress), or a part of the state, onto the devices that ``abstract`` says.

    Raises:
      Damaged: it is not what was saved.
      CheckpointError: it is not what ``abstract`` asks for, or may not be read.
    """
    record, arrays = read_arrays(path, abstract, part)
    return rebuild(abstract, part, arrays), record["progress"]


def read_arrays(path: Path, abstract: Any, part: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads the record, and the arrays that ``abstract`` asks for by path, proved by their digests.

    Raises:
      Damaged, CheckpointError: as `read`.
    """
    record = read_record(path)
    wanted = wanted_arrays(abstract, part)
    _check_fit(path, record["arrays"], wanted, part)
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in wanted.items()}
    try:
        for name, array in arrays.items():
            # One at a time, which is as fast: when one of many reads fails, the others fail
            # later, in threads of their own, and print a traceback each.
            arrays[name] = _read_array(path, name) if array.size else array
            if _describe({name: arrays[name]})[name] != record["arrays"][name]:
                raise Damaged(f"{name} is not what was saved")
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read: {error}; change its permissions") from error
    except (MemoryError, Damaged):
        raise
    except Exception as error:
        raise Damaged(first_line(error)) from error
    return record, arrays


def _read_array(path: Path, name: str) -> np.ndarray:
    restored = ocp.PyTreeCheckpointHandler().restore(
        epath.Path(path / _STATE),
        args=ocp.args.PyTreeRestore(
            item={name: 0},
            restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
            partial_restore=True,
        ),
    )
    return restored[name]


def read_record(path: Path) -> dict[str, Any]:
    """Reads the record: "arrays", "progress" and "metrics".

    Raises:
      Damaged, CheckpointError: as `read`.
    """
    try:
        record = ocp.JsonCheckpointHandler().restore(epath.Path(path / _RECORD), args=ocp.args.JsonRestore())
        if hashlib.sha256(record["body"].encode()).hexdigest() != record["sha256"]:
            raise Damaged("its record is not what was saved")
        return json.loads(record["body"])
    except PermissionError as error:
        raise CheckpointError(f"{path} may not be read: {error}; change its permissions") from error
    except Damaged:
        raise
    except Exception as error:
        raise Damaged(first_line(error)) from error


def _check_fit(
    path: Path, saved: dict[str, Any], wanted: dict[str, tuple[tuple[int, ...], np.dtype]], part: str
) -> None:
    def refuse(name: str, there: str, here: str) -> None:
        raise CheckpointError(
            f"{path} was saved by another configuration: {name} is {there} there and {here} here; "
            "use another work directory, or the configuration saved in this one"
        )

    def show(shape: Sequence[int], dtype: Any) -> str:
        return f"{dtype}[{', '.join(map(str, shape))}]"

    for name, (shape, dtype) in wanted.items():
        if name not in saved:
            refuse(name, "missing", show(shape, dtype))
        elif (list(shape), str(dtype)) != (saved[name]["shape"], saved[name]["dtype"]):
            refuse(name, show(saved[name]["shape"], saved[name]["dtype"]), show(shape, dtype))
    for name, entry in saved.items():
        if name not in wanted and (not part or name == part or name.startswith(part + "/")):
            refuse(name, show(entry["shape"], entry["dtype"]), "missing")


def _named(tree: Any, part: str = "") -> dict[str, Any]:
    """Leaves by path: ``params/decoder/kernel``."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named: dict[str, Any] = {}
    for path, leaf in leaves:
        own = jax.tree_util.keystr(path, simple=True, separator="/")
        name = "/".join(filter(None, (part, own))) or "array"
        if name in named:
            raise ValueError(f"two arrays of the state have the same path {name}: rename one")
        named[name] = leaf
    return named


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_numpy(leaf: Any) -> np.ndarray:
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    return np.asarray(jax.device_get(leaf))


def wanted_arrays(abstract: Any, part: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of each array that ``abstract`` asks for."""
    wanted = {}
    for name, leaf in _named(abstract, part).items():
        if _is_key(leaf):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        elif not hasattr(leaf, "dtype"):
            leaf = np.asarray(leaf)
        wanted[name] = (tuple(leaf.shape), np.dtype(leaf.dtype))
    return wanted


def _describe(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    def digest(array: np.ndarray) -> str:
        return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()

    # hashlib lets other threads run while it digests.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(digest, arrays.values()))
    return {
        name: {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": value}
        for (name, array), value in zip(arrays.items(), digests, strict=True)
    }


def rebuild(abstract: Any, part: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """Makes the structure of ``abstract`` from arrays by path, on the devices that it says."""
    leaves = [_place(arrays[name], leaf) for name, leaf in _named(abstract, part).items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _place(array: np.ndarray, like: Any) -> Any:
    """Puts an array where ``like`` is or says to be."""
    if _is_key(like):
        data = jax.eval_shape(jax.random.key_data, like)
        data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=getattr(like, "sharding", None))
        return jax.random.wrap_key_data(_place(array, data), impl=_key_impl(like.dtype))
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return array
    where = like.sharding
    if where is None or where.is_fully_addressable:
        return jax.device_put(array, where)
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def _key_impl(dtype: Any) -> str:
    """Name of the generator of a key type; jax tells it for arrays only."""
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda name=name: jax.random.key(0, impl=name)).dtype == dtype:
            return name
    raise ValueError(f"keys of type {dtype} cannot be restored: use a generator that comes with jax")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to fit a sentence."""
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__


class _NoOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


_NO_ORBAX = _NoOrbax()


def silence_orbax() -> None:
    """Drops orbax's log lines: what matters comes as an exception."""
    logging.getLogger("absl").addFilter(_NO_ORBAX)
