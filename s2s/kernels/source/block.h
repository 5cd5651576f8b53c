/* Blocks of a product: how operands are laid out, and the innermost loops.

   Three ways to multiply float32. On the matrix unit of a processor with AMX, in fixed point
   (digits.h), or as bfloat16, which it multiplies into float32: a float32 is the sum of three bfloat16
   (8 bits of significand each, 24 together), and of the nine products of parts the six largest are
   summed; what is left out is below 2^-24 of the product. This is what a TPU does for float32 at its
   highest precision (Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for
   higher-precision computations"). Two parts and three products leave 2^-16. And with fused
   multiply-adds of vectors, everywhere else. */

#ifndef S2S_BLOCK_H
#define S2S_BLOCK_H

#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define WITH_AMX 1
#endif

/* An operand: element (i, k) of "rows i, summed over k". One of the strides is 1. */
typedef struct {
  const void *data;
  long stride_i, stride_k;
  long count_i, count_k;
  int is_bfloat16;
} Operand;

static long least(long a, long b) { return a < b ? a : b; }
static long blocks(long count, long size) { return (count + size - 1) / size; }

/* What a unit of work will read next, which a block fetches into the second cache little by little
   while it multiplies: the third cache is too far away to wait for. */
typedef struct {
  const char *left, *right;
  long left_lines, right_lines; /* at a time */
} Ahead;

static inline void fetch(Ahead *ahead) {
  for (long i = 0; i < ahead->left_lines; i++, ahead->left += 64) __builtin_prefetch(ahead->left, 0, 2);
  for (long i = 0; i < ahead->right_lines; i++, ahead->right += 64) __builtin_prefetch(ahead->right, 0, 2);
}

/* ---- fused multiply-adds ------------------------------------------------------------------- */

#if defined(__AVX512F__)
#define LANES 16
#define FMA_ROWS 8
#elif defined(__AVX__)
#define LANES 8
#define FMA_ROWS 4
#else
#define LANES 4
#define FMA_ROWS 8
#endif
#define FMA_COLUMNS (3 * LANES)
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

/* [count_k, size]: element (i, k) at k * size + i, zeros beyond the operand. */
static void fma_pack(float *to, const Operand *x, long i0, long k0, long count_k, long size) {
  long count_i = least(size, x->count_i - i0);
  const float *from = (const float *)x->data + i0 * x->stride_i + k0 * x->stride_k;
  for (long k = 0; k < count_k; k++)
    for (long i = count_i; i < size; i++) to[k * size + i] = 0;
  if (x->stride_i == 1)
    for (long k = 0; k < count_k; k++) memcpy(to + k * size, from + k * x->stride_k, 4 * count_i);
  else /* a line of memory at a time: rows may lie so that they drive each other out of the first cache */
    for (long line = 0; line < count_k; line += 16)
      for (long i = 0; i < count_i; i++)
        for (long k = line; k < least(line + 16, count_k); k++) to[k * size + i] = from[i * x->stride_i + k];
}

