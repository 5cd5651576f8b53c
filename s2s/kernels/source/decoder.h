/* The decoder with input feeding over time, forward and back: LSTM layers, attention, attentional vector.

   A step is a row of phases, as each waits for all of what is before it: a phase for each layer, one for
   attention, one for the attentional vector that the next step reads. Weights' gradients are no part of
   it: what products read and what comes back to them is written down at every position, for one product
   of all positions afterwards. */

#ifndef S2S_DECODER_H
#define S2S_DECODER_H

#include <math.h>

#include "lstm.h"

#define MOST_LAYERS 16

/* Rows of a unit of attention. */
#define ATTENDED 4

typedef struct {
  const void *kernel, *input;   /* [H, 4 H]: by its own h; by the layer below, or of the first the feed */
  const void *bias, *factor;    /* [4 H], and dropout [T, B, H] of what is read; of layers above the first */
  const void *gates;            /* [T, B, 4 H]: of the first, what was read of tokens; back: of all, what was opened */
  const void *first_h, *first_c; /* [B, H] */
  void *opened;                 /* [T, B, 4 H], NULL where nothing is kept; back: the gradient by the gates */
  void *cells, *outputs;        /* [T, B, H] */
  void *last_h, *last_c;        /* back: gradients by the first state */
  /* working memory */
  Packing own[GATES], below[GATES]; /* kernel and input */
  Packing left[GATES];              /* h; back: the gradient by gates */
  Packing dropped;                  /* h, as the layer above reads it, where it does not read all */
  float *h, *c, *low;               /* [B, H]: state, and what is packed as dropped; back: c's gradient */
} Layer;

typedef struct {
  const int32_t *lengths;          /* [B], of sources */
  const void *memory, *keys;       /* [B, S, M], [B, S, A] */
  const void *kernel;              /* [M + H, H], of the attentional vector */
  const void *first_feed;          /* [B, H], what the first step is fed; NULL: nothing */
  void *packed;                    /* all weights, laid out before; NULL: they are not */
  const void *query_kernel, *vector; /* [H, A], [A]; NULL where the score is the keys' product with the query */
  Layer layers[MOST_LAYERS];
  void *attentional, *context, *query; /* [T, B, H], [T, B, M], [T, B, A] */
  float *align;                        /* [T, B, S] */
  /* back */
  const void *d_attentional;
  const float *d_align;
  void *d_outer, *d_context, *d_query; /* before tanh [T, B, H]; [T, B, M]; [T, B, A] */
  float *d_scores, *d_keys, *d_vector; /* [T, B, S], [B, S, A], [B, A] */
  /* working memory */
  Packing read_context, read_h, by_query; /* of the kernels */
  Packing feed, contexts, queries, outer; /* left operands */
  float *by_h;                            /* [B, H]: the gradient by the top layer's h from above */
} Decoder;

/* Phases of a step, and after the last step on the way back what is left to be done. PACK_: of what was made
   just before, for the products that read it. */
enum {
  LAYER, PACK_LAYER, QUERY, ATTEND, PACK_CONTEXT, OUTER, PACK_FEED, /* forward */
  FEED, PACK_OUTER, READ, PACK_QUERY, BY_QUERY, FIRST               /* back */
};

typedef struct {
  int kind, layer;
} Phase;

typedef struct {
  Decoder *decoders;
  long count, depth, steps, turns, rows, hidden, memory, sources;
  int parts, is_bfloat16, back, asks;
  long width, columns, groups, element;
  long beams; /* rows of one source */
  Phase phases[2 * MOST_LAYERS + 6]; /* of a step */
  long each;
} Run;

typedef struct {
  int kind, layer;
  long turn, t;
} Moment;

static void add_phase(Run *r, int kind, int layer) { r->phases[r->each++] = (Phase){kind, layer}; }

static void plan_phases(Run *r) {
  if (!r->back) {
    for (int n = 0; n < r->depth; n++) add_phase(r, LAYER, n), add_phase(r, PACK_LAYER, n);
    if (r->asks) add_phase(r, QUERY, 0);
    add_phase(r, ATTEND, 0), add_phase(r, PACK_CONTEXT, 0);
    add_phase(r, OUTER, 0), add_phase(r, PACK_FEED, 0);
    return;
  }
  add_phase(r, FEED, 0), add_phase(r, PACK_OUTER, 0);
  add_phase(r, READ, 0), add_phase(r, ATTEND, 0);
  if (r->asks) add_phase(r, PACK_QUERY, 0), add_phase(r, BY_QUERY, 0);
  for (int n = r->depth - 1; n >= 0; n--) add_phase(r, LAYER, n), add_phase(r, PACK_LAYER, n);
}

/* What is done in a phase, and at which position. */
static Moment moment_of(const Run *r, long phase) {
  const Phase *p = &r->phases[(phase - 1) % r->each];
  Moment m = {.kind = p->kind, .layer = p->layer, .turn = (phase - 1) / r->each};
  m.t = r->back ? r->turns - 1 - m.turn : m.turn;
  if (m.turn == r->turns) m.kind = FIRST;
  return m;
}

