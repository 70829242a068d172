// Operations on rows: matrix products and their division into chunks, norms, quantization, embedding.
#pragma once
#include "products.h"

namespace pentad {
namespace {

INLINE float* buffer(const Step& s, int index) { return (float*)s.buffers[index]; }
INLINE Inputs inputs(const Op& op, const Step& s) { return {s.buffers[BLOCKS], buffer(s, op.in), op.in_width}; }

// [experts]: the ends of the experts' pairs, as routed by mixture.h.
INLINE const int32_t* ends_of(const Step& s) { return (const int32_t*)s.buffers[ROUTES]; }

INLINE int rows_of(const Op& op, const Step& s) {
  return op.flags & PAIRS ? ends_of(s)[op.experts - 1] : op.flags & WANTED ? s.wanted : s.rows;
}

// The division of a matmul's tiles and rows into chunks. With PAIRS, each expert's rows are divided separately.
struct Tiling {
  int tiles, tiles_per_chunk, chunks_across, rows_per_chunk;  // chunks_across: chunks that cover all tiles
};
INLINE int tiles_of(const Op& op) {
  int tiles = 0;
  for (int i = 0; i < (op.kind == GATED ? 1 : op.count); i++) tiles += ceil_div(op.w[i].rows, LANES);
  return tiles;
}
INLINE Tiling tiling(const Op& op, const Step& s) {
  const int tiles = tiles_of(op), each = min(ceil_div(tiles, 3 * s.threads), 32);
  return {tiles, each, ceil_div(tiles, each), 128};
}
INLINE int chunks_of_product(const Op& op, const Step& s) {
  const Tiling c = tiling(op, s);
  if (!(op.flags & PAIRS)) return c.chunks_across * ceil_div(rows_of(op, s), c.rows_per_chunk);
  int count = 0;
  for (int e = 0, start = 0; e < op.experts; start = ends_of(s)[e++]) count += ceil_div(ends_of(s)[e] - start, c.rows_per_chunk);
  return c.chunks_across * count;
}

// One chunk of a matmul.
struct Chunk {
  int first, last;  // tiles
  int first_row, last_row;
  int expert;
};
INLINE Chunk product_chunk(const Op& op, const Step& s, int chunk) {
  const Tiling c = tiling(op, s);
  const int first = chunk % c.chunks_across * c.tiles_per_chunk, last = min(c.tiles, first + c.tiles_per_chunk);
  int block = chunk / c.chunks_across, expert = 0, start = 0, end = rows_of(op, s);
  if (op.flags & PAIRS)
    for (;; start = ends_of(s)[expert++]) {
      end = ends_of(s)[expert];
      const int blocks = ceil_div(end - start, c.rows_per_chunk);
      if (block < blocks) break;
      block -= blocks;
    }
  start += block * c.rows_per_chunk;
  return {first, last, start, min(end, start + c.rows_per_chunk), expert};
}

// The position of a tile among an operation's matrices, which lie side by side.
struct TilePosition {
  int matrix, tile, column;  // the tile within the matrix; the column of `out` where the matrix begins
};
INLINE TilePosition tile_position(const Op& op, int tile) {
  TilePosition p = {0, tile, 0};
  if (op.kind == MATMUL)
    for (int tiles; p.tile >= (tiles = ceil_div(op.w[p.matrix].rows, LANES)); p.tile -= tiles) p.column += op.w[p.matrix++].rows;
  return p;
}

// Stores the addresses where a chunk's weights begin, and returns how many there are.
int product_addresses(const Op& op, const Step& s, int chunk, const uint8_t** addresses) {
  const TilePosition p = tile_position(op, product_chunk(op, s, chunk).first);
  const int count = op.kind == GATED ? op.count : 1;
  for (int i = 0; i < count; i++) addresses[i] = tile_at_by_type[op.w[p.matrix + i].type](op.w[p.matrix + i], p.tile);
  return count;
}

INLINE F silu(F x) { return x / (exponential(-x) + 1.0f); }
// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), by tanh(z) = 2 / (1 + e^(-2 z)) - 1
INLINE F gelu(F x) { return x / (exponential(x * (x * x * 0.044715f + 1.0f) * -1.5957691216f) + 1.0f); }

void matmul(const Op& op, const Step& s, int chunk) {
  const Chunk p = product_chunk(op, s, chunk);
  const Inputs in = inputs(op, s);
  for (int tile = p.first; tile < p.last; tile++) {
    const TilePosition at = tile_position(op, tile);
    const int lanes = min(LANES, op.w[at.matrix].rows - at.tile * LANES);
    const auto multiply = [&](int i, int row, int rows, F* y) {
      Matrix m = op.w[i];
      m.data += p.expert * m.stride;
      multiply_some<ROWS_PER_PASS>(m, at.tile, in, row, rows, s.fast, y);
      if (m.bias)
        for (int r = 0; r < rows; r++) y[r] += load_part(m.bias + at.tile * LANES, lanes);
    };
    for (int row = p.first_row; row < p.last_row; row += ROWS_PER_PASS) {
      const int rows = min(ROWS_PER_PASS, p.last_row - row);
      F y[ROWS_PER_PASS], factor[ROWS_PER_PASS];
      multiply(at.matrix, row, rows, y);
      if (op.kind == GATED) {
        for (int r = 0; r < rows; r++) y[r] = silu(y[r]);
        for (int i = 1; i < op.count; i++) {
          multiply(i, row, rows, factor);
          for (int r = 0; r < rows; r++) y[r] *= factor[r];
        }
      }
      for (int r = 0; r < rows; r++) {
        float* out = buffer(s, op.out) + ptrdiff_t(row + r) * op.out_width + at.column + at.tile * LANES;
        if (op.activation == GELU) y[r] = gelu(y[r]);
        if (op.flags & ADD) y[r] += load_part(out, lanes);
        std::memcpy(out, &y[r], lanes * sizeof(float));
      }
    }
  }
}

template <bool Exact> INLINE void quantize_row(const Step& s, const float* x, int row, int width) {
  auto* out = (Activations<Exact>*)s.buffers[BLOCKS] + ptrdiff_t(row) * (width / BLOCK);
  for (int b = 0; b < width / BLOCK; b++) quantize_block(x + b * BLOCK, out[b]);
}
INLINE void quantize_row(const Step& s, const float* x, int row, int width) {
  s.fast ? quantize_row<false>(s, x, row, width) : quantize_row<true>(s, x, row, width);
}

INLINE F load_from(const float* x, int at, int width) {  // zeros after the end of the row
  return at + LANES <= width ? load<F>(x + at) : load_part(x + at, width - at);
}
INLINE float mean(const float* x, int width) {
  F sum = {};
  for (int i = 0; i < width; i += LANES) sum += load_from(x, i, width);
  return Isa::sum_lanes(sum) / width;
}
INLINE float mean_square(const float* x, float mean, int width) {
  F sum = {};
  for (int i = 0; i < width; i += LANES) {
    F v = load_from(x, i, width) - mean;
    if (i + LANES > width)
      for (int j = width - i; j < LANES; j++) v[j] = 0;
    sum = Isa::fma(v, v, sum);
  }
  return Isa::sum_lanes(sum) / width;
}

// y = x / rms(x) * weight + bias. If `centered`, the mean is subtracted from x first.
INLINE void normalize(const float* x, const float* weight, const float* bias, bool centered, float eps, int width, float* y) {
  const float center = centered ? mean(x, width) : 0.0f;
  const float inverse = 1.0f / __builtin_sqrtf(mean_square(x, center, width) + eps);
  for (int i = 0; i < width; i += LANES) {
    F v = (load_from(x, i, width) - center) * inverse * load_from(weight, i, width);
    if (bias) v += load_from(bias, i, width);
    if (i + LANES <= width) store(y + i, v);
    else std::memcpy(y + i, &v, (width - i) * sizeof(float));
  }
}

// For operations that process rows independently. A chunk is small enough to run on one thread while the others wait.
constexpr int rows_per_chunk(const Op& op) { return op.kind == ROTATE ? 2 : 4; }

INLINE int last_row_of(const Op& op, const Step& s, int chunk) {
  return min(rows_of(op, s), (chunk + 1) * rows_per_chunk(op));
}

void norm(const Op& op, const Step& s, int chunk) {
  for (int row = chunk * rows_per_chunk(op); row < last_row_of(op, s, chunk); row++) {
    const int in_row = op.flags & WANTED ? s.wanted_rows[row] : row;
    float* y = buffer(s, op.out) + ptrdiff_t(row) * op.in_width;
    normalize(buffer(s, op.in) + ptrdiff_t(in_row) * op.in_width, op.weight, op.bias, op.flags & CENTERED, op.eps,
              op.in_width, y);
    if (op.flags & QUANTIZED) quantize_row(s, y, row, op.in_width);
  }
}

void quantize(const Op& op, const Step& s, int chunk) {
  for (int row = chunk * rows_per_chunk(op); row < last_row_of(op, s, chunk); row++)
    quantize_row(s, buffer(s, op.in) + ptrdiff_t(row) * op.in_width, row, op.in_width);
}

// One row of a quantized weight as floats.
template <int T> void dequantize(const Matrix& m, int row, float* out) {
  using Fmt = Format<T>;
  const uint8_t* block = m.data + tile_bytes<T>(m.columns) * (row / LANES);
  const int lane = row % LANES;
  for (int b = 0; b < m.columns / BLOCK; b += Fmt::span) {
    const uint8_t* head = block;
    block += Fmt::head;
    for (int i = b; i < b + Fmt::span; i++, block += Fmt::block) {
      B w[8];
      integers<T>(block, w);
      const Scales s = scales<T>(head, block);
      constexpr int offset = Fmt::shift > 0 ? 1 << (Fmt::shift & 31) : 0;
      for (int c = 0; c < BLOCK; c++) {
        const float n = float(w[c / 4][lane * 4 + c % 4] - offset) * (Fmt::halves ? (c < 16 ? s.first : s.last)[lane] : 1.0f);
        out[i * BLOCK + c] = n * s.d[lane] + (Fmt::minimum ? s.m[lane] : 0.0f);
      }
    }
  }
}
template <int T> void copy_row(const Matrix& m, int row, float* out) {
  const uint8_t* from = m.data + ptrdiff_t(row) * m.columns * size_of(T);
  for (int k = 0; k < m.columns; k += LANES) {
    const int count = min(LANES, m.columns - k);
    const F v = floats_part<T>(from + ptrdiff_t(k) * size_of(T), count);
    std::memcpy(out + k, &v, count * sizeof(float));
  }
}

void embed(const Op& op, const Step& s, int chunk) {
  using Read = void (*)(const Matrix&, int, float*);
  constexpr Read read[] = {copy_row<F32>,    copy_row<BF16>,   copy_row<F16>,    dequantize<Q4_0>,
                           dequantize<Q4_1>, dequantize<Q8_0>, dequantize<Q4_K>, dequantize<Q6_K>,
                           dequantize<Q5_0>, dequantize<Q5_1>, dequantize<Q5_K>};
  for (int row = chunk * rows_per_chunk(op); row < last_row_of(op, s, chunk); row++)
    read[op.w[0].type](op.w[0], s.ids[row], buffer(s, op.out) + ptrdiff_t(row) * op.out_width);
}

}  // namespace
}  // namespace pentad
