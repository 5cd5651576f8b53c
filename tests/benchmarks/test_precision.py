"""The command tells of every way to multiply how exact it is; here of a model of a few units."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import compare, data, precision
from s2s.batch import EOS
from s2s.data.encode import Encoded
from s2s.kernels import library

PAIRS, LENGTH, VOCABULARY = 400, 6, 40


def sentences(*_):
    """Pairs of one length."""
    ids = np.random.default_rng(0).integers(4, VOCABULARY, (2, PAIRS, LENGTH), dtype=np.int32)
    ids[:, :, -1] = EOS
    starts, numbers = LENGTH * np.arange(PAIRS + 1), np.arange(PAIRS)
    return Encoded(ids[0].ravel(), starts, ids[1].ravel(), starts, numbers, numbers + 1, [])


def shallow(*args, luong=compare.luong):
    """One layer: most of the time goes by with compiling."""
    return {**luong(*args), "model.layers": 1}


@pytest.fixture
def quickly_compiled():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quickly_compiled")
def test_the_command_tells_of_every_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "prepare", lambda folder, given: SimpleNamespace(mt=None))
    monkeypatch.setattr(data, "encoded_sentences", sentences)
    monkeypatch.setattr(compare, "luong", shallow)
    monkeypatch.setattr(data, "VOCABULARY", VOCABULARY)
    for name in ("ROWS", "DEPTH", "COLUMNS"):
        monkeypatch.setattr(precision, name, 40)
    output = tmp_path / "precision.md"
    command = ["precision", "--hidden", "16", "--updates", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    precision.main()
    text = output.read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    record = json.loads(output.with_suffix(".json").read_text())
    models, products = record["gradients"], record["products"]
    assert [model["feeding"] for model in models] == [False, True]
    for name in precision.WAYS:
        assert sum(line.startswith(f"| {name} ") for line in text.splitlines()) == len(models)
        assert text.count(f"| {name} ") == len(models) + len(products)
    for of_way in [*(model["ways"] for model in models), *products.values()]:
        assert list(of_way) == list(precision.WAYS)
    for model in models:
        largest = {name: max(way["gradient"].values()) for name, way in model["ways"].items()}
        # Nothing is float64, and float32 is near it.
        assert 0 < largest["float32, XLA"] < 1e-5 and largest["float32"] < 1e-5
        assert largest["bfloat16"] > 1e-3
    loaded = library.load()
    if loaded is not None and loaded.has_matrix_unit:
        errors = [products["normal"][name][0] for name in precision.WAYS]
        assert max(errors[:3]) < errors[3] < errors[4]
