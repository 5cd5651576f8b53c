"""Corpora: every format reads the same pairs, and every way to be wrong is named."""

import gzip
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from s2s.config import DataConfig
from s2s.data import builder, corpora, readers
from s2s.data.corpora import CorpusError, has_part, open_corpus, open_pairs

SOURCES = ["eins", "zwei drei", "Füße"]
TARGETS = ["one", "two three", "feet"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Everything a test writes or caches lies in its own folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


def write(name: str, content: str | bytes) -> Path:
    path = Path(name)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def write_parallel(de="eins\nzwei drei\nFüße\n", en="one\ntwo three\nfeet\n", prefix="train"):
    write(f"{prefix}.de", de)
    write(f"{prefix}.en", en)


def parallel(**options):
    return open_pairs("train", source="de", target="en", progress=False, **options)


def tsv(content, source="0", target="1", name="data.tsv"):
    write(name, content)
    return open_pairs(name, source=source, target=target, progress=False)


def jsonl(*records, source="source", target="target"):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    write("data.jsonl", b"\n".join(lines))
    return open_pairs("data.jsonl", source=source, target=target, progress=False)


def texts(corpus):
    return [(pair["source"], *pair["targets"]) for pair in corpus]


def prepared_folders():
    return list(Path("cache/s2s/corpora").glob("*"))


# Formats


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("kind", ["parallel", "tsv", "header", "jsonl"])
def test_every_format_gives_the_same_pairs(kind, zipped):
    pairs = list(zip(SOURCES, TARGETS, strict=True))
    offset = 0
    if kind == "parallel":
        write(f"data.de{zipped}", "".join(f"{s}\n" for s in SOURCES))
        write(f"data.en{zipped}", "".join(f"{t}\n" for t in TARGETS))
        corpus = open_pairs("data", source="de", target="en", progress=False)
    elif kind == "tsv":
        corpus = tsv("".join(f"{t}\t-\t{s}\n" for s, t in pairs), "2", "0", f"data.tsv{zipped}")
    elif kind == "header":
        rows = "English\tDeutsch\n" + "".join(f"{t}\t{s}\n" for s, t in pairs)
        corpus = tsv(rows, "Deutsch", "English", f"data.tsv{zipped}")
        offset = 1
    else:
        rows = "".join(json.dumps({"t": {"en": t, "de": s}}) + "\n" for s, t in pairs)
        write(f"data.jsonl{zipped}", rows)
        corpus = open_pairs(f"data.jsonl{zipped}", source="t.de", target="t.en", progress=False)
    assert len(corpus) == 3
    assert list(corpus) == [
        {"source": s, "targets": [t], "line": n}
        for n, (s, t) in enumerate(zip(SOURCES, TARGETS, strict=True), 1 + offset)
    ]
    assert [corpus[i] for i in (2, 0, 1)] == [list(corpus)[i] for i in (2, 0, 1)]
    assert corpus.rejected == {} and corpus.partial == []
    assert "data" in corpus.name


def test_random_access_reaches_every_pair_of_a_larger_corpus():
    n = 2500  # more than are read at once
    write_parallel("".join(f"s{i}\n" for i in range(n)), "".join(f"t{i}\n" for i in range(n)))
    corpus = parallel()
    assert [pair["line"] for pair in corpus] == list(range(1, n + 1))
    for i in random.Random(0).sample(range(n), 50):
        assert corpus[i] == {"source": f"s{i}", "targets": [f"t{i}"], "line": i + 1}
    for wrong in (-1, n):
        with pytest.raises(IndexError, match=f"pairs 0 to {n - 1}, not {wrong}"):
            corpus[wrong]


def test_tfds_reads_the_same_from_the_folder():
    import tensorflow_datasets as tfds

    write("train.src", "Füße\n\nb\n")
    write("train.ref0", "feet\nx\n\n")
    write("train.ref1", "paws\nx\nb b\n")
    corpus = open_pairs("train", source="src", target="ref0,ref1", progress=False)
    (home,) = prepared_folders()
    (version,) = home.rglob("features.json")
    records = tfds.builder_from_directory(version.parent).as_data_source("pairs")
    assert [
        (record["source"].decode(), [target.decode() for target in record["targets"]], int(record["line"]))
        for record in records
    ] == [(pair["source"], pair["targets"], pair["line"]) for pair in corpus]
    assert len(corpus) == 2 and corpus[0]["targets"] == ["feet", "paws"] and corpus[1]["line"] == 3


def test_a_suffix_may_have_dots_and_a_prefix_may_be_a_file_too():
    write("data", "not these")
    write("data.de.tok", "a\n")
    write("data.en.tok", "b\n")
    assert texts(open_pairs("data", source="de.tok", target="en.tok", progress=False)) == [("a", "b")]


def test_a_prefix_is_no_pattern():
    write("da[t]a*.de", "a\n")
    write("da[t]a*.en", "b\n")
    assert texts(open_pairs("da[t]a*", source="de", target="en", progress=False)) == [("a", "b")]


# Several references


def test_several_references_in_parallel_files():
    for suffix, text in {"src": "a\nb\n", "ref0": "x\ny\n", "ref1": "X\nY\n"}.items():
        write(f"test.{suffix}", text)
    corpus = open_pairs("test", source="src", target="ref0,ref1", progress=False)
    assert texts(corpus) == [("a", "x", "X"), ("b", "y", "Y")]


def test_several_references_in_columns_and_ragged_rows():
    corpus = tsv("a\tx\tX\nb\ty\nc\t\tZ\nd\t\t\n", "0", "1, 2")
    assert texts(corpus) == [("a", "x", "X"), ("b", "y"), ("c", "Z")]
    assert corpus.partial == [2, 3]
    assert corpus.rejected == {"blank target": [4]}


def test_several_references_in_json_lists_and_fields():
    records = {"s": "a", "t": ["x", "y"], "u": "z"}, {"s": "b", "t": [], "u": "z"}
    corpus = jsonl(*records, source="s", target="t,u")
    assert texts(corpus) == [("a", "x", "y", "z"), ("b", "z")]
    assert corpus.partial == [2]


# Lines


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"a\r", "a"),
        (b"a\rb", "a b"),
        ("a\u2028b\u2029c\x85d\x0be\x0cf".encode(), "a\u2028b\u2029c\x85d\x0be\x0cf"),
        (b"a\0b\0", "a\0b\0"),
        (b"  a  ", "  a  "),
        ("😀 é".encode(), "😀 é"),
    ],
    ids=["crlf", "lone-cr", "line-separators", "nul", "spaces", "unicode"],
)
@pytest.mark.parametrize("kind", ["parallel", "tsv"])
def test_a_line_ends_at_newline_alone(kind, raw, text):
    if kind == "parallel":
        write_parallel(raw + b"\nb\n", b"x\n" + raw)
        assert texts(parallel()) == [(text, "x"), ("b", text)]
    else:
        # TSV cuts "\r" at the end of a row only.
        assert texts(tsv(b"x\t" + raw + b"\ny\t" + raw)) == [("x", text), ("y", text)]


