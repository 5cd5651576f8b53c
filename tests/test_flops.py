"""Model FLOPs by formula, against what XLA counts in the programs themselves.

XLA counts the body of a loop once, so the programs compared have one position on either side, or
no loop at all.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import data
from s2s import config as config_lib
from s2s.batch import Batch
from s2s.kernels import library
from s2s.learn import optim
from s2s.learn import step as step_lib
from s2s.nn.attention import Attention
from s2s.nn.encoder import Memory
from s2s.sweep import flops

# So few rows that the softmax, which takes tokens piece by piece, has one piece.
ROWS, ENTRIES = 32, 512
SMALL = config_lib.ModelConfig(embedding=128, hidden=128, dropout=0.0)
MODELS = [
    dataclasses.replace(SMALL, layers=2, bidirectional=False, bridge="copy"),
    dataclasses.replace(SMALL, layers=2, bidirectional=False, bridge="copy", input_feeding=True),
    dataclasses.replace(SMALL, encoder_hidden=96, attention="general"),
    dataclasses.replace(SMALL, cell="gru", attention="dot"),
    dataclasses.replace(SMALL, embedding=64, tie="target"),
    dataclasses.replace(SMALL, attention="concat"),
    dataclasses.replace(SMALL, attention="fixed", cell="tanh"),
    dataclasses.replace(SMALL, attention="none", bridge="copy"),
]
NAMES = ["luong", "feeding", "bidirectional, dense", "gru, dot", "tied", "concat", "fixed", "none"]


@pytest.fixture(autouse=True)
def products_of_xla(monkeypatch):
    """What XLA calls it cannot count."""
    monkeypatch.setattr(library, "load", lambda: None)


def counted(function, *arguments) -> float:
    """FLOPs of the program, as XLA counts them before it optimizes."""
    cost = jax.jit(function).lower(*arguments).cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def one_position() -> tuple[Batch, flops.Tokens]:
    batch = jax.tree.map(jnp.asarray, data.full_batch(ROWS, 1, 1, ENTRIES))
    return batch, flops.Tokens(sentences=ROWS, source=ROWS, target=ROWS, looks=ROWS)


@pytest.mark.parametrize("cfg", MODELS, ids=NAMES)
def test_forward(cfg):
    graphdef, params = step_lib.abstract_params(cfg, ENTRIES, ENTRIES)
    batch, tokens = one_position()

    found = counted(step_lib.make_eval_step(graphdef), params, batch)

    assert found == pytest.approx(flops.forward_flops(cfg, ENTRIES, tokens), rel=0.05)


@pytest.mark.parametrize("cfg", MODELS[:2], ids=NAMES[:2])
def test_an_update_is_three_forwards(cfg):
    plain = config_lib.OptimConfig(name="sgd", clip_norm=0.0)
    whole = dataclasses.replace(config_lib.Config(), model=cfg, optim=plain)
    optimizer = optim.make_optimizer(
        whole.optim, optim.make_schedule(whole.optim, steps_per_epoch=1, total_steps=1)
    )
    initialize = functools.partial(step_lib.init_state, whole, ENTRIES, ENTRIES, optimizer, 1)
    graphdef, _ = step_lib.abstract_params(cfg, ENTRIES, ENTRIES)
    batch, tokens = one_position()

    found = counted(
        step_lib.make_train_step(graphdef, whole, optimizer), jax.eval_shape(lambda: initialize()[1]), batch
    )

    # Five operations a parameter are no product: the mean, its norm and the update.
    found -= 5 * step_lib.parameter_count(jax.eval_shape(lambda: initialize()[1].params))
    assert found == pytest.approx(flops.train_flops(cfg, ENTRIES, tokens), rel=0.05)


def test_attention_looks_at_every_pair_of_positions():
    source, target = 12, 9
    attention = Attention("general", "global", 64, 32, rngs=nnx.Rngs(0))
    query = jnp.zeros((ROWS, target, 64))
    memory_BSM = jnp.zeros((ROWS, source, 32))

    def look(query, memory_BSM):
        mask = jnp.ones((ROWS, source), bool)
        return attention(
            query, Memory(memory_BSM, mask, attention.prepare(memory_BSM), memory_BSM[:, 0], ())
        )[0]

    cfg = dataclasses.replace(SMALL, hidden=64, encoder_hidden=16)
    without, with_looks = (
        flops.forward_flops(cfg, ENTRIES, flops.Tokens(0, 0, 0, looks))
        for looks in (0, ROWS * source * target)
    )
    keys = 2 * ROWS * source * 32 * 64

    assert counted(look, query, memory_BSM) - keys == pytest.approx(with_looks - without, rel=0.15)


def test_padding_counts_for_nothing_and_tokens_for_themselves():
    one = flops.forward_flops(SMALL, ENTRIES, flops.Tokens(1, 5, 4, 20))
    two = flops.forward_flops(SMALL, ENTRIES, flops.Tokens(1, 3, 7, 21))
    both = flops.forward_flops(SMALL, ENTRIES, flops.Tokens(2, 8, 11, 41))

    assert one + two == pytest.approx(both)
    assert flops.train_flops(SMALL, ENTRIES, flops.Tokens(1, 5, 4, 20)) == 3 * one


EVERY = [
    dict(cell=cell, attention=attention, bridge=bridge, tie=tie, input_feeding=feeding, **layers)
    for cell, attention, bridge, tie, feeding, layers in itertools.product(
        config_lib.CELLS,
        config_lib.ATTENTIONS,
        config_lib.BRIDGES,
        config_lib.TIES,
        [False, True],
        [dict(layers=1), dict(layers=2, bidirectional=False), dict(layers=2, encoder_layers=1)],
    )
]


@pytest.mark.parametrize("number", range(0, len(EVERY), 53))
def test_parameters_are_those_of_the_model(number):
    cfg = config_lib.ModelConfig(embedding=6, hidden=8, **EVERY[number])
    shared = cfg.tie == "all"
    try:
        data = config_lib.DataConfig(vocab=config_lib.VocabConfig(shared=shared))
        config_lib.validate(config_lib.Config(model=cfg, data=data))
    except config_lib.ConfigError:
        cfg = dataclasses.replace(cfg, bridge="dense", encoder_layers=None)
    sizes = (11, 11) if shared else (13, 11)

    _, params = step_lib.abstract_params(cfg, *sizes)

    assert flops.parameters(cfg, *sizes) == step_lib.parameter_count(params)
