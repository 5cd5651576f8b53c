/* The softmax of rows of logits, each beside the entry that is its target: what it costs in nats, and the
   gradient of that by the logits.

   A row is taken from memory once and stays in the nearest caches for three passes: its greatest logit, its
   exponentials, its slope. */

#ifndef S2S_SOFTMAX_H
#define S2S_SOFTMAX_H

#include <float.h>
#include <math.h>

#include "activations.h"
#include "ffi.h"
#include "product.h"

/* Rows of a unit of work, whose slopes are summed together: the same ones whatever thread does it. */
#define ROWS_OF_GROUP 8

/* Columns of a unit that adds up the groups' sums. */
#define COLUMNS_OF_SUM 1024

/* Vectors at a time, with sums of their own: one would wait for itself. */
#define WAYS 4

typedef struct {
  const float *product, *bias;        /* [R, C, V], [R, V]: logits are their sum */
  const int32_t *target;              /* [R, C] */
  const int32_t *size, *real;         /* [R]: entries that exist, rows that are tokens; the first ones */
  const float *smoothing;             /* [R] */
  float *nll, *uniform, *right;       /* [R, C] */
  void *slope;                        /* [R, C, V], may be where the product is; NULL: not wanted */
  float *d_bias;                      /* [R, V] */
  float *sums;                        /* [R, groups, V]: each group's share of d_bias */
  long replicas, rows, entries, groups, sum_units;
  int is_bfloat16;                    /* the slope */
} Softmax;

static long at_most(long limit, long x) { return x < 0 ? 0 : least(limit, x); }

INLINE Floats logits_at(const float *product, const float *bias, long at, long count) {
  return load(product, at, count, 0) + load(bias, at, count, 0);
}

/* The first `count` numbers, and something else beyond. */
INLINE Floats first_of(long count, Floats x, float beyond) {
  const Floats lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return if_less(lane, every(count), x, every(beyond));
}

INLINE float sum_of(const Floats ways[WAYS]) {
  Floats x = (ways[0] + ways[1]) + (ways[2] + ways[3]);
  float sum = 0;
  for (int i = 0; i < 16; i++) sum += x[i];
  return sum;
}

/* The greatest logit that is a number, and the sum of all. */
static float greatest_logit(const float *product, const float *bias, long size, float *total) {
  Floats most[WAYS], sum[WAYS];
  for (int way = 0; way < WAYS; way++) most[way] = every(-FLT_MAX), sum[way] = every(0);
  long at = 0;
  for (; at + 16 * WAYS <= size; at += 16 * WAYS)
    for (int way = 0; way < WAYS; way++) {
      Floats x = logits_at(product, bias, at + 16 * way, 16);
      most[way] = greatest_of(x, most[way]), sum[way] += x;
    }
  for (; at < size; at += 16) {
    const long count = least(16, size - at);
    Floats x = logits_at(product, bias, at, count);
    most[0] = greatest_of(first_of(count, x, -FLT_MAX), most[0]), sum[0] += x;
  }
  *total = sum_of(sum);
  return greatest_in(greatest_of(greatest_of(most[0], most[1]), greatest_of(most[2], most[3])));
}

/* e^x for x up to 0: nothing at all where `exponential` has come to its end. */
INLINE Floats share_of(Floats x) { return if_less(x, every(-87.3f), every(0), exponential(x)); }

/* Of logits less the greatest one. Returns their sum; keeps them unless `kept` is NULL. What lies `ahead` is
   fetched meanwhile. */
static float exponentials(const float *product, const float *bias, long size, float most, float *kept,
                          const float *ahead) {
  Floats sum[WAYS] = {0};
  long at = 0;
  for (; at + 16 * WAYS <= size; at += 16 * WAYS)
    for (int way = 0; way < WAYS; way++) {
      const long here = at + 16 * way;
      __builtin_prefetch(ahead + here, 0, 2);
      Floats x = share_of(logits_at(product, bias, here, 16) - most);
      if (kept) store(kept, here, 16, 0, x);
      sum[way] += x;
    }
  for (; at < size; at += 16) {
    const long count = least(16, size - at);
    Floats x = first_of(count, share_of(logits_at(product, bias, at, count) - most), 0);
    if (kept) store(kept, at, count, 0, x);
    sum[0] += x;
  }
  return sum_of(sum);
}

/* kept * scale - even, and its sums. */
INLINE void put_slope(const float *kept, long size, float scale, float even, void *slope, float *sums,
                      const int is_bfloat16) {
  for (long at = 0; at + 16 <= size; at += 16) {
    Floats x = load(kept, at, 16, 0) * scale - even;
    store(slope, at, 16, is_bfloat16, x);
    store(sums, at, 16, 0, load(sums, at, 16, 0) + x);
  }
  const long at = size / 16 * 16, count = size - at;
  if (count) {
    Floats x = load(kept, at, count, 0) * scale - even;
    store(slope, at, count, is_bfloat16, x);
    store(sums, at, count, 0, load(sums, at, count, 0) + x);
  }
}

/* Room for a row's exponentials where its slope is of another type. */
static float *own_row(long entries) {
  static _Thread_local float *row;
  static _Thread_local long room;
  if (room < entries) {
    free(row);
    room = blocks(entries, 16) * 16;
    row = aligned_alloc(64, 4 * room);
  }
  return row;
}

