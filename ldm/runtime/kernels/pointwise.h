// Group norm and gated GELU.
#pragma once

#include "vectors.h"

// Group norm --------------------------------------------------------------------------------------------------------

// Mean and variance of each row and channel of x (rows, width, channels): (rows, channels) each.
template <class T>
static void row_statistics(const T* x, double* mean, double* variance, int64_t rows, int64_t width, int64_t channels,
                           int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    double *sum = mean + row * channels, *square = variance + row * channels;
    std::fill(sum, sum + channels, 0.0);
    std::fill(square, square + channels, 0.0);
    for (int64_t p = row * width; p < (row + 1) * width; p++)
      for (int64_t c = 0; c < channels; c += WIDTH) {
        Doubles value = __builtin_convertvector(load(x + p * channels + c), Doubles);
        *(Doubles*)(sum + c) += value;
        *(Doubles*)(square + c) += value * value;
      }
    for (int64_t c = 0; c < channels; c++) {
      sum[c] /= width;
      square[c] = std::max(square[c] / width - sum[c] * sum[c], 0.0);
    }
  }
}

// out = x scale + shift, and SiLU of it with `silu`: x (batch, pixels, channels), scale and shift (batch, channels).
template <class T>
static void scale_and_shift(const T* x, const float* scale, const float* shift, T* out, int64_t batch, int64_t pixels,
                            int64_t channels, bool silu, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < batch * pixels; p++) {
    const int64_t of = p / pixels * channels, at = p * channels;
    for (int64_t c = 0; c < channels; c += WIDTH) {
      Floats y = load(x + at + c) * load(scale + of + c) + load(shift + of + c);
      if (silu) y = y / (1.f + exp2<6>(minimum(Floats{} + 126.f, y * -1.4426950408889634f)));
      store(out + at + c, y);
    }
  }
}

// Gated GELU --------------------------------------------------------------------------------------------------------

// erfc(z) for z >= 0, to a fraction of 1.2e-7: Chebyshev's fit of Press et al., Numerical Recipes, section 6.2.
static inline Floats erfc(Floats z) {
  constexpr float terms[] = {0.17087277f,  -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                             -0.18628806f, 0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  Floats t = 1.f / (1.f + 0.5f * z), sum = Floats{};
  for (float term : terms) sum = sum * t + term;
  return t * exp2<6>((sum - z * z) * 1.4426950408889634f);
}

// out (tokens, size) = value gelu(gate), of x (tokens, 2 size): values, then gates.
template <class T> static void gated_gelu(const T* x, T* out, int64_t tokens, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < tokens; n++)
    for (int64_t c = 0; c < size; c += WIDTH) {
      Floats value = load(x + n * 2 * size + c), gate = load(x + n * 2 * size + size + c);
      Floats tail = 0.5f * erfc(maximum(gate, -gate) * 0.70710678f);  // of the normal distribution
      store(out + n * size + c, value * gate * (gate > 0.f ? 1.f - tail : tail));
    }
}
