"""Learning rates at points worked out by hand, and optimizers against their papers' equations."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from s2s import config
from s2s.config import OptimConfig
from s2s.learn import optim

EPOCH, TOTAL = 10, 100


def rate_of(**fields):
    return optim.make_schedule(OptimConfig(**fields), steps_per_epoch=EPOCH, total_steps=TOTAL)


def test_names_are_those_of_the_config():
    assert set(optim.SCHEDULES) == set(config.SCHEDULES)
    assert set(optim.OPTIMIZERS) == set(config.OPTIMIZERS)


@pytest.mark.parametrize(
    ("fields", "points"),
    [
        ({"schedule": "constant"}, {0: 1.0, 57: 1.0, 100: 1.0}),
        # Luong et al. 2015: ten epochs, the rate halved every epoch after five.
        ({"schedule": "luong"}, {0: 1.0, 49: 1.0, 50: 0.5, 59: 0.5, 60: 0.25, 70: 0.125, 99: 2.0**-5}),
        (
            {"schedule": "luong", "decay_start": 8.0, "decay_every": 0.5, "decay_factor": 0.1},
            {79: 1.0, 80: 0.1, 84: 0.1, 85: 0.01, 90: 0.001},
        ),
        ({"schedule": "luong", "decay_start": 0.0}, {0: 0.5, 9: 0.5, 10: 0.25}),
        ({"schedule": "cosine"}, {0: 1.0, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 100: 0.0, 120: 0.0}),
        ({"schedule": "linear"}, {0: 1.0, 25: 0.75, 50: 0.5, 99: 0.01, 100: 0.0, 120: 0.0}),
        ({"schedule": "inverse_sqrt"}, {0: 1.0, 1: 1.0, 4: 0.5, 100: 0.1}),
        ({"schedule": "exponential"}, {0: 1.0, 5: math.sqrt(0.5), 10: 0.5, 20: 0.25}),
        ({"schedule": "exponential", "decay_every": 2.0, "decay_factor": 0.9}, {20: 0.9, 40: 0.81}),
        # With warm-up: up to the peak, then the same, with the rest of the run for cosine and linear.
        ({"schedule": "constant", "warmup_steps": 20}, {0: 0.0, 5: 0.25, 20: 1.0, 60: 1.0}),
        ({"schedule": "luong", "warmup_steps": 20}, {10: 0.5, 20: 1.0, 49: 1.0, 50: 0.5, 60: 0.25}),
        ({"schedule": "cosine", "warmup_steps": 20}, {10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0}),
        ({"schedule": "linear", "warmup_steps": 20}, {10: 0.5, 20: 1.0, 40: 0.75, 60: 0.5, 100: 0.0}),
        ({"schedule": "inverse_sqrt", "warmup_steps": 20}, {10: 0.5, 20: 1.0, 80: 0.5}),
        ({"schedule": "exponential", "warmup_steps": 20}, {10: 0.5, 20: 1.0, 30: 0.5}),
    ],
)
def test_rate_at_known_steps(fields, points):
    for peak in (1.0, 0.003):
        schedule = rate_of(learning_rate=peak, **fields)
        rates = [schedule(step) for step in points]
        rounding = peak * np.finfo(np.float32).eps
        expected = [peak * value for value in points.values()]
        np.testing.assert_allclose(rates, expected, rtol=2e-6, atol=rounding)
        traced = jax.vmap(schedule)(jnp.array(list(points), jnp.int32))
        assert traced.dtype == jnp.float32
        np.testing.assert_allclose(traced, expected, rtol=2e-6, atol=rounding)


@pytest.mark.parametrize("warmup", [0, 20])
@pytest.mark.parametrize("name", config.SCHEDULES)
def test_rate_rises_to_its_highest_and_falls_from_there(name, warmup):
    schedule = rate_of(schedule=name, warmup_steps=warmup, learning_rate=0.7)
    rates = np.array(jax.vmap(schedule)(jnp.arange(TOTAL + 1)))
    assert rates.max() == np.float32(0.7) == rates[warmup]
    assert np.all(np.diff(rates[: warmup + 1]) > 0)
    assert np.all(np.diff(rates[warmup:]) <= 0)
    assert (rates[-1] == 0) == (name in ("cosine", "linear"))


def test_no_two_schedules_agree():
    curves = {
        name: np.array(jax.vmap(rate_of(schedule=name))(jnp.arange(TOTAL))) for name in config.SCHEDULES
    }
    for one, other in itertools.combinations(curves, 2):
        assert not np.allclose(curves[one], curves[other]), (one, other)


def test_a_run_shorter_than_its_warmup_only_rises():
    schedule = optim.make_schedule(
        OptimConfig(schedule="cosine", warmup_steps=50, learning_rate=1.0),
        steps_per_epoch=EPOCH,
        total_steps=20,
    )
    np.testing.assert_allclose([schedule(step) for step in (0, 10, 19)], [0.0, 0.2, 0.38], rtol=1e-6)


PARAMS = {"a": np.array([1.0, -2.0, 3.0]), "b": np.array([[0.5, -0.25]])}
GRADS = [
    {"a": np.array([0.1, -0.2, 0.3]), "b": np.array([[1.0, 2.0]])},
    {"a": np.array([-0.4, 0.5, 0.0]), "b": np.array([[0.3, -2.0]])},
    {"a": np.array([0.4, 0.1, 0.9]), "b": np.array([[-0.3, 1.0]])},
]
CFG = OptimConfig(learning_rate=0.1, clip_norm=0.0, weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-3)
RATES = [0.1, 0.05, 0.02]


def run(cfg, steps=3):
    optimizer = optim.make_optimizer(cfg, lambda step: jnp.array(RATES)[step])
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for grads in GRADS[:steps]:
        factor = optim.clip(cfg, optax.tree.norm(jax.tree.map(jnp.asarray, grads)))
        clipped = jax.tree.map(lambda grad, factor=factor: grad * factor, grads)
        updates, state = jax.jit(optimizer.update)(clipped, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def oracle(cfg):
    """Every rule on one leaf at a time, from its paper."""
    after = {}
    for leaf, value in PARAMS.items():
        p, m, v, d = value.copy(), 0.0, 0.0, 0.0
        for t, (grads, rate) in enumerate(zip(GRADS, RATES, strict=True), 1):
            g = grads[leaf]
            if cfg.name == "sgd":
                p = p - rate * g
            elif cfg.name in ("adam", "adamw"):  # Kingma and Ba 2015, algorithm 1
                m = cfg.beta1 * m + (1 - cfg.beta1) * g
                v = cfg.beta2 * v + (1 - cfg.beta2) * g * g
                move = m / (1 - cfg.beta1**t) / (np.sqrt(v / (1 - cfg.beta2**t)) + cfg.epsilon)
                decay = cfg.weight_decay if cfg.name == "adamw" else 0.0
                p = p - rate * (move + decay * p)
            else:  # Zeiler 2012, algorithm 1
                v = 0.95 * v + 0.05 * g * g
                move = np.sqrt(d + 1e-6) / np.sqrt(v + 1e-6) * g
                d = 0.95 * d + 0.05 * move * move
                p = p - rate * move
        after[leaf] = p
    return after


@pytest.mark.parametrize("name", config.OPTIMIZERS)
def test_optimizer_is_its_equation(name):
    cfg = dataclasses.replace(CFG, name=name)
    params, _ = run(cfg)
    for leaf, expected in oracle(cfg).items():
        moved = np.asarray(params[leaf], np.float64) - PARAMS[leaf]
        np.testing.assert_allclose(moved, expected - PARAMS[leaf], rtol=2e-4, atol=3e-7)


def test_no_two_optimizers_agree():
    after = {name: run(dataclasses.replace(CFG, name=name), steps=2)[0] for name in config.OPTIMIZERS}
    for one, other in itertools.combinations(after, 2):
        for leaf in PARAMS:
            assert not np.allclose(after[one][leaf], after[other][leaf], rtol=1e-4), (one, other)


@pytest.mark.parametrize("name", config.OPTIMIZERS)
def test_optimizer_descends(name):
    cfg = OptimConfig(name=name, learning_rate=0.1, schedule="constant")
    optimizer = optim.make_optimizer(cfg, rate_of(name=name, learning_rate=0.1))
    params = jnp.array([3.0, -2.0])
    state = optimizer.init(params)
    height = [float(jnp.sum(params**2))]
    for _ in range(20):
        updates, state = optimizer.update(2 * params, state, params)
        params = optax.apply_updates(params, updates)
        height.append(float(jnp.sum(params**2)))
    assert np.all(np.diff(height) < 0)


def test_clipping_is_by_global_norm_and_0_is_never():
    norm = math.sqrt(sum(np.sum(leaf**2) for leaf in GRADS[0].values()))
    for limit, factor in ((1.0, 1.0 / norm), (norm + 1, 1.0), (0.0, 1.0)):
        params, _ = run(dataclasses.replace(CFG, name="sgd", clip_norm=limit), steps=1)
        for leaf, before in PARAMS.items():
            expected = before - RATES[0] * factor * GRADS[0][leaf]
            np.testing.assert_allclose(params[leaf], expected, rtol=1e-6)


def test_learning_rate_is_that_of_the_last_update():
    for steps in (1, 2, 3):
        _, state = run(dataclasses.replace(CFG, name="adam"), steps=steps)
        assert optim.learning_rate(state) == np.float32(RATES[steps - 1])


def test_state_is_arrays_of_stable_types():
    for name in config.OPTIMIZERS:
        optimizer = optim.make_optimizer(dataclasses.replace(CFG, name=name), rate_of(schedule="cosine"))
        params = jax.tree.map(jnp.asarray, PARAMS)
        state = optimizer.init(params)
        _, after = optimizer.update(params, state, params)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)


def test_one_program_serves_many_learning_rates():
    base = rate_of(schedule="cosine", learning_rate=1.0)
    params = jax.tree.map(jnp.asarray, PARAMS)

    def one(scale, decay):
        cfg = dataclasses.replace(CFG, name="adamw", weight_decay=decay)
        optimizer = optim.make_optimizer(cfg, lambda step: scale * base(step))
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    scales, decays = jnp.array([0.1, 0.5]), jnp.array([0.0, 0.2])
    both = jax.jit(jax.vmap(one))(scales, decays)
    for replica in range(2):
        alone = one(float(scales[replica]), float(decays[replica]))
        for leaf in PARAMS:
            np.testing.assert_allclose(both[leaf][replica], alone[leaf], rtol=1e-6)


@pytest.mark.parametrize("name", config.SCHEDULES)
def test_one_program_serves_runs_of_other_lengths_and_rates(name):
    """Traced milestones and rates give the rates of the runs by themselves."""
    runs = [(0.5, 0.25, 10, 40), (0.003, 0.9, 7, 33)]
    cfgs = [
        OptimConfig(
            schedule=name,
            warmup_steps=5,
            learning_rate=peak,
            decay_factor=factor,
            decay_start=1.5,
            decay_every=0.7,
        )
        for peak, factor, _, _ in runs
    ]
    turns = [
        optim.milestones(cfg, steps_per_epoch=each, total_steps=all_)
        for cfg, (_, _, each, all_) in zip(cfgs, runs, strict=True)
    ]
    steps = jnp.arange(50)

    def rates(peak, factor, turns):
        own = dataclasses.replace(cfgs[0], learning_rate=peak, decay_factor=factor)
        return jax.vmap(optim.schedule_between(own, turns))(steps)

    numbers = [
        jnp.array(column, jnp.float32) for column in zip(*((run[0], run[1]) for run in runs), strict=True)
    ]
    got = jax.jit(jax.vmap(rates))(*numbers, jax.tree.map(lambda *column: jnp.array(column), *turns))
    for number, (cfg, (_, _, each, all_)) in enumerate(zip(cfgs, runs, strict=True)):
        schedule = optim.make_schedule(cfg, steps_per_epoch=each, total_steps=all_)
        np.testing.assert_allclose(got[number], jax.vmap(schedule)(steps), rtol=3e-6, atol=1e-9)
