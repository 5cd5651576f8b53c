"""The decoder in one call: its equations and their gradients, in every transformation, and where it runs."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import s2s
from s2s.config import ModelConfig
from s2s.kernels import decoder as kernel
from s2s.kernels import library
from s2s.kernels.decoder import Layer, Source
from s2s.nn.attention import SCORES, WINDOWS
from s2s.nn.decoder import Decoder
from s2s.nn.dropout import OFF, Dropout
from s2s.nn.encoder import Memory
from s2s.nn.equations import ready

ROOT = Path(s2s.__file__).parents[1]

# Steps, turns, rows, source positions, hidden, memory, layers, concat, dropout: around the edges of vectors
# (16), of panels (8, 32), of units of work (4 and 256 rows; 24, 32 or 48 columns).
CASES = [
    (1, 1, 8, 1, 16, 16, 1, False, False),
    (4, 4, 9, 5, 17, 33, 1, True, False),
    (5, 3, 16, 3, 32, 32, 2, False, True),
    (4, 4, 31, 6, 40, 24, 2, True, True),
    (3, 0, 8, 4, 24, 24, 2, True, False),
    (3, 2, 33, 4, 48, 96, 3, False, True),
    (2, 2, 12, 9, 7, 5, 3, True, True),
    (2, 2, 260, 3, 20, 20, 1, False, False),
    (3, 3, 64, 17, 129, 64, 2, True, False),
]
CASE = (4, 3, 9, 5, 24, 40, 2, True, True)

# Largest errors, of an array's largest number; found: 1.4e-6 and 2.1e-2.
BOUNDS = {"float32": 6e-6, "bfloat16": 6e-2}


def numbers(*shape, seed=0, dtype="float32"):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(jnp.dtype(dtype))


def problem(steps, turns, rows, sources, hidden, memory, layers, concat, drops, dtype="float32", replicas=()):
    """Operands of `decode`, and gradients by what comes of them."""
    make = partial(numbers, *replicas, dtype=dtype)

    def weights(*shape, seed):
        return (make(*shape, seed=seed) / np.sqrt(shape[0])).astype(jnp.dtype(dtype))

    lengths = np.random.default_rng([rows, sources]).integers(0, sources + 1, (*replicas, rows))
    lengths[..., 0], lengths[..., -1] = sources, 0
    asked = (weights(hidden, hidden, seed=1), make(hidden, seed=2)) if concat else ()
    source = Source(
        make(rows, sources, memory, seed=3),
        make(rows, sources, hidden, seed=4),
        weights(memory + hidden, hidden, seed=5),
        asked,
    )
    built = [
        Layer(
            weights(hidden, 4 * hidden, seed=10 * n + 11),
            weights(hidden, 4 * hidden, seed=10 * n + 12),
            make(4 * hidden, seed=10 * n + 13) if n else None,
            2 * (make(steps, rows, hidden, seed=10 * n + 14) > 0).astype(jnp.dtype(dtype))
            if n and drops
            else None,
            make(rows, hidden, seed=10 * n + 15),
            make(rows, hidden, seed=10 * n + 16),
        )
        for n in range(layers)
    ]
    gates = make(steps, rows, 4 * hidden, seed=6)
    gradients = make(steps, rows, hidden, seed=7), numbers(*replicas, steps, rows, sources, seed=8)
    operands = np.full(replicas, turns, np.int32), lengths.astype(np.int32), gates, source, built
    return operands, gradients


def derivatives(function, operands, gradients):
    """What comes of it, and gradients by all that has one."""
    turns, lengths, gates, source, layers = operands
    constants = [layer.factor_TBH for layer in layers]

    def of(gates, source, layers):
        layers = [layer._replace(factor_TBH=f) for layer, f in zip(layers, constants, strict=True)]
        return function(turns, lengths, gates, source, layers)

    bare = [layer._replace(factor_TBH=None) for layer in layers]
    out, pull = jax.vjp(of, gates, source, bare)
    return out, pull(gradients)


def found(*args):
    return jax.jit(lambda *args: derivatives(kernel.decode, *args))(*args)


def equations(turns, lengths, gates, source, layers):
    """Luong et al. 2015, sections 3 and 3.3, position by position."""
    steps, rows, width = gates.shape
    hidden = width // 4
    states = [(layer.h_BH, layer.c_BH) for layer in layers]
    feed, outputs, weights = jnp.zeros((rows, hidden)), [], []
    real = jnp.arange(source.memory_BSM.shape[1]) < lengths[:, None]
    for t in range(int(turns)):
        read = gates[t] + feed @ layers[0].input_kernel
        for n, layer in enumerate(layers):
            if n:
                x = states[n - 1][0] * (1 if layer.factor_TBH is None else layer.factor_TBH[t])
                read = x @ layer.input_kernel + layer.bias
            h, c = states[n]
            i, f, o, g = jnp.split(read + h @ layer.kernel, 4, axis=1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            states[n] = jax.nn.sigmoid(o) * jnp.tanh(c), c
        query = states[-1][0]
        if source.asked:
            kernel_, vector = source.asked
            scores = jnp.tanh((query @ kernel_)[:, None] + source.keys_BSH) @ vector
        else:
            scores = jnp.einsum("bh,bsh->bs", query, source.keys_BSH)
        exponentials = jnp.where(real, jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True)), 0)
        total = jnp.sum(exponentials, axis=1, keepdims=True)
        align = exponentials / jnp.where(total > 0, total, 1)
        context = jnp.einsum("bs,bsm->bm", align, source.memory_BSM)
        feed = jnp.tanh(jnp.concatenate([context, query], axis=1) @ source.kernel)
        outputs.append(feed)
        weights.append(align)
    rest = steps - len(outputs)
    outputs += [jnp.zeros((rows, hidden))] * rest
    weights += [jnp.zeros((rows, real.shape[1]))] * rest
    return jnp.stack(outputs), jnp.stack(weights)


def expected(operands, gradients):
    """In float64."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):

        def precise(x):
            x = np.asarray(x)
            return x if np.issubdtype(x.dtype, np.integer) else jnp.asarray(x.astype(np.float64))

        return jax.device_get(derivatives(equations, *jax.tree.map(precise, (operands, gradients))))


