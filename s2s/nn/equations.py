"""A step of a loop as equations: which of them need the loop, and which multiply with a constant.

Decides what a constant of a loop is, that it is laid out once for all of its products, and how its
gradient follows from what was read and what came back at all positions. Must not know how a loop is walked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core.primitives import dot_general_p

from s2s.kernels.contract import contract, contract_p, contract_packed, pack

Arrays = list[Any]

Packed = dict[int, jax.Array]

_DOTS = (dot_general_p, contract_p)


class Step:
    """A function (carry, x) -> (next carry, y) on flat lists; made by `take_apart`.

    Attributes:
      equations: in order; none depends on constants alone.
      constants: variables that come from outside the loop.
      inputs: variables of the carry, then of x.
      outputs: variables of the next carry, then of y.
      carried: leaves of the carry.
      products: by number in ``equations``, which operand of a product is a constant's.
      accumulated: numbers of the constants that something else than a product reads.
    """

    def __init__(
        self, equations: list[Any], constants: list[Any], inputs: list[Any], outputs: list[Any], carried: int
    ):
        self.equations, self.constants, self.inputs, self.outputs = equations, constants, inputs, outputs
        self.carried = carried
        known = set(constants)
        self.products: dict[int, int] = {}
        otherwise = _variables(outputs)
        for number, equation in enumerate(equations):
            fixed = [_is_known(variable, known) for variable in equation.invars]
            if _dot_of(equation) is not None and sum(fixed) == 1:
                self.products[number] = fixed.index(True)
            else:
                otherwise |= _variables(equation.invars)
        self.accumulated = [
            number
            for number, variable in enumerate(constants)
            if variable in otherwise and jnp.issubdtype(variable.aval.dtype, jnp.inexact)
        ]

    def run(
        self,
        constants: Arrays,
        accumulated: Arrays,
        inputs: Arrays,
        taps: Arrays,
        packed: Packed | None = None,
    ) -> tuple[Arrays, Arrays]:
        """One step: its outputs, and what each product reads beside the constant.

        Args:
          constants: values, as products read them.
          accumulated: values of the constants that are not only read by products, to differentiate by.
          inputs: the carry, then x.
          taps: one for each product, of the product's shape: values do not matter, and the gradient
            by a tap is the gradient at the product's output.
          packed: constants as `pack_constants` leaves them, where nothing is differentiated.
        """
        fixed = dict(zip(self.constants, constants, strict=True))
        environment = {**fixed, **dict(zip(self.inputs, inputs, strict=True))}
        for number, value in zip(self.accumulated, accumulated, strict=True):
            environment[self.constants[number]] = value
        read: Arrays = []
        for number, equation in enumerate(self.equations):
            values = [_value(environment, variable) for variable in equation.invars]
            if number in self.products:
                side = self.products[number]
                values[side] = fixed[equation.invars[side]]
                out = [_tapped(_bind(equation, values, (packed or {}).get(number))[0], taps[len(read)])]
                read.append(values[1 - side])
            else:
                out = _bind(equation, values)
            environment |= zip(equation.outvars, out, strict=True)
        return [_value(environment, variable) for variable in self.outputs], read


@jax.custom_vjp
def _tapped(product: jax.Array, tap: jax.Array) -> jax.Array:
    """The product; its gradient goes to the tap as well."""
    return product


_tapped.defvjp(lambda product, tap: (product, None), lambda _, gradient: (gradient, gradient))


def take_apart(function: Callable[..., Arrays], carry: Arrays, x: Sequence[Any]) -> tuple[Step, Arrays]:
    """Traces a function of flat lists, and computes here what depends on its constants alone.

    Args:
      function: (*carry, *x) -> [*next carry, *y], pure.
      carry, x: arrays, or their `jax.ShapeDtypeStruct`s.

    Returns:
      The rest of the function, and the values of the constants that it reads: what the function
      closes over, and what follows from that.
    """
    traced = jax.make_jaxpr(function)(*carry, *x)
    constants = traced.consts
    shapes = [variable.aval for variable in traced.jaxpr.invars]
    closed = jax.make_jaxpr(partial(_inline, traced.jaxpr))(constants, *shapes)
    jaxpr = closed.jaxpr
    environment = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    environment |= zip(jaxpr.invars[: len(constants)], constants, strict=True)
    varying = []
    for equation in jaxpr.eqns:
        # What does something beside computing does it every time.
        fixed = not equation.effects and all(_is_known(v, environment) for v in equation.invars)
        if fixed:
            out = _bind(equation, [_value(environment, variable) for variable in equation.invars])
            environment |= zip(equation.outvars, out, strict=True)
        else:
            varying.append(equation)
    read = [v for equation in varying for v in equation.invars] + list(jaxpr.outvars)
    used = [v for v in dict.fromkeys(v for v in read if isinstance(v, core.Var)) if v in environment]
    step = Step(varying, used, list(jaxpr.invars[len(constants) :]), list(jaxpr.outvars), len(carry))
    return step, [jnp.asarray(environment[variable]) for variable in used]


def product_gradient(equation: Any, side: int, read: jax.Array, gradient: jax.Array) -> jax.Array:
    """The gradient by a product's constant, from all positions in one product.

    Args:
      equation: a product of the constant and something that varies.
      side: which operand is the constant.
      read: [T, ...], the other operand.
      gradient: [T, ...], at the product's output.
    """
    dot = _dot_of(equation)
    assert dot is not None
    summed, batch = dot.params["dimension_numbers"]
    own_summed, own_batch = summed[side], batch[side]
    summed, batch = summed[1 - side], batch[1 - side]
    free = [axis for axis in range(read.ndim - 1) if axis not in (*summed, *batch)]
    own = equation.invars[side].aval
    own_free = [axis for axis in range(own.ndim) if axis not in (*own_summed, *own_batch)]
    # A product's axes: batch, then what is free of the left, then of the right operand.
    at = len(batch) + (0 if side else len(own_free))
    read_axes = [0, *(axis + 1 for axis in free)]
    gradient_axes = [0, *(1 + at + number for number in range(len(free)))]
    batches = [axis + 1 for axis in batch], [1 + number for number in range(len(batch))]
    # Operands in the order in which the constant's axes come out as they are, or nearly.
    order = sorted(range(len(summed)), key=lambda number: summed[number])
    own_axes = [own_summed[number] for number in order]
    if not own_free or (own_axes and own_axes[0] < own_free[0]):
        numbers = ((read_axes, gradient_axes), batches)
        operands, axes = (read, gradient), [*own_batch, *own_axes, *own_free]
    else:
        numbers = ((gradient_axes, read_axes), batches[::-1])
        operands, axes = (gradient, read), [*own_batch, *own_free, *own_axes]
    precise = jnp.promote_types(own.dtype, jnp.float32)
    if batches[0]:
        product = jax.lax.dot_general(*operands, numbers, preferred_element_type=precise)
    else:
        product = contract(*operands, *numbers[0], own.dtype)
    return jnp.transpose(product, [axes.index(axis) for axis in range(own.ndim)]).astype(own.dtype)


def pack_constants(equations: Sequence[Any], constants: dict[Any, jax.Array]) -> Packed:
    """Before a loop: by number of equation, the constant that it multiplies with, laid out for that.

    Args:
      equations: of a step.
      constants: by variable.
    """
    packed: Packed = {}
    for number, equation in enumerate(equations):
        dot = _dot_of(equation)
        fixed = [isinstance(v, core.Var) and v in constants for v in equation.invars]
        if dot is not None and sum(fixed) == 1:
            side = fixed.index(True)
            array = pack(dot, side, constants[equation.invars[side]])
            if array is not None:
                packed[number] = array
    return packed


def evaluate(closed: core.ClosedJaxpr, packed: Packed, *args: Any) -> Arrays:
    """A jaxpr's outputs, some of its products with packed constants."""
    jaxpr = closed.jaxpr
    environment = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
    return _evaluate(jaxpr.eqns, jaxpr.outvars, environment, packed)


