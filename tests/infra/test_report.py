"""What is told: numbers once, in order, readable by machine and man."""

import json
import math
import sys

import pytest

from s2s.infra import report
from s2s.infra.report import Reporter, clock, number, table


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Terminal:
    """A stderr that says it is a terminal."""

    def __init__(self):
        self.written = ""

    def write(self, text):
        self.written += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_scalars_are_lines_at_once_and_curves_for_tensorboard(tmp_path):
    with Reporter(tmp_path, 100) as reporter:
        reporter.scalars(50, {"loss": 2.5, "tokens": 1200})
        (line,) = lines_of(tmp_path)
        assert line["step"] == 50 and line["train/loss"] == 2.5 and line["train/tokens"] == 1200
        assert line["time"] > 1.6e9
        reporter.scalars(50, {"bleu": 31.25}, group="dev")
    assert lines_of(tmp_path)[1]["dev/bleu"] == 31.25
    (events,) = (tmp_path / "tensorboard").iterdir()
    written = events.read_bytes()
    assert b"train/loss" in written and b"dev/bleu" in written


def test_what_is_not_finite_is_still_json(tmp_path):
    with Reporter(tmp_path, 100) as reporter:
        reporter.scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [line[f"train/{name}"] for name in "abcd"] == [None, "inf", "-inf", 0.5]


def test_a_resumed_run_has_no_step_twice(tmp_path):
    with Reporter(tmp_path, 100) as reporter:
        for step in (10, 20, 30):
            reporter.scalars(step, {"loss": float(step)})
            reporter.scalars(step, {"loss": float(step)}, group="dev")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "train/lo\n{"step": 15, "train/loss": 1}')
    with Reporter(tmp_path, 100, restored_step=20) as reporter:
        assert [line["step"] for line in lines_of(tmp_path)] == [10, 10, 20, 20]
        reporter.scalars(30, {"loss": 1.0})
    assert [line["step"] for line in lines_of(tmp_path)] == [10, 10, 20, 20, 30]
    assert lines_of(tmp_path)[-1]["train/loss"] == 1.0
    with Reporter(tmp_path, 100):
        assert lines_of(tmp_path) == []


def test_other_processes_print_and_write_nothing(tmp_path, capsys):
    with Reporter(tmp_path / "run", 100, main_process=False) as reporter:
        reporter.scalars(1, {"loss": 1.0})
        reporter.progress(100, {"loss": 1.0}, 5)
        reporter.say("hello")
        reporter.note("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Reporter(None, 10) as reporter:
        reporter.scalars(1, {"loss": 1.0})
        reporter.say("still told")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == "still told\n"


def test_a_run_goes_on_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with Reporter(tmp_path, 10) as reporter:
        reporter.scalars(1, {"loss": 1.0})
    assert len(lines_of(tmp_path)) == 1
    assert "no TensorBoard" in capsys.readouterr().err


@pytest.fixture
def now(monkeypatch):
    """A clock that the test turns."""
    time = [1000.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: time[0])
    return time


def test_plain_progress_is_a_line_now_and_then_with_rate_and_time_left(tmp_path, now, capsys):
    reporter = Reporter(None, 1000, restored_step=100)
    now[0] += 20
    reporter.progress(200, {"epoch": 3.25, "loss": 2.3149, "lr": 0.00071}, tokens=364000)
    assert capsys.readouterr().err == (
        "step 200/1000  epoch 3.25  loss 2.315  lr 0.00071  18.2k tok/s  2:40 left\n"
    )
    # Too soon for a line, but its tokens count in the next.
    now[0] += 4
    reporter.progress(220, {"loss": 2.2}, tokens=1000)
    assert capsys.readouterr().err == ""
    now[0] += 16
    reporter.progress(300, {"loss": 2.1}, tokens=3000)
    assert capsys.readouterr().err == "step 300/1000  loss 2.1  200 tok/s  2:20 left\n"
    # The last step is always told.
    now[0] += 1
    reporter.progress(1000, {"loss": 2.0}, tokens=100)
    said = capsys.readouterr()
    assert said.err == "step 1000/1000  loss 2  100 tok/s  0:00 left\n"
    assert said.out == ""


def test_time_left_follows_the_present_speed(now, capsys):
    reporter = Reporter(None, 10_000)
    step = 0
    for seconds in [100.0, *[10.0] * 30]:
        step += 100
        now[0] += seconds
        reporter.progress(step, {})
    # 6,900 steps to go at 10 a second; the slow start is forgotten.
    assert capsys.readouterr().err.endswith("step 3100/10000  0 tok/s  11:30 left\n")


def test_a_terminal_gets_a_bar_and_results_go_around_it(tmp_path, monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Reporter(tmp_path, 200) as reporter:
        reporter.progress(50, {"loss": 2.5}, tokens=100)
        reporter.progress(60, {"loss": 2.4}, tokens=100)
        reporter.say("dev loss 2.2")
        reporter.progress(100, {"loss": 2.3}, tokens=100)
    assert "step 100/200" in terminal.written and "loss 2.3" in terminal.written
    assert " 50%" in terminal.written
    assert "dev loss" not in terminal.written
    assert capsys.readouterr().out == "dev loss 2.2\n"


def test_tables_line_up():
    rows = [["copy", 0.98123, 7], ["日付", 12.5, None], ["a|b", 1 / 3, 12000]]
    assert table(rows, ["task", "exact match", "steps"]) == (
        "task  exact match  steps\n"
        "----  -----------  -----\n"
        "copy       0.9812      7\n"
        "日付         12.5      -\n"
        "a|b        0.3333  12000"
    )
    assert table(rows, ["task", "exact match", "steps"], markdown=True) == (
        "| task | exact match | steps |\n"
        "|------|------------:|------:|\n"
        "| copy |      0.9812 |     7 |\n"
        "| 日付 |        12.5 |     - |\n"
        "| a\\|b |      0.3333 | 12000 |"
    )
    assert table([], ["nothing"]) == "nothing\n-------"
    with pytest.raises(ValueError, match="1 cells under 2 headers"):
        table([["x"]], ["a", "b"])


def test_numbers_and_clocks_are_short():
    assert [number(value) for value in (3, 12345, 0.5, 1e-5, 123456.7, math.nan, 0.0, 1e12)] == [
        *("3", "12345", "0.5", "1e-05", "123457", "nan", "0", "1e+12")
    ]
    assert [clock(value) for value in (0, 59.6, 3599, 3600, 100000, math.inf, math.nan)] == [
        *("0:00", "1:00", "59:59", "1:00:00", "1d 03:46:40", "?", "?")
    ]
    assert [report._thousands(value) for value in (0, 999, 999.96, 18_240, 999_990, 2.5e6)] == [
        *("0", "999", "1.0k", "18.2k", "1.0M", "2.5M")
    ]


@pytest.mark.parametrize(
    ("values", "told"), [([2.31], "2.31"), ([1.0, 2.0, 4.5], "2.5 (1 to 4.5)"), ([3, 3], "3 (3 to 3)")]
)
def test_spread_is_mean_and_range(values, told):
    assert report.spread(values) == told