def assert_near(one, other, bound):
    for (path, x), y in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        worst = np.max(np.abs(x - y), initial=0)
        largest = max(np.max(np.abs(y), initial=0), 1e-3)
        assert worst <= bound * largest, f"{jax.tree_util.keystr(path)}: {worst / largest}"


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture
def loaded():
    """The library; no test of it without a compiler."""
    loaded = library.load()
    if loaded is None:
        pytest.skip("no library on this machine")
    return loaded


@pytest.fixture(params=["as it is", "without a matrix unit"])
def machine(request, loaded, monkeypatch):
    """Both ways of multiplying; what a test compiles must be its own function."""
    if request.param == "without a matrix unit":
        monkeypatch.setattr(loaded, "has_matrix_unit", False)
    return request.param


# ---- numbers ----


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_equations_and_their_gradients(case, machine):
    operands, gradients = problem(*case)
    assert_near(found(operands, gradients), expected(operands, gradients), BOUNDS["float32"])


@pytest.mark.parametrize("case", CASES[2:6], ids=str)
def test_the_equations_in_bfloat16(case, loaded):
    if not loaded.has_matrix_unit:
        pytest.skip("no matrix unit")
    operands, gradients = problem(*case, dtype="bfloat16")
    assert_near(found(operands, gradients), expected(operands, gradients), BOUNDS["bfloat16"])