def ready(function: Callable[[Any], Any], example: Any) -> Callable[[Any], Any]:
    """A function for a loop, with all of its work that depends on no argument done here.

    That is what follows from constants alone, and how constants lie in memory. Not to be differentiated.

    Args:
      function: a tree of arrays -> another, pure.
      example: an argument; only shapes matter.
    """
    leaves, tree = jax.tree.flatten(example)
    made: list[Any] = []

    def flat(*leaves: Any) -> Arrays:
        out, structure = jax.tree.flatten(function(jax.tree.unflatten(tree, leaves)))
        made.append(structure)
        return out

    step, constants = take_apart(flat, leaves, [])
    known = dict(zip(step.constants, constants, strict=True))
    packed = pack_constants(step.equations, known)

    def run(argument: Any) -> Any:
        environment = {**known, **dict(zip(step.inputs, jax.tree.leaves(argument), strict=True))}
        return jax.tree.unflatten(made[0], _evaluate(step.equations, step.outputs, environment, packed))

    return run


def _evaluate(
    equations: Sequence[Any], outputs: Sequence[Any], environment: dict[Any, Any], packed: Packed
) -> Arrays:
    for number, equation in enumerate(equations):
        values = [_value(environment, variable) for variable in equation.invars]
        environment |= zip(equation.outvars, _bind(equation, values, packed.get(number)), strict=True)
    return [_value(environment, variable) for variable in outputs]


