"""What a model thinks of given pairs (forced decoding): of a corpus in sums, or of every token.

Decides in which batches pairs are read. Must not search, nor know what a figure is reported for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from s2s.batch import Batch
from s2s.config import Config
from s2s.data import encode, pipeline, plan
from s2s.ensemble import assemble, each_replica
from s2s.infra import distributed, sharding
from s2s.learn.loss import Sums

# Each shape is a compilation, and a development part is seen too seldom to earn many.
_MAX_SHAPES = 3


class Likelihood:
    """Teacher-forced loss on one corpus, ready to be measured again and again.

    Args:
      structure: a model's graph definition, or an `s2s.ensemble.Ensemble`.
      encoded: the corpus as ids; empty ones are not allowed.
      cfg: the run's configuration, for batch sizes.
      mesh: devices to spread rows over.
    """

    def __init__(self, structure: Any, encoded: encode.Encoded, cfg: Config, mesh: jax.sharding.Mesh):
        self.encoded, self.mesh = encoded, mesh
        self.plan = plan.make_plan(
            encoded.source_lengths,
            encoded.target_lengths,
            batch_tokens=cfg.data.batch_tokens,
            max_shapes=min(_MAX_SHAPES, cfg.data.max_shapes),
            rows_multiple=sharding.rows_multiple(mesh),
            seed=0,
            shuffle=False,
        )
        self._step = _sums_program(structure, mesh)

    def __call__(self, params: Any) -> dict[str, float]:
        """Measures ``loss`` (nats a target token), ``perplexity`` and ``token_accuracy`` (%)."""
        shared = sharding.spans_processes(self.mesh)
        sums = [
            self._step(params, sharding.to_global(batch, self.mesh))
            for batch in pipeline.batches(
                self.encoded,
                self.plan,
                epoch=0,
                process_index=distributed.process_index() if shared else 0,
                process_count=distributed.process_count() if shared else 1,
            )
        ]
        host = sharding.to_host(sums)
        tokens = max(1.0, float(sum(part.tokens for part in host)))
        nats = float(sum(np.float64(part.nll) for part in host)) / tokens
        correct = float(sum(part.correct for part in host)) / tokens
        # Beyond this a double overflows; an untrained or broken model gets there.
        perplexity = math.exp(nats) if nats < 700 else math.inf
        return {"loss": nats, "perplexity": perplexity, "token_accuracy": 100 * correct}

    def many(self, params_R: Any) -> list[dict[str, float]]:
        """Measures each of R models of one structure, by one program.

        They are measured one after another: all at once by ``jax.vmap`` takes 1.1 to 1.8 times as long
        on a CPU core (8 models of 128 units; batches of 32 to 256 pairs of 9 tokens).

        Args:
          params_R: their parameters, leaves [R, ...].
        """
        return [self(sharding.replicate(params, self.mesh)) for params in each_replica(params_R)]


@functools.lru_cache
def _sums_program(structure: Any, mesh: jax.sharding.Mesh) -> Any:
    """One for all models of one structure: what is compiled for one serves the others."""
    return sharding.jit_eval_step(functools.partial(_sums, structure), mesh)


class Score(NamedTuple):
    """One pair under the model.

    Attributes:
      record: the pair's number in its corpus.
      source_ids, target_ids: EOS last.
      token_log_probs: nats, one a target token.
      align_TS: attention from each target token to each source piece.
    """

    record: int
    source_ids: list[int]
    target_ids: list[int]
    token_log_probs: np.ndarray
    align_TS: np.ndarray


def forced(structure: Any, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every target token and the attention behind it.

    Returns:
      token_log_prob_BT in nats, 0 on pads; align_BTS.
    """
    return assemble(structure, params).forced(batch)


def _sums(structure: Any, params: Any, batch: Batch) -> Sums:
    return assemble(structure, params).sums(batch)


def score_corpus(
    structure: Any, params: Any, encoded: encode.Encoded, cfg: Config, mesh: jax.sharding.Mesh
) -> Iterator[Score]:
    """Scores every pair, batch by batch of similar lengths: not in corpus order."""
    layout = plan.make_plan(
        encoded.source_lengths,
        encoded.target_lengths,
        batch_tokens=cfg.data.batch_tokens,
        max_shapes=cfg.data.max_shapes,
        rows_multiple=sharding.rows_multiple(mesh),
        seed=0,
        shuffle=False,
    )
    compiled = sharding.jit_rows_step(functools.partial(forced, structure), mesh)
    for batch in pipeline.batches(encoded, layout, epoch=0):
        token_BT, align_BTS = sharding.to_host(compiled(params, sharding.to_global(batch, mesh)))
        for row, index in enumerate(batch.index_B.tolist()):
            if index < 0:
                continue
            source, target = int(batch.source_length_B[row]), int(batch.target_length_B[row])
            yield Score(
                index,
                batch.source_BS[row, :source].tolist(),
                batch.target_BT[row, :target].tolist(),
                token_BT[row, :target],
                align_BTS[row, :target, :source],
            )
