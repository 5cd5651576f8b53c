"""The library: compiled once, left out where it cannot be had, and right for every processor of a family."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import s2s
from s2s.kernels import library
from s2s.kernels.contract import contract, with_constant

ROOT = Path(s2s.__file__).parents[1]
SOURCE = ROOT / "s2s" / "kernels" / "source"

# Prints where the library was loaded from, having multiplied with it.
MULTIPLY = """
import sys
import numpy as np
from s2s.kernels import library
from s2s.kernels.contract import with_constant
draw = np.random.default_rng(0).standard_normal
left, right = draw((9, 40)).astype("float32"), draw((40, 33)).astype("float32")
found = with_constant(right, 0, 9, "float32")(left)
np.testing.assert_allclose(found, left @ right, rtol=0, atol=1e-5)
assert library.load() is not None
with open("/proc/self/maps") as maps:
    mapped = [line.split()[5] for line in maps if ".so" in line]
print(next(path for path in mapped if sys.argv[1] in path))
"""

# Root may look and write everywhere, unless it gives that up.
UNPRIVILEGED = """
import ctypes, sys
if sys.platform == "linux":
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x19980330, 0), (ctypes.c_uint32 * 3)())
"""

PROCESSORS = ("native", "haswell", "x86-64")

compiles = pytest.mark.skipif(
    shutil.which("cc") is None and shutil.which("gcc") is None, reason="no C compiler"
)
on_x86 = pytest.mark.skipif(
    shutil.which("gcc") is None or platform.machine() != "x86_64" or sys.platform != "linux",
    reason="no gcc for x86",
)


def start(code, *args, environment, **keywords):
    environment = {"PATH": os.defpath, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, args)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **keywords
    )  # fmt: skip


def printed(process):
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.strip()


def assert_multiplies():
    left, right = (np.random.default_rng(0).standard_normal(s).astype("float32") for s in [(9, 40), (40, 33)])
    found = jax.jit(
        lambda: (
            contract(left, right, (1,), (0,), jnp.float32),
            with_constant(jnp.asarray(right), 0, 9, jnp.float32)(left),
        )
    )()
    for one in found:
        np.testing.assert_allclose(one, left @ right, rtol=0, atol=1e-5)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`library.load` as in a process that begins, with nothing compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("S2S_KERNELS", raising=False)
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)


@compiles
def test_compiled_once_by_processes_that_begin_together(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path / "nothing")}
    first = [start(MULTIPLY, tmp_path, environment=environment) for _ in range(2)]
    one, other = map(printed, first)
    assert one == other
    (made,) = (path for path in tmp_path.rglob("*") if not path.is_dir())
    assert [made.parent] == list((tmp_path / "s2s").iterdir())
    assert str(made) == one and made.suffix == ".so"
    before = made.stat()
    assert printed(start(MULTIPLY, tmp_path, environment=environment)) == one
    assert list(made.parent.iterdir()) == [made]
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@compiles
@pytest.mark.parametrize("where", ["beneath a file", "closed"])
def test_a_cache_that_cannot_be_written(where, tmp_path):
    """Also where nobody may even look, as in another user's home."""
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    if where == "closed":
        cache.mkdir(mode=0)
    else:
        cache.touch()
    environment = {"XDG_CACHE_HOME": str(cache / "inner"), "TMPDIR": str(temporary)}
    found = Path(printed(start(UNPRIVILEGED + MULTIPLY, temporary, environment=environment)))
    assert found.parent.parent == temporary
    # What another user could write, this one would run.
    assert not (found.parent.stat().st_mode | found.stat().st_mode) & (stat.S_IWGRP | stat.S_IWOTH)


def test_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CC", "/nonexistent")
    monkeypatch.setenv("PATH", "")
    assert library.load() is None
    assert_multiplies()


def test_with_a_compiler_that_does_not_work(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "/bin/false")
    assert library.load() is None
    assert_multiplies()
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]


