// The functions that Python calls. Python checks their arguments (program.py, weight.py); nothing here throws.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstddef>
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
    &neon_dotprod_kernels, &neon_kernels  // every such CPU has NEON
#else
    &portable_kernels
#endif
};
constexpr int ISAS = sizeof isas / sizeof *isas;

// What Python compares with its own declarations (binding.py): "Enum.NAME", "Struct.field" (its offset) and "Struct" (its
// size). It reads the values without a dot in their names.
struct Constant {
  const char* name;
  int64_t value;
};
#define VALUE(group, name) {#group "." #name, name}
#define FIELD(type, name) {#type "." #name, offsetof(type, name)}
const Constant constants[] = {
    VALUE(Type, F32), VALUE(Type, BF16), VALUE(Type, F16), VALUE(Type, Q4_0), VALUE(Type, Q4_1), VALUE(Type, Q8_0),
    VALUE(Type, Q4_K), VALUE(Type, Q6_K), VALUE(Type, Q5_0), VALUE(Type, Q5_1), VALUE(Type, Q5_K), VALUE(Type, I8),
    VALUE(OpKind, EMBED), VALUE(OpKind, NORM), VALUE(OpKind, QUANTIZE), VALUE(OpKind, MATMUL), VALUE(OpKind, GATED),
    VALUE(OpKind, ROTATE), VALUE(OpKind, ATTEND), VALUE(OpKind, MERGE), VALUE(OpKind, ROUTE), VALUE(OpKind, GATHER),
    VALUE(OpKind, COMBINE),
    VALUE(Flag, QUANTIZED), VALUE(Flag, CENTERED), VALUE(Flag, ADD), VALUE(Flag, WANTED), VALUE(Flag, PAIRS),
    VALUE(Flag, NORMALIZED), VALUE(Activation, LINEAR), VALUE(Activation, GELU),
    VALUE(Buffer, RESIDUAL), VALUE(Buffer, NORMED), VALUE(Buffer, PROJECTED), VALUE(Buffer, ATTENDED),
    VALUE(Buffer, GATES), VALUE(Buffer, LOGITS), VALUE(Buffer, SCORES), VALUE(Buffer, PAIRED), VALUE(Buffer, BLOCKS),
    VALUE(Buffer, PARTIALS), VALUE(Buffer, ROUTES),
    FIELD(Matrix, data), FIELD(Matrix, bias), FIELD(Matrix, stride), FIELD(Matrix, type), FIELD(Matrix, rows),
    FIELD(Matrix, columns), {"Matrix", sizeof(Matrix)},
    FIELD(Op, kind), FIELD(Op, flags), FIELD(Op, in), FIELD(Op, out), FIELD(Op, in_width), FIELD(Op, out_width),
    FIELD(Op, count), FIELD(Op, activation), FIELD(Op, layer), FIELD(Op, heads), FIELD(Op, kv_heads),
    FIELD(Op, head_dim), FIELD(Op, window), FIELD(Op, rotary_dim), FIELD(Op, log_scale_after), FIELD(Op, experts),
    FIELD(Op, capacity), FIELD(Op, eps), FIELD(Op, scale), FIELD(Op, weight), FIELD(Op, bias), FIELD(Op, weight2),
    FIELD(Op, bias2), FIELD(Op, w), {"Op", sizeof(Op)},
    FIELD(Step, rows), FIELD(Step, wanted), FIELD(Step, sequences), FIELD(Step, threads), FIELD(Step, fast),
    FIELD(Step, isa), FIELD(Step, page_size), FIELD(Step, cache_type), FIELD(Step, padded_dim),
    FIELD(Step, block_table_width), FIELD(Step, ids), FIELD(Step, positions), FIELD(Step, wanted_rows),
    FIELD(Step, cu_seqlens), FIELD(Step, lengths), FIELD(Step, dropped), FIELD(Step, block_tables), FIELD(Step, limits),
    FIELD(Step, rotations), FIELD(Step, keys), FIELD(Step, values), FIELD(Step, buffers), {"Step", sizeof(Step)},
    {"LANES", LANES}, {"BLOCK", BLOCK}, {"MAX_HEAD_DIM", MAX_HEAD_DIM}, {"MAX_STEP_ROWS", MAX_STEP_ROWS},
    {"MAX_SIZE", MAX_SIZE}, {nullptr, 0}};

