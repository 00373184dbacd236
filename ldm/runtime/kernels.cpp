// Attention, group norm and gated GELU for CPUs: plain C++ with GCC's vectors, which builds in seconds and reads as its maths.
// bfloat16 attention multiplies in AMX's tiles; with PLAY_AMX plain loops play those, to test the rest without them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AMX_BF16__) && !defined(PLAY_AMX)
#define HAVE_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(PLAY_AMX)
#define HAVE_AMX
#endif

// Vectors ---------------------------------------------------------------------------------------------------------

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

// Matrix products of tiles ------------------------------------------------------------------------------------------
//
// c (ROWS, columns) = a (ROWS, depth) b, or += where `add`. b is packed in panels of PANEL columns, one after the
// other every `panel` numbers: float panels are (depth, PANEL), those of bfloat16 (depth / 2, PANEL, 2), as AMX has it.

template <class T> struct Tiles;

template <> struct Tiles<float> {
  static constexpr int ROWS = 48, PANEL = 2 * WIDTH, DEPTH = 1, KEYS = 128, EXP_DEGREE = 7;

  template <int VECTORS>
  static inline void block(const float* a, int lda, const float* b, float* c, int ldc, int depth, bool add) {
    Floats sums[6][VECTORS];
    for (int r = 0; r < 6; r++)
      for (int v = 0; v < VECTORS; v++) sums[r][v] = add ? load(c + r * ldc + v * WIDTH) : Floats{};
    for (int k = 0; k < depth; k++)
      for (int r = 0; r < 6; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] += a[r * lda + k] * load(b + k * PANEL + v * WIDTH);
    for (int r = 0; r < 6; r++)
      for (int v = 0; v < VECTORS; v++) store(c + r * ldc + v * WIDTH, sums[r][v]);
  }
  static void product(const float* a, int lda, const float* b, int64_t panel, float* c, int ldc, int columns, int depth,
                      bool add) {
    for (int j = 0; j < columns; j += PANEL, b += panel)
      for (int i = 0; i < ROWS; i += 6)
        if (columns - j > WIDTH)
          block<2>(a + i * lda, lda, b, c + i * ldc + j, ldc, depth, add);
        else
          block<1>(a + i * lda, lda, b, c + i * ldc + j, ldc, depth, add);
  }
  static int64_t at(int64_t k, int column, int64_t) { return k * PANEL + column; }
};

#ifdef HAVE_AMX
#ifdef PLAY_AMX
static thread_local float tiles_f[8][16][16];
static thread_local bf16 tiles_h[8][16][32];
#define _tile_zero(t) std::memset(tiles_f[t], 0, sizeof tiles_f[t])
template <class P> static void play_load(int t, const P* from, int64_t stride) {
  for (int r = 0; r < 16; r++) std::memcpy(tiles_f[t][r], (const char*)from + r * stride, 64);
  std::memcpy(tiles_h[t], tiles_f[t], 1024);
}
static void play_store(int t, float* to, int64_t stride) {
  for (int r = 0; r < 16; r++) std::memcpy((char*)to + r * stride, tiles_f[t][r], 64);
}
static void play_product(int c, int a, int b) {
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 32; k++)
      for (int n = 0; n < 16; n++)
        tiles_f[c][m][n] += number(tiles_h[a][m][k]) * number(tiles_h[b][k / 2][2 * n + k % 2]);
}
#define _tile_loadd(t, from, stride) play_load(t, from, stride)
#define _tile_stored(t, to, stride) play_store(t, to, stride)
#define _tile_dpbf16ps(c, a, b) play_product(c, a, b)
#endif

