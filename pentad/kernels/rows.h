// Operations on rows: products with their cut into chunks, norms, quantization, embedding.
#pragma once
#include "products.h"

namespace pentad {
namespace {

INLINE float* buffer(const Step& s, int index) { return (float*)s.buffers[index]; }
INLINE int rows_of(const Op& op, const Step& s) { return op.flags & WANTED ? s.wanted : s.rows; }
INLINE Inputs inputs(const Op& op, const Step& s) { return {s.buffers[BLOCKS_BUFFER], buffer(s, op.in), op.in_width}; }

// How the tiles and the rows of a product are cut into chunks.
struct Cut {
  int tiles, tiles_a_chunk, columns;  // chunks side by side: `columns` of them over the tiles
  int rows, rows_a_chunk, chunks;
};
INLINE int tiles_of(const Op& op) {
  int tiles = 0;
  for (int i = 0; i < (op.kind == GATED ? 1 : op.count); i++) tiles += ceil_div(op.w[i].rows, LANES);
  return tiles;
}
INLINE Cut cut(const Op& op, const Step& s) {
  Cut c;
  c.rows = rows_of(op, s);
  c.tiles = tiles_of(op);
  c.rows_a_chunk = least(c.rows, 128);
  c.tiles_a_chunk = greatest(1, least(c.tiles / (4 * s.threads), 32));
  c.columns = ceil_div(c.tiles, c.tiles_a_chunk);
  c.chunks = c.rows ? c.columns * ceil_div(c.rows, c.rows_a_chunk) : 0;
  return c;
}

void matmul(const Op& op, const Step& s, int chunk) {
  const Cut c = cut(op, s);
  const int first_row = chunk / c.columns * c.rows_a_chunk, last_row = least(c.rows, first_row + c.rows_a_chunk);
  const int first = chunk % c.columns * c.tiles_a_chunk, last = least(c.tiles, first + c.tiles_a_chunk);
  const Inputs in = inputs(op, s);
  for (int tile = first; tile < last; tile++) {
    int which = 0, at = tile, column = 0;  // the matrix, the tile in it, the output's column where the matrix begins
    if (op.kind == MATMUL)
      while (at >= ceil_div(op.w[which].rows, LANES)) {
        at -= ceil_div(op.w[which].rows, LANES);
        column += op.w[which++].rows;
      }
    const Matrix& m = op.w[which];
    const int lanes = least(LANES, m.rows - at * LANES);
    for (int row = first_row; row < last_row; row += MOST_ROWS) {
      const int rows = least(MOST_ROWS, last_row - row);
      F y[MOST_ROWS], up[MOST_ROWS];
      multiply_some<MOST_ROWS>(m, at, in, row, rows, s.fast, y);
      if (op.kind == GATED) multiply_some<MOST_ROWS>(op.w[1], at, in, row, rows, s.fast, up);
      for (int r = 0; r < rows; r++) {
        float* out = buffer(s, op.out) + ptrdiff_t(row + r) * op.out_width + column + at * LANES;
        if (m.bias) y[r] += load_part(m.bias + at * LANES, lanes);
        if (op.kind == GATED) {
          if (op.w[1].bias) up[r] += load_part(op.w[1].bias + at * LANES, lanes);
          y[r] = y[r] / (exponential(-y[r]) + 1.0f) * up[r];
        }
        if (op.flags & ADD) y[r] += load_part(out, lanes);
        std::memcpy(out, &y[r], lanes * sizeof(float));
      }
    }
  }
}

template <bool Exact> INLINE void quantize_row(const Step& s, const float* x, int row, int width) {
  auto* out = (Activations<Exact>*)s.buffers[BLOCKS_BUFFER] + ptrdiff_t(row) * (width / BLOCK);
  for (int b = 0; b < width / BLOCK; b++) quantize_block(x + b * BLOCK, out[b]);
}
INLINE void quantize_row(const Step& s, const float* x, int row, int width) {
  s.fast ? quantize_row<false>(s, x, row, width) : quantize_row<true>(s, x, row, width);
}

INLINE void rms_norm(const float* x, const float* weight, float eps, int width, float* y) {
  const int whole = width / LANES * LANES;
  F squares = {};
  for (int i = 0; i < whole; i += LANES) squares = Isa::fma(load<F>(x + i), load<F>(x + i), squares);
  if (whole < width) {
    const F v = load_part(x + whole, width - whole);
    squares = Isa::fma(v, v, squares);
  }
  const float inverse = 1.0f / __builtin_sqrtf(Isa::sum_lanes(squares) / width + eps);
  for (int i = 0; i < whole; i += LANES) store(y + i, load<F>(x + i) * inverse * load<F>(weight + i));
  for (int i = whole; i < width; i++) y[i] = x[i] * inverse * weight[i];
}

constexpr int ROWS_A_CHUNK = 8;  // of operations row by row; so few are done by one thread while the others wait

INLINE int last_row_of(const Op& op, const Step& s, int chunk) {
  return least(rows_of(op, s), (chunk + 1) * ROWS_A_CHUNK);
}

void norm(const Op& op, const Step& s, int chunk) {
  for (int row = chunk * ROWS_A_CHUNK; row < last_row_of(op, s, chunk); row++) {
    const int from = op.flags & WANTED ? s.wanted_rows[row] : row;
    float* y = buffer(s, op.out) + ptrdiff_t(row) * op.in_width;
    rms_norm(buffer(s, op.in) + ptrdiff_t(from) * op.in_width, op.weight, op.eps, op.in_width, y);
    if (op.flags & QUANTIZED) quantize_row(s, y, row, op.in_width);
  }
}

void quantize(const Op& op, const Step& s, int chunk) {
  for (int row = chunk * ROWS_A_CHUNK; row < last_row_of(op, s, chunk); row++)
    quantize_row(s, buffer(s, op.in) + ptrdiff_t(row) * op.in_width, row, op.in_width);
}

// One row of a quantized weight as numbers.
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
      const int offset = Fmt::shift > 0 ? 1 << Fmt::shift : 0;
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
    const int count = least(LANES, m.columns - k);
    const F v = floats_part<T>(from + ptrdiff_t(k) * size_of(T), count);
    std::memcpy(out + k, &v, count * sizeof(float));
  }
}

void embed(const Op& op, const Step& s, int chunk) {
  using Read = void (*)(const Matrix&, int, float*);
  constexpr Read read[] = {copy_row<F32>,    copy_row<BF16>,   copy_row<F16>,    dequantize<Q4_0>,
                           dequantize<Q4_1>, dequantize<Q8_0>, dequantize<Q4_K>, dequantize<Q6_K>};
  for (int row = chunk * ROWS_A_CHUNK; row < last_row_of(op, s, chunk); row++)
    read[op.w[0].type](op.w[0], s.ids[row], buffer(s, op.out) + ptrdiff_t(row) * op.out_width);
}

}  // namespace
}  // namespace pentad
