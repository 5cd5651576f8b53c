"""Several models that answer as one: laws over cells and attentions, and oracles in NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from s2s import ensemble, flags, translator
from s2s.batch import BOS, EOS, Batch
from s2s.config import SearchConfig
from s2s.data.vocab import SymbolVocabulary, Vocabularies
from s2s.ensemble import Ensemble, assemble, group
from s2s.learn import step as step_lib
from s2s.likelihood import forced
from s2s.nn.seq2seq import Seq2Seq
from s2s.search.pick import survey
from s2s.translator import Translator
from tests.model_variants import VARIANTS, VOCAB, make_batch, perturbed, quick_jit

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
BATCH = make_batch()
TOKENS_TBK = np.random.default_rng(1).integers(3, VOCAB, (2, 4, 2)).astype(np.int32)
VOCABS = Vocabularies(*[SymbolVocabulary("abcdefg", " ")] * 2)
TEXTS = ["a b c", "g", "b b f d e a", "", "c d", "e e g a", "f", "d a a b"]


@functools.cache
def model(name, seed, dtype=jnp.float32):
    """Graph definition and parameters of a variant; in double precision, ask for it with x64 on."""
    drawn = Seq2Seq(VARIANTS[name], VOCAB, VOCAB, rngs=nnx.Rngs(seed), dtype=dtype, param_dtype=dtype)
    graphdef, params = step_lib.split(drawn)
    return graphdef, perturbed(params, seed)


def together(*models, combination="mean"):
    graphdefs, params = group(models)
    return Ensemble(graphdefs, combination), params


@functools.cache
def walker(structure):
    @quick_jit
    def run(params, batch, token_TBK):
        speaker = assemble(structure, params)
        memory = speaker.encode(batch)
        state = jax.tree.map(lambda x: jnp.repeat(x, token_TBK.shape[2], axis=1), speaker.start(memory))
        # The first tokens are read, the others looked up.
        gates, found = None, []
        for token_BK in token_TBK:
            state, next_BK, align_BKS = speaker.advance(memory, state, token_BK, gates)
            found.append((next_BK.logits - next_BK.total[..., None], align_BKS))
            gates = speaker.read_all() if gates is None else gates
        for leaf in jax.tree.leaves(memory):
            assert leaf.shape[0] == 4
        for leaf in jax.tree.leaves(state):
            assert leaf.shape[:2] == token_TBK.shape[1:]
        return tuple(map(jnp.stack, zip(*found, strict=True)))

    return run


def walk(structure, params, token_TBK=TOKENS_TBK):
    """Log-probabilities and attention of hypotheses that read these tokens: [T, B, K, V], [T, B, K, S]."""
    return jax.tree.map(np.asarray, walker(structure)(params, BATCH, token_TBK))


def oracle(log_probs, combination):
    """From each member's log-probabilities, in the plainest way."""
    if combination == "mean":
        return np.log(np.mean([np.exp(one) for one in log_probs], axis=0))
    product = np.prod([np.exp(one) for one in log_probs], axis=0) ** (1 / len(log_probs))
    return np.log(product / product.sum(-1, keepdims=True))


def attention_oracle(names, aligns):
    own = [
        a for name, a in zip(names, aligns, strict=True) if VARIANTS[name].attention not in ("none", "fixed")
    ]
    return np.mean(own, axis=0) if own else np.zeros_like(aligns[0])


def test_every_combination_has_its_flag():
    parser = flags.argparse.ArgumentParser()
    flags.add_model_flags(parser)
    (action,) = (one for one in parser._actions if one.dest == "combine")
    assert list(action.choices) == list(ensemble.COMBINATIONS)


@pytest.mark.parametrize("combination", ensemble.COMBINATIONS)
def test_combinations_are_distributions_of_any_sharpness(combination, x64):
    noise_R = np.random.default_rng(0).normal(size=(3, 4, 70))
    for sharpness in ((1, 2, 3), (1, 10, 60), (1, 30, 3000)):
        logits_R = noise_R * np.array(sharpness)[:, None, None]
        logits, total, _ = ensemble.COMBINATIONS[combination](survey(jnp.asarray(logits_R)))
        assert np.isfinite(logits).all(), "no probability is rounded to nothing"
        np.testing.assert_allclose(np.exp(logits - total[..., None]).sum(-1), 1, **CLOSE)
        if sharpness[-1] < 100:
            expected = oracle(np.asarray(jax.nn.log_softmax(logits_R)), combination)
            np.testing.assert_allclose(logits - total[..., None], expected, **CLOSE)


