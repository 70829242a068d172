// AVX-512 with VNNI: Intel since Ice Lake, AMD since Zen 4.
#ifndef __clang__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own header: intrinsics start from an undefined register
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace pentad {
namespace {

struct Isa {
  static constexpr int ROWS = 8, PIXELS = 12;
  using V = float __attribute__((vector_size(64)));
  static inline V fma_v(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  using F = float __attribute__((vector_size(64)));
  using I = int32_t __attribute__((vector_size(64)));
  using B = uint8_t __attribute__((vector_size(64)));
  using H = uint16_t __attribute__((vector_size(32)));

  static inline F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  // sum + the dot product of each lane's four unsigned bytes of w and the four signed bytes of x
  template <bool Wide> static inline I dot(I sum, B w, int32_t x) {
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
  }
  // shift 16-bit lanes: the caller masks the bits that cross from one byte to the next
  template <int N> static inline B shift_right(B v) { return (B)_mm512_srli_epi16((__m512i)v, N); }
  template <int N> static inline B shift_left(B v) { return (B)_mm512_slli_epi16((__m512i)v, N); }
  static inline F half(const void* p) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  // sums up to 16 registers at once: each step adds halves of two registers, which halves the number of registers
  template <int N> static inline void sum_lanes_of(const F (&v)[N], float* sums) {
    static_assert(N <= 16);
    __m512 x[16];
    for (int i = 0; i < 16; i++) x[i] = i < N ? (__m512)v[i] : _mm512_setzero_ps();
    for (int i : {0, 1, 2, 3, 8, 9, 10, 11})
      x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 4], 0x44), _mm512_shuffle_f32x4(x[i], x[i + 4], 0xee));
    for (int i : {0, 1, 2, 3})
      x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x[i], x[i + 8], 0x88), _mm512_shuffle_f32x4(x[i], x[i + 8], 0xdd));
    for (int i : {0, 2})
      x[i] = _mm512_add_ps(_mm512_shuffle_ps(x[i], x[i + 1], 0x44), _mm512_shuffle_ps(x[i], x[i + 1], 0xee));
    const __m512 total = _mm512_add_ps(_mm512_shuffle_ps(x[0], x[2], 0x88), _mm512_shuffle_ps(x[0], x[2], 0xdd));
    std::memcpy(sums, &total, N * sizeof(float));
  }
  static inline float sum_lanes(F v) { return _mm512_reduce_add_ps((__m512)v); }
  static inline int32_t sum_lanes(I v) { return _mm512_reduce_add_epi32((__m512i)v); }
  static inline float max_lanes(F v) { return _mm512_reduce_max_ps((__m512)v); }
  static inline int32_t max_lanes(I v) { return _mm512_reduce_max_epi32((__m512i)v); }
  static inline H to_halves(F v) { return (H)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
};

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace
}  // namespace pentad

#include "kernels.h"

namespace pentad {
const Kernels avx512_kernels = {"avx512-vnni", runs_here, chunks, work, weight_addresses, buffer_sizes, sample, conv_chunks,
    conv_work, grid_chunks, grid_work};
}