struct PlanContext {
  const Op* ops;
  int count;
  const Step* step;
  const Kernels* kernels;
};
constexpr int MAX_OPS_TO_PRODUCT = 8;  // from one product to the next

struct PackContext {
  int type, rows, columns;
  const uint8_t* blocks;
  uint8_t* tiles;
};
constexpr int TILES_PER_CHUNK = 8;

// A step reads all weights once, page by page. With large pages a matrix of tens of megabytes is read a third faster. Only
// the large pages that the matrix covers entirely are requested, so no memory is wasted.
void request_large_pages([[maybe_unused]] uint8_t* memory, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t first = (uintptr_t(memory) + page - 1) / page * page, end = (uintptr_t(memory) + bytes) / page * page;
  if (first < end) madvise((void*)first, end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// The name and value of the index-th constant; null after the last.
EXPORT const char* pentad_constant(int index, int64_t* value) { return *value = constants[index].value, constants[index].name; }

// The name of the index-th instruction set, fastest first; null if this CPU lacks it, "" after the last.
EXPORT const char* pentad_isa(int index) {
  if (index >= ISAS) return "";
  return isas[index]->runs_here() ? isas[index]->name : nullptr;
}

EXPORT int64_t pentad_row_bytes(int type, int columns) { return row_bytes(type, columns); }

EXPORT int64_t pentad_packed_bytes(int type, int rows, int columns) { return packed_bytes(type, rows, columns); }

EXPORT void pentad_pack(int type, const uint8_t* blocks, int rows, int columns, uint8_t* tiles, int threads) {
  const PackContext packing = {type, rows, columns, blocks, tiles};
  const auto chunks = [](const void* p, int) {
    return (((const PackContext*)p)->rows + LANES * TILES_PER_CHUNK - 1) / (LANES * TILES_PER_CHUNK);
  };
  const auto work = [](const void* context, int, int chunk) {
    const auto& p = *(const PackContext*)context;
    for (int tile = chunk * TILES_PER_CHUNK; tile < (chunk + 1) * TILES_PER_CHUNK && tile * LANES < p.rows; tile++)
      pack_tile(p.type, p.blocks, p.rows, p.columns, tile, p.tiles);
  };
  request_large_pages(tiles, packed_bytes(type, rows, columns));
  run_on_pool({1, chunks, work, nullptr, &packing}, threads);
}

// The floats that each of the step's BUFFERS needs.
EXPORT void pentad_buffer_sizes(const Op* ops, int count, const Step* step, int64_t* floats) {
  isas[step->isa]->buffer_sizes(ops, count, *step, floats);
}

EXPORT void pentad_run(const Op* ops, int count, const Step* step) {
  const PlanContext plan = {ops, count, step, isas[step->isa]};
  const auto chunks = [](const void* context, int phase) {
    const auto& p = *(const PlanContext*)context;
    return p.kernels->chunks(p.ops[phase], *p.step);
  };
  const auto work = [](const void* context, int phase, int chunk) {
    const auto& p = *(const PlanContext*)context;
    p.kernels->work(p.ops[phase], *p.step, chunk);
  };
  const auto prefetch = [](const void* context, int phase, int share, int shares) {
    const auto& p = *(const PlanContext*)context;
    Prefetch found = {};
    for (int i = phase + 1; i < std::min(p.count, phase + MAX_OPS_TO_PRODUCT); i++) {
      const int chunks = p.kernels->chunks(p.ops[i], *p.step), first = first_chunk(chunks, share, shares);
      if (chunks && p.kernels->weight_addresses(p.ops[i], *p.step, first, found.addresses)) break;
    }
    return found;
  };
  run_on_pool({count, chunks, work, prefetch, &plan}, step->threads);
}

// The chunks of an operation, for benchmarks/roofline.py.
EXPORT int pentad_chunks(const Op* op, const Step* step) { return isas[step->isa]->chunks(*op, *step); }

}  // extern "C"
