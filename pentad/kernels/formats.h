// The layout of each quantized type, in ggml's blocks (ggml-common.h) and in the tiles of products.h.
#pragma once
#include <cstddef>

#include "plan.h"

namespace pentad {
namespace {

// `bytes`: the size of one of ggml's blocks, of span * BLOCK columns. In a tile, `span` blocks share a head of `head` bytes;
// a block is `integers` bytes of integers, followed by the scales. `shift`: integers are stored with an offset of
// 2^shift (-1: none). `minimum`: a number is d * integer + m. `halves`: columns 0-15 and 16-31 have separate scales.
template <int T> struct Format;
template <int Bytes, int Head, int Span, int Integers, int Scales, int Shift, bool Minimum, bool Halves> struct Layout {
  static constexpr int bytes = Bytes, head = Head, span = Span, block = Integers + Scales, shift = Shift;
  static constexpr bool minimum = Minimum, halves = Halves;
};
template <> struct Format<Q4_0> : Layout<18, 0, 1, 256, 32, 3, false, false> {};
template <> struct Format<Q4_1> : Layout<20, 0, 1, 256, 64, -1, true, false> {};
template <> struct Format<Q5_0> : Layout<22, 0, 1, 320, 32, 4, false, false> {};
template <> struct Format<Q5_1> : Layout<24, 0, 1, 320, 64, -1, true, false> {};
template <> struct Format<Q8_0> : Layout<34, 0, 1, 512, 32, 7, false, false> {};
template <> struct Format<Q4_K> : Layout<144, 64, 8, 256, 32, -1, true, false> {};
template <> struct Format<Q5_K> : Layout<176, 64, 8, 320, 32, -1, true, false> {};
template <> struct Format<Q6_K> : Layout<210, 32, 8, 384, 32, 5, false, true> {};

template <int T> constexpr size_t span_bytes = Format<T>::head + Format<T>::span * Format<T>::block;
template <int T> constexpr size_t tile_bytes(int columns) {
  return size_t(columns / BLOCK / Format<T>::span) * span_bytes<T>;
}

}  // namespace
}  // namespace pentad
