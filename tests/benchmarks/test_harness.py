"""The comparison's own arithmetic: pairs, medians, bars; and workers that fail kindly."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import compare, data, harness
from s2s import config as config_lib
from s2s.learn import step as step_lib

ECHO = """
import sys, time
sys.path.insert(0, {peers!r})
import protocol

def loop(turnstile):
    for tokens in range(1, {batches}):
        turnstile.enter(tokens)

handlers = {{
    "add": lambda a, b: {{"sum": a + b}},
    "noise": lambda: print("not an answer") or {{"quiet": True}},
    "divide": lambda a: {{"got": 1 / a}},
    "die": lambda: sys.exit(3),
    "start": lambda: handlers.update(turnstile=protocol.Turnstile(loop)) or {{}},
    "train": lambda steps: handlers["turnstile"].train(steps),
    "end": lambda: handlers["turnstile"].end() or {{}},
}}
protocol.serve(handlers)
"""


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(peers=str(harness.PEERS), batches=8), encoding="utf-8")
    with harness.Worker([sys.executable, str(script)], [0], tmp_path / "log") as started:
        yield started


def answers(*pairs):
    """Rounds of (seconds, tokens)."""
    rest = iter([{"seconds": seconds, "tokens": tokens} for seconds, tokens in pairs])
    return lambda: next(rest)


def test_a_duel_compares_neighbours_and_takes_medians_over_rounds():
    # The machine slows down: medians of each side alone would say 10 to 8, each round says 2, 1 or 4.
    ours = answers((1.0, 100), (2.0, 20), (4.0, 32))
    theirs = answers((1.0, 50), (1.0, 10), (1.0, 2))

    found = harness.duel(ours, theirs, 3, "tokens")

    assert found.ratio == (2.0, 1.0, 4.0)
    assert found.ours == (10.0, 8.0, 100.0)
    assert found.theirs == (10.0, 2.0, 50.0)


def test_sides_take_turns():
    order = []

    def side(name):
        return lambda: order.append(name) or {"seconds": 1.0, "tokens": 1}

    harness.duel(side("A"), side("B"), 3, "tokens")

    assert order == ["A", "B"] * 3


def test_no_rounds_have_no_median():
    with pytest.raises(ValueError, match="no round was timed"):
        harness.spread([])


def test_a_worker_answers_whatever_it_prints(worker):
    assert worker.ask("add", a=1, b=2) == {"sum": 3}
    assert worker.ask("noise") == {"quiet": True}


def test_an_error_is_told_and_the_worker_lives_on(worker):
    with pytest.raises(harness.WorkerError, match="'divide' failed: ZeroDivisionError.*see .*log"):
        worker.ask("divide", a=0)
    assert worker.ask("divide", a=2) == {"got": 0.5}


def test_a_dead_worker_is_told(worker):
    with pytest.raises(harness.WorkerError, match="stopped at 'die' with 3"):
        worker.ask("die")


def test_a_turnstile_counts_the_steps_it_lets_through(worker):
    worker.ask("start")
    first, second = worker.ask("train", steps=2), worker.ask("train", steps=3)

    assert (first["tokens"], first["steps"]) == (1 + 2, 2)
    assert (second["tokens"], second["steps"]) == (3 + 4 + 5, 3)
    assert worker.ask("end") == {}


def test_a_loop_that_ends_by_itself_is_no_measurement(worker):
    worker.ask("start")
    with pytest.raises(harness.WorkerError, match="the training loop ended by itself"):
        worker.ask("train", steps=100)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A peer "odd", what would be run to install it, and the code that pip ends with."""
    (tmp_path / "odd.txt").write_text("odd==1\n", encoding="utf-8")
    monkeypatch.setattr(harness, "PEERS", tmp_path)
    ran, outcome = [], {"code": 0}

    def run(command, **keywords):
        ran.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, outcome["code"], "", "a warning\nno odd==1 anywhere\n")

    monkeypatch.setattr(harness.subprocess, "run", run)
    return ran, outcome


def test_an_environment_that_cannot_be_installed_is_told_and_tried_again(tmp_path, commands):
    ran, outcome = commands
    outcome["code"] = 1
    with pytest.raises(harness.WorkerError, match="pip install .* failed: no odd==1 anywhere"):
        harness.environment("odd", tmp_path / "venvs", lambda sentence: None)
    assert len(ran) == 2

    outcome["code"] = 0
    harness.environment("odd", tmp_path / "venvs", lambda sentence: None)
    assert len(ran) == 4


