"""Charts of a report, as SVG that stands inside a page.

Decides how they look: on light and on dark paper, in grey, and to eyes that do not tell red from green
(Okabe and Ito 2008): every line has its own colour, dashes and marks. Must not know where numbers come from.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np

from s2s.infra import picture
from s2s.infra.formats import printable

# Lines that can be told apart in one chart.
MOST_LINES = 8
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#8c6d31")
_DASHES: tuple[Any, ...] = (
    "-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1)),
)  # fmt: skip
_MARKS = "os^DvPX*"
# Stands for the page's own colour of text until the drawing is done.
_INK = "#010203"
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


class Line(NamedTuple):
    """Points with their spread; NaN: none is known."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float]


class Panel(NamedTuple):
    """Points over the values of one field."""

    name: str
    points: Line


def lines(name: str, found: Sequence[Line], xlabel: str, ylabel: str, ticks: Sequence[str] = ()) -> str:
    """Lines with bands of one spread to each side.

    Args:
      name: a word for the drawing's identifiers, of its own within a page.
      found: at most `MOST_LINES`.
      xlabel, ylabel: of the axes.
      ticks: names of x = 0, 1, ...
    """
    with picture.canvas() as figure:
        figure.set_size_inches(7.2, 3.6)
        axes = figure.subplots()
        for number, line in enumerate(found):
            color = _COLORS[number % MOST_LINES]
            axes.plot(
                line.x,
                line.y,
                color=color,
                linestyle=_DASHES[number % MOST_LINES],
                marker=_MARKS[number % MOST_LINES],
                markersize=4 if len(line.x) <= 40 else 0,
                linewidth=1.6,
                label=printable(line.label),
            )
            middle, spread = np.asarray(line.y, float), np.nan_to_num(np.asarray(line.spread, float))
            if spread.any():
                axes.fill_between(
                    line.x, middle - spread, middle + spread, color=color, alpha=0.3 / (1 + len(found)), lw=0
                )
        if ticks:
            axes.set_xticks(range(len(ticks)), list(ticks))
        _ink(axes, xlabel, ylabel)
        if len(found) > 1:
            # Below: long labels must not cover lines.
            axes.legend(
                frameon=False, labelcolor=_INK, loc="upper left", bbox_to_anchor=(0, -0.16), handlelength=3.5
            )
        return _svg(figure, name)


def panels(name: str, found: Sequence[Panel], ylabel: str) -> str:
    """A panel a field: every row a point with its spread; a logarithmic axis where values span decades.

    Args:
      name, ylabel: as of `lines`.
      found: at least one.
    """
    across = min(3, len(found))
    down = math.ceil(len(found) / across)
    with picture.canvas() as figure:
        figure.set_size_inches(3.1 * across, 2.7 * down)
        grid = figure.subplots(down, across, squeeze=False, sharey=True)
        figure.subplots_adjust(wspace=0.12, hspace=0.45)
        for number, axes in enumerate(grid.flat):
            if number >= len(found):
                axes.set_axis_off()
                continue
            panel, points = found[number], found[number].points
            axes.errorbar(
                points.x,
                points.y,
                yerr=np.nan_to_num(np.asarray(points.spread, float)),
                fmt="o",
                markersize=4.5,
                color=_INK,
                ecolor=_INK,
                elinewidth=1,
                alpha=0.8,
            )
            low, high = min(points.x), max(points.x)
            if low > 0 and high >= 8 * low:
                axes.set_xscale("log", base=10 if high >= 100 * low else 2)
            _ink(axes, panel.name, "" if number % across else ylabel)
        return _svg(figure, name)


def _ink(axes: Any, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(printable(xlabel), color=_INK)
    axes.set_ylabel(printable(ylabel), color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(which="both", color=_INK, labelcolor=_INK)
    axes.grid(axis="y", color="#8a94a0", alpha=0.35, linewidth=0.6)
    axes.set_axisbelow(True)


def _svg(figure: Any, name: str) -> str:
    """The drawing as an element for a page: own identifiers, the page's colour, nothing behind it."""
    drawn = io.BytesIO()
    # Same drawing, same text: identifiers come from what is drawn, not from chance.
    with matplotlib.rc_context({"svg.hashsalt": "s2s"}):
        figure.savefig(
            drawn,
            format="svg",
            bbox_inches="tight",
            pad_inches=0.08,
            transparent=True,
            metadata={"Date": None},
        )
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(drawn.getvalue())
    for element in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(element)
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == f"{{{_XLINK}}}href":
                value = f"#{name}-{value.removeprefix('#')}"
            else:
                value = re.sub(r"url\(#(.*?)\)", rf"url(#{name}-\1)", value).replace(_INK, "currentColor")
            element.set(key, value)
    return ElementTree.tostring(root, encoding="unicode")
