"""Sweeps: an experiment's axes to cells, cells to programs, programs to jobs."""
