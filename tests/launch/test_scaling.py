"""The model of growth: its terms, its fit, and what is read of a run."""

import json

import numpy as np
import pytest

from benchmarks import scaling
from benchmarks.scaling import Measured, Point, foretell, memory_terms, time_terms, update_seconds

PARAMETERS = 1_000_000
TRUE_TIME = np.array([2e-3, 1e-6, 5e-4, 2e-9])
TRUE_MEMORY = np.array([5e8, 16.0, 3e4])


def as_if_measured(point):
    seconds = float(TRUE_TIME @ time_terms(point, PARAMETERS))
    room = int(TRUE_MEMORY @ memory_terms(point, PARAMETERS))
    return Measured(point, [seconds * 0.9, seconds, seconds * 1.2], [room] * 3, PARAMETERS)


def test_the_ring_moves_what_it_moves():
    alone, pair, four = (time_terms(Point(n, 1, 1024, True), PARAMETERS) for n in (1, 2, 4))
    assert alone[1:] == [1024, 0, 0]
    assert pair[1:] == [512, 2, 4 * PARAMETERS]
    assert four[1:] == [256, 6, 6 * PARAMETERS]
    assert time_terms(Point(2, 8, 1024, True), PARAMETERS)[1:] == [4096, 2, 32 * PARAMETERS]


def test_constants_are_found_again_and_foretell_the_other_points():
    points = [*scaling.POINTS["processes"], *scaling.POINTS["replicas"]]
    constants, memory, rows = foretell([as_if_measured(point) for point in points])
    np.testing.assert_allclose(list(constants.values()), TRUE_TIME, rtol=1e-6)
    np.testing.assert_allclose(list(memory.values())[1:], TRUE_MEMORY[1:], rtol=1e-4)
    assert {row[-1] for row in rows} == {"fitted", "foretold"}
    errors = [row[scaling.HEADERS.index("error (%)")] for row in rows]
    np.testing.assert_allclose(errors, 0, atol=1e-6)


@pytest.mark.parametrize("part", scaling.POINTS)
def test_each_part_alone_can_be_fitted_and_has_points_to_foretell(part):
    points = scaling.POINTS[part]
    _, _, rows = foretell([as_if_measured(point) for point in points])
    np.testing.assert_allclose([row[scaling.HEADERS.index("error (%)")] for row in rows], 0, atol=1e-6)
    assert any(not point.fitted for point in points)


def test_seconds_of_an_update_are_read_between_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    times = {10: 100.0, 20: 109.0, 30: 110.0, 40: 111.0, 50: 112.2}
    lines = [{"step": 1, "time": 50.0, "start/seconds_to_first_step": 3.0}]
    lines += [{"step": step, "time": when, "train/loss": 1.0} for step, when in times.items()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert update_seconds(file) == pytest.approx(0.11)
    file.write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(ValueError, match="too few windows"):
        update_seconds(file)


def test_a_point_that_fails_is_told_and_the_others_are_measured(monkeypatch, tmp_path, capsys):
    def run(point, cores, updates, folder, cache):
        if point.replicas > 1:
            raise RuntimeError("s2s: a --config override names no field: 'replicas'")
        return float(TRUE_TIME @ time_terms(point, PARAMETERS)), 10**9, PARAMETERS

    monkeypatch.setattr(scaling, "run", run)
    assert scaling.main(["--quick", "--cores", "0", "1", "2", "3", "--output", str(tmp_path)]) == 1
    text = (tmp_path / "scaling.md").read_text()
    assert "| foretold |" in text and text.count("names no field") == 4
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert found["parts"]["processes"]["constants"]["a token (s)"] == pytest.approx(1e-6)
    assert scaling.main(["--quick", "--cores", "0", "--only", "processes", "--output", str(tmp_path)]) == 1
    assert "4 points need more cores than 1" in capsys.readouterr().out
