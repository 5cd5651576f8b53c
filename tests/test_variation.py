"""Which runs are one program."""

import dataclasses

import pytest

from s2s import config, variation
from s2s.config import Config, OptimConfig, RunConfig

BASE = Config()


def changed(**values):
    return variation.put(BASE, {name.replace("__", "."): value for name, value in values.items()})


def test_every_variable_field_exists_and_alone_keeps_nothing_apart():
    flat = config.differences(BASE, BASE)
    assert flat == {}
    for name in variation.VARIABLE:
        other = variation.put(BASE, {name: 0.125})
        assert name in config.differences(BASE, other)
        if name != "optim.ema":
            assert variation.apart(BASE, other) == []


@pytest.mark.parametrize(
    ("name", "one", "other", "together"),
    [
        ("optim.clip_norm", 1.0, 5.0, True),
        ("optim.clip_norm", 0.0, 5.0, False),
        ("optim.ema", 0.9, 0.99, True),
        ("optim.ema", 0.9, 0.0, False),
        ("model.dropout", 0.0, 0.3, True),
        ("model.layer_dropout", None, 0.3, True),
        ("optim.warmup_steps", 0, 10, False),
        ("optim.name", "adam", "sgd", False),
        ("model.hidden", 64, 128, False),
        ("data.batch_tokens", 512, 1024, False),
        ("data.train", "dates", "reverse", True),
        ("data.task_size", 100, 200, True),
        ("search.beam", 1, 5, True),
        ("run.seed", 1, 2, True),
        ("run.epochs", 1.0, 2.0, False),
    ],
)
def test_what_keeps_two_runs_apart(name, one, other, together):
    runs = variation.put(BASE, {name: one}), variation.put(BASE, {name: other})
    assert variation.apart(*runs) == ([] if together else [name])
    assert variation.apart(*runs[::-1]) == variation.apart(*runs)


def test_every_field_is_free_variable_or_structure():
    """A new field keeps runs apart until somebody says otherwise."""
    free = {name for name in variation._FREE if not name.endswith(".")}
    assert free | set(variation.VARIABLE) <= set(config.flat(BASE))


def test_replicas_are_runs_with_seeds_that_follow_each_other():
    cfg = dataclasses.replace(BASE, run=RunConfig(seed=5, replicas=3))
    runs = variation.expand(cfg)
    assert [run.run.seed for run in runs] == [5, 6, 7]
    assert all(run.run.replicas == 1 for run in runs)
    assert all(set(config.differences(cfg, run)) <= {"run.seed", "run.replicas"} for run in runs)
    assert variation.varied(runs) == {}
    assert variation.expand(BASE) == [BASE]


def test_only_numbers_that_differ_vary():
    runs = [changed(optim__learning_rate=rate, optim__epsilon=1e-9) for rate in (0.1, 0.2, 0.1)]
    assert variation.varied(runs) == {"optim.learning_rate": [0.1, 0.2, 0.1]}
    assert variation.put(runs[0], {"optim.learning_rate": 0.2}) == runs[1]


def test_a_rate_is_that_of_its_place():
    runs = [changed(model__dropout=0.3), changed(model__dropout=0.1, model__layer_dropout=0.3)]
    assert variation.varied(runs) == {
        "model.embedding_dropout": [0.3, 0.1],
        "model.attentional_dropout": [0.3, 0.1],
    }


def test_runs_that_do_not_fit_are_told():
    other = dataclasses.replace(BASE, optim=OptimConfig(clip_norm=0.0, warmup_steps=3))
    with pytest.raises(ValueError, match=r"runs 1 and 2 .* config\.optim\.warmup_steps, config\.optim\.clip"):
        variation.varied([BASE, other])
