"""An explanation: what a model does with one sentence, number by number, as plain data.

Decides what is told: which walks, which alternatives, how much of a search. Must not know how it
looks (a page, a picture and a film are made of it) nor compute an equation: `s2s.nn.anatomy` asks the
model, `s2s.search.tree` searches. Positions, layers, words and ranks count from 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from s2s import __version__
from s2s.batch import BOS, EOS, PAD, Batch
from s2s.config import Config, SearchConfig
from s2s.data.vocab import Vocabularies, Vocabulary
from s2s.ensemble import assemble
from s2s.explain.packing import pack
from s2s.explain.telling import ExplanationError, Link, Passed, Teller, Walk, log_prob, producible, short
from s2s.learn import step as step_lib
from s2s.nn import anatomy
from s2s.search.pick import survey
from s2s.search.tree import Tree, beam_tree

# A longer sentence makes a page that nobody can look through.
MOST_PIECES = 120
# Up to so many steps, how many other words are followed at each: all of it has to fit a page.
_FOLLOWED = ((16, 4), (32, 2), (64, 1))
# Source lengths are padded to a multiple of this, so that few programs are compiled.
_SHAPE = 8


def explain(
    explainers: Sequence[Explainer],
    text: str,
    *,
    reference: str | None = None,
    gold: Sequence[Link] | None = None,
    budget: int | None = None,
) -> dict[str, Any]:
    """What several models do with one sentence, ready for JSON.

    Args:
      explainers: the models.
      text: the source sentence.
      reference: its true translation, to be walked through as well.
      gold: its true alignment, pairs of source and target words.
      budget: bytes of JSON to stay under, as in `s2s.explain.packing.pack`; what that costs is told in
        ``left_out``.

    Returns:
      A dict of what JSON knows. Vectors are {"shape", "f32" or "f16"}, base64 of little-endian floats.

    Raises:
      ExplanationError: as `Explainer.__call__`.
    """
    told: dict[str, Any] = {"format": 1, "version": __version__, "text": text}
    if reference is not None:
        told["reference"] = reference
    told["models"] = [one(text, reference=reference, gold=gold) for one in explainers]
    return pack(told, budget)


class Explainer:
    """A model ready to be looked at; compiled once a source length class.

    Args:
      cfg: the run's configuration.
      vocabs: its vocabularies.
      graphdef: the model's structure (`s2s.learn.step`).
      params: its parameters.
      search: greedy or beam search; samples are nothing to explain.
      workdir: the name of its work directory.

    Raises:
      ExplanationError: ``search`` samples.
    """

    def __init__(
        self,
        cfg: Config,
        vocabs: Vocabularies,
        graphdef: Any,
        params: Any,
        search: SearchConfig,
        *,
        workdir: str,
    ):
        if search.name == "sample":
            raise ExplanationError("an explanation needs greedy or beam search, not sampling: give --beam 5")
        self.cfg, self.vocabs, self.search, self.workdir = cfg, vocabs, search, workdir
        self._params = params
        count = step_lib.parameter_count(params)
        self._tell = Teller(cfg, vocabs, search, workdir=workdir, parameters=count)
        self._read = jax.jit(lambda params, batch: _read(step_lib.merge(graphdef, params), batch))
        self._step = jax.jit(lambda params, *rest: _step(step_lib.merge(graphdef, params), *rest))
        self._advance = jax.jit(lambda params, *rest: assemble(graphdef, params).advance(*rest))

    def __call__(
        self, text: str, *, reference: str | None = None, gold: Sequence[Link] | None = None
    ) -> dict[str, Any]:
        """All about one sentence: one of the ``models`` of `explain`, vectors still NumPy arrays.

        Raises:
          ExplanationError: nothing to read, or too much; or an alignment of words that are not there.
        """
        ids = self._ids(self.vocabs.source, text, "text")
        batch = _one_sentence(ids)
        reading, first = self._read(self._params, batch)
        tree = self._searched(self.search, batch, reading.memory, first)
        if not tree.ends:
            raise ExplanationError(f"{self.workdir} finds no output for {text!r}")
        walks = [Walk("best", tree.tokens(tree.ends[0]), tree.nodes[tree.ends[0]].score)]
        if self.search.beam == 1:
            walks = [walks[0]._replace(name="greedy")]
        else:
            greedy = dataclasses.replace(self.search, name="greedy", beam=1)
            other = self._searched(greedy, batch, reading.memory, first)
            for end in other.ends:
                if other.tokens(end) != walks[0].ids:
                    walks.append(Walk("greedy", other.tokens(end), other.nodes[end].score))
        true = None
        if reference is not None:
            true_ids = self._ids(self.vocabs.target, reference, "reference")
            if true_ids not in [walk.ids for walk in walks]:
                walks.append(Walk("reference", true_ids, None))
            true = [walk.ids for walk in walks].index(true_ids)
        passed = [self._walked(reading.memory, first, walk.ids) for walk in walks]
        told = [self._tell.walk(walk, way, ids) for walk, way in zip(walks, passed, strict=True)]
        return {
            **self._tell.about(len(ids), len(walks[0].ids)),
            "source": {"kind": "tokens", "text": text, **self._tell.pieces(self.vocabs.source, ids)},
            "encoder": self._tell.encoder(reading, len(ids)),
            "hand_over": self._tell.bridge(reading),
            "walks": told,
            "reference": true,
            "gold": None if gold is None else self._tell.gold(gold, true or 0, walks[true or 0].ids, ids),
            "beam": self._tell.tree(tree),
            "what_if": self._what_if(walks[0].ids, passed[0], reading.memory, len(ids)),
        }

    def _ids(self, vocab: Vocabulary, text: str, name: str) -> list[int]:
        if not text.strip():
            raise ExplanationError(f"the {name} is empty: give at least one word")
        ids = [*vocab.encode(text), EOS]
        if len(ids) == 1:
            raise ExplanationError(f"the vocabulary of {self.workdir} finds no piece in the {name} {text!r}")
        if len(ids) > MOST_PIECES:
            raise ExplanationError(
                f"the {name} has {len(ids)} pieces for {self.workdir}, and a page shows at most "
                f"{MOST_PIECES}: give a shorter one"
            )
        return ids

    def _searched(self, search: SearchConfig, batch: Batch, memory: Any, first: Any) -> Tree:
        def advance(memory: Any, state: Any, token_NK: jax.Array) -> Any:
            return self._advance(self._params, memory, state, token_NK)

        # Greedy search ranks nothing.
        ranked = search.name == "beam"
        return beam_tree(
            advance,
            memory,
            first,
            beam=search.beam,
            limit=self._limit(int(batch.source_length_B[0])),
            source_mask_BS=batch.source_mask_BS,
            min_length=search.min_length,
            length_penalty=search.length_penalty if ranked else 0.0,
            coverage_penalty=search.coverage_penalty if ranked else 0.0,
        )

    def _limit(self, pieces: int) -> int:
        """Most target tokens, EOS included, as `s2s.translator` has it."""
        return math.ceil(self.search.max_length_factor * pieces) + self.search.max_length_extra

    def _walked(self, memory: Any, state: Any, ids: Sequence[int]) -> Passed:
        way = Passed([], [], [])
        for token in [BOS, *ids[:-1]]:
            state, moment, total = self._step(self._params, memory, state, jnp.full((1, 1), token, jnp.int32))
            way.states.append(state)
            way.moments.append(jax.tree.map(np.asarray, moment))
            way.totals.append(float(total[0, 0]))
        return way

    def _what_if(self, ids: list[int], way: Passed, memory: Any, pieces: int) -> list[dict[str, Any]]:
        """Other words at each step, and where they lead: the likeliest word from there on."""
        follow = next((number for steps, number in _FOLLOWED if len(ids) <= steps), 0)
        limit = self._limit(pieces)
        asked: list[tuple[int, dict[str, Any]]] = []
        for t, chosen in enumerate(ids):
            others = [other for other in self._tell.top(way, t, follow + 1) if other["id"] != chosen]
            asked += [
                (t, other)
                for other in others[:follow]
                if (t >= self.search.min_length if other["id"] == EOS else t + 1 < limit)
            ]
        if not asked:
            return []
        # A row each, a power of two of them: few programs.
        rows = asked + [asked[-1]] * ((1 << (len(asked) - 1).bit_length()) - len(asked))
        state = jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves, axis=1), *(way.states[t] for t, _ in rows)
        )
        token_NK = np.array([[other["id"] for _, other in rows]], np.int32)
        before = np.cumsum([0.0, *(log_prob(way, t, id) for t, id in enumerate(ids))])
        log_probs = [float(before[t]) + log_prob(way, t, other["id"]) for t, other in asked]
        found: list[dict[str, Any]] = [
            {
                "walk": 0,
                "t": t,
                "token": other,
                "steps": [self._tell.light(other, way.moments[t].align_BKS[0, 0, :pieces])],
            }
            for t, other in asked
        ]
        while (token_NK[0, : len(asked)] != EOS).any():
            state, next_NK, align_NKS = self._advance(self._params, memory, state, jnp.asarray(token_NK))
            logits_KV, total_K, align_KS = (np.asarray(x)[0] for x in (*next_NK[:2], align_NKS))
            for row, one in enumerate(found):
                if token_NK[0, row] == EOS:
                    continue
                t = one["t"] + len(one["steps"])
                may_end = t >= self.search.min_length
                best = int(np.argmax(producible(logits_KV[row], may_end=may_end)))
                id = EOS if t + 1 >= limit else best
                token_NK[0, row] = id
                log_probs[row] += float(logits_KV[row, id]) - float(total_K[row])
                choice = self._tell.choice(logits_KV[row], float(total_K[row]), id)
                one["steps"].append(self._tell.light(choice, align_KS[row, :pieces]))
        for one, total in zip(found, log_probs, strict=True):
            own = [step["chosen"]["id"] for step in one["steps"]]
            one |= {"text": self.vocabs.target.decode([*ids[: one["t"]], *own]), "log_prob": short(total)}
        return found


def _read(model: Any, batch: Batch) -> tuple[anatomy.Reading, Any]:
    reading = anatomy.read(model, batch)
    return reading, model.start(reading.memory, 1)


def _step(model: Any, memory: Any, state: Any, token_BK: jax.Array) -> Any:
    state, moment = anatomy.step(model, memory, state, token_BK)
    return state, moment, survey(moment.logits_BKV).total


def _one_sentence(ids: list[int]) -> Batch:
    source_BS = np.full((1, -(-len(ids) // _SHAPE) * _SHAPE), PAD, np.int32)
    source_BS[0, : len(ids)] = ids
    one, none = np.array([len(ids)], np.int32), np.zeros(1, np.int32)
    return Batch(source_BS, one, np.zeros((1, 1), np.int32), none, none)
