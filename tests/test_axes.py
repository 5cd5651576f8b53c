"""Axes: as many points as there should be, the same ones every time, under names that tell them apart."""

import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2s import axes

RANGES = {
    "optim.learning_rate": axes.log(1e-4, 1e-2),
    "model.dropout": axes.linear(0.0, 0.5),
    "model.hidden": axes.integers(16, 512, log=True),
    "model.layers": axes.integers(1, 4),
    "model.attention": axes.choice(["dot", "general"]),
}
DRAWS = [axes.random, axes.sobol, axes.halton]

values = st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True)
texts = st.lists(st.text(max_size=6), min_size=1, max_size=6, unique=True)


def changes(points):
    return [dict(point.changes) for point in points]


@given(values, values, values)
def test_a_grid_has_every_combination_once(one, two, three):
    points = changes(axes.grid({"a.x": one, "a.y": two, "a.z": three}))
    assert len(points) == len(one) * len(two) * len(three)
    assert points == [{"a.x": x, "a.y": y, "a.z": z} for x in one for y in two for z in three]


@given(values, values)
def test_a_union_keeps_each_point_once(one, two):
    points = changes(axes.union(axes.axis("a.x", one), axes.axis("a.x", two)))
    assert [point["a.x"] for point in points] == list(dict.fromkeys([*one, *two]))


def test_values_side_by_side():
    points = axes.zipped(axes.axis("a.x", [1, 2]), axes.axis("a.y", [3, 4]))
    assert changes(points) == [{"a.x": 1, "a.y": 3}, {"a.x": 2, "a.y": 4}]
    with pytest.raises(axes.AxisError, match="axes of 2, 1 points"):
        axes.zipped(axes.axis("a.x", [1, 2]), axes.axis("a.y", [3]))


def test_two_axes_cannot_set_one_field():
    with pytest.raises(axes.AxisError, match="two axes set a.x"):
        axes.product(axes.axis("a.x", [1]), axes.grid({"a.y": [1], "a.x": [2]}))


def test_seeds():
    assert changes(axes.seeds(2)) == [{"run.seed": 1}, {"run.seed": 2}]
    assert changes(axes.seeds([7])) == [{"run.seed": 7}]


def test_corpora_set_all_parts_together():
    points = axes.corpora(["de", "is"], train="{}/train", dev="{}/dev", test="x/{}", name="language")
    assert changes(points)[1] == {"data.train": "is/train", "data.dev": "is/dev", "data.test": "x/is"}
    assert axes.names(points) == ["language=de", "language=is"]
    with pytest.raises(axes.AxisError, match="data.dev='same' is the same for every corpus"):
        axes.corpora(["de"], train="{}/train", dev="same")


@pytest.mark.parametrize("draw", DRAWS)
def test_drawn_points_are_reproducible_and_can_be_made_more(draw):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few, many = draw(5, RANGES, seed=3), draw(11, RANGES, seed=3)
    assert len(many) == 11
    assert many[:5] == few
    assert draw(5, RANGES, seed=4) != few


@pytest.mark.parametrize("draw", DRAWS)
def test_drawn_points_are_in_their_ranges(draw):
    for point in changes(draw(64, RANGES)):
        assert 1e-4 <= point["optim.learning_rate"] <= 1e-2
        assert 0 <= point["model.dropout"] <= 0.5
        assert 16 <= point["model.hidden"] <= 512 and isinstance(point["model.hidden"], int)
        assert point["model.layers"] in (1, 2, 3, 4)
        assert point["model.attention"] in ("dot", "general")


@pytest.mark.parametrize("draw", [axes.sobol, axes.halton])
def test_quasi_random_points_are_spread_evenly(draw):
    points = changes(draw(64, RANGES))
    for layers in (1, 2, 3, 4):
        assert 15 <= sum(point["model.layers"] == layers for point in points) <= 17
    # Half of them below the middle of the logarithms.
    assert 31 <= sum(point["optim.learning_rate"] < 1e-3 for point in points) <= 33


@given(st.floats(0, 1, exclude_max=True), st.floats(1e-6, 1e3), st.floats(1, 100))
def test_ranges_hold_what_they_draw(u, low, factor):
    high = low * factor
    for found in (axes.linear(low, high)(u), axes.log(low, high)(u)):
        assert low <= found <= high
    assert 1 <= axes.integers(1, 7)(u) <= 7 and 1 <= axes.integers(1, 7, log=True)(u) <= 7


def test_both_ends_of_integers_are_drawn():
    for log in (False, True):
        ends = axes.integers(2, 5, log=log)
        assert (ends(0.0), ends(1 - 1e-12)) == (2, 5)


def test_points_drawn_twice_are_one():
    assert len(axes.random(50, {"a.x": axes.choice([1, 2, 3])})) == 3


@settings(max_examples=200)
@given(texts, texts)
def test_names_are_unique_and_safe(one, two):
    points = axes.product(axes.axis("a.x", one), axes.axis("b.x", two), axes.seeds(2))
    names = axes.names(points)
    assert len({name.casefold() for name in names}) == len(points)
    for name in names:
        assert re.fullmatch(r"[\w.+=-]+", name) and not name.startswith(".") and len(name) < 110


def test_names_are_short_where_that_is_clear():
    points = axes.grid({"model.hidden": [64], "optim.name": ["adam"], "search.name": ["beam"]})
    assert axes.names(points) == ["hidden=64_optim.name=adam_search.name=beam"]
    assert axes.names(axes.axis("model.input_feeding", [True, False])) == [
        "input_feeding=yes",
        "input_feeding=no",
    ]
    assert axes.names([axes.Point()]) == ["base"]


def test_very_long_names_are_cut_and_stay_apart():
    points = axes.settings("a", {f"{'long' * 40}{number}": {"a.x": number} for number in range(3)})
    names = axes.names(points)
    assert len(set(names)) == 3 and all(len(name) <= 100 for name in names)


def test_a_row_has_all_seeds():
    points = axes.product(axes.grid({"optim.learning_rate": [1e-3, 1.00000001e-3]}), axes.seeds(2))
    one, two = "learning_rate=0.001", "learning_rate=0.001-2"
    assert axes.rows(points) == [one, one, two, two]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: axes.axis("a.x", []), "a.x has no values"),
        (lambda: axes.axis("a.x", "dot"), r"give a list, \['dot'\]"),
        (lambda: axes.product(), "no axes"),
        (lambda: axes.union(), "no axes"),
        (lambda: axes.zipped(), "axes of no points"),
        (lambda: axes.linear(2, 1), "from 2 to 1"),
        (lambda: axes.log(0, 1), "both above 0"),
        (lambda: axes.choice([]), "at least one"),
        (lambda: axes.random(0, RANGES), "at least 1"),
    ],
)
def test_axes_that_cannot_be_are_told(make, told):
    with pytest.raises(axes.AxisError, match=told):
        make()
