"""Translation: text in, text out, with scores and alignments.

    python -m s2s.translate --workdir runs/mine < source.txt > output.txt

Decides how lines become batches of few shapes and hypotheses become lines again, in
order, one for one, whatever the input. Must not know how a hypothesis is found
(search) nor what its quality is (evaluate).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gzip
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from s2s import search as search_lib
from s2s.batch import EOS, PAD, Batch
from s2s.config import SearchConfig
from s2s.data.corpora import cache_folder
from s2s.data.vocab import Vocabularies
from s2s.infra import compilation, sharding
from s2s.learn import step as step_lib
from s2s.pick import log_total

# Source lengths are rounded up to one of these, so that few programs are compiled.
_SHORTEST_SHAPE = 16
# A batch holds the sentences searched at a time and those that wait for their places: for every place
# so many source positions, as their memories take most of the space.
_WAITING_POSITIONS = 512
_CHUNK_LINES = 4096


class Hypothesis(NamedTuple):
    """One output.

    Attributes:
      text: the output text.
      tokens: target pieces, EOS shown last.
      score: the penalised log-probability that ranked it.
      log_prob: its log-probability in nats.
      token_log_probs: nats, one a token.
      align_TS: attention from each token to each source piece (EOS last on both sides).
    """

    text: str
    tokens: list[str]
    ids: list[int]
    score: float
    log_prob: float
    token_log_probs: np.ndarray
    align_TS: np.ndarray


class Translation(NamedTuple):
    """The best hypotheses of one source line, best first; none for a blank line."""

    source_tokens: list[str]
    source_ids: list[int]
    hypotheses: list[Hypothesis]

    @property
    def text(self) -> str:
        """The best output, "" for a blank line."""
        return self.hypotheses[0].text if self.hypotheses else ""


class Translator:
    """A model ready to translate; compiled once a (source length class, rows) shape.

    Args:
      graphdef: the model's structure (`s2s.learn.step`).
      vocabs: its vocabularies.
      cfg: how to search.
      n_best: hypotheses wanted a sentence; fewer let beam search stop earlier.
      seed: of sampling.
    """

    def __init__(
        self, graphdef: Any, vocabs: Vocabularies, cfg: SearchConfig, *, n_best: int = 1, seed: int = 0
    ):
        self.vocabs = vocabs
        self.cfg = cfg
        self._n_best = n_best
        self.mesh = sharding.local_mesh()
        self.key = jax.random.key(seed)
        self._programs: dict[int, Any] = {}
        self._graphdef = graphdef

    def __call__(
        self, params: Any, texts: Sequence[str], *, progress: str | None = None
    ) -> list[Translation]:
        """Translates lines.

        Args:
          params: the model's parameters.
          texts: source lines.
          progress: a label to show progress under; None shows none.

        Returns:
          One translation a line, in order.
        """
        sources = self.vocabs.source.encode_all(texts)
        results = [Translation([], [], []) for _ in texts]
        wanted = [number for number, text in enumerate(texts) if text.strip()]
        # Longest first: a machine too small for the longest sentence says so at once.
        wanted.sort(key=lambda number: -len(sources[number]))
        bar = sharding.is_main_process() and progress is not None and sys.stderr.isatty()
        from tqdm import tqdm

        with tqdm(total=len(wanted), desc=progress, unit="line", disable=not bar, leave=False) as shown:
            searched: list[tuple[list[int], search_lib.Hypotheses]] = []
            for numbers, rows, shape in self._batches(wanted, sources):
                searched.append((numbers, self._search(params, sources, numbers, rows, shape)))
                # While the device is at this batch, the one before it becomes text.
                if len(searched) == 2:
                    self._read(*searched.pop(0), sources, results)
                    shown.update(len(numbers))
            for one in searched:
                self._read(*one, sources, results)
        return results

    def _batches(
        self, numbers: Sequence[int], sources: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], int, int]]:
        """Cuts lines, the longest first, into batches: lines, rows and source positions of each."""
        begin = 0
        while begin < len(numbers):
            shape = _round_up(len(sources[numbers[begin]]) + 1)
            places = self.cfg.batch_sentences
            most = places * max(1, _WAITING_POSITIONS // shape)
            batch = list(numbers[begin : begin + most])
            # A power of two of rows, or of places: few programs, and none for many more than there are.
            unit = places if len(batch) > places // 4 else 1
            rows = min(unit << (-(-len(batch) // unit) - 1).bit_length(), most)
            devices = sharding.rows_multiple(self.mesh)
            yield batch, -(-rows // devices) * devices, shape
            begin += len(batch)

    def _rows(self, rows: int) -> np.ndarray:
        """Where a batch's sentences go, in order: to each device in turn, or the first had all long ones."""
        return np.arange(rows).reshape(sharding.rows_multiple(self.mesh), -1).T.ravel()

    def _search(
        self, params: Any, sources: Sequence[list[int]], numbers: list[int], rows: int, shape: int
    ) -> search_lib.Hypotheses:
        """Begins the search of one batch: arrays that are being computed."""
        source_BS = np.full((rows, shape), PAD, np.int32)
        length_B = np.zeros(rows, np.int32)
        for row, number in zip(self._rows(rows), numbers, strict=False):
            length_B[row] = len(sources[number]) + 1
            source_BS[row, : length_B[row]] = [*sources[number], EOS]
        limit_B = np.where(
            length_B > 0,
            np.ceil(self.cfg.max_length_factor * length_B).astype(np.int32) + self.cfg.max_length_extra,
            0,
        ).astype(np.int32)
        index_B = np.full(rows, -1, np.int32)
        index_B[self._rows(rows)[: len(numbers)]] = numbers
        batch = Batch(source_BS, length_B, np.zeros((rows, 1), np.int32), np.zeros(rows, np.int32), index_B)
        max_length = math.ceil(self.cfg.max_length_factor * shape) + self.cfg.max_length_extra
        if max_length not in self._programs:
            places = -(-self.cfg.batch_sentences // sharding.rows_multiple(self.mesh))
            self._programs[max_length] = sharding.jit_rows_step(
                functools.partial(_decode, self._graphdef, self.cfg, self._n_best, max_length, places),
                self.mesh,
            )
        asked = sharding.to_global((batch, limit_B), self.mesh)
        found: search_lib.Hypotheses = self._programs[max_length](params, asked, self.key)
        return found

    def _read(
        self,
        numbers: list[int],
        found: search_lib.Hypotheses,
        sources: Sequence[list[int]],
        results: list[Translation],
    ) -> None:
        """Waits for a search and turns what it found into text."""
        found = sharding.to_host(found)
        for row, number in zip(self._rows(len(found.length_BK)), numbers, strict=False):
            source_ids = [*sources[number], EOS]
            hypotheses = []
            for k in range(found.tokens_BKT.shape[1]):
                length = int(found.length_BK[row, k])
                if length == 0:
                    continue
                ids = found.tokens_BKT[row, k, :length].tolist()
                hypotheses.append(
                    Hypothesis(
                        text=self.vocabs.target.decode(ids),
                        tokens=self.vocabs.target.tokens(ids),
                        ids=ids,
                        score=float(found.score_BK[row, k]),
                        log_prob=float(found.log_prob_BK[row, k]),
                        # Copies: a view would keep the whole batch.
                        token_log_probs=np.array(found.token_log_prob_BKT[row, k, :length]),
                        align_TS=np.array(found.align_BKTS[row, k, :length, : len(source_ids)]),
                    )
                )
            results[number] = Translation(self.vocabs.source.tokens(source_ids), source_ids, hypotheses)


def _decode(
    graphdef: Any,
    cfg: SearchConfig,
    n_best: int,
    max_length: int,
    places: int,
    params: Any,
    asked: tuple[Batch, jax.Array],
    key: jax.Array,
) -> search_lib.Hypotheses:
    """One compiled search: encoder, loop over target positions, backtrace."""
    batch, limit_B = asked
    model = step_lib.merge(graphdef, params)
    memory = _encode(model, batch, places)
    # Eight tokens are few for an output, and all of a beam's hypotheses read one at every step.
    reads = 8 * batch.source_BS.shape[0] * (1 if cfg.name == "greedy" else cfg.beam)
    gates_VG = model.read_all() if reads > model.target_embedding.shape[0] else None

    def advance(memory: Any, state: Any, token_NK: jax.Array) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        state, logits_NKV, align_NKS = model.advance(memory, state, token_NK, gates_VG)
        return state, logits_NKV, log_total(logits_NKV), align_NKS

    common: dict[str, Any] = dict(
        max_length=max_length,
        limit_B=limit_B,
        min_length=cfg.min_length,
        source_mask_BS=batch.source_mask_BS,
        places=places,
    )
    first = model.start(memory, 1)
    if cfg.name == "greedy":
        return search_lib.greedy(advance, memory, first, **common)
    if cfg.name == "beam":
        return search_lib.beam(
            advance,
            memory,
            first,
            beam=cfg.beam,
            n_best=min(n_best, cfg.beam),
            length_penalty=jnp.float32(cfg.length_penalty),
            coverage_penalty=jnp.float32(cfg.coverage_penalty),
            **common,
        )
    return search_lib.sample(
        advance,
        memory,
        first,
        samples=cfg.beam,
        key=key,
        index_B=batch.index_B,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        **common,
    )


def _encode(model: Any, batch: Batch, rows: int) -> Any:
    """The memory of a batch, made of ``rows`` sentences at a time; that of fillers at the end is zeros."""
    B = batch.source_BS.shape[0]
    if B <= rows:
        return model.encode(batch)

    def part(number: jax.Array) -> Any:
        # The last part overlaps the one before it where rows do not divide B.
        first = jnp.minimum(number * rows, B - rows)
        return first, model.encode(
            jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, rows), batch)
        )

    def add(number: jax.Array, memory: Any) -> Any:
        first, own = part(number)
        return jax.tree.map(
            lambda all_, new: lax.dynamic_update_slice_in_dim(all_, new, first, 0), memory, own
        )

    shapes = jax.eval_shape(part, jnp.int32(0))[1]
    nothing = jax.tree.map(lambda leaf: jnp.zeros((B, *leaf.shape[1:]), leaf.dtype), shapes)
    real = jnp.max(jnp.where(batch.source_length_B > 0, jnp.arange(1, B + 1), 0))
    return lax.fori_loop(0, (real + rows - 1) // rows, add, nothing)


def _round_up(length: int) -> int:
    power = 1 << (max(length, _SHORTEST_SHAPE) - 1).bit_length()
    return 3 * power // 4 if length <= 3 * power // 4 else power


def links(
    translation_source: list[int], target: list[int], align_TS: np.ndarray, vocabs: Vocabularies
) -> str:
    """Hard alignment in Pharaoh format: "source-target" word numbers from 0.

    Each target piece links to the source piece it attends to most; pieces count as the
    word they belong to, EOS does not count. Empty where there is no attention.

    Args:
      translation_source: source ids, EOS last.
      target: target ids, EOS last.
      align_TS: attention, [target ids, source ids].
      vocabs: to tell words by.
    """
    if not align_TS.any():
        return ""
    source_words = vocabs.source.word_numbers(translation_source)
    target_words = vocabs.target.word_numbers(target)
    pairs = {
        (source_words[int(np.argmax(align_S[: len(source_words)]))], target_words[t])
        for t, align_S in enumerate(align_TS[: len(target_words)])
        if source_words
    }
    return " ".join(f"{s}-{t}" for s, t in sorted(pairs))


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `search_config` reads."""
    group = parser.add_argument_group("search (the run's own configuration where not given)")
    group.add_argument("--beam", type=int, metavar="K", help="hypotheses kept; 1 is greedy")
    group.add_argument("--sample", action="store_true", help="draw instead of searching; --beam draws a line")
    group.add_argument("--length-penalty", type=float, metavar="A", help="GNMT's alpha")
    group.add_argument("--coverage-penalty", type=float, metavar="B", help="GNMT's beta")
    group.add_argument("--min-length", type=int, metavar="N", help="fewest target tokens")
    group.add_argument(
        "--max-length-factor", type=float, metavar="F", help="longest output: F * source ids + extra"
    )
    group.add_argument("--max-length-extra", type=int, metavar="N", help="tokens")
    group.add_argument("--temperature", type=float, metavar="T", help="sampling temperature")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest P of probability")
    group.add_argument("--batch-sentences", type=int, metavar="N", help="sentences searched at a time")


def search_config(args: argparse.Namespace, cfg: SearchConfig, *, nbest: int = 1) -> SearchConfig:
    """The run's search settings with the command line's changes.

    Raises:
      ValueError: a value cannot work.
    """
    names = [item.name for item in dataclasses.fields(SearchConfig) if item.name != "name"]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if args.sample:
        given["name"] = "sample"
        given.setdefault("beam", 1)
    elif "beam" in given or nbest > 1:
        given.setdefault("beam", max(nbest, cfg.beam))
        given["name"] = "greedy" if given["beam"] == 1 else "beam"
    chosen = dataclasses.replace(cfg, **given)
    if chosen.name == "greedy":
        chosen = dataclasses.replace(chosen, beam=1)
    for name in ("beam", "batch_sentences", "max_length_extra"):
        if getattr(chosen, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(chosen, name)} must be at least 1")
    for name in ("length_penalty", "coverage_penalty", "min_length", "max_length_factor", "top_k"):
        if getattr(chosen, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(chosen, name)} must not be negative")
    if chosen.temperature <= 0 or not 0 < chosen.top_p <= 1:
        raise ValueError("--temperature must be above 0, and --top-p in (0, 1]")
    if nbest > chosen.beam:
        raise ValueError(f"--nbest {nbest} needs --beam {nbest} or more, not {chosen.beam}")
    return chosen


def describe(cfg: SearchConfig) -> str:
    """A short name for tables: "greedy", "beam 5", "sample"."""
    return f"beam {cfg.beam}" if cfg.name == "beam" else cfg.name


def open_text(path: str, mode: str) -> IO[bytes]:
    """Opens a file as bytes, through gzip where its name ends in .gz."""
    return gzip.open(path, mode) if path.endswith(".gz") else open(path, mode)  # type: ignore[return-value]


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines as text: only newlines end one, and what is not UTF-8 is replaced, not dropped."""
    for line in stream:
        yield line.rstrip(b"\n").removesuffix(b"\r").decode("utf-8", errors="replace").replace("\0", " ")


def _chunks(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for line in lines:
        chunk.append(line)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m s2s.translate", description="Translates lines of text with a trained model."
    )
    parser.add_argument("--workdir", required=True, help="the model's work directory")
    parser.add_argument("--input", default="-", help="source lines (.gz too); - is standard input")
    parser.add_argument("--output", default="-", help="where outputs go; - is standard output")
    parser.add_argument(
        "--nbest",
        type=int,
        default=1,
        metavar="N",
        help="N lines a source line: number, rank, text, tab-separated",
    )
    parser.add_argument(
        "--scores",
        action="store_true",
        help="score and log-probability (nats) before each text, tab-separated",
    )
    parser.add_argument(
        "--alignments", metavar="F", help="write alignments: soft ones to F.jsonl, else Pharaoh format"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    add_search_flags(parser)
    args = parser.parse_args(argv)

    from s2s.workdir import Workdir

    try:
        cfg, vocabs, graphdef, params = Workdir(args.workdir).load()
        search = search_config(args, cfg.search, nbest=args.nbest)
        translator = Translator(graphdef, vocabs, search, n_best=args.nbest, seed=args.seed)
        source = sys.stdin.buffer if args.input == "-" else open_text(args.input, "rb")
    except (ValueError, OSError) as error:
        print(f"s2s: {error}", file=sys.stderr)
        return 2
    compilation.keep_programs(cache_folder(cfg.data.cache))
    params = sharding.replicate(params, translator.mesh)
    interactive = args.input == "-" and sys.stdin.isatty()
    soft = bool(args.alignments) and Path(args.alignments).suffix == ".jsonl"
    number = 0
    with contextlib.ExitStack() as files:
        if args.input != "-":
            files.enter_context(source)
        output, alignments = sys.stdout.buffer, None
        if args.output != "-":
            output = files.enter_context(open_text(args.output, "wb"))
        if args.alignments:
            alignments = files.enter_context(open(args.alignments, "w", encoding="utf-8"))
        try:
            for chunk in _chunks(_lines(source), 1 if interactive else _CHUNK_LINES):
                for translation in translator(params, chunk, progress="translating"):
                    for line in _output_lines(translation, number, args.nbest, args.scores):
                        output.write(line.encode("utf-8") + b"\n")
                    if alignments is not None:
                        alignments.write(_alignment_line(translation, vocabs, soft) + "\n")
                    number += 1
                output.flush()
        except BrokenPipeError:
            # The reader (head, say) has seen enough; Python must not complain at exit either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _output_lines(translation: Translation, number: int, nbest: int, scores: bool) -> list[str]:
    hypotheses = translation.hypotheses[:nbest]
    if not hypotheses:
        hypotheses = [Hypothesis("", [], [], 0.0, 0.0, np.zeros(0), np.zeros((0, 0)))]
    lines = []
    for rank, hypothesis in enumerate(hypotheses, start=1):
        columns = [str(number + 1), str(rank)] if nbest > 1 else []
        if scores:
            columns += [f"{hypothesis.score:.4f}", f"{hypothesis.log_prob:.4f}"]
        # A generated newline would shift every line after it.
        text = hypothesis.text.replace("\n", " ").replace("\r", " ")
        lines.append("\t".join([*columns, text]))
    return lines


def _alignment_line(translation: Translation, vocabs: Vocabularies, soft: bool) -> str:
    if not translation.hypotheses:
        return json.dumps({"source": [], "target": [], "alignment": []}) if soft else ""
    best = translation.hypotheses[0]
    if not soft:
        return links(translation.source_ids, best.ids, best.align_TS, vocabs)
    rounded = [[round(float(weight), 4) for weight in row] for row in best.align_TS]
    return json.dumps(
        {"source": translation.source_tokens, "target": best.tokens, "alignment": rounded}, ensure_ascii=False
    )


if __name__ == "__main__":
    sys.exit(main())
