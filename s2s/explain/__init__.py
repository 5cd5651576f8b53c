"""Explaining: what a model does with one sentence, step by step."""
