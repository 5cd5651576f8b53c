"""One program of R replicas does what R programs do: the same numbers, and nothing passes between them.

In double precision, so that what differs is more than rounding. The numbers in configs have few bits:
they are the same in the float32 in which replicas get them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from s2s import config, variation
from s2s.batch import Batch
from s2s.config import Config, ModelConfig, OptimConfig
from s2s.infra import sharding
from s2s.learn import optim, replicas
from s2s.learn import step as step_lib
from s2s.nn.seq2seq import Seq2Seq
from tests.model_variants import quick_jit

CLOSE = {"rtol": 1e-9, "atol": 1e-13}
UPDATES = 3
ROWS = 4

BASE = Config(
    model=ModelConfig(embedding=4, hidden=6, bidirectional=False, dropout=0.0),
    optim=OptimConfig(
        learning_rate=2.0**-6, beta1=0.875, beta2=0.75, epsilon=2.0**-20, clip_norm=1.0, decay_start=0.0
    ),
)


class Case(NamedTuple):
    """Some runs: what they have in common, and what each has of its own.

    Attributes:
      shared: dotted name -> value.
      varied: dotted name -> a value for each run.
      sizes: source and target entries of each run; alike: one vocabulary fits all.
      lengths: updates an epoch, and in all, of each run.
      shapes: S and T of each run's own batches.
    """

    shared: dict[str, Any]
    varied: dict[str, list[float]] = {}
    sizes: tuple[tuple[int, int], ...] = ((9, 11), (9, 11))
    lengths: tuple[tuple[int, int], ...] = ((2, 4), (2, 4))
    shapes: tuple[tuple[int, int], ...] = ((5, 4), (5, 4))


OTHER = {"sizes": ((9, 13), (12, 7)), "lengths": ((2, 4), (1, 3)), "shapes": ((5, 4), (3, 6))}
CASES = {
    "seeds": Case(
        {"model.attention": "general", "model.input_feeding": True, "model.layers": 2}
        | {"model.dropout": 0.25, "model.bidirectional": True}
    ),
    "languages": Case(
        {"model.attention": "concat", "model.input_feeding": True, "model.dropout": 0.25}, **OTHER
    ),
    "target-tied": Case(
        {"model.cell": "gru", "model.attention": "dot", "model.input_feeding": True, "model.tie": "target"}
        | {"optim.name": "sgd", "optim.schedule": "luong", "model.bidirectional": True},
        {"optim.learning_rate": [0.5, 0.125], "optim.decay_factor": [0.5, 0.75]}
        | {"optim.label_smoothing": [0.0, 0.125]},
        **OTHER,
    ),
    "all-tied": Case(
        {"model.cell": "tanh", "model.attention": "concat", "model.tie": "all"}
        | {"optim.name": "adamw", "optim.schedule": "cosine", "optim.warmup_steps": 1},
        {"optim.weight_decay": [0.0, 0.125], "model.dropout": [0.0, 0.5], "optim.clip_norm": [0.25, 8.0]},
        **OTHER | {"sizes": ((13, 13), (8, 8))},
    ),
    "pieces": Case(
        {"model.cell": "relu", "model.attention": "fixed", "model.input_feeding": True}
        | {"optim.name": "adadelta", "optim.schedule": "linear", "optim.accumulate": 2},
        {"optim.ema": [0.5, 0.75], "optim.label_smoothing": [0.25, 0.125]},
        **OTHER,
    ),
    "rates": Case(
        {
            "model.attention": "none",
            "model.layers": 2,
            "optim.schedule": "inverse_sqrt",
            "optim.warmup_steps": 2,
        },
        {"optim.beta1": [0.5, 0.75], "optim.beta2": [0.875, 0.75], "optim.epsilon": [2.0**-20, 2.0**-10]}
        | {"model.layer_dropout": [0.5, 0.125], "model.attentional_dropout": [0.0, 0.5]},
    ),
    "decay": Case(
        {"model.cell": "gru", "model.attention": "general", "optim.schedule": "exponential"}
        | {"optim.clip_norm": 0.0},
        {"optim.decay_factor": [0.5, 0.25]},
        lengths=((2, 4), (3, 4)),
    ),
    "dot": Case({"model.attention": "dot", "optim.ema": 0.5}),
    "fixed": Case({"model.attention": "fixed", "model.tie": "target"}),
    "none-feeding": Case({"model.attention": "none", "model.input_feeding": True, "model.bridge": "copy"}),
}


class Runs:
    """The runs of a case, each by itself and all as one program."""

    def __init__(self, case: Case):
        self.case = case
        common = variation.put(BASE, case.shared)
        self.cfgs = [
            variation.put(
                common, {"run.seed": number} | {name: case.varied[name][number] for name in case.varied}
            )
            for number in range(len(case.sizes))
        ]
        self.padded = tuple(max(sizes) for sizes in zip(*case.sizes, strict=True))
        self.longest = tuple(max(shapes) for shapes in zip(*case.shapes, strict=True))
        own_sizes = None if len(set(case.sizes)) == 1 else [target for _, target in case.sizes]
        self.numbers = replicas.varied(self.cfgs, *zip(*case.lengths, strict=True), target_sizes=own_sizes)
        self.graphdef, _ = structure(self.cfgs[0].model, *self.padded)
        self.step = replicas.make_replicas_step(self.graphdef, self.cfgs[0])
        self.programs: dict[Any, Any] = {}

    def optimizer(self, number: int) -> Any:
        cfg, (each, all_) = self.cfgs[number], self.case.lengths[number]
        return optim.make_optimizer(
            cfg.optim, optim.make_schedule(cfg.optim, steps_per_epoch=each, total_steps=all_)
        )

    def start(self, number: int) -> step_lib.TrainState:
        """A run's own first state."""
        _, shapes = structure(self.cfgs[number].model, *self.case.sizes[number])
        rng = np.random.default_rng(number)
        params = jax.tree.map(lambda leaf: 0.4 * rng.standard_normal(leaf.shape), shapes)
        ema = params if self.cfgs[number].optim.ema else None
        key = np.array([number, 17], np.uint32)
        return jax.device_get(
            step_lib.TrainState(np.int32(0), params, self.optimizer(number).init(params), ema, key)
        )

    def batch(self, number: int, update: int, common: bool) -> Batch:
        """A run's own batch, in its own shape or in the common one."""
        rng = np.random.default_rng([number, update])
        (source, target), sizes = self.case.shapes[number], self.case.sizes[number]
        lengths = [rng.integers(1, size + 1, ROWS).astype(np.int32) for size in (source, target)]
        lengths[0][-1] = lengths[1][-1] = 0
        ids = [
            rng.integers(4, entries, (ROWS, size)).astype(np.int32)
            for entries, size in zip(sizes, (source, target), strict=True)
        ]
        if common:
            gaps = [whole - own for whole, own in zip(self.longest, (source, target), strict=True)]
            ids = [np.pad(side, ((0, 0), (0, gap))) for side, gap in zip(ids, gaps, strict=True)]
        index = np.array([*rng.integers(0, 100, ROWS - 1), -1], np.int32)
        return Batch(ids[0], lengths[0], ids[1], lengths[1], index)

    def apart(self, number: int) -> tuple[step_lib.TrainState, list[step_lib.Metrics]]:
        """A run by itself."""
        # Runs that differ in their seeds alone are one program.
        kind = (
            variation.put(self.cfgs[number], {"run.seed": 0}),
            *self.case.sizes[number],
            self.case.lengths[number],
        )
        if kind not in self.programs:
            graphdef, _ = structure(self.cfgs[number].model, *self.case.sizes[number])
            train = step_lib.make_train_step(graphdef, self.cfgs[number], self.optimizer(number))
            self.programs[kind] = quick_jit(train)
        train, state, told = self.programs[kind], jax.device_put(self.start(number)), []
        for update in range(UPDATES):
            state, metrics = train(state, self.batch(number, update, common=False))
            told.append(jax.device_get(metrics))
        return jax.device_get(state), told

    def stacked_start(self) -> step_lib.TrainState:
        starts = [self.start(number) for number in range(len(self.cfgs))]
        return replicas.stack([replicas.pad(start, *self.padded) for start in starts])

    def stacked_batch(self, update: int) -> Batch:
        return replicas.stack([self.batch(number, update, common=True) for number in range(len(self.cfgs))])