static long query_width(const Run *r) { return r->asks ? r->hidden : 0; }

static const void *at_position(const Run *r, const void *x, long t, long width) {
  return (const char *)x + t * r->rows * width * r->element;
}

/* What the layer above reads: h, or where some of it is dropped, what is left. */
static const Packing *read_below(const Layer *l) { return l->dropped.packed ? &l->dropped : l->left; }

#define MOST_OPERANDS GATES /* packed in one phase */

/* Left operands that are packed in a phase, with what they are packed from; returns how many. */
static int operands_of(const Run *r, const Decoder *d, Moment m, Packing found[MOST_OPERANDS]) {
  const Layer *l = &d->layers[m.layer];
  int count = 0;
  switch (m.kind) {
  case PACK_LAYER:
    for (long g = 0; r->back && g < GATES; g++) {
      Packing p = l->left[g];
      p.operand.data = (const char *)at_position(r, l->opened, m.t, GATES * r->hidden) + g * r->hidden * r->element;
      found[count++] = p;
    }
    if (r->back) break;
    found[count++] = l->left[0];
    if (l->dropped.packed) found[count++] = l->dropped;
    break;
  case PACK_CONTEXT:
    found[count++] = d->contexts;
    found->operand.data = at_position(r, d->context, m.t, r->memory);
    break;
  case PACK_FEED:
    if (m.turn + 1 == r->turns) break;
    found[count++] = d->feed;
    found->operand.data = at_position(r, d->attentional, m.t, r->hidden);
    break;
  case PACK_OUTER:
    found[count++] = d->outer;
    found->operand.data = at_position(r, d->d_outer, m.t, r->hidden);
    break;
  default:
    found[count++] = d->queries;
    found->operand.data = at_position(r, d->d_query, m.t, query_width(r));
  }
  return count;
}

static void pack_operand(const Run *r, const Decoder *d, Moment m, long number) {
  Packing operands[MOST_OPERANDS];
  const int count = operands_of(r, d, m, operands);
  for (int n = 0; n < count; number -= packing_units(&operands[n++]))
    if (number < packing_units(&operands[n])) {
      pack_unit(&operands[n], number);
      return;
    }
}

static long decoder_units(const Run *r, Moment m) {
  Packing operands[MOST_OPERANDS];
  long units = 0;
  switch (m.kind) {
  case ATTEND:
    return blocks(r->rows, ATTENDED);
  case QUERY:
    return r->decoders->by_query.panels * r->groups;
  case READ:
    return (r->decoders->read_context.panels + r->columns) * r->groups;
  case FIRST:
    return r->depth * r->columns * r->groups;
  case LAYER:
  case OUTER:
  case FEED:
  case BY_QUERY:
    return r->columns * r->groups;
  default:
    for (int n = operands_of(r, r->decoders, m, operands) - 1; n >= 0; n--) units += packing_units(&operands[n]);
    return units;
  }
}

/* Matrices that are packed before the first step. */
static long decoder_matrices(const Run *r) {
  return r->decoders->packed ? 0 : 2 * GATES * r->depth + 2 + r->asks;
}

static Packing *matrix_of(const Run *r, Decoder *d, long number) {
  const long gates = 2 * GATES * r->depth;
  if (number < gates) {
    Layer *l = &d->layers[number / (2 * GATES)];
    return number % 2 ? &l->below[number / 2 % GATES] : &l->own[number / 2 % GATES];
  }
  Packing *others[] = {&d->read_context, &d->read_h, &d->by_query};
  return others[number - gates];
}

static long prepared_units(const Run *r) {
  long units = r->depth + r->steps - r->turns;
  for (long n = 0; n < decoder_matrices(r); n++) units += packing_units(matrix_of(r, r->decoders, n));
  return units;
}

static long decoder_size(long phase, const void *run) {
  const Run *r = run;
  return r->count * (phase ? decoder_units(r, moment_of(r, phase)) : prepared_units(r));
}

static void clear(void *x, long t, long bytes) {
  if (x) memset((char *)x + t * bytes, 0, bytes);
}

