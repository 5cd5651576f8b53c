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

from s2s import search as search_lib
from s2s.batch import EOS, PAD, Batch
from s2s.config import SearchConfig
from s2s.data.vocab import Vocabularies
from s2s.infra import sharding
from s2s.learn import step as step_lib

# Source lengths are rounded up to one of these, so that few programs are compiled.
_SHORTEST_SHAPE = 16
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
        results: list[Translation | None] = [Translation([], [], []) for _ in texts]
        wanted = [number for number, text in enumerate(texts) if text.strip()]
        # Longest first: a machine too small for the longest sentence says so at once.
        wanted.sort(key=lambda number: -len(sources[number]))
        groups = list(self._groups(wanted, sources))
        bar = sharding.is_main_process() and progress is not None and sys.stderr.isatty()
        from tqdm import tqdm

        with tqdm(total=len(wanted), desc=progress, unit="line", disable=not bar, leave=False) as shown:
            for numbers, shape in groups:
                for number, translation in zip(
                    numbers, self._batch(params, sources, numbers, shape), strict=True
                ):
                    results[number] = translation
                shown.update(len(numbers))
        return results  # type: ignore[return-value]

    def _groups(
        self, numbers: Sequence[int], sources: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], int]]:
        """Cuts lines, already in order of length, into batches of one source shape."""
        group: list[int] = []
        shape = 0
        for number in numbers:
            its_shape = _round_up(len(sources[number]) + 1)
            if group and (its_shape != shape or len(group) == self.cfg.batch_sentences):
                yield group, shape
                group = []
            shape = its_shape
            group.append(number)
        if group:
            yield group, shape

    def _batch(
        self, params: Any, sources: Sequence[list[int]], numbers: list[int], shape: int
    ) -> Iterator[Translation]:
        devices = sharding.rows_multiple(self.mesh)
        rows = self.cfg.batch_sentences
        if len(numbers) < rows // 4:
            rows = 1 << (len(numbers) - 1).bit_length()
        rows = -(-rows // devices) * devices
        source_BS = np.full((rows, shape), PAD, np.int32)
        length_B = np.zeros(rows, np.int32)
        for row, number in enumerate(numbers):
            length_B[row] = len(sources[number]) + 1
            source_BS[row, : length_B[row]] = [*sources[number], EOS]
        limit_B = np.where(
            length_B > 0,
            np.ceil(self.cfg.max_length_factor * length_B).astype(np.int32) + self.cfg.max_length_extra,
            0,
        ).astype(np.int32)
        index_B = np.full(rows, -1, np.int32)
        index_B[: len(numbers)] = numbers
        batch = Batch(source_BS, length_B, np.zeros((rows, 1), np.int32), np.zeros(rows, np.int32), index_B)
        max_length = math.ceil(self.cfg.max_length_factor * shape) + self.cfg.max_length_extra
        batch, limit_B = sharding.to_global((batch, limit_B), self.mesh)
        if max_length not in self._programs:
            self._programs[max_length] = sharding.jit_rows_step(
                functools.partial(_decode, self._graphdef, self.cfg, self._n_best, max_length), self.mesh
            )
        found = sharding.to_host(self._programs[max_length](params, batch, limit_B, self.key))
        for row, number in enumerate(numbers):
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
                        token_log_probs=found.token_log_prob_BKT[row, k, :length],
                        align_TS=found.align_BKTS[row, k, :length, : len(source_ids)],
                    )
                )
            yield Translation(self.vocabs.source.tokens(source_ids), source_ids, hypotheses)


def _decode(
    graphdef: Any,
    cfg: SearchConfig,
    n_best: int,
    max_length: int,
    params: Any,
    batch: Batch,
    limit_B: jax.Array,
    key: jax.Array,
) -> search_lib.Hypotheses:
    """One compiled search: encoder, loop over target positions, backtrace."""
    model = step_lib.merge(graphdef, params)
    memory = model.encode(batch)
    advance = functools.partial(model.advance, memory)
    common: dict[str, Any] = dict(
        max_length=max_length, limit_B=limit_B, min_length=cfg.min_length, source_mask_BS=batch.source_mask_BS
    )
    if cfg.name == "greedy":
        return search_lib.greedy(advance, model.start(memory, 1), **common)
    if cfg.name == "beam":
        return search_lib.beam(
            advance,
            model.start(memory, cfg.beam),
            beam=cfg.beam,
            n_best=min(n_best, cfg.beam),
            length_penalty=jnp.float32(cfg.length_penalty),
            coverage_penalty=jnp.float32(cfg.coverage_penalty),
            **common,
        )
    return search_lib.sample(
        advance,
        model.start(memory, cfg.beam),
        samples=cfg.beam,
        key=key,
        index_B=batch.index_B,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        **common,
    )


def _round_up(length: int) -> int:
    return max(_SHORTEST_SHAPE, 1 << (length - 1).bit_length())


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
    group.add_argument("--batch-sentences", type=int, metavar="N", help="sentences decoded together")


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
