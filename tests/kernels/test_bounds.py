"""Products touch nothing beyond their operands and results: pages beside them may not be touched."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from s2s.kernels import library

SOURCE = Path(library.__file__).parent / "source"

# Vectors under a mask that hides what is beyond are no touch, so that no sanitizer has to know about them.
PROGRAM = r"""
#include <stdio.h>
#include "kernels.c"

#define PAGE 4096l

/* An array that ends where a page begins that may not be touched, or begins where one ends. */
static XLA_FFI_Buffer matrix(long rows, long columns, int is_bfloat16, int at_begin, int64_t dims[2]) {
  dims[0] = rows, dims[1] = columns;
  const long element = is_bfloat16 ? 2 : 4, bytes = rows * columns * element;
  const long inside = (bytes + PAGE - 1) / PAGE * PAGE;
  char *pages = mmap(NULL, inside + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(pages + PAGE, inside, PROT_READ | PROT_WRITE);
  char *data = at_begin ? pages + PAGE : pages + PAGE + inside - bytes;
  /* Of all bits set there is no number. */
  memset(pages + PAGE, 0xff, inside);
  for (long i = 0; i < rows * columns; i++) {
    const float x = i % 7 - 3;
    if (is_bfloat16) round_to((uint16_t *)data + i, &x, 1);
    else memcpy(data + 4 * i, &x, 4);
  }
  return (XLA_FFI_Buffer){.dtype = is_bfloat16 ? XLA_FFI_DataType_BF16 : XLA_FFI_DataType_F32,
                          .data = data, .rank = 2, .dims = dims};
}

static void release(const XLA_FFI_Buffer *x) {
  const long bytes = x->dims[0] * x->dims[1] * (x->dtype == XLA_FFI_DataType_BF16 ? 2 : 4);
  char *pages = (char *)((uintptr_t)x->data / PAGE * PAGE) - PAGE;
  munmap(pages, (bytes + PAGE - 1) / PAGE * PAGE + 2 * PAGE);
}

static XLA_FFI_Error *one_thread(XLA_FFI_ThreadPool_NumThreads_Args *args) {
  *args->num_threads = 1;
  return NULL;
}

/* Numbers that are not what they should be. */
static long product_of(long m, long n, long k, int axes, int parts, int is_bfloat16, int at_begin) {
  const int left = axes & 1, right = axes >> 1;
  int64_t dims[3][2];
  XLA_FFI_Buffer a = matrix(left ? m : k, left ? k : m, is_bfloat16, at_begin, dims[0]);
  XLA_FFI_Buffer b = matrix(right ? n : k, right ? k : n, is_bfloat16, at_begin, dims[1]);
  XLA_FFI_Buffer to = matrix(m, n, 0, at_begin, dims[2]);
  XLA_FFI_Api api = {.XLA_FFI_ThreadPool_NumThreads = one_thread};
  XLA_FFI_CallFrame frame = {.api = &api};
  Product p = {.left = packing_of(operand(&a, left), parts, 0),
               .right = packing_of(operand(&b, right), parts, 1)};
  multiply(&frame, &p, &to);
  long wrong = 0;
  for (long i = 0; i < m; i++)
    for (long j = 0; j < n; j++) {
      float sum = 0;
      for (long at = 0; at < k; at++)
        sum += ((left ? i * k + at : at * m + i) % 7 - 3) * ((right ? j * k + at : at * n + j) % 7 - 3);
      wrong += ((const float *)to.data)[i * n + j] != sum;
    }
  release(&a), release(&b), release(&to);
  return wrong;
}

int main(void) {
  const long rows[] = {8, 9, 15, 31, 33}, columns[] = {8, 17, 40, 63};
  const long depths[] = {1, 3, 17, 63, 64, 65, 127, 129, 255, 257, 330};
  const int ways[][2] = {{VECTORS, 0}, {DIGITS, 0}, {3, 0}, {2, 0}, {1, 0}, {1, 1}};
  long wrong = 0;
  const int all = amx_allowed() ? 6 : 1;
  for (int way = 0; way < all; way++)
    for (int m = 0; m < 5; m++)
      for (int n = 0; n < 4; n++)
        for (int k = 0; k < 11; k++)
          for (int axes = 0; axes < 8; axes++)
            wrong += product_of(rows[m], columns[n], depths[k], axes & 3, ways[way][0], ways[way][1],
                                axes >> 2);
  printf("%d %ld\n", all, wrong);
}
"""


@pytest.mark.skipif(
    shutil.which("gcc") is None or platform.machine() != "x86_64" or sys.platform != "linux",
    reason="no gcc for x86",
)
def test_nothing_is_read_or_written_beyond_an_array(tmp_path):
    (tmp_path / "bounds.c").write_text(PROGRAM)
    command = ["gcc", "-std=gnu11", "-O2", "-march=native", f"-I{SOURCE}", f"-I{jax.ffi.include_dir()}"]
    subprocess.run([*command, tmp_path / "bounds.c", "-o", tmp_path / "bounds", "-lm"], check=True)
    done = subprocess.run([tmp_path / "bounds"], capture_output=True, text=True)
    # Small integers, of which every way makes the exact product.
    assert (done.returncode, done.stdout.split()[1:]) == (0, ["0"]), done.stderr
