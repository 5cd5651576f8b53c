"""Side by side: s2s and the toolkits people use, on this machine, in one run.

    python -m benchmarks.compare [--data FOLDER] [--quick] [--only pytorch joeynmt] [--cores 0 1]

Decides the pairs, the sizes and the table of bars, and writes Markdown and JSON to
benchmarks/results. A peer that fails is reported and takes nothing else with it. How a pair is
timed is in `benchmarks.harness`, what both read in `benchmarks.data`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import data
from benchmarks.harness import (
    PEERS,
    ROOT,
    Duel,
    Spread,
    Worker,
    WorkerError,
    duel,
    environment,
    machine,
    spread,
)
from s2s import config as config_lib
from s2s.data import plan
from s2s.infra import report

BENCH = ROOT / ".bench"
# Our float32 with all digits of every number (`s2s.kernels.contract`).
HIGHEST = "float32, precision highest"
# How far apart losses of both sides may be on the same batches, from the same parameters, step by step.
TOLERANCES = {"float32": 1e-4, HIGHEST: 1e-4, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
      rounds: turns of each side.
      search_rounds: the same when they translate.
      updates: updates in a turn of the large models.
      small_updates: updates in a turn of the small ones.
      trained: more updates of the small models before they translate.
      sentences: sentences a turn translates with the large models.
      words: words a turn translates with the small ones.
      growth: how many values each thing that grows takes.
    """

    rounds: int
    search_rounds: int
    updates: int
    small_updates: int
    trained: int
    sentences: int
    words: int
    growth: int


FULL = Effort(
    rounds=5, search_rounds=3, updates=6, small_updates=50, trained=250, sentences=128, words=448, growth=4
)
QUICK = Effort(
    rounds=3, search_rounds=2, updates=2, small_updates=10, trained=60, sentences=64, words=96, growth=2
)


@dataclasses.dataclass
class Bar:
    """What has to be reached, and what was.

    Attributes:
      what: in words.
      least: the ratio or share wanted.
      got: what was measured; None: it was not.
      at_most: less is better.
    """

    what: str
    least: float
    got: Spread | float | None = None
    at_most: bool = False

    @property
    def value(self) -> float | None:
        """The measured median."""
        return self.got.median if isinstance(self.got, Spread) else self.got

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None: not measured."""
        if self.value is None:
            return None
        return self.value <= self.least if self.at_most else self.value >= self.least


def bars() -> dict[str, Bar]:
    """The bars by name, nothing measured yet."""
    return {
        "pytorch": Bar("training, 2 x 512 LSTM, general, to best-practice PyTorch, no feeding", 1.3),
        "pytorch feeding": Bar("the same with input feeding", 2.0),
        "joeynmt": Bar("training to JoeyNMT, same sizes, each side's own batching", 3.5),
        "yoyodyne": Bar("training to yoyodyne, small G2P", 6.0),
        "peak": Bar("share of the matrix peak, 2 x 512, batch 64", 0.70),
        "joeynmt beam": Bar("beam 5 to JoeyNMT", 4.0),
        "yoyodyne beam": Bar("beam 5 to yoyodyne", 10.0),
        "padding": Bar("padding of Multi30k's batches, at most 8 shapes", 0.10, at_most=True),
    }


class Bench:
    """One run: what it works with, and what it found.

    Attributes:
      bars: filled by the sections.
      tables: by section, (title, headers, rows).
      notes: by section, sentences.
      failures: (section, message).
      raw: by section, what workers answered.
    """

    def __init__(self, effort: Effort, cores: Sequence[int], data_folder: Path | None, scratch: Path):
        self.effort, self.cores, self.scratch = effort, list(cores), scratch
        self.bars = bars()
        self.tables: dict[str, list[tuple[str, list[str], list[list[Any]]]]] = {}
        self.notes: dict[str, list[str]] = {}
        self.failures: list[tuple[str, str]] = []
        self.raw: dict[str, list[Any]] = {}
        self.corpora = data.prepare(BENCH / "data", data_folder)

    def ours(self) -> Worker:
        """A process of s2s."""
        return Worker([sys.executable, "-m", "benchmarks.worker_s2s"], self.cores, BENCH / "s2s.log")

    def peer(self, name: str, script: str) -> Worker:
        """A process of a peer, in its own environment.

        Raises:
          WorkerError: it cannot be installed.
        """
        python = environment(name, BENCH / "venvs", tell)
        return Worker([str(python), str(PEERS / script)], self.cores, BENCH / f"{name}.log")

    def keep(self, section: str, what: str, got: Duel | dict[str, Any]) -> None:
        """Keeps raw answers for the JSON file."""
        self.raw.setdefault(section, []).append(
            {"what": what, **(got._asdict() if isinstance(got, Duel) else got)}
        )

    def table(self, section: str, title: str, headers: list[str], rows: list[list[Any]]) -> None:
        """Adds a table to a section."""
        self.tables.setdefault(section, []).append((title, headers, rows))

    def note(self, section: str, sentence: str) -> None:
        """Adds a sentence to a section."""
        self.notes.setdefault(section, []).append(sentence)

    @contextmanager
    def survive(self, section: str, what: str) -> Iterator[None]:
        """A worker's failure inside is told and ends nothing else."""
        try:
            yield
        except WorkerError as error:
            tell(f"{section}: {what} failed: {error}")
            self.failures.append((section, f"{what}: {error}"))


