// NEON: any 64-bit Arm.
#include "neon.h"

namespace pentad {
namespace {

struct Isa : Neon {
  template <bool Wide> static inline I dot(I sum, B w, int32_t x) {
    return signed_dot<Wide>(sum, w, x, [](int32x4_t s, int8x16_t v, int8x16_t b) {
      const int16x8_t first = vmull_s8(vget_low_s8(v), vget_low_s8(b)), last = vmull_high_s8(v, b);
      // the sum of two products fits in 16 bits if weights have 6 bits; with 8 bits, (-128)^2 + (-128)^2 overflows
      if (Wide) return vaddq_s32(s, vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(last)));
      return vpadalq_s16(s, vpaddq_s16(first, last));
    });
  }
};

bool runs_here() { return true; }

}  // namespace
}  // namespace pentad

#include "kernels.h"

namespace pentad {
const Kernels neon_kernels = {"neon", runs_here, chunks, work, weight_addresses, buffer_sizes, sample, conv_chunks,
    conv_work, grid_chunks, grid_work};
}
