"""Recurrent sequence-to-sequence learning with attention, in JAX."""

__version__ = "0.1.0"