static void softmax_row(const Softmax *s, long replica, long row, float *sums) {
  const long at = replica * s->rows + row, size = at_most(s->entries, s->size[replica]);
  const float *product = s->product + at * s->entries, *bias = s->bias + replica * s->entries;
  const long target = s->target[at];
  const int known = 0 <= target && target < size;
  const float chosen = known ? product[target] + bias[target] : NAN;
  float total, most = greatest_logit(product, bias, size, &total);
  /* Of equal logits the first is the greatest. */
  int earlier = 0;
  if (chosen == most)
    for (long v = 0; v < target; v++) earlier |= product[v] + bias[v] == chosen;
  void *slope = NULL;
  float *kept = NULL;
  if (s->slope) {
    slope = (char *)s->slope + at * s->entries * (s->is_bfloat16 ? 2 : 4);
    kept = s->is_bfloat16 ? own_row(s->entries) : slope;
  }
  const float sum = exponentials(product, bias, size, most, kept, product + s->entries), log_sum = logf(sum);
  s->nll[at] = log_sum + (most - chosen);
  s->uniform[at] = log_sum + (most - total / size);
  s->right[at] = known && !(most > chosen) && !earlier;
  if (!slope) return;
  const float scale = 1 / sum, even = s->smoothing[replica] / size, sure = 1 - s->smoothing[replica];
  const float likely = known ? kept[target] * scale - even : 0;
  if (s->is_bfloat16)
    put_slope(kept, size, scale, even, slope, sums, 1);
  else
    put_slope(kept, size, scale, even, slope, sums, 0);
  if (known) {
    store(slope, target, 1, s->is_bfloat16, every(likely - sure));
    sums[target] -= sure;
  }
  for (long v = size, count; v < s->entries; v += count)
    count = least(16, s->entries - v), store(slope, v, count, s->is_bfloat16, every(0));
}

/* A group of rows. */
static void softmax_group(const Softmax *s, long number) {
  const long replica = number / s->groups, row = number % s->groups * ROWS_OF_GROUP;
  const long end = least(s->rows, row + ROWS_OF_GROUP), stop = at_most(end, s->real[replica]);
  float *sums = NULL;
  if (s->slope) {
    sums = s->sums + number * s->entries;
    memset(sums, 0, 4 * s->entries);
  }
  for (long r = row; r < stop; r++) softmax_row(s, replica, r, sums);
  for (long r = row > stop ? row : stop; r < end; r++) {
    const long at = replica * s->rows + r, bytes = s->entries * (s->is_bfloat16 ? 2 : 4);
    s->nll[at] = s->uniform[at] = s->right[at] = 0;
    if (s->slope) memset((char *)s->slope + at * bytes, 0, bytes);
  }
}

/* Some columns of the bias's gradient. */
static void softmax_sum(const Softmax *s, long number) {
  const long replica = number / s->sum_units, first = number % s->sum_units * COLUMNS_OF_SUM;
  const long groups = blocks(at_most(s->rows, s->real[replica]), ROWS_OF_GROUP);
  const long count = least(COLUMNS_OF_SUM, s->entries - first);
  float *to = s->d_bias + replica * s->entries + first;
  memset(to, 0, 4 * count);
  for (long group = 0; group < groups; group++) {
    const float *from = s->sums + (replica * s->groups + group) * s->entries + first;
    for (long v = 0; v < count; v++) to[v] += from[v];
  }
}

static long softmax_size(long phase, const void *softmax) {
  const Softmax *s = softmax;
  return s->replicas * (phase ? s->sum_units : s->groups);
}

static void softmax_unit(long phase, long number, void *softmax) {
  (phase ? softmax_sum : softmax_group)(softmax, number);
}

/* product [..., C, V], bias [..., V], target [..., C], size and real [...], and if the slope is wanted
   smoothing [...] -> nll, uniform and right [..., C], and then slope [..., C, V] and d_bias [..., V]. */
static void softmax(XLA_FFI_CallFrame *frame) {
  const XLA_FFI_Buffer *product = argument(frame, 0);
  const int64_t *dims = product->dims + product->rank - 2;
  Softmax s = {.product = product->data, .bias = argument(frame, 1)->data, .target = argument(frame, 2)->data,
               .size = argument(frame, 3)->data, .real = argument(frame, 4)->data,
               .nll = result(frame, 0)->data, .uniform = result(frame, 1)->data, .right = result(frame, 2)->data,
               .replicas = 1, .rows = dims[0], .entries = dims[1]};
  for (const int64_t *n = product->dims; n < dims; n++) s.replicas *= *n;
  s.groups = blocks(s.rows, ROWS_OF_GROUP), s.sum_units = blocks(s.entries, COLUMNS_OF_SUM);
  int which = -1;
  if (frame->rets.size > 3) {
    s.smoothing = argument(frame, 5)->data;
    s.slope = result(frame, 3)->data, s.is_bfloat16 = result(frame, 3)->dtype == XLA_FFI_DataType_BF16;
    s.d_bias = result(frame, 4)->data;
    s.sums = borrow(4 * s.replicas * s.groups * s.entries, &which);
  }
  /* A logit takes as long as some 90 operations of a product. */
  const double operations = 90.0 * s.replicas * s.rows * s.entries;
  run_phases(frame, threads_for(frame, operations, 0), (Phases){s.slope ? 2 : 1, 1, softmax_size, softmax_unit, &s});
  if (s.sums) give_back(s.sums, which);
}

#endif
