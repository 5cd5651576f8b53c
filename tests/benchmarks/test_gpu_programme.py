"""The GPU programme, where there is no GPU: everything but the device is what it will be."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from benchmarks.gpu import plan, report
from benchmarks.gpu.__main__ import run


@pytest.fixture
def on_cpu(monkeypatch):
    """Processes compile quickly and for the CPU."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")


def needs_gpu(row) -> bool:
    asked = {row["options"].get(name) for name in ("name", "recurrence", "way")}
    return bool(asked & {"cudnn", "cudnn_is_package", "cudnn_learns_as_scan"})


@pytest.mark.slow
def test_a_tiny_programme_runs_and_only_cudnn_is_missed(on_cpu, tmp_path):
    output = tmp_path / "results" / "gpu.json"
    # Left out: two more compilations of a training step, of a sort that another cell has.
    cells = [
        cell for cell in plan.programme(tiny=True) if cell.options.get("name") != "bfloat16_learns_as_float32"
    ]
    results = run(cells, output, budget=240)
    assert json.loads(output.read_text(encoding="utf-8")) == results
    assert results["machine"]["platform"] == "cpu"
    for row in results["cells"]:
        if needs_gpu(row):
            assert row["status"] == "failed" and "cuDNN needs an NVIDIA GPU" in row["error"], row
        else:
            assert row["status"] == "done", row
            assert row["figures"].get("passed", True), row
    tables = output.with_suffix(".md").read_text(encoding="utf-8")
    for title in (
        "Is it right?",
        "Floors",
        "Training steps",
        "One LSTM layer",
        "Beam search",
        "Not measured",
    ):
        assert f"## {title}" in tables
    assert "FAIL" not in tables


def test_a_cell_that_fails_or_never_ends_stops_no_other(on_cpu, tmp_path):
    good = plan.Cell("peak", "default", {"numbers": "tf32", "side": 8}, 60)
    cells = [
        plan.Cell("peak", "default", {"numbers": "tf32", "sides": 8}, 60),
        plan.Cell("loop", "default", {"turns": 2**30}, 0.5),
        good,
    ]
    results = run(cells, tmp_path / "gpu.json", budget=120)
    wrong, endless, last = results["cells"]
    assert (wrong["status"], endless["status"], last["status"]) == ("failed", "failed", "done")
    assert "sides" in wrong["error"]
    assert endless["error"] == "no answer within 0.5 s"
    assert last["figures"]["flops"] > 0


def test_without_time_nothing_starts(tmp_path):
    results = run(plan.programme(), tmp_path / "gpu.json", budget=0)
    assert {row["status"] for row in results["cells"]} == {"not reached"}
    assert results["seconds"] < 30 and results["machine"] is None


def test_the_flags_are_those_of_this_xla():
    """XLA ends a process that gives it a flag it does not know."""
    environment = os.environ | {"XLA_FLAGS": " ".join(plan.FLAGS.values()), "JAX_PLATFORMS": "cpu"}
    code = "import jax; jax.devices()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_plan_is_one_that_processes_understand():
    from benchmarks.gpu.layers import WAYS
    from benchmarks.gpu.measure import CHECKS, MEASURES

    cells = plan.programme()
    assert len({json.dumps(cell.to_dict(), sort_keys=True) for cell in cells}) == len(cells)
    assert set(MEASURES) == set(plan.LIMITS) == {cell.kind for cell in cells}
    for cell in cells:
        assert cell.flags in plan.FLAGS and cell.limit == plan.LIMITS[cell.kind]
        assert cell.options.get("numbers", "tf32") in plan.NUMBERS
        assert cell.options.get("way", "package") in WAYS
    assert {cell.options["name"] for cell in cells if cell.kind == "check"} == set(CHECKS)
    # Whatever else there is time for: the laws come first, then the floors.
    kinds = [cell.kind for cell in cells]
    assert kinds[: len(CHECKS)] == ["check"] * len(CHECKS)
    assert max(kinds.index(kind) for kind in ("peak", "bandwidth", "loop")) < kinds.index("train")


# ---- tables of planted figures ----


