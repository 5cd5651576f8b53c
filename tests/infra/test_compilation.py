"""Programs are kept for the next process, few, and compiled beside other work, once a shape."""

import os
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2s.infra import compilation


class Count:
    """Counts the programs that XLA is asked for, by the name of the function."""

    def __init__(self):
        self.names = []

    def __call__(self, event, seconds, *, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(fun_name)


@pytest.fixture
def compiled():
    """The names of the programs compiled during a test."""
    count = Count()
    jax.monitoring.register_event_duration_secs_listener(count)
    yield count.names
    jax.monitoring.unregister_event_duration_listener(count)


def shaped(rows):
    return jax.ShapeDtypeStruct((rows, 3), jnp.float32)


def test_one_program_a_shape_and_none_at_a_call(compiled):
    def double(scale, x):
        return scale * x

    scale = jax.ShapeDtypeStruct((), jnp.float32)
    with compilation.ByShape(jax.jit(double), [(scale, shaped(2)), (scale, shaped(4))]) as function:
        for rows in (4, 2, 4, 2):
            x = jax.device_put(np.arange(rows * 3, dtype=np.float32).reshape(rows, 3))
            np.testing.assert_array_equal(function(jax.device_put(np.float32(2)), x), 2 * np.asarray(x))
        assert compiled.count("jit(double)") == 2
        with pytest.raises(KeyError):
            function(jax.device_put(np.float32(2)), jnp.zeros((3, 3)))
    assert compiled.count("jit(double)") == 2


def test_what_goes_wrong_in_the_background_is_raised_at_the_call():
    def wrong(x):
        raise ValueError("no such thing")

    with compilation.ByShape(jax.jit(wrong), [(shaped(2),)]) as function:
        with pytest.raises(ValueError, match="no such thing"):
            function(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="no such thing"):
        compilation.begin(jax.jit(wrong), shaped(2)).result()


def test_programs_are_compiled_in_order_and_no_longer_than_they_are_wanted():
    begun, go_on = [], threading.Event()

    def slow(x):
        begun.append(x.shape[0])
        go_on.wait(60)
        return x

    with compilation.ByShape(jax.jit(slow), [(shaped(rows),) for rows in (3, 1, 2)]) as function:
        pass
    go_on.set()
    function._pool.shutdown(wait=True)
    assert begun == [3]


def test_the_oldest_programs_go_first(tmp_path):
    for age, name in enumerate(["c", "a", "d", "b"]):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "b", (1e9 + 1, 1e9 - 99))  # written first, but read since
    compilation._remove_oldest(tmp_path, 40)
    assert len(list(tmp_path.iterdir())) == 4
    compilation._remove_oldest(tmp_path, 29)
    assert {path.name for path in tmp_path.iterdir()} == {"c", "b"}


# A process that keeps programs in the folder it is given, and says how many it loaded and wrote.
KEEPER = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from s2s.infra import compilation
counts = {"cache_hits": 0, "cache_misses": 0}
def listen(event, **_):
    name = event.rpartition("/")[2]
    if name in counts:
        counts[name] += 1
jax.monitoring.register_event_listener(listen)
compilation.keep_programs(Path(sys.argv[1]))
value = float(jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((4, 3)))[0, 0])
print(counts["cache_hits"], counts["cache_misses"], value)
"""


def keeper(folder, **environment):
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION")}
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(KEEPER), str(folder)],
        env=env | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    hits, misses, value = done.stdout.split()
    assert float(value) == pytest.approx(3 * np.sin(1), abs=1e-6)
    return int(hits), int(misses), done.stderr


def test_the_next_process_compiles_nothing(tmp_path):
    hits, misses, told = keeper(tmp_path / "cache")
    assert hits == 0 and misses > 0 and told == ""
    assert len(list((tmp_path / "cache" / "programs").iterdir())) == misses
    assert keeper(tmp_path / "cache") == (misses, 0, "")


def test_a_damaged_program_is_compiled_again(tmp_path):
    _, wanted, _ = keeper(tmp_path)
    for path in (tmp_path / "programs").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    hits, _, told = keeper(tmp_path)
    assert hits == 0 and "Error reading persistent compilation cache" in told


def test_a_folder_that_cannot_be_written_costs_compilations_only(tmp_path):
    (tmp_path / "file").write_text("in the way")
    hits, misses, told = keeper(tmp_path / "file")
    assert hits == misses == 0
    assert told.count("UserWarning") == 1 and f"{tmp_path / 'file' / 'programs'} cannot be written" in told


def test_another_folder_and_none_at_all(tmp_path):
    assert keeper(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))[2] == ""
    assert not (tmp_path / "ours").exists()
    hits, misses, told = keeper(tmp_path / "ours", JAX_ENABLE_COMPILATION_CACHE="false")
    assert hits == misses == 0 and told == ""