/* Adds to FMA_ROWS x FMA_COLUMNS sums, or begins them. */
static void fma_block(const float *a, const float *b, long count_k, float *c, int first) {
  Vector sum[FMA_ROWS][3];
#pragma GCC unroll 8
  for (int r = 0; r < FMA_ROWS; r++)
#pragma GCC unroll 3
    for (int v = 0; v < 3; v++)
      sum[r][v] = first ? (Vector){0} : *(const Vector *)(c + r * FMA_COLUMNS + v * LANES);
  for (long k = 0; k < count_k; k++, a += FMA_ROWS, b += FMA_COLUMNS) {
    Vector b0 = *(const Vector *)b, b1 = *(const Vector *)(b + LANES),
           b2 = *(const Vector *)(b + 2 * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < FMA_ROWS; r++) {
      sum[r][0] += a[r] * b0;
      sum[r][1] += a[r] * b1;
      sum[r][2] += a[r] * b2;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < FMA_ROWS; r++)
#pragma GCC unroll 3
    for (int v = 0; v < 3; v++) *(Vector *)(c + r * FMA_COLUMNS + v * LANES) = sum[r][v];
}

/* ---- AMX ------------------------------------------------------------------------------------ */

#ifdef WITH_AMX

/* Two tiles side by side: 32 rows or columns, 32 positions of the sum. A tile is 1,024 bytes. */
#define TILE 512 /* bfloat16 */

static void transpose_16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

/* The next part of x: rounded to bfloat16 and taken away. */
static inline __m256i next_part(__m512 *x) {
  __m256i part = (__m256i)_mm512_cvtneps_pbh(*x);
  *x = _mm512_sub_ps(*x, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
  return part;
}

static inline __m512i joined(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* Too many rows of memory are read at a time for the processor to see where each of them goes on. */
#define FLOATS_AHEAD 128

/* 16 rows i, 32 positions k of an operand as `parts` tiles, TILE * 2 apart. A tile of the left
   operand holds a row i in each of its rows, 32 positions k; of the right operand (`paired`), two
   positions k in each of its rows, for 16 columns i. */
static void amx_pack_tile(uint16_t *to, const Operand *x, long i0, long k0, int parts, int paired) {
  long count_i = least(16, x->count_i - i0), count_k = least(32, x->count_k - k0);
  __m512i rows[3][16];
  if (count_i <= 0) {
    for (int p = 0; p < parts; p++) memset(to + p * 2 * TILE, 0, 2 * TILE);
    return;
  }
  int along_k = x->stride_k == 1;
  if (x->is_bfloat16) {
    const uint16_t *from = (const uint16_t *)x->data + i0 * x->stride_i + k0 * x->stride_k;
    for (int r = 0; r < 16; r++) {
      if (along_k) {
        __mmask32 mask = r < count_i ? (__mmask32)((1ull << count_k) - 1) : 0;
        rows[0][r] = _mm512_maskz_loadu_epi16(mask, from + r * x->stride_i);
      } else {
        __mmask16 mask = (__mmask16)((1u << count_i) - 1);
        __m256i even = _mm256_maskz_loadu_epi16(2 * r < count_k ? mask : 0, from + 2 * r * x->stride_k);
        __m256i odd = _mm256_maskz_loadu_epi16(2 * r + 1 < count_k ? mask : 0,
                                               from + (2 * r + 1) * x->stride_k);
        rows[0][r] = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                     _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      }
    }
  } else {
    const float *from = (const float *)x->data + i0 * x->stride_i + k0 * x->stride_k;
    for (int r = 0; r < 16; r++) {
      __m512 a, b;
      if (along_k) {
        uint32_t mask = r < count_i ? (uint32_t)((1ull << count_k) - 1) : 0;
        __builtin_prefetch(from + r * x->stride_i + FLOATS_AHEAD);
        __builtin_prefetch(from + r * x->stride_i + FLOATS_AHEAD + 16);
        a = _mm512_maskz_loadu_ps((__mmask16)mask, from + r * x->stride_i);
        b = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), from + r * x->stride_i + 16);
      } else {
        __mmask16 mask = (__mmask16)((1u << count_i) - 1);
        __builtin_prefetch(from + 2 * r * x->stride_k + FLOATS_AHEAD);
        __builtin_prefetch(from + (2 * r + 1) * x->stride_k + FLOATS_AHEAD);
        a = _mm512_maskz_loadu_ps(2 * r < count_k ? mask : 0, from + 2 * r * x->stride_k);
        b = _mm512_maskz_loadu_ps(2 * r + 1 < count_k ? mask : 0, from + (2 * r + 1) * x->stride_k);
      }
      for (int p = 0; p < parts; p++) {
        __m256i low = next_part(&a), high = next_part(&b);
        rows[p][r] = along_k ? joined(low, high)
                             : _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                               _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      }
    }
  }
  for (int p = 0; p < parts; p++) {
    if (along_k == paired) transpose_16(rows[p]);
    for (int r = 0; r < 16; r++) _mm512_store_si512(to + p * 2 * TILE + r * 32, rows[p][r]);
  }
}

#define LEFT(part)                              \
  _tile_loadd(4, a + (part) * 2 * TILE, 64);    \
  _tile_loadd(5, a + (part) * 2 * TILE + TILE, 64);
#define RIGHT(part)                             \
  _tile_loadd(6, b + (part) * 2 * TILE, 64);    \
  _tile_loadd(7, b + (part) * 2 * TILE + TILE, 64);
#define MULTIPLY           \
  fetch(&ahead);           \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7);

