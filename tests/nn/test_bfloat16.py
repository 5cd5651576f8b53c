"""Training in bfloat16: it learns, and what has to be precise is, and what has to be fast is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from s2s.config import Config, ModelConfig, OptimConfig
from s2s.learn import optim
from s2s.learn import step as step_lib
from tests.model_variants import VOCAB, make_batch, quick_jit

UPDATES = 60
LOOPS = {"scan", "while"}


def trainer(feeding: bool, cell: str = "lstm", layers: int = 1):
    model = ModelConfig(
        embedding=8, hidden=8, layers=layers, cell=cell, dropout=0.0, input_feeding=feeding, dtype="bfloat16"
    )
    cfg = dataclasses.replace(Config(), model=model, optim=OptimConfig(learning_rate=0.02))
    optimizer = optim.make_optimizer(
        cfg.optim, optim.make_schedule(cfg.optim, steps_per_epoch=UPDATES, total_steps=UPDATES)
    )
    graphdef, state = step_lib.init_state(cfg, VOCAB, VOCAB, optimizer, 0)
    return step_lib.make_train_step(graphdef, cfg, optimizer), state, graphdef


def inner_programs(equation):
    """The programs an equation of a jaxpr holds: bodies of loops, functions it calls."""
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr"):
            yield value.jaxpr


def products(program, in_loop=False):
    """Every matrix product of a jaxpr, however deep: whether it is in a loop, and its operands' dtypes."""
    for equation in program.eqns:
        if equation.primitive.name in ("dot_general", "contract", "contract_packed"):
            yield in_loop, [str(operand.aval.dtype) for operand in equation.invars[:2]]
        for inner in inner_programs(equation):
            yield from products(inner, in_loop or equation.primitive.name in LOOPS)


@pytest.mark.parametrize("feeding", [False, True], ids=["plain", "feeding"])
def test_it_learns_and_parameters_stay_precise(feeding):
    update, state, _ = trainer(feeding)
    update, batch, losses = quick_jit(update), make_batch(), []
    for _ in range(UPDATES):
        state, metrics = update(state, batch)
        losses.append(float(metrics.sums.loss / metrics.sums.tokens))
    assert losses[-1] < 0.2 * losses[0]
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and set(floats) == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("feeding", [False, True], ids=["plain", "feeding"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "relu"])
def test_no_product_is_wider(cell, feeding):
    """In loops and out of them, forward and backward: a float32 operand makes a product much slower."""
    update, state, _ = trainer(feeding, cell, layers=2)
    program = jax.make_jaxpr(update)(state, make_batch())
    found = list(products(program.jaxpr))
    # At least one product there and one back: two encoder directions and the decoder, two layers of each.
    assert sum(in_loop for in_loop, _ in found) >= 12
    assert all(dtypes == ["bfloat16", "bfloat16"] for _, dtypes in found), found


def test_probabilities_are_precise():
    _, state, graphdef = trainer(feeding=False)
    model = step_lib.merge(graphdef, state.params)
    output_BTH, align_BTS = jax.eval_shape(model, make_batch())
    logits_BTV = jax.eval_shape(lambda output_BTH: model.softmax().logits(output_BTH), output_BTH)
    assert output_BTH.dtype == jnp.bfloat16
    assert {logits_BTV.dtype, align_BTS.dtype} == {jnp.dtype("float32")}
