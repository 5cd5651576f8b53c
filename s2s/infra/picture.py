"""Pictures: alignments and learning curves.

Decides how they look. Must not know which model made the numbers. The ending of the
path picks the format: .png, .pdf or .svg.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Tried in this order for each character; those not installed are passed over.
FONTS = (
    "DejaVu Sans",
    "Noto Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans JP",
    "Noto Sans SC",
    "Source Han Sans",
    "Hiragino Sans",
    "Yu Gothic",
    "PingFang SC",
    "Microsoft YaHei",
    "Malgun Gothic",
    "WenQuanYi Zen Hei",
    "IPAexGothic",
    "Droid Sans Fallback",
    "Arial Unicode MS",
    "Noto Sans Arabic",
    "Noto Naskh Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
)

# Validation curves stand out; training stays in the background.
BLUE, ORANGE, GREY = "#1f5fa8", "#d1661f", "#9aa5b1"
# Told apart by colour-blind eyes, and by their marks in greyscale.
_CYCLE = (BLUE, ORANGE, "#3a8f5c", "#8155a3", "#b8860b", "#2aa7b8", "#5b6570")


def attention_picture(
    path: str | os.PathLike[str],
    source_tokens: Sequence[str],
    target_tokens: Sequence[str],
    align_TS: Any,
    title: str | None = None,
    *,
    hard: Sequence[tuple[int, int]] = (),
    gold: Sequence[tuple[int, int]] = (),
) -> None:
    """Draws where each target token looks: rows are target tokens, columns source tokens.

    Args:
      path: ends in .png, .pdf or .svg.
      source_tokens: S of them.
      target_tokens: T of them.
      align_TS: weights from 0 to 1, [T, S].
      title: above the picture.
      hard: pairs of source and target position that are marked by a dot.
      gold: the same, framed.

    Raises:
      ValueError: the weights have another shape than the tokens ask for, or none.
    """
    weights = np.asarray(align_TS, dtype=np.float64)
    rows, columns = len(target_tokens), len(source_tokens)
    if weights.shape != (rows, columns):
        raise ValueError(
            f"weights of shape {weights.shape} for {rows} target and {columns} source tokens: "
            f"({rows}, {columns}) expected"
        )
    if not weights.size:
        raise ValueError(f"nothing to draw with {rows} target and {columns} source tokens: give one of each")
    from matplotlib.patches import Rectangle

    with canvas() as figure:
        cell = float(np.clip(14.0 / max(rows, columns, 1), 0.12, 0.34))
        width, height = cell * columns, cell * rows
        figure.set_size_inches(max(width, 0.1), max(height, 0.1))
        # The cells fill the figure; saving widens it by what stands around them.
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        image = axes.imshow(
            weights, cmap="Blues", vmin=0.0, vmax=1.0, aspect="equal", interpolation="nearest"
        )
        size = float(np.clip(cell * 30, 3.5, 9.5))
        source = [shown(token) for token in source_tokens]
        longest = max(map(len, source), default=0)
        upright = longest <= 4 and sum(map(len, source)) <= 2 * columns
        axes.set_xticks(
            range(columns),
            source,
            fontsize=size,
            rotation=0 if upright else 60,
            ha="center" if upright else "left",
            va="bottom",
            rotation_mode="anchor",
        )
        axes.set_yticks(range(rows), [shown(token) for token in target_tokens], fontsize=size)
        axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, pad=3)
        axes.set_xticks(np.arange(-0.5, columns), minor=True)
        axes.set_yticks(np.arange(-0.5, rows), minor=True)
        axes.grid(which="minor", color="#e3e8ee", linewidth=0.5)
        axes.tick_params(which="minor", length=0, top=False, bottom=False, left=False)
        axes.spines[:].set_color("#c3ccd6")
        if hard:
            # White on dark cells, dark on light ones: seen in greyscale too.
            shades = ["white" if weights[t, s] > 0.5 else "#1d2733" for s, t in hard]
            axes.scatter(*zip(*hard, strict=True), s=(20 * cell) ** 2 / 4, c=shades, linewidths=0)
        for s, t in gold:
            frame = (s - 0.42, t - 0.42), 0.84, 0.84
            axes.add_patch(Rectangle(*frame, fill=False, edgecolor=ORANGE, linewidth=5 * cell))
        tall = min(height, 1.6)
        scale = axes.inset_axes((1.0 + 0.14 / width, 1.0 - tall / height, 0.1 / width, tall / height))
        bar = figure.colorbar(image, cax=scale, ticks=[0.0, 0.5, 1.0])
        bar.outline.set_visible(False)
        scale.tick_params(length=0, labelsize=7.5)
        if title:
            axes.set_title(title, fontsize=10.5, loc="left", pad=10)
        _write(figure, path)


def curve_picture(
    path: str | os.PathLike[str],
    metrics_jsonl: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    name: str = "loss",
) -> None:
    """Draws a metric over the steps of a run: training thin, evaluations with marks.

    Args:
      path: ends in .png, .pdf or .svg.
      metrics_jsonl: the metrics that a run kept; or those of several runs by their names, whose
        evaluations alone are drawn.
      name: of the metric, without its group.

    Raises:
      ValueError: a run never wrote the metric.
    """
    several = isinstance(metrics_jsonl, Mapping)
    files = metrics_jsonl if isinstance(metrics_jsonl, Mapping) else {"": metrics_jsonl}
    curves = {
        (run, group): points
        for run, file in files.items()
        for group, points in sorted(_curves(file, name).items(), key=lambda one: (one[0] != "train", one[0]))
        if not (several and group == "train")
    }
    single = len({group for _, group in curves}) == 1
    with canvas() as figure:
        figure.set_size_inches(5.4, 3.3)
        axes = figure.subplots()
        colors, marks = itertools.cycle(_CYCLE), itertools.cycle("osD^vPX")
        for (run, group), points in curves.items():
            steps, values = zip(*points, strict=True)
            label = group if not several else run if single else f"{run}, {group}"
            if group == "train" and len(curves) > 1:
                axes.plot(steps, values, color=GREY, linewidth=1.1, label=label)
            else:
                color, mark = next(colors), next(marks)
                # A training curve has too many points for marks.
                mark = mark if len(steps) <= 60 and group != "train" else ""
                axes.plot(
                    steps,
                    values,
                    color=color,
                    linewidth=1.6,
                    marker=mark or None,
                    markersize=3.5,
                    label=label,
                )
        axes.set_xlabel("step")
        axes.set_ylabel(name.replace("_", " "))
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#8a94a0")
        axes.tick_params(color="#8a94a0")
        axes.grid(axis="y", color="#e6eaef", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        if len(curves) > 1:
            axes.legend(frameon=False)
        _write(figure, path)


def _curves(metrics_jsonl: str | os.PathLike[str], name: str) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of a metric, by group."""
    curves: dict[str, list[tuple[int, float]]] = {}
    names: set[str] = set()
    with open(metrics_jsonl, encoding="utf-8") as lines:
        for line in lines:
            values = json.loads(line)
            for key, value in values.items():
                group, _, own = key.rpartition("/")
                names |= {own} if group else set()
                if group and own == name and isinstance(value, int | float):
                    curves.setdefault(group, []).append((values["step"], value))
    if not curves:
        raise ValueError(
            f"{metrics_jsonl} has no finite {name!r}; it has {', '.join(sorted(names)) or 'no metric'}"
        )
    return curves


