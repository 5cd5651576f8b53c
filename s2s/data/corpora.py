"""Opens corpora: the one door from what a user names to pairs with random access.

Decides what a name means (generated task, TFDS dataset, TSV, JSON lines, parallel
text) and in which folder corpora are cached. Must not know how they are cached, nor what
becomes of the pairs: vocabularies, ids, batches.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from s2s.config import DataConfig
from s2s.data.readers import (
    CorpusError,
    JsonReader,
    Pair,
    ParallelReader,
    Reader,
    Row,
    TsvReader,
    field_rows,
    listed,
    nearby,
)

__all__ = [
    "Corpus",
    "CorpusError",
    "Pair",
    "cache_folder",
    "has_part",
    "left_out",
    "listed",
    "open_corpus",
    "open_pairs",
]

PARTS = ("train", "dev", "test")
_TFDS_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_TASK_SAMPLE = 64


class Corpus(Protocol):
    """Pairs with random access, and iteration in order.

    Attributes:
      name: for people: path or task.
      fingerprint: names the content; caches made from the corpus are keyed by it.
      rejected: reason -> numbers of the lines that gave no pair.
      partial: numbers of the lines whose pair lacks some of its references.
    """

    name: str
    fingerprint: str
    rejected: dict[str, list[int]]
    partial: list[int]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def __iter__(self) -> Iterator[Pair]: ...


def has_part(cfg: DataConfig, part: str) -> bool:
    """Whether `open_corpus` has something to open for a part."""
    return _spec(cfg, part) is not None


def open_corpus(cfg: DataConfig, part: str, *, seed: int, progress: bool = True) -> Corpus:
    """Opens a part of the configured data.

    Args:
      cfg: where the data is. Of several targets "train" needs and keeps the first only.
      part: "train", "dev" or "test".
      seed: of generated tasks.
      progress: show the preparation on standard error.

    Raises:
      CorpusError: the config names no such part, or as `open_pairs`.
    """
    spec = _spec(cfg, part)
    if spec is None:
        raise CorpusError(
            f"there is no {part} part: config.data.{part} is not set, and config.data.train={cfg.train!r} "
            f"is no generated task, which would have its own; set config.data.{part}"
        )
    return open_pairs(
        spec,
        source=cfg.source,
        target=cfg.target.split(",")[0] if part == "train" else cfg.target,
        cache=cfg.cache,
        part=part,
        task_size=cfg.task_size,
        seed=seed,
        progress=progress,
    )


def open_pairs(
    spec: str,
    *,
    source: str = "source",
    target: str = "target",
    cache: str | None = None,
    part: str = "test",
    task_size: int = DataConfig.task_size,
    seed: int = 1,
    progress: bool = True,
) -> Corpus:
    """Opens the pairs that a name stands for, after preparing them if they are new or changed.

    Args:
      spec: a generated task's name; "tfds:NAME[/CONFIG][:SPLIT]"; a .tsv or .jsonl file,
        also .gz; or a prefix of parallel files.
      source: suffix, column (name, or number from 0), or field of the source.
      target: the same for the target; several by commas are several references.
      cache: folder of prepared corpora; None: s2s in the user's cache folder.
      part: which part of a task, and which split of a TFDS dataset named without one.
      task_size: training pairs of a generated task.
      seed: of a generated task.
      progress: show the preparation on standard error.

    Raises:
      CorpusError: nothing usable is there; the message says what is, and what to do.
    """
    targets = [name.strip() for name in target.split(",")]
    if not source or not all(targets):
        raise CorpusError(f"source={source!r} and target={target!r} must name what to read")
    folder = cache_folder(cache)
    reader = _reader(spec, source, targets, folder, part, task_size, seed, progress)

    from s2s.data.builder import open_prepared  # takes half a second

    return open_prepared(reader, folder / "corpora", progress)


def left_out(corpus: Corpus) -> list[str]:
    """What of a corpus was left out and why, a sentence for people each; often nothing."""
    told = [
        f"{corpus.name}: left out, {reason}: {listed(lines)}" for reason, lines in corpus.rejected.items()
    ]
    if corpus.partial:
        told.append(f"{corpus.name}: kept without all references: {listed(corpus.partial)}")
    return told


def cache_folder(cache: str | None) -> Path:
    """The folder of everything prepared: `cache`, or s2s in the user's cache folder."""
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "s2s"


def _spec(cfg: DataConfig, part: str) -> str | None:
    if part not in PARTS:
        raise CorpusError(f"part {part!r} is none of {', '.join(PARTS)}")
    spec = {"train": cfg.train, "dev": cfg.dev, "test": cfg.test}[part]
    return cfg.train if spec is None and cfg.train in _tasks() else spec


def _tasks() -> Mapping[str, Callable[..., Iterator[tuple[str, str]]]]:
    from s2s.data import tasks  # brings Babel's tables along

    return tasks.TASKS


