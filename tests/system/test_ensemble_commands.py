"""Several work directories, or one that holds replicas, in the commands that need a model."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from s2s import config as config_lib
from s2s import evaluate, score, translate
from s2s.config import SearchConfig
from s2s.data import corpora, encode
from s2s.data.vocab import SymbolVocabulary
from s2s.ensemble import open_models
from s2s.infra import checkpoint
from s2s.learn import step as step_lib
from s2s.likelihood import Likelihood
from s2s.nn.seq2seq import Seq2Seq
from s2s.translator import Translator
from s2s.workdir import Workdir, WorkdirError
from tests.system.conftest import small

LINES = ["a b c d", "e f", "p o n m l k"]


@pytest.fixture(scope="module")
def replicas(trained, tmp_path_factory):
    """A work directory with three models: the trained one, one like it, and one of another structure."""
    whole = tmp_path_factory.mktemp("replicas") / "whole"
    cfg, vocabs, _, params = Workdir(trained).load()
    rng = np.random.default_rng(0)
    like = jax.tree.map(lambda leaf: leaf * (1 + 0.3 * rng.standard_normal(leaf.shape, np.float32)), params)
    other = config_lib.freeze(small(data__cache=cfg.data.cache, model__attention="concat", model__hidden=8))
    drawn = step_lib.split(Seq2Seq(other.model, vocabs.source.size, vocabs.target.size, rngs=nnx.Rngs(0)))[1]
    for number, (own, leaves) in enumerate(((cfg, params), (cfg, like), (other, drawn)), start=1):
        work = Workdir(whole / f"replica_{number:02}")
        work.write_config(own)
        shutil.copytree(trained / "vocab", work.vocab)
        checkpoint.save_params(work.model, leaves, {})
    Workdir(whole).write_config(cfg)
    return whole


def run(main, *arguments, capsysbinary):
    code = main([str(argument) for argument in arguments])
    out, err = capsysbinary.readouterr()
    return code, out.decode(), err.decode()


def test_replicas_decode_as_an_ensemble(replicas, tmp_path, capsysbinary):
    source = tmp_path / "lines.txt"
    source.write_text("".join(f"{line}\n" for line in LINES))
    arguments = ["--input", source, "--scores", "--beam", "3"]
    code, whole, err = run(translate.main, "--workdir", replicas, *arguments, capsysbinary=capsysbinary)
    assert code == 0, err
    folders = [one.path for one in Workdir(replicas).replicas]
    assert [folder.name for folder in folders] == ["replica_01", "replica_02", "replica_03"]
    turned = run(translate.main, "--workdir", *folders[::-1], *arguments, capsysbinary=capsysbinary)[1]
    assert [row.split("\t")[2] for row in turned.splitlines()] == [
        row.split("\t")[2] for row in whole.splitlines()
    ]
    outputs = [row.split("\t") for row in whole.splitlines()]
    geometric = run(
        translate.main, "--workdir", replicas, *arguments, "--combine", "geometric", capsysbinary=capsysbinary
    )[1]
    assert [row.split("\t")[1] for row in geometric.splitlines()] != [row[1] for row in outputs]

    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{line}\t{row[2]}\n" for line, row in zip(LINES, outputs, strict=True)))
    arguments = ["--workdir", replicas, "--input", pairs, "--source", "0", "--target", "1"]
    code, out, err = run(score.main, *arguments, "--attention", capsysbinary=capsysbinary)
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    np.testing.assert_allclose(
        [one["log_prob"] for one in found], [float(row[1]) for row in outputs], atol=1e-3
    )
    np.testing.assert_allclose(np.sum(found[0]["attention"], axis=1), 1, atol=1e-2)
    code, out, err = run(evaluate.main, *arguments, "--beam", "3", "--json", capsysbinary=capsysbinary)
    assert code == 0, err
    result = json.loads(out)
    nats = -sum(one["log_prob"] for one in found) / sum(len(one["target"]) for one in found)
    assert result["models"] == 3 and result["scores"]["exact_match"] == 100
    assert result["scores"]["loss"] == pytest.approx(nats, rel=1e-3)


def test_many_models_are_those_models(replicas):
    opened = [one.load() for one in Workdir(replicas).replicas[:2]]
    cfg, vocabs, graphdef, _ = opened[0]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[one[3] for one in opened])
    search = Translator(graphdef, vocabs, SearchConfig(name="greedy", beam=1))
    texts = [LINES, LINES[:1]]
    for (*_, params), own, found in zip(opened, texts, search.many(stacked, texts), strict=True):
        assert [one.hypotheses[0].ids for one in found] == [
            one.hypotheses[0].ids for one in search(params, own)
        ]
    dev = corpora.open_corpus(cfg.data, "dev", seed=cfg.run.seed)
    encoded = encode.encode_corpus(dev, vocabs, max_source=None, max_target=None, cache=cfg.data.cache)
    measure = Likelihood(graphdef, encoded, cfg, search.mesh)
    many = measure.many(stacked)
    for (*_, params), found in zip(opened, many, strict=True):
        assert found == pytest.approx(measure(params))
    assert many[0]["loss"] < many[1]["loss"]


def test_a_single_work_directory_is_its_model(trained):
    cfg, _, graphdef, params = Workdir(trained).load()
    opened = open_models([trained])
    assert (opened[0], opened[2]) == (cfg, graphdef)
    jax.tree.map(np.testing.assert_array_equal, opened[3], params)


def test_models_that_make_no_ensemble(trained, replicas, tmp_path, capsysbinary):
    with pytest.raises(WorkdirError, match="holds 3 models: name one of them, .*replica_01 to replica_03"):
        Workdir(replicas).load()
    foreign = tmp_path / "foreign"
    shutil.copytree(replicas / "replica_02", foreign)
    SymbolVocabulary("ABCDEFGHIJKLMNOP", " ").save(Workdir(foreign).vocab / "target")
    bare = tmp_path / "whole"
    shutil.copytree(replicas, bare)
    shutil.rmtree(bare / "replica_02" / "model")
    for folders, told in (
        ([trained, foreign], f"{trained} and {foreign} make no ensemble: their target vocabularies differ"),
        ([bare], f"{bare / 'replica_02'} has no model yet"),
        ([trained, tmp_path / "nowhere"], "nowhere is no work directory"),
    ):
        code, _, err = run(score.main, "--workdir", *folders, capsysbinary=capsysbinary)
        assert code == 2 and told in err and "Traceback" not in err