static void decoder_prepare(const Run *r, Decoder *d, long number) {
  for (long n = 0; n < decoder_matrices(r); n++) {
    Packing *p = matrix_of(r, d, n);
    if (number < packing_units(p)) {
      pack_unit(p, number);
      return;
    }
    number -= packing_units(p);
  }
  const long state = r->rows * r->hidden, e = r->element;
  if (number < r->depth) {
    Layer *l = &d->layers[number];
    for (long i = 0; i < state; i += 16) {
      long count = least(16, state - i);
      store(l->c, i, count, 0, r->back ? every(0) : load(l->first_c, i, count, r->is_bfloat16));
      if (!r->back) store(l->h, i, count, 0, load(l->first_h, i, count, r->is_bfloat16));
    }
    if (!r->back)
      for (long unit = 0; unit < packing_units(l->left); unit++) pack_unit(l->left, unit);
    if (!number && d->first_feed) {
      Packing feed = d->feed;
      feed.operand.data = d->first_feed;
      for (long unit = 0; unit < packing_units(&feed); unit++) pack_unit(&feed, unit);
    }
    return;
  }
  /* Positions that are not walked. */
  const long t = r->turns + number - r->depth;
  for (long n = 0; n < r->depth; n++) {
    if (r->back)
      clear(d->layers[n].opened, t, GATES * state * e);
    else
      clear(d->layers[n].outputs, t, state * e);
  }
  clear(r->back ? d->d_outer : d->attentional, t, state * e);
  clear(r->back ? d->d_context : d->context, t, r->rows * r->memory * e);
  clear(r->back ? d->d_query : NULL, t, r->rows * query_width(r) * e);
  clear(r->back ? d->d_scores : d->align, t, r->rows * r->sources * 4);
}

/* A unit of rows and columns, its sums, and where the sums of a row are. */
typedef struct {
  long block, column, width, row, end;
  float *sums;
  long apart, panel_size;
} Unit;

static Unit unit_of(const Run *r, long number, long columns) {
  Unit u = {.block = number / r->groups, .row = number % r->groups * ROWS_OF_UNIT};
  u.column = u.block * r->width, u.width = least(r->width, columns - u.column);
  u.end = least(u.row + ROWS_OF_UNIT, r->rows);
  u.panel_size = left_size(r->parts) * right_size(r->parts);
  long panels = blocks(u.end - u.row, left_size(r->parts));
  u.apart = panels * u.panel_size, u.sums = unit_sums(r->parts, panels);
  return u;
}

/* Sums of products, and meanwhile what is read after them. */
static void sum_up(const Run *r, const Unit *u, const Term *terms, int count, Pieces pieces) {
  const long size = left_size(r->parts);
  pieces.bytes = u->width * r->element, pieces.rows = u->end - u->row;
  enter(r->parts);
  add_terms(terms, count, u->row / size, blocks(u->end - u->row, size), u->block, u->sums, u->apart, &pieces);
  leave(r->parts);
}

INLINE Floats sum_at(const Run *r, const Unit *u, int sum, long row, long v) {
  const float *panel = u->sums + sum * u->apart + (row - u->row) / left_size(r->parts) * u->panel_size;
  return load(sums_at(panel, row % left_size(r->parts), v, r->parts), 0, 16, 0);
}

#define EACH_VECTOR(u, row, v)                       \
  for (long row = (u).row; row < (u).end; row++)     \
    for (long v = 0; v < (u).width; v += 16)

/* ---- forward ---- */

INLINE void layer_step(const Run *r, Decoder *d, Moment m, long number, const int f) {
  const long hidden = r->hidden, t = m.t;
  Layer *l = &d->layers[m.layer], *above = m.layer + 1 < r->depth ? l + 1 : NULL;
  Unit u = unit_of(r, number, hidden);
  const Packing *below = m.layer ? read_below(l - 1) : &d->feed;
  Term terms[2 * GATES];
  int count = 0;
  if (m.layer || t || d->first_feed)
    for (int g = 0; g < GATES; g++) terms[count++] = (Term){below, &l->below[g], g};
  for (int g = 0; g < GATES; g++) terms[count++] = (Term){l->left, &l->own[g], g};
  Pieces pieces = {0};
  if (!m.layer)
    add_pieces(&pieces, l->gates, (t * r->rows + u.row) * GATES * hidden + u.column, GATES * hidden, GATES, hidden,
               r->element);
  sum_up(r, &u, terms, count, pieces);
  EACH_VECTOR(u, row, v) {
    const long n = least(16, u.width - v), unit = u.column + v, state = row * hidden + unit;
    const long at = (t * r->rows + row) * hidden, gates = at * GATES + unit;
    Floats x[GATES], c = load(l->c, state, n, 0);
    for (int g = 0; g < GATES; g++)
      x[g] = sum_at(r, &u, g, row, v) +
             (m.layer ? load(l->bias, g * hidden + unit, n, f) : load(l->gates, gates + g * hidden, n, f));
    Floats h = open_gates(x, &c);
    for (int g = 0; l->opened && g < GATES; g++) store(l->opened, gates + g * hidden, n, f, x[g]);
    store(l->cells, at + unit, n, f, c), store(l->outputs, at + unit, n, f, h);
    store(l->c, state, n, 0, c), store(l->h, state, n, 0, h);
    if (above && above->factor) store(l->low, state, n, 0, h * load(above->factor, at + unit, n, f));
  }
}