def test_the_last_line_needs_no_newline():
    write_parallel("a\nb", "x\ny\n")
    assert texts(parallel()) == [("a", "x"), ("b", "y")]


def test_a_byte_order_mark_is_no_text():
    write_parallel(b"\xef\xbb\xbfa\nb\n", b"\xef\xbb\xbfx\ny\n")
    assert parallel()[0]["source"] == "a"
    assert texts(tsv(b"\xef\xbb\xbfde\ten\na\tx\n", "de", "en")) == [("a", "x")]
    write("data.jsonl", b'\xef\xbb\xbf{"source": "a", "target": "x"}\n')
    assert texts(open_pairs("data.jsonl", progress=False)) == [("a", "x")]


def test_bad_lines_are_skipped_and_counted_and_nothing_shifts():
    write_parallel(b"a\n\n \t\nd\n\xff\xfe\nf\ng\n", b"x\ny\nz\n\xe2\x80\xa8\nv\n\xc3\nu\n")
    corpus = parallel()
    assert texts(corpus) == [("a", "x"), ("g", "u")]
    assert [pair["line"] for pair in corpus] == [1, 7]
    assert corpus.rejected == {"blank source": [2, 3], "blank target": [4], "undecodable": [5, 6]}


def test_bad_rows_of_a_tsv():
    corpus = tsv(b"a\tx\nb\n\nc\t\n\td\n\xff\ty\n z \tw\textra\n")
    assert texts(corpus) == [("a", "x"), (" z ", "w")]
    assert corpus.rejected == {
        "missing column": [2],
        "blank line": [3],
        "blank target": [4],
        "blank source": [5],
        "undecodable": [6],
    }


