// Vectors of floats as wide as the CPU's, and what is computed with them one number at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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
static inline void store(bf16* to, Floats x) {  // to the nearest, ties to even
  Ints bits = (Ints)x;
  *(Halves*)to = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
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

// 2^x by Taylor's series around the nearest whole number; what is below 2^-126, and -infinity, is 2^-126.
template <int DEGREE> static inline Floats exp2(Floats x) {
  constexpr float terms[] = {1.f,           6.9314718e-1f, 2.4022651e-1f, 5.5504109e-2f,
                             9.6181291e-3f, 1.3333558e-3f, 1.5403530e-4f, 1.5252734e-5f};
  constexpr float magic = 12582912.f;  // 1.5 * 2^23: floats this large have no fractions
  x = maximum(Floats{} - 126.f, x);
  Floats whole = x + magic, fraction = x - (whole - magic), sum = Floats{} + terms[DEGREE];
  for (int n = DEGREE - 1; n >= 0; n--) sum = sum * fraction + terms[n];
  return (Floats)((Ints)sum + ((Ints)whole << 23));
}

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
