"""The C sources, compiled on the machine that runs them and known to XLA.

Decides with what they are compiled, where the result is kept and when there is none. Must not
know what the functions compute.

A processor's newest instructions are worth several times its common ones, so the library is
built for the processor at hand (a second, once a machine). Without a C compiler, or on anything
but a CPU, XLA's own products are used: nothing else changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

_SOURCE = Path(__file__).parent / "source"
_FUNCTIONS = (
    "s2s_product",
    "s2s_pack",
    "s2s_stationary",
    "s2s_lstm",
    "s2s_lstm_back",
    "s2s_decoder",
    "s2s_decoder_back",
    "s2s_decoder_pack",
    "s2s_decoder_step",
    "s2s_softmax",
    "s2s_survey",
)
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-shared", "-fPIC")

# "auto", "fma" (no matrix unit) or "xla" (no library), for comparisons and in need.
_CHOICE = "S2S_KERNELS"

_LOCK = threading.Lock()


class Library:
    """The functions that Python calls; XLA calls the others by name.

    Attributes:
      has_matrix_unit: float32 can be multiplied on the processor's matrix unit.
      has_wide_vectors: the processor's vectors are wide enough for fused multiply-adds to beat XLA's.
    """

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        self._packed_bytes = library.s2s_packed_bytes
        self._packed_bytes.restype = ctypes.c_int64
        self._packed_bytes.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
        self._decoder_bytes = library.s2s_decoder_packed_bytes
        self._decoder_bytes.restype = ctypes.c_int64
        self._decoder_bytes.argtypes = [
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int,
            ctypes.c_int,
        ]
        self.has_matrix_unit = _choice() == "auto" and library.s2s_has_matrix_unit() == 1
        self.has_wide_vectors = library.s2s_lanes() >= 16
        for name in _FUNCTIONS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")

    def packed_bytes(self, depth: int, columns: int, parts: int) -> int:
        """The size of a packed right operand of ``depth`` positions of the sum."""
        return self._packed_bytes(depth, columns, parts)

    def decoder_bytes(self, hidden: int, memory: int, layers: int, asks: bool, parts: int) -> int:
        """The size of a decoder's packed weights (`s2s.kernels.decoder`)."""
        return self._decoder_bytes(hidden, memory, layers, int(asks), parts)


def load() -> Library | None:
    """The library, compiled if it has not been; None where it cannot be, or is not wanted.

    Raises:
      ValueError: the environment variable S2S_KERNELS is none of auto, fma, xla.
    """
    # Programs are traced in several threads, and XLA is to be told once.
    with _LOCK:
        return _load()


@functools.cache
def _load() -> Library | None:
    if _choice() == "xla" or jax.default_backend() != "cpu":
        return None
    for folder in _folders():
        # A folder that cannot be written or may not be executed from, a compiler for something else.
        with contextlib.suppress(OSError, subprocess.SubprocessError, AttributeError):
            path = _compiled(folder)
            return None if path is None else Library(path)
    return None


def call(name: str, out: Any, aliases: dict[int, int] | None = None) -> Any:
    """One of the library's functions, of arrays and attributes; axes of replicas come first in all arrays.

    Args:
      name: of the function.
      out: shapes of what it gives, for one replica.
      aliases: by number of an operand, the result that takes its place.
    """
    return jax.ffi.ffi_call(name, out, vmap_method="broadcast_all", input_output_aliases=aliases)


def _choice() -> str:
    choice = os.environ.get(_CHOICE, "auto")
    if choice not in ("auto", "fma", "xla"):
        raise ValueError(f"{_CHOICE} is {choice!r}: set it to auto, fma or xla, or not at all")
    return choice


def _folders() -> Iterator[Path]:
    """Where the library may be kept, the best place first."""
    with contextlib.suppress(RuntimeError):  # nobody's home is known
        yield Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "s2s" / "kernels"
    folder = Path(tempfile.gettempdir()) / f"s2s-kernels-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        # Others may write where it lies, but not in it.
        if folder.stat().st_uid == os.getuid() and not folder.is_symlink():
            yield folder


def _compiled(folder: Path) -> Path | None:
    """The compiled file in a folder; None without a compiler.

    Raises:
      OSError, subprocess.SubprocessError: it is not there, and cannot be made.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return None
    made_of = [path.read_bytes() for path in sorted(_SOURCE.iterdir())]
    made_of += [text.encode() for text in (compiler, jax.__version__, *_FLAGS, _processor())]
    path = folder / (hashlib.sha256(b"\0".join(made_of)).hexdigest()[:20] + ".so")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: processes that begin together must not read half a file.
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE / "kernels.c"), "-lm"]
            subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, timeout=120)
            os.replace(made, path)
    return path


def _processor() -> str:
    """What the compiler builds for: machines of several kinds may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()