@functools.cache
def structure(cfg: ModelConfig, source: int, target: int) -> tuple[nnx.GraphDef, Any]:
    def build() -> Seq2Seq:
        return Seq2Seq(cfg, source, target, rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64)

    return step_lib.split(nnx.eval_shape(build))


def assert_trees(check: Any, one: Any, other: Any, **tolerance: float) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (path, left), right in pairs:
        check(left, right, err_msg=jax.tree_util.keystr(path), **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_replicas_do_what_each_run_does_by_itself(x64, name):
    runs = Runs(CASES[name])
    train, everyone = quick_jit(runs.step), np.ones(len(runs.cfgs), bool)
    state, told = jax.device_put(runs.stacked_start()), []
    for update in range(UPDATES):
        state, metrics = train(state, runs.numbers, everyone, runs.stacked_batch(update))
        told.append(jax.device_get(metrics))
    assert train._cache_size() == 1
    state = jax.device_get(state)
    for number, sizes in enumerate(runs.case.sizes):
        wanted, wanted_told = runs.apart(number)
        got = replicas.one(state, number)
        assert_trees(np.testing.assert_allclose, replicas.cut(got, *sizes), wanted, **CLOSE)
        assert_trees(
            np.testing.assert_allclose, replicas.one(told_R(told), number), told_R(wanted_told), **CLOSE
        )
        # What pads a vocabulary was never moved, nor did it ever get a gradient: no moment is there.
        assert_trees(
            np.testing.assert_array_equal, replicas.pad(replicas.cut(got, *sizes), *runs.padded), got
        )
        assert float(wanted_told[-1].learning_rate) > 0


def told_R(told: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis=-1), *told)


