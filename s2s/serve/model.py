"""The model behind a server: opened once, compiled ahead, asked by one thread at a time.

Decides which programs are compiled before they are needed. Must not know a protocol.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2s.data.corpora import cache_folder
from s2s.ensemble import Ensemble, open_models
from s2s.explain.explanation import Explainer, explain
from s2s.explain.page import render
from s2s.explain.telling import ExplanationError
from s2s.infra import compilation, sharding
from s2s.learn import step as step_lib
from s2s.serve.openapi import Limits
from s2s.translator import Translation, Translator, padded_length


class Model:
    """A trained model that answers (`s2s.serve.application.Served`).

    Args:
      folders: its work directory, or several that answer as an ensemble.
      combination: of an ensemble (`s2s.ensemble`).
      limits: of requests: the longest sentence and the widest beam to be ready for.
      most: sentences in a batch.

    Raises:
      WorkdirError, CheckpointError: there is no model.
    """

    def __init__(self, folders: Sequence[str], combination: str, limits: Limits, most: int):
        self.cfg, self.vocabs, self._structure, params = open_models(folders, combination)
        compilation.keep_programs(cache_folder(self.cfg.data.cache))
        self._translators: dict[tuple[int, int], Translator] = {}
        self._making = threading.Lock()
        self._explainers: dict[int, Explainer] = {}
        self._name = Path(folders[0]).resolve().name
        self._most, self._limits = most, limits
        self.beam = 1 if self.cfg.search.name != "beam" else min(self.cfg.search.beam, limits.beam)
        self._params = sharding.replicate(params, self._translator((self.beam, 1)).mesh)
        self.ready, self.compiling = False, True
        self.about = {
            "name": self.cfg.name,
            "parameters": step_lib.parameter_count(params),
            "beam": self.beam,
            "model": dataclasses.asdict(self.cfg.model),
            "vocabularies": {"source": self.vocabs.source.size, "target": self.vocabs.target.size},
        }

    def pieces(self, texts: Sequence[str]) -> list[int]:
        """Source pieces of sentences, EOS included."""
        return [len(ids) + 1 for ids in self.vocabs.source.encode_all(texts)]

    def translate(self, kind: tuple[int, int], texts: Sequence[str]) -> list[Translation]:
        """Translates with (beam, n best)."""
        return self._translator(kind)(self._params, texts)

    def explain(self, text: str, beam: int) -> dict[str, Any]:
        """What the explorer shows of one sentence.

        Raises:
          ExplanationError: the sentence is too long to be shown, or an ensemble answers.
        """
        if beam not in self._explainers:
            if isinstance(self._structure, Ensemble):
                raise ExplanationError("an ensemble has no single way: serve one work directory to see it")
            search = dataclasses.replace(self.cfg.search, name="greedy" if beam == 1 else "beam", beam=beam)
            self._explainers[beam] = Explainer(
                self.cfg, self.vocabs, self._structure, self._params, search, workdir=self._name
            )
        return explain([self._explainers[beam]], text)

    def page(self) -> str:
        """The page that is served at /."""
        return render(None, connect="'self'")

    def warm_up(self, stop: threading.Event) -> None:
        """Compiles what the model's own search needs for one, few or many sentences of every length.

        Ready once sentences of up to 32 pieces find their programs; other searches are compiled
        when they are first asked for.

        Args:
          stop: ends it before the next program.
        """
        for text in self._examples():
            for rows in dict.fromkeys((1, max(1, self._most // 4), self._most)):
                if stop.is_set():
                    return
                self.translate((self.beam, 1), [text] * rows)
            self.ready = self.ready or self.pieces([text])[0] > 24
        self.ready, self.compiling = True, False

    def _translator(self, kind: tuple[int, int]) -> Translator:
        with self._making:
            if kind not in self._translators:
                beam, nbest = kind
                search = dataclasses.replace(
                    self.cfg.search,
                    name="greedy" if beam == 1 else "beam",
                    beam=beam,
                    batch_sentences=self._most,
                )
                self._translators[kind] = Translator(
                    self._structure, self.vocabs, search, n_best=nbest, few_programs=True
                )
            return self._translators[kind]

    def _examples(self) -> list[str]:
        """One sentence for every number of source positions that there are programs for, shortest first."""
        source = self.vocabs.source
        # Some piece in the middle of the vocabulary, again and again.
        piece = source.size // 2
        longest: dict[int, str] = {}
        for number in range(1, self._limits.pieces + 1):
            text = source.decode([piece] * number)
            pieces = self.pieces([text])[0]
            if pieces > self._limits.pieces:
                break
            longest.setdefault(padded_length(pieces), text)
        return [longest[length] for length in sorted(longest)]
