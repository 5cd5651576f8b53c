/* The LSTM over time, forward and back, several chains of it side by side.

   A chain is one cell in one direction, with its own kernel U [H, 4 H]. A step of all chains is two
   phases. Units of the first are blocks of hidden units: a unit multiplies for the four gates of its own
   hidden units, and opens them while the sums are in the cache. The second lays out what the next step
   multiplies, for which rows are needed whole. */

#ifndef S2S_LSTM_H
#define S2S_LSTM_H

#include "activations.h"
#include "product.h"

#define GATES 4 /* input, forget, output, candidate */

/* Rows of a unit of work: the sums of its gates stay in the second cache. */
#define ROWS_OF_UNIT 256

typedef struct {
  const void *kernel;           /* [H, 4 H] */
  const void *gates;            /* [T, B, 4 H]: the inputs' share; on the way back, what was opened */
  const void *first_h, *first_c; /* [B, H]; on the way back, gradients by the last ones */
  const void *started_c;        /* on the way back, c before the first position */
  void *outputs;                /* [T, B, outputs_stride]; on the way back, their gradient */
  long outputs_at, outputs_stride;
  void *cells;                  /* [T, B, H]: c after each position */
  void *opened;                 /* [T, B, 4 H]: gates as they were opened, NULL where nothing is kept; on the
                                   way back, the gradient by the gates */
  void *last_h, *last_c;        /* [B, H]; on the way back, gradients by the first ones */
  const int32_t *lengths;       /* [B] */
  int reverse;
  /* working memory */
  Packing weights[GATES], *left; /* `operands` of them */
  float *h, *c; /* [B, H]: the state; on the way back, the gradient by h of rows not walked, and by c */
} Chain;

typedef struct {
  Chain *chains;
  long count, steps, turns, rows, hidden;
  int parts, is_bfloat16, back;
  long width, columns, groups; /* hidden units of a unit of work; units across, and down */
} Lstm;

/* Packed operands of a step: h, or on the way back the gradient by each gate. */
static long operands(const Lstm *l) { return l->back ? GATES : 1; }

static long position_of(const Lstm *l, const Chain *c, long turn) {
  return (c->reverse != l->back) ? l->turns - 1 - turn : turn;
}

enum { STEP, PACK, PHASES };

static long lstm_size(long phase, const void *lstm) {
  const Lstm *l = lstm;
  const Chain *c = l->chains;
  if (!phase) return l->count * (GATES * packing_units(&c->weights[0]) + 1 + l->steps - l->turns);
  if ((phase - 1) % PHASES == STEP) return l->count * l->columns * l->groups;
  /* On the way there nothing reads the last h. */
  if (!l->back && (phase - 1) / PHASES + 1 == l->turns) return 0;
  return l->count * operands(l) * packing_units(c->left);
}

/* Before the first step. */
static void lstm_prepare(const Lstm *l, long number) {
  const long each = GATES * packing_units(&l->chains->weights[0]), tail = l->steps - l->turns;
  Chain *c = &l->chains[number / (each + 1 + tail)];
  number %= each + 1 + tail;
  const long size = l->is_bfloat16 ? 2 : 4, state = l->rows * l->hidden;
  if (number < each) {
    pack_unit(&c->weights[number % GATES], number / GATES);
  } else if (number == each) {
    for (long i = 0; i < state; i += 16) {
      long count = least(16, state - i);
      store(c->h, i, count, 0, load(c->first_h, i, count, l->is_bfloat16));
      store(c->c, i, count, 0, load(c->first_c, i, count, l->is_bfloat16));
    }
    if (!l->back)
      for (long unit = 0; unit < packing_units(c->left); unit++) pack_unit(c->left, unit);
  } else {
    long t = l->turns + number - each - 1;
    if (l->back)
      memset((char *)c->opened + t * GATES * state * size, 0, GATES * state * size);
    else
      for (long row = 0; row < l->rows; row++)
        memset((char *)c->outputs + ((t * l->rows + row) * c->outputs_stride + c->outputs_at) * size, 0,
               l->hidden * size);
  }
}

/* Room for a sum for each gate, of so many panels of rows and one block of columns. */
static float *unit_sums(int parts, long panels) {
  static _Thread_local float *kept;
  static _Thread_local size_t kept_size;
  size_t size = 4 * (GATES * panels * left_size(parts) * right_size(parts) + 16);
  if (kept_size < size) {
    free(kept);
    kept_size = (size + 63) / 64 * 64;
    kept = aligned_alloc(64, kept_size);
  }
  return kept;
}

/* Pieces of rows that a unit reads at one position, on their way into the second cache: they lie too far
   apart for a processor to see them coming. */