def luong(hidden: int, feeding: bool, dtype: str) -> dict[str, Any]:
    """The model of the PyTorch pairs: as Luong et al. 2015, encoder and decoder of equal sizes."""
    return {
        "model.embedding": hidden,
        "model.hidden": hidden,
        "model.layers": 2,
        "model.bidirectional": False,
        "model.bridge": "copy",
        "model.attention": "general",
        "model.input_feeding": feeding,
        "model.dropout": 0.0,
        "model.dtype": dtype,
        "optim.learning_rate": 1e-3,
        "optim.clip_norm": 5.0,
    }


@contextmanager
def pytorch_pair(
    bench: Bench,
    hidden: int,
    entries: int,
    feeding: bool,
    batches: Path,
    loops: Sequence[str],
    dtype: str = "float32",
) -> Iterator[tuple[Worker, Worker, dict[str, Any]]]:
    """Both sides with the same parameters and batches, checked to compute the same, and warm.

    Raises:
      WorkerError: a side failed, or they do not compute the same function.
    """
    with bench.ours() as ours, bench.peer("pytorch", "pytorch_luong.py") as theirs:
        tolerance = TOLERANCES[dtype]
        precision, dtype = ("highest", "float32") if dtype == HIGHEST else (None, dtype)
        loaded = ours.ask(
            "load",
            config=luong(hidden, feeding, dtype),
            batches=str(batches),
            vocab_sizes=[entries, entries],
            precision=precision,
        )
        sizes = dict(
            embedding=hidden, hidden=hidden, layers=2, sources=entries, targets=entries, feeding=feeding
        )
        peer = theirs.ask(
            "load", sizes=sizes, batches=str(batches), learning_rate=1e-3, clip=5.0, dtype=dtype
        )
        weights = str(bench.scratch / "weights.npz")
        ours.ask("save_weights", file=weights)
        theirs.ask("set_weights", file=weights)
        if loaded["parameters"] != peer["parameters"]:
            raise WorkerError(f"{loaded['parameters']} parameters here, {peer['parameters']} in PyTorch")
        checked = ours.ask("train", steps=3), theirs.ask("train", first=0, steps=3)
        losses = [answer["losses"] for answer in checked]
        apart = max(abs(mine - other) for mine, other in zip(*losses, strict=True))
        if not apart <= tolerance:
            raise WorkerError(
                f"from the same parameters the losses of three updates are {losses[0]} here and {losses[1]} "
                f"in PyTorch: further apart than {tolerance}, so the two do not compute the same"
            )
        warm = ours.ask("warm_up"), theirs.ask("warm_up", loops=list(loops))
        yield (
            ours,
            theirs,
            {
                "parameters": loaded["parameters"],
                "apart": apart,
                # The check's updates are the first, so they compile.
                "our_warm_up": checked[0]["seconds"] + warm[0]["seconds"],
                "their_warm_up": checked[1]["seconds"] + warm[1]["seconds"],
                **{name: warm[1][name] for name in ("loop", "loops") if name in warm[1]},
                "versions": [loaded["version"], f"torch {peer['version']}"],
            },
        )