INLINE void query_step(const Run *r, Decoder *d, Moment m, long number, const int f) {
  const long width = query_width(r);
  Unit u = unit_of(r, number, width);
  Term term = {d->layers[r->depth - 1].left, &d->by_query, 0};
  sum_up(r, &u, &term, 1, (Pieces){0});
  EACH_VECTOR(u, row, v)
  store(d->query, (m.t * r->rows + row) * width + u.column + v, least(16, u.width - v), f, sum_at(r, &u, 0, row, v));
}

INLINE float total(Floats x) {
  float sum = 0;
  for (int i = 0; i < 16; i++) sum += x[i];
  return sum;
}

INLINE float inner(const void *a, long at_a, const void *b, long at_b, long width, const int f) {
  Floats sum = every(0);
  for (long v = 0; v < width; v += 16) {
    long n = least(16, width - v);
    sum += load(a, at_a + v, n, f) * load(b, at_b + v, n, f);
  }
  return total(sum);
}

INLINE void weigh(float *x, long width) {
  float most = -INFINITY, sum = 0;
  for (long s = 0; s < width; s++) most = x[s] > most ? x[s] : most;
  for (long s = 0; s < width; s += 16) {
    long n = least(16, width - s);
    store(x, s, n, 0, exponential(load(x, s, n, 0) - most));
  }
  for (long s = 0; s < width; s++) sum += x[s];
  for (long s = 0; s < width; s++) x[s] /= sum;
}

INLINE void attend_row(const Run *r, Decoder *d, long t, long row, const int f) {
  const long at = t * r->rows + row, sources = r->sources, memory = r->memory, source = row / r->beams;
  const long length = d->lengths[source] < 0 ? 0 : least(d->lengths[source], sources);
  const long width = r->asks ? query_width(r) : r->hidden;
  const void *query = r->asks ? d->query : d->layers[r->depth - 1].outputs;
  float *align = d->align + at * sources;
  for (long s = 0; s < length; s++) {
    const long key = (source * sources + s) * width;
    if (r->asks) {
      Floats sum = every(0);
      for (long v = 0; v < width; v += 16) {
        long n = least(16, width - v);
        Floats joined = load(query, at * width + v, n, f) + load(d->keys, key + v, n, f);
        sum += load(d->vector, v, n, f) * hyperbolic_tangent(joined);
      }
      align[s] = total(sum);
    } else
      align[s] = inner(query, at * width, d->keys, key, width, f);
  }
  weigh(align, length);
  for (long s = length; s < sources; s++) align[s] = 0;
  for (long v = 0; v < memory; v += 16) {
    const long n = least(16, memory - v);
    Floats sum = every(0);
    for (long s = 0; s < length; s++) sum += align[s] * load(d->memory, (source * sources + s) * memory + v, n, f);
    store(d->context, at * memory + v, n, f, sum);
  }
}

INLINE void outer_step(const Run *r, Decoder *d, Moment m, long number, const int f) {
  Unit u = unit_of(r, number, r->hidden);
  Term terms[] = {{&d->contexts, &d->read_context, 0},
                  {d->layers[r->depth - 1].left, &d->read_h, 0}};
  sum_up(r, &u, terms, 2, (Pieces){0});
  EACH_VECTOR(u, row, v)
  store(d->attentional, (m.t * r->rows + row) * r->hidden + u.column + v, least(16, u.width - v), f,
        hyperbolic_tangent(sum_at(r, &u, 0, row, v)));
}

/* ---- back ---- */

/* By the attentional vector before tanh, from above and from what fed the step after. */
INLINE void feed_back(const Run *r, Decoder *d, Moment m, long number, const int f) {
  Unit u = unit_of(r, number, r->hidden);
  Layer *l = d->layers;
  Term terms[GATES];
  for (int g = 0; g < GATES; g++) terms[g] = (Term){&l->left[g], &l->below[g], 0};
  if (m.turn) sum_up(r, &u, terms, GATES, (Pieces){0});
  EACH_VECTOR(u, row, v) {
    const long n = least(16, u.width - v), at = (m.t * r->rows + row) * r->hidden + u.column + v;
    Floats y = load(d->attentional, at, n, f), d_y = load(d->d_attentional, at, n, f);
    if (m.turn) d_y += sum_at(r, &u, 0, row, v);
    store(d->d_outer, at, n, f, d_y * (1 - y * y));
  }
}

/* By what the attentional vector read: the context, and the top layer's h. */
INLINE void read_back(const Run *r, Decoder *d, Moment m, long number, const int f) {
  const long contexts = d->read_context.panels * r->groups;
  const int is_context = number < contexts;
  Unit u = unit_of(r, is_context ? number : number - contexts, is_context ? r->memory : r->hidden);
  Term term = {&d->outer, is_context ? &d->read_context : &d->read_h, 0};
  sum_up(r, &u, &term, 1, (Pieces){0});
  EACH_VECTOR(u, row, v) {
    const long n = least(16, u.width - v);
    Floats x = sum_at(r, &u, 0, row, v);
    if (is_context)
      store(d->d_context, (m.t * r->rows + row) * r->memory + u.column + v, n, f, x);
    else
      store(d->by_h, row * r->hidden + u.column + v, n, 0, x);
  }
}

