"""Collecting: every run below the folders that a report is asked about.

Decides what counts as a run, as a finished one, and what is told of those that are not. Must not know
how runs are compared or shown. Nothing found in a folder stops it: damage is told, never raised.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from s2s.config import Config
from s2s.learn.metrics import Units
from s2s.sweep.cells import home
from s2s.sweep.grouping import PLAN
from s2s.workdir import Workdir


class OutputsError(ValueError):
    """Outputs that are not there, or not what a run writes."""


class Outputs(NamedTuple):
    """What a model wrote for the pairs of one part, in corpus order; lengths in source pieces."""

    sources: list[str]
    references: list[list[str]]
    outputs: list[str]
    lengths: list[int]


class Run(NamedTuple):
    """A finished run, or an ensemble of runs.

    Attributes:
      folder: its work directory.
      cfg: its configuration.
      scores: rows of results.json, each with "part", "search", "pairs" and metrics by name.
      history: dev metrics by "step".
      kind: "" or the ensemble's name, such as "ensemble 3".
    """

    folder: Path
    cfg: Config
    scores: list[dict[str, Any]]
    history: list[dict[str, Any]]
    kind: str = ""

    def searches(self, part: str) -> list[str]:
        """Names of the searches of a part, the configured one last."""
        return [row["search"] for row in self.scores if row["part"] == part]

    def row(self, part: str, search: str | None) -> dict[str, Any] | None:
        """The scores of a part by a search: its whole name or kind ("beam"); None: the configured one."""
        wanted = [
            row
            for row in self.scores
            if row["part"] == part and search in (None, row["search"], row["search"].split(" ")[0])
        ]
        return wanted[-1] if wanted else None

    def score(self, part: str, search: str | None, metric: str) -> float:
        """One figure; NaN where there is none."""
        value = (self.row(part, search) or {}).get(metric)
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if known else math.nan  # type: ignore[arg-type]

    def outputs(self, part: str, search: str | None) -> Outputs:
        """Reads what the model wrote.

        Raises:
          OutputsError: there is nothing, or something else.
        """
        row = self.row(part, search)
        if row is None:
            raise OutputsError(f"{self.folder} has no scores of {part} by {search or 'any search'}")
        name = (self.kind or row["search"]).split(" ")[0]
        path = Workdir(self.folder).outputs / f"{part}.{name}.jsonl"
        found = Outputs([], [], [], [])
        try:
            with path.open(encoding="utf-8", errors="surrogatepass") as lines:
                for line in lines:
                    values = json.loads(line)
                    references, length = values["references"], values["length"]
                    texts = [values["source"], values["output"], *references]
                    if not (references and isinstance(references, list) and isinstance(length, int)):
                        raise TypeError("a line has no list of references or no length")
                    if not all(isinstance(text, str) for text in texts):
                        raise TypeError("a line is not of texts")
                    found.sources.append(values["source"])
                    found.references.append(references)
                    found.outputs.append(values["output"])
                    found.lengths.append(length)
        except OSError as error:
            raise OutputsError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise OutputsError(f"{path} is damaged: {error}") from error
        if not found.outputs or len(found.outputs) != row.get("pairs", len(found.outputs)):
            raise OutputsError(f"{path} has {len(found.outputs)} outputs for {row.get('pairs')} pairs")
        return found

    def units(self) -> Units:
        """What error rates of this run's texts count."""
        from s2s.data import vocab

        target = vocab.load_vocabularies(Workdir(self.folder).vocab, self.cfg.data.vocab).target
        return Units(symbols=target.symbols, words=target.words)


class Trouble(NamedTuple):
    """A folder that gives no figures: "missing", "unfinished", "failed", "damaged" or "repeated"."""

    folder: str
    state: str
    reason: str


class Found(NamedTuple):
    """What `collect` found; troubles in the order of their folders."""

    runs: list[Run]
    troubles: list[Trouble]