def milliseconds(found: Duel, side: int) -> float:
    """Of an update of one side, median over rounds."""
    return spread([1e3 * answer[side]["seconds"] / answer[side]["steps"] for answer in found.rounds]).median


def pytorch(bench: Bench) -> None:
    """Training against PyTorch, and its distance to the matrix peak."""
    effort, rows = bench.effort, []
    encoded = data.encoded_sentences(bench.corpora.mt, BENCH / "data" / "cache")
    make = partial(
        plan.make_plan, encoded.source_lengths, encoded.target_lengths, max_shapes=8, rows_multiple=8, seed=1
    )
    layout = data.plan_of_sentences(make, len(encoded), float(encoded.target_lengths.mean()), 64)
    planned, full = bench.scratch / "planned.npz", bench.scratch / "full.npz"
    data.save_batches(planned, data.planned_batches(encoded, layout, effort.updates))
    data.save_batches(full, [data.full_batch(64, 32, 32, data.VOCABULARY)])
    for batches, what in ((full, "64 x 32 x 32, no pads"), (planned, "planned batches of sentences")):
        for dtype, feeding in itertools.product(TOLERANCES, (False, True)):
            if dtype == HIGHEST and batches is full:
                continue
            name = f"{what}, {'input feeding' if feeding else 'no feeding'}, {dtype}"
            # Compiling takes PyTorch a minute or two.
            compiled = effort is FULL and dtype != HIGHEST
            loops = ["cells", "by hand", *(["by hand, torch.compile"] if compiled else [])]
            with (
                bench.survive("pytorch", name),
                pytorch_pair(bench, 512, data.VOCABULARY, feeding, batches, loops, dtype) as pair,
            ):
                ours, theirs, facts = pair
                updates = effort.updates if batches is planned else max(1, effort.updates // 3)
                found = duel(
                    partial(ours.ask, "train", steps=updates),
                    partial(theirs.ask, "train", first=0, steps=updates),
                    effort.rounds,
                    "tokens",
                )
                tell(f"pytorch: {name}: {found.ratio} times as fast")
                bench.keep("pytorch", name, found)
                bench.keep("pytorch", name, facts)
                rows.append(
                    [
                        name,
                        found.ours.median,
                        found.theirs.median,
                        str(found.ratio),
                        milliseconds(found, 0),
                        milliseconds(found, 1),
                        facts["our_warm_up"],
                        facts["their_warm_up"],
                    ]
                )
                if batches is planned and dtype == "float32":
                    bench.bars["pytorch feeding" if feeding else "pytorch"].got = found.ratio
                if feeding:
                    bench.note(
                        "pytorch",
                        f"{name}: the fastest of PyTorch's loops is {facts['loop']!r} "
                        f"({_times(facts['loops'])}).",
                    )
                if batches is full and not feeding and dtype == "float32":
                    peak(bench, ours)
    bench.table(
        "pytorch",
        "2 x 512 LSTM each side, E = 512, V = 8,000, general attention; target tokens a second",
        [
            "batches",
            "s2s",
            "PyTorch",
            "ratio",
            "ms, s2s",
            "ms, PyTorch",
            "compile and warm-up (s)",
            "theirs (s)",
        ],
        rows,
    )
    bench.note(
        "pytorch",
        "Before anything is timed both sides start from the same parameters, and their losses over three "
        f"updates agree to {TOLERANCES['float32']} nats, or {TOLERANCES['bfloat16']} in bfloat16. Batches "
        "are planned by s2s, and PyTorch gets them without filler rows and cut to the longest sentence; its "
        f"bfloat16 is torch.autocast. In '{HIGHEST}' JAX_DEFAULT_MATMUL_PRECISION is highest on our side, "
        "three bfloat16 a number in six products; else, on a matrix unit, products are of fixed point, 24 "
        "bits of the largest in a row (benchmarks/results/precision.md). PyTorch's are float32.",
    )


def peak(bench: Bench, ours: Worker) -> None:
    """The FLOPs a step needs, over its time, over what large products reach between its rounds."""
    shares, rates, peaks = [], [], []
    for _ in range(bench.effort.rounds):
        best = ours.ask("peak")
        answer = ours.ask("train", steps=2)
        peaks.append(best["flops_per_second"])
        rates.append(answer["flops"] / answer["seconds"])
        shares.append(rates[-1] / peaks[-1])
        bench.keep("pytorch", "peak", {"peak": best, "step": answer})
    share = spread(shares)
    bench.bars["peak"].got = share
    bench.table(
        "pytorch",
        "share of the matrix peak (float32; model FLOPs by formula; 64 x 32 x 32)",
        ["step (GFLOP/s)", "large products (GFLOP/s)", "share"],
        [[spread(rates).median / 1e9, spread(peaks).median / 1e9, str(share)]],
    )


def growth(bench: Bench) -> None:
    """How the time of an update grows with batch, length, hidden size and vocabulary."""
    base = {"batch": 32, "length": 16, "hidden": 256, "vocabulary": 8000}
    values = {
        "batch": (8, 32, 128, 256),
        "length": (8, 16, 32, 64),
        "hidden": (128, 256, 512, 1024),
        "vocabulary": (500, 2000, 8000, 32000),
    }
    rows, seen = [], {}
    for thing, sizes in values.items():
        for size in (
            sizes if bench.effort.growth == len(sizes) else sizes[:: len(sizes) // bench.effort.growth]
        ):
            point = {**base, thing: size}
            key = tuple(point.values())
            if key not in seen:
                batches = bench.scratch / "growth.npz"
                full = data.full_batch(point["batch"], point["length"], point["length"], point["vocabulary"])
                data.save_batches(batches, [full])
                with (
                    bench.survive("growth", f"{thing} {size}"),
                    pytorch_pair(bench, point["hidden"], point["vocabulary"], False, batches, ()) as (
                        ours,
                        theirs,
                        _,
                    ),
                ):
                    found = duel(
                        partial(ours.ask, "train", steps=3),
                        partial(theirs.ask, "train", first=0, steps=3),
                        min(3, bench.effort.rounds),
                        "tokens",
                    )
                    seen[key] = found
                    bench.keep("growth", f"{thing} {size}", found)
                    tell(f"growth: {thing} {size}: {found.ratio}")
            if key in seen:
                found = seen[key]
                rows.append([thing, size, milliseconds(found, 0), milliseconds(found, 1), str(found.ratio)])
    bench.table(
        "growth",
        f"milliseconds of an update, no feeding; the others are {_named(base)}",
        ["what grows", "to", "s2s", "PyTorch", "ratio"],
        rows,
    )


def yoyodyne(bench: Bench) -> None:
    """Small G2P: embedding and hidden 128, batch 32."""
    effort, longest = bench.effort, 40
    config = {
        "data.train": str(bench.corpora.g2p / "train.tsv"),
        "data.source": "0",
        "data.target": "1",
        "data.vocab.kind": "symbols",
        "data.vocab.source_separator": "",
        "data.vocab.target_separator": " ",
        "data.max_shapes": 3,
        "data.cache": str(BENCH / "data" / "cache"),
        "model.embedding": 128,
        "model.hidden": 128,
        "model.encoder_hidden": 128,
        "model.dropout": 0.2,
    }
    usual = {**config, "model.attention": "general", "model.input_feeding": False}
    # Its attention is additive and joins the next step's input: this is as near as s2s comes.
    nearest = {**config, "model.attention": "concat", "model.input_feeding": True}
    train_rows, search_rows = [], []
    with bench.peer("yoyodyne", "yoyodyne_soft.py") as theirs:
        peer = theirs.ask(
            "load",
            folder=str(bench.corpora.g2p),
            scratch=str(bench.scratch),
            embedding=128,
            hidden=128,
            batch=32,
            dropout=0.2,
            longest=longest,
        )
        theirs.ask("train", steps=3)
        for name, settings in (
            ("general, no feeding", usual),
            ("concat, input feeding (nearest)", nearest),
        ):
            with bench.survive("yoyodyne", name), bench.ours() as ours:
                loaded = ours.ask("load", config=settings, batch_sentences=32)
                warm = ours.ask("warm_up")
                found = duel(
                    partial(ours.ask, "train", steps=effort.small_updates),
                    partial(theirs.ask, "train", steps=effort.small_updates),
                    effort.rounds,
                    "tokens",
                )
                tell(f"yoyodyne: training, {name}: {found.ratio} times as fast")
                bench.keep("yoyodyne", name, found)
                bench.keep("yoyodyne", name, {"ours": loaded, "theirs": peer})
                train_rows.append(
                    [
                        name,
                        loaded["parameters"],
                        found.ours.median,
                        found.theirs.median,
                        str(found.ratio),
                        milliseconds(found, 0),
                        milliseconds(found, 1),
                        warm["seconds"],
                    ]
                )
                if settings is not nearest:
                    continue
                bench.bars["yoyodyne"].got = found.ratio
                # Trained alike, both know when a word ends.
                theirs.ask("train", steps=effort.trained)
                ours.ask("train", steps=effort.trained)
                for beam in (1, 5):
                    mine = partial(
                        ours.ask,
                        "decode",
                        file=str(bench.corpora.g2p / "dev.src"),
                        sentences=effort.words,
                        beam=beam,
                        batch=32,
                        exact_length=None,
                        longest=longest,
                    )
                    other = partial(theirs.ask, "decode", sentences=effort.words, beam=beam)
                    warm = mine(), other()
                    found = duel(mine, other, effort.search_rounds, "sentences")
                    tell(f"yoyodyne: beam {beam}: {found.ratio} times as fast")
                    bench.keep("yoyodyne", f"beam {beam}", found)
                    search_rows.append(
                        [
                            "greedy" if beam == 1 else f"beam {beam}",
                            found.ours.median,
                            found.theirs.median,
                            str(found.ratio),
                            *(answer["tokens"] / answer["sentences"] for answer in found.rounds[0]),
                            warm[0]["seconds"],
                        ]
                    )
                bench.bars["yoyodyne beam"].got = found.ratio
    bench.table(
        "yoyodyne",
        f"training; yoyodyne's model has {peer['parameters']:,} parameters; target tokens a second",
        ["s2s's model", "parameters", "s2s", "yoyodyne", "ratio", "ms, s2s", "ms, yoyodyne", "compile (s)"],
        train_rows,
    )
    bench.table(
        "yoyodyne",
        f"search with the nearest model, batches of 32 words, {effort.trained} updates after the training "
        "above; words a second",
        ["search", "s2s", "yoyodyne", "ratio", "symbols a word", "theirs", "first call (s)"],
        search_rows,
    )
    bench.note(
        "yoyodyne",
        "Both encoders read both ways with 128 units each; dropout 0.2. yoyodyne batches 32 words at "
        "random; s2s plans batches that hold 32 words on average.",
    )


def joeynmt(bench: Bench) -> None:
    """Multi30k: 2 x 512 LSTM, 64 sentences a batch, dropout 0.2; search also with 256 units."""
    effort, train_rows, decode_rows = bench.effort, [], []
    # As long as an average caption, so that untrained models do the work of trained ones.
    length = 15
    for hidden in (512, 256):
        with (
            bench.survive("joeynmt", f"{hidden} units"),
            bench.ours() as ours,
            bench.peer("joeynmt", "joeynmt_rnn.py") as theirs,
            tempfile.TemporaryDirectory(dir=bench.scratch) as scratch,
        ):
            peer = theirs.ask(
                "load",
                folder=str(bench.corpora.mt),
                scratch=scratch,
                hidden=hidden,
                layers=2,
                batch=64,
                dropout=0.2,
                sentences=effort.sentences,
            )
            loaded = ours.ask(
                "load",
                config={
                    "data.train": str(bench.corpora.mt / "train"),
                    "data.source": data.SOURCE,
                    "data.target": data.TARGET,
                    "data.vocab.kind": "symbols",
                    "data.vocab.source_separator": " ",
                    "data.vocab.target_separator": " ",
                    "data.cache": str(BENCH / "data" / "cache"),
                    "model.embedding": hidden,
                    "model.hidden": hidden,
                    "model.layers": 2,
                    "model.attention": "general",
                    "model.input_feeding": True,
                    "model.dropout": 0.2,
                },
                batch_sentences=64,
            )
            bench.keep("joeynmt", f"{hidden} units", {"ours": loaded, "theirs": peer})
            if hidden == 512:
                warm = ours.ask("warm_up")
                theirs.ask("train", steps=1)
                found = duel(
                    partial(ours.ask, "train", steps=effort.updates),
                    partial(theirs.ask, "train", steps=effort.updates),
                    effort.rounds,
                    "tokens",
                )
                tell(f"joeynmt: training: {found.ratio} times as fast")
                bench.keep("joeynmt", "training", found)
                bench.bars["joeynmt"].got = found.ratio
                train_rows.append(
                    [
                        f"2 x {hidden}",
                        found.ours.median,
                        found.theirs.median,
                        str(found.ratio),
                        loaded["parameters"],
                        peer["parameters"],
                        warm["seconds"],
                    ]
                )
            for beam in (1, 5):
                mine = partial(
                    ours.ask,
                    "decode",
                    file=str(bench.corpora.mt / "dev.src"),
                    sentences=effort.sentences,
                    beam=beam,
                    batch=64,
                    exact_length=length,
                    longest=length,
                )
                other = partial(theirs.ask, "decode", beam=beam, exact_length=length)
                warm = mine(), other()
                found = duel(mine, other, effort.search_rounds, "sentences")
                name = f"{'greedy' if beam == 1 else f'beam {beam}'}, 2 x {hidden}"
                tell(f"joeynmt: {name}: {found.ratio} times as fast")
                bench.keep("joeynmt", name, found)
                decode_rows.append(
                    [name, found.ours.median, found.theirs.median, str(found.ratio), warm[0]["seconds"]]
                )
                if beam == 5 and hidden == 512:
                    bench.bars["joeynmt beam"].got = found.ratio
    bench.table(
        "joeynmt",
        "training, general attention, input feeding, bidirectional encoder; target tokens a second",
        ["model", "s2s", "JoeyNMT", "ratio", "parameters", "theirs", "compile (s)"],
        train_rows,
    )
    bench.table(
        "joeynmt",
        f"search, batches of 64 sentences, every output {length} tokens long; sentences a second",
        ["search", "s2s", "JoeyNMT", "ratio", "compile (s)"],
        decode_rows,
    )
    bench.note(
        "joeynmt",
        "JoeyNMT batches 64 sentences at random; s2s plans batches that hold 64 sentences on average. "
        "Both read the same pieces.",
    )


def padding(bench: Bench) -> None:
    """The batch plan of experiments/multi30k_deen.py: its padding and its shapes."""
    from experiments.multi30k_deen import get_config

    config = get_config()
    if bench.corpora.raw is not None:
        config.data.train = str(bench.corpora.raw)
    else:
        config.data.update(train=str(bench.corpora.mt / "train"), source=data.SOURCE, target=data.TARGET)
        config.data.vocab.update(kind="symbols", source_separator=" ", target_separator=" ")
    config.data.max_shapes = min(8, config.data.max_shapes)
    cfg = config_lib.freeze(config)
    layout = data.padding(cfg.data, BENCH / "data" / "cache", cfg.run.seed)
    bench.keep("padding", "plan", {"padding": layout.padding, "shapes": [list(b) for b in layout.buckets]})
    bench.bars["padding"].got = layout.padding
    bench.table(
        "padding",
        "the plan of experiments/multi30k_deen.py, with 8 shapes at most",
        ["shapes", "padding (%)", "batches an epoch"],
        [[len(layout.buckets), 100 * layout.padding, layout.batches_per_epoch]],
    )


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "padding": padding,
    "pytorch": pytorch,
    "joeynmt": joeynmt,
    "yoyodyne": yoyodyne,
    "growth": growth,
}


def markdown(bench: Bench, facts: dict[str, Any], settings: str) -> str:
    """The whole report."""
    lines = ["# Side by side", "", settings, ""]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()]
    rows = [
        [
            bar.what,
            f"{'at most' if bar.at_most else 'at least'} {bar.least:.2f}",
            None if bar.got is None else str(bar.got) if isinstance(bar.got, Spread) else f"{bar.got:.3f}",
            {True: "yes", False: "no", None: "not measured"}[bar.met],
        ]
        for bar in bench.bars.values()
    ]
    lines += ["", "## Bars", "", "Medians over rounds; lowest and highest round in brackets.", ""]
    lines += [report.table(rows, ["what", "wanted", "measured", "met"], markdown=True), ""]
    for section in dict.fromkeys([*bench.tables, *bench.notes]):
        lines += [f"## {section}", ""]
        for title, headers, cells in bench.tables.get(section, []):
            if cells:
                lines += [
                    f"{title[0].upper()}{title[1:]}:",
                    "",
                    report.table(cells, headers, markdown=True),
                    "",
                ]
        for sentence in bench.notes.get(section, []):
            lines += [sentence, ""]
    if bench.failures:
        lines += ["## Failed", "", *(f"- {section}: {message}" for section, message in bench.failures), ""]
    return "\n".join(lines)


