"""yoyodyne's soft-attention LSTM, trained by its own Lightning loop on its own batches.

Decides the settings that make it the model of the comparison; everything else is its default.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning
import protocol
import torch
import yoyodyne
from lightning.pytorch import callbacks
from torch.utils.data import DataLoader
from yoyodyne import data, models
from yoyodyne.models import modules


class Gate(callbacks.Callback):
    """The turnstile as a callback."""

    def __init__(self, turnstile: protocol.Turnstile):
        self.turnstile = turnstile

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """Before every step; the end mark of a word is a token, pads are none."""
        self.turnstile.enter(int((~batch.target.mask).sum()))


class Peer:
    """A model and its trainer."""

    def load(
        self, folder: str, scratch: str, embedding: int, hidden: int, batch: int, dropout: float, longest: int
    ) -> dict[str, Any]:
        """Builds the model and starts its training loop, which then waits.

        Args:
          folder: of train.tsv and dev.tsv.
          scratch: a folder for its index.
          embedding: features of a symbol's vector.
          hidden: decoder units, and encoder units a direction.
          batch: words.
          dropout: its rate.
          longest: most symbols of an output.
        """
        lightning.seed_everything(1, verbose=False)
        self.data = data.DataModule(
            model_dir=scratch,
            train=f"{folder}/train.tsv",
            predict=f"{folder}/dev.tsv",
            source_col=1,
            target_col=2,
            source_sep="",
            target_sep=" ",
            batch_size=batch,
            max_target_length=longest,
        )
        self.model = models.SoftAttentionLSTMModel(
            source_encoder=modules.LSTMEncoder(embedding_size=embedding, hidden_size=hidden, dropout=dropout),
            embedding_size=embedding,
            decoder_hidden_size=hidden,
            decoder_dropout=dropout,
            compute_accuracy=False,
            max_target_length=longest,
            vocab_size=self.data.vocab_size,
            target_vocab_size=self.data.target_vocab_size,
        )

        def loop(turnstile: protocol.Turnstile) -> None:
            trainer = self._trainer(callbacks=[Gate(turnstile)], max_epochs=-1, limit_val_batches=0)
            trainer.fit(self.model, datamodule=self.data)

        self.turnstile = protocol.Turnstile(loop)
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "threads": torch.get_num_threads(),
            "version": f"yoyodyne {_version(yoyodyne)}, torch {torch.__version__}",
        }

    def _trainer(self, **keywords: Any) -> lightning.Trainer:
        return lightning.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **keywords,
        )

    def train(self, steps: int) -> dict[str, Any]:
        """Lets its loop make so many updates."""
        return self.turnstile.train(steps)

    def decode(self, sentences: int, beam: int) -> dict[str, Any]:
        """Predicts the first words of dev.tsv by its own prediction loop; its training ends here."""
        if self.turnstile is not None:
            self.turnstile.end()
            self.turnstile = None
        self.model.beam_width = beam
        batches = _first_batches(self.data.predict_dataloader(), sentences, self.data.batch_size)
        words = DataLoader(batches, batch_size=None)
        counted = Counted()
        trainer = self._trainer(callbacks=[counted])
        began = time.perf_counter()
        trainer.predict(self.model, dataloaders=words, return_predictions=False)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "sentences": counted.words, "tokens": counted.symbols}


class Counted(callbacks.Callback):
    """Counts predicted words, and their symbols with the end mark."""

    def __init__(self) -> None:
        self.words = self.symbols = 0

    def on_predict_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        """After every batch."""
        best = outputs[0][:, 0] if isinstance(outputs, tuple) else outputs
        before = (best == yoyodyne.special.END_IDX).cumsum(dim=1) == 0
        self.words += len(best)
        self.symbols += int(before.sum()) + len(best)


def _first_batches(loader: Any, sentences: int, batch: int) -> list[Any]:
    """The batches of the first words, made beforehand: reading files is not what is timed."""
    batches = []
    for one in loader:
        if len(batches) * batch >= sentences:
            break
        batches.append(one)
    return batches


def _version(module: Any) -> str:
    from importlib import metadata

    return metadata.version(Path(module.__file__).parent.name)


if __name__ == "__main__":
    peer = Peer()
    protocol.serve({name: getattr(peer, name) for name in ("load", "train", "decode")})
