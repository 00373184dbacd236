// Vectors of floats as wide as the CPU's, and what is computed with them one number at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
typedef double Doubles __attribute__((vector_size(8 * WIDTH), aligned(8), may_alias));

struct bf16 {
  uint16_t bits;
};

static inline Floats load(const float* from) { return *(const Floats*)from; }
static inline Floats load(const bf16* from) {
  return (Floats)(__builtin_convertvector(*(const Halves*)from, Ints) << 16);
}
static inline void store(float* to, Floats x) { *(Floats*)to = x; }
static inline void store(bf16* to, Floats x) {  // to the nearest, ties to even; the instruction takes 2^-127 for 0
#ifdef __AVX512BF16__
  *(Halves*)to = (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  Ints bits = (Ints)x;
  *(Halves*)to = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
#endif
}
static inline float number(float x) { return x; }
static inline float number(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
static inline void store_one(float* to, float x) { *to = x; }
static inline void store_one(bf16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
// NaN where b is
static inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats minimum(Floats a, Floats b) { return a < b ? a : b; }

// Each number in the place of the one that is BY from it.
template <int BY> static inline Floats exchanged(Floats x) {
#ifdef __clang__
  Floats result;
  for (int n = 0; n < WIDTH; n++) result[n] = x[n ^ BY];
  return result;
#else
  Ints places;
  for (int n = 0; n < WIDTH; n++) places[n] = n ^ BY;
  return __builtin_shuffle(x, places);
#endif
}
template <int HALF = WIDTH / 2> static inline float highest(Floats x) {
  if constexpr (HALF == 0)
    return x[0];
  else
    return highest<HALF / 2>(maximum(x, exchanged<HALF>(x)));
}

// Of the polynomials of 2^x between -1/2 and 1/2 with the least relative error: 7.5e-5, and 1.6e-8, which rounding in
// float32 makes 8e-8.
template <int DEGREE> constexpr float TERMS[DEGREE + 1] = {};
template <> constexpr float TERMS<3>[] = {0.99992806f, 0.69326097f, 0.24261113f, 0.05517167f};
template <>
constexpr float TERMS<6>[] = {1.f,           0.6931472f,  0.24022646f,  0.055503286f,
                              0.009618489f, 0.0013399931f, 1.5345812e-4f};

// 2^x, by the one around the nearest whole number; what is below 2^-126, and -infinity, is 2^-126 to its error.
template <int DEGREE> static inline Floats exp2(Floats x) {
  static_assert(TERMS<DEGREE>[0] > 0);
  constexpr float magic = 12582912.f;  // 1.5 * 2^23: floats this large have no fractions
  float least = -126.f;
  asm("" : "+x"(least));  // of a maximum with a constant GCC makes a comparison and a choice
  x = maximum(Floats{} + least, x);
  Floats whole = x + magic, fraction = x - (whole - magic), sum = Floats{} + TERMS<DEGREE>[DEGREE];
  for (int n = DEGREE - 1; n >= 0; n--) sum = sum * fraction + TERMS<DEGREE>[n];
  return (Floats)((Ints)sum + ((Ints)whole << 23));
}

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
