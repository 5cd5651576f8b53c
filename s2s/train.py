"""Training, told from top to bottom: data, state, loop, results.

Decides the order of things in a run and what a run survives. Interrupted at any moment
and started again by the same command, it ends with the same parameters. Must not know
how a batch is laid out, how a model computes, or how a file is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from s2s import config as config_lib
from s2s.config import Config
from s2s.data import corpora, encode, pipeline, plan, vocab
from s2s.evaluate import label
from s2s.infra import checkpoint, picture, report, sharding
from s2s.judge import Judge
from s2s.learn import metrics as metrics_lib
from s2s.learn import optim
from s2s.learn import step as step_lib
from s2s.workdir import Workdir, WorkdirError


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved.

    Attributes:
      signal: the signal's number.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


class Diverged(Exception):
    """The loss stopped being a finite number."""


@dataclass
class Progress:
    """Where a run stands, beside its arrays: everything a resumed run must know.

    Attributes:
      epoch, index: the next batch's place in the data.
      best: the best dev metric so far; None before the first evaluation.
      stale: evaluations since then.
      tokens: target tokens learned from.
      seconds: spent in the training loop, evaluations included.
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
    history: list[dict[str, float]] = field(default_factory=list)
    stopped_early: bool = False
    data: str = ""


def run(cfg: Config, folder: str) -> dict[str, Any]:
    """Trains a model, or goes on where an earlier run in this folder stopped.

    Args:
      cfg: the experiment.
      folder: its work directory.

    Returns:
      The results that are also in results.json.

    Raises:
      Interrupted: a signal asked to stop; the state is saved.
      Diverged: the loss is no longer finite.
      WorkdirError, CorpusError, VocabularyError, CheckpointError: as their names say.
    """
    began = time.monotonic()
    mesh = sharding.make_mesh()
    chief = sharding.is_main_process()
    work = Workdir(folder)
    changed = work.check(cfg)
    if work.results.exists() and not any(name.startswith("run.") for name in changed):
        results = json.loads(work.results.read_text(encoding="utf-8"))
        if chief:
            print(
                f"{work.path} is finished: delete it or give another --workdir to train afresh; "
                "for other data or another search there is s2s.evaluate.\n"
            )
            _show(results, work)
        return results
    tell = functools.partial(print, file=sys.stderr) if chief else _keep_quiet
    for name, (there, now) in changed.items():
        tell(f"config.{name}: was {there!r}, is {now!r} from here on")

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
    steps_per_epoch = layout.batches_per_epoch
    total_steps = cfg.run.steps or max(1, math.ceil(cfg.run.epochs * steps_per_epoch))

    # State.
    optimizer = optim.make_optimizer(
        cfg.optim, optim.make_schedule(cfg.optim, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    )
    sizes = vocabs.source.size, vocabs.target.size
    graphdef, abstract_params = step_lib.abstract_params(cfg.model, *sizes)
    initialize = functools.partial(step_lib.init_state, cfg, *sizes, optimizer, cfg.run.seed)
    abstract = sharding.abstract_replicated(jax.eval_shape(lambda: initialize()[1]), mesh)
    checkpoints = work.open_checkpoints(cfg)
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
    else:
        state = sharding.jit_init(lambda: initialize()[1], mesh)()
    reporter = report.Reporter(work.path, total_steps, main_process=chief, restored_step=step)
    train_step = sharding.jit_train_step(step_lib.make_train_step(graphdef, cfg, optimizer), mesh)
    judge = Judge(cfg, graphdef, vocabs, parts, mesh)

    reporter.say(
        f"{corpus.name}: {len(encoded)} pairs; vocabularies {vocabs.source.size} and {vocabs.target.size}; "
        f"{step_lib.parameter_count(abstract_params):,} parameters; {steps_per_epoch} batches an epoch in "
        f"{len(layout.buckets)} shapes, {layout.padding:.1%} padding; {total_steps} updates on "
        f"{sharding.device_kind(mesh)}"
    )

    # Loop. The metrics of an update are read after the next one is under way.
    eval_every = cfg.run.eval_every or steps_per_epoch
    window: list[Any] = []
    window_start, window_clock = step, time.monotonic()

    def flush() -> None:
        """Reads what the device measured since the last call, and checks it."""
        nonlocal window_start, window_clock
        if not window:
            return
        host = jax.device_get(window)
        first, last = window_start + 1, window_start + len(host)
        tokens = float(sum(metrics.sums.tokens for metrics in host))
        mean = float(sum(metrics.sums.loss for metrics in host)) / max(tokens, 1.0)
        if not math.isfinite(mean) or not all(math.isfinite(metrics.grad_norm) for metrics in host):
            checkpoints.wait()
            good = checkpoints.all_steps()
            where = (
                f"the last good checkpoint is {work.checkpoints / str(good[-1])}"
                if good
                else "there is no checkpoint before it"
            )
            raise Diverged(
                f"the loss is not finite somewhere in steps {first} to {last}; {where}. A smaller "
                f"config.optim.learning_rate (now {cfg.optim.learning_rate}) or config.optim.clip_norm "
                f"(now {cfg.optim.clip_norm}) usually helps"
            )
        now = time.monotonic()
        progress.tokens += tokens
        progress.seconds += now - window_clock
        reporter.scalars(
            last,
            {
                "loss": mean,
                "perplexity": math.exp(min(float(sum(m.sums.nll for m in host)) / max(tokens, 1.0), 700.0)),
                "token_accuracy": 100 * float(sum(m.sums.correct for m in host)) / max(tokens, 1.0),
                "grad_norm": float(np.mean([metrics.grad_norm for metrics in host])),
                "learning_rate": float(host[-1].learning_rate),
                "tokens_per_second": tokens / max(now - window_clock, 1e-9),
                "epoch": last / steps_per_epoch,
            },
            group="train",
        )
        reporter.progress(last, {"epoch": round(last / steps_per_epoch, 2), "loss": mean}, tokens)
        window.clear()
        window_start, window_clock = last, now

    def save(metrics: dict[str, float] | None = None) -> None:
        nonlocal window_clock
        clock = time.monotonic()
        checkpoints.save(step, state, dataclasses.asdict(progress), metrics)
        progress.seconds += time.monotonic() - clock
        window_clock = time.monotonic()

    def evaluate_dev() -> None:
        nonlocal window_clock
        clock = time.monotonic()
        scores = judge.dev_scores(step_lib.evaluation_params(state))
        progress.seconds += time.monotonic() - clock
        if scores:
            value = scores[cfg.run.metric]
            better = progress.best is None or metrics_lib.better(cfg.run.metric, value, progress.best)
            progress.best, progress.stale = (value, 0) if better else (progress.best, progress.stale + 1)
            progress.history.append({"step": step, "epoch": round(step / steps_per_epoch, 2), **scores})
            progress.stopped_early = 0 < cfg.run.patience <= progress.stale
            reporter.scalars(step, scores, group="dev")
            told = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            reporter.say(
                f"step {step}  epoch {step / steps_per_epoch:.2f}  dev {told}{'  (best)' if better else ''}"
            )
        save(scores or None)
        window_clock = time.monotonic()

    with reporter, checkpoints, _signals() as asked:
        while step < total_steps and not progress.stopped_early:
            source = pipeline.batches(
                encoded,
                layout,
                epoch=progress.epoch,
                start=progress.index,
                process_index=sharding.process_index(),
                process_count=sharding.process_count(),
                prefetch=cfg.data.prefetch,
            )
            for batch in source:
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, sharding.to_global(batch, mesh))
                step += 1
                progress.index += 1
                due = step % cfg.run.log_every == 0
                evaluate_now = step % eval_every == 0 or step == total_steps
                if progress.index == steps_per_epoch:
                    progress.epoch, progress.index = progress.epoch + 1, 0
                if due and not evaluate_now:
                    flush()
                window.append(metrics)
                if evaluate_now:
                    flush()
                    evaluate_dev()
                elif cfg.run.save_every and step % cfg.run.save_every == 0:
                    flush()
                    save()
                # Several processes must agree, which costs a collective: not at every step.
                together = sharding.process_count() == 1 or due
                if together and sharding.any_process(bool(asked)):
                    flush()
                    save()
                    checkpoints.wait()
                    number = asked[0] if asked else signal.SIGTERM
                    raise Interrupted(
                        number,
                        f"stopped by {signal.Signals(number).name} at step {step}, saved; "
                        "the same command goes on from there",
                    )
                if step == total_steps or progress.stopped_early:
                    break
        checkpoints.wait()

        # Results.
        params, chosen = _final_params(cfg, checkpoints, state, abstract.params)
        checkpoint.save_params(work.model, params, {"step": step, "chosen": chosen})
        if progress.stopped_early:
            reporter.say(f"stopped early: {cfg.run.patience} evaluations without a better {cfg.run.metric}")
        results = {
            "name": cfg.name,
            "steps": step,
            "epochs": round(step / steps_per_epoch, 2),
            "parameters": step_lib.parameter_count(abstract_params),
            "model": chosen,
            "training_seconds": round(progress.seconds, 1),
            "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
            "padding": round(layout.padding, 4),
            "history": progress.history,
            **judge.final_scores(params, work.picture if chief else None),
        }
        results["process_seconds"] = round(time.monotonic() - began, 1)
    if chief:
        if progress.history:
            picture.curve_picture(work.curve, work.metrics)
        draft = work.results.with_suffix(".draft")
        draft.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(work.results)
        _show(results, work)
    return results


