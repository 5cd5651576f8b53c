"""Preparation: all that runs need before their first update, quickest where most is kept.

Decides the order of things until then, what is refused, and what happens side by side. Must not
know how the runs go on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from s2s.config import Config
from s2s.data import buckets, corpora, encode, plan, vocab, vocab_training
from s2s.infra import checkpoint, compilation, distributed, report, sharding
from s2s.judge import Judge
from s2s.learn import optim
from s2s.learn import step as step_lib
from s2s.train.member import Member, Progress
from s2s.train.program import Alone, Program, Together, largest
from s2s.workdir import Workdir, WorkdirError


@dataclass(frozen=True)
class Prepared:
    """What a program goes on with.

    Attributes:
      members: the runs.
      program: that updates them, with their states in it.
      summary: a sentence for people.
    """

    members: list[Member]
    program: Program
    summary: str


@dataclass
class _Opened:
    """A run whose data is read."""

    cfg: Config
    work: Workdir
    corpus: corpora.Corpus
    parts: dict[str, corpora.Corpus]
    vocabs: vocab.Vocabularies
    checkpoints: checkpoint.Checkpoints
    encoded: Any = None
    found: tuple[Any, Progress, int] | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        return self.vocabs.source.size, self.vocabs.target.size

    @property
    def seed(self) -> np.uint32:
        # What JAX takes of a seed by itself; as an argument, one program serves all seeds.
        return np.uint32(self.cfg.run.seed % 2**32)

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        return self.encoded.source_lengths, self.encoded.target_lengths


def prepare(
    runs: Sequence[tuple[Config, Workdir]], mesh: jax.sharding.Mesh, tell: Callable[[str], None]
) -> Prepared:
    """Prepares data, models and programs, or takes up the last checkpoint in each work directory.

    Args:
      runs: the experiments, which fit together and which `Workdir.check` has let pass, and their work
        directories; these get configurations and vocabularies.
      mesh: devices to train on.
      tell: takes remarks for people.

    Raises:
      CorpusError, VocabularyError, CheckpointError: as their names say.
      WorkdirError: the training data, or the batch shapes, are not what the checkpoints were trained with.
    """
    chief = distributed.is_main_process()
    compilation.keep_programs(corpora.cache_folder(runs[0][0].data.cache))

    # Data.
    opened = [_open(cfg, work, chief) for cfg, work in runs]
    read = [corpus for run in opened for corpus in (run.corpus, *run.parts.values())]
    for sentence in dict.fromkeys(itertools.chain.from_iterable(map(corpora.left_out, read))):
        tell(sentence)

    # The first state does not depend on the schedule: its program is compiled beside what is to come.
    first = {run.sizes: _first_state(run.cfg, run.sizes, mesh) for run in opened}
    beginning = {
        run.sizes: compilation.begin(first[run.sizes], run.seed)
        for run in opened
        if not run.checkpoints.all_steps()
    }

    # Batches.
    for run in opened:
        run.encoded = encode.encode_corpus(
            run.corpus,
            run.vocabs,
            max_source=run.cfg.data.max_source_length,
            max_target=run.cfg.data.max_target_length,
            cache=run.cfg.data.cache,
            progress=chief,
        )
    for sentence in dict.fromkeys(
        f"{run.corpus.name}: left out, too long: {corpora.listed(run.encoded.too_long)}"
        for run in opened
        if run.encoded.too_long
    ):
        tell(sentence)
    abstract = {
        sizes: sharding.abstract_replicated(jax.eval_shape(make, np.uint32(0)), mesh)
        for sizes, make in first.items()
    }
    for run in opened:
        run.found = _restore(run, abstract[run.sizes], tell)
    training = sharding.make_replicas_mesh(len(opened)) if len(opened) > 1 else mesh
    shapes, shared = _shapes(opened, training)

    # Members.
    members = []
    for run in opened:
        layout = _layout(run, shapes)
        progress, step = Progress(data=run.corpus.fingerprint), 0
        if run.found is not None:
            _, progress, step = run.found
        progress.shapes = [list(bucket) for bucket in shapes] if shared else []
        total = run.cfg.run.steps or max(1, math.ceil(run.cfg.run.epochs * layout.batches_per_epoch))
        graphdef, params = step_lib.abstract_params(run.cfg.model, *run.sizes)
        members.append(
            Member(
                run.cfg, run.work, run.encoded, layout, run.sizes, step_lib.parameter_count(params), total,
                progress, step, run.checkpoints, Judge(run.cfg, graphdef, run.vocabs, run.parts, mesh),
                report.Reporter(run.work.path, total, main_process=chief, restored_step=step),
                abstract[run.sizes],
            )
        )  # fmt: skip

    # Programs.
    graphdef, _ = step_lib.abstract_params(opened[0].cfg.model, *largest([run.sizes for run in opened]))
    order = _order(members)
    program: Program = (
        Together(members, graphdef, order, mesh)
        if len(members) > 1
        else Alone(members[0], graphdef, order, mesh)
    )
    program.begin(
        [run.found[0] if run.found is not None else beginning[run.sizes].result()(run.seed) for run in opened]
    )
    return Prepared(members, program, _summary(opened, members, mesh))


def _open(cfg: Config, work: Workdir, chief: bool) -> _Opened:
    corpus = corpora.open_corpus(cfg.data, "train", seed=cfg.run.seed, progress=chief)
    parts = {
        part: corpora.open_corpus(cfg.data, part, seed=cfg.run.seed, progress=chief)
        for part in ("dev", "test")
        if corpora.has_part(cfg.data, part)
    }
    if chief:
        work.write_config(cfg)
    return _Opened(
        cfg, work, corpus, parts, _vocabularies(cfg, work, corpus, chief), work.open_checkpoints(cfg)
    )


def _vocabularies(cfg: Config, work: Workdir, corpus: corpora.Corpus, chief: bool) -> vocab.Vocabularies:
    """Makes the vocabularies once; a resumed run and other processes read what was kept."""
    if chief and not work.vocab.exists():
        draft = work.vocab.with_suffix(".draft")
        vocabs = vocab_training.open_vocabularies(
            corpus, cfg.data.vocab, seed=cfg.run.seed, cache=cfg.data.cache
        )
        vocab.save_vocabularies(vocabs, draft)
        draft.rename(work.vocab)
    distributed.barrier("vocabularies saved")
    return vocab.load_vocabularies(work.vocab, cfg.data.vocab)


def _first_state(cfg: Config, sizes: tuple[int, int], mesh: jax.sharding.Mesh) -> Any:
    """A jitted function of the seed; runs that fit together differ in nothing else here but in sizes."""
    unscheduled = optim.make_optimizer(
        cfg.optim, optim.make_schedule(cfg.optim, steps_per_epoch=1, total_steps=1)
    )
    return sharding.jit_init(lambda seed: step_lib.init_state(cfg, *sizes, unscheduled, seed)[1], mesh)


def _restore(run: _Opened, abstract: Any, tell: Callable[[str], None]) -> tuple[Any, Progress, int] | None:
    restored = run.checkpoints.restore_latest(abstract)
    if restored is None:
        return None
    state, saved, step = restored
    if saved["data"] != run.corpus.fingerprint:
        raise WorkdirError(
            f"the training data is not what the checkpoints in {run.work.checkpoints} were trained on: "
            "give another --workdir, or bring the old files back"
        )
    tell(f"going on from step {step} ({run.work.checkpoints})")
    return state, Progress(**saved), step


def _shapes(opened: Sequence[_Opened], mesh: jax.sharding.Mesh) -> tuple[tuple[buckets.Bucket, ...], bool]:
    """The batch shapes of all runs, and whether they are other than those of a run alone.

    Runs on one corpus have the shapes, and so the batches, that each has by itself. Runs on several
    share the shapes that suit all, and keep them.
    """
    found = [tuple(buckets.Bucket(*each) for each in run.found[1].shapes) for run in opened if run.found]
    if len(set(found)) > 1:
        raise WorkdirError(
            "the checkpoints in "
            + ", ".join(str(run.work.path) for run in opened if run.found)
            + " were trained in different batch shapes: go on with each of them alone"
        )
    if found and found[0]:
        return found[0], True
    own = len({tuple(side.tobytes() for side in run.lengths) for run in opened}) == 1
    if found and not own and len(opened) > 1:
        raise WorkdirError(
            "the runs in "
            + ", ".join(str(run.work.path) for run in opened)
            + " were begun one by one, in the batch shapes of their own corpora: go on with each alone"
        )
    data = opened[0].cfg.data
    shapes = buckets.choose_shapes(
        [run.lengths for run in opened],
        batch_tokens=data.batch_tokens,
        max_shapes=data.max_shapes,
        rows_multiple=math.lcm(
            data.rows_multiple, sharding.rows_multiple(mesh) * opened[0].cfg.optim.accumulate
        ),
    )
    return shapes, not own


def _layout(run: _Opened, shapes: Sequence[buckets.Bucket]) -> plan.Plan:
    data = run.cfg.data
    try:
        return plan.make_plan(
            *run.lengths,
            batch_tokens=data.batch_tokens,
            max_shapes=data.max_shapes,
            seed=run.cfg.run.seed,
            shapes=shapes,
        )
    except ValueError as error:
        raise WorkdirError(
            f"{run.work.path} does not fit the runs that it is trained with ({error}): train it alone"
        ) from error


def _order(members: Sequence[Member]) -> list[buckets.Bucket]:
    """All batch shapes, those needed first before the others."""
    layout = members[0].layout
    positions = [(member.progress.epoch, member.progress.index) for member in members]
    _, coming = plan.walk([member.layout for member in members], positions)
    order = dict.fromkeys([*(tick.bucket for tick in coming), *range(len(layout.buckets))])
    return [layout.buckets[index] for index in order]


def _summary(opened: Sequence[_Opened], members: Sequence[Member], mesh: jax.sharding.Mesh) -> str:
    def told(values: Iterable[int], form: str = "") -> str:
        values = sorted(values)
        ends = [format(value, form) for value in (values[0], values[-1])]
        return " to ".join(dict.fromkeys(ends))

    layouts = [member.layout for member in members]
    return (
        f"{f'{len(members)} runs in one program: ' if len(members) > 1 else ''}"
        f"{', '.join(dict.fromkeys(run.corpus.name for run in opened))}: "
        f"{told(len(member.encoded) for member in members)} pairs; "
        f"vocabularies {told(run.sizes[0] for run in opened)} and {told(run.sizes[1] for run in opened)}; "
        f"{told((member.parameters for member in members), ',')} parameters; "
        f"{told(each.batches_per_epoch for each in layouts)} batches an epoch in "
        f"{len(layouts[0].buckets)} shapes, "
        f"padding {np.mean([each.padding for each in layouts]):.1%} walked, "
        f"{np.mean([each.array_padding for each in layouts]):.1%} of arrays; "
        f"{told(member.total_steps for member in members)} updates on {sharding.device_kind(mesh)}"
    )
