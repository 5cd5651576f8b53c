"""Products of matrices on a CPU, in C, as custom calls of XLA's programs."""