def test_an_environment_is_made_once_and_anew_for_other_versions(tmp_path, commands):
    ran, _ = commands
    told = []
    for _ in range(2):
        python = harness.environment("odd", tmp_path / "venvs", told.append)
    assert python == tmp_path / "venvs" / "odd" / "bin" / "python"
    assert len(told) == 1

    (tmp_path / "odd.txt").write_text("odd==2\n", encoding="utf-8")
    harness.environment("odd", tmp_path / "venvs", told.append)
    assert len(told) == 2
    assert ran[-1][-2:] == ["-r", str(tmp_path / "odd.txt")]


def test_peers_are_pinned_and_name_no_host():
    files = sorted(harness.PEERS.glob("*.txt"))
    assert [file.stem for file in files] == ["joeynmt", "pytorch", "yoyodyne"]
    for file in files:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert lines and all("==" in line and "/" not in line for line in lines), file


@pytest.mark.parametrize(
    ("got", "at_most", "met"),
    [(None, False, None), (1.3, False, True), (1.29, False, False), (1.3, True, True), (1.31, True, False)],
)
def test_a_bar_is_met_or_not(got, at_most, met):
    assert compare.Bar("what", 1.3, got, at_most).met is met


def test_a_bar_is_judged_by_its_median():
    assert compare.Bar("what", 1.3, harness.Spread(1.3, 0.9, 1.4)).met is True


def test_a_data_folder_that_lacks_files_is_refused(tmp_path, capsys):
    assert (
        compare.main(["--data", str(tmp_path), "--only", "padding", "--output", str(tmp_path / "out")]) == 2
    )

    said = capsys.readouterr().err
    assert f"DATA={tmp_path} lacks multi30k/train.de.gz" in said
    assert "leave DATA away" in said
    assert not (tmp_path / "out").exists()


def test_made_corpora_are_whole_and_the_same_each_time(tmp_path):
    first, second = (data.prepare(tmp_path / name, None) for name in ("a", "b"))

    files = sorted(file.relative_to(first.mt) for file in first.mt.iterdir())
    assert [str(file) for file in files] == ["dev.src", "dev.trg", "train.src", "train.trg"]
    for folder, again in ((first.mt, second.mt), (first.g2p, second.g2p)):
        for file in folder.iterdir():
            assert file.read_bytes() == (again / file.name).read_bytes()
    lines = (first.mt / "train.trg").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 29000
    assert 12 < sum(len(line.split(" ")) for line in lines) / len(lines) < 16


def test_a_report_has_every_bar_and_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "BENCH", tmp_path)
    bench = compare.Bench(compare.QUICK, [0], None, tmp_path)
    bench.bars["pytorch"].got = harness.Spread(1.5, 1.4, 1.6)
    with bench.survive("joeynmt", "training"):
        raise harness.WorkerError("no such thing")

    text = compare.markdown(bench, {"cores": [0]}, "settings")

    assert "1.50 (1.40 to 1.60) | yes" in text
    assert text.count("not measured") == len(bench.bars) - 1
    assert "- joeynmt: training: no such thing" in text
    assert '"met": true' in compare.as_json(bench, {}, "settings")


@pytest.mark.parametrize("feeding", [False, True])
def test_the_pytorch_peer_reads_every_parameter_by_its_name(feeding):
    cfg = config_lib.ModelConfig(
        layers=2, bidirectional=False, bridge="copy", input_feeding=feeding, hidden=32, embedding=16
    )
    _, params = step_lib.abstract_params(cfg, 20, 20)
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = {".".join(key.key for key in path) for path, _ in paths}
    source = (harness.PEERS / "pytorch_luong.py").read_text(encoding="utf-8")

    read = set(re.findall(r'(?:given\[|gates\()"([\w.]+)"', source)) - (
        {"decoder.feed_kernel"} if not feeding else set()
    )
    for stack in ("encoder.forward", "decoder.stack.cells"):
        for kernel in re.findall(r'"(\w+)": "(?:weight|bias)_', source):
            read |= {f"{stack}.{layer}.{kernel}" for layer in range(2)}

    assert read == names
