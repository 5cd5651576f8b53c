"""Planning a sweep: cells from axes, programs from cells, and what both are believed to cost."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from s2s import axes
from s2s import config as config_lib
from s2s.batch import Batch
from s2s.learn import optim
from s2s.learn import step as step_lib
from s2s.sweep import cells, cost, grouping
from s2s.sweep.flops import Tokens

CPU = cost.Machine("cpu", 2, 16 * cost.GIB)
# Some 32 words of eight symbols, as in pronunciation.
WORDS = cost.Sizes(40, 80, 3600, 112, Tokens(32, 260, 240, 2000), 9.0, 9.0, 0.06, (32, 12, 12))


def base(**overrides):
    config = config_lib.default()
    config.model.embedding = 128
    config.model.hidden = 128
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config


def made(points, fixed=(), **overrides):
    return cells.make_cells(base(**overrides).to_dict(), points, fixed)


def divided(points, machine=CPU, sizes=WORDS, **options):
    found = made(points)
    return grouping.divide(found, grouping.costs(found, lambda cfg: sizes, machine), machine, **options)


def test_cells_have_configs_of_their_own():
    found = made(axes.product(axes.grid({"model.attention": ["dot", "concat"]}), axes.seeds(2)))
    assert [cell.name for cell in found] == [
        "attention=dot_seed=1", "attention=dot_seed=2", "attention=concat_seed=1", "attention=concat_seed=2",
    ]  # fmt: skip
    assert [cell.row for cell in found[1:3]] == ["attention=dot", "attention=concat"]
    assert found[2].cfg.model.attention == "concat" and found[2].cfg.run.seed == 1
    assert found[2].cfg.name == "attention=concat_seed=1"
    assert found[0].cfg.model.embedding == 128, "what no axis sets is the experiment's"


def test_all_problems_of_all_cells_are_told_at_once():
    points = axes.union(
        axes.grid({"model.attention": ["dot", "genral"]}),
        axes.grid({"model.hiden": [3], "model.hidden": [31, 33]}),
        axes.axis("optim.learning_rate", [-1.0, "fast"]),
        axes.grid({"model.cell": ["gruu"], "model.bridge": ["cop"]}),
    )
    with pytest.raises(cells.SweepError) as caught:
        made(points)
    told = str(caught.value)
    assert "config.model.attention='genral' is none of" in told and "in attention=genral" in told
    assert "config.model.hiden does not exist: did you mean config.model.hidden?" in told
    assert "in hiden=3_hidden=31, hiden=3_hidden=33" in told
    assert "learning_rate=-1.0 must be at least 0" in told and "in learning_rate=-1" in told
    assert "learning_rate='fast' must be of type float" in told
    assert "did you mean 'gru'" in told and "did you mean 'copy'" in told, "both of one cell"
    assert "attention=dot\n" not in told


@pytest.mark.parametrize(
    ("points", "fixed", "told"),
    [
        ([], (), "no cells"),
        (None, (), r"sweep\(\) must return axes"),
        ([{"model.hidden": 3}], (), r"sweep\(\) must return axes"),
        (axes.axis("model.hidden", [64]), ["model.hidden"], "leave the override out"),
        (axes.axis("run.replicas", [2]), (), "use axes.seeds"),
        (axes.axis("name.of", [2]), (), "config.name is no part"),
    ],
)
def test_what_makes_no_sweep_is_told(points, fixed, told):
    with pytest.raises(cells.SweepError, match=told):
        made(points, fixed)


def test_cells_that_fit_together_are_replicas():
    points = axes.product(
        axes.grid({"model.attention": ["dot", "general"], "optim.learning_rate": [1e-3, 2e-3]}),
        axes.seeds(2),
    )
    programs = divided(points, most=99)
    # Scores are other programs; learning rates and seeds are numbers.
    assert [len(program) for program in programs] == [4, 4]
    assert all("attention=dot" in name for name in programs[0])


@pytest.mark.parametrize(("most", "sizes"), [(1, [1] * 7), (3, [2, 3, 2]), (4, [4, 3]), (7, [7])])
def test_programs_hold_no_more_than_allowed_and_are_even(most, sizes):
    programs = divided(axes.seeds(7), most=most)
    assert sorted(map(len, programs)) == sorted(sizes)
    assert sum(programs, ()) == tuple(f"seed={seed}" for seed in range(1, 8))


def test_jobs_side_by_side_all_have_something_to_do():
    assert len(divided(axes.seeds(8), most=8, jobs=3)) == 3
    assert len(divided(axes.seeds(2), most=8, jobs=5)) == 2


def test_small_models_share_a_program_and_large_ones_do_not():
    """What was measured on a CPU: eight replicas of 128 units gain a half, of 256 units nothing."""
    programs = divided(axes.product(axes.axis("model.hidden", [128, 256]), axes.seeds(8)))
    assert [len(program) for program in programs] == [8] + [1] * 8


def test_an_accelerator_takes_more_and_memory_is_the_bound():
    def most(machine):
        (cell,) = made(axes.axis("model.hidden", [256]))
        return cost.replicas(cost.estimate(cell.cfg, WORDS, machine), machine)

    large, small = (cost.Machine("gpu", 1, memory * cost.GIB) for memory in (80, 0.25))
    assert most(large) > 30
    assert 1 < most(small) < most(large)
    (cell,) = made(axes.axis("model.hidden", [256]))
    assert most(small) * cost.estimate(cell.cfg, WORDS, small).memory < 0.25 * cost.GIB
    assert most(cost.Machine("gpu", 1, 2**20)) == 1, "what does not fit is tried alone"


def test_replicas_share_turns_and_not_products():
    (cell,) = made(axes.axis("model.hidden", [128]))
    one = cost.estimate(cell.cfg, WORDS, CPU)
    assert cost.step_seconds(one, 8) == pytest.approx(one.shared + 8 * one.own)
    # The measurement that the numbers were taken from: 1.5 times as fast with eight.
    assert 8 * cost.step_seconds(one, 1) / cost.step_seconds(one, 8) == pytest.approx(1.5, rel=0.15)


@pytest.mark.parametrize(
    ("model", "shape", "vocab"),
    [
        (dict(hidden=32, cell="tanh", attention="concat", bidirectional=False), (32, 12, 16), 400),
    ],
)
def test_memory_is_that_of_the_compiled_step_within_a_factor_of_two(model, shape, vocab):
    model = dataclasses.replace(config_lib.ModelConfig(), **model)
    cfg = dataclasses.replace(config_lib.Config(), model=model)
    optimizer = optim.make_optimizer(
        cfg.optim, optim.make_schedule(cfg.optim, steps_per_epoch=1, total_steps=1)
    )
    graphdef, _ = step_lib.abstract_params(model, vocab, vocab)
    state = jax.eval_shape(lambda: step_lib.init_state(cfg, vocab, vocab, optimizer, 1)[1])
    B, S, T = shape
    batch = Batch(*(jax.ShapeDtypeStruct(one, jnp.int32) for one in [(B, S), (B,), (B, T), (B,), (B,)]))
    step = jax.jit(step_lib.make_train_step(graphdef, cfg, optimizer), donate_argnums=0)
    measured = step.lower(state, batch).compile().memory_analysis()
    sizes = cost.Sizes(vocab, vocab, B, 1, Tokens(B, B * S, B * T, B * S * T), S, T, 0.0, shape)

    found = cost.estimate(cfg, sizes, CPU)

    assert found.fixed == pytest.approx(measured.argument_size_in_bytes, rel=0.02)
    assert 0.5 < found.passing / measured.temp_size_in_bytes < 2


@pytest.mark.parametrize(
    ("text", "machine"),
    [
        ("gpu:80", cost.Machine("gpu", 1, 80 * cost.GIB)),
        ("tpu", cost.Machine("tpu", 1, 16 * cost.GIB)),
        ("cpu:8:4", cost.Machine("cpu", 4, 8 * cost.GIB)),
    ],
)
def test_machines_are_read(text, machine):
    assert cost.read_machine(text) == machine


@pytest.mark.parametrize("text", ["gpus", "gpu:much", "gpu:1:2:3", "gpu:-1", "gpu:80:1.5", ""])
def test_what_is_no_machine_is_told(text):
    with pytest.raises(ValueError, match=f"--machine={text} is no PLATFORM"):
        cost.read_machine(text)


def test_data_that_is_not_there_is_told_with_its_cells():
    def sizes(cfg):
        if "no" in cfg.data.train:
            raise ValueError(f"{cfg.data.train} is no file")
        return WORDS

    found = made(axes.product(axes.axis("data.train", ["no/such", "dates"]), axes.seeds(2)))
    with pytest.raises(
        cells.SweepError, match=r"no/such is no file\n    in train=no-such_seed=1, train=no-s"
    ):
        grouping.costs(found, sizes, CPU)


def planned(points, old=None, **options):
    found = made(points)
    costs = grouping.costs(found, lambda cfg: WORDS, CPU)
    programs = grouping.programs(found, old, costs, CPU, **options)
    return grouping.make_plan(config_lib.freeze(base()), found, programs, costs), costs


def test_programs_stay_and_new_cells_get_new_ones():
    old, _ = planned(axes.seeds(3))
    assert [program.cells for program in old.programs] == [("seed=1", "seed=2", "seed=3")]
    new, _ = planned(axes.seeds(5), old, apart=["seed=2"])
    assert new.programs[0] == old.programs[0]
    assert [program.cells for program in new.programs[1:]] == [("seed=4", "seed=5"), ("seed=2",)]
    assert [new.latest()[f"seed={seed}"] for seed in range(1, 6)] == ["p001", "p003", "p001", "p002", "p002"]


def test_a_plan_is_kept(tmp_path):
    plan, _ = planned(axes.product(axes.axis("model.attention", ["dot", "general"]), axes.seeds(2)))
    assert grouping.read_plan(tmp_path) is None
    grouping.write_plan(tmp_path, plan)
    kept = grouping.read_plan(tmp_path)
    assert kept.cells == plan.cells and kept.programs == plan.programs and kept.base == plan.base
    assert kept.steps == plan.steps and kept.seconds == pytest.approx(plan.seconds, abs=1e-3)
    (tmp_path / "sweep.json").write_text('{"base": 3}')
    with pytest.raises(cells.SweepError, match="sweep.json is damaged"):
        grouping.read_plan(tmp_path)


def test_the_plan_is_told():
    plan, costs = planned(axes.product(axes.axis("model.attention", ["dot", "general"]), axes.seeds(2)))
    states = {cell.name: cells.TO_COME for cell in plan.cells} | {"attention=dot_seed=1": cells.DONE}
    told = grouping.told(plan, costs, CPU, states)
    assert "attention=dot_seed=1      p001     done" in told
    assert "p002            2" in told and "attention=general_seed=1 to attention=general_seed=2" in told
    assert "3 of 4 cells to train in 2 programs" in told and "on cpu, 2 cores, 16 GiB" in told


def settled(points, old, folder, **overrides):
    found = made(points, **overrides)
    frozen = config_lib.freeze(base(**overrides))
    return cells.settle(found, old, folder / "cells", frozen, config_lib.freeze(base()))


def test_a_cell_keeps_its_name_whatever_the_sweep_calls_it_now(tmp_path):
    old = made(axes.axis("model.hidden", [64, 128]))
    # Another axis makes longer names; the cells with what was the default before are the old ones.
    points = axes.grid({"model.hidden": [64, 128], "model.dropout": [0.2, 0.3]})
    found, _ = settled(points, old, tmp_path)
    assert [cell.name for cell in found] == [
        "hidden=64", "hidden=64_dropout=0.3", "hidden=128", "hidden=128_dropout=0.3",
    ]  # fmt: skip
    assert all(cell.cfg.name == cell.name for cell in found)


def test_a_name_that_an_old_cell_keeps_is_not_given_again(tmp_path):
    old = made(axes.axis("model.hidden", [64]))
    points = axes.settings("hidden", {"64-or-so": {"model.hidden": 64}, "64": {"model.hidden": 66}})
    assert [cell.name for cell in settled(points, old, tmp_path)[0]] == ["hidden=64", "hidden=64-2"]


def test_another_sweep_is_refused(tmp_path):
    old = made(axes.axis("model.hidden", [64]))
    with pytest.raises(
        cells.SweepError, match=r"holds another sweep, of cells such as hidden=64.*\n  config"
    ):
        settled(axes.axis("model.layers", [2]), old, tmp_path, model__embedding=32)


def test_a_started_cell_is_not_trained_with_another_config(tmp_path):
    old = made(axes.axis("model.hidden", [64, 128]))
    (tmp_path / "cells" / "hidden=64").mkdir(parents=True)
    (tmp_path / "cells" / "hidden=64" / "config.json").write_text(config_lib.to_json(old[0].cfg))
    with pytest.raises(cells.SweepError, match="config.model.embedding: 128 there, 32 now\n    in hidden=64"):
        settled(axes.axis("model.hidden", [64, 128]), old, tmp_path, model__embedding=32)
    found, told = settled(axes.axis("model.hidden", [64, 128]), old, tmp_path, run__epochs=20.0)
    assert len(found) == 2 and told == ["config.run.epochs: was 10.0, is 20.0 from here on (1 of 2 cells)"]


def test_cells_that_are_no_longer_in_the_sweep_are_told(tmp_path):
    old = made(axes.axis("model.hidden", [64, 128]))
    _, told = settled(axes.axis("model.hidden", [128]), old, tmp_path)
    assert told == ["no longer in the sweep, left as they are: hidden=64"]
