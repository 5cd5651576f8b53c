"""The translator: many lines, however they are batched and wherever they are searched."""

import dataclasses

import numpy as np
import pytest

from s2s.translator import Translator
from s2s.workdir import Workdir

LETTERS = "a b c d e f g h i j k l m n o p".split()


@pytest.fixture(scope="module")
def lines():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(LETTERS, rng.integers(1, 20))) for _ in range(90)] + ["", " "]


@pytest.mark.parametrize("name", ["greedy", "beam", "sample"])
def test_sentences_that_wait_are_translated_as_alone(trained, lines, name):
    cfg, vocabs, graphdef, params = Workdir(trained).load()
    wide = dataclasses.replace(cfg.search, name=name, beam=1 if name == "greedy" else 3, batch_sentences=128)
    narrow = dataclasses.replace(wide, batch_sentences=2)
    wanted = 1 if name == "greedy" else 2
    whole, few = (
        Translator(graphdef, vocabs, search, n_best=wanted)(params, lines) for search in (wide, narrow)
    )
    assert [one.text for one in whole[-2:]] == ["", ""]
    for one, other in zip(whole, few, strict=True):
        assert one.source_ids == other.source_ids
        assert [h.ids for h in one.hypotheses] == [h.ids for h in other.hypotheses]
        for left, right in zip(one.hypotheses, other.hypotheses, strict=True):
            np.testing.assert_allclose(left.score, right.score, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(left.align_TS, right.align_TS, atol=1e-4)


def test_few_programs_serve_many_lengths(trained, lines):
    cfg, vocabs, graphdef, params = Workdir(trained).load()
    search = Translator(graphdef, vocabs, dataclasses.replace(cfg.search, batch_sentences=16))
    for begin in range(0, 90, 30):
        search(params, lines[begin : begin + 30])
    search(params, lines)
    assert sum(program._cache_size() for program in search._programs.values()) <= 4