def test_what_is_impossible():
    logits_R = jnp.log(jnp.asarray([[0.5, 0.5, 0.0], [0.25, 0.0, 0.0]]))
    for combination, expected in (("mean", [0.75, 0.25, 0.0]), ("geometric", [1.0, 0.0, 0.0])):
        logits, total, _ = ensemble.COMBINATIONS[combination](survey(logits_R))
        np.testing.assert_allclose(np.exp(logits - total), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["none", "fixed", "dot", "general", "concat-feeding", "gru-copy", "tanh-zero", "relu-dense", "tie-all"],
)
def test_an_ensemble_is_the_mean_of_its_members(name, x64):
    """Two models stacked, and one of another structure between them."""
    names = [name, "none" if name == "dot" else "dot", name]
    models = [model(one, seed, jnp.float64) for seed, one in enumerate(names)]
    alone = [walk(*one) for one in models]
    structure, params = together(*models)
    assert len(structure.graphdefs) == 2 and ensemble.members(structure, params) == 3
    log_probs, align = walk(structure, params)
    np.testing.assert_allclose(log_probs, oracle([one for one, _ in alone], "mean"), **CLOSE)
    np.testing.assert_allclose(align, attention_oracle(names, [one for _, one in alone]), **CLOSE)


@pytest.mark.parametrize("combination", ensemble.COMBINATIONS)
def test_laws_of_ensembles(combination, x64):
    own, other, third = (model(*one, jnp.float64) for one in (("concat", 1), ("gru-copy", 2), ("concat", 3)))
    alone = walk(*own)
    for models in ([own], [own, own]):
        for one, expected in zip(walk(*together(*models, combination=combination)), alone, strict=True):
            np.testing.assert_allclose(one, expected, **CLOSE)
    members = [own, other, third]
    expected = walk(*together(*members, combination=combination))
    np.testing.assert_allclose(expected[0], oracle([walk(*one)[0] for one in members], combination), **CLOSE)
    mixed = walk(*together(other, third, own, combination=combination))
    for one, same in zip(mixed, expected, strict=True):
        np.testing.assert_allclose(one, same, **CLOSE)


def test_forced_decoding_is_step_by_step(x64):
    members = [model(name, seed, jnp.float64) for seed, name in enumerate(("concat", "fixed", "concat"))]
    mask_BT, target_BT = BATCH.target_mask_BT, BATCH.target_BT.copy()
    for combination in ensemble.COMBINATIONS:
        structure, params = together(*members, combination=combination)
        for _ in range(2):
            read_BT = np.concatenate([np.full((4, 1), BOS, np.int32), target_BT[:, :-1]], axis=1)
            log_probs_TBKV, align_TBKS = walk(structure, params, read_BT.T[..., None])
            log_probs_BTV = np.swapaxes(log_probs_TBKV[:, :, 0], 0, 1)
            # Some are the likeliest.
            target_BT[0] = log_probs_BTV[0].argmax(-1)
        batch = BATCH._replace(target_BT=target_BT)
        speak = quick_jit(lambda params, batch, structure=structure: assemble(structure, params).sums(batch))
        token_BT, align_BTS = quick_jit(functools.partial(forced, structure))(params, batch)
        chosen_BT = np.take_along_axis(log_probs_BTV, target_BT[..., None], axis=2)[..., 0]
        np.testing.assert_allclose(token_BT, np.where(mask_BT, chosen_BT, 0), **CLOSE)
        align_BTS, expected_BTS = align_BTS[mask_BT], np.swapaxes(align_TBKS[:, :, 0], 0, 1)[mask_BT]
        np.testing.assert_allclose(align_BTS, expected_BTS, **CLOSE)
        sums = speak(params, batch)
        np.testing.assert_allclose(sums.nll, -np.sum(token_BT), **CLOSE)
        right = np.sum(mask_BT & (log_probs_BTV.argmax(-1) == target_BT))
        assert 0 < right < 9 and (sums.tokens, sums.correct, sums.loss) == (9, right, sums.nll)


def mixed_members():
    return [model("general-feeding", 4), model("lstm-copy", 5), model("general-feeding", 6)]


def same(found, expected):
    """The same translations, but for rounding."""
    for one, other in zip(found, expected, strict=True):
        assert [h.ids for h in one.hypotheses] == [h.ids for h in other.hypotheses]
        for left, right in zip(one.hypotheses, other.hypotheses, strict=True):
            np.testing.assert_allclose(left.token_log_probs, right.token_log_probs, atol=2e-5)
            np.testing.assert_allclose(left.align_TS, right.align_TS, atol=2e-5)


