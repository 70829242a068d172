// NEON with dot products: Arm's cores since the Cortex-A75, Apple's since the A11.
#include "neon.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

namespace pentad {
namespace {

struct Isa : Neon {
  template <bool Wide> static inline I dot(I sum, B w, int32_t x) {
    return signed_dot<Wide>(sum, w, x, [](int32x4_t s, int8x16_t v, int8x16_t b) { return vdotq_s32(s, v, b); });
  }
};

bool runs_here() {
#if defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#elif defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return false;
#endif
}

}  // namespace
}  // namespace pentad

#include "kernels.h"

namespace pentad {
const Kernels neon_dotprod_kernels = {"neon-dotprod", runs_here, chunks, work, weight_addresses, buffer_sizes, sample, conv_chunks,
    conv_work, grid_chunks, grid_work};
}
