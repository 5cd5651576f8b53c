/* Products of float32 in fixed point on the matrix unit.

   A row of an operand is measured by a power of two of its own and rounded to 24 bits, three signed
   digits of eight. The unit multiplies digits twice as fast as bfloat16 and adds them up in integers,
   without any error. Of the nine products of digits the six largest are summed; what is left out, and
   what rounding took, is at each position less than 2^-20 of the largest in the row times the largest
   in the column, and of either sign (Ozaki, Ogita, Oishi, Rump 2012, "Error-free transformations of
   matrix multiplication by using fast routines of matrix multiplication"; with integers: Ootomo, Ozaki,
   Yokota 2024, "DGEMM on integer matrix multiplication unit"). So a number far below the largest of its
   row loses digits, as it would in a sum with it. */

#ifndef S2S_DIGITS_H
#define S2S_DIGITS_H

#define DIGIT_TILE 1024 /* bytes: 16 rows of 64 positions */
#define DIGITS_EACH 3

/* Positions that a row is measured over. */
#define DIGITS_DEPTH 256

#ifdef WITH_AMX

/* Where the tiles of 16 rows of a panel end and the others' begin, and where all tiles end. */
#define DIGITS_HALF (DIGITS_DEPTH / 64 * DIGITS_EACH * DIGIT_TILE)
#define DIGITS_UNITS (2 * DIGITS_HALF)

/* The largest |x| of rows [i0, i0 + count_i) over positions [k0, k0 + count_k), as bits; 0 for rows beyond
   the operand. */
static void digits_most(int32_t *most, const Operand *x, long i0, long count_i, long k0, long count_k) {
  const __m512i sign = _mm512_set1_epi32(0x7fffffff);
  const float *from = (const float *)x->data + i0 * x->stride_i + k0 * x->stride_k;
  for (long i = 0; i < count_i; i += 16) _mm512_storeu_si512(most + i, _mm512_setzero_si512());
  count_i = least(count_i, x->count_i - i0);
  if (x->stride_k == 1) {
    for (long i = 0; i < count_i; i++, from += x->stride_i) {
      __m512i found = _mm512_setzero_si512();
      for (long k = 0; k < count_k; k += 16) {
        __mmask16 mask = count_k - k < 16 ? (__mmask16)((1u << (count_k - k)) - 1) : (__mmask16)-1;
        __builtin_prefetch(from + x->stride_i + k);
        found = _mm512_max_epi32(found, _mm512_and_si512(sign, _mm512_maskz_loadu_epi32(mask, from + k)));
      }
      most[i] = _mm512_reduce_max_epi32(found);
    }
    return;
  }
  for (long k = 0; k < count_k; k++, from += x->stride_k)
    for (long i = 0; i < count_i; i += 16) {
      __mmask16 mask = count_i - i < 16 ? (__mmask16)((1u << (count_i - i)) - 1) : (__mmask16)-1;
      __builtin_prefetch(from + 4 * x->stride_k + i);
      __m512i found = _mm512_and_si512(sign, _mm512_maskz_loadu_epi32(mask, from + i));
      _mm512_storeu_si512(most + i, _mm512_max_epi32(found, _mm512_loadu_si512(most + i)));
    }
}

/* Times which power of two the largest of each row, given as bits, has digits that fit, and what a unit of
   the result is, as a power of two. A row with infinities or NaN has no finite products. */
static inline void digits_measure(const int32_t *most, float *scales, float *units) {
  const __m512i bits = _mm512_loadu_si512(most), one = _mm512_set1_epi32(1);
  /* The scaled significand rounds to at most 127 * 256^2 + 127 * 256 + 127. */
  const __m512i significand = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffff));
  const __mmask16 fits = _mm512_cmplt_epi32_mask(significand, _mm512_set1_epi32(2 * 8355711 + 1 - 0x800000));
  __m512i power = _mm512_sub_epi32(_mm512_set1_epi32(127 + 21), _mm512_srli_epi32(bits, 23));
  power = _mm512_min_epi32(_mm512_mask_add_epi32(power, fits, power, one), _mm512_set1_epi32(126));
  _mm512_storeu_si512(scales, _mm512_slli_epi32(_mm512_add_epi32(power, _mm512_set1_epi32(127)), 23));
  /* The least of the six products counts 256^2, of which each operand gives half. */
  const __m512 unit = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_set1_epi32(8), power));
  const __mmask16 wrong = _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
  _mm512_storeu_ps(units, _mm512_mask_blend_ps(wrong, unit, _mm512_set1_ps(__builtin_nanf(""))));
}