/* Adds to 32 x 32 sums, which lie as four tiles, those of `depths` * 32 positions; or begins them. */
static inline void amx_block(const uint16_t *a, const uint16_t *b, long depths, int parts, float *c,
                             int first, Ahead ahead) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + 256, 64);
    _tile_loadd(2, c + 512, 64);
    _tile_loadd(3, c + 768, 64);
  }
  /* Each order of parts loads a tile as seldom as eight registers allow. */
  if (parts == 3)
    for (long k = 0; k < depths; k++, a += 6 * TILE, b += 6 * TILE) {
      LEFT(0) RIGHT(0) MULTIPLY RIGHT(1) MULTIPLY RIGHT(2) MULTIPLY
      LEFT(1) RIGHT(1) MULTIPLY RIGHT(0) MULTIPLY LEFT(2) MULTIPLY
    }
  else if (parts == 2)
    for (long k = 0; k < depths; k++, a += 4 * TILE, b += 4 * TILE) {
      LEFT(0) RIGHT(1) MULTIPLY RIGHT(0) MULTIPLY LEFT(1) MULTIPLY
    }
  else
    for (long k = 0; k < depths; k++, a += 2 * TILE, b += 2 * TILE) {
      LEFT(0) RIGHT(0) MULTIPLY
    }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
}

