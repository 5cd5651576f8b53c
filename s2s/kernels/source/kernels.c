/* Products of matrices, as XLA's custom calls on a CPU. Compiled on the machine that runs it. */

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "block.h"
#include "parallel.h"

/* ---- what XLA asks of every handler ---- */

static int described(XLA_FFI_CallFrame *frame) {
  for (XLA_FFI_Extension_Base *e = frame->extension_start; e; e = e->next)
    if (e->type == XLA_FFI_Extension_Metadata) {
      XLA_FFI_Metadata *m = ((XLA_FFI_Metadata_Extension *)e)->metadata;
      m->api_version.major_version = XLA_FFI_API_MAJOR;
      m->api_version.minor_version = XLA_FFI_API_MINOR;
      m->traits = 0;
      return 1;
    }
  return 0;
}

static XLA_FFI_Buffer *argument(XLA_FFI_CallFrame *frame, int n) { return frame->args.args[n]; }
static XLA_FFI_Buffer *result(XLA_FFI_CallFrame *frame, int n) { return frame->rets.rets[n]; }

static int64_t attribute(XLA_FFI_CallFrame *frame, const char *name) {
  for (int64_t n = 0; n < frame->attrs.size; n++) {
    XLA_FFI_ByteSpan *span = frame->attrs.names[n];
    if (span->len == strlen(name) && !memcmp(span->ptr, name, span->len))
      return *(int64_t *)((XLA_FFI_Scalar *)frame->attrs.attrs[n])->value;
  }
  return 0;
}

/* ---- memory between calls ---- */

#define HUGE_PAGE (2l << 20)

/* Of the pages that lie in it completely. A panel spans several small pages, and to look them up
   takes long. */
static void ask_for_huge_pages(void *memory, size_t bytes) {
#ifdef __linux__
  uintptr_t from = blocks((uintptr_t)memory, HUGE_PAGE) * HUGE_PAGE;
  uintptr_t to = ((uintptr_t)memory + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (from < to) madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

#define SPACES 32
static struct {
  atomic_int busy;
  void *memory;
  size_t bytes;
} spaces[SPACES];

/* At least so many bytes, kept for the next call: fresh pages cost more than a small product. */
static void *borrow(size_t bytes, int *which) {
  for (int n = 0; n < SPACES; n++) {
    int free_ = 0;
    if (atomic_compare_exchange_strong(&spaces[n].busy, &free_, 1)) {
      if (spaces[n].bytes < bytes) {
        free(spaces[n].memory);
        spaces[n].bytes = blocks(bytes, HUGE_PAGE) * HUGE_PAGE;
        spaces[n].memory = aligned_alloc(HUGE_PAGE, spaces[n].bytes);
        ask_for_huge_pages(spaces[n].memory, spaces[n].bytes);
      }
      *which = n;
      return spaces[n].memory;
    }
  }
  *which = -1;
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static void give_back(void *memory, int which) {
  if (which < 0)
    free(memory);
  else
    atomic_store(&spaces[which].busy, 0);
}

/* ---- a product ---- */

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
  int past_caches;
} Product;

static void pack_either(long number, void *argument) {
  Product *p = argument;
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

static void multiply_unit(long number, void *argument) {
  const Product *p = argument;
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
  Ahead ahead = {.left_lines = blocks(left_bytes, (b1 - b0) * fetches(parts) * 64),
                 .right_lines = blocks(right_bytes, (a1 - a0) * fetches(parts) * 64)};
  const long left_piece = left_bytes / (b1 - b0), right_piece = right_bytes / (a1 - a0);
  enter(parts);
  for (long depth = 0; depth < p->left.depths; depth++) {
    long count_k = least(DEPTH, p->left.operand.count_k - depth * DEPTH);
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
  long threads = thread_count(frame);
  double work = 2.0 * p->left.operand.count_i * p->right.operand.count_i * p->left.operand.count_k;
  /* Another thread's help comes some 30 microseconds late. */
  const double slowness[] = {12, 1, 3, 6};
  if (work * slowness[p->left.parts] < 1e8) threads = 1;
  p->unit_left = MOST_LEFT / p->left.size, p->unit_right = MOST_RIGHT / p->right.size;
  long units_left = blocks(p->left.panels, p->unit_left);
  /* Enough units for all threads to end together. */
  while (p->unit_right > 1 && units_left * blocks(p->right.panels, p->unit_right) < 4 * threads)
    p->unit_right--;
  p->units_right = blocks(p->right.panels, p->unit_right);
  run_phases(frame, threads, packing_units(&p->left) + (packed ? 0 : packing_units(&p->right)), pack_either,
             units_left * p->units_right, multiply_unit, p);
  give_back(p->left.packed, which);
}

/* An operand of a product, from a matrix that is summed over its axis `axis`. */
static Operand operand(const XLA_FFI_Buffer *x, long axis) {
  Operand o = {.data = x->data, .is_bfloat16 = x->dtype == XLA_FFI_DataType_BF16};
  o.count_k = x->dims[axis], o.count_i = x->dims[1 - axis];
  o.stride_k = axis ? 1 : x->dims[1], o.stride_i = axis ? x->dims[1] : 1;
  return o;
}

/* (left, right) -> their product; each summed over the axis that an attribute names. */
XLA_FFI_Error *s2s_product(XLA_FFI_CallFrame *frame) {
  if (described(frame)) return NULL;
  int parts = attribute(frame, "parts");
  Product p = {.left = packing_of(operand(argument(frame, 0), attribute(frame, "left_axis")), parts, 0),
               .right = packing_of(operand(argument(frame, 1), attribute(frame, "right_axis")), parts, 1)};
  multiply(frame, &p, result(frame, 0));
  return NULL;
}

/* (left [M, K], packed right) -> their product [M, N]. */
XLA_FFI_Error *s2s_stationary(XLA_FFI_CallFrame *frame) {
  if (described(frame)) return NULL;
  int parts = attribute(frame, "parts");
  Product p = {.left = packing_of(operand(argument(frame, 0), 1), parts, 0)};
  Operand right = {.count_i = result(frame, 0)->dims[1], .count_k = p.left.operand.count_k};
  p.right = packing_of(right, parts, 1);
  p.right.packed = argument(frame, 1)->data;
  multiply(frame, &p, result(frame, 0));
  return NULL;
}

static void pack_one(long number, void *argument) { pack_unit(argument, number); }

/* right -> it, laid out for `s2s_stationary`. */
XLA_FFI_Error *s2s_pack(XLA_FFI_CallFrame *frame) {
  if (described(frame)) return NULL;
  Operand right = operand(argument(frame, 0), attribute(frame, "right_axis"));
  Packing p = packing_of(right, attribute(frame, "parts"), 1);
  p.packed = result(frame, 0)->data;
  ask_for_huge_pages(p.packed, packed_bytes(&p));
  run_phases(frame, thread_count(frame), packing_units(&p), pack_one, 0, pack_one, &p);
  return NULL;
}

/* 1 where the matrix unit may be used. */
int s2s_has_matrix_unit(void) { return amx_allowed(); }

/* Of a vector of float32: with fewer than 16, XLA's own loops are as good. */
int s2s_lanes(void) { return LANES; }

/* Bytes of a packed operand [k, n]. */
int64_t s2s_packed_bytes(int64_t k, int64_t n, int parts) {
  Packing p = packing_of((Operand){.count_i = n, .count_k = k}, parts, 1);
  return packed_bytes(&p);
}