/* x * scale as three digits in the bytes of a word: the sum of digits that are 128 too large each is one
   of plain bytes. */
static inline __m512i digits_of(__m512 x, __m512 scale) {
  const __m512i halves = _mm512_set1_epi32(0x808080);
  return _mm512_xor_si512(halves, _mm512_add_epi32(halves, _mm512_cvtps_epi32(_mm512_mul_ps(x, scale))));
}

/* 16 rows i, 64 positions k of an operand as three tiles, the highest digits first. A tile of the left
   operand holds a row i in each of its rows; of the right operand (`paired`), four positions k in each of
   its rows, for 16 columns i. */
static void digits_pack_tile(char *to, const Operand *x, long i0, long k0, const float *scales, int paired) {
  const long count_i = least(16, x->count_i - i0), count_k = least(64, x->count_k - k0);
  const float *from = (const float *)x->data + i0 * x->stride_i + k0 * x->stride_k;
  const int along_k = x->stride_k == 1;
  __m512i rows[3][16], y[4];
  const __m512 units = _mm512_loadu_ps(scales);
  const __mmask16 mask_i = (__mmask16)((1u << count_i) - 1);
  const uint64_t mask_k = count_k < 64 ? (1ull << count_k) - 1 : -1ull;
  const __m512i by_digit = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int r = 0; r < 16; r++)
    if (along_k) {
      const uint64_t mask = r < count_i ? mask_k : 0;
      for (int v = 0; v < 4; v++) {
        __m512 values = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16 * v), from + r * x->stride_i + 16 * v);
        y[v] = _mm512_shuffle_epi8(digits_of(values, _mm512_set1_ps(scales[r])), by_digit);
      }
      /* Four positions of a digit are a word now, of four words a vector has one of each digit. */
      for (int d = 0; d < 3; d++) {
        const __m512i at = _mm512_setr_epi32(d, d + 4, d + 8, d + 12, d + 16, d + 20, d + 24, d + 28, 0, 0, 0, 0, 0, 0, 0, 0);
        __m512i low = _mm512_permutex2var_epi32(y[0], at, y[1]), high = _mm512_permutex2var_epi32(y[2], at, y[3]);
        rows[2 - d][r] = _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
      }
    } else {
      for (int v = 0; v < 4; v++) {
        const long k = 4 * r + v;
        y[v] = digits_of(_mm512_maskz_loadu_ps(k < count_k ? mask_i : 0, from + k * x->stride_k), units);
      }
      const __mmask64 odd = 0xaaaaaaaaaaaaaaaaull;
      const __mmask32 high = 0xaaaaaaaau;
      /* Bytes 0 and 2, and bytes 1 and 3, of two positions; then words of four positions. */
      __m512i a = _mm512_mask_blend_epi8(odd, y[0], _mm512_slli_epi32(y[1], 8));
      __m512i b = _mm512_mask_blend_epi8(odd, _mm512_srli_epi32(y[0], 8), y[1]);
      __m512i c = _mm512_mask_blend_epi8(odd, y[2], _mm512_slli_epi32(y[3], 8));
      __m512i e = _mm512_mask_blend_epi8(odd, _mm512_srli_epi32(y[2], 8), y[3]);
      rows[2][r] = _mm512_mask_blend_epi16(high, a, _mm512_slli_epi32(c, 16));
      rows[1][r] = _mm512_mask_blend_epi16(high, b, _mm512_slli_epi32(e, 16));
      rows[0][r] = _mm512_mask_blend_epi16(high, _mm512_srli_epi32(a, 16), c);
    }
  for (int d = 0; d < 3; d++) {
    if (along_k == paired) transpose_16(rows[d]);
    for (int r = 0; r < 16; r++) _mm512_store_si512(to + d * DIGIT_TILE + r * 64, rows[d][r]);
  }
}

