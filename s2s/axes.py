"""Axes of a sweep: what an experiment file says beside its config of the cells it is about.

    def sweep():
        return axes.product(axes.grid({"model.attention": ["dot", "general"]}), axes.seeds(3))

Decides what an axis is (a list of points, each the fields it changes), how axes are put together,
and what the cells are called. Must not know which fields a config has, nor what becomes of a cell.
"""

from __future__ import annotations

import hashlib
import math
import random as random_lib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SEED = "run.seed"
# Longest name of a cell: file systems take 255 bytes, and a table little more than this.
_LONGEST = 100
# Digits of a drawn number: names stay readable, and nobody tunes finer.
_DIGITS = 4


class AxisError(ValueError):
    """Axes that cannot be; the message says which, and what to do."""


@dataclass(frozen=True)
class Point:
    """One value of an axis, or one cell of a sweep.

    Attributes:
      changes: dotted name of a config field to the value it gets.
      labels: what the point is called: dotted name, or the name of its axis, to a short value.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


Axis = list[Point]


def axis(name: str, values: Iterable[Any]) -> Axis:
    """One field over values.

    >>> [dict(point.changes) for point in axis("model.hidden", [64, 128])]
    [{'model.hidden': 64}, {'model.hidden': 128}]
    """
    if isinstance(values, str):
        raise AxisError(f"the values of {name} are the text {values!r}: give a list, [{values!r}]")
    points = [Point({name: value}, {name: _said(value)}) for value in values]
    return _some(points, f"the axis {name} has no values")


def seeds(which: int | Iterable[int]) -> Axis:
    """Seeds 1 to N, or those given."""
    return axis(SEED, range(1, which + 1) if isinstance(which, int) else which)


def settings(name: str, values: Mapping[str, Mapping[str, Any]]) -> Axis:
    """An axis that sets several fields together.

    Args:
      name: of the axis.
      values: a value's short name to the fields it sets.
    """
    points = [Point(dict(changes), {name: _said(label)}) for label, changes in values.items()]
    return _some(points, f"the axis {name} has no values")


def corpora(
    names: Iterable[str], *, train: str, dev: str | None = None, test: str | None = None, name: str = "corpus"
) -> Axis:
    """An axis of corpora: it sets data.train, data.dev and data.test together.

    Args:
      names: what stands for {} in the paths, such as languages.
      train, dev, test: paths, prefixes or names of data sets with {} in them; None: left as it is.
      name: of the axis.

    >>> dict(corpora(["ice"], train="g2p/{}_train.tsv", dev="g2p/{}_dev.tsv")[0].changes)
    {'data.train': 'g2p/ice_train.tsv', 'data.dev': 'g2p/ice_dev.tsv'}
    """
    parts = {"data.train": train, "data.dev": dev, "data.test": test}
    for part, path in parts.items():
        if path is not None and "{}" not in path:
            raise AxisError(f"{part}={path!r} is the same for every {name}: put {{}} where its name stands")
    return settings(
        name,
        {
            one: {part: path.replace("{}", one) for part, path in parts.items() if path is not None}
            for one in names
        },
    )


def grid(values: Mapping[str, Iterable[Any]]) -> Axis:
    """Every combination of the values of several fields; the last one varies fastest."""
    return product(*(axis(name, given) for name, given in values.items()))


def product(*axes: Axis) -> Axis:
    """Every combination of the points of several axes; the last axis varies fastest.

    Raises:
      AxisError: two axes set the same field.
    """
    points = [Point()]
    for one in axes:
        points = [_joined(point, other) for point in points for other in one]
    return _some(points if axes else [], "a product of no axes has no cells")


def zipped(*axes: Axis) -> Axis:
    """The first points of all axes together, then the second ones, and so on.

    Raises:
      AxisError: the axes are not equally long, or two set the same field.
    """
    lengths = [len(one) for one in axes]
    if len(set(lengths)) != 1:
        raise AxisError(f"axes of {', '.join(map(str, lengths)) or 'no'} points cannot go side by side")
    return [product(*([point] for point in points))[0] for points in zip(*axes, strict=True)]


def union(*axes: Axis) -> Axis:
    """The points of one axis after those of another; of points that set the same, the first."""
    kept: Axis = []
    for point in (point for one in axes for point in one):
        if all(point.changes != other.changes for other in kept):
            kept.append(point)
    return _some(kept, "a union of no axes has no cells")


# Ranges: from a number u in [0, 1) to a value.
Range = Callable[[float], Any]


def linear(low: float, high: float) -> Range:
    """Numbers from ``low`` to ``high``, evenly."""
    _check_range(low, high)
    return lambda u: _rounded(low + u * (high - low), low, high)


def log(low: float, high: float) -> Range:
    """Numbers from ``low`` to ``high`` whose logarithms are spread evenly."""
    _check_range(low, high, above=0)
    return lambda u: _rounded(low * (high / low) ** u, low, high)


def integers(low: int, high: int, *, log: bool = False) -> Range:
    """Whole numbers from ``low`` to ``high``, both among them; ``log``: small ones more often."""
    _check_range(low, high, above=0 if log else None)
    if log:
        return lambda u: min(high, max(low, int(low * ((high + 1) / low) ** u)))
    return lambda u: min(high, low + int(u * (high - low + 1)))


def choice(values: Sequence[Any]) -> Range:
    """One of these."""
    if isinstance(values, str) or not values:
        raise AxisError(f"a choice among {values!r}: give a list with at least one value")
    return lambda u: values[min(len(values) - 1, int(u * len(values)))]


def random(number: int, ranges: Mapping[str, Range], *, seed: int = 0) -> Axis:
    """Points drawn independently from ranges (Bergstra and Bengio 2012).

    The first points are the same for every ``number``, so a sweep can be made longer. Values that
    are drawn twice, all fields alike, are one point.

    Args:
      number: points drawn.
      ranges: field to `linear`, `log`, `integers` or `choice`.
      seed: another draws other points.
    """
    dice = random_lib.Random(seed)
    return _drawn([[dice.random() for _ in ranges] for _ in range(_count(number))], ranges)


def sobol(number: int, ranges: Mapping[str, Range], *, seed: int = 0) -> Axis:
    """Points of a scrambled Sobol sequence: spread more evenly than by chance (Owen 1998).

    As `random` otherwise. Powers of two are spread best.
    """
    from scipy.stats import qmc

    whole = max(0, math.ceil(math.log2(_count(number))))
    drawn = qmc.Sobol(len(ranges), scramble=True, rng=_generator(seed)).random_base2(whole)
    return _drawn(drawn[:number].tolist(), ranges)


def halton(number: int, ranges: Mapping[str, Range], *, seed: int = 0) -> Axis:
    """Points of a scrambled Halton sequence: spread evenly for any number. As `random` otherwise."""
    from scipy.stats import qmc

    drawn = qmc.Halton(len(ranges), scramble=True, rng=_generator(seed)).random(_count(number))
    return _drawn(drawn.tolist(), ranges)


def names(points: Sequence[Point]) -> list[str]:
    """What the cells are called: short, fit for a file name, and unique whatever the case.

    A field is called by the last part of its dotted name, or by more of it where two fields of
    the sweep would be called the same.

    >>> names(product(grid({"model.hidden": [64, 128]}), seeds([7])))
    ['hidden=64_seed=7', 'hidden=128_seed=7']
    """
    labels = list(dict.fromkeys(label for point in points for label in point.labels))
    short = {label: _short(label, labels) for label in labels}
    found = []
    for point in points:
        name = "_".join(f"{short[label]}={value}" for label, value in point.labels.items()) or "base"
        if len(name) > _LONGEST:
            name = f"{name[: _LONGEST - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        found.append(name)
    return _told_apart(found)


def rows(points: Sequence[Point]) -> list[str]:
    """The row of a table that each cell belongs to: cells that differ in the seed alone share one.

    >>> rows(product(axis("model.hidden", [64, 128]), seeds(2)))
    ['hidden=64', 'hidden=64', 'hidden=128', 'hidden=128']
    """
    bare = [Point(_without_seed(point.changes), _without_seed(point.labels)) for point in points]
    kept = union(bare) if bare else []
    called = dict(zip(map(id, kept), names(kept), strict=True))
    return [called[id(next(one for one in kept if one.changes == point.changes))] for point in bare]


def _without_seed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != SEED}


def _joined(point: Point, other: Point) -> Point:
    twice = sorted(set(point.changes) & set(other.changes))
    if twice:
        raise AxisError(f"two axes set {', '.join(twice)}: leave it to one of them")
    return Point({**point.changes, **other.changes}, {**point.labels, **other.labels})


def _drawn(rows: list[list[float]], ranges: Mapping[str, Range]) -> Axis:
    points = []
    for row in rows:
        changes = {name: at(u) for (name, at), u in zip(ranges.items(), row, strict=True)}
        points.append(Point(changes, {name: _said(value) for name, value in changes.items()}))
    return union(points)


def _generator(seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed)


def _count(number: int) -> int:
    if number < 1:
        raise AxisError(f"{number} points cannot be drawn: give at least 1")
    return number


def _some(points: Axis, otherwise: str) -> Axis:
    if not points:
        raise AxisError(otherwise)
    return points


def _check_range(low: float, high: float, above: float | None = None) -> None:
    if not low <= high or (above is not None and low <= above):
        limit = "" if above is None else f", both above {above}"
        raise AxisError(f"a range from {low} to {high}: give the lower end first{limit}")


def _rounded(value: float, low: float, high: float) -> float:
    # Rounding must not lead out of the range.
    return min(high, max(low, float(f"{value:.{_DIGITS}g}")))


def _said(value: Any) -> str:
    """A value as a piece of a name: letters, digits, "." "+" and "-"."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return re.sub(r"[^\w.+-]+", "-", str(value).replace("_", "-")).strip("-.") or "blank"


def _short(label: str, labels: Sequence[str]) -> str:
    parts = label.split(".")
    for number in range(1, len(parts) + 1):
        short = ".".join(parts[-number:])
        if [other for other in labels if f".{other}".endswith(f".{short}")] == [label]:
            return short
    return label


def _told_apart(found: list[str]) -> list[str]:
    """The same names, numbered from the second of equal ones on."""
    taken: set[str] = set()
    apart = []
    for name in found:
        one, number = name, 1
        while one.casefold() in taken:
            number += 1
            one = f"{name}-{number}"
        taken.add(one.casefold())
        apart.append(one)
    return apart