def without_font(texts: Iterable[str]) -> str:
    """The characters of some texts that no font here has, each once: in pictures they are boxes."""
    from matplotlib import font_manager

    known = {ord(letter) for letter in " \n\t"}
    for family in _families():
        found = font_manager.findfont(family)
        known |= set(font_manager.get_font(found).get_charmap())
    letters = dict.fromkeys(letter for text in texts for letter in shown(text))
    return "".join(letter for letter in letters if ord(letter) not in known)


@functools.cache
def _families() -> list[str]:
    """What is installed of `FONTS`, now: matplotlib remembers what was when it first looked."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {font.fname for font in manager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:
            # A file that is no font of a kind that can be drawn is not needed.
            with contextlib.suppress(Exception):
                manager.addfont(path)
    installed = {font.name for font in manager.ttflist}
    return [font for font in FONTS if font in installed] or ["sans-serif"]


@contextlib.contextmanager
def canvas() -> Iterator[Any]:
    """An empty figure in our style."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "font.family": _families(),
        "font.size": 9.5,
        "axes.unicode_minus": False,
        # Tokens are text, not formulas; PDF text stays text.
        "text.parse_math": False,
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        "savefig.dpi": 300,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # A character that no installed font has becomes a box, not an error.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        # Not pyplot: it would choose a backend for the whole program and keep the figure.
        yield Figure()


def _write(figure: Any, path: str | os.PathLike[str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08)


def shown(token: str) -> str:
    """A token as a label: the mark of a word's beginning lighter, what cannot be seen visible."""
    shown = token.replace("\u2581", "_").replace(" ", "\u2423")
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in shown)
