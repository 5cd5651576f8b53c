"""Which runs fit into one program: the fields they may differ in, and the numbers in which they do.

Decides what is a number to a compiled step and what is its structure. Must not know arrays or
programs: configurations come in, names and numbers go out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from s2s.config import Config, differences

_OWN_RATES = "model.embedding_dropout", "model.layer_dropout", "model.attentional_dropout"

# Fields that the step of a single model takes as traced scalars.
VARIABLE = (
    "optim.learning_rate",
    "optim.decay_factor",
    "optim.weight_decay",
    "optim.beta1",
    "optim.beta2",
    "optim.epsilon",
    "optim.label_smoothing",
    "optim.ema",
    "optim.clip_norm",
    "model.dropout",
    *_OWN_RATES,
)

# Of those, the ones that are another program at 0.
_SWITCHES = "optim.ema", "optim.clip_norm"

# Fields that the step does not read; a name that ends in a dot is a whole part.
_FREE = (
    "name",
    "run.seed",
    "run.replicas",
    "data.train",
    "data.dev",
    "data.test",
    "data.source",
    "data.target",
    "data.task_size",
    "data.cache",
    "search.",
)


def apart(one: Config, other: Config) -> list[str]:
    """Dotted names of the fields that keep two runs out of one program; none: they fit together.

    A norm to clip at, or a moving average, is there in all runs of a program or in none.
    """
    return [
        name
        for name, (mine, theirs) in differences(one, other).items()
        if not name.startswith(_FREE)
        and (name not in VARIABLE or (name in _SWITCHES and bool(mine) != bool(theirs)))
    ]


def expand(cfg: Config) -> list[Config]:
    """The runs of ``cfg.run.replicas``: seeds from ``cfg.run.seed`` on, all else the same."""
    runs = [
        dataclasses.replace(cfg.run, seed=cfg.run.seed + number, replicas=1)
        for number in range(cfg.run.replicas)
    ]
    return [dataclasses.replace(cfg, run=run) for run in runs]


def varied(cfgs: Sequence[Config]) -> dict[str, list[float]]:
    """The numbers in which runs that fit together differ: dotted name -> its value in each run.

    A rate of dropout is that of its place: ``model.dropout`` itself, which only stands in for those
    that are None, is not among them.

    Raises:
      ValueError: some run does not fit the first.
    """
    for number, cfg in enumerate(cfgs):
        if names := apart(cfgs[0], cfg):
            raise ValueError(
                f"runs 1 and {number + 1} cannot be trained as one program: they differ in "
                f"{', '.join(f'config.{name}' for name in names)}"
            )
    columns = {name: [_number(cfg, name) for cfg in cfgs] for name in VARIABLE if name != "model.dropout"}
    return {name: column for name, column in columns.items() if len(set(column)) > 1}


def put(cfg: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values, traced ones too, in the fields of these dotted names."""
    for name, value in values.items():
        part, _, field = name.partition(".")
        cfg = dataclasses.replace(cfg, **{part: dataclasses.replace(getattr(cfg, part), **{field: value})})
    return cfg


def _number(cfg: Config, name: str) -> float:
    part, _, field = name.partition(".")
    value = getattr(getattr(cfg, part), field)
    return cfg.model.dropout if value is None else value