/* Constant: GCC 12 believes that only its first eight bytes are read, and leaves out what writes the rest. */
static const struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} eight_tiles = {.palette = 1,
                 .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
                 .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

static void amx_enter(void) { _tile_loadconfig(&eight_tiles); }

static void amx_leave(void) { _tile_release(); }

#endif

#include "digits.h"

/* Whether this process may use the matrix unit; the kernel is asked for leave. */
static int amx_allowed(void) {
#ifdef WITH_AMX
  const long request = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return 0;
#endif
}

/* ---- either ----------------------------------------------------------------------------------
   An operand is packed as [depths, panels of rows or columns], so that what one block after the other
   reads lies in a row. A panel of one depth is small enough to stay in a core's first cache while the
   other operand's panels pass. */

/* Ways to multiply, "parts" for short: bfloat16 in so many parts, or */
enum { VECTORS = 0, DIGITS = 4 };

/* Positions of a depth. */
static long depth_of(int parts) { return parts == DIGITS ? DIGITS_DEPTH : 128; }
static long left_size(int parts) { return parts ? 32 : FMA_ROWS; }
static long right_size(int parts) { return parts ? 32 : FMA_COLUMNS; }

/* Of one depth. */
static long panel_bytes(long size, int parts) {
  if (parts == DIGITS) return DIGITS_DEPTH * size * DIGITS_EACH + size * 4;
  return parts ? depth_of(parts) * size * 2 * parts : depth_of(parts) * size * 4;
}

typedef struct {
  Operand operand;
  char *packed;
  long size, panels, depth, depths;
  long panels_each, depths_each; /* packed by one unit of work */
  int parts, right;
} Packing;

#define MOST_PANELS_EACH 8 /* where they are measured */

static Packing packing_of(Operand operand, int parts, int right) {
  Packing p = {.operand = operand, .parts = parts, .right = right, .depth = depth_of(parts)};
  p.size = right ? right_size(parts) : left_size(parts);
  p.panels = blocks(operand.count_i, p.size), p.depths = blocks(operand.count_k, p.depth);
  /* A unit reads runs of memory as long as a page, whichever axis they lie along; where it reads them twice,
     only what its cache holds. */
  p.panels_each = operand.stride_k == 1 ? 1 : parts == DIGITS ? MOST_PANELS_EACH : 1024 / p.size;
  p.depths_each = operand.stride_k == 1 && parts != DIGITS ? 1024 / p.depth : 1;
  return p;
}

static size_t packed_bytes(const Packing *p) { return p->panels * p->depths * panel_bytes(p->size, p->parts); }
static long packing_units(const Packing *p) {
  return blocks(p->panels, p->panels_each) * blocks(p->depths, p->depths_each);
}

static char *panel_of(const Packing *p, long depth, long panel) {
  return p->packed + (depth * p->panels + panel) * panel_bytes(p->size, p->parts);
}

/* Panels [first, last) over positions [k, k + count) of one depth; where parts are bfloat16, 32 at most. */
static void pack_panels(const Packing *p, long first, long last, long k, long count) {
  const Operand *x = &p->operand;
#ifdef WITH_AMX
  int32_t most[32 * MOST_PANELS_EACH];
  if (p->parts == DIGITS) digits_most(most, x, first * 32, (last - first) * 32, k, count);
#endif
  for (long panel = first; panel < last; panel++) {
    char *to = panel_of(p, k / p->depth, panel);
#ifdef WITH_AMX
    if (p->parts == DIGITS) {
      digits_pack(to, x, panel * 32, k, count, most + 32 * (panel - first), p->right);
      continue;
    }
    if (p->parts) {
      uint16_t *tile = (uint16_t *)to + k % p->depth / 32 * p->parts * 2 * TILE;
      for (int half = 0; half < 2; half++)
        amx_pack_tile(tile + half * TILE, x, panel * 32 + 16 * half, k, p->parts, p->right);
      continue;
    }
#endif
    fma_pack((float *)to + k % p->depth * p->size, x, panel * p->size, k, count, p->size);
  }
}

static void pack_unit(const Packing *p, long number) {
  const long groups = blocks(p->panels, p->panels_each);
  const long step = p->parts == VECTORS || p->parts == DIGITS ? p->depth : 32;
  long first = number % groups * p->panels_each, last = least(first + p->panels_each, p->panels);
  long depth0 = number / groups * p->depths_each, depth1 = least(depth0 + p->depths_each, p->depths);
  long end = least(depth1 * p->depth, p->operand.count_k);
  for (long k = depth0 * p->depth; k < end; k += step) pack_panels(p, first, last, k, least(step, end - k));
}

/* Adds to one block of sums, or begins it. */
static inline void add_block(const char *a, const char *b, long count_k, int parts, float *c, int first,
                             Ahead ahead) {
#ifdef WITH_AMX
  if (parts == DIGITS) {
    digits_block(a, b, blocks(count_k, 64), c, first, ahead);
    return;
  }
  if (parts) {
    amx_block((const uint16_t *)a, (const uint16_t *)b, blocks(count_k, 32), parts, c, first, ahead);
    return;
  }
#endif
  (void)parts;
  fetch(&ahead);
  fma_block((const float *)a, (const float *)b, count_k, c, first);
}

/* Where the sums of a row of a block begin, so many columns after the first. */
static inline const float *sums_at(const float *c, long row, long column, int parts) {
  if (parts) return c + (row / 16 * 2 + column / 16) * 256 + row % 16 * 16 + column % 16;
  return c + row * FMA_COLUMNS + column;
}

static long run_of_sums(int parts) { return parts ? 16 : FMA_COLUMNS; }

static void enter(int parts) {
#ifdef WITH_AMX
  if (parts) amx_enter();
#endif
  (void)parts;
}

/* Times that a block of so many positions calls `fetch`. */
static long fetches(long depth, int parts) {
  if (parts == DIGITS) return blocks(depth, 64) * 4;
  return parts ? depth / 32 * parts * (parts + 1) / 2 : 1;
}

static void leave(int parts) {
#ifdef WITH_AMX
  if (parts) amx_leave();
#endif
  (void)parts;
}

#endif
