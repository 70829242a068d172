// The code that both Arm instruction sets share. Four NEON registers (of four floats each) form one 16-lane register.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace pentad {
namespace {

#define UNROLL_4 _Pragma("GCC unroll 4")  // otherwise arrays of registers are kept in memory

struct Neon : AnyLanes {
  static constexpr int ROWS = 2, PIXELS = 6;
  using V = float __attribute__((vector_size(16)));
  static inline __attribute__((always_inline)) V fma_v(V a, V b, V c) {
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }
  using B = uint8_t __attribute__((vector_size(64)));

  // always inlined: a call would pass 64-byte vectors through memory
  static inline __attribute__((always_inline)) F fma(F a, F b, F c) {
    float32x4_t x[4], y[4], z[4];
    std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
    UNROLL_4
    for (int i = 0; i < 4; i++) z[i] = vfmaq_f32(z[i], x[i], y[i]);
    std::memcpy(&c, z, 64);
    return c;
  }
  // dot4 multiplies signed bytes. From bytes that may exceed 127, 128 is subtracted, and the sum is corrected.
  template <bool Wide, class Dot4> static inline __attribute__((always_inline)) I signed_dot(I sum, B w, int32_t x, Dot4 dot4) {
    int32x4_t s[4];
    int8x16_t v[4];
    const int8x16_t b = vreinterpretq_s8_s32(vdupq_n_s32(x));
    const int32x4_t correction = vshlq_n_s32(vpaddlq_s16(vpaddlq_s8(b)), 7);
    if (Wide) w ^= 128;
    std::memcpy(s, &sum, 64), std::memcpy(v, &w, 64);
    UNROLL_4
    for (int i = 0; i < 4; i++) s[i] = dot4(Wide ? vaddq_s32(s[i], correction) : s[i], v[i], b);
    std::memcpy(&sum, s, 64);
    return sum;
  }
  template <int N> static inline B shift_right(B v) { return v >> N; }
  template <int N> static inline B shift_left(B v) { return v << N; }
  static inline F half(const void* p) {
    uint16_t h[16];
    std::memcpy(h, p, sizeof h);
    float32x4_t x[4];
    UNROLL_4
    for (int i = 0; i < 4; i++) x[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(h + 4 * i)));
    F v;
    std::memcpy(&v, x, 64);
    return v;
  }
  static inline H to_halves(F v) {
    float32x4_t x[4];
    std::memcpy(x, &v, 64);
    float16x4_t h[4];
    for (int i = 0; i < 4; i++) h[i] = vcvt_f16_f32(x[i]);
    H out;
    std::memcpy(&out, h, 32);
    return out;
  }
};

}  // namespace
}  // namespace pentad
