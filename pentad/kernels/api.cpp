// What Python calls. Arguments are checked there (binding.py); nothing here throws.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>

#include "pack.h"
#include "plan.h"
#include "pool.h"

using namespace pentad;

namespace {

const Kernels* const isas[] = {
#if defined(__x86_64__)
    &avx512_kernels, &avx2_kernels, &portable_kernels
#elif defined(__aarch64__)
    &neon_dotprod_kernels, &neon_kernels  // which each has
#else
    &portable_kernels
#endif
};
constexpr int ISAS = sizeof isas / sizeof *isas;

struct Running {
  const Op* ops;
  int count;
  const Step* step;
  const Kernels* kernels;
};

struct Packing {
  int type, rows, columns;
  const uint8_t* blocks;
  uint8_t* tiles;
};
constexpr int TILES_A_CHUNK = 8;
constexpr int OPS_AHEAD = 8;  // from a product to the next are at most so many

// Weights are read once a step, page after page: with large pages, where the system gives some for the asking, a
// matrix of tens of megabytes is read a third faster. Only what they cover whole, so that no memory is wasted.
void ask_for_large_pages([[maybe_unused]] uint8_t* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t first = (uintptr_t(memory) + page - 1) / page * page, end = (uintptr_t(memory) + bytes) / page * page;
  if (first < end) madvise((void*)first, end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Sizes of the structures, by which Python sees that its own are alike.
EXPORT int pentad_size_of_op() { return sizeof(Op); }
EXPORT int pentad_size_of_step() { return sizeof(Step); }

// The name of the index-th instruction set, fastest first; null where this CPU doesn't have it, "" after the last.
EXPORT const char* pentad_isa(int index) {
  if (index >= ISAS) return "";
  return isas[index]->runs_here() ? isas[index]->name : nullptr;
}

EXPORT int64_t pentad_packed_bytes(int type, int rows, int columns) { return packed_bytes(type, rows, columns); }

EXPORT void pentad_pack(int type, const uint8_t* blocks, int rows, int columns, uint8_t* tiles, int threads) {
  const Packing packing = {type, rows, columns, blocks, tiles};
  const auto chunks = [](const void* p, int) {
    return (((const Packing*)p)->rows + 16 * TILES_A_CHUNK - 1) / (16 * TILES_A_CHUNK);
  };
  const auto work = [](const void* context, int, int chunk) {
    const auto& p = *(const Packing*)context;
    for (int tile = chunk * TILES_A_CHUNK; tile < (chunk + 1) * TILES_A_CHUNK && tile * 16 < p.rows; tile++)
      pack_tile(p.type, p.blocks, p.rows, p.columns, tile, p.tiles);
  };
  ask_for_large_pages(tiles, packed_bytes(type, rows, columns));
  run_on_pool({1, chunks, work, nullptr, &packing}, threads);
}

EXPORT void pentad_run(const Op* ops, int count, const Step* step) {
  const Running running = {ops, count, step, isas[step->isa]};
  const auto chunks = [](const void* context, int phase) {
    const auto& r = *(const Running*)context;
    return r.kernels->chunks(r.ops[phase], *r.step);
  };
  const auto work = [](const void* context, int phase, int chunk) {
    const auto& r = *(const Running*)context;
    r.kernels->work(r.ops[phase], *r.step, chunk);
  };
  const auto next = [](const void* context, int phase, int share, int shares) {
    const auto& r = *(const Running*)context;
    Next found = {};
    for (int i = phase + 1; i < std::min(r.count, phase + OPS_AHEAD); i++) {
      const int chunks = r.kernels->chunks(r.ops[i], *r.step);
      if (chunks && r.kernels->reads(r.ops[i], *r.step, first_chunk(chunks, share, shares), found.at)) break;
    }
    return found;
  };
  run_on_pool({count, chunks, work, next, &running}, step->threads);
}

// In how many chunks an operation would be done; benchmarks/roofline.py counts with it.
EXPORT int pentad_chunks(const Op* op, const Step* step) { return isas[step->isa]->chunks(*op, *step); }

}  // extern "C"
