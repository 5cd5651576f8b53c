"""Stores pairs as an ArrayRecord dataset of TensorFlow Datasets and reads them at random.

Decides how a prepared corpus lies on disk, that it is either whole or not there, and
what makes one stale. Must not know where pairs come from. Importing it imports TFDS,
which takes half a second: import it where a corpus is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from s2s.data.readers import CorpusError, Pair, Reader, Rejections, listed, usable

# Part of every fingerprint: raise it when the same bytes would be read or stored otherwise.
_FORMAT_VERSION = 1
_SPLIT = "pairs"
_REPORT = "report.json"
_STAGING = ".incomplete-"
_ABANDONED_SECONDS = 24 * 3600
_READ_AT_ONCE = 1024


class Pairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds the dataset of a reader's usable pairs, in the reader's order."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar[None] = None  # nothing is downloaded; TFDS would search our package for checksums

    def __init__(self, *, data_dir: Path, pairs: Iterator[Pair] | None = None) -> None:
        self._pairs = pairs
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pairs of a source text and its target texts.",
            features=tfds.features.FeaturesDict(
                {
                    "source": tfds.features.Text(),
                    "targets": tfds.features.Sequence(tfds.features.Text()),
                    "line": tfds.features.Scalar(dtype=np.int64),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {_SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Pair]]:
        assert self._pairs is not None, "a dataset opened for reading cannot be generated"
        return enumerate(self._pairs)

    def _generate_splits(self, dl_manager: Any, download_config: Any) -> list[tfds.core.SplitInfo]:
        """Writes one file in order.

        TFDS' own writer keeps up to 1 GB of records in memory to sort them, and beyond
        that needs TensorFlow; our pairs are in order already.
        """
        template = self._get_filename_template(_SPLIT)
        path = template.sharded_filepath(shard_index=0, num_shards=1)
        count = size = 0
        writer = array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")
        try:
            for _, pair in self._split_generators(dl_manager)[_SPLIT]:
                record = _record(pair)
                writer.write(record)
                count, size = count + 1, size + len(record)
        finally:
            writer.close()
        return [
            tfds.core.SplitInfo(
                name=_SPLIT, shard_lengths=[count], num_bytes=size, filename_template=template
            )
        ]


class Prepared:
    """A prepared corpus: random access to its pairs.

    Attributes:
      name: for people.
      fingerprint: names the content; caches made from the corpus are keyed by it.
      rejected: reason -> line numbers without a pair.
      partial: line numbers of pairs that lack some of their references.
    """

    def __init__(self, folder: Path, name: str, fingerprint: str) -> None:
        """Opens a folder that `prepare` made.

        Raises:
          Exception: of many kinds, when the folder is damaged.
        """
        self.name, self.fingerprint = name, fingerprint
        report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        self.rejected: dict[str, list[int]] = report["rejected"]
        self.partial: list[int] = report["partial"]
        with quiet():
            self._records = Pairs(data_dir=folder).as_data_source(
                _SPLIT, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        if len(self._records) != report["pairs"]:
            raise ValueError(f"{folder} has {len(self._records)} records instead of {report['pairs']}")
        self[len(self) - 1]  # A shortened file fails here, not in the middle of training.

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has pairs 0 to {len(self) - 1}, not {index}")
        return _pair(self._records[index])

    def __iter__(self) -> Iterator[Pair]:
        """All pairs in order, read many at once, which is much faster than one by one."""
        for start in range(0, len(self), _READ_AT_ONCE):
            stop = min(start + _READ_AT_ONCE, len(self))
            yield from map(_pair, self._records.__getitems__(range(start, stop)))


# A record is a tf.train.Example, as the features of `Pairs` say. TFDS' own conversions, made for features
# of any kind, would take ten times as long.
def _record(pair: Pair) -> bytes:
    example = tf_example_pb2.Example()
    feature = example.features.feature
    feature["source"].bytes_list.value.append(pair["source"].encode())
    feature["targets"].bytes_list.value.extend(target.encode() for target in pair["targets"])
    feature["line"].int64_list.value.append(pair["line"])
    return example.SerializeToString()


def _pair(record: bytes) -> Pair:
    feature = tf_example_pb2.Example.FromString(record).features.feature
    (source,), (line,) = feature["source"].bytes_list.value, feature["line"].int64_list.value
    targets = [target.decode() for target in feature["targets"].bytes_list.value]
    return Pair(source=source.decode(), targets=targets, line=line)


def open_prepared(reader: Reader, folder: Path, progress: bool) -> Prepared:
    """Opens the corpus of a reader, after preparing it if `folder` lacks it.

    A corpus is prepared aside and renamed into place whole, so that neither an
    interruption nor a second process leaves half of one.

    Args:
      reader: where the pairs come from.
      folder: of all prepared corpora.
      progress: show it on standard error.

    Raises:
      CorpusError: the reader finds no usable pair, refuses its files, or `folder`
        cannot be written.
    """
    fingerprint = _fingerprint(reader)
    home = folder / fingerprint
    if home.is_dir():
        try:
            return Prepared(home, reader.name, fingerprint)
        except Exception as error:  # array_record, protobuf and TFDS each raise their own
            logging.warning("prepared again, because %s is damaged: %s", home, error)
            shutil.rmtree(home, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = folder / f"{_STAGING}{uuid.uuid4().hex}"
        staging.mkdir()
    except OSError as error:
        raise CorpusError(
            f"the folder {folder} for prepared corpora cannot be written ({error.strerror}): "
            "set config.data.cache to another"
        ) from error
    try:
        _remove_abandoned(folder)
        _prepare(reader, staging, progress)
        if _fingerprint(reader) != fingerprint:
            raise CorpusError(f"{reader.name} was changed while it was read: start again when it is complete")
        try:
            staging.rename(home)
        except OSError:
            if not home.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Prepared(home, reader.name, fingerprint)


def _fingerprint(reader: Reader) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT_VERSION, reader.options], sort_keys=True).encode())
    for path in reader.files:
        try:
            with open(path, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:32]


def _prepare(reader: Reader, staging: Path, progress: bool) -> None:
    rejections = Rejections()
    started = time.monotonic()
    with contextlib.closing(_watched(reader, rejections, progress)) as pairs, quiet():
        builder = Pairs(data_dir=staging, pairs=pairs)
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    shutil.rmtree(staging / "downloads", ignore_errors=True)
    count = builder.info.splits[_SPLIT].num_examples
    report = {"pairs": count, "rejected": rejections.rejected, "partial": rejections.partial}
    (staging / _REPORT).write_text(json.dumps(report), encoding="utf-8")
    if progress:
        seconds = time.monotonic() - started
        print(f"{reader.name}: {count:,} pairs prepared in {seconds:.1f} s", file=sys.stderr)


def _watched(reader: Reader, rejections: Rejections, progress: bool) -> Generator[Pair, None, None]:
    bar = tqdm(
        usable(reader.rows(), rejections),
        desc=f"preparing {reader.name}",
        unit=" pairs",
        leave=False,
        # None: only on a terminal.
        disable=None if progress else True,
    )
    empty = True
    for pair in bar:
        empty = False
        yield pair
    if empty:
        reasons = "; ".join(f"{reason}: {listed(n)}" for reason, n in rejections.rejected.items())
        raise CorpusError(f"{reader.name} has no usable pair ({reasons or 'it is empty'})")


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed preparations left behind."""
    for path in folder.glob(f"{_STAGING}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Keeps TFDS from printing to standard output, logging below warnings and showing `bars`."""
    tfds.display_progress_bar(bars)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(min(verbosity, logging.WARNING))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        tfds.display_progress_bar(True)
