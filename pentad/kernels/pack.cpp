#include "pack.h"

#include <cstring>

#include "plan.h"

namespace pentad {
namespace {

constexpr int LANES = 16;

// What each type's blocks take: columns and bytes of one of ggml's (ggml-common.h), bytes of 16 of them in a tile.
struct Sizes {
  int columns, block, tile;
};
Sizes sizes(int type) {
  switch (type) {
    case Q4_0: return {32, 18, 256 + 32};
    case Q4_1: return {32, 20, 256 + 64};
    case Q5_0: return {32, 22, 320 + 32};
    case Q5_1: return {32, 24, 320 + 64};
    case Q8_0: return {32, 34, 512 + 32};
    case Q4_K: return {256, 144, 64 + 8 * (256 + 32)};
    case Q5_K: return {256, 176, 64 + 8 * (320 + 32)};
    case Q6_K: return {256, 210, 32 + 8 * (384 + 32)};
    default: return {0, 0, 0};
  }
}

uint32_t word(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}
void put(uint8_t* p, uint32_t x) { std::memcpy(p, &x, 4); }
constexpr uint32_t LOW = 0x0f0f0f0f, HIGH = 0xf0f0f0f0;

// One of ggml's blocks, of row `lane` in its tile. ggml has nibbles in our order already, for types with blocks of 32:
// byte j has column j in its low nibble and column j + 16 in its high one.
void nibbles_32(const uint8_t* q, int lane, uint8_t* out) {
  for (int g = 0; g < 4; g++) put(out + 64 * g + 4 * lane, word(q + 4 * g));
}

void q4_0(const uint8_t* in, int lane, uint8_t* out) {
  nibbles_32(in + 2, lane, out);
  std::memcpy(out + 256 + 2 * lane, in, 2);
}

void q4_1(const uint8_t* in, int lane, uint8_t* out) {
  nibbles_32(in + 4, lane, out);
  std::memcpy(out + 256 + 2 * lane, in, 2);
  std::memcpy(out + 288 + 2 * lane, in + 2, 2);
}

// The fifth bits, of which ggml has column j's in bit j.
void bits_32(const uint8_t* q, int lane, uint8_t* out) {
  uint32_t bits = 0;
  for (int j = 0; j < 32; j++) bits |= (word(q) >> j & 1) << (j % 4 * 8 + j / 4);
  put(out + 4 * lane, bits);
}

void q5_0(const uint8_t* in, int lane, uint8_t* out) {
  nibbles_32(in + 6, lane, out);
  bits_32(in + 2, lane, out + 256);
  std::memcpy(out + 320 + 2 * lane, in, 2);
}

void q5_1(const uint8_t* in, int lane, uint8_t* out) {
  nibbles_32(in + 8, lane, out);
  bits_32(in + 4, lane, out + 256);
  std::memcpy(out + 320 + 2 * lane, in, 2);
  std::memcpy(out + 352 + 2 * lane, in + 2, 2);
}

void q8_0(const uint8_t* in, int lane, uint8_t* out) {
  for (int g = 0; g < 8; g++) put(out + 64 * g + 4 * lane, word(in + 2 + 4 * g) ^ 0x80808080);
  std::memcpy(out + 512 + 2 * lane, in, 2);
}

// 8 blocks of 32; 32 bytes have two of them, one in the low nibbles and one in the high. Scales and minimums are 6 bits
// each, in 12 bytes (get_scale_min_k4 in ggml-quants.c). Q5_K has 32 bytes more before the nibbles: of a column's byte,
// bit b is its fifth bit in block b.
template <bool Fifth> void q4_k(const uint8_t* in, int lane, uint8_t* out) {
  constexpr int integers = Fifth ? 320 : 256;
  std::memcpy(out + 2 * lane, in, 2);
  std::memcpy(out + 32 + 2 * lane, in + 2, 2);
  const uint8_t *d = in + 4, *m = in + 8, *low = in + 12, *high = in + 16, *q = high + (Fifth ? 32 : 0);
  for (int b = 0; b < 8; b++) {
    uint8_t* block = out + 64 + b * (integers + 32);
    const int i = b % 4;
    block[integers + 2 * lane] = b < 4 ? d[i] & 63 : (low[i] & 15) | (d[i] >> 2 & 48);
    block[integers + 2 * lane + 1] = b < 4 ? m[i] & 63 : low[i] >> 4 | (m[i] >> 2 & 48);
    if (Fifth) {
      uint32_t bits = 0;
      for (int g = 0; g < 8; g++) bits |= (word(high + 4 * g) >> b & 0x01010101) << g;
      put(block + 256 + 4 * lane, bits);
    }
    for (int g = 0; g < 4; g++) {
      const uint32_t first = word(q + b / 2 * 32 + 4 * g), second = word(q + b / 2 * 32 + 16 + 4 * g);
      put(block + 64 * g + 4 * lane, b % 2 ? (first >> 4 & LOW) | (second & HIGH) : (first & LOW) | (second & LOW) << 4);
    }
  }
}

// Low nibbles in 128 bytes, the high two bits in 64, a signed scale for 16 columns, d at the end. 128 columns at a time:
// 32 columns each in the low and high nibbles of two times 32 bytes, their high bits in the same order.
void q6_k(const uint8_t* in, int lane, uint8_t* out) {
  const uint8_t *low = in, *high = in + 128, *scales = in + 192;
  std::memcpy(out + 2 * lane, in + 208, 2);
  for (int b = 0; b < 8; b++) {
    uint8_t* block = out + 32 + b * 416;
    const uint8_t* l = low + b / 4 * 64 + b % 2 * 32;
    const uint8_t* h = high + b / 4 * 32;
    const int nibble = b % 4 / 2 * 4, pair = b % 4 * 2;
    for (int g = 0; g < 4; g++) {
      const uint32_t first = word(l + 4 * g) >> nibble & LOW, second = word(l + 16 + 4 * g) >> nibble & LOW;
      put(block + 64 * g + 4 * lane, first | second << 4);
    }
    for (int half = 0; half < 2; half++) {
      uint32_t bits = 0;
      for (int i = 0; i < 4; i++) bits |= (word(h + half * 16 + 4 * i) >> pair & 0x03030303) << 2 * i;
      put(block + 256 + 64 * half + 4 * lane, bits);
      block[384 + 2 * lane + half] = scales[b * 2 + half];
    }
  }
}

}  // namespace

int64_t packed_bytes(int type, int rows, int columns) {
  const Sizes s = sizes(type);
  if (s.columns == 0 || columns % s.columns) return 0;
  return int64_t(rows + LANES - 1) / LANES * (columns / s.columns) * s.tile;
}

void pack_tile(int type, const uint8_t* blocks, int rows, int columns, int tile, uint8_t* tiles) {
  const Sizes s = sizes(type);
  const int count = columns / s.columns;
  uint8_t* out = tiles + int64_t(tile) * count * s.tile;
  if (rows - tile * LANES < LANES) std::memset(out, 0, size_t(count) * s.tile);
  for (int lane = 0; lane < LANES && tile * LANES + lane < rows; lane++) {
    const uint8_t* in = blocks + int64_t(tile * LANES + lane) * count * s.block;
    for (int b = 0; b < count; b++) {
      const uint8_t* from = in + b * s.block;
      uint8_t* to = out + int64_t(b) * s.tile;
      switch (type) {
        case Q4_0: q4_0(from, lane, to); break;
        case Q4_1: q4_1(from, lane, to); break;
        case Q5_0: q5_0(from, lane, to); break;
        case Q5_1: q5_1(from, lane, to); break;
        case Q8_0: q8_0(from, lane, to); break;
        case Q4_K: q4_k<false>(from, lane, to); break;
        case Q5_K: q4_k<true>(from, lane, to); break;
        case Q6_K: q6_k(from, lane, to); break;
      }
    }
  }
}

}  // namespace pentad
