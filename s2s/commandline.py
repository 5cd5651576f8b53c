"""What the commands that train have in common before they do: how flags are read, and the process itself.

Decides how mistakes in overrides and in the file of --config are told, and what Ctrl-C leaves. Must import
nothing slow: help and mistakes answer at once.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app


def run(main: Callable[[list[str]], Any]) -> None:
    """Runs a command with the flags it has defined; Ctrl-C ends it with a sentence."""
    with_kept_memory()
    try:
        app.run(main, flags_parser=parse)
    except KeyboardInterrupt:
        print("s2s: stopped by Ctrl-C; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def parse(argv: list[str]) -> list[str]:
    """Reads the flags; what is wrong in overrides or in the file of --config is told, not traced."""
    file = _config_file(argv)
    if file is not None and not file.is_file():
        from s2s.data.readers import nearby

        _refuse(f"--config {file}: there is no such file; {nearby(file)}")
    try:
        return app.parse_flags_with_usage(argv)
    except Exception as error:
        if file is not None and (line := _line(error, file)):
            _refuse(f"{file}, line {line}: {type(error).__name__}: {_text(error)}")
        if isinstance(error, AttributeError) and error.name == "get_config":
            _refuse(f"{file} has no get_config(): write one, as the files in experiments/ do")
        if isinstance(error, (AttributeError, KeyError)):
            _refuse(f"a --config override names no field: {_text(error)}")
        raise


def _config_file(argv: Sequence[str]) -> Path | None:
    """What --config names, without what follows a colon."""
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        if found := re.fullmatch(r"--?config(?:=(.*))?", word):
            value = following if found[1] is None else found[1]
            return None if value is None else Path(value.partition(":")[0])
    return None


def _line(error: Exception, file: Path) -> int | None:
    """The line of the file in which an error came up; None: it came up elsewhere."""
    if isinstance(error, SyntaxError) and Path(error.filename or "") == file:
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if Path(frame.filename) == file), None)


def _text(error: BaseException) -> str:
    # ml_collections wraps one error in another; the inner one's text says what was meant.
    told: Any = error
    while isinstance(told, BaseException):
        told = told.args[0] if told.args else type(told).__name__
    # A locked config would list its fields with all their values.
    return re.sub(r' Other fields present: "\{.*\}"', "", " ".join(str(told).split()))


def _refuse(told: str) -> NoReturn:
    print(f"s2s: {told}", file=sys.stderr)
    sys.exit(2)


# For glibc: pages of 2 MB, and one heap that grows to what a step needs and stays so.
ALLOCATOR = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,
        "arena_max": 1,
        "mmap_threshold": 1 << 40,
        "trim_threshold": 1 << 40,
    }.items()
)


def with_kept_memory() -> None:
    """Starts this process again with an allocator that keeps its memory, in large pages, where glibc can.

    The arrays of a step come from fresh memory each time, and the kernel clears it. With pages of 4 kB it
    also maps tens of thousands of them a step, and addresses are looked up slowly. An update of two layers
    of 512 units took 8 % longer without large pages, and 10 % longer where memory was given back after each
    update, on 2 CPU cores; the process held 1.0 GB then, and 1.6 GB now. glibc reads the settings once, when
    a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