INLINE void attend_row_back(const Run *r, Decoder *d, long t, long row, const int f) {
  const long at = t * r->rows + row, sources = r->sources, memory = r->memory;
  const long length = d->lengths[row] < 0 ? 0 : least(d->lengths[row], sources);
  const long width = r->asks ? query_width(r) : r->hidden;
  const float *align = d->align + at * sources, *given = d->d_align + at * sources;
  float *slope = d->d_scores + at * sources, mean = 0;
  for (long s = 0; s < length; s++) {
    slope[s] = given[s] + inner(d->d_context, at * memory, d->memory, (row * sources + s) * memory, memory, f);
    mean += align[s] * slope[s];
  }
  for (long s = 0; s < length; s++) slope[s] = align[s] * (slope[s] - mean);
  for (long s = length; s < sources; s++) slope[s] = 0;
  for (long v = 0; v < width; v += 16) {
    const long n = least(16, width - v);
    Floats by_query = every(0);
    if (!r->asks) {
      for (long s = 0; s < length; s++) by_query += slope[s] * load(d->keys, (row * sources + s) * width + v, n, f);
      store(d->by_h, row * width + v, n, 0, load(d->by_h, row * width + v, n, 0) + by_query);
      continue;
    }
    Floats query = load(d->query, at * width + v, n, f), vector = load(d->vector, v, n, f);
    Floats by_vector = load(d->d_vector, row * width + v, n, 0);
    for (long s = 0; s < length; s++) {
      const long key = (row * sources + s) * width + v;
      Floats y = hyperbolic_tangent(query + load(d->keys, key, n, f)), by_key = slope[s] * vector * (1 - y * y);
      by_vector += slope[s] * y, by_query += by_key;
      store(d->d_keys, key, n, 0, load(d->d_keys, key, n, 0) + by_key);
    }
    store(d->d_vector, row * width + v, n, 0, by_vector);
    store(d->d_query, at * width + v, n, f, by_query);
  }
}

INLINE void query_back(const Run *r, Decoder *d, Moment m, long number, const int f) {
  (void)f, (void)m;
  Unit u = unit_of(r, number, r->hidden);
  Term term = {&d->queries, &d->by_query, 0};
  sum_up(r, &u, &term, 1, (Pieces){0});
  EACH_VECTOR(u, row, v) {
    const long n = least(16, u.width - v), at = row * r->hidden + u.column + v;
    store(d->by_h, at, n, 0, load(d->by_h, at, n, 0) + sum_at(r, &u, 0, row, v));
  }
}

INLINE void layer_back(const Run *r, Decoder *d, Moment m, long number, const int f) {
  const long hidden = r->hidden, t = m.t;
  Layer *l = &d->layers[m.layer], *above = m.layer + 1 < r->depth ? l + 1 : NULL;
  Unit u = unit_of(r, number, hidden);
  Term terms[2 * GATES];
  int count = 0;
  if (m.turn)
    for (int g = 0; g < GATES; g++) terms[count++] = (Term){&l->left[g], &l->own[g], 0};
  if (above)
    for (int g = 0; g < GATES; g++) terms[count++] = (Term){&above->left[g], &above->below[g], 1};
  Pieces pieces = {0};
  const long first = t * r->rows + u.row;
  add_pieces(&pieces, l->gates, first * GATES * hidden + u.column, GATES * hidden, GATES, hidden, r->element);
  add_pieces(&pieces, l->cells, first * hidden + u.column, hidden, 1, 0, r->element);
  if (count) sum_up(r, &u, terms, count, pieces);
  EACH_VECTOR(u, row, v) {
    const long n = least(16, u.width - v), unit = u.column + v, state = row * hidden + unit;
    const long at = (t * r->rows + row) * hidden, gates = at * GATES + unit;
    Floats d_h = above ? sum_at(r, &u, 1, row, v) : load(d->by_h, state, n, 0);
    if (above && above->factor) d_h *= load(above->factor, at + unit, n, f);
    if (m.turn) d_h += sum_at(r, &u, 0, row, v);
    Floats x[GATES], d_c = load(l->c, state, n, 0);
    for (int g = 0; g < GATES; g++) x[g] = load(l->gates, gates + g * hidden, n, f);
    Floats old = t ? load(l->cells, at - r->rows * hidden + unit, n, f) : load(l->first_c, state, n, f);
    close_gates(x, old, load(l->cells, at + unit, n, f), d_h, &d_c);
    for (int g = 0; g < GATES; g++) store(l->opened, gates + g * hidden, n, f, x[g]);
    store(l->c, state, n, 0, d_c);
  }
}

