"""Training, told from top to bottom: data, state, loop, results.

Decides the order of things in a run and what a run survives. Interrupted at any moment
and started again by the same command, it ends with the same parameters. Must not know
how a batch is laid out, how a model computes, or how a file is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from s2s import config as config_lib
from s2s.batch import Batch
from s2s.config import Config, ConfigError
from s2s.data import pipeline
from s2s.infra import checkpoint, picture, report, sharding
from s2s.judge import label
from s2s.learn import metrics as metrics_lib
from s2s.learn import step as step_lib
from s2s.nn import cudnn
from s2s.prepare import prepare
from s2s.workdir import Workdir


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


def run(cfg: Config, folder: str, *, began: float | None = None) -> dict[str, Any]:
    """Trains a model, or goes on where an earlier run in this folder stopped.

    Args:
      cfg: the experiment.
      folder: its work directory.
      began: `time.monotonic` when the command began; None: now.

    Returns:
      The results that are also in results.json.

    Raises:
      Interrupted: a signal asked to stop; the state is saved.
      Diverged: the loss is no longer finite.
      ConfigError, WorkdirError, CorpusError, VocabularyError, CheckpointError: as their names say.
    """
    began = time.monotonic() if began is None else began
    if cfg.model.recurrence == "cudnn" and not cudnn.available():
        raise ConfigError(
            "config.model.recurrence='cudnn' needs an NVIDIA GPU, and JAX runs on none: "
            "install s2s[cuda], or use 'scan', which learns the same parameters"
        )
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

    ready = prepare(cfg, work, mesh, tell)
    state, step, progress = ready.state, ready.step, ready.progress
    checkpoints, judge, total_steps = ready.checkpoints, ready.judge, ready.total_steps
    steps_per_epoch = ready.layout.batches_per_epoch
    reporter = report.Reporter(work.path, total_steps, main_process=chief, restored_step=step)
    reporter.say(ready.summary)

    # Loop. After the first, the metrics of an update are read after the next one is under way.
    eval_every = cfg.run.eval_every or steps_per_epoch
    window: list[Any] = []
    waits: list[float] = []
    window_start, window_clock = step, time.monotonic()
    seconds_to_first_step: float | None = None

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
        progress.waited += sum(waits)
        reporter.scalars(
            last,
            {
                "loss": mean,
                "perplexity": math.exp(min(float(sum(m.sums.nll for m in host)) / max(tokens, 1.0), 700.0)),
                "token_accuracy": 100 * float(sum(m.sums.correct for m in host)) / max(tokens, 1.0),
                "grad_norm": float(np.mean([metrics.grad_norm for metrics in host])),
                "learning_rate": float(host[-1].learning_rate),
                "tokens_per_second": tokens / max(now - window_clock, 1e-9),
                "input_wait": sum(waits) / max(now - window_clock, 1e-9),
                "epoch": last / steps_per_epoch,
            },
            group="train",
        )
        reporter.progress(last, {"epoch": round(last / steps_per_epoch, 2), "loss": mean}, tokens)
        window.clear()
        waits.clear()
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

    with reporter, checkpoints, ready.train_step as train_step, _signals() as asked:
        while step < total_steps and not progress.stopped_early:
            batches = functools.partial(
                pipeline.batches,
                ready.encoded,
                ready.layout,
                epoch=progress.epoch,
                start=progress.index,
                process_index=sharding.process_index(),
                process_count=sharding.process_count(),
                prefetch=cfg.data.prefetch,
            )
            for batch in _timed(batches, waits):
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, sharding.to_global(batch, mesh))
                step += 1
                progress.index += 1
                if seconds_to_first_step is None:
                    jax.block_until_ready(metrics)
                    seconds_to_first_step = round(time.monotonic() - began, 3)
                    reporter.scalars(step, {"seconds_to_first_step": seconds_to_first_step}, group="start")
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
        params, chosen = _final_params(cfg, checkpoints, state, ready.abstract.params)
        checkpoint.save_params(work.model, params, {"step": step, "chosen": chosen})
        if progress.stopped_early:
            reporter.say(f"stopped early: {cfg.run.patience} evaluations without a better {cfg.run.metric}")
        results = {
            "name": cfg.name,
            "steps": step,
            "epochs": round(step / steps_per_epoch, 2),
            "parameters": ready.parameters,
            "model": chosen,
            "seconds_to_first_step": seconds_to_first_step,
            "training_seconds": round(progress.seconds, 1),
            "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
            "input_wait": round(progress.waited / max(progress.seconds, 1e-9), 4),
            "padding": round(ready.layout.padding, 4),
            "array_padding": round(ready.layout.array_padding, 4),
            "history": progress.history,
            **judge.final_scores(
                params, work.picture if chief else None, outputs=work.outputs if chief else None
            ),
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


def _timed(batches: Callable[[], Iterator[Batch]], waits: list[float]) -> Iterator[Batch]:
    """Gives an epoch's batches, and notes for how many seconds each kept the loop waiting."""
    clock = time.monotonic()
    source = batches()
    while (batch := next(source, None)) is not None:
        waits.append(time.monotonic() - clock)
        yield batch
        clock = time.monotonic()


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
