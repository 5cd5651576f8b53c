"""Dimension letters, and the one check that holds arrays to them.

A traced array's name ends in the letters of its axes, so a name is also its
einsum term: ``memory_BSM`` is [sentences, source positions, memory features].

    B  sentences in a batch          V  vocabulary entries
    S  source positions              E  embedding features
    T  target positions              H  hidden units of a cell
    K  beams (or samples)            M  memory features (encoder output)
    R  replicas                      G  stacked gates (cell-specific multiple of H)
    F  source frame features         L  layers
    N  sentences searched at a time

This file must not know any array library: it reads ``.shape`` and nothing else.
"""

from __future__ import annotations

from typing import Protocol

LETTERS = frozenset("BNSTKRFVEHMGL")


class HasShape(Protocol):
    """Anything with a static shape: NumPy arrays, JAX arrays and tracers alike."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_shapes(**arrays: HasShape) -> dict[str, int]:
    """Checks that arrays agree on every dimension letter their names end in.

    Free under ``jit``: it runs while tracing and leaves nothing in the program.

    Args:
      **arrays: arrays by name; what follows the last underscore of a name is one
        letter an axis (see the module docstring).

    Returns:
      The size of each letter.

    Raises:
      ValueError: a name has an unknown letter, an array has another number of
        axes than its name has letters, or two arrays disagree on a letter.

    >>> import numpy as np
    >>> check_shapes(memory_BSM=np.zeros((2, 5, 8)), mask_BS=np.ones((2, 5)))
    {'B': 2, 'S': 5, 'M': 8}
    """
    sizes: dict[str, int] = {}
    seen_in: dict[str, str] = {}
    for name, array in arrays.items():
        letters = name.rpartition("_")[2]
        unknown = [letter for letter in letters if letter not in LETTERS]
        if unknown:
            raise ValueError(
                f"{name}: {unknown[0]!r} is no dimension letter; the letters are {''.join(sorted(LETTERS))}"
            )
        shape = tuple(array.shape)
        if len(shape) != len(letters):
            raise ValueError(f"{name} has shape {shape}: {len(letters)} axes expected, one a letter")
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name} has {letter}={size}, but {seen_in[letter]} has {letter}={sizes[letter]}"
                )
            seen_in.setdefault(letter, name)
    return sizes
