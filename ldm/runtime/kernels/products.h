// Matrix products of tiles that fit the cache: by vectors in float32, in AMX's tiles in bfloat16. With PLAY_AMX plain
// loops play those, to test the rest without them.
#pragma once

#include "vectors.h"

#if defined(__AMX_BF16__) && !defined(PLAY_AMX)
#define HAVE_AMX
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(PLAY_AMX)
#define HAVE_AMX
#endif

// c (ROWS, columns) = a (ROWS, depth) b, or += where `add`. b is packed in panels of PANEL columns, one after the
// other every `panel` numbers: float panels are (depth, PANEL), those of bfloat16 (depth / 2, PANEL, 2), as AMX has it.

template <class T> struct Tiles;

template <> struct Tiles<float> {
  static constexpr int STEP = 6;  // rows at once, to whose multiple other numbers of `rows` are read and written
  static constexpr int ROWS = 48, PANEL = 2 * WIDTH, DEPTH = 1, KEYS = 128, EXP_DEGREE = 6, TOGETHER = 1;

  template <int VECTORS>
  static inline void block(const float* a, int lda, const float* b, float* c, int ldc, int depth, bool add) {
    Floats sums[STEP][VECTORS];
    for (int r = 0; r < STEP; r++)
      for (int v = 0; v < VECTORS; v++) sums[r][v] = add ? load(c + r * ldc + v * WIDTH) : Floats{};
    for (int k = 0; k < depth; k++)
      for (int r = 0; r < STEP; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] += a[r * lda + k] * load(b + k * PANEL + v * WIDTH);
    for (int r = 0; r < STEP; r++)
      for (int v = 0; v < VECTORS; v++) store(c + r * ldc + v * WIDTH, sums[r][v]);
  }
  static void product(const float* a, int lda, const float* b, int64_t panel, float* c, int ldc, int columns, int depth,
                      bool add, int rows = ROWS) {
    for (int j = 0; j < columns; j += PANEL, b += panel)
      for (int i = 0; i < rows; i += STEP)
        if (columns - j > WIDTH)
          block<2>(a + i * lda, lda, b, c + i * ldc + j, ldc, depth, add);
        else
          block<1>(a + i * lda, lda, b, c + i * ldc + j, ldc, depth, add);
  }
  static int64_t at(int64_t k, int column) { return k * PANEL + column; }
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
  static constexpr int ROWS = 32, PANEL = 16, DEPTH = 32, KEYS = 256, EXP_DEGREE = 3, TOGETHER = 2;

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
  static int64_t at(int64_t k, int column) { return (k / 2 * PANEL + column) * 2 + k % 2; }
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
