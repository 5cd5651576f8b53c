"""JoeyNMT's recurrent model, trained by its own TrainManager on its own batches.

Decides the settings that make it the model of the comparison, and those without which its version
2.3 does not run: a bidirectional encoder, the bridge between encoder and decoder, and a scheduler
that is not "plateau".
"""

from __future__ import annotations

import functools
import itertools
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import protocol
import torch
from joeynmt import prediction, search
from joeynmt.config import parse_global_args
from joeynmt.training import TrainManager


class Peer:
    """A model, its data and its trainer."""

    def load(
        self, folder: str, scratch: str, hidden: int, layers: int, batch: int, dropout: float, sentences: int
    ) -> dict[str, Any]:
        """Builds model and data; training starts when it is first asked for.

        Args:
          folder: of train.src, train.trg, dev.src and dev.trg, tokens with spaces between.
          scratch: a folder for its logs.
          hidden: embedding features, decoder units, and encoder units of both directions together.
          layers: of either side.
          batch: sentences.
          dropout: its rate.
          sentences: of dev, to translate.
        """
        for side in ("src", "trg"):
            with open(f"{folder}/dev.{side}", encoding="utf-8") as stream:
                lines = list(itertools.islice(stream, sentences))
            Path(scratch, f"dev.{side}").write_text("".join(lines), encoding="utf-8")
        cell = {"type": "recurrent", "rnn_type": "lstm", "num_layers": layers, "dropout": dropout}
        embeddings = {"embedding_dim": hidden, "dropout": dropout}
        config = {
            "name": "bench",
            "model_dir": scratch,
            "use_cuda": False,
            "random_seed": 1,
            "data": {
                "train": f"{folder}/train",
                "dev": f"{scratch}/dev",
                "dataset_type": "plain",
                **{side: {"lang": side, "level": "word", "max_length": 100} for side in ("src", "trg")},
            },
            "training": {
                "optimizer": "adam",
                "learning_rate": 0.001,
                "clip_grad_norm": 5.0,
                "scheduling": "exponential",
                "normalization": "tokens",
                "batch_size": batch,
                "batch_type": "sentence",
                "epochs": 10**6,
                "logging_freq": 10**6,
                "validation_freq": 10**6,
            },
            "testing": {"batch_size": batch, "batch_type": "sentence", "eval_metrics": []},
            "model": {
                "initializer": "xavier_uniform",
                "encoder": {
                    **cell,
                    "hidden_size": hidden // 2,
                    "bidirectional": True,
                    "embeddings": embeddings,
                },
                "decoder": {
                    **cell,
                    "hidden_size": hidden,
                    "hidden_dropout": dropout,
                    "attention": "luong",
                    "init_hidden": "bridge",
                    "input_feeding": True,
                    "embeddings": embeddings,
                },
            },
        }
        self.args = parse_global_args(config, rank=0, mode="train")
        self.model, self.train_data, self.dev_data, _ = prediction.prepare(self.args, rank=0, mode="train")
        self.turnstile: protocol.Turnstile | None = None
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "threads": torch.get_num_threads(),
            "version": f"joeynmt {metadata.version('joeynmt')}, torch {torch.__version__}",
        }

    def train(self, steps: int) -> dict[str, Any]:
        """Lets its loop make so many updates."""
        if self.turnstile is None:
            self.turnstile = protocol.Turnstile(self._loop)
        return self.turnstile.train(steps)

    def _loop(self, turnstile: protocol.Turnstile) -> None:
        class Manager(TrainManager):
            def _train_step(self, batch: Any) -> Any:
                turnstile.enter(int(batch.ntokens))
                return super()._train_step(batch)

        args = self.args
        manager = Manager(
            model=self.model,
            model_dir=args.model_dir,
            device=args.device,
            rank=0,
            autocast=args.autocast,
            seed=args.seed,
            train_args=args.train,
            dev_args=args.test,
        )
        manager.train_and_validate(train_data=self.train_data, valid_data=self.dev_data)

    def decode(self, beam: int, exact_length: int) -> dict[str, Any]:
        """Translates its part of dev by its own prediction loop; every output has so many tokens."""
        # Its prediction reads the shortest length from the configuration, but does not pass it on.
        prediction.search = functools.partial(search.search, min_output_length=exact_length)
        args = self.args.test._replace(
            beam_size=beam, beam_alpha=1.0 if beam > 1 else -1, max_output_length=exact_length
        )
        began = time.perf_counter()
        _, _, _, outputs, *_ = prediction.predict(
            model=self.model,
            data=self.dev_data,
            device=self.args.device,
            n_gpu=0,
            args=args,
            autocast=self.args.autocast,
        )
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "sentences": len(outputs), "tokens": sum(map(len, outputs))}


if __name__ == "__main__":
    peer = Peer()
    protocol.serve({name: getattr(peer, name) for name in ("load", "train", "decode")})
