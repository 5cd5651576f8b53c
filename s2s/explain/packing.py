"""Packing: arrays in JSON, and what goes first when there are too many.

Decides how an array is written and what is left out of a large explanation, in which order. Must not
know what a model is.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Bytes of JSON for a page of one model, and for each further one: a few hundred kB together.
BUDGET, _FURTHER = 360_000, 120_000


class Units(NamedTuple):
    """An array whose last axis counts units, which may be thinned.

    Attributes:
      array: any floats.
      parts: blocks of equal size that the last axis joins (directions); the first of each are kept.
    """

    array: Any
    parts: int = 1


class _Level(NamedTuple):
    """How much is kept: bytes a number, fields without place, and units of every vector."""

    kind: str
    left_out: tuple[str, ...]
    units: int | None


_SMALL = ("precision", "what_if weights")
_LEVELS = (
    _Level("f32", (), None),
    _Level("f16", ("precision",), None),
    _Level("f16", _SMALL, None),
    _Level("f16", (*_SMALL, "units"), 64),
    _Level("f16", (*_SMALL, "units"), 32),
    _Level("f16", (*_SMALL, "units", "gates"), 32),
    _Level("f16", (*_SMALL, "units", "gates"), 16),
    _Level("f16", (*_SMALL, "units", "gates", "what_if"), 16),
    _Level("f16", (*_SMALL, "units", "gates", "what_if"), 8),
)


def pack(told: dict[str, Any], budget: int | None = None) -> dict[str, Any]:
    """Writes all arrays as text, and leaves out what it must, the least missed first.

    Args:
      told: an explanation: nested dicts and lists with arrays and `Units` among what JSON knows, and
        "models", a list.
      budget: bytes of JSON to stay under, where that can be; None: what suits a page.

    Returns:
      The same with {"shape", "f32" or "f16"} for arrays, and ``left_out`` (what is missing, by name),
      ``digits`` (significant ones of what is kept) and ``units_shown`` (of each vector; None: all).
    """
    if budget is None:
        budget = BUDGET + _FURTHER * (len(told["models"]) - 1)
    packed: dict[str, Any] = {}
    for level in _LEVELS:
        packed = _packed(told, level, ())
        packed |= {
            "left_out": list(level.left_out),
            "digits": 6 if level.kind == "f32" else 3,
            "units_shown": level.units,
        }
        if len(as_json(packed).encode("utf-8", "surrogatepass")) <= budget:
            break
    return packed


def as_json(told: Any) -> str:
    """JSON in as few characters as it takes."""
    return json.dumps(told, ensure_ascii=False, separators=(",", ":"))


def array(value: Any, kind: str = "f32") -> dict[str, Any]:
    """An array as JSON: its shape, and its numbers little-endian in C order, in base64."""
    numbers = np.ascontiguousarray(value, dtype={"f32": "<f4", "f16": "<f2"}[kind])
    return {"shape": list(numbers.shape), kind: base64.b64encode(numbers.tobytes()).decode("ascii")}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """What `array` wrote."""
    (kind,) = {"f32", "f16"} & set(packed)
    numbers = np.frombuffer(base64.b64decode(packed[kind]), {"f32": "<f4", "f16": "<f2"}[kind])
    return numbers.reshape(packed["shape"])


def _packed(told: Any, level: _Level, path: Sequence[str]) -> Any:
    if isinstance(told, Units):
        return array(_thinned(told, level.units), level.kind)
    if isinstance(told, np.ndarray):
        return array(told, level.kind if "what_if" in path else "f32")
    if isinstance(told, dict):
        return {
            key: _packed(value, level, (*path, key))
            for key, value in told.items()
            if not _is_left_out(key, level, path)
        }
    if isinstance(told, list | tuple):
        if path and path[-1] == "what_if" and "what_if" in level.left_out:
            return []
        return [_packed(value, level, path) for value in told]
    return told


def _is_left_out(key: str, level: _Level, path: Sequence[str]) -> bool:
    weights = key == "weights" and "what_if" in path and "what_if weights" in level.left_out
    return weights or (key == "gates" and "gates" in level.left_out)


def _thinned(units: Units, shown: int | None) -> np.ndarray:
    numbers = np.asarray(units.array, np.float32)
    if shown is None:
        return numbers
    blocks = numbers.reshape(*numbers.shape[:-1], units.parts, -1)[..., :shown]
    return blocks.reshape(*numbers.shape[:-1], -1)
