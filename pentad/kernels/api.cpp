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

// binding.py compares these with its declarations: "Enum.NAME", "Struct.field" (its offset) and "Struct" (its size). It
// doesn't declare the other constants; it reads them here.
struct Constant {
  const char* name;
  int64_t value;
};
#define V(group, name) {#group "." #name, name}
#define F(type, name) {#type "." #name, offsetof(type, name)}
constexpr Constant constants[] = {
    V(Type, F32), V(Type, BF16), V(Type, F16), V(Type, Q4_0), V(Type, Q4_1), V(Type, Q8_0), V(Type, Q4_K),
    V(Type, Q6_K), V(Type, Q5_0), V(Type, Q5_1), V(Type, Q5_K), V(Type, I8), V(OpKind, EMBED), V(OpKind, NORM),
    V(OpKind, QUANTIZE), V(OpKind, MATMUL), V(OpKind, GATED), V(OpKind, ROTATE), V(OpKind, ATTEND), V(OpKind, MERGE),
    V(OpKind, ROUTE), V(OpKind, GATHER), V(OpKind, COMBINE), V(Flag, QUANTIZED), V(Flag, CENTERED), V(Flag, ADD),
    V(Flag, WANTED), V(Flag, PAIRS), V(Flag, NORMALIZED), V(Activation, LINEAR), V(Activation, GELU),
    V(Buffer, RESIDUAL), V(Buffer, NORMED), V(Buffer, PROJECTED), V(Buffer, ATTENDED), V(Buffer, GATES),
    V(Buffer, LOGITS), V(Buffer, SCORES), V(Buffer, PAIRED), V(Buffer, BLOCKS), V(Buffer, PARTIALS), V(Buffer, ROUTES),
    F(Matrix, data), F(Matrix, bias), F(Matrix, stride), F(Matrix, type), F(Matrix, rows), F(Matrix, columns),
    {"Matrix", sizeof(Matrix)}, F(Op, kind), F(Op, flags), F(Op, in), F(Op, out), F(Op, in_width), F(Op, out_width),
    F(Op, count), F(Op, activation), F(Op, layer), F(Op, heads), F(Op, kv_heads), F(Op, head_dim), F(Op, window),
    F(Op, rotary_dim), F(Op, log_scale_after), F(Op, experts), F(Op, capacity), F(Op, eps), F(Op, scale), F(Op, weight),
    F(Op, bias), F(Op, weight2), F(Op, bias2), F(Op, w), {"Op", sizeof(Op)}, F(Step, rows), F(Step, wanted),
    F(Step, sequences), F(Step, threads), F(Step, fast), F(Step, isa), F(Step, page_size), F(Step, cache_type),
    F(Step, padded_dim), F(Step, block_table_width), F(Step, ids), F(Step, positions), F(Step, wanted_rows),
    F(Step, cu_seqlens), F(Step, lengths), F(Step, dropped), F(Step, block_tables), F(Step, limits), F(Step, rotations),
    F(Step, keys), F(Step, values), F(Step, buffers), {"Step", sizeof(Step)}, F(Draw, logits), F(Draw, temperature),
    F(Draw, top_k), F(Draw, top_p), F(Draw, min_p), F(Draw, uniform), F(Draw, largest), F(Draw, token),
    {"Draw", sizeof(Draw)}, V(ConvKind, CONVOLVE), V(ConvKind, DEPTHWISE), V(ConvKind, MAXPOOL), V(ConvKind, REPEAT),
    V(ConvActivation, NONE), V(ConvActivation, LEAKY), V(ConvActivation, RELU), V(ConvActivation, MISH),
    V(ConvActivation, SWISH), V(ConvActivation, LOGISTIC), F(ConvOp, kind), F(ConvOp, activation),
    F(ConvOp, add_activation), F(ConvOp, batch), F(ConvOp, in_height), F(ConvOp, in_width), F(ConvOp, in_channels),
    F(ConvOp, out_height), F(ConvOp, out_width), F(ConvOp, out_channels), F(ConvOp, size), F(ConvOp, stride),
    F(ConvOp, pad_top), F(ConvOp, pad_left), F(ConvOp, in_stride), F(ConvOp, out_stride), F(ConvOp, add_stride),
    F(ConvOp, in), F(ConvOp, add), F(ConvOp, out), F(ConvOp, weight), F(ConvOp, bias), F(ConvOp, zeros),
    {"ConvOp", sizeof(ConvOp)}, F(GridOp, images), F(GridOp, side), F(GridOp, window), F(GridOp, heads), F(GridOp, dim),
    F(GridOp, offsets), F(GridOp, scale), F(GridOp, q), F(GridOp, k), F(GridOp, v), F(GridOp, out), F(GridOp, k_padding),
    F(GridOp, v_padding), F(GridOp, positions), F(GridOp, packed), {"GridOp", sizeof(GridOp)}, {"LANES", LANES}, {"BLOCK", BLOCK},
    {"MAX_HEAD_DIM", MAX_HEAD_DIM}, {"MAX_STEP_ROWS", MAX_STEP_ROWS}, {"MAX_SIZE", MAX_SIZE},
    {"MAX_CONV_SIZE", MAX_CONV_SIZE}, {"MAX_GRID_SIDE", MAX_GRID_SIDE}, {"MAX_GRID_DIM", MAX_GRID_DIM}, {nullptr, 0}};

struct PlanContext {
  const Op* ops;
  int count;
  const Step* step;
  const Kernels* kernels;
};
constexpr int MAX_OPS_TO_PRODUCT = 8;  // from one matmul to the next

struct PackContext {
  int type, rows, columns;
  const uint8_t* blocks;
  uint8_t* tiles;
};
constexpr int TILES_PER_CHUNK = 8;

// Requests large pages for a matrix: matrices of tens of megabytes are then read a third faster. Only large pages that
// the matrix covers entirely are requested, so no memory is wasted.
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

EXPORT void pentad_sample(int isa, Draw* draws, int rows, int vocab, float* scratch) {
  isas[isa]->sample(draws, rows, vocab, scratch);
}

EXPORT void pentad_convolve(const ConvOp* ops, int count, int isa, int threads) {
  struct Context {
    const ConvOp* ops;
    const Kernels* kernels;
  } context = {ops, isas[isa]};
  const auto chunks = [](const void* p, int phase) {
    const auto& c = *(const Context*)p;
    return c.kernels->conv_chunks(c.ops[phase]);
  };
  const auto work = [](const void* p, int phase, int chunk) {
    const auto& c = *(const Context*)p;
    c.kernels->conv_work(c.ops[phase], chunk);
  };
  run_on_pool({count, chunks, work, nullptr, &context}, threads);
}

EXPORT void pentad_attend_grid(const GridOp* op, int isa, int threads) {
  struct Context {
    const GridOp* op;
    const Kernels* kernels;
  } context = {op, isas[isa]};
  const auto chunks = [](const void* p, int phase) {
    const auto& c = *(const Context*)p;
    return c.kernels->grid_chunks(*c.op, phase);
  };
  const auto work = [](const void* p, int phase, int chunk) {
    const auto& c = *(const Context*)p;
    c.kernels->grid_work(*c.op, phase, chunk);
  };
  run_on_pool({2, chunks, work, nullptr, &context}, threads);
}

// The number of chunks of an operation, for benchmarks/roofline.py.
EXPORT int pentad_chunks(const Op* op, const Step* step) { return isas[step->isa]->chunks(*op, *step); }

}  // extern "C"
