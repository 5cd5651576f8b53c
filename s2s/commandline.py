"""What the commands that train have in common before they do: how flags are read, and the process itself.

Decides how mistakes in overrides are told. Must import nothing slow: help and mistakes answer at once.
"""

from __future__ import annotations

import os
import sys

from absl import app


def parse(argv: list[str]) -> list[str]:
    """Reads the flags; a field that does not exist is told, not traced."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        # ml_collections wraps one error in another; the inner one's text says what was meant.
        told = error.args[0]
        while isinstance(told, BaseException):
            told = told.args[0]
        told = " ".join(str(told).split())
        print(f"s2s: a --config override names no field: {told}", file=sys.stderr)
        sys.exit(2)


def with_large_pages() -> None:
    """Starts this process again with its memory in pages of 2 MB, where glibc can.

    The arrays of a step come from fresh memory each time. With pages of 4 kB the kernel maps tens of
    thousands of them a step, and addresses are looked up slowly: a step of two layers of 512 units took 8 %
    longer on 2 CPU cores. glibc reads the setting once, when a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