typedef struct {
  const char *first[2 * GATES]; /* of the unit's first row */
  long stride[2 * GATES];       /* bytes from row to row */
  int kinds;
  long bytes, rows, fetched; /* of a piece; in all; so far */
} Pieces;

static void fetch_rows(Pieces *p, long rows) {
  for (long end = least(p->rows, p->fetched + rows); p->fetched < end; p->fetched++)
    for (int kind = 0; kind < p->kinds; kind++)
      for (long byte = 0; byte < p->bytes; byte += 64)
        __builtin_prefetch(p->first[kind] + p->fetched * p->stride[kind] + byte, 0, 2);
}

/* Rows of `stride` numbers, of which the first is read from number `at` on; or `count` times so much of them,
   `apart` from one another. */
static void add_pieces(Pieces *p, const void *rows, long at, long stride, int count, long apart, long element) {
  for (int n = 0; n < count; n++) {
    p->first[p->kinds] = (const char *)rows + (at + n * apart) * element;
    p->stride[p->kinds++] = stride * element;
  }
}

static Pieces pieces_of(const Lstm *l, const Chain *c, long t, long row, long end, long column, long width) {
  const long element = l->is_bfloat16 ? 2 : 4, hidden = l->hidden, at = t * l->rows + row;
  Pieces p = {.bytes = width * element, .rows = end - row};
  add_pieces(&p, c->gates, at * GATES * hidden + column, GATES * hidden, GATES, hidden, element);
  if (l->back) {
    add_pieces(&p, c->cells, at * hidden + column, hidden, 1, 0, element);
    add_pieces(&p, c->outputs, at * c->outputs_stride + c->outputs_at + column, c->outputs_stride, 1, 0, element);
  }
  return p;
}

/* Positions of the sum that all gates multiply before the next ones: so few that the first cache holds the
   left operand meanwhile. */
static long shallow(int parts) { return parts == DIGITS ? DIGITS_DEPTH : 64; }

/* A product that is added to one of a unit's sums. */
typedef struct {
  const Packing *left, *right;
  int sum;
} Term;

/* Products of panels of rows with one block of columns. sums: `apart` numbers from one to the next; the first
   term of each begins it. */
static void add_terms(const Term *terms, int count, long panel, long panels, long column, float *sums, long apart,
                      Pieces *pieces) {
  const int parts = terms->left->parts;
  const long depth = terms->left->depth, step = shallow(parts), block = terms->left->size * terms->right->size;
  const long left_bytes = panel_bytes(terms->left->size, parts), right_bytes = panel_bytes(terms->right->size, parts);
  /* Of one step. */
  const long left_part = left_bytes / (depth / step), right_part = right_bytes / (depth / step);
  long longest = 0;
  for (int n = 0; n < count; n++) longest = longest < terms[n].left->operand.count_k ? terms[n].left->operand.count_k : longest;
  const long rows = blocks(pieces->rows, count * blocks(longest, step) * panels);
  const long lines = blocks(right_part, panels * fetches(step, parts) * 64);
  for (long k = 0; k < longest; k += step) {
    int begun = 0;
    for (int n = 0; n < count; n++) {
      const Term *term = &terms[n], *next = &terms[(n + 1) % count];
      const int first = !k && !(begun >> term->sum & 1);
      begun |= 1 << term->sum;
      if (k >= term->left->operand.count_k) continue;
      const long next_k = n + 1 < count ? k : k + step;
      const char *a = panel_of(term->left, k / depth, panel) + left_part * (k % depth / step);
      const char *b = panel_of(term->right, k / depth, column) + right_part * (k % depth / step);
      Ahead ahead = {.right = b, .right_lines = 0};
      if (next_k < next->left->operand.count_k) {
        ahead.right = panel_of(next->right, next_k / depth, column) + right_part * (next_k % depth / step);
        ahead.right_lines = lines;
      }
      for (long i = 0; i < panels; i++, ahead.right += blocks(right_part, panels)) {
        fetch_rows(pieces, rows);
        add_block(a + i * left_bytes, b, least(step, term->left->operand.count_k - k), parts,
                  sums + term->sum * apart + i * block, first, ahead);
      }
    }
  }
}

/* Opens gates [i; f; o; g] in place; c moves on. Returns h. */
INLINE Floats open_gates(Floats x[GATES], Floats *c) {
  for (int g = 0; g < 3; g++) x[g] = logistic(x[g]);
  x[3] = hyperbolic_tangent(x[3]);
  *c = x[1] * *c + x[0] * x[3];
  return x[2] * hyperbolic_tangent(*c);
}

