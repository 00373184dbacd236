// The kernels of ldm/runtime/native.py, by name and type: C++ with GCC's vectors, which builds in seconds and reads as
// its maths.

#include "attention.h"
#include "convolution.h"
#include "pointwise.h"

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

#define CONVOLUTION(name, Axis)                                                                                        \
  int64_t name(const float* x, const float* weight, const float* bias, float* out, float* space, const Maps* maps,    \
               int threads) {                                                                                         \
    return Winograd<Axis>(*maps, threads).run(x, weight, bias, out, space);                                           \
  }
CONVOLUTION(convolution_float32, Filtered)
CONVOLUTION(enlarged_convolution_float32, Enlarged)

// Linux (5.16) gives AMX's tiles to processes that ask for them; tells whether this one has them, or needs none.
int allow_tiles() {
#if defined(HAVE_AMX) && !defined(PLAY_AMX)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#else
  return 1;
#endif
}
}
