// Attention whose scores never leave the cache.
#pragma once

#include "products.h"

struct Shape {
  int64_t batch, heads, queries, keys, size;  // size: of a head, at most MOST
};

template <class T> struct Attention : Tiles<T> {
  using Tiles<T>::ROWS;
  using Tiles<T>::PANEL;
  using Tiles<T>::KEYS;
  using Tiles<T>::TOGETHER;
  using Tiles<T>::at;
  static constexpr int MOST = 256;
  static constexpr float SLACK = 8.f;  // powers of two by which a row's maximum may have grown

  Shape s;
  int64_t depth, columns, keys;  // padded: of q and k; of v and the result; of k and v
  explicit Attention(Shape shape)
      : s(shape), depth(up(s.size, Tiles<T>::DEPTH)), columns(up(s.size, sizeof(T) == 4 ? WIDTH : 16)),
        keys(up(s.keys, 32)) {}
  int64_t key_room() const { return up(keys, PANEL) * depth; }
  int64_t value_room() const { return up(columns, PANEL) * keys; }

  // k (keys, size) to panels of keys, v (keys, size) to panels of its columns; what pads them is zero.
  void pack(const T* k, int64_t k_stride, const T* v, int64_t v_stride, T* keys_to, T* values_to) const {
    std::memset((void*)keys_to, 0, key_room() * sizeof(T));
    std::memset((void*)values_to, 0, value_room() * sizeof(T));
    for (int64_t j = 0; j < s.keys; j += PANEL, keys_to += PANEL * depth)
      for (int64_t n = 0; n < std::min<int64_t>(PANEL, s.keys - j); n++) {
        const T* from = k + (j + n) * k_stride;
        int64_t d = 0;
        for (; d + TOGETHER <= s.size; d += TOGETHER)
          std::memcpy((void*)(keys_to + at(d, n)), from + d, TOGETHER * sizeof(T));
        for (; d < s.size; d++) keys_to[at(d, n)] = from[d];
      }
    for (int64_t j = 0; j < s.size; j += PANEL, values_to += PANEL * keys) {
      const int64_t width = std::min<int64_t>(PANEL, s.size - j);
      for (int64_t n = 0; n < s.keys; n += TOGETHER) {
        const int64_t rows = std::min<int64_t>(TOGETHER, s.keys - n);
        T* to = values_to + at(n, 0);
        const T* from = v + n * v_stride + j;
        for (int64_t d = 0; d < width; d++)
          for (int64_t i = 0; i < rows; i++) to[d * TOGETHER + i] = from[i * v_stride + d];
      }
    }
  }

  // softmax(q k^T / sqrt(size)) v for up to ROWS queries of a head, over KEYS keys at a time: each row of weights is
  // relative to a maximum that is raised, and what is summed up lowered, when a later one is much larger (Milakov and
  // Gimelshein 2018, arXiv:1805.02867).
  void rows(const T* q, int64_t q_stride, int64_t count, const T* packed_keys, const T* packed_values, T* out,
            int64_t out_stride) const {
    alignas(64) T queries[ROWS * MOST], weights[ROWS * KEYS];
    alignas(64) float scores[ROWS * KEYS], sums[ROWS * MOST];
    float most[ROWS];
    Floats norm[ROWS];
    const float scale = 1.4426950408889634f / std::sqrt(float(s.size));  // of powers of two
    std::memset((void*)queries, 0, ROWS * depth * sizeof(T));
    for (int64_t r = 0; r < count; r++) std::memcpy((void*)(queries + r * depth), q + r * q_stride, s.size * sizeof(T));
    for (int64_t j = 0; j < keys; j += KEYS) {
      const int width = int(std::min<int64_t>(KEYS, keys - j));
      this->product(queries, depth, packed_keys + j * depth, PANEL * depth, scores, KEYS, width, depth, false);
      for (int r = 0; r < ROWS; r++) {
        float* row = scores + r * KEYS;
        for (int64_t n = std::max<int64_t>(s.keys - j, 0); n < width; n++) row[n] = -INFINITY;
        Floats high = load(row);
        for (int n = WIDTH; n < width; n += WIDTH) high = maximum(high, load(row + n));
        const float now = highest(high) * scale;
        if (j == 0) {
          most[r] = now;
          norm[r] = Floats{};
        } else if (now > most[r] + SLACK) {
          const float less = std::exp2(most[r] - now);
          for (int c = 0; c < columns; c += WIDTH) store(sums + r * columns + c, load(sums + r * columns + c) * less);
          norm[r] *= less;
          most[r] = now;
        }
        for (int n = 0; n < width; n += WIDTH) {
          Floats weight = exp2<Tiles<T>::EXP_DEGREE>(load(row + n) * scale - most[r]);
          norm[r] += weight;
          store(weights + r * KEYS + n, weight);
        }
      }
      this->product(weights, KEYS, packed_values + at(j, 0), PANEL * keys, sums, columns, columns, width, j > 0);
    }
    for (int64_t r = 0; r < count; r++) {
      float whole = 0;
      for (int n = 0; n < WIDTH; n++) whole += norm[r][n];
      for (int64_t d = 0; d < s.size; d++) store_one(out + r * out_stride + d, sums[r * columns + d] / whole);
    }
  }

  // q, k, v: (batch, heads, tokens, size), whose strides but the last follow each other; out: (batch, tokens, heads,
  // size), without gaps. space: for both kinds of panels, which have padded keys times padded sizes of at most 32 more.
  void run(const T* q, const T* k, const T* v, T* out, T* space, const int64_t* strides, int threads) const {
    const int64_t *qs = strides, *ks = strides + 3, *vs = strides + 6, pairs = s.batch * s.heads;
    const int64_t tiles = (s.queries + ROWS - 1) / ROWS;
    T *packed_keys = space, *packed_values = space + pairs * key_room();
#pragma omp parallel num_threads(threads)
    {
      [[maybe_unused]] std::conditional_t<std::is_same_v<T, bf16>, TileSetup, int> setup{};
#pragma omp for schedule(static)
      for (int64_t p = 0; p < pairs; p++) {
        const int64_t b = p / s.heads, h = p % s.heads;
        pack(k + b * ks[0] + h * ks[1], ks[2], v + b * vs[0] + h * vs[1], vs[2], packed_keys + p * key_room(),
             packed_values + p * value_room());
      }
#pragma omp for schedule(static)
      for (int64_t work = 0; work < pairs * tiles; work++) {
        const int64_t p = work / tiles, i = work % tiles * ROWS, b = p / s.heads, h = p % s.heads;
        rows(q + b * qs[0] + h * qs[1] + i * qs[2], qs[2], std::min<int64_t>(ROWS, s.queries - i),
             packed_keys + p * key_room(), packed_values + p * value_room(),
             out + ((b * s.queries + i) * s.heads + h) * s.size, s.heads * s.size);
      }
    }
  }
};