/* From opened gates to the gradient by them before, in place. d_h: by h; *d_c: by c from the step after,
   and then by c of the step before. */
INLINE void close_gates(Floats x[GATES], Floats old_c, Floats new_c, Floats d_h, Floats *d_c) {
  Floats tanh_c = hyperbolic_tangent(new_c), i = x[0], f = x[1], o = x[2], g = x[3];
  Floats d = *d_c + d_h * o * (1 - tanh_c * tanh_c);
  x[0] = d * g * i * (1 - i);
  x[1] = d * old_c * f * (1 - f);
  x[2] = d_h * tanh_c * o * (1 - o);
  x[3] = d * i * (1 - g * g);
  *d_c = d * f;
}

/* One row of a unit: its state moves on. */
INLINE void lstm_row(const Lstm *l, Chain *c, long t, long row, long column, long width, const float *sums,
                     long gate, const int is_bfloat16) {
  const long hidden = l->hidden, at = t * l->rows + row;
  const int real = t < c->lengths[row];
  for (long v = 0; v < width; v += 16) {
    const long count = least(16, width - v), unit = column + v, state = row * hidden + unit;
    const long output = at * c->outputs_stride + c->outputs_at + unit;
    if (!real) {
      store(c->outputs, output, count, is_bfloat16, every(0));
      continue;
    }
    const float *sum = sums_at(sums, row % left_size(l->parts), v, l->parts);
    Floats x[GATES];
    for (int g = 0; g < GATES; g++)
      x[g] = load(sum + g * gate, 0, 16, 0) + load(c->gates, at * GATES * hidden + g * hidden + unit, count, is_bfloat16);
    Floats new = load(c->c, state, count, 0), h = open_gates(x, &new);
    if (c->opened) {
      for (int g = 0; g < GATES; g++)
        store(c->opened, at * GATES * hidden + g * hidden + unit, count, is_bfloat16, x[g]);
      store(c->cells, at * hidden + unit, count, is_bfloat16, new);
    }
    store(c->outputs, output, count, is_bfloat16, h);
    store(c->c, state, count, 0, new);
    store(c->h, state, count, 0, h);
  }
}

/* The same on the way back. sums: the gradient by h that came through the step after; NULL: none did. */
INLINE void lstm_row_back(const Lstm *l, Chain *c, long t, long row, long column, long width,
                          const float *sums, const int is_bfloat16) {
  const long hidden = l->hidden, at = t * l->rows + row;
  const int real = t < c->lengths[row];
  /* Before this position: nothing else was walked before a row's first. */
  const long before = c->reverse ? t + 1 : t - 1;
  const int started = c->reverse ? before < least(c->lengths[row], l->turns) : t > 0;
  for (long v = 0; v < width; v += 16) {
    const long count = least(16, width - v), unit = column + v, state = row * hidden + unit;
    const long gates = at * GATES * hidden + unit;
    Floats d_h = load(c->h, state, count, 0);
    if (sums) d_h += load(sums_at(sums, row % left_size(l->parts), v, l->parts), 0, 16, 0);
    if (!real) {
      store(c->h, state, count, 0, d_h);
      for (int g = 0; g < GATES; g++) store(c->opened, gates + g * hidden, count, is_bfloat16, every(0));
      continue;
    }
    d_h += load(c->outputs, at * c->outputs_stride + c->outputs_at + unit, count, is_bfloat16);
    Floats x[GATES];
    for (int g = 0; g < GATES; g++) x[g] = load(c->gates, gates + g * hidden, count, is_bfloat16);
    Floats old = started ? load(c->cells, (before * l->rows + row) * hidden + unit, count, is_bfloat16)
                         : load(c->started_c, state, count, is_bfloat16);
    Floats d_c = load(c->c, state, count, 0);
    close_gates(x, old, load(c->cells, at * hidden + unit, count, is_bfloat16), d_h, &d_c);
    for (int g = 0; g < GATES; g++) store(c->opened, gates + g * hidden, count, is_bfloat16, x[g]);
    store(c->c, state, count, 0, d_c);
    store(c->h, state, count, 0, every(0));
  }
}