def test_quotes_in_a_tsv_are_text():
    assert texts(tsv('"a\tb"\n')) == [('"a', 'b"')]


def test_bad_lines_of_json():
    corpus = jsonl(
        {"source": "a\nb\r\nc", "target": "x"},
        b"{oops",
        b"[1, 2]",
        b"",
        {"source": "a"},
        {"source": 3, "target": "x"},
        {"source": ["a", "b"], "target": "x"},
        {"source": None, "target": "x"},
        {"source": "a", "target": ["", 5]},
        b'{"source": "\\ud800", "target": "x"}',
        b'{"source": "\xff", "target": "x"}',
        b"[" * 100_000,
        {"source": "z", "target": "y"},
    )
    assert texts(corpus) == [("a b c", "x"), ("z", "y")]
    assert corpus.rejected == {
        "invalid JSON": [2, 12],
        "not a JSON object": [3],
        "blank line": [4],
        "missing field": [5],
        "not text": [6],
        "source is no text": [7],
        "blank source": [8],
        "blank target": [9],
        "undecodable": [10, 11],
    }


def test_json_finds_translations_by_language_and_prefers_plain_names():
    record = {"translation": {"de": "a", "en": "x"}, "en.plain": "y"}
    assert texts(jsonl(record, source="de", target="en,translation.en,en.plain")) == [("a", "x", "x", "y")]


# Refusals


def refusal(*parts, **options):
    """Opens and expects a CorpusError whose message has all the parts."""
    with pytest.raises(CorpusError) as caught:
        open_pairs(**{"spec": "train", "source": "de", "target": "en", "progress": False, **options})
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert not list(Path("cache").rglob("*.array_record*")), "a refused corpus left something prepared"
    assert not prepared_folders()


@pytest.mark.parametrize(("de", "en", "counts"), [(3, 5, (3, 5)), (5, 3, (5, 3)), (1, 0, ())])
def test_unequal_line_counts_are_refused_with_the_counts(de, en, counts):
    write_parallel("a\n" * de, "x\n" * en)
    if counts:
        refusal(f"train.de has {de}", f"train.en has {en}", "same number of lines")
    else:
        refusal("train.en is empty")


def test_unequal_counts_of_a_second_reference_are_refused():
    write_parallel()
    write("train.fr", "un\n")
    refusal("train.de has 3, train.en has 3, train.fr has 1", target="en,fr")


def test_a_missing_side_is_refused_with_what_there_is():
    write_parallel()
    refusal("train.fr", "train.fr.gz", "there is train.de, train.en", target="fr")


def test_a_missing_corpus_is_refused_with_what_there_is():
    write_parallel()
    refusal("trian is no file", "train.de, train.en", "the tasks are", spec="trian")
    refusal("the folder no/such does not exist", spec="no/such/train")
    refusal("did you mean the task 'dates'", spec="date")


def test_a_folder_is_refused():
    Path("corpus").mkdir()
    refusal("corpus is a folder", "is empty", spec="corpus")
    write("corpus/train.de", "a\n")
    refusal("corpus is a folder", "train.de", spec="corpus")


def test_a_file_of_unknown_ending_is_refused():
    write("data.txt", "a\tx\n")
    refusal("data.txt is neither .tsv nor .jsonl", spec="data.txt")


