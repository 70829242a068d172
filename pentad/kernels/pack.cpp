#include "pack.h"

#include <cstring>

#include "formats.h"

namespace pentad {
namespace {

uint32_t word(const uint8_t* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}
void put(uint8_t* p, uint32_t x) { std::memcpy(p, &x, 4); }
constexpr uint32_t LOW = 0x0f0f0f0f, HIGH = 0xf0f0f0f0;

// Each function packs one of ggml's blocks into row `lane` of the tile. In ggml's types with blocks of 32, nibbles are in
// the tile's order already: byte j holds column j in its low nibble and column j + 16 in its high nibble.
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

// The fifth bits: ggml stores that of column j in bit j.
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

// 8 blocks of 32 columns. Each 32 bytes hold two blocks, one in the low and one in the high nibbles. Scales and minimums
// have 6 bits each, packed into 12 bytes (get_scale_min_k4 in ggml-quants.c). Q5_K has 32 more bytes before the nibbles:
// bit b of a column's byte is its fifth bit in block b.
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

// 128 bytes of low nibbles, 64 bytes of high bit pairs, a signed scale for each 16 columns, then d. For each 128 columns,
// the nibbles of 2 x 32 bytes hold 4 x 32 columns: first both groups of low nibbles, then both groups of high nibbles. The
// high bits are in the same order.
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

struct Packer {
  int columns, bytes, tile;  // columns and bytes of one of ggml's blocks; bytes of 16 such blocks in a tile
  void (*pack)(const uint8_t* in, int lane, uint8_t* out);
};
template <int T> constexpr Packer make(void (*pack)(const uint8_t*, int, uint8_t*)) {
  return {BLOCK * Format<T>::span, Format<T>::bytes, int(span_bytes<T>), pack};
}
// By Type; all zeros for a type without blocks.
constexpr Packer packers[] = {{}, {}, {}, make<Q4_0>(q4_0), make<Q4_1>(q4_1), make<Q8_0>(q8_0), make<Q4_K>(q4_k<false>),
                              make<Q6_K>(q6_k), make<Q5_0>(q5_0), make<Q5_1>(q5_1), make<Q5_K>(q4_k<true>), {}};

}  // namespace

int64_t row_bytes(int type, int columns) {
  const Packer& p = packers[type];
  return p.columns == 0 || columns % p.columns ? 0 : int64_t(columns / p.columns) * p.bytes;
}

int64_t packed_bytes(int type, int rows, int columns) {
  const Packer& p = packers[type];
  if (p.columns == 0 || columns % p.columns) return 0;
  return int64_t(rows + LANES - 1) / LANES * (columns / p.columns) * p.tile;
}

void pack_tile(int type, const uint8_t* blocks, int rows, int columns, int tile, uint8_t* tiles) {
  const Packer& p = packers[type];
  const int count = columns / p.columns;
  uint8_t* out = tiles + int64_t(tile) * count * p.tile;
  if (rows - tile * LANES < LANES) std::memset(out, 0, size_t(count) * p.tile);
  for (int lane = 0; lane < LANES && tile * LANES + lane < rows; lane++) {
    const uint8_t* in = blocks + int64_t(tile * LANES + lane) * count * p.bytes;
    for (int b = 0; b < count; b++) p.pack(in + int64_t(b) * p.bytes, lane, out + int64_t(b) * p.tile);
  }
}

}  // namespace pentad
