"""Products of matrices on a CPU, in C, as custom calls of XLA's programs.

`contract` is what all of s2s's large products go through, and decides who makes them; `library` compiles the
C sources in ``source/`` and gives them to XLA:

- ``block.h``: how operands are laid out, and the innermost loops, on a matrix unit or with vectors;
- ``kernels.c``: a whole product, cut into units of work, and what XLA calls;
- ``softmax.h``: what a softmax costs and its gradient, where a product left the logits;
- ``parallel.h``: units of work on XLA's own threads.

Elsewhere than on a CPU, or without a C compiler, XLA multiplies as it always does.
"""