def test_the_cases_meet_every_kind(x64):
    cfgs = [cfg for case in CASES.values() for cfg in Runs(case).cfgs]
    assert {cfg.model.cell for cfg in cfgs} == set(config.CELLS)
    assert {(cfg.model.attention, cfg.model.input_feeding) for cfg in cfgs} == {
        (attention, feeding) for attention in config.ATTENTIONS for feeding in (False, True)
    }
    assert {cfg.model.tie for cfg in cfgs} == set(config.TIES)
    assert {cfg.optim.name for cfg in cfgs} == set(config.OPTIMIZERS)
    assert {cfg.optim.schedule for cfg in cfgs} == set(config.SCHEDULES)
    assert set(variation.VARIABLE) - {"model.embedding_dropout"} == {
        name for case in CASES.values() for name in case.varied
    }


def test_a_replica_that_is_not_active_keeps_its_state_bit_for_bit(x64):
    runs = Runs(CASES["languages"])
    train = quick_jit(runs.step)
    start = runs.stacked_start()
    # What diverged stays as it is, and harms nobody.
    start.params["softmax_bias"][1] = np.nan
    batch = runs.stacked_batch(0)
    state, metrics = jax.device_get(train(start, runs.numbers, np.array([True, False]), batch))
    assert_trees(np.testing.assert_array_equal, replicas.one(state, 1), replicas.one(start, 1))
    both, _ = jax.device_get(train(runs.stacked_start(), runs.numbers, np.array([True, True]), batch))
    assert_trees(np.testing.assert_array_equal, replicas.one(state, 0), replicas.one(both, 0))
    assert state.step.tolist() == [1, 0] and both.step.tolist() == [1, 1]


