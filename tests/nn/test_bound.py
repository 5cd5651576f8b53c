"""One trip count for all replicas."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from s2s.nn.bound import common_max


def powers(bound):
    """x -> x ** turns, by a loop to ``bound(turns)`` whose superfluous turns change nothing."""

    @jax.custom_vjp
    def power(x, turns):
        def turn(i, y):
            return y * jnp.where(i < turns, x, 1.0)

        return jax.lax.fori_loop(0, bound(turns), turn, jnp.ones_like(x))

    def forward(x, turns):
        return power(x, turns), (x, turns)

    def backward(kept, grad):
        x, turns = kept
        return grad * turns * power(x, turns - 1), None

    power.defvjp(forward, backward)
    return power


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_the_number_itself_without_replicas(transform):
    assert transform(common_max)(jnp.int32(3)) == 3
    assert transform(powers(common_max))(2.0, 3) == 8.0


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_the_greatest_of_all_replicas(transform):
    turns_RR = jnp.array([[1, 5], [2, 3]])
    for turns_R in turns_RR:
        bounds, mapped = transform(jax.vmap(lambda turns: (common_max(turns), turns), out_axes=(None, 0)))(
            turns_R
        )
        assert bounds.shape == () and bounds == max(turns_R)
        np.testing.assert_array_equal(mapped, turns_R)
    nested = jax.vmap(jax.vmap(common_max, out_axes=None), out_axes=None)
    assert transform(nested)(turns_RR) == 5


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_a_loop_and_its_gradient_under_vmap(transform):
    x_R, turns_R = jnp.array([2.0, 3.0, 0.5]), jnp.array([3, 1, 4])
    power = jax.vmap(powers(common_max))
    np.testing.assert_allclose(transform(power)(x_R, turns_R), x_R**turns_R)
    grad_of_vmap = jax.grad(lambda x_R: jnp.sum(power(x_R, turns_R)))
    np.testing.assert_allclose(transform(grad_of_vmap)(x_R), turns_R * x_R ** (turns_R - 1))
    vmap_of_grad = jax.vmap(jax.grad(powers(common_max)))
    np.testing.assert_allclose(transform(vmap_of_grad)(x_R, turns_R), turns_R * x_R ** (turns_R - 1))


@pytest.mark.parametrize("bound,conditions", [(common_max, 1), (lambda turns: turns, 2)])
def test_one_condition_for_all_replicas(bound, conditions):
    jaxpr = jax.make_jaxpr(jax.vmap(powers(bound)))(jnp.array([2.0, 3.0]), jnp.array([3, 1]))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "while":
                yield from (aval.size for aval in equation.params["cond_jaxpr"].out_avals)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    assert list(sizes(jaxpr.jaxpr)) == [conditions]
