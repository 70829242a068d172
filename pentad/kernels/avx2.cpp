// AVX2 with FMA and F16C: x86 since 2013.
#include <cpuid.h>
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace pentad {
namespace {

struct Isa : AnyLanes {
  static constexpr int ROWS = 4, PIXELS = 6;
  using V = float __attribute__((vector_size(32)));
  static inline __attribute__((always_inline)) V fma_v(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  using B = uint8_t __attribute__((vector_size(64)));

  // always inlined: a call would pass 64-byte vectors through memory
  static inline __attribute__((always_inline)) F fma(F a, F b, F c) {
    __m256 x[2], y[2], z[2];
    std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
    for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    std::memcpy(&c, z, 64);
    return c;
  }
  template <bool Wide> static inline I dot(I sum, B w, int32_t x) {
    __m256i s[2], v[2];
    std::memcpy(s, &sum, 64), std::memcpy(v, &w, 64);
    const __m256i b = _mm256_set1_epi32(x), low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
    for (int i = 0; i < 2; i++)
      if (Wide) {  // bytes above 127 are split into nibbles, so that products don't saturate 16 bits
        const __m256i l = _mm256_maddubs_epi16(_mm256_and_si256(v[i], low), b);
        const __m256i h = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(v[i], 4), low), b);
        s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(l, one));
        s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(h, _mm256_set1_epi16(16)));
      } else {
        s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(_mm256_maddubs_epi16(v[i], b), one));
      }
    std::memcpy(&sum, s, 64);
    return sum;
  }
  // as AnyLanes' sums: lanes i and i + 8 are added, then i and i + 4, ...
  static inline __m128 four_sums(F v) {
    __m256 x[2];
    std::memcpy(x, &v, 64);
    const __m256 a = _mm256_add_ps(x[0], x[1]);
    return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  }
  static inline float sum_lanes(F v) {
    const __m128 a = four_sums(v), b = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
  }
  static inline int32_t sum_lanes(I v) { return AnyLanes::sum_lanes(v); }
  template <int N> static inline void sum_lanes_of(const F (&v)[N], float* sums) {
    static_assert(N % 4 == 0);
    for (int i = 0; i < N; i += 4) {
      const __m128 a = four_sums(v[i]), b = four_sums(v[i + 1]), c = four_sums(v[i + 2]), d = four_sums(v[i + 3]);
      const __m128 ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
      const __m128 cd = _mm_add_ps(_mm_movelh_ps(c, d), _mm_movehl_ps(d, c));
      _mm_storeu_ps(sums + i, _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xdd)));
    }
  }
  template <int N> static inline B shift_right(B v) { return v >> N; }
  template <int N> static inline B shift_left(B v) { return v << N; }
  static inline F half(const void* p) {
    const __m128i* h = (const __m128i*)p;
    const __m256 x[2] = {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
    F v;
    std::memcpy(&v, x, 64);
    return v;
  }
  static inline H to_halves(F v) {
    __m256 x[2];
    std::memcpy(x, &v, 64);
    const __m128i h[2] = {_mm256_cvtps_ph(x[0], _MM_FROUND_TO_NEAREST_INT), _mm256_cvtps_ph(x[1], _MM_FROUND_TO_NEAREST_INT)};
    H out;
    std::memcpy(&out, h, 32);
    return out;
  }
};

bool runs_here() {
  unsigned a, b, c, d;  // Clang 14 doesn't know "f16c"
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}

}  // namespace
}  // namespace pentad

#include "kernels.h"

namespace pentad {
const Kernels avx2_kernels = {"avx2", runs_here, chunks, work, weight_addresses, buffer_sizes, sample, conv_chunks,
    conv_work, grid_chunks, grid_work};
}
