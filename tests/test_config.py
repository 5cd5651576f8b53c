"""The configuration: one declaration, overridable everywhere, refusing what cannot work."""

from __future__ import annotations

import dataclasses
import json
import re
import typing

import pytest
from absl import flags
from ml_collections import config_dict, config_flags

from s2s import config as config_lib
from s2s.config import Config, ConfigError, default, differences, freeze, from_json, to_json


def leaves(cls: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every field of the config by its dotted name."""
    hints = typing.get_type_hints(cls)
    found = {}
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            found |= leaves(hints[item.name], f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = item
    return found


def changed(**fields: object):
    """The default config with dotted fields (dots written as __) changed."""
    config = default()
    with config.ignore_type():
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def from_command_line(*arguments: str) -> Config:
    """What ``--config`` with overrides gives, by the library that the command line uses."""
    values = flags.FlagValues()
    argv = ["s2s", *arguments]
    config_flags.DEFINE_config_dict("config", default(), flag_values=values, sys_argv=argv)
    values(argv)
    return freeze(values.config)


def test_defaults_are_valid_and_those_of_the_dataclass():
    assert freeze(default()) == Config()


def test_every_field_has_a_line_of_documentation():
    for cls in (config_lib.VocabConfig, config_lib.DataConfig, config_lib.ModelConfig, config_lib.OptimConfig,
                config_lib.RunConfig, config_lib.SearchConfig, Config):  # fmt: skip
        listed = cls.__doc__.partition("Attributes:")[2]
        for item in dataclasses.fields(cls):
            assert re.search(rf"\b{item.name}\b[^.]*?:", listed), f"{cls.__name__}.{item.name}"


# ---- the edge ----


def test_a_locked_config_takes_no_new_field():
    with pytest.raises(AttributeError, match='Did you mean "hidden"'):
        default().model.hiden = 3


def test_a_mistyped_override_names_its_like():
    with pytest.raises(AttributeError, match='Did you mean "hidden"'):
        from_command_line("--config.model.hiden=3")


def test_the_command_line_overrides():
    cfg = from_command_line(
        "--config.model.hidden=512", "--config.model.cell=gru", "--config.optim.learning_rate=3",
        "--config.model.bidirectional=false", "--config.data.vocab.size=400",
    )  # fmt: skip
    assert (cfg.model.hidden, cfg.model.cell, cfg.model.bidirectional) == (512, "gru", False)
    assert cfg.optim.learning_rate == 3.0 and isinstance(cfg.optim.learning_rate, float)
    assert cfg.data.vocab.size == 400


NONE_BY_DEFAULT = {name for name, item in leaves().items() if item.default is None}


@pytest.mark.parametrize("name", sorted(NONE_BY_DEFAULT))
def test_a_field_that_is_none_can_be_overridden_from_the_command_line(name):
    text = {"int": "12", "float": "0.25", "str": "wiki"}[leaves()[name].type.split(" |")[0]]
    cfg = from_command_line(f"--config.{name}={text}")
    value = cfg
    for part in name.split("."):
        value = getattr(value, part)
    assert str(value) == text


def test_a_placeholder_left_alone_is_none():
    cfg = freeze(default())
    assert cfg.run.steps is None and cfg.model.encoder_hidden is None


@pytest.mark.parametrize("argument", ["--config.model.hidden=many", "--config.run.steps=1.5"])
def test_the_command_line_refuses_a_wrong_type(argument):
    with pytest.raises((flags.IllegalFlagValueError, TypeError, ValueError)):
        from_command_line(argument)


# ---- from mutable to frozen, and JSON ----


def test_a_frozen_config_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        freeze(default()).model.hidden = 3


def test_whole_numbers_become_floats_where_floats_are_meant():
    cfg = from_json('{"optim": {"clip_norm": 1}}')
    assert cfg.optim.clip_norm == 1 and isinstance(cfg.optim.clip_norm, float)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__hidden": 2.5}, "config.model.hidden=2.5 must be of type int"),
        ({"model__hidden": True}, "config.model.hidden=True must be of type int"),
        ({"model__bidirectional": 1}, "config.model.bidirectional=1 must be of type bool"),
        ({"model__cell": 7}, "config.model.cell=7 must be of type str"),
        ({"model__cell": None}, "config.model.cell=None must be of type str"),
        ({"run__steps": "9"}, "config.run.steps='9' must be of type int"),
        ({"optim__learning_rate": float("nan")}, "config.optim.learning_rate=nan must be a finite number"),
        ({"optim__clip_norm": float("inf")}, "config.optim.clip_norm=inf must be a finite number"),
        ({"model__layer_dropout": float("nan")}, "config.model.layer_dropout=nan must be a finite number"),
    ],
)
def test_wrong_types_are_refused(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        freeze(changed(**fields))


def test_unknown_fields_are_refused_with_the_likeliest_or_all_names():
    config = default().unlock()
    config.model.hiden = 3
    with pytest.raises(
        ConfigError, match=r"config\.model\.hiden does not exist: did you mean config\.model\.hidden\?"
    ):
        freeze(config)
    with pytest.raises(ConfigError, match="config.xyzzy does not exist: it has name, data, model"):
        freeze(config_dict.ConfigDict({"xyzzy": 1}))


def test_json_round_trip():
    cfg = freeze(changed(model__encoder_hidden=12, name="März", run__steps=9, data__vocab__kind="char"))
    assert from_json(to_json(cfg)) == cfg
    assert "März" in to_json(cfg)
    assert from_json(to_json(Config())) == Config()


def test_a_saved_config_without_newer_fields_takes_their_defaults():
    saved = json.loads(to_json(Config()))
    del saved["model"]["window"]
    assert from_json(json.dumps(saved)) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a saved config must be JSON"),
        ("[1]", r"config=\[1\] must be a group of fields"),
        ('{"model": 3}', "config.model=3 must be a group of fields"),
        ('{"model": {"hiden": 3}}', "did you mean config.model.hidden"),
        ('{"model": {"hidden": "3"}}', "must be of type int"),
        ('{"model": {"hidden": 0}}', "config.model.hidden=0 must be at least 1"),
    ],
)
def test_a_damaged_saved_config_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        from_json(text)


def test_differences():
    cfg = freeze(changed(model__hidden=64, optim__name="sgd"))
    assert differences(Config(), cfg) == {"model.hidden": (256, 64), "optim.name": ("adam", "sgd")}
    assert differences(cfg, cfg) == {}


# ---- values ----

CHOICES = {
    "data.vocab.kind": config_lib.VOCABULARIES,
    "model.cell": config_lib.CELLS,
    "model.bridge": config_lib.BRIDGES,
    "model.attention": config_lib.ATTENTIONS,
    "model.window": config_lib.WINDOWS,
    "model.tie": config_lib.TIES,
    "model.dtype": config_lib.DTYPES,
    "model.recurrence": config_lib.RECURRENCES,
    "optim.name": config_lib.OPTIMIZERS,
    "optim.schedule": config_lib.SCHEDULES,
    "run.metric": tuple(config_lib.METRICS),
    "search.name": config_lib.SEARCHES,
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_outside_its_list_is_refused_with_the_likeliest(name):
    first = CHOICES[name][0]
    mistyped = first + "x"
    with pytest.raises(ConfigError) as refusal:
        freeze(changed(**{name: mistyped}))
    assert f"config.{name}={mistyped!r} is none of {', '.join(CHOICES[name])}" in str(refusal.value)
    assert f"did you mean {first!r}?" in str(refusal.value)


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, choices in CHOICES.items() for v in choices])
def test_every_choice_is_accepted(name, value):
    more = {"data.vocab.shared": True} if value == "all" else {}
    freeze(changed(**{name: value}, **more))


# The least value of a number, and how far below it is too low.
LEAST = {
    "data.vocab.size": 8, "data.vocab.target_size": 8,
    "data.task_size": 1, "data.batch_tokens": 1, "data.max_shapes": 1, "data.prefetch": 1,
    "data.max_source_length": 2, "data.max_target_length": 2,
    "model.embedding": 1, "model.hidden": 1, "model.encoder_hidden": 1, "model.layers": 1,
    "model.encoder_layers": 1,
    "optim.learning_rate": 0, "optim.warmup_steps": 0, "optim.clip_norm": 0, "optim.weight_decay": 0,
    "optim.decay_start": 0, "optim.accumulate": 1,
    "run.steps": 1, "run.log_every": 1, "run.eval_every": 1, "run.save_every": 1, "run.keep_best": 1,
    "run.keep_last": 1, "run.eval_sentences": 1, "run.patience": 0, "run.average_last": 0, "run.seed": 0,
    "run.replicas": 1,
    "search.beam": 1, "search.batch_sentences": 1, "search.length_penalty": 0, "search.coverage_penalty": 0,
    "search.min_length": 0, "search.max_length_factor": 0, "search.top_k": 0, "search.max_length_extra": 1,
}  # fmt: skip
SHARES = ("model.dropout", "model.embedding_dropout", "model.layer_dropout", "model.attentional_dropout",
          "optim.label_smoothing", "optim.ema", "optim.beta1", "optim.beta2")  # fmt: skip


@pytest.mark.parametrize(("name", "least"), LEAST.items())
def test_a_number_below_its_least_is_refused(name, least):
    with pytest.raises(
        ConfigError, match=rf"config\.{re.escape(name)}={least - 1}(\.0)? must be at least {least}"
    ):
        freeze(changed(**{name: least - 1}))


@pytest.mark.parametrize(("name", "least"), LEAST.items())
def test_a_number_at_its_least_is_accepted(name, least):
    # What else has to be small or even with it.
    more = {
        "data.batch_tokens": {"data.batch_tokens": 2, "data.max_target_length": 2},
        "model.hidden": {"model.bidirectional": False},
    }.get(name, {})
    freeze(changed(**({name: least} | more)))


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_share_outside_its_range_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"config\.{re.escape(name)}={value} must be in \[0, 1\)"):
        freeze(changed(**{name: value}))


@pytest.mark.parametrize("name", SHARES)
def test_a_share_of_zero_is_accepted(name):
    freeze(changed(**{name: 0.0}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": " "}, "config.name=' ' must not be blank"),
        ({"optim__epsilon": 0.0}, "config.optim.epsilon=0.0 must be above 0"),
        ({"optim__decay_every": 0.0}, "config.optim.decay_every=0.0 must be above 0"),
        ({"optim__decay_factor": 0.0}, "config.optim.decay_factor=0.0 must be in (0, 1]"),
        ({"optim__decay_factor": 1.5}, "config.optim.decay_factor=1.5 must be in (0, 1]"),
        ({"run__epochs": 0.0}, "config.run.epochs=0.0 must be above 0, or give config.run.steps"),
        ({"search__temperature": 0.0}, "config.search.temperature=0.0 must be above 0"),
        ({"search__top_p": 0.0}, "config.search.top_p=0.0 must be in (0, 1]"),
        ({"search__top_p": 1.1}, "config.search.top_p=1.1 must be in (0, 1]"),
    ],
)
def test_other_ranges(fields, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        freeze(changed(**fields))


def test_steps_stand_in_for_epochs():
    freeze(changed(run__epochs=0.0, run__steps=3))


# ---- across fields: the refusal, and the remedies it names ----

CONTRADICTIONS = [
    (
        {"model__hidden": 255},
        "cannot be halved for a bidirectional encoder",
        [{"model__hidden": 256}, {"model__encoder_hidden": 100}, {"model__bidirectional": False}],
    ),
    (
        {"model__attention": "dot", "model__encoder_hidden": 100},
        "multiplies encoder outputs of 200 features with decoder states of config.model.hidden=256",
        [{"model__encoder_hidden": 128}, {"model__attention": "general"}, {"model__hidden": 200}],
    ),
    (
        {"model__bridge": "copy", "model__encoder_hidden": 100},
        "hands a state of 200 features to a decoder of config.model.hidden=256",
        [{"model__encoder_hidden": 128}, {"model__bridge": "dense"}],
    ),
    (
        {"model__bridge": "copy", "model__encoder_layers": 2},
        "encoder_layers=2 and layers=1",
        [{"model__layers": 2}, {"model__bridge": "dense"}],
    ),
    (
        {"model__bridge": "zero", "model__attention": "none"},
        "tells the decoder nothing of the source",
        [{"model__bridge": "dense"}, {"model__bridge": "copy"}, {"model__attention": "fixed"}],
    ),
    (
        {"model__tie": "all"},
        "needs one vocabulary",
        [{"data__vocab__shared": True}, {"model__tie": "target"}],
    ),
    (
        {"data__vocab__shared": True, "data__vocab__target_size": 500},
        "config.data.vocab.target_size=500 contradicts config.data.vocab.shared=True",
        [{"data__vocab__target_size": size} for size in (8000, None)] + [{"data__vocab__shared": False}],
    ),
    (
        {"data__vocab__shared": True, "data__vocab__kind": "symbols"},
        "needs one separator, but source_separator='' and target_separator=' '",
        [
            {"data__vocab__source_separator": " "},
            {"data__vocab__kind": "bpe"},
            {"data__vocab__shared": False},
        ],
    ),
    (
        {"model__recurrence": "cudnn", "model__cell": "gru"},
        "config.model.recurrence='cudnn' knows the LSTM in float32 alone, not config.model.cell='gru' in "
        "config.model.dtype='float32'",
        [{"model__cell": "lstm"}, {"model__recurrence": "scan"}],
    ),
    (
        {"model__recurrence": "cudnn", "model__dtype": "bfloat16"},
        "in config.model.dtype='bfloat16': change these, or use 'scan'",
        [{"model__dtype": "float32"}, {"model__recurrence": "scan"}],
    ),
    (
        {"data__batch_tokens": 99},
        "config.data.batch_tokens=99 cannot hold one target of config.data.max_target_length=100",
        [{"data__batch_tokens": 100}, {"data__max_target_length": 99}],
    ),
]


@pytest.mark.parametrize(
    ("fields", "message", "remedies"), CONTRADICTIONS, ids=[row[1][:40] for row in CONTRADICTIONS]
)
def test_fields_that_contradict_each_other(fields, message, remedies):
    with pytest.raises(ConfigError, match=re.escape(message)):
        freeze(changed(**fields))
    for remedy in remedies:
        freeze(changed(**(fields | remedy)))


def test_every_problem_is_named_at_once():
    with pytest.raises(ConfigError) as refusal:
        freeze(changed(model__cell="lstn", optim__accumulate=0, run__metric="blue"))
    lines = str(refusal.value).splitlines()
    assert len(lines) == 3
    assert "did you mean 'lstm'?" in lines[0] and "did you mean 'bleu'?" in lines[1]


def test_sizes_that_follow_from_others():
    model = config_lib.ModelConfig(hidden=64)
    assert (model.encoder_units, model.memory, model.encoder_depth) == (32, 64, 1)
    model = config_lib.ModelConfig(hidden=64, bidirectional=False, layers=3)
    assert (model.encoder_units, model.memory, model.encoder_depth) == (64, 64, 3)
    model = config_lib.ModelConfig(hidden=64, encoder_hidden=50, encoder_layers=2)
    assert (model.encoder_units, model.memory, model.encoder_depth) == (50, 100, 2)
