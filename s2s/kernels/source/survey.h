/* What a search asks of rows of logits: the logits, the greatest of each chunk, the log of the sum of their
   exponentials.

   A row is taken from memory once and stays in the nearest caches for two passes: the bias and the greatest,
   then the exponentials. */

#ifndef S2S_SURVEY_H
#define S2S_SURVEY_H

#include "softmax.h"

typedef struct {
  const float *product, *bias; /* [R, C, V], [R, V] */
  float *logits;               /* [R, C, V]: their sum, may be where the product is */
  float *total;                /* [R, C] */
  float *highest;              /* [R, C, chunks] */
  long replicas, rows, entries, chunk, chunks, groups;
} Survey;

/* A chunk's logits. Returns the greatest that is a number. */
INLINE float survey_chunk(const float *product, const float *bias, float *logits, long count) {
  if (count < 16) {
    Floats x = logits_at(product, bias, 0, count);
    store(logits, 0, count, 0, x);
    return greatest_in(first_of(count, x, -INFINITY));
  }
  /* The last ones first: others may lie where they read. */
  const long end = count - 16;
  Floats last = logits_at(product, bias, end, 16), most = last;
  for (long at = 0; at < end; at += 16) {
    Floats x = logits_at(product, bias, at, 16);
    store(logits, at, 16, 0, x);
    most = greatest_of(x, most);
  }
  store(logits, end, 16, 0, last);
  return greatest_in(most);
}

/* The sum of the exponentials of logits less the greatest one. What lies `ahead` is fetched meanwhile. */
static float sum_of_shares(const float *logits, long size, float most, const float *ahead) {
  Floats sum[WAYS] = {0};
  long at = 0;
  for (; at + 16 * WAYS <= size; at += 16 * WAYS)
    for (int way = 0; way < WAYS; way++) {
      const long here = at + 16 * way;
      __builtin_prefetch(ahead + here, 0, 2);
      sum[way] += share_of(load(logits, here, 16, 0) - most);
    }
  for (; at < size; at += 16) {
    const long count = least(16, size - at);
    sum[0] += first_of(count, share_of(load(logits, at, count, 0) - most), 0);
  }
  return sum_of(sum);
}

/* Of a row whose shares add up to no number: with such a logit it has no total, and a chunk has that logit as
   its greatest; without one there is an infinite logit. */
static float odd_total(const Survey *s, const float *logits, float *highest) {
  float total = INFINITY;
  for (long v = 0; v < s->entries; v++)
    if (logits[v] != logits[v]) highest[v / s->chunk] = logits[v], total = 0;
  return total;
}

static void survey_row(const Survey *s, long replica, long row) {
  const long at = replica * s->rows + row;
  const float *product = s->product + at * s->entries, *bias = s->bias + replica * s->entries;
  float *logits = s->logits + at * s->entries, *highest = s->highest + at * s->chunks, most = -INFINITY;
  for (long n = 0; n < s->chunks; n++) {
    const long first = n * s->chunk, count = least(s->chunk, s->entries - first);
    highest[n] = survey_chunk(product + first, bias + first, logits + first, count);
    most = highest[n] > most ? highest[n] : most;
  }
  const float from = most > -INFINITY ? most : 0;
  const float sum = sum_of_shares(logits, s->entries, from, product + s->entries);
  if (sum != sum)
    s->total[at] = odd_total(s, logits, highest);
  else
    s->total[at] = sum > 0 ? from + logf(sum) : 0;
}

static long survey_size(long phase, const void *survey) {
  (void)phase;
  const Survey *s = survey;
  return s->replicas * s->groups;
}

static void survey_unit(long phase, long number, void *survey) {
  (void)phase;
  const Survey *s = survey;
  const long replica = number / s->groups, row = number % s->groups * ROWS_OF_GROUP;
  for (long r = row; r < least(s->rows, row + ROWS_OF_GROUP); r++) survey_row(s, replica, r);
}

/* product [..., C, V], bias [..., V] -> logits [..., C, V], total [..., C], and of chunks of the size that an
   attribute gives, a shorter one last, the highest [..., C, chunks]. */
static void survey(XLA_FFI_CallFrame *frame) {
  const XLA_FFI_Buffer *product = argument(frame, 0);
  const int64_t *dims = product->dims + product->rank - 2;
  Survey s = {.product = product->data, .bias = argument(frame, 1)->data, .logits = result(frame, 0)->data,
              .total = result(frame, 1)->data, .highest = result(frame, 2)->data,
              .replicas = 1, .rows = dims[0], .entries = dims[1], .chunk = attribute(frame, "chunk")};
  for (const int64_t *n = product->dims; n < dims; n++) s.replicas *= *n;
  s.groups = blocks(s.rows, ROWS_OF_GROUP), s.chunks = blocks(s.entries, s.chunk);
  /* A logit takes as long as some 60 operations of a product. */
  const double operations = 60.0 * s.replicas * s.rows * s.entries;
  run_phases(frame, threads_for(frame, operations, 0), (Phases){1, 1, survey_size, survey_unit, &s});
}

#endif