def test_one_after_the_other_is_the_same_as_all_together(x64):
    runs = Runs(CASES["target-tied"])
    arguments = runs.stacked_start(), runs.numbers, np.array([False, True]), runs.stacked_batch(0)
    in_turn = quick_jit(replicas.make_replicas_step(runs.graphdef, runs.cfgs[0], together=False))
    pairs = jax.device_get((in_turn(*arguments), quick_jit(runs.step)(*arguments)))
    assert_trees(np.testing.assert_allclose, *pairs, **CLOSE)
    assert pairs[0][0].step.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["languages", "pieces"])
def test_replicas_share_the_trip_counts_of_all_loops(x64, name):
    """A count for each would be a loop whose condition asks all, and that selects what it carries."""
    runs = Runs(CASES[name])
    arguments = runs.stacked_start(), runs.numbers, np.ones(2, bool), runs.stacked_batch(0)
    loops = list(whiles(jax.make_jaxpr(runs.step)(*arguments).jaxpr))
    assert len(loops) >= 5  # both sides there and back, and the softmax
    for loop in loops:
        assert loop.params["cond_jaxpr"].out_avals[0].shape == ()


def whiles(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from whiles(inner)


@pytest.mark.parametrize(("count", "devices", "shape"), [(2, 4, (2, 2)), (3, 2, (1, 2))])
def test_devices_share_out_replicas_and_rows(x64, count, devices, shape):
    """Summed in another order, and nothing else."""
    simple = {"model.attention": "none", "model.embedding_dropout": 0.25}
    sizes, lengths, shapes = ((9, 13), (12, 7), (8, 8))[:count], ((2, 4),) * count, ((5, 4),) * count
    runs = Runs(Case(simple, sizes=sizes, lengths=lengths, shapes=shapes))
    mesh = sharding.make_replicas_mesh(count, jax.devices()[:devices])
    assert tuple(mesh.shape.values()) == shape
    train, alone = sharding.jit_replicas_step(runs.step, mesh), quick_jit(runs.step)
    wanted, active = jax.device_put(runs.stacked_start()), np.arange(count) != 1
    state, numbers, flags = sharding.place_replicas((runs.stacked_start(), runs.numbers, active), mesh)
    for update in range(2):
        batch = runs.stacked_batch(update)
        state, metrics = train(state, numbers, flags, sharding.replicas_to_global(batch, mesh))
        wanted, wanted_metrics = alone(wanted, runs.numbers, active, batch)
    assert state.params["softmax_bias"].sharding.spec == jax.sharding.PartitionSpec("replica")
    assert_trees(np.testing.assert_allclose, sharding.to_host(state), jax.device_get(wanted), **CLOSE)
    assert_trees(
        np.testing.assert_allclose, sharding.to_host(metrics), jax.device_get(wanted_metrics), **CLOSE
    )


def test_replicas_are_evaluated_as_each_by_itself(x64):
    runs = Runs(CASES["target-tied"])
    mesh = sharding.make_replicas_mesh(2, jax.devices()[:2])
    evaluate = sharding.jit_replicas_eval_step(replicas.make_replicas_eval_step(runs.graphdef), mesh)
    params, sizes = sharding.place_replicas((runs.stacked_start().params, runs.numbers.target_size), mesh)
    sums = sharding.to_host(evaluate(params, sizes, sharding.replicas_to_global(runs.stacked_batch(0), mesh)))
    for number in range(2):
        graphdef, _ = structure(runs.cfgs[number].model, *runs.case.sizes[number])
        own = quick_jit(step_lib.make_eval_step(graphdef))
        wanted = own(runs.start(number).params, runs.batch(number, 0, common=False))
        assert_trees(np.testing.assert_allclose, replicas.one(sums, number), jax.device_get(wanted), **CLOSE)


def test_padding_is_taken_away_again(x64):
    runs = Runs(CASES["languages"])
    start = runs.start(1)
    padded = replicas.pad(start, 20, 30)
    assert padded.params["softmax_kernel"].shape == (6, 30) and padded.params["source_embedding"].shape == (
        20,
        4,
    )
    assert padded.opt_state[0].mu["softmax_bias"].shape == (30,)
    assert_trees(np.testing.assert_array_equal, replicas.cut(padded, *runs.case.sizes[1]), start)
