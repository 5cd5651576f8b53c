"""Compiled programs: kept on the disk for later processes, and made ahead of need.

Decides where programs are kept and how many, and that a function is compiled once a batch
shape, beside other work. Must not know what a program computes.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

# A program is a few hundred kilobytes: the newest thousands are kept.
_MOST_BYTES = 1 << 30


def keep_programs(cache: Path) -> None:
    """Makes this process load the programs that are kept in CACHE/programs, and keep there what it compiles.

    JAX names programs by what they compute, its own version, and the devices with the features of
    their processors, so that machines may share the folder. Whoever sets JAX_COMPILATION_CACHE_DIR
    has another folder, in which nothing is ever removed, and JAX_ENABLE_COMPILATION_CACHE=false
    keeps nothing. A folder that cannot be written is told, and costs compilations only.

    Args:
      cache: folder of everything prepared; programs used longest ago are removed when they are many.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = cache / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_oldest(folder, _MOST_BYTES)
        usable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if not usable:
        warnings.warn(
            f"{folder} cannot be written: programs are compiled anew in every process; make room or rights "
            "there, or set config.data.cache to another folder",
            stacklevel=2,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX would keep to the folder of this process's first compilation.
    compilation_cache.reset_cache()
    # To load the smallest program is faster than to compile it.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _remove_oldest(folder: Path, most_bytes: int) -> None:
    """Removes the programs used longest ago until those left take ``most_bytes`` at most."""
    programs = []
    for path in folder.iterdir():
        # Another process may remove it first.
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            # Disks that note no reading still know the writing.
            programs.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    size = sum(entry[1] for entry in programs)
    for _, bytes_, path in sorted(programs):
        if size <= most_bytes:
            break
        path.unlink(missing_ok=True)
        size -= bytes_


def begin(function: Any, *arguments: Any) -> Future[Any]:
    """Compiles a jitted function for some arguments (or `jax.ShapeDtypeStruct`s) in the background."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
    program = pool.submit(_compile, function, arguments)
    pool.shutdown(wait=False)
    return program


class ByShape:
    """A jitted function whose program for each shape of its last argument is compiled in the background.

    Programs are compiled one after another in the order given, while the caller does something
    else; a call waits for its own program only. Nothing is compiled at a call.

    Args:
      function: made by `jax.jit`.
      examples: arguments, or their `jax.ShapeDtypeStruct`s with shardings, of each shape that
        will come.
    """

    def __init__(self, function: Any, examples: Iterable[tuple[Any, ...]]) -> None:
        # One at a time: XLA uses several cores for a program, and the first one is needed first.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._programs: dict[Any, Future[Any]] = {
            _shapes(arguments[-1]): self._pool.submit(_compile, function, arguments) for arguments in examples
        }

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function.

        Raises:
          KeyError: no example had the shape of the last argument.
        """
        return self._programs[_shapes(arguments[-1])].result()(*arguments)

    def __enter__(self) -> ByShape:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A process cannot end amid a compilation, but need not begin the next one.
        self._pool.shutdown(wait=False, cancel_futures=True)


def _compile(function: Any, arguments: tuple[Any, ...]) -> Any:
    return function.lower(*arguments).compile()


def _shapes(tree: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(tree))
