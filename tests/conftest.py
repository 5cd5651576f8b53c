"""Every test runs with warnings as errors, explicit broadcasting and eight CPU devices.

Programs are kept for as long as the tests run, in a folder of their own: what tests and the commands
that they start have in common is compiled once.
"""

import contextlib
import gc
import os
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_programs = tempfile.TemporaryDirectory(prefix="s2s-programs-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# grain and TFDS read absl flags, which nobody parses under pytest.
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True)
def room_for_programs():
    """A process may map so many pieces of memory, 65,530 as Linux comes, and each program takes some dozens.

    One more ends it with a segmentation fault, wherever it is.
    """
    yield
    with contextlib.suppress(OSError), open("/proc/self/maps", "rb") as maps:
        if sum(1 for _ in maps) > 30_000:
            jax.clear_caches()
            gc.collect()


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
