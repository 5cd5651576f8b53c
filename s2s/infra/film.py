"""A film: a sentence is read, handed over, looked back at and written, as GIF or MP4.

Decides what each frame shows and how long. Must not know which model made the numbers: it is given a
`Scene`. GIFs are written by Pillow, MP4 by the ffmpeg of imageio-ffmpeg.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from s2s.infra.picture import BLUE, GREY, ORANGE, canvas, shown

# Seconds that a frame of each kind stands.
_SECONDS = {"read": 0.35, "hand over": 1.0, "look": 0.7, "write": 0.6, "end": 2.5}
_PER_SECOND = 20
# Units drawn of a vector: enough to tell vectors apart, few enough to see.
_UNITS = 12
# Inches. Source below, output above, between them the lines.
_HEIGHT, _MARGIN, _STRIP = 5.4, 0.45, 0.8
_SOURCE_Y, _OUTPUT_Y = 1.05, 3.2


class FilmError(ValueError):
    """A film that cannot be made; the message says what to do."""


class Scene(NamedTuple):
    """What a film shows.

    Attributes:
      source: S tokens.
      target: T tokens.
      memory: a vector for each source token, [S, M]; -1 to 1 is the whole range of colour.
      states: a vector for each step, [T, H].
      weights: where each step looks, [T, S]; None: nowhere.
      likeliest: by step, the likeliest tokens and their probabilities, best first.
      both_ways: the source is read from both ends.
      bridge: what the first state is made of: "copy", "dense" or "zero".
      context: whether a step reads a context: where it looks, or the same one at every step.
    """

    source: Sequence[str]
    target: Sequence[str]
    memory: np.ndarray
    states: np.ndarray
    weights: np.ndarray | None
    likeliest: Sequence[Sequence[tuple[str, float]]]
    both_ways: bool = False
    bridge: str = "copy"
    context: bool = True


class Frame(NamedTuple):
    """One picture: what is done, to which position, and for how long in seconds."""

    kind: str
    at: int
    seconds: float


def storyboard(scene: Scene) -> list[Frame]:
    """The frames: one a source token, one for the hand-over, two a step (one where nothing is looked at)."""
    frames = [("read", s) for s in range(len(scene.source))] + [("hand over", 0)]
    for t in range(len(scene.target)):
        frames += [("look", t)] * (scene.weights is not None) + [("write", t)]
    frames.append(("end", len(scene.target) - 1))
    return [Frame(kind, at, _SECONDS[kind]) for kind, at in frames]


def film(path: str | os.PathLike[str], scene: Scene, *, dots_per_inch: int | None = None) -> int:
    """Writes a film.

    Args:
      path: ends in .gif or .mp4.
      scene: what it shows.
      dots_per_inch: of its frames; None: 100 for GIF, 200 for MP4. A frame is 5.4 inches high.

    Returns:
      The number of different frames.

    Raises:
      FilmError: another ending, nothing to show, or no ffmpeg for an MP4.
    """
    path = Path(path)
    writers = {".gif": (_write_gif, 100), ".mp4": (_write_mp4, 200)}
    if path.suffix.lower() not in writers:
        raise FilmError(f"{path} must end in .gif or .mp4")
    if not len(scene.source) or not len(scene.target):
        raise FilmError("nothing to film: give a source and an output")
    write, usual = writers[path.suffix.lower()]
    frames = storyboard(scene)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, _drawn(scene, frames, dots_per_inch or usual), frames)
    return len(frames)


def _write_gif(path: Path, pictures: Iterator[np.ndarray], frames: Sequence[Frame]) -> None:
    from PIL import Image

    # The colours of the whole film are those of its middle, in which all kinds of things are drawn.
    images = [Image.fromarray(picture) for picture in pictures]
    palette = images[-2 if len(images) > 1 else -1].quantize(128, dither=Image.Dither.NONE)
    indexed = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [round(1000 * frame.seconds) for frame in frames]
    indexed[0].save(
        path, save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=False
    )


def _write_mp4(path: Path, pictures: Iterator[np.ndarray], frames: Sequence[Frame]) -> None:
    import subprocess

    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        ffmpeg = get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        message = f"an MP4 needs imageio-ffmpeg: pip install 's2s[film]', or ask for a .gif ({error})"
        raise FilmError(message) from None
    first = next(pictures)
    height, width, _ = first.shape
    # Not the package's own writer: it runs Python code in a forked child, which JAX's threads forbid.
    command = [ffmpeg, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", str(_PER_SECOND), "-i", "-", "-c:v", "libx264", "-crf", "18"]
    # What every player can play, and begins to play before it has all.
    command += ["-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stderr is not None
        try:
            for picture, frame in zip(itertools.chain([first], pictures), frames, strict=True):
                for _ in range(round(frame.seconds * _PER_SECOND)):
                    process.stdin.write(picture.data)
            process.stdin.close()
        except BrokenPipeError:
            pass
        told = process.stderr.read().decode("utf-8", "replace").strip()
    if process.returncode:
        raise FilmError(f"ffmpeg could not write {path}: {told or process.returncode}")


def _drawn(scene: Scene, frames: Sequence[Frame], dots_per_inch: int) -> Iterator[np.ndarray]:
    """Frames as [height, width, 3] bytes, both even, as films want them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    width = float(np.clip(0.55 * max(len(scene.source), len(scene.target)), 9.6, 16.0))
    with canvas() as figure:
        figure.set_size_inches(width, _HEIGHT)
        figure.set_dpi(dots_per_inch)
        agg = FigureCanvasAgg(figure)
        for frame in frames:
            figure.clear()
            _draw(figure.add_axes((0.0, 0.0, 1.0, 1.0)), scene, frame, width)
            agg.draw()
            pixels = np.asarray(agg.buffer_rgba())[..., :3]
            even = [2 * (size // 2) for size in pixels.shape[:2]]
            yield np.ascontiguousarray(pixels[: even[0], : even[1]])


def _draw(axes: Any, scene: Scene, frame: Frame, width: float) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(0, _HEIGHT)
    axes.set_axis_off()
    S, T = len(scene.source), len(scene.target)
    read = frame.at if frame.kind == "read" else S - 1
    step = -1 if frame.kind in ("read", "hand over") else frame.at
    written = step - (frame.kind == "look")
    xs, ys = _columns(S, width), _columns(T, width)

    for s, (x, token) in enumerate(zip(xs, scene.source, strict=True)):
        now = frame.kind == "read" and s == read
        _label(axes, x, 0.55, token, _pitch(xs, width), ORANGE if now else "#1d2733" if s <= read else GREY)
        if s <= read:
            _strip(axes, x, _SOURCE_Y, scene.memory[s], ORANGE if now else "#8a94a0")
    for t, (x, token) in enumerate(zip(ys, scene.target, strict=True)):
        now = t == step and frame.kind != "end"
        if t <= step:
            _strip(axes, x, _OUTPUT_Y, scene.states[t], ORANGE if now else "#8a94a0")
        if t <= written:
            _label(axes, x, 4.35, token, _pitch(ys, width), ORANGE if now else "#1d2733")

    top, bottom = _SOURCE_Y + _STRIP, _OUTPUT_Y

    def arrow(begin: tuple[float, float], end: tuple[float, float], line: float) -> None:
        style = {"arrowstyle": "-|>", "color": BLUE, "linewidth": line, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end, begin, arrowprops=style)

    middle = bottom + _STRIP / 2
    for t in range(1, step + 1):
        arrow((ys[t - 1] + 0.12, middle), (ys[t] - 0.12, middle), 1.0)
    same = scene.context and scene.weights is None
    if frame.kind == "hand over" and scene.bridge != "zero":
        arrow((xs[-1], top + 0.04), (ys[0], bottom - 0.04), 2.0)
    elif same and frame.kind == "write":
        arrow((xs[-1], top + 0.04), (ys[step], bottom - 0.04), 2.0)
    if scene.weights is not None and step >= 0 and frame.kind != "end":
        for x, weight in zip(xs, scene.weights[step], strict=True):
            if weight >= 0.01:
                line = 0.4 + 6.0 * float(weight)
                axes.plot([x, ys[step]], [top + 0.03, bottom - 0.03], color=BLUE, linewidth=line, alpha=0.75)
    axes.text(_MARGIN, 5.0, _equation(frame, scene), fontsize=13, parse_math=True, va="center")
    if step >= 0 and frame.kind == "write":
        _bars(axes, scene.likeliest[step][:3], width)


def _equation(frame: Frame, scene: Scene) -> str:
    """The equation at work (Luong et al. 2015), as matplotlib's formulas are written."""
    n, S = frame.at + 1, len(scene.source)
    if frame.kind == "read" and scene.both_ways:
        ways = rf"h^{{\rightarrow}}_{{{n}}};\,h^{{\leftarrow}}_{{{n}}}"
        return rf"$h_{{{n}}}=[{ways}]$"
    if frame.kind == "read":
        return rf"$h_{{{n}}}=\mathrm{{RNN}}(x_{{{n}}},\,h_{{{n - 1}}})$"
    if frame.kind == "hand over":
        last = rf"h_{{{S}}}"
        made = {"copy": last, "dense": rf"\tanh(W\,{last}+b)", "zero": "0"}[scene.bridge]
        return rf"$s_0={made}$"
    if frame.kind == "look":
        weights = rf"a_{{{n}}}=\mathrm{{softmax}}_j\,\mathrm{{score}}(s_{{{n}}},h_j)"
        return rf"${weights},\;\;c_{{{n}}}=\sum_j a_{{{n},j}}\,h_j$"
    if frame.kind == "write":
        read = rf"[c_{{{n}}};s_{{{n}}}]" if scene.context else rf"s_{{{n}}}"
        return rf"$p(y_{{{n}}})=\mathrm{{softmax}}(W_s\,\tanh(W_c\,{read}))$"
    return ""


def _columns(count: int, width: float) -> list[float]:
    pitch = (width - 2 * _MARGIN) / count
    # Few tokens stand together, not at the ends of the picture.
    pitch = min(pitch, 1.3)
    first = (width - pitch * (count - 1)) / 2
    return [first + pitch * number for number in range(count)]


def _pitch(xs: Sequence[float], width: float) -> float:
    return xs[1] - xs[0] if len(xs) > 1 else width


def _strip(axes: Any, x: float, y: float, vector: np.ndarray, edge: str) -> None:
    values = np.asarray(vector, np.float64)[:_UNITS, None]
    extent = (x - 0.11, x + 0.11, y, y + _STRIP)
    axes.imshow(values, cmap="PuOr_r", vmin=-1, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
    left, right, low, high = extent
    axes.plot([left, right, right, left, left], [low, low, high, high, low], color=edge, linewidth=1.0)
    # imshow moves the limits.
    axes.set_xlim(0, axes.figure.get_figwidth())
    axes.set_ylim(0, _HEIGHT)


def _label(axes: Any, x: float, y: float, token: str, pitch: float, color: str) -> None:
    text = shown(token)
    size = float(np.clip(72 * pitch / (0.62 * max(len(text), 1)), 8.5, 12.0))
    fits = len(text) * 0.62 * size <= 72 * pitch + 1
    axes.text(x, y, text, fontsize=size, color=color, ha="center", va="center", rotation=0 if fits else 35)


def _bars(axes: Any, likeliest: Sequence[tuple[str, float]], width: float) -> None:
    left = width - _MARGIN - 1.9
    for number, (token, prob) in enumerate(likeliest):
        y = 5.15 - 0.2 * number
        color = ORANGE if number == 0 else GREY
        axes.barh(y, 1.2 * prob, height=0.13, left=left, color=color)
        axes.text(left - 0.06, y, shown(token), fontsize=9, ha="right", va="center")
        axes.text(left + 1.2 * prob + 0.05, y, f"{prob:.2f}", fontsize=8, va="center")
    axes.set_xlim(0, width)
    axes.set_ylim(0, _HEIGHT)