static void lstm_unit(long phase, long number, void *lstm) {
  const Lstm *l = lstm;
  if (!phase) {
    lstm_prepare(l, number);
    return;
  }
  const long turn = (phase - 1) / PHASES;
  if ((phase - 1) % PHASES == PACK) {
    const long each = packing_units(l->chains->left);
    Chain *c = &l->chains[number / (each * operands(l))];
    const long operand = number / each % operands(l);
    Packing left = c->left[operand];
    if (l->back)
      left.operand.data = (const char *)c->opened + (position_of(l, c, turn) * l->rows * GATES + operand) * l->hidden *
                                                        (l->is_bfloat16 ? 2 : 4);
    pack_unit(&left, number % each);
    return;
  }
  Chain *c = &l->chains[number / (l->columns * l->groups)];
  const long block = number / l->groups % l->columns, column = block * l->width;
  const long row = number % l->groups * ROWS_OF_UNIT, end = least(row + ROWS_OF_UNIT, l->rows);
  const long width = least(l->width, l->hidden - column);
  Packing *left = c->left;
  const long panel = row / left->size, panels = blocks(end - row, left->size);
  const long size = left->size * right_size(l->parts), gate = l->back ? 0 : panels * size;
  float *sums = unit_sums(l->parts, panels);
  /* Forward the last phase has no step; back, the first has nothing to multiply. */
  const int step = turn < l->turns, multiply = l->back ? turn > 0 : step;
  const long t = position_of(l, c, turn);
  Pieces pieces = {0};
  if (step) pieces = pieces_of(l, c, t, row, end, column, width);
  if (multiply) {
    enter(l->parts);
    Term terms[GATES];
    for (int g = 0; g < GATES; g++)
      terms[g] = (Term){l->back ? left + g : left, &c->weights[g], l->back ? 0 : g};
    add_terms(terms, GATES, panel, panels, block, sums, gate, &pieces);
    leave(l->parts);
  }
  if (step) {
    for (long r = row; r < end; r++) {
      const float *from = sums + (r - row) / left->size * size;
      if (l->back && l->is_bfloat16)
        lstm_row_back(l, c, t, r, column, width, multiply ? from : NULL, 1);
      else if (l->back)
        lstm_row_back(l, c, t, r, column, width, multiply ? from : NULL, 0);
      else if (l->is_bfloat16)
        lstm_row(l, c, t, r, column, width, from, gate, 1);
      else
        lstm_row(l, c, t, r, column, width, from, gate, 0);
    }
    return;
  }
  for (long r = row; r < end; r++)
    for (long v = 0; v < width; v += 16) {
      const long count = least(16, width - v), at = r * l->hidden + column + v;
      Floats h = load(c->h, at, count, 0);
      if (multiply)
        h += load(sums_at(sums + (r - row) / left->size * size, r % left->size, v, l->parts), 0, 16, 0);
      store(c->last_h, at, count, l->is_bfloat16, h);
      store(c->last_c, at, count, l->is_bfloat16, load(c->c, at, count, 0));
    }
}

/* The operands' layout and all working memory of a chain; returns bytes used from `memory` on, which may
   be NULL to count them. */
static size_t lstm_lay_out(const Lstm *l, Chain *c, char *memory) {
  const long hidden = l->hidden, element = l->is_bfloat16 ? 2 : 4;
  size_t used = 0;
  for (long g = 0; g < GATES; g++) {
    Operand weights = {.data = (const char *)c->kernel + g * hidden * element,
                       .stride_i = l->back ? GATES * hidden : 1,
                       .stride_k = l->back ? 1 : GATES * hidden,
                       .count_i = hidden,
                       .count_k = hidden,
                       .is_bfloat16 = l->is_bfloat16};
    c->weights[g] = packing_of(weights, l->parts, 1);
    c->weights[g].packed = memory + used;
    used += packed_bytes(&c->weights[g]);
  }
  Packing left = packing_of((Operand){.stride_i = l->back ? GATES * hidden : hidden,
                                      .stride_k = 1,
                                      .count_i = l->rows,
                                      .count_k = hidden,
                                      .is_bfloat16 = l->back && l->is_bfloat16},
                            l->parts, 0);
  const size_t lefts = packed_bytes(&left), state = (l->rows * hidden * 4 + 63) / 64 * 64;
  c->h = (float *)(memory + used), c->c = (float *)(memory + used + state);
  used += 2 * state;
  left.operand.data = c->h;
  for (long n = 0; n < operands(l); n++, used += lefts)
    if (memory) c->left[n] = left, c->left[n].packed = memory + used;
  return used;
}

