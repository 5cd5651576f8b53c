"""What a run tells: metrics on disk, progress on the terminal, tables.

Decides how numbers look and where they go: progress to stderr, results to stdout, the
metrics of every logged step to metrics.jsonl and TensorBoard. Must not know where
they come from.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS_FILE = "metrics.jsonl"

# Between two plain lines of progress, where there is no terminal to draw a bar on.
SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Tells a run's progress and keeps its metrics in FOLDER/metrics.jsonl and FOLDER/tensorboard/.

    Args:
      folder: the work directory; None: nothing is kept, only told.
      total_steps: updates in the whole run.
      main_process: False: this reporter prints and writes nothing.
      restored_step: updates already done; what was kept of later ones is dropped, for
        they will come again.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        total_steps: int,
        main_process: bool = True,
        restored_step: int = 0,
    ) -> None:
        self._main = main_process
        self._total = total_steps
        self._file: Any = None
        self._board: Any = None
        self._bar: Any = None
        self._step, self._time = restored_step, time.monotonic()
        self._tokens, self._steps_per_second = 0.0, 0.0
        self._next_line = 0.0
        self._drawn = main_process and sys.stderr.isatty()
        if not main_process or folder is None:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        _drop_later(path, restored_step)
        self._file = path.open("a", encoding="utf-8")
        try:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=restored_step + 1)
        except Exception as error:  # A run is worth more than its second set of curves.
            self.note(f"no TensorBoard: {error}")

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def scalars(self, step: int, values: Mapping[str, float], group: str = "train") -> None:
        """Keeps metrics of a step, each under ``group/name``; on disk when this returns."""
        if self._file is not None:
            line: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
            line |= {f"{group}/{name}": _json_number(value) for name, value in values.items()}
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self._board.add_scalar(f"{group}/{name}", float(value), int(step))

    def progress(self, step: int, values: Mapping[str, float | str], tokens: float = 0.0) -> None:
        """Shows how far the run is: a bar on a terminal, else a line now and then.

        Args:
          step: updates done.
          values: shown by name, such as epoch, loss and learning rate; texts as they are.
          tokens: target tokens trained on since the last call.
        """
        if not self._main:
            return
        now = time.monotonic()
        self._tokens += tokens
        if not self._drawn and now < self._next_line and step < self._total:
            return
        seconds = max(now - self._time, 1e-9)
        steps_per_second = (step - self._step) / seconds
        # Smoothed: the first steps compile, evaluations come between.
        self._steps_per_second += (steps_per_second - self._steps_per_second) * (
            0.3 if self._steps_per_second else 1.0
        )
        parts = [
            f"{name} {value if isinstance(value, str) else number(value)}" for name, value in values.items()
        ]
        parts.append(f"{_thousands(self._tokens / seconds)} tok/s")
        left = (self._total - step) / self._steps_per_second if self._steps_per_second > 0 else math.inf
        parts.append(f"{clock(left)} left")
        self._step, self._time, self._tokens = step, now, 0.0
        self._next_line = now + SECONDS_BETWEEN_LINES
        if self._drawn:
            self._draw(step, "  ".join(parts))
        else:
            print(f"step {step}/{self._total}  " + "  ".join(parts), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Prints a result to stdout, above the bar."""
        self._print(text, sys.stdout)

    def note(self, text: str) -> None:
        """Prints a remark to stderr, above the bar."""
        self._print(text, sys.stderr)

    def close(self) -> None:
        """Finishes files and bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def _print(self, text: str, stream: Any) -> None:
        if not self._main:
            return
        if self._bar is not None:
            self._bar.clear()
        print(text, file=stream, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def _draw(self, step: int, text: str) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total,
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% {bar} step {n_fmt}/{total_fmt}  {desc}",
            )
        self._bar.n = step
        self._bar.set_description_str(text)


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str], markdown: bool = False) -> str:
    """Lays rows out in aligned columns, numbers to the right.

    Args:
      rows: of cells; floats get four significant digits, None becomes a dash.
      headers: one a column.
      markdown: with the bars of a Markdown table.

    >>> print(table([["copy", 0.98123], ["reverse", 12]], ["task", "exact match"]))
    task     exact match
    -------  -----------
    copy          0.9812
    reverse           12
    """
    cells = [[_cell(value, markdown) for value in row] for row in rows]
    for row in cells:
        if len(row) != len(headers):
            raise ValueError(f"a row of {len(row)} cells under {len(headers)} headers: {row}")
    columns = range(len(headers))
    right = [
        any(_is_number(row[i]) for row in rows) and all(row[i] is None or _is_number(row[i]) for row in rows)
        for i in columns
    ]
    lines = [[_cell(header, markdown) for header in headers], *cells]
    widths = [max(3, *(_width(line[i]) for line in lines)) for i in columns]

    def lay(line: Sequence[str]) -> str:
        padded = [
            " " * (widths[i] - _width(line[i])) + line[i]
            if right[i]
            else line[i] + " " * (widths[i] - _width(line[i]))
            for i in columns
        ]
        return "| " + " | ".join(padded) + " |" if markdown else "  ".join(padded).rstrip()

    if markdown:
        rule = "|" + "|".join("-" * (widths[i] + 1) + (":" if right[i] else "-") for i in columns) + "|"
    else:
        rule = "  ".join("-" * width for width in widths)
    return "\n".join([lay(lines[0]), rule, *(lay(line) for line in lines[1:])])


def number(value: float) -> str:
    """A number for people: four significant digits, whole numbers whole."""
    if isinstance(value, int):
        return str(value)
    value = float(value)
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def spread(values: Sequence[float]) -> str:
    """Mean and range: "2.31 (2.2 to 2.4)", or one number where there is but one."""
    mean = number(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({number(min(values))} to {number(max(values))})"


def clock(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss or days; "?" if unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _thousands(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        # 999.95 would be written as 1000.0 of the smaller unit.
        if value >= limit * 0.99995:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def _json_number(value: float) -> float | int | str | None:
    """JSON has no NaN and no infinity: null, and the two infinities as text."""
    if isinstance(value, int):
        return value
    value = float(value)
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def _drop_later(path: Path, step: int) -> None:
    """Rewrites the file without steps after ``step`` and without a last line cut short."""
    if not path.exists():
        return
    text = path.read_bytes()
    kept = b"".join(line for line in text.splitlines(keepends=True) if _is_kept(line, step))
    if kept != text:
        fresh = path.with_name(path.name + ".new")
        fresh.write_bytes(kept)
        fresh.replace(path)


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any, markdown: bool) -> str:
    if value is None:
        return "-"
    text = number(value) if _is_number(value) else str(value).replace("\n", " ")
    return text.replace("|", "\\|") if markdown else text


def _width(text: str) -> int:
    """Columns on a terminal: East Asian wide characters take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )
