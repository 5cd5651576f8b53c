"""The work directory: what a run leaves behind, and how a later command opens it.

Decides the names of the files in it:

    config.json           the resolved configuration
    vocab/                the vocabularies
    checkpoints/STEP/     training state, for going on and for the best models
    model/                the finished model's parameters
    metrics.jsonl         one line a measurement
    tensorboard/          the same for TensorBoard
    results.json          the final table
    outputs/              what the model wrote: PART.SEARCH.jsonl, a line a pair in corpus order
    attention.png         where the model looked, on one sentence
    learning_curve.png    how the dev metrics went
    failure.json          why the run was given up, if it was

or, of runs that were trained together as replicas (``config.run.replicas``), config.json,
results.json with their means, and each run's own work directory, replica_01/, replica_02/, ...

Nothing outside of it is needed to use the model. Must not know how a model is
trained or what it is asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from s2s import config as config_lib
from s2s.config import Config
from s2s.data import vocab as vocab_lib
from s2s.infra import checkpoint
from s2s.learn import step as step_lib

# Differences that leave the run the same run: how long, how watched, how decoded.
_MAY_CHANGE = ("run.", "search.", "data.cache", "data.prefetch", "data.test", "name")
_MUST_STAY = ("run.seed",)


class WorkdirError(ValueError):
    """A work directory that is not there, not whole, or another run's."""


class Workdir:
    """Paths of one work directory.

    Args:
      path: the folder; made when something is first written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.vocab = self.path / "vocab"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.metrics = self.path / "metrics.jsonl"
        self.results = self.path / "results.json"
        self.outputs = self.path / "outputs"
        self.picture = self.path / "attention.png"
        self.curve = self.path / "learning_curve.png"
        self.failure = self.path / "failure.json"

    @property
    def replicas(self) -> list[Workdir]:
        """The work directories of the models that were trained together here; none in an ordinary one."""
        folders = [one.parent for one in self.path.glob("replica_*/config.json")]
        return [Workdir(one) for one in sorted(folders, key=lambda one: (len(one.name), one.name))]

    def replica(self, number: int) -> Workdir:
        """The work directory of one replica, from 1."""
        return Workdir(self.path / f"replica_{number:02}")

    @property
    def ensemble(self) -> Workdir:
        """Where the scores of all replicas together are kept."""
        return Workdir(self.path / "ensemble")

    def check(self, cfg: Config) -> dict[str, tuple[Any, Any]]:
        """Checks that a run of ``cfg`` may go on here.

        Returns:
          Harmless differences to the configuration found there: dotted name to (there, now).

        Raises:
          WorkdirError: another experiment lives here.
        """
        if not self.config.exists():
            return {}
        differences = config_lib.differences(self.read_config(), cfg)
        serious = [
            f"  config.{name}: {there!r} there, {now!r} now"
            for name, (there, now) in differences.items()
            if name in _MUST_STAY
            or not name.startswith(_MAY_CHANGE)
            # More replicas may join; a run alone and a group of runs have different files.
            or (name == "run.replicas" and not now > there > 1)
        ]
        if serious:
            raise WorkdirError(
                f"{self.path} holds another experiment:\n" + "\n".join(serious) + "\n"
                "give another --workdir, or delete that one to start afresh"
            )
        return differences

    def write_config(self, cfg: Config) -> None:
        """Makes this the work directory of ``cfg``; to be done once its data is known to be good.

        Raises:
          WorkdirError: nothing can be written there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self.config, config_lib.to_json(cfg))
        except OSError as error:
            raise WorkdirError(
                f"{self.path} cannot be made a work directory ({error.strerror}): give another --workdir, "
                "or make room or rights there"
            ) from error

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes results.json: what is finished has one."""
        _write_json(self.results, results)

    def write_failure(self, reason: str) -> None:
        """Writes failure.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write_json(self.failure, {"reason": reason})

    def read_failure(self) -> str | None:
        """Why the run was given up; None: it was not."""
        try:
            return str(json.loads(self.failure.read_text(encoding="utf-8"))["reason"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return "no reason given"

    def read_results(self) -> dict[str, Any]:
        """What `write_results` wrote."""
        results: dict[str, Any] = json.loads(self.results.read_text(encoding="utf-8"))
        return results

    def read_config(self) -> Config:
        """The configuration of the run that made this work directory.

        Raises:
          WorkdirError: there is none, or it is damaged.
        """
        if not self.config.exists():
            raise WorkdirError(
                f"{self.path} is no work directory: it has no config.json. Train one with "
                f"python -m s2s.main --config experiments/luong_general.py --workdir {self.path}"
            )
        try:
            return config_lib.from_json(self.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WorkdirError(
                f"{self.config} cannot be used: {error}; restore the file or train again in a new folder"
            ) from error

    def load(self) -> tuple[Config, vocab_lib.Vocabularies, Any, Any]:
        """Opens a trained model: the finished one, or else the best checkpoint so far.

        Returns:
          Its configuration, vocabularies, graph definition and parameters.

        Raises:
          WorkdirError: there is no sound configuration or no model yet, or there are several.
          VocabularyError, CheckpointError: a part of it is damaged.
        """
        cfg = self.read_config()
        if replicas := self.replicas:
            raise WorkdirError(
                f"{self.path} holds {len(replicas)} models: name one of them, {replicas[0].path} to "
                f"{replicas[-1].path.name}"
            )
        vocabs = vocab_lib.load_vocabularies(self.vocab, cfg.data.vocab)
        graphdef, abstract = step_lib.abstract_params(cfg.model, vocabs.source.size, vocabs.target.size)
        if self.model.exists():
            return cfg, vocabs, graphdef, checkpoint.load_params(self.model, abstract)[0]
        with self.open_checkpoints(cfg) as checkpoints:
            step = checkpoints.best_step()
            if step is None:
                raise WorkdirError(
                    f"{self.path} has no model yet, as no evaluation has finished: "
                    "run its training command again"
                )
            part = "ema" if cfg.optim.ema else "params"
            return cfg, vocabs, graphdef, checkpoints.restore(step, abstract, part)[0]

    def open_checkpoints(self, cfg: Config) -> checkpoint.Checkpoints:
        """The checkpoints of this run, keeping what ``cfg.run`` says."""
        return checkpoint.Checkpoints(
            self.checkpoints,
            keep_best=cfg.run.keep_best,
            keep_last=cfg.run.keep_last,
            keep_evaluated=cfg.run.average_last,
            metric=cfg.run.metric,
            higher_is_better=config_lib.METRICS[cfg.run.metric],
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
