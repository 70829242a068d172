// The arithmetic of a plan, as templates over an instruction set. Each set is one short file that defines `Isa`,
// includes this one and is compiled with its own flags; all is in an unnamed namespace, so that no linker mixes them.
#pragma once
#include <type_traits>

#include "attention.h"
#include "mixture.h"

namespace pentad {
namespace {

// In how many chunks an operation is done.
int chunks(const Op& op, const Step& s) {
  int count = 0;
  switch (op.kind) {
    case MATMUL:
    case GATED: return chunks_of_product(op, s);
    case ROUTE: return 1;
    case ATTEND:
      for (int b = 0; b < s.sequences; b++) count += chunks_of(op, sight(op, s, b));
      return count;
    case MERGE:
      for (int b = 0; b < s.sequences; b++) count += sight(op, s, b).few;
      return count;
    default: return ceil_div(rows_of(op, s), rows_a_chunk(op));
  }
}

int reads(const Op& op, const Step& s, int chunk, const uint8_t** at) {
  const bool known = (op.kind == MATMUL || op.kind == GATED) && !(op.flags & PAIRS);  // pairs depend on the routing
  return known ? places(op, s, chunk, at) : 0;
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
    case MERGE: return merge_parts(op, s, chunk);
    case ROUTE: return route(op, s);
    case GATHER: return gather(op, s, chunk);
    case COMBINE: return combine(op, s, chunk);
  }
}

}  // namespace
}  // namespace pentad
