// Sums and maxima over a register's lanes, for instruction sets without fast reductions: lane i is combined with lane
// i + 8, then i + 4, ...
#pragma once
#include <cstdint>
#include <cstring>

namespace pentad {
namespace {

struct AnyLanes {
  using F = float __attribute__((vector_size(64)));
  using I = int32_t __attribute__((vector_size(64)));
  using H = uint16_t __attribute__((vector_size(32)));

  template <class T, class V, class Join> static inline T join(V v, Join join) {
    T x[16];
    std::memcpy(x, &v, sizeof x);
    for (int n = 8; n; n /= 2)
      for (int i = 0; i < n; i++) x[i] = join(x[i], x[i + n]);
    return x[0];
  }
  static inline float sum_lanes(F v) { return join<float>(v, [](float a, float b) { return a + b; }); }
  static inline int32_t sum_lanes(I v) { return join<int32_t>(v, [](int32_t a, int32_t b) { return a + b; }); }
  template <int N> static inline void sum_lanes_of(const F (&v)[N], float* sums) {
    for (int i = 0; i < N; i++) sums[i] = sum_lanes(v[i]);
  }
  static inline float max_lanes(F v) { return join<float>(v, [](float a, float b) { return a > b ? a : b; }); }
  static inline int32_t max_lanes(I v) { return join<int32_t>(v, [](int32_t a, int32_t b) { return a > b ? a : b; }); }
};

}  // namespace
}  // namespace pentad
