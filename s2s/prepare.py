"""Preparation: all that a run needs before its first update, quickest where most is kept.

Decides the order of things until then, what is refused, and what happens side by side. Must not
know how the run goes on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from s2s.config import Config
from s2s.data import corpora, encode, pipeline, plan, vocab
from s2s.infra import checkpoint, compilation, sharding
from s2s.judge import Judge
from s2s.learn import optim
from s2s.learn import step as step_lib
from s2s.workdir import Workdir, WorkdirError


@dataclass
class Progress:
    """Where a run stands, beside its arrays: everything a resumed run must know.

    Attributes:
      epoch, index: the next batch's place in the data.
      best: the best dev metric so far; None before the first evaluation.
      stale: evaluations since then.
      tokens: target tokens learned from.
      seconds: spent in the training loop, evaluations included.
      waited: those of them that the loop waited for its next batch.
      history: the dev measurements, in order.
      stopped_early: no more updates are wanted.
      data: fingerprint of the training corpus; another's epochs are others.
    """

    epoch: int = 0
    index: int = 0
    best: float | None = None
    stale: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    stopped_early: bool = False
    data: str = ""


@dataclass(frozen=True)
class Prepared:
    """What a run goes on with.

    Attributes:
      encoded: the training pairs as ids.
      layout: their batches.
      total_steps: updates in the whole run.
      parameters: numbers in the model.
      state: of training, on the devices; given away to the first update.
      abstract: its shapes and shardings.
      step: updates made.
      progress: where the run stands.
      checkpoints: its own.
      train_step: (state, batch) -> (state, metrics).
      judge: of its models.
      summary: a sentence for people.
    """

    encoded: encode.Encoded
    layout: plan.Plan
    total_steps: int
    parameters: int
    state: step_lib.TrainState
    abstract: step_lib.TrainState
    step: int
    progress: Progress
    checkpoints: checkpoint.Checkpoints
    train_step: compilation.ByShape
    judge: Judge
    summary: str


def prepare(cfg: Config, work: Workdir, mesh: jax.sharding.Mesh, tell: Callable[[str], None]) -> Prepared:
    """Prepares data, model and programs, or takes up the last checkpoint in the work directory.

    Args:
      cfg: the experiment, which `Workdir.check` has let pass.
      work: its work directory; gets the configuration and the vocabularies.
      mesh: devices to train on.
      tell: takes remarks for people.

    Raises:
      CorpusError, VocabularyError, CheckpointError: as their names say.
      WorkdirError: the training data is not what the checkpoints were trained on.
    """
    chief = sharding.is_main_process()
    compilation.keep_programs(corpora.cache_folder(cfg.data.cache))

    # Data.
    corpus = corpora.open_corpus(cfg.data, "train", seed=cfg.run.seed, progress=chief)
    parts = {
        part: corpora.open_corpus(cfg.data, part, seed=cfg.run.seed, progress=chief)
        for part in ("dev", "test")
        if corpora.has_part(cfg.data, part)
    }
    for sentence in itertools.chain.from_iterable(map(corpora.left_out, [corpus, *parts.values()])):
        tell(sentence)
    if chief:
        work.write_config(cfg)
    vocabs = _vocabularies(cfg, work, corpus, chief)

    # The first state does not depend on the schedule: its program is compiled beside what is to come.
    sizes = vocabs.source.size, vocabs.target.size
    unscheduled = optim.make_optimizer(
        cfg.optim, optim.make_schedule(cfg.optim, steps_per_epoch=1, total_steps=1)
    )

    def first_state() -> step_lib.TrainState:
        return step_lib.init_state(cfg, *sizes, unscheduled, cfg.run.seed)[1]

    initialize = sharding.jit_init(first_state, mesh)
    checkpoints = work.open_checkpoints(cfg)
    initialization = None if checkpoints.all_steps() else compilation.begin(initialize)

    # Batches.
    encoded = encode.encode_corpus(
        corpus,
        vocabs,
        max_source=cfg.data.max_source_length,
        max_target=cfg.data.max_target_length,
        cache=cfg.data.cache,
        progress=chief,
    )
    if encoded.too_long:
        tell(f"{corpus.name}: left out, too long: {corpora.listed(encoded.too_long)}")
    layout = plan.make_plan(
        encoded.source_lengths,
        encoded.target_lengths,
        batch_tokens=cfg.data.batch_tokens,
        max_shapes=cfg.data.max_shapes,
        rows_multiple=math.lcm(cfg.data.rows_multiple, sharding.rows_multiple(mesh) * cfg.optim.accumulate),
        seed=cfg.run.seed,
    )
    total_steps = cfg.run.steps or max(1, math.ceil(cfg.run.epochs * layout.batches_per_epoch))

    # Model.
    schedule = optim.make_schedule(
        cfg.optim, steps_per_epoch=layout.batches_per_epoch, total_steps=total_steps
    )
    optimizer = optim.make_optimizer(cfg.optim, schedule)
    graphdef, abstract_params = step_lib.abstract_params(cfg.model, *sizes)
    abstract = sharding.abstract_replicated(jax.eval_shape(initialize), mesh)
    parameters = step_lib.parameter_count(abstract_params)
    judge = Judge(cfg, graphdef, vocabs, parts, mesh)

    # State.
    restored = checkpoints.restore_latest(abstract)
    progress, step = Progress(data=corpus.fingerprint), 0
    if restored is not None:
        state, saved, step = restored
        if saved["data"] != progress.data:
            raise WorkdirError(
                f"the training data is not what the checkpoints in {work.checkpoints} were trained on: "
                "give another --workdir, or bring the old files back"
            )
        progress = Progress(**saved)
        tell(f"going on from step {step} ({work.checkpoints})")

    # Programs.
    train_step = compilation.ByShape(
        sharding.jit_train_step(step_lib.make_train_step(graphdef, cfg, optimizer), mesh),
        [
            (abstract, sharding.abstract_by_rows(batch, mesh))
            for batch in _shapes_to_come(encoded, layout, progress)
        ],
    )
    if initialization is not None:
        state = initialization.result()()
    summary = (
        f"{corpus.name}: {len(encoded)} pairs; vocabularies {sizes[0]} and {sizes[1]}; {parameters:,} "
        f"parameters; {layout.batches_per_epoch} batches an epoch in {len(layout.buckets)} shapes, "
        f"padding {layout.padding:.1%} walked, {layout.array_padding:.1%} of arrays; {total_steps} updates "
        f"on {sharding.device_kind(mesh)}"
    )
    return Prepared(
        encoded, layout, total_steps, parameters, state, abstract, step, progress, checkpoints, train_step,
        judge, summary,
    )  # fmt: skip


def _vocabularies(cfg: Config, work: Workdir, corpus: corpora.Corpus, chief: bool) -> vocab.Vocabularies:
    """Makes the vocabularies once; a resumed run and other processes read what was kept."""
    if chief and not work.vocab.exists():
        draft = work.vocab.with_suffix(".draft")
        vocabs = vocab.open_vocabularies(corpus, cfg.data.vocab, seed=cfg.run.seed, cache=cfg.data.cache)
        vocab.save_vocabularies(vocabs, draft)
        draft.rename(work.vocab)
    sharding.barrier("vocabularies saved")
    return vocab.load_vocabularies(work.vocab, cfg.data.vocab)


def _shapes_to_come(encoded: encode.Encoded, layout: plan.Plan, progress: Progress) -> list[Any]:
    """An empty batch of every shape, those needed first before the others."""
    coming = layout.epoch(progress.epoch)[progress.index :]
    order = dict.fromkeys([*(batch.bucket for batch in coming), *range(len(layout.buckets))])
    nothing = np.zeros(0, np.int64)
    return [pipeline.pad_batch(encoded, nothing, layout.buckets[index]) for index in order]