static void lstm(XLA_FFI_CallFrame *frame, Lstm *l) {
  if (!l->count || !l->hidden) return; /* nothing to write */
  l->width = right_size(l->parts);
  l->columns = blocks(l->hidden, l->width), l->groups = blocks(l->rows, ROWS_OF_UNIT);
  l->turns = 0;
  for (long n = 0; n < l->count; n++)
    for (long row = 0; row < l->rows; row++)
      if (l->turns < l->chains[n].lengths[row]) l->turns = least(l->chains[n].lengths[row], l->steps);
  int which;
  size_t bytes = lstm_lay_out(l, l->chains, NULL);
  char *memory = borrow(bytes * l->count, &which);
  Packing *lefts = malloc(operands(l) * l->count * sizeof(Packing));
  for (long n = 0; n < l->count; n++) {
    l->chains[n].left = lefts + operands(l) * n;
    lstm_lay_out(l, &l->chains[n], memory + n * bytes);
  }
  double operations = 2.0 * GATES * l->rows * l->hidden * l->hidden * l->turns * l->count;
  run_phases(frame, threads_for(frame, operations, l->parts), (Phases){PHASES * l->turns + 2, PHASES, lstm_size, lstm_unit, l});
  free(lefts);
  give_back(memory, which);
}

/* Of an array [replicas, ...], which may have any number of axes of replicas, one replica's part. */
static void *part_of(const XLA_FFI_Buffer *x, long replica, long replicas) {
  long bytes = x->dtype == XLA_FFI_DataType_BF16 ? 2 : 4;
  for (long n = 0; n < x->rank; n++) bytes *= x->dims[n];
  return (char *)x->data + bytes / replicas * replica;
}

/* Chains of no arrays yet, for gates [..., T, B, 4 H] that were given. */
static Lstm lstm_of(XLA_FFI_CallFrame *frame, const XLA_FFI_Buffer *gates, long ways, int back) {
  const int64_t *dims = gates->dims + gates->rank - 3;
  Lstm l = {.steps = dims[0], .rows = dims[1], .hidden = dims[2] / GATES, .back = back,
            .parts = attribute(frame, "parts"), .is_bfloat16 = gates->dtype == XLA_FFI_DataType_BF16};
  l.count = ways;
  for (const int64_t *n = gates->dims; n < dims; n++) l.count *= *n;
  l.chains = calloc(l.count, sizeof(Chain));
  for (long n = 0; n < l.count; n++) {
    Chain *c = &l.chains[n];
    c->lengths = part_of(argument(frame, 0), n / ways, l.count / ways);
    c->outputs_at = n % ways * l.hidden, c->outputs_stride = ways * l.hidden;
    c->reverse = attribute(frame, "reverse") >> n % ways & 1;
  }
  return l;
}

/* lengths [B], and for each direction: kernel [H, 4 H], gates [T, B, 4 H], h and c [B, H]
   -> outputs [T, B, ways * H], and for each direction: the last h and c; and if the way back is to be
   walked, opened gates and cells. `reverse`: a bit for each direction. */
static void lstm_forward(XLA_FFI_CallFrame *frame) {
  const long ways = (frame->args.size - 1) / 4, made = (frame->rets.size - 1) / ways;
  Lstm l = lstm_of(frame, argument(frame, 2), ways, 0);
  const long replicas = l.count / ways;
  for (long n = 0; n < l.count; n++) {
    Chain *c = &l.chains[n];
    const void **from[] = {&c->kernel, &c->gates, &c->first_h, &c->first_c};
    for (int i = 0; i < 4; i++) *from[i] = part_of(argument(frame, 1 + 4 * (n % ways) + i), n / ways, replicas);
    void **to[] = {&c->last_h, &c->last_c, &c->opened, &c->cells};
    for (int i = 0; i < made; i++) *to[i] = part_of(result(frame, 1 + made * (n % ways) + i), n / ways, replicas);
    c->outputs = part_of(result(frame, 0), n / ways, replicas);
  }
  lstm(frame, &l);
  free(l.chains);
}

/* lengths, the gradient by outputs, and for each direction: kernel, opened gates, cells, c before the first
   position, gradients by the last h and c -> for each direction: gradients by gates, by the first h and c. */
static void lstm_backward(XLA_FFI_CallFrame *frame) {
  const long ways = frame->rets.size / 3;
  Lstm l = lstm_of(frame, argument(frame, 3), ways, 1);
  const long replicas = l.count / ways;
  for (long n = 0; n < l.count; n++) {
    Chain *c = &l.chains[n];
    const void *cells, **from[] = {&c->kernel, &c->gates, &cells, &c->started_c, &c->first_h, &c->first_c};
    for (int i = 0; i < 6; i++) *from[i] = part_of(argument(frame, 2 + 6 * (n % ways) + i), n / ways, replicas);
    void **to[] = {&c->opened, &c->last_h, &c->last_c};
    for (int i = 0; i < 3; i++) *to[i] = part_of(result(frame, 3 * (n % ways) + i), n / ways, replicas);
    c->cells = (void *)cells;
    c->outputs = part_of(argument(frame, 1), n / ways, replicas);
  }
  lstm(frame, &l);
  free(l.chains);
}

#endif
