// Any CPU, with the compiler's vector extensions.
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace pentad {
namespace {

struct Isa : AnyLanes {
  static constexpr int ROWS = 2, PIXELS = 2;
  using V = float __attribute__((vector_size(16)));
  static inline V fma_v(V a, V b, V c) { return a * b + c; }
  using B = uint8_t __attribute__((vector_size(64)));

  static inline F fma(F a, F b, F c) { return a * b + c; }
  template <bool Wide> static inline I dot(I sum, B w, int32_t x) {
    const I v = (I)w;
    return sum + (v & 255) * int32_t(int8_t(x)) + (v >> 8 & 255) * int32_t(int8_t(x >> 8)) +
           (v >> 16 & 255) * int32_t(int8_t(x >> 16)) + (v >> 24 & 255) * (x >> 24);
  }
  template <int N> static inline B shift_right(B v) { return v >> N; }
  template <int N> static inline B shift_left(B v) { return v << N; }
  static inline float half_to_float(uint16_t h) {
    // moves exponent and fraction to their bits; the multiplication corrects the exponent, also of denormals
    uint32_t u = uint32_t(h & 0x7fff) << 13;
    float x;
    if ((h & 0x7c00) == 0x7c00) {
      u |= 0x7f800000;
      std::memcpy(&x, &u, 4);
    } else {
      std::memcpy(&x, &u, 4);
      x *= 0x1p112f;
    }
    return h & 0x8000 ? -x : x;
  }
  static inline F half(const void* p) {
    uint16_t h[16];
    std::memcpy(h, p, sizeof h);
    F x;
    for (int i = 0; i < 16; i++) x[i] = half_to_float(h[i]);
    return x;
  }
  static inline H to_halves(F v) {
    H out = {};
    for (int i = 0; i < 16; i++) out[i] = to_half(v[i]);
    return out;
  }
  static inline uint16_t to_half(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    const uint16_t sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return sign | 0x7e00;   // NaN
    if (u >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
    if (u < 0x38800000) {                       // a denormal, or 0: the addition rounds it to units of 2^-24
      float v;
      std::memcpy(&v, &u, 4);
      v += 0.5f;
      std::memcpy(&u, &v, 4);
      return sign | uint16_t(u - 0x3f000000);
    }
    return sign | uint16_t((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
  }
};

bool runs_here() { return true; }

}  // namespace
}  // namespace pentad

#include "kernels.h"

namespace pentad {
const Kernels portable_kernels = {"portable", runs_here, chunks, work, weight_addresses, buffer_sizes, sample, conv_chunks,
    conv_work, grid_chunks, grid_work};
}
