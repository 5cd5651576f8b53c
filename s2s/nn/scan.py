"""A loop over time whose weights get their gradients after it, in one product each.

Decides how a recurrence is differentiated and how many positions it walks. Must not
know what a step computes: cells, and the decoder's step with its attention, are walked
by the same `scan`.

What autodiff makes of ``jax.lax.scan`` adds a small outer product into every weight
matrix at every step. Here the step's constants (all it closes over: weights, and what
attention keeps of the source) are held fixed in the backward loop, which only carries
the state back and writes down the gradient at the output of each product with a
constant; the constant's own gradient is then one product of everything read and
everything written down. It is the same sum in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.extend import core

from s2s.nn.equations import Arrays, Step, evaluate, pack_constants, product_gradient, take_apart


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    turns: jax.Array,
    *,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """``jax.lax.scan`` over the first positions only, its weight gradients deferred.

    Args:
      step: (carry, x) -> (carry, y), pure. Gradients flow to whatever it closes over.
      carry: the state before the first position walked; floating point leaves.
      xs: leaves [T, ...].
      turns: integer scalar, at most T; positions 0 to turns - 1 are walked. Known only at run
        time, so that one program serves every length up to T. Not mapped over under ``jax.vmap``
        (`s2s.nn.bound.common_max`).
      reverse: from position turns - 1 to 0.

    Returns:
      The last carry, and ys with leaves [T, ...], zeros from position ``turns`` on.
    """
    flat_carry, carry_tree = jax.tree.flatten(carry)
    flat_xs, xs_tree = jax.tree.flatten(xs)
    shapes: list[Any] = []

    def flat_step(*args: Any) -> Arrays:
        now, x = args[: len(flat_carry)], args[len(flat_carry) :]
        out = step(jax.tree.unflatten(carry_tree, now), jax.tree.unflatten(xs_tree, x))
        shapes.append(jax.tree.structure(out[1]))
        return [*jax.tree.leaves(out[0]), *jax.tree.leaves(out[1])]

    equations, constants = take_apart(flat_step, flat_carry, [_abstract_position(x) for x in flat_xs])
    flat_carry, ys = _walk(equations, reverse, turns, constants, flat_carry, flat_xs)
    return jax.tree.unflatten(carry_tree, flat_carry), jax.tree.unflatten(shapes[0], ys)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _walk(
    step: Step, reverse: bool, turns: jax.Array, constants: Arrays, carry: Arrays, xs: Arrays
) -> tuple[Arrays, Arrays]:
    """The loop, flat."""
    differentiable = [constants[number] for number in step.accumulated]
    # No one differentiates here: taps are not looked at.
    taps: Arrays = [None] * len(step.products)
    packed = pack_constants(step.equations, dict(zip(step.constants, constants, strict=True)))

    def turn(t: jax.Array, x: Arrays, carry: Arrays) -> tuple[Arrays, Arrays]:
        out, _ = step.run(constants, differentiable, [*carry, *x], taps, packed)
        return out[: step.carried], out[step.carried :]

    outputs = [variable.aval for variable in step.outputs[step.carried :]]
    carry, ys = _loop(turn, turns, carry, xs, outputs, reverse)
    return carry, ys


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class _Saved:
    """How a forward step's by-products are found again on the way back.

    Attributes:
      forward: the step (constants, carry, x) -> its outputs and everything to be found again.
      pull: structure of the step's gradient, a pytree of arrays.
      sources: where each of these arrays is: a kind and a number (or the value).
      read: the same for what each product read.
      kept: which outputs of ``forward`` are written down at every position.
    """

    forward: core.ClosedJaxpr
    pull: Any
    sources: list[tuple[str, Any]]
    read: list[tuple[str, Any]]
    kept: list[int]


def _forward(
    step: Step, reverse: bool, turns: jax.Array, constants: Arrays, carry: Arrays, xs: Arrays
) -> tuple[Any, Any]:
    saved = _linearized(step, constants, carry, xs)
    count = len(step.outputs)
    jaxpr = saved.forward.jaxpr
    packed = pack_constants(jaxpr.eqns, dict(zip(jaxpr.invars, constants, strict=False)))

    def turn(t: jax.Array, x: Arrays, carry: Arrays) -> tuple[Arrays, Arrays]:
        out = evaluate(saved.forward, packed, *constants, *carry, *x)
        return out[: step.carried], [*out[step.carried : count], *(out[number] for number in saved.kept)]

    variables = jaxpr.outvars
    outputs = [variables[n].aval for n in [*range(step.carried, count), *saved.kept]]
    carry, stacks = _loop(turn, turns, carry, xs, outputs, reverse)
    ys, kept = stacks[: count - step.carried], stacks[count - step.carried :]
    return (carry, ys), (saved, turns, constants, xs, kept)


def _backward(step: Step, reverse: bool, residuals: Any, gradients: tuple[Arrays, Arrays]) -> Any:
    saved, turns, constants, xs, kept = residuals
    d_carry, d_ys = gradients
    floats = [number for number, x in enumerate(xs) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def pull(*args: Any) -> Arrays:
        """The gradient by the carry, by the accumulated constants, by x and by the products."""
        d_out, leaves = args[: len(step.outputs)], args[len(step.outputs) :]
        d_accumulated, d_inputs, d_taps = jax.tree.unflatten(saved.pull, leaves)(list(d_out))
        d_carry, d_x = d_inputs[: step.carried], d_inputs[step.carried :]
        return [*d_carry, *d_accumulated, *(d_x[number] for number in floats), *d_taps]

    def find(sources: list[tuple[str, Any]], position: Callable[[Any], Any]) -> Arrays:
        places = {
            "constant": lambda number: constants[number],
            "x": lambda number: position(xs[number]),
            "kept": lambda number: position(kept[number]),
            "value": lambda value: value,
        }
        return [places[kind](which) for kind, which in sources]

    # A product that is added to x has the same gradient as x: written down once.
    shapes = [v.aval for v in step.outputs], find(saved.sources, _abstract_position)
    closed = jax.make_jaxpr(pull)(*shapes[0], *shapes[1])
    state_size = step.carried + len(step.accumulated)
    variables = closed.jaxpr.outvars[state_size:]
    distinct = {id(variable): variable.aval for variable in variables}
    stack_of = [list(distinct).index(id(variable)) for variable in variables]
    first = [state_size + stack_of.index(number) for number in range(len(distinct))]

    leaf_variables = closed.jaxpr.invars[len(step.outputs) :]
    fixed = {
        variable: constants[which]
        for variable, (kind, which) in zip(leaf_variables, saved.sources, strict=True)
        if kind == "constant"
    }
    packed = pack_constants(closed.jaxpr.eqns, fixed)

    def turn(t: jax.Array, d_y: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        leaves = find(saved.sources, lambda stack: _at(stack, t))
        out = evaluate(closed, packed, *state[: step.carried], *d_y, *leaves)
        totals = [old + new for old, new in zip(state[step.carried :], out[step.carried :], strict=False)]
        return [*out[: step.carried], *totals], [out[number] for number in first]

    start = [*d_carry, *(jnp.zeros_like(constants[number]) for number in step.accumulated)]
    state, stacks = _loop(turn, turns, start, d_ys, list(distinct.values()), not reverse)
    stacks = [stacks[number] for number in stack_of]

    d_constants: Arrays = [None] * len(constants)
    for number, total in zip(step.accumulated, state[step.carried :], strict=True):
        d_constants[number] = total
    read = find(saved.read, lambda stack: stack)
    for (number, side), other, gradient in zip(
        step.products.items(), read, stacks[len(floats) :], strict=True
    ):
        equation = step.equations[number]
        which = step.constants.index(equation.invars[side])
        d = product_gradient(equation, side, other, gradient)
        d_constants[which] = d if d_constants[which] is None else d_constants[which] + d
    d_xs: Arrays = [None] * len(xs)
    for number, stack in zip(floats, stacks, strict=False):
        d_xs[number] = stack
    return None, d_constants, state[: step.carried], d_xs


_walk.defvjp(_forward, _backward)


def _linearized(step: Step, constants: Arrays, carry: Arrays, xs: Arrays) -> _Saved:
    """A step that also gives what its gradient needs, each array once and none that is there anyway."""
    trees: list[Any] = []

    def forward(*args: Any) -> Arrays:
        constants, inputs = args[: len(step.constants)], args[len(step.constants) :]
        taps = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in product_outputs]
        differentiable = [constants[number] for number in step.accumulated]
        out, pull, read = jax.vjp(
            partial(step.run, list(constants)), differentiable, list(inputs), taps, has_aux=True
        )
        leaves, tree = jax.tree.flatten(pull)
        trees.append((tree, len(leaves)))
        return [*out, *leaves, *read]

    product_outputs = [step.equations[number].outvars[0] for number in step.products]
    closed = jax.make_jaxpr(forward)(*constants, *carry, *map(_abstract_position, xs))
    tree, leaves = trees[0]
    jaxpr = closed.jaxpr
    first_x = len(constants) + len(carry)
    places: dict[Any, tuple[str, Any]] = {}
    for number, variable in enumerate(jaxpr.invars):
        if number < len(constants):
            places[variable] = ("constant", number)
        elif number >= first_x:
            places[variable] = ("x", number - first_x)
    for variable, value in zip(jaxpr.constvars, closed.consts, strict=True):
        places[variable] = ("value", value)
    kept: list[int] = []
    sources = []
    for number in range(len(step.outputs), len(jaxpr.outvars)):
        variable = jaxpr.outvars[number]
        if isinstance(variable, core.Literal):
            aval: Any = variable.aval
            sources.append(("value", jnp.asarray(variable.val, aval.dtype)))
            continue
        if variable not in places:
            places[variable] = ("kept", len(kept))
            kept.append(number)
        sources.append(places[variable])
    return _Saved(closed, tree, sources[:leaves], sources[leaves:], kept)


def _loop(
    turn: Callable[[jax.Array, Arrays, Arrays], tuple[Arrays, Arrays]],
    turns: jax.Array,
    carry: Arrays,
    xs: Arrays,
    outputs: Sequence[Any],
    reverse: bool,
) -> tuple[Arrays, Arrays]:
    """Turns ``turns`` times; output stacks [T, ...] are written where x was read, and zeros elsewhere."""
    length = xs[0].shape[0]

    def body(number: jax.Array, state: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
        carry, stacks = state
        t = turns - 1 - number if reverse else number
        carry, out = turn(t, [_at(x, t) for x in xs], carry)
        return carry, [_put(stack, y, t) for stack, y in zip(stacks, out, strict=True)]

    stacks = [jnp.zeros((length, *out.shape), out.dtype) for out in outputs]
    return jax.lax.fori_loop(0, turns, body, (carry, stacks))


@custom_vmap
def _at(stack: jax.Array, t: jax.Array) -> jax.Array:
    """Position t of a stack [T, ...]."""
    return jax.lax.dynamic_index_in_dim(stack, t, 0, keepdims=False)


@_at.def_vmap
def _(axis_size: int, mapped: list[bool], stack: jax.Array, t: jax.Array) -> tuple[jax.Array, bool]:
    # One slice, as t is the same for all replicas; JAX would gather, and scatter below, as if it were not.
    assert not mapped[1]
    return jax.lax.dynamic_index_in_dim(stack, t, 1, keepdims=False), True


@custom_vmap
def _put(stack: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
    """The stack with y at position t."""
    return jax.lax.dynamic_update_index_in_dim(stack, y, t, 0)


@_put.def_vmap
def _(
    axis_size: int, mapped: list[bool], stack: jax.Array, y: jax.Array, t: jax.Array
) -> tuple[jax.Array, bool]:
    assert not mapped[2]
    stack, y = (
        x if is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, is_mapped in zip((stack, y), mapped, strict=False)
    )
    return jax.lax.dynamic_update_index_in_dim(stack, y, t, 1), True


def _abstract_position(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
