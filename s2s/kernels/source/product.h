/* A product of matrices: packing, then blocks of sums, each by whichever thread is free. */

#ifndef S2S_PRODUCT_H
#define S2S_PRODUCT_H

#include "block.h"
#include "ffi.h"
#include "parallel.h"

/* Panels of a unit of work, whose sums stay in a core's second cache over all depths. */
#define MOST_LEFT 256  /* rows */
#define MOST_RIGHT 256 /* columns */

/* Bytes of a result that the second caches would not hold anyway. */
#define LARGE_RESULT (4l << 20)

typedef struct {
  Packing left, right;
  float *to;
  uint16_t *rounded; /* instead, where the result is wanted in bfloat16 */
  long unit_left, unit_right, units_right;
  long sizes[2]; /* units of the phases: packing, and multiplying */
  int past_caches;
} Product;

/* Of an operand that has not come packed. */
static void pack_either(const Product *p, long number) {
  long lefts = packing_units(&p->left);
  if (number < lefts)
    pack_unit(&p->left, number);
  else
    pack_unit(&p->right, number - lefts);
}

static void round_to(uint16_t *to, const float *from, long count) {
  for (long i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, from + i, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
  }
}

/* Without reading first what is overwritten. */
static void put_past_caches(float *to, const float *from, long count) {
#ifdef __AVX512F__
  for (long i = 0; i < count; i += 16) _mm512_stream_ps(to + i, _mm512_loadu_ps(from + i));
#else
  memcpy(to, from, 4 * count);
#endif
}

/* Such writes are ordered with no others, so that who hears of the end of a unit might not see them. */
static void order_writes(void) {
#ifdef __AVX512F__
  _mm_sfence();
#endif
}

/* Sums that are done, to where they are wanted. */
static void put_block(const Product *p, long a, long b, const float *sums) {
  const int parts = p->left.parts;
  const long m = p->left.operand.count_i, n = p->right.operand.count_i, run = run_of_sums(parts);
  long row = a * p->left.size, column = b * p->right.size;
  long rows = least(p->left.size, m - row), columns = least(p->right.size, n - column);
  for (long i = 0; i < rows; i++)
    for (long j = 0; j < columns; j += run) {
      const float *from = sums_at(sums, i, j, parts);
      long count = least(run, columns - j), at = (row + i) * n + column + j;
      if (p->rounded)
        round_to(p->rounded + at, from, count);
      else if (p->past_caches && count == run)
        put_past_caches(p->to + at, from, run);
      else if (count == 16) /* a size that the compiler knows */
        memcpy(p->to + at, from, 64);
      else
        memcpy(p->to + at, from, 4 * count);
    }
}

static _Thread_local float *kept_sums;

static void multiply_unit(const Product *p, long number) {
  const int parts = p->left.parts;
  const long block = p->left.size * p->right.size;
  const long left_bytes = panel_bytes(p->left.size, parts), right_bytes = panel_bytes(p->right.size, parts);
  long a0 = number / p->units_right * p->unit_left, a1 = least(a0 + p->unit_left, p->left.panels);
  long b0 = number % p->units_right * p->unit_right, b1 = least(b0 + p->unit_right, p->right.panels);
  if (!kept_sums) kept_sums = aligned_alloc(64, MOST_LEFT * MOST_RIGHT * 4);
  float *sums = kept_sums;
  /* The unit after this one will most likely be this thread's too. */
  long next = number + 1 < blocks(p->left.panels, p->unit_left) * p->units_right ? number + 1 : number;
  long next_a = next / p->units_right * p->unit_left, next_b = next % p->units_right * p->unit_right;
  Ahead ahead = {.left_lines = blocks(left_bytes, (b1 - b0) * fetches(p->left.depth, parts) * 64),
                 .right_lines = blocks(right_bytes, (a1 - a0) * fetches(p->left.depth, parts) * 64)};
  const long left_piece = left_bytes / (b1 - b0), right_piece = right_bytes / (a1 - a0);
  enter(parts);
  for (long depth = 0; depth < p->left.depths; depth++) {
    long count_k = least(p->left.depth, p->left.operand.count_k - depth * p->left.depth);
    int last = depth + 1 == p->left.depths;
    const char *left = p->left.packed + depth * p->left.panels * left_bytes;
    const char *right = p->right.packed + depth * p->right.panels * right_bytes;
    const char *left_ahead = last ? p->left.packed + next_a * left_bytes
                                  : left + (p->left.panels + a0) * left_bytes;
    const char *right_ahead = last ? p->right.packed + next_b * right_bytes
                                   : right + (p->right.panels + b0) * right_bytes;
    for (long b = b0; b < b1; b++)
      for (long a = a0; a < a1; a++) {
        float *c = sums + ((b - b0) * (a1 - a0) + a - a0) * block;
        ahead.left = left_ahead + (a - a0) * left_bytes + (b - b0) * left_piece;
        ahead.right = right_ahead + (b - b0) * right_bytes + (a - a0) * right_piece;
        add_block(left + a * left_bytes, right + b * right_bytes, count_k, parts, c, !depth, ahead);
        if (last) put_block(p, a, b, c); /* its stores wait for memory while the next block multiplies */
      }
  }
  leave(parts);
  if (p->past_caches) order_writes();
}

/* Threads for so many operations. */
static long threads_for(const XLA_FFI_CallFrame *frame, double operations, int parts) {
  /* Another thread's help comes some 30 microseconds late. */
  const double slowness[] = {12, 1, 3, 6, 3};
  return operations * slowness[parts] < 1e8 ? 1 : thread_count(frame);
}

static long product_size(long phase, const void *product) { return ((const Product *)product)->sizes[phase]; }

static void product_unit(long phase, long number, void *product) {
  (phase ? multiply_unit : pack_either)(product, number);
}

static void multiply(XLA_FFI_CallFrame *frame, Product *p, XLA_FFI_Buffer *to) {
  if (to->dtype == XLA_FFI_DataType_BF16)
    p->rounded = to->data;
  else
    p->to = to->data;
  const long columns = p->right.operand.count_i;
  p->past_caches = p->to && columns % 16 == 0 && p->left.operand.count_i * columns * 4 > LARGE_RESULT;
  int which, packed = p->right.packed != NULL;
  size_t left_bytes = packed_bytes(&p->left);
  p->left.packed = borrow(left_bytes + (packed ? 0 : packed_bytes(&p->right)), &which);
  if (!packed) p->right.packed = p->left.packed + left_bytes;
  long threads = threads_for(
      frame, 2.0 * p->left.operand.count_i * p->right.operand.count_i * p->left.operand.count_k, p->left.parts);
  p->unit_left = MOST_LEFT / p->left.size, p->unit_right = MOST_RIGHT / p->right.size;
  long units_left = blocks(p->left.panels, p->unit_left);
  /* Enough units for all threads to end together. */
  while (p->unit_right > 1 && units_left * blocks(p->right.panels, p->unit_right) < 4 * threads)
    p->unit_right--;
  p->units_right = blocks(p->right.panels, p->unit_right);
  p->sizes[0] = packing_units(&p->left) + (packed ? 0 : packing_units(&p->right));
  p->sizes[1] = units_left * p->units_right;
  run_phases(frame, threads, (Phases){2, 1, product_size, product_unit, p});
  give_back(p->left.packed, which);
}

#endif