def test_searching_with_an_ensemble():
    """Beam 1 is greedy; the order of members and lines, and how many there are, change nothing."""
    members = mixed_members()
    structure, params = together(*members)
    greedy = Translator(structure, VOCABS, SearchConfig(name="greedy", beam=1))(params, TEXTS)
    assert greedy[3].text == "" and len({one.text for one in greedy}) > 4
    beam_1 = Translator(structure, VOCABS, SearchConfig(name="beam", beam=1))
    found = beam_1(params, TEXTS)
    same(found, greedy)
    same(beam_1(params, TEXTS[::-1])[::-1], found)
    same(beam_1(params, TEXTS[2:3]), found[2:3])
    turned, reordered = together(*members[::-1])
    same(Translator(turned, VOCABS, beam_1.cfg)(reordered, TEXTS), found)
    scores_agree(structure, params, found)


def test_a_geometric_ensemble_scores_what_it_found():
    structure, params = together(*mixed_members(), combination="geometric")
    found = Translator(structure, VOCABS, SearchConfig(name="beam", beam=3))(params, TEXTS)
    scores_agree(structure, params, found)


def scores_agree(structure, params, found):
    """Forced decoding of what was found gives what the search gave."""
    best = [one for one in found if one.hypotheses]
    source, target = ([one.source_ids for one in best], [one.hypotheses[0].ids for one in best])
    token_BT, align_BTS = quick_jit(functools.partial(forced, structure))(params, padded(source, target))
    for row, one in enumerate(best):
        (first, *_), (T, S) = one.hypotheses, one.hypotheses[0].align_TS.shape
        np.testing.assert_allclose(first.token_log_probs, token_BT[row, :T], atol=2e-5)
        np.testing.assert_allclose(first.log_prob, np.sum(token_BT[row, :T]), atol=2e-4)
        np.testing.assert_allclose(first.align_TS, align_BTS[row, :T, :S], atol=2e-5)


def padded(source, target):
    def side(ids):
        width = max(map(len, ids))
        return np.array([[*one, *[0] * (width - len(one))] for one in ids], np.int32)

    lengths = [np.array([len(one) for one in ids], np.int32) for ids in (source, target)]
    return Batch(side(source), lengths[0], side(target), lengths[1], np.arange(len(source), dtype=np.int32))


def test_models_searched_by_one_vmapped_program_are_searched_as_alone():
    """Each with its own sentences, of other numbers and lengths, so that their loops end apart."""
    cfg = SearchConfig(name="beam", beam=3, length_penalty=1.0)
    members = [model("general-feeding", seed) for seed in (4, 6, 7)]
    rng = np.random.default_rng(0)
    length_RB = rng.integers(1, 9, (3, 11)).astype(np.int32)
    length_RB[1, 4:] = length_RB[2] = 0
    length_RB[2, 0] = 2
    source_RBS = rng.integers(4, VOCAB, (3, 11, 8)).astype(np.int32)
    np.put_along_axis(source_RBS, np.maximum(length_RB - 1, 0)[..., None], EOS, axis=2)
    nothing = np.zeros((3, 11, 1), np.int32)
    batches = Batch(
        source_RBS, length_RB, nothing, nothing[..., 0], np.tile(np.arange(11, dtype=np.int32), (3, 1))
    )
    asked = jax.tree.map(
        jnp.asarray, (batches, np.where(length_RB > 0, 2 * length_RB + 3, 0).astype(np.int32))
    )

    decode = functools.partial(translator._decode, members[0][0], cfg, 1, 19, 4)
    (stacked,) = group(members)[1]
    together = jax.jit(jax.vmap(decode, in_axes=(0, 0, None)))(stacked, asked, jax.random.key(0))
    alone = jax.jit(decode)
    for number, (_, params) in enumerate(members):
        own = alone(params, jax.tree.map(lambda leaf, number=number: leaf[number], asked), jax.random.key(0))
        found = jax.tree.map(lambda leaf, number=number: leaf[number], together)
        np.testing.assert_array_equal(found.tokens_BKT, own.tokens_BKT)
        for one, other in zip(found, own, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    assert len(set(np.max(together.length_BK, axis=(1, 2)).tolist())) > 1


def test_models_of_other_sizes_are_not_stacked():
    small, large = model("dot", 0), model("dot", 1)
    graphdefs, stacks = group([small, large, (small[0], jax.tree.map(lambda x: x[:1], small[1])), large])
    assert len(graphdefs) == len(stacks) == 2
    assert [len(stack["softmax_bias"]) for stack in stacks] == [3, 1]
    for number, one in enumerate((small, large, large)):
        jax.tree.map(
            lambda x, y, number=number: np.testing.assert_array_equal(x[number], y), stacks[0], one[1]
        )