template <> struct Tiles<bf16> {
  static constexpr int ROWS = 32, PANEL = 16, DEPTH = 32, KEYS = 256, EXP_DEGREE = 4;

  // Tiles 0 to 3 are of c, 4 and 5 of a, 6 and 7 of b: each that is loaded is used twice.
  template <bool TWO>
  static inline void block(const bf16* a, int lda, const bf16* b, int64_t panel, float* c, int ldc, int depth, bool add) {
    if (add) {
      _tile_loadd(0, c, 4 * ldc);
      _tile_loadd(2, c + 16 * ldc, 4 * ldc);
      if constexpr (TWO) {
        _tile_loadd(1, c + 16, 4 * ldc);
        _tile_loadd(3, c + 16 * ldc + 16, 4 * ldc);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int k = 0; k < depth; k += 32) {
      _tile_loadd(4, a + k, 2 * lda);
      _tile_loadd(5, a + k + 16 * lda, 2 * lda);
      _tile_loadd(6, b + k * PANEL, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (TWO) {
        _tile_loadd(7, b + panel + k * PANEL, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, 4 * ldc);
    _tile_stored(2, c + 16 * ldc, 4 * ldc);
    if constexpr (TWO) {
      _tile_stored(1, c + 16, 4 * ldc);
      _tile_stored(3, c + 16 * ldc + 16, 4 * ldc);
    }
  }
  static void product(const bf16* a, int lda, const bf16* b, int64_t panel, float* c, int ldc, int columns, int depth,
                      bool add) {
    asm volatile("" ::: "memory");  // what is loaded into tiles is to be written before
    int j = 0;
    for (; j + 2 * PANEL <= columns; j += 2 * PANEL, b += 2 * panel)
      block<true>(a, lda, b, panel, c + j, ldc, depth, add);
    if (j < columns) block<false>(a, lda, b, panel, c + j, ldc, depth, add);
  }
  static int64_t at(int64_t k, int column, int64_t) { return (k / 2 * PANEL + column) * 2 + k % 2; }
};
#endif

// oneDNN keeps a configuration of tiles between its own calls: it gets it back.
struct TileSetup {
#if defined(HAVE_AMX) && !defined(PLAY_AMX)
  struct alignas(64) Config {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    // Not by intrinsics, of which GCC before 12.4 and 13.3 believes that they touch 8 of the 64 bytes.
    void load() const { asm volatile("ldtilecfg %0" ::"m"(*this) : "memory"); }
    void store() { asm volatile("sttilecfg %0" : "=m"(*this)::"memory"); }
  } before;
  TileSetup() {
    before.store();
    Config ours;
    ours.palette = 1;
    for (int t = 0; t < 8; t++) ours.bytes[t] = 64, ours.rows[t] = 16;
    ours.load();
  }
  ~TileSetup() {
    if (before.palette)
      before.load();
    else
      _tile_release();
  }
#endif
};

// Attention ---------------------------------------------------------------------------------------------------------

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Shape {
  int64_t batch, heads, queries, keys, size;  // size: of a head, at most MOST
};

template <class T> struct Attention : Tiles<T> {
  using Tiles<T>::ROWS;
  using Tiles<T>::PANEL;
  using Tiles<T>::KEYS;
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
    for (int64_t n = 0; n < s.keys; n++)
      for (int64_t d = 0; d < s.size; d++) {
        keys_to[n / PANEL * PANEL * depth + at(d, n % PANEL, depth)] = k[n * k_stride + d];
        values_to[d / PANEL * PANEL * keys + at(n, d % PANEL, keys)] = v[n * v_stride + d];
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
        float now = high[0];
        for (int n = 1; n < WIDTH; n++) now = std::max(now, high[n]);
        now *= scale;
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
      this->product(weights, KEYS, packed_values + at(j, 0, keys), PANEL * keys, sums, columns, columns, width, j > 0);
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
      if (silu) y = y / (1.f + exp2<7>(minimum(Floats{} + 126.f, y * -1.4426950408889634f)));
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
  return t * exp2<7>((sum - z * z) * 1.4426950408889634f);
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

extern "C" {

#define POINTWISE(name, T)                                                                                                 \
  void row_statistics_##name(const T* x, double* mean, double* variance, const int64_t* size, int threads) {          \
    row_statistics(x, mean, variance, size[0], size[1], size[2], threads);                                            \
  }                                                                                                                   \
  void scale_and_shift_##name(const T* x, const float* scale, const float* shift, T* out, const int64_t* size,        \
                              int silu, int threads) {                                                                \
    scale_and_shift(x, scale, shift, out, size[0], size[1], size[2], silu, threads);                                  \
  }                                                                                                                   \
  void gated_gelu_##name(const T* x, T* out, const int64_t* size, int threads) {                                      \
    gated_gelu(x, out, size[0], size[1], threads);                                                                    \
  }
#define ATTENTION(name, T)                                                                                            \
  void attention_##name(const T* q, const T* k, const T* v, T* out, T* space, const Shape* shape,                     \
                        const int64_t* strides, int threads) {                                                        \
    Attention<T>(*shape).run(q, k, v, out, space, strides, threads);                                                  \
  }

POINTWISE(float32, float)
POINTWISE(bfloat16, bf16)
ATTENTION(float32, float)
#ifdef HAVE_AMX
ATTENTION(bfloat16, bf16)
#endif

// Linux (5.16) gives AMX's tiles to processes that ask for them; tells whether this one has them, or needs none.
int allow_tiles() {
#if defined(HAVE_AMX) && !defined(PLAY_AMX)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#else
  return 1;
#endif
}
}
