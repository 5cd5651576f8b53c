"""The command line of an experiment: --config FILE and overrides of its fields.

Decides how mistakes in it are told. Must import nothing slow: help and mistakes answer at once.
"""

from __future__ import annotations

import sys

from absl import app


def parse(argv: list[str]) -> list[str]:
    """Reads the flags; a field that does not exist is told, not traced."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        # ml_collections wraps one error in another; the inner one's text says what was meant.
        told = error.args[0]
        while isinstance(told, BaseException):
            told = told.args[0]
        told = " ".join(str(told).split())
        print(f"s2s: a --config override names no field: {told}", file=sys.stderr)
        sys.exit(2)
