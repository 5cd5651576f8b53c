"""On a CPU, what a model computes most, in C, as custom calls of XLA's programs.

`contract` is what all of s2s's large products go through, and decides who makes them; `lstm`, `decoder` and
`softmax` are a whole layer, a whole decoder with input feeding, and the softmax of a loss; `library` compiles
the C sources in ``source/`` and gives them to XLA:

- ``block.h``: how operands are laid out, and the innermost loops, on a matrix unit or with vectors;
- ``activations.h``: sigmoids of many numbers at a time;
- ``parallel.h``: phases of units of work on XLA's own threads;
- ``ffi.h``: what XLA asks of a call, and memory kept between calls;
- ``product.h``, ``lstm.h``, ``decoder.h``, ``softmax.h``: one call each, cut into units of work;
- ``kernels.c``: what XLA calls.

Elsewhere than on a CPU, or without a C compiler, XLA computes all of it as it always does.
"""