/* By the state before the first step. */
INLINE void first_back(const Run *r, Decoder *d, Moment m, long number, const int f) {
  const long each = r->columns * r->groups;
  Layer *l = &d->layers[number / each];
  Unit u = unit_of(r, number % each, r->hidden);
  Term terms[GATES];
  for (int g = 0; g < GATES; g++) terms[g] = (Term){&l->left[g], &l->own[g], 0};
  if (m.turn) sum_up(r, &u, terms, GATES, (Pieces){0});
  EACH_VECTOR(u, row, v) {
    const long n = least(16, u.width - v), at = row * r->hidden + u.column + v;
    store(l->last_h, at, n, f, m.turn ? sum_at(r, &u, 0, row, v) : every(0));
    store(l->last_c, at, n, f, load(l->c, at, n, 0));
  }
}

INLINE void decoder_work(const Run *r, Decoder *d, Moment m, long number, const int f) {
  switch (m.kind) {
  case LAYER:
    (r->back ? layer_back : layer_step)(r, d, m, number, f);
    break;
  case QUERY:
    query_step(r, d, m, number, f);
    break;
  case ATTEND:
    for (long row = number * ATTENDED; row < least(r->rows, (number + 1) * ATTENDED); row++)
      (r->back ? attend_row_back : attend_row)(r, d, m.t, row, f);
    break;
  case OUTER:
    outer_step(r, d, m, number, f);
    break;
  case FEED:
    feed_back(r, d, m, number, f);
    break;
  case READ:
    read_back(r, d, m, number, f);
    break;
  case BY_QUERY:
    query_back(r, d, m, number, f);
    break;
  case FIRST:
    first_back(r, d, m, number, f);
    break;
  default:
    pack_operand(r, d, m, number);
  }
}

static void decoder_unit(long phase, long number, void *run) {
  const Run *r = run;
  Moment m = {0};
  if (phase) m = moment_of(r, phase);
  const long each = decoder_size(phase, r) / r->count;
  Decoder *d = &r->decoders[number / each];
  if (!phase)
    decoder_prepare(r, d, number % each);
  else if (r->is_bfloat16)
    decoder_work(r, d, m, number % each, 1);
  else
    decoder_work(r, d, m, number % each, 0);
}

/* ---- memory ---- */

typedef struct {
  char *memory; /* NULL: only counted */
  size_t used;
} Room;

static void *room_for(Room *room, size_t bytes) {
  char *memory = room->memory ? room->memory + room->used : NULL;
  room->used += (bytes + 63) / 64 * 64;
  return memory;
}

/* A matrix [rows, columns] of weights, `stride` from row to row: products read it from the left, or on the way
   back from the right. */
static Packing weights_in(const Run *r, Room *room, const void *data, long at, long stride, long rows, long columns) {
  Operand o = {.data = data ? (const char *)data + at * r->element : NULL,
               .stride_i = r->back ? stride : 1,
               .stride_k = r->back ? 1 : stride,
               .count_i = r->back ? rows : columns,
               .count_k = r->back ? columns : rows,
               .is_bfloat16 = r->is_bfloat16};
  Packing p = packing_of(o, r->parts, 1);
  p.packed = room_for(room, packed_bytes(&p));
  return p;
}

static Packing left_in(const Run *r, Room *room, const void *data, long stride, long width, int is_bfloat16) {
  Operand o = {.data = data, .stride_i = stride, .stride_k = 1, .count_i = r->rows, .count_k = width,
               .is_bfloat16 = is_bfloat16};
  Packing p = packing_of(o, r->parts, 0);
  p.packed = room_for(room, packed_bytes(&p));
  return p;
}

static size_t lay_out_weights(const Run *r, Decoder *d, char *memory) {
  const long hidden = r->hidden, gates = GATES * hidden;
  Room room = {memory, 0};
  for (long n = 0; n < r->depth; n++) {
    Layer *l = &d->layers[n];
    for (long g = 0; g < GATES; g++) {
      l->own[g] = weights_in(r, &room, l->kernel, g * hidden, gates, hidden, hidden);
      l->below[g] = weights_in(r, &room, l->input, g * hidden, gates, hidden, hidden);
    }
  }
  d->read_context = weights_in(r, &room, d->kernel, 0, hidden, r->memory, hidden);
  d->read_h = weights_in(r, &room, d->kernel, r->memory * hidden, hidden, hidden, hidden);
  if (r->asks) d->by_query = weights_in(r, &room, d->query_kernel, 0, hidden, hidden, hidden);
  return room.used;
}

