"""The shape check: sizes by letter, and every refusal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from s2s.shapes import LETTERS, check_shapes


def test_sizes_by_letter():
    sizes = check_shapes(
        memory_BSM=np.zeros((2, 5, 8)), mask_BS=np.ones((2, 5)), logits_BTV=np.zeros((2, 3, 7))
    )
    assert sizes == {"B": 2, "S": 5, "M": 8, "T": 3, "V": 7}


def test_letters_are_what_follows_the_last_underscore():
    assert check_shapes(source_length_B=np.zeros(4)) == {"B": 4}


def test_every_letter_is_explained():
    import s2s.shapes

    for letter in LETTERS:
        assert f"{letter}  " in s2s.shapes.__doc__


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_BS": (2, 3), "y_BT": (4, 3)}, "y_BT has B=4, but x_BS has B=2"),
        ({"x_BS": (4, 3), "y_BT": (2, 3)}, "y_BT has B=2, but x_BS has B=4"),
        ({"x_BS": (2, 3, 4)}, r"x_BS has shape \(2, 3, 4\): 2 axes expected"),
        ({"x_BQ": (2, 3)}, "x_BQ: 'Q' is no dimension letter"),
        ({"x_SS": (2, 3)}, "x_SS has S=3, but x_SS has S=2"),
        ({"lower": (2,)}, "no dimension letter"),
    ],
)
def test_refusals(arrays, message):
    with pytest.raises(ValueError, match=message):
        check_shapes(**{name: np.zeros(shape) for name, shape in arrays.items()})


def test_the_first_array_with_a_letter_is_named():
    with pytest.raises(ValueError, match="d_BT has T=6, but b_BT has T=5"):
        check_shapes(
            a_BS=np.zeros((2, 3)), b_BT=np.zeros((2, 5)), c_BT=np.zeros((2, 5)), d_BT=np.zeros((2, 6))
        )


def test_it_works_while_tracing_and_leaves_nothing_in_the_program():
    def checked(x_BS):
        check_shapes(x_BS=x_BS)
        return x_BS + 1

    x = jnp.zeros((2, 3))
    assert str(jax.make_jaxpr(checked)(x)) == str(jax.make_jaxpr(lambda x_BS: x_BS + 1)(x))
    with pytest.raises(ValueError, match="2 axes expected"):
        jax.jit(checked)(jnp.zeros(3))
