"""A model that translates: lines become batches of few shapes, and hypotheses become lines again.

Decides which sentences are searched together and in which shapes; outputs come in order, one
for one, whatever the input. Must not know how a hypothesis is found (search), what its quality
is (judge), nor where lines come from.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from s2s import search as search_lib
from s2s.batch import EOS, PAD, Batch
from s2s.config import SearchConfig
from s2s.data.vocab import Vocabularies
from s2s.ensemble import Speaker, assemble, each_replica
from s2s.infra import distributed, sharding
from s2s.nn.bound import common_max

# Source lengths are rounded up to one of these, so that few programs are compiled.
_SHORTEST_SHAPE = 16
# A batch holds the sentences searched at a time and those that wait for their places: for every place
# so many source positions, as their memories take most of the space.
_WAITING_POSITIONS = 512


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
      structure: a model's graph definition (`s2s.learn.step`), or an `s2s.ensemble.Ensemble`.
      vocabs: its vocabularies.
      cfg: how to search.
      n_best: hypotheses wanted a sentence; fewer let beam search stop earlier.
      seed: of sampling.
      few_programs: a batch takes one place, a quarter of them or all, for whoever cannot wait for a
        compilation; else as many as its sentences, to a power of two.
    """

    def __init__(
        self,
        structure: Any,
        vocabs: Vocabularies,
        cfg: SearchConfig,
        *,
        n_best: int = 1,
        seed: int = 0,
        few_programs: bool = False,
    ):
        self.vocabs = vocabs
        self.cfg = cfg
        self._n_best = n_best
        self._few_programs = few_programs
        self.mesh = sharding.local_mesh()
        self.key = jax.random.key(seed)
        self._programs: dict[int, Any] = {}
        self._structure = structure

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
        bar = distributed.is_main_process() and progress is not None and sys.stderr.isatty()
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

    def many(
        self, params_R: Any, texts_R: Sequence[Sequence[str]], *, progress: str | None = None
    ) -> list[list[Translation]]:
        """Translates the lines of each of R models of one structure: what R calls give, by one program.

        The models are searched one after another. One search over all of them by ``jax.vmap`` gives the
        same outputs, and takes 1.36 times as long on a CPU core: 8 models (embedding and 128 units, 60
        entries) and 450 sentences of 8 symbols in 0.41 s instead of 0.30 s by greedy search, in 1.10 s
        instead of 0.81 s with beam 5. The 64 sentences of one model keep a core busy already.

        Args:
          params_R: their parameters, leaves [R, ...].
          texts_R: source lines of each.
          progress: as for a call.
        """
        found = []
        for params, texts in zip(each_replica(params_R), texts_R, strict=True):
            found.append(self(sharding.replicate(params, self.mesh), texts, progress=progress))
        return found

    def _batches(
        self, numbers: Sequence[int], sources: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], int, int]]:
        """Cuts lines, the longest first, into batches: lines, rows and source positions of each."""
        begin = 0
        while begin < len(numbers):
            shape = padded_length(len(sources[numbers[begin]]) + 1)
            places = self.cfg.batch_sentences
            most = places * max(1, _WAITING_POSITIONS // shape)
            batch = list(numbers[begin : begin + most])
            # A power of two of rows, or of places: few programs, and none for many more than there are.
            few = max(1, places // 4)
            unit = places if len(batch) > few else few if self._few_programs and len(batch) > 1 else 1
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
            self._programs[max_length] = _program(
                self._structure, self.cfg, self._n_best, max_length, places, self.mesh
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


@functools.lru_cache
def _program(
    structure: Any, cfg: SearchConfig, n_best: int, max_length: int, places: int, mesh: jax.sharding.Mesh
) -> Any:
    """One for all models of one structure: what is compiled for one serves the others."""
    return sharding.jit_rows_step(
        functools.partial(_decode, structure, cfg, n_best, max_length, places), mesh
    )


def _decode(
    structure: Any,
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
    model = assemble(structure, params)
    memory = _encode(model, batch, places)
    # Eight tokens are few for an output, and all of a beam's hypotheses read one at every step.
    reads = 8 * batch.source_BS.shape[0] * (1 if cfg.name == "greedy" else cfg.beam)
    advance = functools.partial(model.advance, gates=model.read_all() if reads > model.entries else None)
    common: dict[str, Any] = dict(
        max_length=max_length,
        limit_B=limit_B,
        min_length=cfg.min_length,
        source_mask_BS=batch.source_mask_BS,
        places=places,
    )
    first = model.start(memory)
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


def _encode(model: Speaker, batch: Batch, rows: int) -> Any:
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
    return lax.fori_loop(0, common_max((real + rows - 1) // rows), add, nothing)


def padded_length(length: int) -> int:
    """Source positions of the batch that a sentence of so many pieces, EOS included, is searched in."""
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


def describe(cfg: SearchConfig) -> str:
    """A short name for tables: "greedy", "beam 5", "sample"."""
    return f"beam {cfg.beam}" if cfg.name == "beam" else cfg.name
