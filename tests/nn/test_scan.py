"""The scan with deferred weight gradients against plain autodiff of ``jax.lax.scan``."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core as jexcore
from jax.sharding import Mesh, PartitionSpec

from s2s.nn import decoder, recurrent
from s2s.nn.bound import common_max
from s2s.nn.cells import CELLS
from s2s.nn.product import product
from s2s.nn.scan import scan
from tests.model_variants import VARIANTS, built, make_batch, quick_jit

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
LENGTH = 5

pytestmark = pytest.mark.usefixtures("x64")


def naive(step, carry, xs, turns, *, reverse=False):
    """The same function without a thought for speed: autodiff of a scan over all positions."""

    def body(carry, inputs):
        t, x = inputs
        new, y = step(carry, x)
        walked = t < turns
        keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(walked, new, old))
        return keep(new, carry), keep(y, jax.tree.map(jnp.zeros_like, y))

    return jax.lax.scan(body, carry, (jnp.arange(len(jax.tree.leaves(xs)[0])), xs), reverse=reverse)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def assert_close(found, expected):
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, **CLOSE), found, expected)


def value_and_gradient(scan, step, weights, carry, xs, turns, reverse=False):
    """Outputs, and the gradient of a sum that tells all of them apart, by everything real."""

    def total(weights, carry, xs):
        out = scan(functools.partial(step, weights), carry, xs, turns, reverse=reverse)
        leaves = [leaf for leaf in jax.tree.leaves(out) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(jnp.sum(leaf * numbers(*leaf.shape, seed=n)) for n, leaf in enumerate(leaves)), out

    return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True, allow_int=True)(weights, carry, xs)


def cell_step(weights, carry, x):
    """Constants read by products on either side, by two, by a product and a sum, made of others, unread."""
    h, c = carry
    weights = jax.tree.map(jnp.asarray, weights)
    gates = x["gates"] + product(h, weights["U"]) + jnp.einsum("gh,bh->bg", weights["U"].T, c)
    gates = gates + weights["bias"] * jnp.tanh(weights["scale"])
    h = jnp.where(x["mask"][:, None], jnp.tanh(gates), h)
    align = jax.nn.softmax(jnp.einsum("bh,bsh->bs", h, weights["keys"]))
    c = jnp.einsum("bs,bsh->bh", align, weights["keys"]) + jax.nn.relu(c) @ (h.T @ h)
    c = c + jnp.einsum("bs,bsh->bh", align, weights["keys"] * 2.0)
    c = c + h @ weights["mixed"] + jnp.sum(weights["mixed"] * h[:3], axis=0, keepdims=True)
    return (h, c), {"h": h, "align": align, "count": x["number"] + 1}


WEIGHTS = {
    "U": numbers(3, 3) / 2,
    "bias": numbers(4, 3, seed=1),
    "scale": numbers(4, 3, seed=2),
    "keys": numbers(4, 6, 3, seed=3),
    "mixed": numbers(3, 3, seed=9) / 2,
    "unread": numbers(2, seed=4),
}
CARRY = numbers(4, 3, seed=5), numbers(4, 3, seed=6)
XS = {
    "gates": numbers(LENGTH, 4, 3, seed=7),
    "mask": np.random.default_rng(8).random((LENGTH, 4)) < 0.7,
    "number": np.arange(LENGTH),
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 3, LENGTH])
def test_values_and_gradients_are_those_of_the_plain_scan(turns, reverse):
    @quick_jit
    def both(turns):
        arguments = cell_step, WEIGHTS, CARRY, XS, turns, reverse
        return value_and_gradient(scan, *arguments), value_and_gradient(naive, *arguments)

    (found, d_found), (expected, d_expected) = both(jnp.asarray(turns))
    assert_close(found, expected)
    for number in (0, 1):
        assert_close(d_found[number], d_expected[number])
    assert_close(d_found[2]["gates"], d_expected[2]["gates"])
    assert bool(jnp.all(d_found[0]["unread"] == 0))


@pytest.mark.parametrize("transform", ["remat", "vmap", "shard_map"])
def test_gradients_under_transformations(transform):
    turns = jnp.asarray([3, LENGTH])

    def gradient(scan, batch):
        carry, xs, turns = batch
        turns = common_max(turns)

        def total(weights):
            walk = functools.partial(scan, functools.partial(cell_step, weights))
            if transform == "remat":
                walk = jax.checkpoint(walk)
            (h, c), ys = walk(carry, xs, turns)
            return jnp.sum(h * c) + jnp.sum(ys["h"] ** 2)

        return jax.grad(total)(jax.tree.map(jnp.asarray, WEIGHTS))

    batches = (*jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (CARRY, XS)), turns)

    @quick_jit
    def run(batches):
        found = {}
        for name, way in (("scan", scan), ("naive", naive)):
            apart = [
                gradient(way, (*jax.tree.map(lambda x, r=r: x[r], batches[:2]), jnp.asarray(LENGTH)))
                for r in range(2)
            ]
            apart = jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart)
            if transform == "vmap":
                apart = jax.vmap(functools.partial(gradient, way))(batches)
            elif transform == "shard_map":
                mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

                def one(batches, way=way):
                    first = jax.tree.map(lambda x: x[0], batches[:2])
                    return jax.tree.map(lambda x: x[None], gradient(way, (*first, jnp.asarray(LENGTH))))

                spec = PartitionSpec("data")
                apart = jax.shard_map(one, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False)(
                    batches
                )
            found[name] = apart
        return found

    found = run(batches)
    assert_close(found["scan"], found["naive"])


def test_weight_gradients_wait_until_after_the_loop():
    """No weight-sized sum is carried through the loops; only what is not read by a product is."""

    def total(weights):
        (h, _), _ = scan(functools.partial(cell_step, weights), CARRY, XS, jnp.asarray(LENGTH))
        return jnp.sum(h)

    carried = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "while":
                carried.append([variable.aval.shape for variable in equation.outvars])
            for inner in jexcore.jaxprs_in_params(equation.params):
                look(inner)

    look(jax.make_jaxpr(jax.grad(total))(jax.tree.map(jnp.asarray, WEIGHTS)).jaxpr)
    assert len(carried) == 2
    for shapes in carried:
        assert WEIGHTS["keys"].shape not in shapes
    assert carried[1].count(WEIGHTS["mixed"].shape) == 1  # and none for U


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("directions", [1, 2])
def test_cells_over_masked_sequences(name, directions, monkeypatch):
    cells = [
        CELLS[name](4, 3, rngs=nnx.Rngs(way), dtype=jnp.float64, param_dtype=jnp.float64)
        for way in range(directions)
    ]
    graphdef, params = nnx.split(cells)
    mask_BS = jnp.arange(LENGTH)[None, :] < jnp.asarray([2, 4, 0, 1])[:, None]
    x_BSE, state = (
        jnp.asarray(numbers(4, LENGTH, 4)),
        (jnp.asarray(numbers(4, 3, seed=1)),) * CELLS[name].state_size,
    )

    def gradient(params, x_BSE, state):
        def total(params, x_BSE, state):
            cells = nnx.merge(graphdef, params)
            outputs, lasts = recurrent.run(cells, x_BSE, mask_BS, [state] * directions)
            squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(lasts)]
            return jnp.sum(outputs * numbers(*outputs.shape)) + sum(squares)

        return jax.grad(total, argnums=(0, 1, 2))(params, x_BSE, state)

    found = quick_jit(gradient)(params, x_BSE, state)
    monkeypatch.setattr(recurrent, "scan", naive)
    assert_close(found, quick_jit(lambda *arguments: gradient(*arguments))(params, x_BSE, state))


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_models(variant, monkeypatch):
    model = built(variant)
    batch = make_batch(sources=6, targets=6)

    def gradient(params):
        return jax.grad(lambda params: model.loss(params, batch)[0])(params)

    found = quick_jit(gradient)(model.params)
    for module in (recurrent, decoder):
        monkeypatch.setattr(module, "scan", naive)
    assert_close(found, quick_jit(lambda params: gradient(params))(model.params))