/* A panel of 32 rows over the positions of one depth. most: of its rows. */
static void digits_pack(char *to, const Operand *x, long i0, long k0, long count_k, const int32_t *most, int paired) {
  float *units = (float *)(to + DIGITS_UNITS), scales[32];
  digits_measure(most, scales, units);
  digits_measure(most + 16, scales + 16, units + 16);
  for (long half = 0; half < 2; half++)
    for (long k = 0; k < count_k; k += 64) {
      char *tiles = to + half * DIGITS_HALF + k / 64 * DIGITS_EACH * DIGIT_TILE;
      if (i0 + 16 * half < x->count_i)
        digits_pack_tile(tiles, x, i0 + 16 * half, k0 + k, scales + 16 * half, paired);
      else
        memset(tiles, 0, DIGITS_EACH * DIGIT_TILE);
    }
}

/* Sums of a tile that wait to be made float32: three of integers, each 256 times the next. */
typedef struct {
  const int32_t *sums;
  const float *row_units, *column_units; /* in powers of two */
  float *c;
} Counted;

static inline void digits_out(const Counted *n, int first, int row) {
  const __m512 base = _mm512_set1_ps(256);
  __m512 x = _mm512_cvtepi32_ps(_mm512_load_si512(n->sums + 16 * row));
  x = _mm512_fmadd_ps(x, base, _mm512_cvtepi32_ps(_mm512_load_si512(n->sums + 256 + 16 * row)));
  x = _mm512_fmadd_ps(x, base, _mm512_cvtepi32_ps(_mm512_load_si512(n->sums + 512 + 16 * row)));
  x = _mm512_scalef_ps(x, _mm512_add_ps(_mm512_set1_ps(n->row_units[row]), _mm512_loadu_ps(n->column_units)));
  __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(n->c + 16 * row);
  _mm512_store_ps(n->c + 16 * row, _mm512_add_ps(x, before));
}

/* Adds to 32 x 32 sums, which lie as four tiles, those of `depths` * 64 positions; or begins them. */
static inline void digits_block(const char *a, const char *b, long depths, float *c, int first, Ahead ahead) {
  int32_t sums[2][3 * 256] __attribute__((aligned(64)));
  Counted before = {0};
  for (int tile = 0; tile < 4; tile++) {
    /* Each tile has half of its operands in common with the one before. */
    const int right = tile / 2, down = (tile ^ right) & 1;
    const char *left_tiles = a + down * DIGITS_HALF, *right_tiles = b + right * DIGITS_HALF;
    int row = 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    /* The last tile's sums are made float32 while this one's add up. */
    for (long k = 0; k < depths; k++, left_tiles += 3 * DIGIT_TILE, right_tiles += 3 * DIGIT_TILE) {
      _tile_loadd(3, left_tiles, 64);
      _tile_loadd(5, right_tiles, 64);
      _tile_dpbssd(0, 3, 5);
      _tile_loadd(6, right_tiles + DIGIT_TILE, 64);
      _tile_dpbssd(1, 3, 6);
      _tile_loadd(4, left_tiles + DIGIT_TILE, 64);
      _tile_dpbssd(2, 4, 6);
      for (int end = row + 2; before.c && row < 16 && row < end; row++) digits_out(&before, first, row);
      fetch(&ahead);
      _tile_loadd(7, right_tiles + 2 * DIGIT_TILE, 64);
      _tile_dpbssd(2, 3, 7);
      _tile_dpbssd(1, 4, 5);
      for (int end = row + 2; before.c && row < 16 && row < end; row++) digits_out(&before, first, row);
      _tile_loadd(3, left_tiles + 2 * DIGIT_TILE, 64);
      _tile_dpbssd(2, 3, 5);
    }
    for (; before.c && row < 16; row++) digits_out(&before, first, row);
    before = (Counted){sums[tile % 2], (const float *)(a + DIGITS_UNITS) + 16 * down,
                       (const float *)(b + DIGITS_UNITS) + 16 * right, c + (2 * down + right) * 256};
    _tile_stored(0, sums[tile % 2], 64);
    _tile_stored(1, sums[tile % 2] + 256, 64);
    _tile_stored(2, sums[tile % 2] + 512, 64);
  }
  for (int row = 0; row < 16; row++) digits_out(&before, first, row);
}

#endif
#endif