def collect(paths: Sequence[str]) -> Found:
    """Finds the runs below folders: runs, replicas, a sweep's cells, or folders of these.

    Args:
      paths: folders; one that is named twice or lies in another counts once.
    """
    runs: dict[tuple[str, str], Run] = {}
    troubles: dict[str, Trouble] = {}
    for path in paths:
        if not Path(path).is_dir():
            troubles[path] = Trouble(path, "missing", "there is no such folder")
            continue
        found = list(_below(Path(path)))
        if not found:
            troubles[path] = Trouble(path, "missing", "no work directory lies there")
        for one in found:
            place = os.path.realpath(one.folder)
            if isinstance(one, Trouble):
                troubles[place] = one
            else:
                runs[place, one.kind] = one
    return Found(list(runs.values()), [troubles[place] for place in sorted(troubles)])


def _below(folder: Path) -> Iterator[Run | Trouble]:
    if not folder.is_dir():
        return
    work = Workdir(folder)
    replicas = sorted(folder.glob("replica_*/"))
    if replicas:
        yield from _together(folder, len(replicas))
        for replica in replicas:
            yield from _one(replica)
        if work.ensemble.results.exists():
            yield from _one(work.ensemble.path)
    elif any(path.exists() for path in (work.config, work.results, work.failure)):
        yield from _one(folder)
    else:
        try:
            inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
        except OSError as error:
            yield Trouble(str(folder), "damaged", f"cannot be read: {error.strerror}")
            return
        for path in inner:
            yield from _below(path)
        for cell in _planned(folder):
            if not any(_below(cell)):
                yield Trouble(str(cell), "unfinished", "not begun")


def _planned(folder: Path) -> list[Path]:
    """The cells that a sweep's plan names; none where there is no plan that can be read."""
    try:
        cells = json.loads((folder / PLAN).read_text(encoding="utf-8"))["cells"]
        return [home(folder) / cell["name"] for cell in cells]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _one(folder: Path) -> Iterator[Run | Trouble]:
    """An ordinary work directory: a run, or why it is none."""
    work = Workdir(folder)
    if not work.results.exists():
        if (reason := work.read_failure()) is not None:
            yield Trouble(str(folder), "failed", reason)
        else:
            begun = "no results.json yet" if work.config.exists() else "not begun"
            yield Trouble(str(folder), "unfinished", begun)
        return
    try:
        cfg, results = work.read_config(), _results(work.results)
    except (ValueError, OSError, RecursionError) as error:
        yield Trouble(str(folder), "damaged", str(error))
        return
    yield from _runs(folder, cfg, results)


def _together(folder: Path, count: int) -> Iterator[Run | Trouble]:
    """What several replicas have in common: ensembles, and replicas that were never begun."""
    work = Workdir(folder)
    if not work.config.exists():
        return
    try:
        cfg = work.read_config()
        wanted = getattr(cfg.run, "replicas", count)
        if wanted > count:
            yield Trouble(str(folder), "unfinished", f"{count} of {wanted} replicas begun")
        if work.results.exists():
            yield from (run for run in _runs(folder, cfg, _results(work.results)) if run.kind)
    except (ValueError, OSError, RecursionError) as error:
        yield Trouble(str(folder), "damaged", str(error))


def _runs(folder: Path, cfg: Config, results: dict[str, Any]) -> Iterator[Run]:
    """The run itself and the ensembles that its table names ("ensemble 3, beam 5")."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in results["scores"]:
        kind, search = "", row["search"]
        if search.startswith("ensemble"):
            kind, _, search = search.partition(", ")
        kinds.setdefault(kind, []).append({**row, "search": search or kind})
    history = results.get("history")
    steps = [line for line in history if _is_step(line)] if isinstance(history, list) else []
    for kind, scores in kinds.items() or [("", [])]:
        yield Run(folder, cfg, scores, [] if kind else steps, kind)


def _results(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    rows = results.get("scores") if isinstance(results, dict) else None
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise ValueError(f"{path.name} holds no table of scores")
    return results


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("part", "search"))


def _is_step(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("step"), int)


def told(troubles: Iterable[Trouble]) -> list[str]:
    """How many folders gave no figures and why, a line each, for people."""
    troubles = list(troubles)
    if not troubles:
        return []
    states = ("failed", "damaged", "unfinished", "missing", "repeated")
    counts = [(sum(one.state == state for one in troubles), state) for state in states]
    total = ", ".join(f"{count} {state}" for count, state in counts if count)
    lines = [f"Not in the table: {total}."]
    return lines + [f"{one.state}: {one.folder}: {one.reason}" for one in troubles]
