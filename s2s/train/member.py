"""A member: one run among those that a program trains, with all that is its own.

Decides what a run remembers, when it is evaluated and saved, when it ends, and what it leaves in its
work directory. Must not know how many others there are, nor how parameters are computed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from s2s import config as config_lib
from s2s.config import Config
from s2s.data import encode, plan
from s2s.infra import checkpoint, picture, report
from s2s.judge import Judge
from s2s.learn import metrics as metrics_lib
from s2s.learn.step import Metrics
from s2s.workdir import Workdir


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
      seconds: spent in the training loop, evaluations included; with other runs, theirs too.
      waited: those of them that the loop waited for its next batch.
      history: the dev measurements, in order.
      stopped_early: no more updates are wanted.
      data: fingerprint of the training corpus; another's epochs are others.
      shapes: rows, source and target positions of the batch shapes that it shares with runs on other
        corpora; none: its own corpus's.
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
    shapes: list[list[int]] = field(default_factory=list)


@dataclass(eq=False)
class Member:
    """One run of a program.

    Attributes:
      cfg: its configuration.
      work: its work directory.
      encoded: its training pairs as ids.
      layout: their batches.
      sizes: entries of its source and target vocabularies.
      parameters: numbers in its model.
      total_steps: updates in the whole run.
      progress: where it stands.
      step: updates made.
      checkpoints, judge, reporter: its own.
      abstract: shapes and shardings of its training state.
      failure: why it was given up; None: it was not.
    """

    cfg: Config
    work: Workdir
    encoded: encode.Encoded
    layout: plan.Plan
    sizes: tuple[int, int]
    parameters: int
    total_steps: int
    progress: Progress
    step: int
    checkpoints: checkpoint.Checkpoints
    judge: Judge
    reporter: report.Reporter
    abstract: Any
    failure: str | None = None

    @property
    def training(self) -> bool:
        """Whether updates are still to come."""
        return self.failure is None and self.step < self.total_steps and not self.progress.stopped_early

    @property
    def epochs(self) -> float:
        """Passes over its data so far."""
        return round(self.step / self.layout.batches_per_epoch, 2)

    @property
    def evaluation_due(self) -> bool:
        """Whether the update just made is followed by an evaluation."""
        every = self.cfg.run.eval_every or self.layout.batches_per_epoch
        return self.step % every == 0 or self.step == self.total_steps

    @property
    def save_due(self) -> bool:
        """Whether it is followed by a checkpoint, evaluated or not."""
        every = self.cfg.run.save_every
        return every is not None and self.step % every == 0

    def advance(self) -> None:
        """Notes that one more update is under way."""
        self.step += 1
        self.progress.index += 1
        if self.progress.index == self.layout.batches_per_epoch:
            self.progress.epoch, self.progress.index = self.progress.epoch + 1, 0

    def measured(
        self, last: int, updates: Sequence[Metrics], seconds: float, waited: float
    ) -> tuple[float, float]:
        """Keeps what its last updates reported.

        Args:
          last: step of the last of them.
          updates: their metrics, on the host.
          seconds: that they took.
          waited: seconds of these without a batch.

        Returns:
          Mean loss in nats a token, and target tokens.

        Raises:
          Diverged: something is not finite.
        """
        tokens = float(sum(metrics.sums.tokens for metrics in updates))
        mean = float(sum(metrics.sums.loss for metrics in updates)) / max(tokens, 1.0)
        if not math.isfinite(mean) or not all(math.isfinite(metrics.grad_norm) for metrics in updates):
            raise Diverged(self._not_finite(last - len(updates) + 1, last))
        self.progress.tokens += tokens
        self.progress.waited += waited
        nll = float(sum(metrics.sums.nll for metrics in updates))
        self.reporter.scalars(
            last,
            {
                "loss": mean,
                "perplexity": math.exp(min(nll / max(tokens, 1.0), 700.0)),
                "token_accuracy": 100 * float(sum(m.sums.correct for m in updates)) / max(tokens, 1.0),
                "grad_norm": float(np.mean([metrics.grad_norm for metrics in updates])),
                "learning_rate": float(updates[-1].learning_rate),
                "tokens_per_second": tokens / max(seconds, 1e-9),
                "input_wait": waited / max(seconds, 1e-9),
                "epoch": last / self.layout.batches_per_epoch,
            },
            group="train",
        )
        return mean, tokens

    def evaluate(self, params: Any, say: Callable[[str], None]) -> dict[str, float] | None:
        """Measures the model on dev, and notes whether it is the best so far; None without a dev part."""
        scores = self.judge.dev_scores(params)
        if not scores:
            return None
        progress, metric = self.progress, self.cfg.run.metric
        better = progress.best is None or metrics_lib.better(metric, scores[metric], progress.best)
        progress.best, progress.stale = (scores[metric], 0) if better else (progress.best, progress.stale + 1)
        progress.history.append({"step": self.step, "epoch": self.epochs, **scores})
        progress.stopped_early = 0 < self.cfg.run.patience <= progress.stale
        self.reporter.scalars(self.step, scores, group="dev")
        told = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        exact = self.step / self.layout.batches_per_epoch
        say(f"step {self.step}  epoch {exact:.2f}  dev {told}{'  (best)' if better else ''}")
        if progress.stopped_early:
            say(f"stopped early: {self.cfg.run.patience} evaluations without a better {metric}")
        return scores

    def save(self, state: Any, scores: dict[str, float] | None = None) -> None:
        """Saves a checkpoint of this step, with the scores of its evaluation where there was one."""
        self.checkpoints.save(self.step, state, dataclasses.asdict(self.progress), scores)

    def finish(
        self, params: Any, *, began: float, seconds_to_first_step: float | None, writes: bool
    ) -> dict[str, Any]:
        """Makes the model, scores it, and writes all that a finished run has.

        Args:
          params: those to evaluate after the last update.
          began: `time.monotonic` when the command began.
          seconds_to_first_step: from then on; None: there was none.
          writes: whether this process writes.

        Returns:
          What is in results.json.
        """
        params, chosen = self._final(params)
        checkpoint.save_params(self.work.model, params, {"step": self.step, "chosen": chosen})
        progress = self.progress
        results = {
            "name": self.cfg.name,
            "steps": self.step,
            "epochs": self.epochs,
            "parameters": self.parameters,
            "model": chosen,
            "seconds_to_first_step": seconds_to_first_step,
            "training_seconds": round(progress.seconds, 1),
            "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
            "input_wait": round(progress.waited / max(progress.seconds, 1e-9), 4),
            "padding": round(self.layout.padding, 4),
            "array_padding": round(self.layout.array_padding, 4),
            "history": progress.history,
            **self.judge.final_scores(
                params, self.work.picture if writes else None, self.work.outputs if writes else None
            ),
        }
        results["process_seconds"] = round(time.monotonic() - began, 1)
        if writes:
            self.work.failure.unlink(missing_ok=True)
            if progress.history:
                picture.curve_picture(self.work.curve, self.work.metrics)
            self.work.write_results(results)
        return results

    def _final(self, params: Any) -> tuple[Any, str]:
        """The parameters that become the model, and in words which they are."""
        part = "ema" if self.cfg.optim.ema else "params"
        best = self.checkpoints.best_step()
        if best is None:
            return params, "the last"
        if self.cfg.run.average_last:
            mean, steps = self.checkpoints.mean_of_last(self.cfg.run.average_last, self.abstract.params, part)
            return mean, f"the mean of steps {', '.join(map(str, steps))}"
        return self.checkpoints.restore(best, self.abstract.params, part)[0], (
            f"that of step {best}, {config_lib.direction(self.cfg.run.metric)} {self.cfg.run.metric} on dev"
        )

    def _not_finite(self, first: int, last: int) -> str:
        self.checkpoints.wait()
        good = self.checkpoints.all_steps()
        where = (
            f"the last good checkpoint is {self.work.checkpoints / str(good[-1])}"
            if good
            else "there is no checkpoint before it"
        )
        return (
            f"the loss is not finite somewhere in steps {first} to {last}; {where}. A smaller "
            f"config.optim.learning_rate (now {self.cfg.optim.learning_rate}) or config.optim.clip_norm "
            f"(now {self.cfg.optim.clip_norm}) usually helps"
        )
