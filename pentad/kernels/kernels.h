// A plan's operations as templates over an instruction set. Each set is one short file that defines `Isa`, includes this
// header and is compiled with its own flags. Everything is in an unnamed namespace, so that the linker can't merge
// functions that were compiled for different CPUs.
#pragma once
#include <type_traits>

#include "attention.h"
#include "convolution.h"
#include "grid.h"
#include "mixture.h"
#include "sample.h"

namespace pentad {
namespace {

int chunks(const Op& op, const Step& s) {
  int count = 0;
  switch (op.kind) {
    case MATMUL:
    case GATED: return chunks_of_product(op, s);
    case ROUTE: return 1;
    case ATTEND:
      for (int b = 0; b < s.sequences; b++) count += chunks_of(op, attention_range(op, s, b));
      return count;
    case MERGE:
      for (int b = 0; b < s.sequences; b++) count += attention_range(op, s, b).split_keys;
      return count;
    default: return ceil_div(rows_of(op, s), rows_per_chunk(op));
  }
}

int weight_addresses(const Op& op, const Step& s, int chunk, const uint8_t** addresses) {
  const bool known = (op.kind == MATMUL || op.kind == GATED) && !(op.flags & PAIRS);  // pairs depend on the routing
  return known ? product_addresses(op, s, chunk, addresses) : 0;
}

void buffer_sizes(const Op* ops, int count, const Step& s, int64_t* floats) {
  const auto reserve = [&](int buffer, int64_t size) { floats[buffer] = floats[buffer] < size ? size : floats[buffer]; };
  const int64_t block_bytes = s.fast ? sizeof(Activations<false>) : sizeof(Activations<true>);
  int experts_per_row = 0;
  std::memset(floats, 0, BUFFERS * sizeof *floats);
  for (const Op* op = ops; op < ops + count; op++) {
    if (op->kind == ROUTE) experts_per_row = op->count, reserve(ROUTES, Routes::size(*op, s));
    if (op->kind == ATTEND) reserve(PARTIALS, partials_size(*op, s));
    const int64_t rows = op->flags & WANTED ? s.wanted : op->flags & PAIRS ? int64_t(s.rows) * experts_per_row : s.rows;
    reserve(op->out, rows * op->out_width);
    if (op->kind == QUANTIZE || op->flags & QUANTIZED) reserve(BLOCKS, rows * (op->in_width / BLOCK) * block_bytes / 4);
  }
}

template <class Call> INLINE void by_cache_type(const Step& s, Call call) {
  switch (s.cache_type) {
    case F32: return call(std::integral_constant<int, F32>());
    case F16: return call(std::integral_constant<int, F16>());
    case BF16: return call(std::integral_constant<int, BF16>());
    case I8: return call(std::integral_constant<int, I8>());
  }
}

void work(const Op& op, const Step& s, int chunk) {
  switch (op.kind) {
    case EMBED: return embed(op, s, chunk);
    case NORM: return norm(op, s, chunk);
    case QUANTIZE: return quantize(op, s, chunk);
    case MATMUL:
    case GATED: return matmul(op, s, chunk);
    case ROTATE: return by_cache_type(s, [&](auto type) { rotate_rows<type()>(op, s, chunk); });
    case ATTEND: return by_cache_type(s, [&](auto type) { attend_rows<type()>(op, s, chunk); });
    case MERGE: return merge_partials(op, s, chunk);
    case ROUTE: return route(op, s);
    case GATHER: return gather(op, s, chunk);
    case COMBINE: return combine(op, s, chunk);
  }
}

}  // namespace
}  // namespace pentad
