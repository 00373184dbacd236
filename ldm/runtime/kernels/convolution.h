// 3x3 convolutions by Winograd's minimal filtering (Lavin and Gray 2015, arXiv:1509.09308): tiles of the map and the
// weights are transformed, multiplied number by number and summed over channels, which are matrix products, and the sums
// are transformed to pixels. In exact arithmetic that is the convolution, by fewer products.
#pragma once

#include <omp.h>

#include "products.h"

// Along one axis, 4 results of 6 pixels by 6 products instead of 12: polynomials are multiplied by their values at 0, ±a,
// ±b and infinity. Rounding errs by half of what it does with the usual ±1 and ±2: 1.7 times that of plain sums of 128
// channels, 2.2 times of 16.
struct Filtered {
  static constexpr int STEP = 4, SEEN = 6, PRODUCTS = 6, MADE = 4;
  static constexpr float a = 0.625f, b = 1.5f, aa = a * a, bb = b * b;

  static inline void of_map(const Floats* x, Floats* to) {
    Floats even_a = x[4] - bb * x[2], odd_a = a * (x[3] - bb * x[1]);
    Floats even_b = x[4] - aa * x[2], odd_b = b * (x[3] - aa * x[1]);
    to[0] = x[4] - (aa + bb) * x[2] + aa * bb * x[0];
    to[1] = even_a + odd_a;
    to[2] = even_a - odd_a;
    to[3] = even_b + odd_b;
    to[4] = even_b - odd_b;
    to[5] = x[5] - (aa + bb) * x[3] + aa * bb * x[1];
  }
  static inline void of_weight(const Floats* w, Floats* to) {
    constexpr float over_a = 1 / (2 * aa * (aa - bb)), over_b = 1 / (2 * bb * (bb - aa));
    Floats even_a = over_a * w[0] + aa * over_a * w[2], odd_a = a * over_a * w[1];
    Floats even_b = over_b * w[0] + bb * over_b * w[2], odd_b = b * over_b * w[1];
    to[0] = w[0] * (1 / (aa * bb));
    to[1] = even_a + odd_a;
    to[2] = even_a - odd_a;
    to[3] = even_b + odd_b;
    to[4] = even_b - odd_b;
    to[5] = w[2];
  }
  static inline void of_sums(const Floats* s, Floats* to) {
    Floats even_a = s[1] + s[2], odd_a = a * (s[1] - s[2]), even_b = s[3] + s[4], odd_b = b * (s[3] - s[4]);
    to[0] = s[0] + even_a + even_b;
    to[1] = odd_a + odd_b;
    to[2] = aa * even_a + bb * even_b;
    to[3] = aa * odd_a + bb * odd_b + s[5];
  }
};

// Along one axis of a map that is enlarged to twice its size by nearest neighbour, 2 results of 3 pixels by 3 products
// instead of 6: of the three pixels that a result sees two are the same.
struct Enlarged {
  static constexpr int STEP = 1, SEEN = 3, PRODUCTS = 3, MADE = 2;

  static inline void of_map(const Floats* x, Floats* to) {
    to[0] = x[0] - x[1];
    to[1] = x[1];
    to[2] = x[2] - x[1];
  }
  static inline void of_weight(const Floats* w, Floats* to) {
    to[0] = w[0];
    to[1] = w[0] + w[1] + w[2];
    to[2] = w[2];
  }
  static inline void of_sums(const Floats* s, Floats* to) {
    to[0] = s[0] + s[1];
    to[1] = s[1] + s[2];
  }
};

// (FROM, FROM) to (TO, TO) by a transform along both axes.
template <int FROM, int TO, class Transform>
static inline void transform(Transform along, const Floats* from, Floats* to) {
  Floats half[TO * FROM], column[FROM], made[TO];
  for (int j = 0; j < FROM; j++) {
    for (int i = 0; i < FROM; i++) column[i] = from[i * FROM + j];
    along(column, made);
    for (int i = 0; i < TO; i++) half[i * FROM + j] = made[i];
  }
  for (int i = 0; i < TO; i++) along(half + i * FROM, to + i * TO);
}