def _inline(jaxpr: core.Jaxpr, constants: Arrays, *args: Any) -> Arrays:
    """Evaluates a jaxpr with every function unfolded that may hold a product."""
    environment = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *args], strict=True))
    for equation in jaxpr.eqns:
        values = [_value(environment, variable) for variable in equation.invars]
        inner = _body(equation)
        out = _bind(equation, values) if inner is None else _inline(inner.jaxpr, inner.consts, *values)
        environment |= zip(equation.outvars, out, strict=True)
    return [_value(environment, variable) for variable in jaxpr.outvars]


def _body(equation: Any) -> core.ClosedJaxpr | None:
    """What an equation calls, if it is to be unfolded.

    A function with a gradient of its own is left whole, unless it holds products beside other things:
    what constants get from those is found here.
    """
    if equation.primitive.name in ("jit", "pjit", "closed_call"):
        return equation.params["jaxpr"]
    inner = _called(equation)
    return inner if inner is not None and _has_product(inner.jaxpr) and _dot_of(equation) is None else None


def _called(equation: Any) -> core.ClosedJaxpr | None:
    return equation.params["call_jaxpr"] if equation.primitive.name == "custom_vjp_call" else None


def _dot_of(equation: Any) -> Any:
    """The product that an equation is: it alone, or as a function with a gradient of its own."""
    if equation.primitive in _DOTS:
        return equation
    inner = _called(equation)
    if inner is None or not inner.jaxpr.eqns:
        return None
    dot, *rest = inner.jaxpr.eqns
    alone = dot.primitive in _DOTS and list(dot.invars) == list(inner.jaxpr.invars)
    rounded = all(equation.primitive.name == "convert_element_type" for equation in rest)
    return dot if alone and rounded else None


def _has_product(jaxpr: core.Jaxpr) -> bool:
    return any(
        equation.primitive in _DOTS or ((inner := _body(equation)) is not None and _has_product(inner.jaxpr))
        for equation in jaxpr.eqns
    )


def _bind(equation: Any, values: Arrays, packed: jax.Array | None = None) -> Arrays:
    with equation.ctx.manager:
        if packed is not None:
            (left, right), (out,) = values, equation.outvars
            return [contract_packed(_dot_of(equation), left, right, packed).astype(out.aval.dtype)]
        out = equation.primitive.bind(*values, **equation.primitive.get_bind_params(equation.params))
    return list(out) if equation.primitive.multiple_results else [out]


def _variables(atoms: Sequence[Any]) -> set[Any]:
    return {atom for atom in atoms if isinstance(atom, core.Var)}


def _is_known(variable: Any, known: Any) -> bool:
    return isinstance(variable, core.Literal) or variable in known


def _value(environment: dict[Any, Any], variable: Any) -> Any:
    return variable.val if isinstance(variable, core.Literal) else environment[variable]
