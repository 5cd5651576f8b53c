"""An update is compiled once a batch shape, nothing moves unasked, and a second run compiles nothing."""

import collections
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from s2s import config as config_lib
from s2s.data import plan
from s2s.infra import sharding
from s2s.train.prepare import prepare
from s2s.workdir import Workdir
from tests.system.conftest import ROOT, small


def test_one_compilation_a_batch_shape(tmp_path, cache):
    programs = []

    def listen(event, seconds, *, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(fun_name)

    cfg = config_lib.freeze(small(data__cache=str(cache), data__task_size=600, data__batch_tokens=256))
    mesh = sharding.make_mesh()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        ready = prepare([(cfg, Workdir(tmp_path))], mesh, print)
        layout = ready.members[0].layout
        assert len(layout.buckets) == 2
        with ready.members[0].reporter, ready.program.compiled:
            for epoch in range(2):
                first_epoch = list(programs) if epoch else []
                _, ticks = plan.walk([layout], [(epoch, 0)])
                for batch in ready.program.batches(ticks, epoch):
                    with jax.transfer_guard("disallow"):
                        ready.program.update(batch, [True])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert int(ready.program.own_state(0).step) == 2 * layout.batches_per_epoch
    assert programs == first_epoch
    assert sorted(collections.Counter(programs).values())[-2:] == [1, 2], programs


# Trains in a new process, and says how many programs were asked for and how many of them were kept.
COUNTED = """
import collections, sys, jax
from absl import flags
from s2s import config, train
from tests.system.conftest import small

flags.FLAGS.mark_as_parsed()
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
# One shape: programs that are not needed before the end may or may not be compiled.
shape = dict(data__task_size=400, data__max_shapes=1)
settings = small(data__cache=sys.argv[1], **shape, run__steps=2, run__metric="loss")
train.run(config.freeze(settings), sys.argv[2])
print(counts["compile_requests_use_cache"], counts["cache_hits"])
"""


@pytest.mark.slow
def test_a_second_run_compiles_nothing(tmp_path):
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    }
    found, results = [], []
    for name in ("first", "second"):
        done = subprocess.run(
            [sys.executable, "-c", COUNTED, str(tmp_path / "cache"), str(tmp_path / name)],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append([int(number) for number in done.stdout.splitlines()[-1].split()])
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
        assert results[-1]["seconds_to_first_step"] > 0
    (asked, kept), (asked_again, kept_again) = found
    assert asked == asked_again == kept_again > kept
    np.testing.assert_equal(results[0]["scores"], results[1]["scores"])
