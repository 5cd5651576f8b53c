/* Sixteen numbers at a time: logistic function and hyperbolic tangent.

   Polynomials are least in their greatest relative error on the interval named (fitted in double
   precision by reweighted least squares); both functions err by less than 3 units in the last place. */

#ifndef S2S_ACTIVATIONS_H
#define S2S_ACTIVATIONS_H

#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

/* Vectors wider than the processor's own are passed in memory; here they are never passed. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE Floats every(float x) { return (Floats){0} + x; }

#ifdef __AVX512F__
INLINE Floats least_of(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE Floats greatest_of(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE float greatest_in(Floats x) { return _mm512_reduce_max_ps((__m512)x); }
/* yes where a < b, else no */
INLINE Floats if_less(Floats a, Floats b, Floats yes, Floats no) {
  return (Floats)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ), (__m512)no, (__m512)yes);
}
/* Of 1 to 2^126: 14 bits, and twice as many by a step of Newton's. */
INLINE Floats reciprocal(Floats x) {
  Floats y = (Floats)_mm512_rcp14_ps((__m512)x);
  return y * (2 - x * y);
}
#else
INLINE Floats if_less(Floats a, Floats b, Floats yes, Floats no) {
  Ints mask = a < b;
  return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}
/* The second where one is no number, as the processor does it. */
INLINE Floats least_of(Floats a, Floats b) { return if_less(a, b, a, b); }
INLINE Floats greatest_of(Floats a, Floats b) { return if_less(b, a, a, b); }
INLINE float greatest_in(Floats x) {
  float found = x[0];
  for (int i = 1; i < 16; i++) found = x[i] > found ? x[i] : found;
  return found;
}
INLINE Floats reciprocal(Floats x) { return 1 / x; }
#endif

/* e^x, relative error below 3e-7; beyond +-87.3 as there, which is no matter to what follows. */
INLINE Floats exponential(Floats x) {
  const float round = 12582912; /* 1.5 * 2^23: what is added to it loses its fraction */
  x = greatest_of(every(-87.3f), least_of(every(87.3f), x));
  Floats shifted = x * 1.44269504f + round;
  Floats n = shifted - round;
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts; |r| <= 0.35 */
  Floats p = r * 1.3813144760206342e-3f + 8.369418792426586e-3f;
  p = p * r + 4.166845604777336e-2f;
  p = p * r + 0.16666515171527863f;
  p = p * r + 0.49999994039535522f;
  p = p * r * r + r + 1;
  return p * (Floats)(((Ints)shifted << 23) + (127 << 23));
}

INLINE Floats logistic(Floats x) { return reciprocal(1 + exponential(-x)); }

INLINE Floats hyperbolic_tangent(Floats x) {
  const Ints sign_bit = (Ints){0} + (int32_t)0x80000000;
  Floats size = (Floats)((Ints)x & ~sign_bit), square = x * x;
  /* |x| < 0.625, where the other way loses digits */
  Floats p = square * -5.704985465854406e-3f + 2.063908614218235e-2f;
  p = p * square - 5.373971536755562e-2f;
  p = p * square + 0.13331441581249237f;
  p = p * square - 0.3333328068256378f;
  Floats small = x + x * square * p;
  Floats large = 1 - 2 * reciprocal(exponential(2 * size) + 1);
  /* Also of -0, which the sum has made 0. */
  return (Floats)((Ints)if_less(size, every(0.625f), small, large) | ((Ints)x & sign_bit));
}

/* Up to 16 numbers of an array of float32, or of bfloat16; zeros beyond. */
INLINE Floats load(const void *from, long at, long count, int is_bfloat16) {
  if (is_bfloat16) {
    const uint16_t *first = (const uint16_t *)from + at;
    Halves halves = {0};
    if (count == 16)
      halves = *(const Halves *)first;
    else
      memcpy(&halves, first, 2 * count);
    return (Floats)(__builtin_convertvector(halves, Ints) << 16);
  }
  const float *first = (const float *)from + at;
  if (count == 16) return *(const Floats *)first;
  Floats x = {0};
  memcpy(&x, first, 4 * count);
  return x;
}

INLINE void store(void *to, long at, long count, int is_bfloat16, Floats x) {
  if (is_bfloat16) {
    Ints bits = (Ints)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    /* A number that is none stays none. */
    Ints unknown = x != x;
    rounded = (unknown & (bits | 0x400000)) | (~unknown & rounded);
    Halves halves = __builtin_convertvector(rounded >> 16, Halves);
    uint16_t *first = (uint16_t *)to + at;
    if (count == 16)
      *(Halves *)first = halves;
    else
      memcpy(first, &halves, 2 * count);
    return;
  }
  float *first = (float *)to + at;
  if (count == 16)
    *(Floats *)first = x;
  else
    memcpy(first, &x, 4 * count);
}

#endif