def test_with_a_compiler_for_something_else(fresh, monkeypatch, tmp_path):
    """What it makes cannot be loaded, as on a file system that programs may not be run from."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho "no library" > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert library.load() is None
    assert_multiplies()


def test_without_a_home(fresh, monkeypatch):
    """A user whom the machine does not know, as in a container."""
    pwd = pytest.importorskip("pwd")

    def unknown(_):
        raise KeyError("no such user")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CC", "/bin/false")
    assert library.load() is None


def test_xlas_products_if_they_are_asked_for(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("S2S_KERNELS", "xla")
    assert library.load() is None
    assert_multiplies()
    assert not list(tmp_path.iterdir())


def test_a_choice_that_there_is_not(fresh, monkeypatch):
    monkeypatch.setenv("S2S_KERNELS", "nonsense")
    with pytest.raises(ValueError, match="'nonsense'.*set it to auto, fma or xla") as raised:
        library.load()
    assert "S2S_KERNELS" in str(raised.value)


@compiles
def test_no_matrix_unit_if_it_is_not_wanted(tmp_path):
    code = MULTIPLY.replace("print(", "assert not library.load().has_matrix_unit\nprint(")
    printed(start(code, "s2s", environment={"S2S_KERNELS": "fma", "HOME": str(Path.home()), **_cache()}))


def _cache():
    """Where this process has its library already."""
    return {name: os.environ[name] for name in ("XDG_CACHE_HOME",) if name in os.environ}


def test_sources_are_part_of_the_package():
    """Without them an installed package has no library to compile."""
    data = (ROOT / "pyproject.toml").read_text()
    assert "s2s.kernels" in data
    assert {path.suffix for path in SOURCE.iterdir()} <= {".c", ".h"}


# Every product of a library that is not the one in use: names are a process's own.
PRODUCTS = """
import ctypes, itertools, sys
import jax, jax.numpy as jnp, numpy as np
names = ("s2s_product", "s2s_pack", "s2s_stationary")
for path in sys.argv[1:]:
    loaded, mark = ctypes.CDLL(path), path[-12:]
    loaded.s2s_packed_bytes.restype = ctypes.c_int64
    loaded.s2s_packed_bytes.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    for name in names:
        jax.ffi.register_ffi_target(mark + name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")

    def call(name, shape, dtype, *operands, **attributes):
        attributes = {key: np.int64(value) for key, value in attributes.items()}
        return jax.ffi.ffi_call(mark + name, jax.ShapeDtypeStruct(shape, dtype))(*operands, **attributes)

    def products(pairs, parts):
        out = []
        for (rows, columns, depth), (left_axis, right_axis), (left, right) in pairs:
            axes = {"left_axis": left_axis, "right_axis": right_axis}
            found = [call("s2s_product", (rows, columns), "float32", left, right, parts=parts, **axes)]
            if left_axis == 1:
                size = loaded.s2s_packed_bytes(depth, columns, parts) // 4
                packed = call("s2s_pack", (size,), "uint32", right, parts=parts, right_axis=right_axis)
                found.append(call("s2s_stationary", (rows, columns), "float32", left, packed, parts=parts))
            out.append(found)
        return out

    draw = np.random.default_rng(0).standard_normal
    widths, depths = (1, 7, 8, 9, 12, 13, 23, 24, 25, 48, 49), (1, 31, 129, 511, 512, 513)
    sizes = [(m, widths[(3 * i + 1) % 11], depths[i % 6]) for i, m in enumerate(widths)] + [(330, 2085, 40)]
    pairs = []
    for (m, n, k), axes in itertools.product(sizes, itertools.product((0, 1), (0, 1))):
        left, right = draw((m, k) if axes[0] else (k, m)), draw((n, k) if axes[1] else (k, n))
        pairs.append(((m, n, k), axes, (left.astype("float32"), right.astype("float32"))))
    ways = [0, 3] if loaded.s2s_has_matrix_unit() else [0]
    for parts in ways:
        found = jax.jit(lambda: products(pairs, parts))()
        for ((rows, columns, _), (left_axis, right_axis), (left, right)), ones in zip(pairs, found):
            left, right = left.astype("float64"), right.astype("float64")
            left, right = left if left_axis else left.T, right.T if right_axis else right
            for one in ones:
                error = np.abs(one - left @ right) / (np.abs(left) @ np.abs(right))
                assert error.max() < 1e-6, (path, parts, left.shape, right.shape, left_axis, right_axis)
    print(mark, ways)
"""


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """By processor, a library built for it and what the compiler said."""
    folder, made = tmp_path_factory.mktemp("builds"), {}
    for processor in PROCESSORS:
        path = folder / f"lib_{processor:_>7}.so"
        flags = ["-std=gnu11", "-O3", "-shared", "-fPIC", "-Wall", "-Wextra", f"-march={processor}"]
        command = ["gcc", *flags, f"-I{jax.ffi.include_dir()}", SOURCE / "kernels.c", "-o", path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made[processor] = path, done.stderr
    return made


@on_x86
@pytest.mark.parametrize("processor", PROCESSORS)
def test_compilers_have_nothing_to_say(processor, builds):
    assert builds[processor][1] == ""


@on_x86
def test_right_for_other_processors(builds):
    """Vectors of 16, 8 and 4 floats, where this processor has them."""
    has_vectors = " avx2 " in Path("/proc/cpuinfo").read_text()
    made = [path for processor, (path, _) in builds.items() if has_vectors or processor != "haswell"]
    out = printed(start(PRODUCTS, *made, environment={}))
    assert len(out.splitlines()) == len(made)