def test_positions_that_are_not_walked_are_zeros_whatever_they_hold(machine):
    operands, gradients = problem(*CASE)
    turns = CASE[1]
    clean = found(operands, gradients)
    dirty = [
        operands[0],
        operands[1],
        np.concatenate([operands[2][:turns], np.full_like(operands[2][turns:], np.nan)]),
        *operands[3:],
    ]
    beyond = [np.concatenate([x[:turns], np.full_like(x[turns:], np.inf)]) for x in gradients]
    assert_same(found(dirty, tuple(beyond)), clean)
    (attentional, align), (d_gates, *_) = clean
    for array in (attentional, align, d_gates):
        assert np.any(array[turns - 1]) and not np.any(array[turns:])


def test_what_is_beyond_a_source_does_not_matter(machine):
    operands, gradients = problem(*CASE)
    clean = found(operands, gradients)
    turns, lengths, gates, source, layers = operands
    pads = np.arange(CASE[3]) >= lengths[:, None]
    dirty = source._replace(
        memory_BSM=np.where(pads[..., None], np.float32(np.nan), source.memory_BSM),
        keys_BSH=np.where(pads[..., None], np.float32(np.inf), source.keys_BSH),
    )
    out, (d_gates, d_source, d_layers) = found((turns, lengths, gates, dirty, layers), gradients)
    assert_same(out, clean[0])
    assert_same(
        (d_gates, d_source.asked, d_source.keys_BSH, d_layers),
        (clean[1][0], clean[1][1].asked, clean[1][1].keys_BSH, clean[1][2]),
    )
    assert not np.any(np.where(pads[..., None], d_source.keys_BSH, 0))


def test_a_row_is_the_same_whatever_is_beside_it(machine):
    operands, gradients = problem(*CASE)
    out = found(operands, gradients)[0]
    turns, lengths, gates, source, layers = operands
    gates = gates.copy()
    gates[:, 1] = np.nan
    other = found((turns, lengths, gates, source, layers), gradients)[0]
    assert_same([x[:, 2:] for x in other], [x[:, 2:] for x in out])
    assert np.isnan(other[0][: CASE[1], 1]).all()


def test_it_gives_the_same_every_time(machine):
    operands, gradients = problem(*CASES[-1])
    first = found(operands, gradients)
    for _ in range(5):
        assert_same(found(operands, gradients), first)


ALONE = """
import importlib.util, os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
spec = importlib.util.spec_from_file_location("test_decoder", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
print(tests.digest())
"""


def digest():
    """Of what comes of sizes that are worth several threads."""
    sizes = [(4, 3, 300, 9, 130, 100, 2, concat, True) for concat in (False, True)]
    leaves = jax.tree.leaves([found(*problem(*size)) for size in sizes])
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()


