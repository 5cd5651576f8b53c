"""An explanation tells what the model does: its numbers are those of search and of forced decoding."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
from flax import nnx

from s2s.batch import EOS, UNK, Batch
from s2s.config import Config, ModelConfig, SearchConfig
from s2s.data.vocab import SymbolVocabulary, Vocabularies
from s2s.explain.explanation import MOST_PIECES, Explainer, explain
from s2s.explain.packing import BUDGET, Units, as_json, pack, unpack
from s2s.explain.telling import ExplanationError
from s2s.learn import step as step_lib
from s2s.likelihood import forced
from s2s.nn.seq2seq import Seq2Seq
from s2s.translator import Translator
from tests.model_variants import perturbed, quick_jit

VOCABS = Vocabularies(SymbolVocabulary("abcde", " "), SymbolVocabulary("uvwxyz", " "))
MODELS = {
    "attentive": ModelConfig(
        embedding=4, hidden=6, layers=2, attention="general", input_feeding=True, cell="gru", bridge="copy"
    ),
    "blind": ModelConfig(embedding=4, hidden=6, attention="none", bidirectional=False),
    "tied": ModelConfig(embedding=4, hidden=6, attention="fixed", tie="target", bridge="zero"),
}
SEARCH = SearchConfig(
    name="beam", beam=3, length_penalty=0.7, max_length_factor=1.0, max_length_extra=3, min_length=2
)


class Model:
    """A model that has learned nothing, and everything to look at it with."""

    def __init__(self, cfg: ModelConfig, search: SearchConfig = SEARCH):
        model = Seq2Seq(cfg, VOCABS.source.size, VOCABS.target.size, rngs=nnx.Rngs(1))
        self.graphdef, params = step_lib.split(model)
        self.params = perturbed(params, seed=5)
        self.search = search
        self._forced = quick_jit(functools.partial(forced, self.graphdef))
        self.explainer = Explainer(
            Config(name="x", model=cfg), VOCABS, self.graphdef, self.params, search, workdir="w"
        )

    def forced(self, source: list[int], target: list[int]):
        """Log-probability of every target token and the weights, as `s2s.score` gives them."""
        room = np.zeros((1, 9), np.int32)
        room[0, : len(target)] = target
        lengths = (np.array([len(ids)], np.int32) for ids in (source, target))
        batch = Batch(np.array([source], np.int32), next(lengths), room, next(lengths), np.zeros(1, np.int32))
        log_probs, align = self._forced(self.params, batch)
        return np.asarray(log_probs)[0, : len(target)], np.asarray(align)[0, : len(target)]


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    model = Model(MODELS[request.param])
    return model, model.explainer("b a d a c", reference="u x z", gold=[(0, 0), (4, 2)])


def test_walks_are_what_the_search_finds_and_what_scoring_says(case):
    model, told = case
    assert told["walks"][0]["name"] == "best"
    assert told["reference"] == len(told["walks"]) - 1 and told["walks"][-1]["text"] == "u x z"
    for walk in told["walks"]:
        log_probs, align_TS = model.forced(told["source"]["ids"], walk["ids"])
        np.testing.assert_allclose(walk["log_prob"], log_probs.sum(), rtol=1e-5)
        assert [step["t"] for step in walk["steps"]] == list(range(len(walk["ids"])))
        assert [step["read"]["id"] for step in walk["steps"]] == [1, *walk["ids"][:-1]]
        assert ("weights" in walk["steps"][0]) == bool(align_TS.any()) == bool(walk["hard"])
        for step, log_prob, align_S in zip(walk["steps"], log_probs, align_TS, strict=True):
            assert math.isclose(step["chosen"]["prob"], math.exp(log_prob), rel_tol=1e-4)
            for choice in step["top"]:
                again = math.exp(choice["logit"] - step["log_total"])
                assert math.isclose(choice["prob"], again, rel_tol=1e-5, abs_tol=1e-9)
            assert [choice["rank"] for choice in step["top"]] == list(range(len(step["top"])))
            assert step["top"][step["chosen"]["rank"]] == step["chosen"]
            if align_S.any():
                np.testing.assert_allclose(step["weights"], align_S, atol=1e-6)
        for s, t in walk["hard"]:
            assert s == np.argmax(align_TS[t, :-1])


def test_the_best_is_what_translating_gives():
    model = Model(MODELS["attentive"])
    best = model.explainer("b a d a c")["walks"][0]
    (translation,) = Translator(model.graphdef, VOCABS, model.search)(model.params, ["b a d a c"])
    (found,) = translation.hypotheses
    assert best["ids"] == found.ids and best["text"] == found.text
    np.testing.assert_allclose([best["score"], best["log_prob"]], [found.score, found.log_prob], rtol=1e-5)


def test_vectors_are_those_of_the_model(case):
    model, told = case
    cfg, sizes = model.explainer.cfg.model, told["sizes"]
    S, source = sizes["S"], told["source"]
    assert S == 6 and len(source["tokens"]) == 6 and source["words"] == [0, 1, 2, 3, 4, None]
    table_VE = np.asarray(model.params["source_embedding"])
    np.testing.assert_array_equal(told["encoder"]["embedding"].array, table_VE[source["ids"]])
    top = [way for way in told["encoder"]["layers"] if way["layer"] == cfg.encoder_depth - 1]
    joined = np.concatenate([way["state"].array for way in top], axis=1)
    np.testing.assert_allclose(joined, told["encoder"]["memory"].array, atol=1e-6)
    assert len(told["hand_over"]["states"]) == len(told["hand_over"]["from"]) == cfg.layers
    W_c = np.asarray(model.params["decoder"]["attentional_kernel"])
    for step in told["walks"][0]["steps"]:
        assert len(step["layers"]) == cfg.layers
        s_t = step["layers"][-1]["state"].array
        read = np.concatenate([step["context"].array, s_t]) if "context" in step else s_t
        np.testing.assert_allclose(step["attentional"].array, np.tanh(read @ W_c), atol=1e-6)
        assert ("projected" in step) == (cfg.tie != "none")
        assert set(step["layers"][0]["gates"]) == set(told["gate_names"])


def test_what_if_goes_on_from_the_other_word_as_the_model_would(case):
    model, told = case
    best = told["walks"][0]
    limit = 6 + 3
    assert told["what_if"]
    for other in told["what_if"]:
        own = [step["chosen"]["id"] for step in other["steps"]]
        assert own[0] == other["token"]["id"] != best["ids"][other["t"]] and own[-1] == EOS
        ids = [*best["ids"][: other["t"]], *own]
        assert len(ids) <= limit and other["text"] == VOCABS.target.decode(ids)
        assert len(ids) > SEARCH.min_length
        assert all(set(step["chosen"]) == {"id", "token", "prob"} for step in other["steps"])
    for other in told["what_if"][::7]:
        ids = [*best["ids"][: other["t"]], *(step["chosen"]["id"] for step in other["steps"])]
        log_probs, align_TS = model.forced(told["source"]["ids"], ids)
        np.testing.assert_allclose(other["log_prob"], log_probs.sum(), rtol=1e-5)
        probs = [step["chosen"]["prob"] for step in other["steps"]]
        np.testing.assert_allclose(probs, np.exp(log_probs[other["t"] :]), rtol=1e-4)
        # The likeliest word follows: no other in its place makes the same beginning likelier.
        for t in range(other["t"] + 1, min(len(ids), limit - 1)):
            for id in range(EOS if t >= SEARCH.min_length else UNK, VOCABS.target.size):
                instead, _ = model.forced(told["source"]["ids"], [*ids[:t], id])
                assert instead[t] <= log_probs[t] + 1e-5
        if align_TS.any():
            weights = [step["weights"] for step in other["steps"]]
            np.testing.assert_allclose(weights, align_TS[other["t"] :], atol=1e-6)


def test_the_tree_is_told_whole(case):
    _, told = case
    nodes = told["beam"]["nodes"]
    end = nodes[told["beam"]["best"]]
    ids = [end["token"]["id"]]
    while nodes[end["parent"]]["parent"] is not None:
        end = nodes[end["parent"]]
        ids.insert(0, end["token"]["id"])
    assert ids == told["walks"][0]["ids"]
    assert sum(node["best"] for node in nodes) == len(ids) + 1
    assert all(("score" in node) == node["finished"] for node in nodes)


def test_links_of_words_become_links_of_pieces(case):
    _, told = case
    assert told["gold"] == {"walk": told["reference"], "links": [(0, 0), (4, 2)]}


def test_greedy_search_has_one_walk():
    model = Model(MODELS["blind"], dataclasses.replace(SEARCH, name="greedy", beam=1))
    told = model.explainer("a b")
    assert [walk["name"] for walk in told["walks"]] == ["greedy"] and told["reference"] is None
    assert all(step["chosen"]["rank"] == 0 for step in told["walks"][0]["steps"][:-1])
    again = model.explainer("a b", reference=told["walks"][0]["text"])
    assert len(again["walks"]) == 1 and again["reference"] == 0


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (" \t", {}, "the text is empty"),
        ("a", {"reference": ""}, "the reference is empty"),
        (
            "a " * MOST_PIECES,
            {},
            f"has {MOST_PIECES + 1} pieces for w, and a page shows at most {MOST_PIECES}",
        ),
        (
            "a b",
            {"reference": "u", "gold": [(2, 0)]},
            "2-0 names word 2 of the source, which has words 0 to 1",
        ),
        (
            "a b",
            {"reference": "u", "gold": [(0, 1)]},
            "0-1 names word 1 of the target, which has words 0 to 0",
        ),
    ],
)
def test_what_cannot_be_explained_is_refused_with_a_reason(text, options, message):
    with pytest.raises(ExplanationError, match=message):
        BLIND.explainer(text, **options)


def test_samples_are_refused():
    with pytest.raises(ExplanationError, match="give --beam"):
        Model(MODELS["blind"], SearchConfig(name="sample"))


def test_unknown_symbols_are_told():
    told = explain([BLIND.explainer], "a <script> ب")
    source = told["models"][0]["source"]
    assert source["unknown"] == [False, True, True, False] and source["ids"][1] == UNK
    assert json.loads(json.dumps(told, allow_nan=False)) == told


BLIND = Model(MODELS["blind"])


def test_arrays_survive_packing():
    numbers = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    told = {"models": [{"gates": {"a": Units(numbers, 2)}, "b": numbers, "what_if": [{"weights": numbers}]}]}
    packed = pack(told)
    assert packed["left_out"] == [] and packed["units_shown"] is None and packed["digits"] == 6
    np.testing.assert_array_equal(unpack(packed["models"][0]["gates"]["a"]), numbers)
    np.testing.assert_array_equal(unpack(packed["models"][0]["what_if"][0]["weights"]), numbers)
    half = pack(told, budget=len(as_json(packed)) - 100)
    assert half["left_out"] == ["precision"] and half["digits"] == 3
    np.testing.assert_allclose(unpack(half["models"][0]["gates"]["a"]), numbers, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(unpack(half["models"][0]["b"]), numbers)
    small = pack(told, budget=0)
    assert small["left_out"] == ["precision", "what_if weights", "units", "gates", "what_if"]
    assert "gates" not in small["models"][0] and small["models"][0]["what_if"] == []


def test_thinned_vectors_keep_the_first_units_of_each_direction():
    numbers = np.arange(400, dtype=np.float32).reshape(2, 200)
    told = {"models": [{"memory": Units(numbers, 2), "noise": "x" * 700}]}
    packed = pack(told, budget=1700)
    shown = packed["units_shown"]
    assert shown == 64 and "units" in packed["left_out"]
    kept = unpack(packed["models"][0]["memory"])
    np.testing.assert_array_equal(kept, np.concatenate([numbers[:, :64], numbers[:, 100:164]], axis=1))


def test_large_models_stay_within_a_page():
    rng = np.random.default_rng(0)

    def vectors(*shape):
        return Units(rng.normal(size=shape), 1)

    S = T = 40
    layer = {"gates": {name: vectors(S, 512) for name in "ifog"}, "state": vectors(S, 512)}
    steps = [{**layer, "weights": rng.random(S)} for _ in range(T // 10)]
    told = {"models": [{"encoder": {"layers": [layer] * 4}, "walks": [{"steps": steps}], "what_if": []}]}
    packed = pack(told)
    assert len(as_json(packed)) <= BUDGET and packed["left_out"]