def test_plain_and_gzipped_at_once_is_refused():
    write_parallel()
    write("train.de.gz", "other\n")
    refusal("train.de and train.de.gz both exist")


@pytest.mark.parametrize("name", ["data.tsv", "data.tsv.gz", "data.jsonl"])
def test_an_empty_file_is_refused(name):
    write(name, "")
    refusal(f"{name} is empty", spec=name, source="0", target="1")


def test_a_corpus_without_usable_pairs_is_refused_with_reasons():
    write_parallel("\n\n", "x\ny\n")
    refusal("has no usable pair", "blank source: 2 (lines 1, 2)")
    write("data.tsv", "de\ten\n")
    refusal("data.tsv has no usable pair", spec="data.tsv")


def test_damaged_gzip_files_are_refused_by_name():
    rows = "".join(f"{random.Random(i).random()}\tx\n" for i in range(5000)).encode()
    whole = gzip.compress(rows)
    options = {"spec": "data.tsv.gz", "source": "0", "target": "1"}
    Path("data.tsv.gz").write_bytes(whole[: len(whole) // 2])
    refusal("data.tsv.gz is a damaged gzip file", **options)
    middle = len(whole) // 2
    Path("data.tsv.gz").write_bytes(whole[:middle] + bytes(50) + whole[middle + 50 :])
    refusal("data.tsv.gz is", "gzip file", **options)
    Path("data.tsv.gz").write_bytes(rows)
    refusal("data.tsv.gz is no sound gzip file", **options)
    Path("data.tsv").write_bytes(whole)
    refusal("data.tsv is gzip data", **options | {"spec": "data.tsv"})


def test_utf16_is_refused():
    write_parallel("a\nb\n".encode("utf-16"), "x\ny\n")
    refusal("train.de is UTF-16", "iconv")


def test_a_column_that_no_row_has_is_refused():
    write("data.tsv", "a\tx\nb\n")
    refusal("data.tsv has no column 2", "from 0 to 1", spec="data.tsv", source="0", target="1,2")


def test_a_column_name_that_the_header_lacks_is_refused():
    write("data.tsv", "german\tenglish\tgerman\na\tx\ty\n")
    options = {"spec": "data.tsv", "source": "english"}
    refusal("no column 'englsh'", "did you mean 'english'", "'german'", **options | {"target": "englsh"})
    refusal("more than one column 'german'", **options | {"target": "german"})
    refusal("no column '0'", "from 0 to 2", **options | {"target": "0"})  # a name among names is a name


def test_a_field_that_no_record_has_is_refused():
    write("data.jsonl", json.dumps({"a": "x", "b": {"c": "y"}}))
    refusal("no field 'd', 'b.e'", "'a', 'b.c'", spec="data.jsonl", source="d", target="b.e")


@pytest.mark.parametrize("names", [{"source": ""}, {"target": ""}, {"target": "en,,fr"}])
def test_empty_names_are_refused(names):
    write_parallel()
    refusal("must name what to read", **names)


def test_a_cache_that_cannot_be_written_is_refused():
    write_parallel()
    write("file", "in the way")
    refusal("cannot be written", "config.data.cache", cache="file/cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused():
    write_parallel()
    Path("train.de").chmod(0)
    refusal("train.de cannot be read")


# The cache


def count_readings(monkeypatch):
    readings = []
    rows = readers.ParallelReader.rows
    monkeypatch.setattr(readers.ParallelReader, "rows", lambda self: (readings.append(1), rows(self))[1])
    return readings


def test_a_corpus_is_prepared_once_and_its_report_kept(monkeypatch):
    readings = count_readings(monkeypatch)
    write_parallel("a\n\nc\n", "x\ny\nz\n")
    first, second = parallel(), parallel()
    assert len(readings) == 1
    assert list(first) == list(second)
    assert first.rejected == second.rejected == {"blank source": [2]}
    assert first.fingerprint == second.fingerprint


def test_a_changed_file_is_noticed_even_with_the_same_size_and_time():
    write_parallel("abc\n", "x\n")
    stat = os.stat("train.de")
    first = parallel()
    write("train.de", "abd\n")
    os.utime("train.de", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = parallel()
    assert (first[0]["source"], second[0]["source"]) == ("abc", "abd")
    assert first.fingerprint != second.fingerprint


def test_the_same_file_read_otherwise_has_another_fingerprint():
    write("data.tsv", "a\tb\tc\n")
    chosen = [("0", "1"), ("1", "0"), ("0", "1,2"), ("a", "b")]
    write("data.tsv", "a\tb\tc\na\tb\tc\n")
    corpus = [open_pairs("data.tsv", source=s, target=t, progress=False) for s, t in chosen]
    assert len({c.fingerprint for c in corpus}) == len(chosen)


def test_swapped_sides_have_another_fingerprint():
    write_parallel()
    swapped = open_pairs("train", source="en", target="de", progress=False)
    assert swapped.fingerprint != parallel().fingerprint
    assert texts(swapped) == list(zip(TARGETS, SOURCES, strict=True))


def test_a_moved_file_is_found_in_the_cache_under_its_new_name(monkeypatch):
    readings = count_readings(monkeypatch)
    write_parallel()
    parallel()
    write_parallel(prefix="moved")
    corpus = open_pairs("moved", source="de", target="en", progress=False)
    assert len(readings) == 1
    assert "moved" in corpus.name


def test_an_interrupted_preparation_leaves_nothing(monkeypatch):
    write_parallel()
    rows = readers.ParallelReader.rows

    def interrupted(self):
        yield from list(rows(self))[:2]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(readers.ParallelReader, "rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            parallel()
    assert prepared_folders() == []
    assert len(parallel()) == 3


def test_a_file_that_changes_while_it_is_read_is_refused(monkeypatch):
    write_parallel()
    rows = readers.ParallelReader.rows

    def growing(self):
        yield from rows(self)
        write_parallel("more\n", "mehr\n")

    monkeypatch.setattr(readers.ParallelReader, "rows", growing)
    refusal("was changed while it was read")


def test_what_a_killed_preparation_left_is_not_trusted_and_goes_in_time():
    write_parallel()
    old, recent = (Path(f"cache/s2s/corpora/.incomplete-{name}") for name in ("old", "recent"))
    for folder in (old, recent):
        folder.mkdir(parents=True)
        (folder / "report.json").write_text("{}")
    os.utime(old, (0, time.time() - 2 * 24 * 3600))
    assert len(parallel()) == 3
    assert not old.exists() and recent.exists()


@pytest.mark.parametrize("damage", ["shortened", "report", "records"])
def test_a_damaged_cache_is_prepared_again(damage):
    write_parallel()
    parallel()
    (home,) = prepared_folders()
    (records,) = home.rglob("*.array_record*")
    if damage == "shortened":
        records.write_bytes(records.read_bytes()[: records.stat().st_size // 2])
    elif damage == "report":
        (home / "report.json").write_text('{"pairs": 3')
    else:
        records.unlink()
    assert texts(parallel()) == list(zip(SOURCES, TARGETS, strict=True))


def _open_at(start, results, folder):
    os.chdir(folder)
    random.seed(1)  # TFDS names its temporary folders with this generator
    start.wait()
    corpus = open_pairs("train", source="de", target="en", cache="cache", progress=False)
    results.put([(pair["line"], pair["source"]) for pair in corpus])


def test_processes_that_prepare_at_once_all_get_the_corpus(tmp_path):
    n = 3000
    write_parallel("".join(f"s{i}\n" for i in range(n)), "t\n" * n)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_open_at, args=(start, results, str(tmp_path))) for _ in range(3)]
    for worker in workers:
        worker.start()
    got = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert all(pairs == [(i + 1, f"s{i}") for i in range(n)] for pairs in got)
    assert len(list(Path("cache/corpora").iterdir())) == 1


def test_a_preparation_overtaken_by_another_uses_the_others(monkeypatch):
    write_parallel()
    inner = builder._prepare

    def overtaken(reader, staging, progress):
        inner(reader, staging, progress)
        monkeypatch.setattr(builder, "_prepare", inner)
        parallel()

    monkeypatch.setattr(builder, "_prepare", overtaken)
    assert texts(parallel()) == list(zip(SOURCES, TARGETS, strict=True))
    assert len(prepared_folders()) == 1


# What is shown


def test_preparation_says_what_it_did_on_standard_error_only(capfd):
    write_parallel("a\n\nc\n", "x\ny\nz\n")
    corpus = open_pairs("train", source="de", target="en")
    out, err = capfd.readouterr()
    assert out == ""
    assert "train.{de,en}: 2 pairs prepared in" in err
    assert corpora.left_out(corpus) == [f"{corpus.name}: left out, blank source: 1 (line 2)"]
    open_pairs("train", source="de", target="en")
    assert capfd.readouterr() == ("", "")


def test_preparation_can_be_silent(capfd):
    write_parallel()
    parallel()
    assert capfd.readouterr() == ("", "")


def test_importing_is_cheap():
    code = (
        "import sys, s2s.data.corpora; "
        "print([m for m in ('tensorflow_datasets', 'jax', 'babel', 'tensorflow') if m in sys.modules])"
    )
    root = Path(corpora.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


# Parts and tasks


@pytest.fixture
def echo(monkeypatch):
    """A task "echo" whose pairs tell their arguments."""
    from s2s.data import tasks

    def make(part, size, seed):
        return ((f"{part} {i} {seed}", f"{i}") for i in range(size if part == "train" else 2))

    monkeypatch.setitem(tasks.TASKS, "echo", make)


def test_a_task_has_all_parts(echo):
    cfg = DataConfig(train="echo", task_size=5)
    for part, size in {"train": 5, "dev": 2, "test": 2}.items():
        assert has_part(cfg, part)
        assert len(open_corpus(cfg, part, seed=7, progress=False)) == size
    corpus = open_corpus(cfg, "dev", seed=7, progress=False)
    assert corpus[1] == {"source": "dev 1 7", "targets": ["1"], "line": 2}
    assert corpus.name == "echo (dev)"


def test_task_part_size_and_seed_are_part_of_the_fingerprint(echo, monkeypatch):
    monkeypatch.setattr(corpora, "_TASK_SAMPLE", 0)  # as if the first pairs were the same
    calls = [("train", 5, 1), ("train", 6, 1), ("train", 5, 2), ("dev", 5, 1)]
    prints = {
        open_pairs("echo", part=p, task_size=n, seed=s, progress=False).fingerprint for p, n, s in calls
    }
    assert len(prints) == len(calls)


def test_a_task_whose_output_changes_is_prepared_again(echo, monkeypatch):
    from s2s.data import tasks

    old = open_pairs("echo", part="dev", progress=False)
    make = tasks.TASKS["echo"]
    monkeypatch.setitem(tasks.TASKS, "echo", lambda *a: ((s, t + "!") for s, t in make(*a)))
    assert open_pairs("echo", part="dev", progress=False)[0]["targets"] == ["0!"]
    assert old[0]["targets"] == ["0"]


def test_a_real_task_opens():
    corpus = open_corpus(DataConfig(train="reverse", task_size=20), "train", seed=3, progress=False)
    assert len(corpus) == 20
    assert all(pair["targets"] == [pair["source"][::-1]] for pair in corpus)


def test_files_have_the_parts_that_are_named():
    write_parallel()
    write_parallel("d\n", "D\n", prefix="dev")
    cfg = DataConfig(train="train", dev="dev", source="de", target="en")
    assert [has_part(cfg, part) for part in ("train", "dev", "test")] == [True, True, False]
    assert texts(open_corpus(cfg, "dev", seed=1, progress=False)) == [("d", "D")]
    with pytest.raises(CorpusError, match="config.data.test is not set.*train='train'"):
        open_corpus(cfg, "test", seed=1)
    with pytest.raises(CorpusError, match="'valid' is none of train, dev, test"):
        open_corpus(cfg, "valid", seed=1)


def test_training_needs_the_first_reference_only():
    write("train.src", "a\n")
    write("train.ref0", "x\n")
    for suffix, text in {"src": "b\n", "ref0": "y\n", "ref1": "z\n"}.items():
        write(f"dev.{suffix}", text)
    cfg = DataConfig(train="train", dev="dev", source="src", target="ref0,ref1")
    assert texts(open_corpus(cfg, "train", seed=1, progress=False)) == [("a", "x")]
    assert texts(open_corpus(cfg, "dev", seed=1, progress=False)) == [("b", "y", "z")]


def test_the_cache_folder(monkeypatch, tmp_path):
    assert corpora.cache_folder("~/x") == Path.home() / "x"
    assert corpora.cache_folder(None) == tmp_path / "cache" / "s2s"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert corpora.cache_folder(None) == Path.home() / ".cache" / "s2s"


# TFDS names


@pytest.fixture(scope="module")
def public():
    """Registers a dataset with TFDS, as the public ones are."""
    import tensorflow_datasets as tfds

    class S2sPublicPairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None

        def _info(self):
            languages = tfds.features.Translation(languages=("de", "en"))
            features = {
                "pair": languages,
                "translation": languages,
                "refs": tfds.features.Sequence(tfds.features.Text()),
                "number": tfds.features.Scalar(dtype=np.int64),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(4), "validation": self._generate_examples(2)}

        def _generate_examples(self, n):
            for i in range(n):
                pair = {"de": f"ä{i}", "en": f"x{i}"}
                refs = [f"r{i}", f"R{i}"]
                yield i, {"pair": pair, "translation": pair, "refs": refs, "number": i}

    return "tfds:s2s_public_pairs"


def test_a_tfds_dataset(public, capfd):
    corpus = open_pairs(f"{public}:train", source="pair.de", target="pair.en", progress=False)
    assert sorted(texts(corpus)) == [(f"ä{i}", f"x{i}") for i in range(4)]
    assert [pair["line"] for pair in corpus] == [1, 2, 3, 4]
    assert capfd.readouterr() == ("", "")
    assert Path("cache/s2s/tfds/s2s_public_pairs").is_dir()
    by_language = open_pairs(f"{public}:train", source="de", target="refs", progress=False)
    assert sorted(texts(by_language)) == [(f"ä{i}", f"r{i}", f"R{i}") for i in range(4)]
    sizes = {"train": 4, "train[:50%]": 2}
    for split, size in sizes.items():
        assert len(open_pairs(f"{public}:{split}", source="de", target="en", progress=False)) == size


def test_the_part_picks_the_split_of_a_tfds_dataset(public):
    cfg = DataConfig(train=public, dev=public, source="de", target="en")
    sizes = [len(open_corpus(cfg, part, seed=1, progress=False)) for part in ("train", "dev")]
    assert sizes == [4, 2]
    assert not has_part(cfg, "test")


def test_tfds_honours_its_data_folder(public, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "elsewhere")
    open_pairs(f"{public}:train", source="de", target="en", progress=False)
    assert Path("elsewhere/s2s_public_pairs").is_dir()


def test_tfds_refusals(public):
    def refused(spec, *parts, source="de", target="en"):
        with pytest.raises(CorpusError) as caught:
            open_pairs(spec, source=source, target=target, progress=False)
        for part in parts:
            assert part in str(caught.value)

    refused(f"{public}:nosuch", "no split 'nosuch'", "train, validation")
    refused(public, "no split 'test'")
    refused("tfds:s2s_public_pair", "knows no dataset 's2s_public_pair'", "did you mean 's2s_public_pairs'")
    refused(f"{public}/nosuch:train", "cannot be prepared by TFDS")
    refused(f"{public}:train", "no field 'fr'", "'pair.de'", "'refs'", target="fr")
    refused(f"{public}:train", "no usable pair", "not text: 4", source="number")