def as_json(bench: Bench, facts: dict[str, Any], settings: str) -> str:
    """Every figure, with each round's answers."""
    measured = {
        name: {
            "what": bar.what,
            "wanted": bar.least,
            "at_most": bar.at_most,
            "measured": bar.value,
            "met": bar.met,
        }
        for name, bar in bench.bars.items()
    }
    whole = {
        "settings": settings,
        "machine": facts,
        "bars": measured,
        "measurements": bench.raw,
        "failures": bench.failures,
    }
    return json.dumps(whole, indent=2, ensure_ascii=False, default=str) + "\n"


def tell(sentence: str) -> None:
    """Progress, on standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {sentence}", file=sys.stderr, flush=True)


def _times(seconds: dict[str, float | str]) -> str:
    return ", ".join(
        f"{name}: {1e3 * value:.0f} ms" if isinstance(value, float) else f"{name}: {value}"
        for name, value in seconds.items()
    )


def _named(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help. 0 if all ran, 1 if something failed, 2 if nothing could begin."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.split("\n")[0] if __doc__ else None
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="a folder with multi30k/ and sigmorphon2020_g2p/; without it, corpora are made from a seed",
    )
    parser.add_argument("--quick", action="store_true", help="minutes instead of half an hour: rough figures")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="PART")
    parser.add_argument("--cores", type=int, nargs="+", help="processor cores; all that may be used")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="a folder")
    parser.add_argument("--name", default=time.strftime("%Y-%m-%d-%H%M"), help="of the two files in it")
    args = parser.parse_args(argv)

    cores = args.cores or sorted(os.sched_getaffinity(0))
    facts, effort = machine(cores), QUICK if args.quick else FULL
    began = time.monotonic()
    BENCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="s2s-bench-") as scratch:
        try:
            bench = Bench(effort, cores, args.data, Path(scratch))
        except data.DataError as error:
            print(f"s2s: {error}", file=sys.stderr)
            return 2
        for name in args.only:
            tell(f"{name} ...")
            with bench.survive(name, "all"):
                SECTIONS[name](bench)
    minutes = (time.monotonic() - began) / 60
    settings = (
        f"`python -m benchmarks.compare{' --quick' if args.quick else ''}` on {bench.corpora.described}; "
        f"{effort.rounds} rounds, {minutes:.0f} minutes."
    )
    args.output.mkdir(parents=True, exist_ok=True)
    text = markdown(bench, facts, settings)
    (args.output / f"{args.name}.md").write_text(text, encoding="utf-8")
    (args.output / f"{args.name}.json").write_text(as_json(bench, facts, settings), encoding="utf-8")
    print(text)
    tell(f"written to {args.output / args.name}.md and .json")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