def test_one_thread_makes_of_it_what_several_do(loaded):
    """These are eight, as there are eight devices."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ALONE, __file__]
    alone = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.strip() == digest()


# ---- transformations ----


def test_no_replicas(loaded):
    operands, gradients = jax.tree.map(lambda x: x[:0], problem(*CASE, replicas=(1,)))
    operands = [np.int32(2), *operands[1:]]
    axes = [None, 0, 0, 0, 0]

    def all_of(operands, gradients):
        return derivatives(kernel.decode, operands, gradients)

    none = jax.jit(jax.vmap(all_of, in_axes=(axes, 0)))(operands, gradients)
    assert all(len(x) == 0 for x in jax.tree.leaves(none))


def test_replicas_are_as_one_after_the_other(machine):
    operands, gradients = problem(*CASE, replicas=(3,))
    together = jax.jit(jax.vmap(lambda *args: derivatives(kernel.decode, *args)))(operands, gradients)
    for replica in range(3):
        alone = jax.tree.map(lambda x, replica=replica: x[replica], (operands, gradients))
        (out, by), (one, by_one) = (
            jax.tree.map(lambda x, replica=replica: x[replica], together),
            found(*alone),
        )
        assert_same((out, by[0]), (one, by_one[0]))
        # Weight gradients of replicas are products of stacks, summed in another order.
        assert_near(by, by_one, BOUNDS["float32"])


def test_replicas_of_replicas_that_share_a_source(machine):
    operands, gradients = problem(*CASE, replicas=(2, 2))
    shared = problem(*CASE)[0]
    operands = [shared[0], shared[1], operands[2], shared[3], operands[4]]
    axes = [None, None, 0, None, 0]

    def all_of(operands, gradients):
        return derivatives(kernel.decode, operands, gradients)

    mapped = jax.vmap(jax.vmap(all_of, in_axes=(axes, 0)), in_axes=(axes, 0))
    together = jax.jit(mapped)(operands, gradients)
    for at in np.ndindex(2, 2):
        alone = [
            operand if axis is None else jax.tree.map(lambda x, at=at: x[at], operand)
            for operand, axis in zip(operands, axes, strict=True)
        ]
        one = found(alone, jax.tree.map(lambda x, at=at: x[at], gradients))
        assert_near(jax.tree.map(lambda x, at=at: x[at], together), one, BOUNDS["float32"])


def test_inside_of_checkpoints_and_loops(machine):
    operands, gradients = problem(*CASE)
    once = found(operands, gradients)
    again = jax.jit(lambda *args: derivatives(jax.checkpoint(kernel.decode), *args))(operands, gradients)
    assert_near(again, once, BOUNDS["float32"])

    def turn(_, out):
        return derivatives(kernel.decode, operands, gradients)

    empty = jax.tree.map(jnp.zeros_like, once)
    assert_near(jax.jit(lambda: jax.lax.fori_loop(0, 2, turn, empty))(), once, BOUNDS["float32"])


def test_on_eight_devices(machine):
    steps, turns, _, sources, hidden, memory, *rest = CASE
    operands, gradients = problem(steps, turns, 64, sources, hidden, memory, *rest)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    whole, rows, at_1 = PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")
    first, *others = operands[4]
    source = Source(rows, rows, whole, (whole, whole))
    layers = [
        Layer(whole, whole, None, None, rows, rows),
        *[Layer(whole, whole, whole, at_1, rows, rows)] * len(others),
    ]
    apart = jax.shard_map(
        kernel.decode,
        mesh=mesh,
        in_specs=(whole, rows, at_1, source, layers),
        out_specs=(at_1, at_1),
        check_vma=False,
    )
    assert_same(jax.jit(apart)(*operands), found(operands, gradients)[0])


# ---- where it runs ----


def model(attention="general", cell="lstm", dtype="float32", rows=8, layers=2, dropout=0.0):
    """A decoder, a memory of eight sources and embedded tokens."""
    cfg = dataclasses.replace(
        ModelConfig(),
        embedding=8,
        hidden=24,
        layers=layers,
        attention=attention,
        cell=cell,
        input_feeding=True,
        dropout=dropout,
    )
    decoder = Decoder(cfg, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    values = numbers(rows, 5, cfg.memory, dtype=dtype)
    mask = np.arange(5) < np.array([5, 3, 1, 0, 2, 4, 5, 5])[:rows, None]
    values = jnp.asarray(np.where(mask[..., None], values, 0))
    size = decoder.stack.cells[0].state_size
    states = ((jnp.asarray(numbers(rows, cfg.memory, seed=1, dtype=dtype)),) * size,) * cfg.encoder_depth
    memory = Memory(values, jnp.asarray(mask), decoder.attention.prepare(values), states[-1][0], states)
    return decoder, memory, jnp.asarray(numbers(rows, 4, 8, seed=2, dtype=dtype))


def targets(function, *args):
    """Names of the library's calls in a compiled program, and whether it has a loop."""
    text = jax.jit(function).lower(*args).compile().as_text()
    names = ("s2s_decoder", "s2s_decoder_back", "s2s_decoder_pack", "s2s_decoder_step")
    return {name for name in names if f'custom_call_target="{name}"' in text}, " while(" in text