def planted(kind: str, flags: str = "default", figures=None, **options):
    shape = dataclasses.asdict(plan.SIZES[options.get("size", "main")])
    cell = plan.Cell(kind, flags, options | {"shape": shape}, 1.0)
    return cell.to_dict() | {"status": "done", "figures": figures or {}}


def trained(seconds: float, flags: str = "default", **options):
    figures = {"seconds": seconds, "tokens_per_second": 2048 / seconds, "flops": 1e12, "temporary_bytes": 1e6,
               "compile_seconds": 3.0}  # fmt: skip
    return planted("train", flags, figures, **({"size": "main", "numbers": "tf32"} | options))


def layered(seconds: float, way: str, **options):
    figures = {"forward_seconds": seconds / 3, "gradient_seconds": seconds, "gradient_temporary_bytes": 1e6}
    return planted("layer", "default", figures, **({"size": "main", "numbers": "tf32", "way": way} | options))


def tables(*rows) -> str:
    return report.markdown(
        {"began": "", "commit": None, "gpu": None, "machine": None, "budget": 1.0, "cells": list(rows)}
    )


def test_the_best_is_the_fastest_of_those_that_do_the_same():
    rows = [
        trained(0.010, recurrence="scan"),
        trained(0.006, "loops in graphs", recurrence="scan"),
        trained(0.008, recurrence="cudnn"),
        trained(0.001, recurrence="scan", filled=0.6),
        trained(0.002, recurrence="scan", feeding=True),
        trained(0.003, recurrence="scan", numbers="bfloat16"),
    ]
    first, feeding, low = report.best(rows)
    assert first == {
        "size": "main", "feeding": False, "numbers": "tf32", "recurrence": "scan", "flags": "loops in graphs",
        "seconds": 0.006, "against": 0.010, "of": 3,
    }  # fmt: skip
    assert feeding["feeding"] and feeding["of"] == 1 and low["numbers"] == "bfloat16"
    assert "| main | tf32 | scan | loops in graphs | 6 | 1.67 x | 3 |" in tables(*rows)


def test_a_check_that_fails_is_seen():
    figures = {"distance": 0.5, "bound": 2e-5, "passed": False}
    assert "| cudnn is package | 5.0e-01 | 2e-05 | **FAIL** |" in tables(
        planted("check", figures=figures, name="cudnn_is_package")
    )


def test_flags_are_compared_cell_by_cell():
    text = tables(trained(0.010, recurrence="scan"), trained(0.006, "no graphs", recurrence="scan"))
    assert "| cell | default (ms) | no graphs (ms) |" in text
    assert "| train, size main, numbers tf32, recurrence scan | 10 | 6 |" in text


def test_pads_are_compared_with_a_full_batch():
    text = tables(trained(0.010, recurrence="scan"), trained(0.007, recurrence="scan", filled=0.6))
    assert "| train, size main, numbers tf32, recurrence scan | 60% | 10 | 7 | 70% |" in text


def test_the_kernel_is_judged_by_what_is_left_to_save():
    # Products of 3 * 2 * 2048 * 2 * 512 * 2048 FLOPs at 100 TFLOP/s: 0.258 ms; 64 barriers of 2 us: 0.128 ms.
    floors = [
        planted("peak", figures={"flops": 100e12}, numbers="tf32"),
        planted("bandwidth", figures={"bytes_per_second": 1e15}),
    ]
    rows = [layered(0.0010, "static"), layered(0.0009, "package"), layered(0.0008, "fused")]
    text = tables(*floors, *rows)
    assert "| main, tf32 | package [default] | 0.9 | 0.8 | wins | 0.386 | 57% |" in text
    text = tables(*floors, *rows[:2], layered(0.00089, "fused"))
    assert "| does not win |" in text


def test_what_is_not_measured_is_listed():
    row = trained(1.0, recurrence="cudnn") | {"status": "failed", "error": "RuntimeError: no memory\nmore"}
    text = tables(row, trained(1.0, recurrence="scan") | {"status": "not reached"})
    assert "- train, size main, numbers tf32, recurrence cudnn: failed (RuntimeError: no memory)" in text
    assert "- train, size main, numbers tf32, recurrence scan: not reached" in text
    assert "Training steps" not in text
