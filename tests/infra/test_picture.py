"""Pictures: the right weights in the right places, in every format, without a word."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from s2s.infra import picture


def drawn(monkeypatch):
    """The figures that would be written."""
    figures = []
    write = picture._write
    monkeypatch.setattr(picture, "_write", lambda figure, path: (figures.append(figure), write(figure, path)))
    return figures


@pytest.mark.parametrize("ending, magic", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_ending_picks_the_format(tmp_path, ending, magic):
    path = tmp_path / "new" / f"a.{ending}"
    picture.attention_picture(path, ["a", "b"], ["x"], [[0.2, 0.8]], "title")
    assert path.read_bytes().startswith(magic)


def test_rows_are_targets_and_columns_sources(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    weights = np.array([[0.1, 0.7, 0.2], [0.0, 0.0, 1.0]])
    picture.attention_picture(tmp_path / "a.png", ["▁ein", "Haus", " "], ["a", "$_house$"], weights)
    axes = figures[0].axes[0]
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array(), weights)
    assert image.get_clim() == (0.0, 1.0)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["_ein", "Haus", "␣"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "$_house$"]


def test_weights_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for 2 target and 3 source tokens: \(2, 3\)"):
        picture.attention_picture(tmp_path / "a.png", list("abc"), list("xy"), np.zeros((3, 2)))
    with pytest.raises(ValueError, match="nothing to draw with 1 target and 0 source tokens"):
        picture.attention_picture(tmp_path / "a.png", [], ["x"], np.zeros((1, 0)))


def test_characters_without_a_font_are_drawn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture.attention_picture(
            tmp_path / "a.png", ["昨日", "\U0001f600", "ب"], ["\x01"], [[0.2, 0.3, 0.5]]
        )
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_curves_have_the_values_of_the_file(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    lines = [
        {"step": 10, "time": 1.0, "train/loss": 3.0, "train/epoch": 1},
        {"step": 20, "time": 1.0, "train/loss": None},
        {"step": 20, "time": 1.0, "dev/loss": "inf", "dev/bleu": 1.0},
        {"step": 30, "time": 1.0, "train/loss": 1.0},
        {"step": 30, "time": 1.0, "dev/loss": 1.5},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture.curve_picture(tmp_path / "curve.svg", metrics)
    curves = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert curves == {"train": [[10, 3], [30, 1]], "dev": [[30, 1.5]]}
    with pytest.raises(ValueError, match="no finite 'ter'; it has bleu, epoch, loss"):
        picture.curve_picture(tmp_path / "curve.svg", metrics, "ter")


def test_several_runs_share_a_picture(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    files = {}
    for number, run in enumerate(("dot", "general")):
        lines = [{"step": 1, "train/loss": 9.0}, {"step": 2, "dev/loss": 1.0 + number}]
        files[run] = tmp_path / f"{run}.jsonl"
        files[run].write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture.curve_picture(tmp_path / "curve.pdf", files)
    curves = {line.get_label(): line.get_xydata().tolist() for line in figures[0].axes[0].lines}
    assert curves == {"dot": [[2, 1.0]], "general": [[2, 2.0]]}
    lines = figures[0].axes[0].lines
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 2


def test_alignments_are_marked_in_their_cells(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    weights = [[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]]
    picture.attention_picture(
        tmp_path / "a.pdf", list("abc"), list("xy"), weights, hard=[(0, 0), (2, 1)], gold=[(1, 1)]
    )
    axes = figures[0].axes[0]
    (dots,) = axes.collections
    assert dots.get_offsets().tolist() == [[0, 0], [2, 1]]
    assert len({tuple(color) for color in dots.get_facecolors()}) == 2  # light on dark, dark on light
    (frame,) = axes.patches
    x, y = frame.get_xy()
    assert (round(x + frame.get_width() / 2), round(y + frame.get_height() / 2)) == (1, 1)


def test_characters_without_a_font_are_told():
    assert picture.without_font(["▁abc", "a b", "\n"]) == ""
    assert picture.without_font(["a\U00013000b", "\U00013000"]) == "\U00013000"


def test_matplotlib_is_loaded_only_to_draw():
    code = (
        "import sys, s2s.infra.picture, s2s.infra.report; "
        "assert not {'matplotlib', 'tqdm', 'tensorboardX', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