/* All that a run needs from `memory` on; returns its bytes. Where that is NULL they are only counted. */
static size_t decoder_lay_out(const Run *r, Decoder *d, char *memory) {
  const long hidden = r->hidden, gates = GATES * hidden, state = 4 * r->rows * hidden;
  const int f = r->is_bfloat16;
  Room room = {memory, 0};
  if (d->packed)
    lay_out_weights(r, d, d->packed);
  else
    room.used = lay_out_weights(r, d, memory);
  for (long n = 0; n < r->depth; n++) {
    Layer *l = &d->layers[n];
    l->h = room_for(&room, state), l->c = room_for(&room, state), l->low = room_for(&room, state);
    for (long g = 0; g < (r->back ? GATES : 1); g++)
      l->left[g] = r->back ? left_in(r, &room, NULL, gates, hidden, f) : left_in(r, &room, l->h, hidden, hidden, 0);
    if (!r->back && n + 1 < r->depth && l[1].factor) l->dropped = left_in(r, &room, l->low, hidden, hidden, 0);
  }
  if (r->back) {
    d->outer = left_in(r, &room, NULL, hidden, hidden, f);
    if (r->asks) d->queries = left_in(r, &room, NULL, hidden, hidden, f);
    d->by_h = room_for(&room, state);
  } else {
    d->feed = left_in(r, &room, NULL, hidden, hidden, f);
    d->contexts = left_in(r, &room, NULL, r->memory, r->memory, f);
  }
  return room.used;
}

/* ---- what XLA calls ---- */

static void decode(XLA_FFI_CallFrame *frame, Run *r) {
  if (!r->count || !r->rows) { /* nothing to write */
    free(r->decoders);
    return;
  }
  r->width = right_size(r->parts);
  r->columns = blocks(r->hidden, r->width), r->groups = blocks(r->rows, ROWS_OF_UNIT);
  plan_phases(r);
  int which;
  size_t bytes = decoder_lay_out(r, r->decoders, NULL);
  char *memory = borrow(bytes * r->count, &which);
  for (long n = 0; n < r->count; n++) decoder_lay_out(r, &r->decoders[n], memory + n * bytes);
  const double macs = (double)r->rows * r->hidden * (2.0 * GATES * r->depth * r->hidden + r->memory + r->hidden);
  run_phases(frame, threads_for(frame, 2 * macs * r->turns * r->count, r->parts),
             (Phases){1 + r->turns * r->each + r->back, r->each, decoder_size, decoder_unit, r});
  give_back(memory, which);
  free(r->decoders);
}

/* The next operand or result, one replica's part. */
typedef struct {
  XLA_FFI_CallFrame *frame;
  long replica, replicas;
  int given, made;
} Parts;

static void *next_given(Parts *p) { return part_of(argument(p->frame, p->given++), p->replica, p->replicas); }
static void *next_made(Parts *p) { return part_of(result(p->frame, p->made++), p->replica, p->replicas); }

static Run run_of(XLA_FFI_CallFrame *frame, const XLA_FFI_Buffer *gates, int back) {
  const int64_t *dims = gates->dims + gates->rank - 3;
  const XLA_FFI_Buffer *memory = argument(frame, 2);
  Run r = {.count = 1, .depth = attribute(frame, "layers"), .steps = dims[0], .rows = dims[1],
           .hidden = dims[2] / GATES, .memory = memory->dims[memory->rank - 1],
           .sources = memory->dims[memory->rank - 2], .parts = attribute(frame, "parts"),
           .is_bfloat16 = gates->dtype == XLA_FFI_DataType_BF16, .back = back, .asks = attribute(frame, "asks")};
  r.beams = r.rows ? r.rows / memory->dims[memory->rank - 3] : 1, r.element = r.is_bfloat16 ? 2 : 4;
  for (const int64_t *n = gates->dims; n < dims; n++) r.count *= *n;
  for (long n = 0; n < r.count; n++) {
    const long turns = ((const int32_t *)argument(frame, 0)->data)[n];
    if (r.turns < turns) r.turns = least(turns, r.steps);
  }
  r.decoders = calloc(r.count, sizeof(Decoder));
  return r;
}

/* Operands and results of all handlers are in the order of s2s/kernels/decoder.py. */

static void decoder_forward(XLA_FFI_CallFrame *frame) {
  const int drops = attribute(frame, "drops");
  Run r = run_of(frame, argument(frame, 5), 0);
  for (long n = 0; n < r.count; n++) {
    Decoder *d = &r.decoders[n];
    Parts p = {frame, n, r.count, 1, 0};
    d->lengths = next_given(&p), d->memory = next_given(&p), d->keys = next_given(&p), d->kernel = next_given(&p);
    d->layers->gates = next_given(&p);
    if (r.asks) d->query_kernel = next_given(&p), d->vector = next_given(&p);
    d->attentional = next_made(&p), d->align = next_made(&p), d->context = next_made(&p);
    if (r.asks) d->query = next_made(&p);
    for (long layer = 0; layer < r.depth; layer++) {
      Layer *l = &d->layers[layer];
      l->kernel = next_given(&p), l->input = next_given(&p), l->first_h = next_given(&p), l->first_c = next_given(&p);
      if (layer) l->bias = next_given(&p);
      if (layer && drops) l->factor = next_given(&p);
      l->cells = next_made(&p), l->outputs = next_made(&p), l->opened = next_made(&p);
    }
  }
  decode(frame, &r);
}