struct Maps {
  int64_t batch, height, width, channels, outputs, top, left;  // top: rows of zeros above, and below; left: and right
};

template <class Axis> struct Winograd {
  static constexpr int SEEN = Axis::SEEN, PRODUCTS = Axis::PRODUCTS, MADE = Axis::MADE, AREA = PRODUCTS * PRODUCTS;
  static constexpr int ROWS = Tiles<float>::ROWS, PANEL = Tiles<float>::PANEL;
  static constexpr int OUTPUTS = 32, DEPTH = 512;  // outputs, and channels of their weights, that a thread has at once
  static constexpr int64_t MAPS = 1 << 21;         // numbers of transformed tiles at once, for a cache of 8 MB
  static constexpr int APART = 16;                 // numbers between what else would meet in the same lines of a cache

  Maps s;
  int threads;
  int64_t height, width, down, across, tiles;  // of the result, in pixels and in tiles
  int64_t most, blocks, part, parts;           // tiles at once; work that threads share: blocks of outputs, parts of tiles
  int64_t tile_room, weight_room, sum_room;

  Winograd(Maps maps, int most_threads) : s(maps) {
    constexpr int scale = Axis::STEP < MADE ? 2 : 1;
    constexpr int64_t STEP = Tiles<float>::STEP;
    height = scale * (s.height + 2 * s.top - 2);
    width = scale * (s.width + 2 * s.left - 2);
    down = (height + MADE - 1) / MADE;
    across = (width + MADE - 1) / MADE;
    tiles = s.batch * down * across;
    most = up(std::min(tiles, std::max<int64_t>(ROWS, MAPS / AREA / s.channels)), STEP);
    blocks = (s.outputs + OUTPUTS - 1) / OUTPUTS;
    parts = std::max<int64_t>(1, std::min(most / ROWS, 2 * most_threads / blocks));  // where blocks are too few
    part = up((most + parts - 1) / parts, STEP);
    threads = int(std::min<int64_t>(most_threads, blocks * parts));
    tile_room = most * s.channels + APART;
    weight_room = std::min<int64_t>(s.channels, DEPTH) * OUTPUTS + APART;
    sum_room = part * OUTPUTS + APART;
  }

  // One tile of x (batch, height, width, channels) to (AREA, channels), apart by tile_room.
  void transform_tile(const float* x, int64_t tile, const float* zeros, float* to) const {
    const int64_t n = tile / (down * across), top = tile / across % down * Axis::STEP - s.top,
                  left = tile % across * Axis::STEP - s.left;
    const float* pixels[SEEN * SEEN];
    for (int i = 0; i < SEEN; i++)
      for (int j = 0; j < SEEN; j++) {
        const int64_t row = top + i, column = left + j;
        const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
        pixels[i * SEEN + j] = inside ? x + ((n * s.height + row) * s.width + column) * s.channels : zeros;
      }
    for (int64_t c = 0; c < s.channels; c += WIDTH) {
      Floats seen[SEEN * SEEN], made[AREA];
      for (int i = 0; i < SEEN * SEEN; i++) seen[i] = load(pixels[i] + c);
      transform<SEEN, PRODUCTS>(Axis::of_map, seen, made);
      for (int i = 0; i < AREA; i++) store(to + i * tile_room + c, made[i]);
    }
  }

  // `depth` channels of weights (outputs, 3, 3, channels) to AREA matrices (depth, outputs) in panels, apart by
  // weight_room.
  void transform_weights(const float* weight, int outputs, int depth, float* to) const {
    constexpr int CHANNELS = 16;
    alignas(64) float turned[9][CHANNELS][OUTPUTS];
    for (int c = 0; c < depth; c += CHANNELS) {
      for (int o = 0; o < outputs; o++)
        for (int i = 0; i < 9; i++)
          for (int n = 0; n < CHANNELS; n++) turned[i][n][o] = weight[(o * 9 + i) * s.channels + c + n];
      for (int n = 0; n < CHANNELS; n++)
        for (int o = 0; o < outputs; o += WIDTH) {
          Floats given[9], made[AREA];
          for (int i = 0; i < 9; i++) given[i] = load(turned[i][n] + o);
          transform<3, PRODUCTS>(Axis::of_weight, given, made);
          float* at = to + o / PANEL * PANEL * depth + (c + n) * PANEL + o % PANEL;
          for (int i = 0; i < AREA; i++) store(at + i * weight_room, made[i]);
        }
    }
  }

  // A tile's sums (AREA, outputs), apart by sum_room, to pixels of out.
  void transform_sums(const float* sums, int64_t tile, const float* bias, int outputs, float* out) const {
    const int64_t n = tile / (down * across), top = tile / across % down * MADE, left = tile % across * MADE;
    for (int o = 0; o < outputs; o += WIDTH) {
      Floats given[AREA], made[MADE * MADE];
      for (int i = 0; i < AREA; i++) given[i] = load(sums + i * sum_room + o);
      transform<PRODUCTS, MADE>(Axis::of_sums, given, made);
      for (int i = 0; i < MADE && top + i < height; i++)
        for (int j = 0; j < MADE && left + j < width; j++)
          store(out + ((n * height + top + i) * width + left + j) * s.outputs + o, made[i * MADE + j] + load(bias + o));
    }
  }

  // Pixels of `count` tiles from the one that is `first`, which are transformed at `maps`.
  void convolve(const float* maps, int64_t first, int64_t count, const float* weight, const float* bias, int outputs,
                float* weights, float* sums, float* out) const {
    for (int64_t c = 0; c < s.channels; c += DEPTH) {
      const int depth = int(std::min<int64_t>(DEPTH, s.channels - c));
      transform_weights(weight + c, outputs, depth, weights);
      for (int64_t t = 0; t < count; t += ROWS)
        for (int i = 0; i < AREA; i++)
          Tiles<float>::product(maps + i * tile_room + t * s.channels + c, int(s.channels), weights + i * weight_room,
                                depth * PANEL, sums + i * sum_room + t * OUTPUTS, OUTPUTS, outputs, depth, c > 0,
                                int(std::min<int64_t>(ROWS, count - t)));
    }
    for (int64_t t = 0; t < count; t++) transform_sums(sums + t * OUTPUTS, first + t, bias, outputs, out);
  }

  // x: (batch, height, width, channels); weight: (outputs, 3, 3, channels); out: (batch, height, width, outputs) of the
  // result. Channels and outputs are multiples of 16. Answers with how many numbers of space it takes; without any, that
  // is all it does.
  int64_t run(const float* x, const float* weight, const float* bias, float* out, float* space) const {
    const int64_t own = AREA * (weight_room + sum_room), shared = AREA * tile_room + s.channels;
    if (!space) return shared + threads * own;
    float *zeros = space, *maps = space + s.channels;
    std::fill(zeros, maps, 0.f);
#pragma omp parallel num_threads(threads)
    for (int64_t first = 0; first < tiles; first += most) {
      const int64_t count = std::min(most, tiles - first);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; t++) transform_tile(x, first + t, zeros, maps + t * s.channels);
#pragma omp for schedule(dynamic)
      for (int64_t work = 0; work < blocks * parts; work++) {
        const int64_t o = work / parts * OUTPUTS, t = work % parts * part;
        float* mine = space + shared + omp_get_thread_num() * own;
        if (t < count)
          convolve(maps + t * s.channels, first + t, std::min(part, count - t), weight + o * 9 * s.channels, bias + o,
                   int(std::min<int64_t>(OUTPUTS, s.outputs - o)), mine, mine + AREA * weight_room, out + o);
      }
    }
    return shared + threads * own;
  }
};
