"""Reads pairs out of files: parallel text, TSV, JSON lines, all plain or gzipped.

Decides what a line is (bytes up to a newline), which lines are usable and how the
others are named. Must not know how pairs are stored or cached afterwards.

A reader yields cells as it finds them; `usable` alone decides what is skipped, so
every format skips and counts by the same rules.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

_BOM = b"\xef\xbb\xbf"


class CorpusError(ValueError):
    """A corpus that cannot be used; the message names the file, what is wrong and a remedy."""


class Pair(TypedDict):
    """One usable pair.

    Attributes:
      source: text, without line breaks.
      targets: references, at least one, without line breaks; the first trains.
      line: line number from 1 in the (first) file, or the number of the pair where
        there is no file.
    """

    source: str
    targets: list[str]
    line: int


class Bad(NamedTuple):
    """A cell that cannot be text, and why."""

    reason: str


Cell = bytes | str | Bad


class Row(NamedTuple):
    """What a reader finds on one line, not yet judged."""

    line: int
    source: Cell
    targets: list[Cell]


class Reader(Protocol):
    """A place pairs are read from.

    Attributes:
      name: for people.
      files: whose bytes decide, with ``options``, what is read.
      options: JSON values that tell two readings of the same files apart.
    """

    name: str
    files: tuple[Path, ...]
    options: dict[str, Any]

    def rows(self) -> Iterator[Row]: ...


class Rejections:
    """Line numbers that were left out, by reason.

    Attributes:
      rejected: reason -> numbers of lines without a pair.
      partial: numbers of lines whose pair lacks some of its references.
    """

    def __init__(self) -> None:
        self.rejected: dict[str, list[int]] = {}
        self.partial: list[int] = []

    def add(self, reason: str, line: int) -> None:
        self.rejected.setdefault(reason, []).append(line)


def usable(rows: Iterable[Row], rejections: Rejections) -> Iterator[Pair]:
    """Yields the pairs of usable rows and notes the others.

    A row is left out when its source is blank or no text, or when all its targets
    are; of several references only the bad ones are left out. NUL, U+2028 and other
    control characters are characters like any other; line breaks inside a cell (JSON
    has them) become spaces, because a pair is a line each downstream.
    """
    for line, source_cell, target_cells in rows:
        source = _text(source_cell, "source")
        if isinstance(source, Bad):
            rejections.add(source.reason, line)
            continue
        targets = [_text(cell, "target") for cell in target_cells] or [Bad("blank target")]
        good = [target for target in targets if isinstance(target, str)]
        if not good:
            rejections.add(next(t.reason for t in targets if isinstance(t, Bad)), line)
            continue
        if len(good) < len(targets):
            rejections.partial.append(line)
        yield Pair(source=source, targets=good, line=line)


def _text(cell: Cell, side: str) -> str | Bad:
    if isinstance(cell, Bad):
        return cell
    try:
        text = cell.decode() if isinstance(cell, bytes) else cell
        text.encode()  # JSON escapes can spell half a surrogate pair, which is no text.
    except UnicodeError:
        return Bad("undecodable")
    if "\n" in text or "\r" in text:
        text = text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ")
    return text if text.strip() else Bad(f"blank {side}")


class ParallelReader:
    """PREFIX.source and PREFIX.target, line by line; each may end in .gz.

    Raises:
      CorpusError: a file is missing, or there plain and gzipped.
    """

    def __init__(self, prefix: Path, source: str, targets: Sequence[str]) -> None:
        self.name = f"{prefix}.{{{','.join([source, *targets])}}}"
        self.files = tuple(self._find(prefix, suffix) for suffix in (source, *targets))
        self.options = {"format": "parallel"}

    @staticmethod
    def _find(prefix: Path, suffix: str) -> Path:
        plain, zipped = Path(f"{prefix}.{suffix}"), Path(f"{prefix}.{suffix}.gz")
        found = [path for path in (plain, zipped) if path.is_file()]
        if not found:
            raise CorpusError(
                f"neither {plain} nor {zipped.name} exists: parallel text is PREFIX.SOURCE and PREFIX.TARGET "
                f"with source and target as suffixes; {nearby(prefix)}"
            )
        if len(found) > 1:
            raise CorpusError(f"{plain} and {zipped.name} both exist: remove one, they may differ")
        return found[0]

    def rows(self) -> Iterator[Row]:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(contextlib.closing(lines(path))) for path in self.files]
            for number, cells in enumerate(itertools.zip_longest(*streams), 1):
                if None in cells:
                    raise CorpusError(self._unequal(number, cells, streams))
                yield Row(number, cells[0], list(cells[1:]))

    def _unequal(self, number: int, cells: Sequence[Any], streams: Sequence[Iterator[bytes]]) -> str:
        counts = [
            number - 1 if cell is None else number + sum(1 for _ in stream)
            for cell, stream in zip(cells, streams, strict=True)
        ]
        listed = ", ".join(f"{path} has {n}" for path, n in zip(self.files, counts, strict=True))
        return (
            f"parallel files must have the same number of lines, but {listed}: "
            "a line was lost or added, so the pairs no longer belong together; make the files again"
        )


class TsvReader:
    """Columns of a TSV file: by number from 0, or by the names in its first line.

    When all columns asked for are numbers the file has no header. There is no quoting:
    a tab always separates.
    """

    def __init__(self, path: Path, source: str, targets: Sequence[str]) -> None:
        self.name = str(path)
        self.files: tuple[Path, ...] = (path,)
        self.columns = (source, *targets)
        self.numbered = all(column.isascii() and column.isdigit() for column in self.columns)
        self.options = {"format": "tsv", "columns": list(self.columns)}

    def rows(self) -> Iterator[Row]:
        path = self.files[0]
        with contextlib.closing(lines(path)) as stream:
            numbered = enumerate(stream, 1)
            indices = [int(c) for c in self.columns] if self.numbered else self._header(next(numbered)[1])
            widest = 0
            for number, line in numbered:
                if not line.strip():
                    yield Row(number, Bad("blank line"), [])
                    continue
                cells = line.split(b"\t")
                widest = max(widest, len(cells))
                picked: list[Cell] = [cells[i] if i < len(cells) else Bad("missing column") for i in indices]
                yield Row(number, picked[0], picked[1:])
        if widest and max(indices) >= widest:
            raise CorpusError(
                f"{path} has no column {max(indices)}: its longest row has {widest} columns, numbered "
                f"from 0 to {widest - 1}; choose source and target among them"
            )

    def _header(self, line: bytes) -> list[int]:
        path = self.files[0]
        names = [cell.decode(errors="replace").strip() for cell in line.split(b"\t")]
        indices = []
        for column in self.columns:
            if names.count(column) != 1:
                wrong = "has no column" if column not in names else "has more than one column"
                close = difflib.get_close_matches(column, names, 1)
                hint = f"did you mean {close[0]!r}? " if close and close[0] != column else ""
                shown = ", ".join(repr(name) for name in names[:20])
                raise CorpusError(
                    f"{path} {wrong} {column!r}: {hint}its first line has {shown}. Choose source and "
                    f"target among them, or by number from 0 to {len(names) - 1} if the file has no header"
                )
            indices.append(names.index(column))
        return indices


class JsonReader:
    """Fields of a file with one JSON object a line; nested fields with dots.

    A list is several references when it is a target.
    """

    def __init__(self, path: Path, source: str, targets: Sequence[str]) -> None:
        self.name = str(path)
        self.files: tuple[Path, ...] = (path,)
        self.fields = (source, *targets)
        self.options = {"format": "jsonl", "fields": list(self.fields)}

    def rows(self) -> Iterator[Row]:
        with contextlib.closing(lines(self.files[0])) as stream:
            yield from field_rows(self.name, self._records(stream), self.fields)

    @staticmethod
    def _records(stream: Iterable[bytes]) -> Iterator[Mapping[str, Any] | Bad]:
        for line in stream:
            try:
                record = json.loads(line.decode()) if line.strip() else Bad("blank line")
            except UnicodeDecodeError:
                record = Bad("undecodable")
            except (ValueError, RecursionError):
                record = Bad("invalid JSON")
            yield record if isinstance(record, (dict, Bad)) else Bad("not a JSON object")


def field_rows(name: str, records: Iterable[Mapping[str, Any] | Bad], fields: Sequence[str]) -> Iterator[Row]:
    """Picks the source (first) and target fields of records.

    Raises:
      CorpusError: a field is in no record.
    """
    missing, first = set(fields), None
    for number, record in enumerate(records, 1):
        if isinstance(record, Bad):
            yield Row(number, record, [])
            continue
        first = record if first is None else first
        values = []
        for field in fields:
            found, value = _lookup(record, field)
            if found:
                missing.discard(field)
            values.append(_cells(value) if found else [Bad("missing field")])
        source = values[0][0] if len(values[0]) == 1 else Bad("source is no text")
        yield Row(number, source, list(itertools.chain.from_iterable(values[1:])))
    if first is not None and missing:
        absent = ", ".join(repr(field) for field in fields if field in missing)
        raise CorpusError(
            f"{name} has no field {absent} in any record: the first has {', '.join(_paths(first))}; "
            "choose source and target among them"
        )


def _lookup(record: Mapping[str, Any], field: str) -> tuple[bool, Any]:
    """A field by its own name, by dots, or by language inside "translation"."""
    if field in record:
        return True, record[field]
    value: Any = record
    for name in field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            inner = record.get("translation")
            return (True, inner[field]) if isinstance(inner, Mapping) and field in inner else (False, None)
        value = value[name]
    return True, value


def _cells(value: Any) -> list[Cell]:
    if isinstance(value, (str, bytes)):
        return [value]
    if value is None:
        return [""]
    if hasattr(value, "tolist"):  # NumPy arrays, in which TFDS keeps sequences
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [item if isinstance(item, (str, bytes)) else Bad("not text") for item in value] or [""]
    return [Bad("not text")]


def _paths(record: Mapping[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for name, value in record.items():
        paths += _paths(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [repr(prefix + name)]
    return paths


def lines(path: Path) -> Generator[bytes, None, None]:
    """Yields the lines of a plain or gzipped file without "\\n", "\\r\\n" and a leading byte order mark.

    Only "\\n" ends a line: other characters that Unicode calls line separators stay text.

    Raises:
      CorpusError: the file is missing, empty, UTF-16, or a damaged gzip file.
    """
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    empty = True
    try:
        with opener(path, "rb") as stream:
            for line in stream:
                if empty:
                    _check_start(path, line)
                    line = line.removeprefix(_BOM)
                    empty = False
                yield line.removesuffix(b"\n").removesuffix(b"\r")
    except gzip.BadGzipFile as error:
        raise CorpusError(
            f"{path} is no sound gzip file ({error}): rename it if it is plain text, else fetch it again"
        ) from error
    except (EOFError, zlib.error) as error:
        raise CorpusError(f"{path} is a damaged gzip file ({error}): fetch it again") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror or error}") from error
    if empty:
        raise CorpusError(f"{path} is empty: it must hold the pairs, a line each")


def _check_start(path: Path, line: bytes) -> None:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CorpusError(f"{path} is UTF-16 text: convert it, for example with iconv -f UTF-16 -t UTF-8")
    if line.startswith(b"\x1f\x8b"):
        raise CorpusError(f"{path} is gzip data: give its name the ending .gz")


def nearby(path: Path) -> str:
    """Says what exists where `path` does not, for messages."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if folder != path.parent:
        return f"the folder {path.parent} does not exist (but {folder} does)"
    names = sorted(item.name + ("/" if item.is_dir() else "") for item in folder.glob("[!.]*"))
    stem = path.name.split(".")[0]
    close = [name for name in names if stem and name.startswith(stem)]
    close = close or sorted(difflib.get_close_matches(path.name, names, 8, 0.4)) or names
    shown = ", ".join(close[:8]) + (", ..." if len(close) > 8 else "")
    return f"in {folder} there is {shown}" if close else f"the folder {folder} is empty"


def listed(lines: Sequence[int]) -> str:
    """How many lines, and the numbers of the first few: "12 (lines 3, 7, 20, ...)"."""
    shown = ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
    return f"{len(lines):,} (line{'s' * (len(lines) != 1)} {shown})"