/* One step of a search, with weights from `decoder_pack`. */
static void decoder_step(XLA_FFI_CallFrame *frame) {
  Run r = run_of(frame, argument(frame, 5), 0);
  for (long n = 0; n < r.count; n++) {
    Decoder *d = &r.decoders[n];
    Parts p = {frame, n, r.count, 1, 0};
    d->lengths = next_given(&p), d->memory = next_given(&p), d->keys = next_given(&p), d->packed = next_given(&p);
    d->layers->gates = next_given(&p), d->first_feed = next_given(&p);
    if (r.asks) d->vector = next_given(&p);
    d->attentional = next_made(&p), d->align = next_made(&p), d->context = next_made(&p);
    if (r.asks) d->query = next_made(&p);
    for (long layer = 0; layer < r.depth; layer++) {
      Layer *l = &d->layers[layer];
      l->first_h = next_given(&p), l->first_c = next_given(&p);
      if (layer) l->bias = next_given(&p);
      l->cells = next_made(&p), l->outputs = next_made(&p);
    }
  }
  decode(frame, &r);
}

static long matrices_size(long phase, const void *run) {
  const Run *r = run;
  (void)phase;
  return r->count * (prepared_units(r) - r->depth);
}

static void matrices_unit(long phase, long number, void *run) {
  const Run *r = run;
  const long each = matrices_size(phase, run) / r->count;
  decoder_prepare(r, &r->decoders[number / each], number % each);
}

static void decoder_pack(XLA_FFI_CallFrame *frame) {
  const XLA_FFI_Buffer *kernel = argument(frame, 0);
  const int64_t *dims = kernel->dims + kernel->rank - 2;
  Run r = {.count = 1, .depth = attribute(frame, "layers"), .hidden = dims[1], .memory = dims[0] - dims[1],
           .parts = attribute(frame, "parts"), .is_bfloat16 = kernel->dtype == XLA_FFI_DataType_BF16,
           .asks = attribute(frame, "asks")};
  r.element = r.is_bfloat16 ? 2 : 4;
  for (const int64_t *n = kernel->dims; n < dims; n++) r.count *= *n;
  r.decoders = calloc(r.count, sizeof(Decoder));
  for (long n = 0; n < r.count; n++) {
    Decoder *d = &r.decoders[n];
    Parts p = {frame, n, r.count, 0, 0};
    d->kernel = next_given(&p);
    if (r.asks) d->query_kernel = next_given(&p);
    for (long layer = 0; layer < r.depth; layer++)
      d->layers[layer].kernel = next_given(&p), d->layers[layer].input = next_given(&p);
    lay_out_weights(&r, d, next_made(&p));
  }
  if (r.count) run_phases(frame, thread_count(frame), (Phases){1, 1, matrices_size, matrices_unit, &r});
  free(r.decoders);
}

static int64_t decoder_packed_bytes(long hidden, long memory, long layers, int asks, int parts) {
  Decoder d = {0};
  Run r = {.depth = layers, .hidden = hidden, .memory = memory, .parts = parts, .asks = asks};
  return lay_out_weights(&r, &d, NULL);
}

static void decoder_backward(XLA_FFI_CallFrame *frame) {
  const int drops = attribute(frame, "drops"), asks = attribute(frame, "asks");
  Run r = run_of(frame, argument(frame, 9 + 3 * asks + 2), 1);
  for (long n = 0; n < r.count; n++) {
    Decoder *d = &r.decoders[n];
    Parts p = {frame, n, r.count, 1, 0};
    d->lengths = next_given(&p), d->memory = next_given(&p), d->keys = next_given(&p), d->kernel = next_given(&p);
    d->d_attentional = next_given(&p), d->d_align = next_given(&p);
    d->attentional = next_given(&p), d->align = next_given(&p);
    if (asks) d->query_kernel = next_given(&p), d->vector = next_given(&p), d->query = next_given(&p);
    d->d_outer = next_made(&p), d->d_context = next_made(&p), d->d_scores = next_made(&p);
    if (asks) {
      d->d_query = next_made(&p), d->d_keys = next_made(&p), d->d_vector = next_made(&p);
      memset(d->d_keys, 0, 4 * r.rows * r.sources * r.hidden), memset(d->d_vector, 0, 4 * r.rows * r.hidden);
    }
    for (long layer = 0; layer < r.depth; layer++) {
      Layer *l = &d->layers[layer];
      l->kernel = next_given(&p), l->input = next_given(&p), l->gates = next_given(&p), l->cells = next_given(&p);
      l->first_c = next_given(&p);
      if (layer && drops) l->factor = next_given(&p);
      l->opened = next_made(&p), l->last_h = next_made(&p), l->last_c = next_made(&p);
    }
  }
  decode(frame, &r);
}

#endif
