"""What is told of a sentence's way through a model: arrays that were found become named, plain data.

Decides names and order, and which numbers are shown. Must not compute what a model or a search does,
nor know how it looks. Positions, layers, words and ranks count from 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from s2s.batch import BOS, EOS, PAD, UNK
from s2s.config import Config, SearchConfig
from s2s.data.vocab import Vocabularies, Vocabulary
from s2s.explain.packing import Units
from s2s.nn import anatomy
from s2s.nn.cells import CELLS
from s2s.search.tree import Tree

# The likeliest words shown at a step.
TOP = 10
Link = tuple[int, int]


class ExplanationError(ValueError):
    """Something that cannot be explained; the message says what to do."""


class Walk(NamedTuple):
    """An output that the decoder is walked through.

    Attributes:
      name: "best" or "greedy" of a search, or "reference".
      ids: target ids, EOS last.
      score: by which the search ranked it; None: the log-probability.
    """

    name: str
    ids: list[int]
    score: float | None


class Passed(NamedTuple):
    """A walk as it went: by step, the state after it, its `anatomy.Moment` and log sum exp of its logits."""

    states: list[Any]
    moments: list[anatomy.Moment]
    totals: list[float]


class Teller:
    """What is told of one model.

    Args:
      cfg: the run's configuration.
      vocabs: its vocabularies.
      search: how its outputs were searched for.
      workdir: the name of its work directory.
      parameters: numbers that it has learned.
    """

    def __init__(
        self, cfg: Config, vocabs: Vocabularies, search: SearchConfig, *, workdir: str, parameters: int
    ):
        self.cfg, self.vocabs, self.search = cfg, vocabs, search
        self.workdir, self.parameters = workdir, parameters

    def about(self, pieces: int, steps: int) -> dict[str, Any]:
        """What kind of model it is, and its sizes."""
        model = self.cfg.model
        shown = {f"model.{name}": value for name, value in dataclasses.asdict(model).items()}
        shown |= {f"search.{item}": getattr(self.search, item) for item in ("name", "beam", "length_penalty")}
        return {
            "name": self.cfg.name,
            "workdir": self.workdir,
            "config": shown,
            "parameters": self.parameters,
            "sizes": {
                "S": pieces,
                "T": steps,
                "E": model.embedding,
                "H": model.hidden,
                "M": model.memory,
                "encoder_hidden": model.encoder_units,
                "layers": model.layers,
                "encoder_layers": model.encoder_depth,
                "source_vocab": self.vocabs.source.size,
                "target_vocab": self.vocabs.target.size,
            },
            **{
                name: getattr(model, name)
                for name in ("cell", "attention", "window", "input_feeding", "bridge", "bidirectional")
            },
            "tie": model.tie,
            "dtype": model.dtype,
            "gate_names": list(CELLS[model.cell].gate_names),
        }

    def pieces(self, vocab: Vocabulary, ids: list[int]) -> dict[str, Any]:
        """A text as its vocabulary cuts it; the end mark belongs to no word."""
        words: list[int | None] = [*vocab.word_numbers(ids)]
        return {
            "tokens": vocab.tokens(ids),
            "ids": ids,
            "words": words + [None] * (len(ids) - len(words)),
            "unknown": [id == UNK for id in ids],
        }

    def encoder(self, reading: anatomy.Reading, pieces: int) -> dict[str, Any]:
        """What was read, layer by layer, and what is remembered of it."""
        ways = [
            {
                "layer": number,
                "direction": ("forward", "backward")[backward],
                **self._layer(way, lambda leaf: leaf[0, :pieces]),
            }
            for number, layer in enumerate(reading.layers)
            for backward, way in enumerate(layer)
        ]
        parts = len(reading.layers[-1])
        return {
            "embedding": Units(reading.embedding_BSE[0, :pieces]),
            "layers": ways,
            "memory": Units(reading.memory.memory_BSM[0, :pieces], parts),
            "summary": Units(reading.memory.summary_BM[0], parts),
        }

    def _layer(self, layer: anatomy.Layer, at: Any) -> dict[str, Any]:
        names = CELLS[self.cfg.model.cell].gate_names
        told: dict[str, Any] = {}
        if names:
            told["gates"] = {name: Units(at(gate)) for name, gate in zip(names, layer.gates, strict=True)}
        return told | {
            name: Units(at(leaf)) for name, leaf in zip(("state", "cell"), layer.state, strict=False)
        }

    def bridge(self, reading: anatomy.Reading) -> dict[str, Any]:
        """What the decoder starts from."""
        model = self.cfg.model
        parts = len(reading.layers[-1])
        beside = model.encoder_depth == model.layers

        def told(state: Any, parts: int) -> dict[str, Any]:
            return {name: Units(leaf[0], parts) for name, leaf in zip(("state", "cell"), state, strict=False)}

        return {
            "kind": model.bridge,
            "from": [
                None if model.bridge == "zero" else layer if beside else model.encoder_depth - 1
                for layer in range(model.layers)
            ],
            "read": [told(state, parts) for state in reading.memory.states],
            # Copied, a state is the encoder's, directions joined.
            "states": [told(state, parts if model.bridge == "copy" else 1) for state in reading.first],
        }

    def walk(self, walk: Walk, way: Passed, source: list[int]) -> dict[str, Any]:
        """An output, step by step in the order of the equations."""
        vocab = self.vocabs.target
        total = sum(log_prob(way, t, id) for t, id in enumerate(walk.ids))
        pieces = len(source)
        steps = []
        for t, (read, chosen) in enumerate(zip([BOS, *walk.ids], walk.ids, strict=False)):
            moment = way.moments[t]
            step: dict[str, Any] = {
                "t": t,
                "read": self.piece(read),
                "embedding": Units(moment.embedding_BKE[0, 0]),
                "layers": [self._layer(layer, lambda leaf: leaf[0, 0]) for layer in moment.layers],
            }
            if moment.scores_BKS is not None:
                step["scores"] = moment.scores_BKS[0, 0, :pieces]
                step["weights"] = moment.align_BKS[0, 0, :pieces]
            if moment.context_BKM.shape[-1]:
                step["context"] = Units(moment.context_BKM[0, 0], 1 + self.cfg.model.bidirectional)
            step["attentional"] = Units(moment.attentional_BKH[0, 0])
            if moment.output_BKE.shape[-1] != moment.attentional_BKH.shape[-1]:
                step["projected"] = Units(moment.output_BKE[0, 0])
            step["log_total"] = short(way.totals[t])
            step["top"] = self.top(way, t, TOP)
            step["chosen"] = self.choice(moment.logits_BKV[0, 0], way.totals[t], chosen)
            steps.append(step)
        return {
            "name": walk.name,
            "text": vocab.decode(walk.ids),
            "log_prob": short(total),
            "score": short(total if walk.score is None else walk.score),
            **self.pieces(vocab, walk.ids),
            "hard": self._hard(walk.ids, way, source),
            "steps": steps,
        }

    def _hard(self, ids: list[int], way: Passed, source: list[int]) -> list[Link]:
        """The strongest position of each piece; end marks neither look nor are looked at."""
        if not any(moment.align_BKS.any() for moment in way.moments):
            return []
        ends = len(source) - 1
        return [
            (int(np.argmax(way.moments[t].align_BKS[0, 0, :ends])), t)
            for t, id in enumerate(ids)
            if id != EOS
        ]

    def gold(self, gold: Sequence[Link], walk: int, target: list[int], source: list[int]) -> dict[str, Any]:
        """Links between words as links between their pieces."""
        sides = self.vocabs.source.word_numbers(source), self.vocabs.target.word_numbers(target)
        for link in gold:
            for word, words, side in zip(link, sides, ("source", "target"), strict=True):
                if word not in words:
                    raise ExplanationError(
                        f"the alignment {link[0]}-{link[1]} names word {word} of the {side}, which has "
                        f"words 0 to {max(words, default=-1)}"
                    )
        wanted = set(gold)
        links = [
            (s, t)
            for t, target_word in enumerate(sides[1])
            for s, source_word in enumerate(sides[0])
            if (source_word, target_word) in wanted
        ]
        return {"walk": walk, "links": links}

    def tree(self, tree: Tree) -> dict[str, Any]:
        """A search: every candidate looked at."""
        winning = {0, *tree.path(tree.ends[0])}
        nodes = []
        for number, node in enumerate(tree.nodes):
            told: dict[str, Any] = {
                "id": number,
                "parent": node.parent,
                "t": node.t,
                "token": self.piece(node.token),
                "log_prob": short(node.log_prob),
                "total": short(node.total),
                "kept": node.kept,
                "finished": node.score is not None,
                "rank": node.rank,
                "best": number in winning,
            }
            if node.score is not None:
                told |= {"score": short(node.score), "text": self.vocabs.target.decode(tree.tokens(number))}
            nodes.append(told)
        return {
            "width": self.search.beam,
            "length_penalty": self.search.length_penalty if self.search.name == "beam" else 0.0,
            "coverage_penalty": self.search.coverage_penalty if self.search.name == "beam" else 0.0,
            "best": tree.ends[0],
            "nodes": nodes,
        }

    def light(self, choice: dict[str, Any], align_S: Any) -> dict[str, Any]:
        """A step of which only the choice matters, and where the model looked."""
        chosen = {name: choice[name] for name in ("id", "token", "prob")}
        return {"chosen": chosen} | ({"weights": align_S} if align_S.any() else {})

    def piece(self, id: int) -> dict[str, Any]:
        """An id of the target side, and what it stands for."""
        return {"id": id, "token": self.vocabs.target.tokens([id])[0]}

    def top(self, way: Passed, t: int, count: int) -> list[dict[str, Any]]:
        """The likeliest words of a step, best first."""
        logits_V = way.moments[t].logits_BKV[0, 0]
        allowed_V = producible(logits_V)
        best = np.argsort(-allowed_V, kind="stable")[:count]
        return [self.choice(logits_V, way.totals[t], int(id)) for id in best if np.isfinite(allowed_V[id])]

    def choice(self, logits_V: Any, total: float, id: int) -> dict[str, Any]:
        """A word at a step: its probability, and how many words are likelier."""
        logit = float(logits_V[id])
        return {
            **self.piece(id),
            "prob": short(math.exp(logit - total)),
            "logit": short(logit),
            "rank": int((producible(logits_V) > logit).sum()),
        }


def log_prob(way: Passed, t: int, id: int) -> float:
    """Of a word at a step, in nats."""
    return float(way.moments[t].logits_BKV[0, 0, id]) - way.totals[t]


def producible(logits_V: Any, *, may_end: bool = True) -> np.ndarray:
    """The logits, -inf where no search would go."""
    allowed_V = np.array(logits_V, np.float64)
    allowed_V[[PAD, BOS] if may_end else [PAD, BOS, EOS]] = -np.inf
    return allowed_V


def short(value: float) -> float:
    """What a float32 knows, in as few digits."""
    return float(f"{value:.8g}")
