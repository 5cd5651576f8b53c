"""Films: the right frames in the right order, in both formats, and legible."""

import re
import subprocess
import sys

import numpy as np
import pytest

from s2s.infra import film as film_lib
from s2s.infra.film import FilmError, Scene, film, storyboard

rng = np.random.default_rng(0)
SCENE = Scene(
    source=["▁ein", "昨日", "</s>"],
    target=["a", "$x_1$"],
    memory=rng.uniform(-1, 1, (3, 4)),
    states=rng.uniform(-1, 1, (2, 6)),
    weights=np.array([[0.7, 0.3, 0.0], [0.0, 0.1, 0.9]]),
    likeliest=[[("a", 0.9), ("b", 0.1)], [("$x_1$", 1.0)]],
)


def test_every_token_is_read_and_every_step_looks_and_writes():
    kinds = [(frame.kind, frame.at) for frame in storyboard(SCENE)]
    read = [("read", 0), ("read", 1), ("read", 2), ("hand over", 0)]
    assert kinds == [*read, ("look", 0), ("write", 0), ("look", 1), ("write", 1), ("end", 1)]
    blind = storyboard(SCENE._replace(weights=None))
    assert [frame.kind for frame in blind] == ["read"] * 3 + ["hand over", "write", "write", "end"]


def test_a_gif_has_a_frame_for_each(tmp_path):
    from PIL import Image

    path = tmp_path / "new" / "a.gif"
    assert film(path, SCENE, dots_per_inch=40) == 9
    with Image.open(path) as image:
        assert image.n_frames == 9 and image.size == (384, 216)
        seen, durations = [], []
        for number in range(9):
            image.seek(number)
            seen.append(image.convert("RGB").tobytes())
            durations.append(image.info["duration"])
    assert len(set(seen)) == 9
    assert durations == [round(1000 * frame.seconds) for frame in storyboard(SCENE)]


def test_an_mp4_lasts_as_long(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / "a.mp4"
    assert film(path, SCENE, dots_per_inch=40) == 9
    command = [ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "null", "-"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    frames = [int(number) for number in re.findall(r"frame=\s*(\d+)", told)]
    assert frames[-1] == round(20 * sum(frame.seconds for frame in storyboard(SCENE)))
    assert "384x216" in told and "yuv420p" in told


def test_a_line_is_as_thick_as_its_weight():
    from s2s.infra.picture import canvas

    def lines(frame):
        with canvas() as figure:
            axes = figure.add_axes((0, 0, 1, 1))
            film_lib._draw(axes, SCENE, frame, 9.6)
            drawn = [line for line in axes.lines if len(line.get_xdata()) == 2]
            texts = [text.get_text() for text in axes.texts]
        return [(line.get_xdata().tolist(), line.get_linewidth()) for line in drawn], texts

    frames = storyboard(SCENE)
    looked, texts = lines(frames[4])
    (x0, first), (x1, second) = looked
    assert first - 0.4 == pytest.approx(6 * 0.7) and second - 0.4 == pytest.approx(6 * 0.3)
    assert x0[1] == x1[1] and x0[0] < x1[0]
    assert "a" not in texts and "昨日" in texts
    written, texts = lines(frames[5])
    assert "a" in texts and "$x_1$" not in texts
    assert not lines(frames[0])[0] and not lines(frames[-1])[0]


def test_what_cannot_be_filmed_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FilmError, match=r"must end in .gif or .mp4"):
        film(tmp_path / "a.avi", SCENE)
    with pytest.raises(FilmError, match="nothing to film"):
        film(tmp_path / "a.gif", SCENE._replace(target=[]))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(FilmError, match=r"pip install 's2s\[film\]'"):
        film(tmp_path / "a.mp4", SCENE)


def test_ffmpeg_that_fails_says_why(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(FilmError, match="ffmpeg could not write"):
        film(tmp_path / "a.mp4", SCENE, dots_per_inch=40)