def _reader(
    spec: str,
    source: str,
    targets: Sequence[str],
    folder: Path,
    part: str,
    task_size: int,
    seed: int,
    progress: bool,
) -> Reader:
    if spec in _tasks():
        return TaskReader(spec, part, task_size, seed)
    if spec.startswith("tfds:"):
        return TfdsReader(spec, source, targets, folder / "tfds", part, progress)
    path = Path(spec).expanduser()
    plain_name = path.name.lower().removesuffix(".gz")
    if path.is_file() and plain_name.endswith(".tsv"):
        return TsvReader(path, source, targets)
    if path.is_file() and plain_name.endswith(".jsonl"):
        return JsonReader(path, source, targets)
    is_prefix = any(path.parent.glob(f"{glob.escape(path.name)}.*"))
    if path.is_file() and not is_prefix:
        raise CorpusError(
            f"{path} is neither .tsv nor .jsonl (or .gz of them): rename it if it is one of them; of "
            "parallel files give the prefix alone, without the suffix"
        )
    if path.is_dir() or not is_prefix:
        close = difflib.get_close_matches(spec, _tasks(), 1)
        hint = f"did you mean the task {close[0]!r}? " if close else ""
        what = "is a folder" if path.is_dir() else "is no file, no prefix of files and no task"
        raise CorpusError(
            f"{spec} {what}: {hint}{nearby(path / 'x' if path.is_dir() else path)}; "
            f"the tasks are {', '.join(sorted(_tasks()))}"
        )
    return ParallelReader(path, source, targets)


class TaskReader:
    """A generated task; its pairs are numbered from 1."""

    def __init__(self, name: str, part: str, size: int, seed: int) -> None:
        self.name = f"{name} ({part})"
        self._make, self._arguments = _tasks()[name], (part, size, seed)
        code = inspect.getsourcefile(self._make)
        self.files: tuple[Path, ...] = (Path(code),) if code else ()
        # The first pairs notice changes in what the task's code builds on (locale tables, say).
        sample = hashlib.sha256(repr(list(itertools.islice(self._pairs(), _TASK_SAMPLE))).encode())
        self.options: dict[str, Any] = {
            "format": "task",
            "task": name,
            "part": part,
            "size": size,
            "seed": seed,
            "sample": sample.hexdigest(),
        }

    def _pairs(self) -> Iterator[tuple[str, str]]:
        return self._make(*self._arguments)

    def rows(self) -> Iterator[Row]:
        for number, (source, target) in enumerate(self._pairs(), 1):
            yield Row(number, source, [target])


class TfdsReader:
    """A split of a dataset that TFDS knows by name; its records are numbered from 1.

    TFDS downloads and prepares it in $TFDS_DATA_DIR, or else in the cache.
    """

    def __init__(
        self, spec: str, source: str, targets: Sequence[str], folder: Path, part: str, progress: bool
    ) -> None:
        import tensorflow_datasets as tfds

        from s2s.data.builder import quiet

        self.name = spec
        dataset, _, split = spec.removeprefix("tfds:").partition(":")
        split = split or _TFDS_SPLITS[part]
        self.fields = (source, *targets)
        try:
            with quiet(bars=progress and sys.stderr.isatty()):
                builder = tfds.builder(dataset, data_dir=os.environ.get("TFDS_DATA_DIR") or folder)
                builder.download_and_prepare(
                    file_format="array_record",
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False),
                )
        except tfds.core.DatasetNotFoundError as error:
            name = dataset.split("/")[0]
            close = difflib.get_close_matches(name, set(str(error).split()) - {name}, 1)
            hint = f"did you mean {close[0]!r}? Its" if close else "its"
            raise CorpusError(
                f"{spec}: TFDS knows no dataset {dataset!r}; {hint} catalogue is at "
                "https://www.tensorflow.org/datasets/catalog"
            ) from error
        except Exception as error:  # downloads, formats and missing packages fail in many ways
            raise CorpusError(
                f"{spec} cannot be prepared by TFDS: {type(error).__name__}: {error}"
            ) from error
        try:
            self._records = builder.as_data_source(split)
        except NotImplementedError as error:
            raise CorpusError(
                f"{spec} lies in {builder.data_dir} in a format without random access: remove it there, "
                "or set TFDS_DATA_DIR to another folder, and it is prepared again"
            ) from error
        except (ValueError, KeyError) as error:
            raise CorpusError(
                f"{spec} has no split {split!r}: it has {', '.join(sorted(builder.info.splits))}; "
                f"write tfds:{dataset}:SPLIT"
            ) from error
        self.files = tuple(Path(item.filename) for item in builder.info.splits[split].file_instructions)
        self.options: dict[str, Any] = {
            "format": "tfds",
            "dataset": builder.info.full_name,
            "split": split,
            "fields": list(self.fields),
        }

    def rows(self) -> Iterator[Row]:
        return field_rows(self.name, iter(self._records), self.fields)