@pytest.mark.parametrize("attention", ["general", "concat"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_decoder_runs_through_it_and_gives_what_its_loop_gives(attention, dropout, loaded, monkeypatch):
    decoder, memory, y_BTE = model(attention, layers=3, dropout=dropout)
    graphdef, params = nnx.split(decoder)
    drop = Dropout(jax.random.key(3), jnp.arange(8), 0.0, dropout, 0.0) if dropout else OFF

    def total(params, y_BTE):
        outputs = nnx.merge(graphdef, params).run(memory, y_BTE, drop, jnp.asarray(3))
        return sum(jnp.vdot(numbers(*x.shape, seed=5)[:, :3], x[:, :3]) for x in outputs)

    gradient = jax.value_and_grad(total, argnums=(0, 1))
    calls, _ = targets(gradient, params, y_BTE)
    assert calls == {"s2s_decoder", "s2s_decoder_back"}
    one = jax.jit(gradient)(params, y_BTE)
    monkeypatch.setattr(library, "load", lambda: None)
    other = jax.jit(lambda *args: gradient(*args))(params, y_BTE)
    assert_near(one, other, 1e-5)


@pytest.mark.parametrize(
    "what", [{"attention": "fixed"}, {"attention": "none"}, {"cell": "gru"}, {"rows": 7}], ids=str
)
def test_other_decoders_do_not(what, loaded):
    decoder, memory, y_BTE = model(**what)
    assert targets(lambda y_BTE: decoder.run(memory, y_BTE), y_BTE)[0] == set()


@pytest.mark.parametrize(
    "entries, name, attribute", [(SCORES, "general", "score"), (WINDOWS, "global", "window")]
)
def test_attention_of_ones_own_is_not_either(entries, name, attribute, loaded, monkeypatch):
    monkeypatch.setitem(entries, name, type("Own", (entries[name],), {}))
    decoder, memory, y_BTE = model()
    assert type(getattr(decoder.attention, attribute)).__name__ == "Own"
    assert targets(lambda y_BTE: decoder.run(memory, y_BTE), y_BTE)[0] == set()


@pytest.mark.parametrize("attention", ["general", "concat"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_step_is_a_position_of_the_loop(attention, beams, loaded, monkeypatch):
    decoder, memory, y_BTE = model(attention)
    tokens = jnp.asarray(numbers(4, 8, beams, 8, seed=6))

    def walk(memory, tokens):
        state, out = decoder.start(memory, beams), []
        for y_BKE in tokens:
            state, *found = decoder.step(memory, state, decoder.read(y_BKE))
            out.append((state, found))
        return out

    assert targets(walk, memory, tokens)[0] == {"s2s_decoder_pack", "s2s_decoder_step"}
    one = jax.jit(walk)(memory, tokens)
    monkeypatch.setattr(library, "load", lambda: None)
    assert_near(one, jax.jit(lambda *args: walk(*args))(memory, tokens), 1e-5)


def test_steps_of_replicas_are_as_one_after_the_other(machine):
    decoder, memory, _ = model("concat")
    gates = jnp.asarray(numbers(3, 8, 2, 4 * 24, seed=7))
    state = decoder.start(memory, 2)
    together = jax.jit(jax.vmap(lambda gates: decoder.step(memory, state, gates)))(gates)
    for replica in range(3):
        alone = jax.jit(lambda gates: decoder.step(memory, state, gates))(gates[replica])
        assert_same(jax.tree.map(lambda x, replica=replica: x[replica], together), alone)


def test_a_search_lays_weights_out_before_its_loop(loaded):
    decoder, memory, _ = model()
    gates = jnp.asarray(numbers(8, 2, 4 * 24, seed=7))

    def loop(state):
        step = ready(lambda state: decoder.step(memory, state, gates)[0], state)
        return jax.lax.fori_loop(0, 3, lambda _, state: step(state), state)

    equations = jax.make_jaxpr(loop)(decoder.start(memory, 2)).jaxpr.eqns
    (turns,) = (equation for equation in equations if equation.primitive.name == "scan")
    before = "".join(str(equation) for equation in equations[: equations.index(turns)])
    assert "s2s_decoder_pack" in before and "s2s_decoder_pack" not in str(turns)
    assert "s2s_decoder_step" in str(turns)