def _vocabularies(cfg: Config, work: Workdir, corpus: corpora.Corpus, chief: bool) -> vocab.Vocabularies:
    """Trains the vocabularies once; a resumed run and other processes read what was kept."""
    if chief and not work.vocab.exists():
        draft = work.vocab.with_suffix(".draft")
        vocab.save_vocabularies(vocab.train_vocabularies(corpus, cfg.data.vocab, seed=cfg.run.seed), draft)
        draft.rename(work.vocab)
    sharding.barrier("vocabularies saved")
    return vocab.load_vocabularies(work.vocab, cfg.data.vocab)


def _final_params(
    cfg: Config, checkpoints: checkpoint.Checkpoints, state: Any, abstract: Any
) -> tuple[Any, str]:
    """The parameters that become the model, and in words which they are."""
    part = "ema" if cfg.optim.ema else "params"
    best = checkpoints.best_step()
    if best is None:
        return step_lib.evaluation_params(state), "the last"
    if cfg.run.average_last:
        params, steps = checkpoints.mean_of_last(cfg.run.average_last, abstract, part)
        return params, f"the mean of steps {', '.join(map(str, steps))}"
    return checkpoints.restore(best, abstract, part)[0], (
        f"that of step {best}, {config_lib.direction(cfg.run.metric)} {cfg.run.metric} on dev"
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT for the loop to act on between two updates."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    kept = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _keep_quiet(text: str) -> None:
    """Where another process does the talking."""


def _show(results: dict[str, Any], work: Workdir) -> None:
    """Prints the final table and where everything lies."""
    rows = results["scores"]
    if rows:
        names = [name for name in rows[0] if name not in ("part", "pairs", "search")]
        print(
            report.table(
                [[r["part"], r["pairs"], r["search"], *(r[name] for name in names)] for r in rows],
                ["part", "pairs", "search", *map(label, names)],
            )
        )
    for name, text in results["signatures"].items():
        print(f"{name}: {text}")
    print(
        f"\n{results['parameters']:,} parameters, {results['steps']} updates ({results['epochs']} epochs), "
        f"{results['training_seconds']:.0f} s of training at {results['tokens_per_second']:,.0f} "
        f"target tokens/s, {results['process_seconds']:.0f} s in all; the model is {results['model']}\n"
    )
    for path, what in [
        (work.path, "everything: python -m s2s.translate --workdir needs this alone"),
        (work.picture, "where the model looked"),
        (work.curve, "the learning curve"),
        (work.metrics, "every measurement"),
    ]:
        if path.exists():
            print(f"  {path}: {what}")
