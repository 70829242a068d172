// Attention among the cells of a grid, or of its windows, with relative positions in two dimensions (MViTv2,
// arXiv:2112.01526): a score has the query's product with a vector for the difference of rows, and with one for that of
// columns. Scores exist for a block of queries and keys at a time (arXiv:2205.14135).
//
// PACKED, for each window and head: keys in tiles [tiles][dim][16], scaled, then values [dim / 16][16 tiles][16]. A row of a
// window has whole tiles: the lanes after its last cell hold zeros, and their scores are -infinity.
#pragma once
#include "convolution.h"

namespace pentad {
namespace {

constexpr int QUERIES = 96;   // of a chunk: a multiple of PIXELS, so many of which share each number that is loaded
constexpr int TILES = 8;      // of keys, between two updates of a query's sums
constexpr int KEYS = TILES * LANES;
constexpr int MAX_OFFSETS = ceil_div(2 * MAX_GRID_SIDE - 1, LANES) * LANES;
static_assert(QUERIES % PIXELS == 0);

// A window of one image, and one head.
struct GridWindow {
  int image, top, left, head;  // the first cell
  int rows, columns;           // inside of the image
  int row_tiles, tiles;
  float *keys, *values;

  INLINE GridWindow(const GridOp& op, int index) {
    const int across = ceil_div(op.side, op.window);
    row_tiles = ceil_div(op.window, LANES), tiles = op.window * row_tiles;
    keys = op.packed + int64_t(index) * 2 * tiles * LANES * op.dim, values = keys + tiles * LANES * op.dim;
    head = index % op.heads, index /= op.heads;
    left = index % across * op.window, index /= across;
    top = index % across * op.window, image = index / across;
    rows = min(op.window, op.side - top), columns = min(op.window, op.side - left);
  }
  INLINE int64_t at(const GridOp& op, int y, int x) const {  // the head's first number
    return ((int64_t(image) * op.side + top + y) * op.side + left + x) * op.heads * op.dim + head * op.dim;
  }
};

int grid_windows(const GridOp& op) {
  const int across = ceil_div(op.side, op.window);
  return op.images * across * across * op.heads;
}
INLINE int query_blocks(const GridOp& op) { return ceil_div(op.window * op.window, QUERIES); }

int grid_chunks(const GridOp& op, int phase) { return grid_windows(op) * (phase ? query_blocks(op) : 1); }

void pack_window(const GridOp& op, int chunk) {
  const GridWindow w(op, chunk);
  const int dim = op.dim;
  for (int y = 0; y < op.window; y++)
    for (int x = 0; x < w.row_tiles * LANES; x++) {
      const int cell = y * w.row_tiles * LANES + x;
      float* key = w.keys + int64_t(cell / LANES) * LANES * dim + cell % LANES;
      const bool inside = y < w.rows && x < w.columns, padding = x < op.window;
      const float* k = inside ? op.k + w.at(op, y, x) : padding ? op.k_padding + w.head * dim : nullptr;
      const float* v = inside ? op.v + w.at(op, y, x) : padding ? op.v_padding + w.head * dim : nullptr;
      for (int i = 0; i < dim; i++) key[i * LANES] = k ? k[i] * op.scale : 0.0f;
      for (int i = 0; i < dim; i++)
        w.values[(int64_t(i / LANES) * w.tiles * LANES + cell) * LANES + i % LANES] = v ? v[i] : 0.0f;
    }
}

// out[p][j] = start(p, j) + the products of rows of a with columns of b, for PIXELS rows and 16 columns. The numbers of a are
// ROW floats apart from row to row, and COLUMN floats from column to column; b is [depth][16].
template <int ROW, int COLUMN, class Start, class End>
INLINE void multiply_block(const float* a, const float* b, int depth, Start start, End end) {
  V sums[PIXELS][REGISTERS];
  UNROLL_PIXELS
  for (int p = 0; p < PIXELS; p++) {
    UNROLL
    for (int j = 0; j < REGISTERS; j++) sums[p][j] = start(p, j * WIDTH);
  }
  for (int i = 0; i < depth; i++, a += COLUMN, b += LANES) {
    V columns[REGISTERS];
    UNROLL
    for (int j = 0; j < REGISTERS; j++) columns[j] = load<V>(b + j * WIDTH);
    UNROLL_PIXELS
    for (int p = 0; p < PIXELS; p++) {
      const V x = broadcast_v(a[p * ROW]);
      UNROLL
      for (int j = 0; j < REGISTERS; j++) sums[p][j] = Isa::fma_v(x, columns[j], sums[p][j]);
    }
  }
  UNROLL_PIXELS
  for (int p = 0; p < PIXELS; p++) {
    UNROLL
    for (int j = 0; j < REGISTERS; j++) end(p, j * WIDTH, sums[p][j]);
  }
}

// A chunk's queries, their bias by rows and columns of keys, and their softmax so far.
struct Queries {
  const GridOp& op;
  const GridWindow w;
  int first, count, groups;
  float q[QUERIES / PIXELS][MAX_GRID_DIM][PIXELS];
  float by_row[QUERIES][MAX_GRID_SIDE], by_column[QUERIES][MAX_GRID_SIDE];
  float shares[QUERIES][KEYS];  // of some keys: scores, then powers
  float y[QUERIES][MAX_GRID_DIM], highest[QUERIES], factor[QUERIES];
  V sum[QUERIES];

  Queries(const GridOp& op, int chunk) : op(op), w(op, chunk / query_blocks(op)) {
    first = chunk % query_blocks(op) * QUERIES, count = min(w.rows * w.columns - first, QUERIES);
    groups = count > 0 ? ceil_div(count, PIXELS) : 0;
    for (int g = 0; g < groups; g++) begin(g);
  }
  INLINE int row(int i) const { return (first + min(i, count - 1)) / w.columns; }  // the last group may repeat a query
  INLINE int column(int i) const { return (first + min(i, count - 1)) % w.columns; }

  void begin(int group) {
    float products[2][PIXELS][MAX_OFFSETS];
    const int start = group * PIXELS;
    for (int p = 0; p < PIXELS; p++) {
      const float* from = op.q + w.at(op, row(start + p), column(start + p));
      for (int i = 0; i < op.dim; i++) q[group][i][p] = from[i];
    }
    for (int axis = 0; axis < 2; axis++)
      for (int at = 0; at < op.offsets; at += LANES)
        multiply_block<1, PIXELS>(
            q[group][0], op.positions + int64_t(axis * op.offsets + at) * op.dim, op.dim,
            [](int, int) __attribute__((always_inline)) { return V{}; },
            [&](int p, int j, V x) __attribute__((always_inline)) { store(&products[axis][p][at + j], x); });
    for (int p = 0; p < PIXELS; p++) {
      const int i = start + p;
      std::memcpy(by_row[i], &products[0][p][op.window - 1 - row(i)], op.window * sizeof(float));
      std::memcpy(by_column[i], &products[1][p][op.window - 1 - column(i)], op.window * sizeof(float));
      for (int x = op.window; x < w.row_tiles * LANES; x++) by_column[i][x] = -__builtin_inff();
      std::memset(y[i], 0, op.dim * sizeof(float));
      highest[i] = -__builtin_inff(), sum[i] = V{};
    }
  }

  INLINE void score(int tile, int place) {
    const int y = tile / w.row_tiles, x = tile % w.row_tiles * LANES;
    for (int g = 0; g < groups; g++)
      multiply_block<1, PIXELS>(
          q[g][0], w.keys + int64_t(tile) * LANES * op.dim, op.dim,
          [&](int p, int j) __attribute__((always_inline)) {
            return load<V>(&by_column[g * PIXELS + p][x + j]) + by_row[g * PIXELS + p][y];
          },
          [&](int p, int j, V v) __attribute__((always_inline)) { store(&shares[g * PIXELS + p][place * LANES + j], v); });
  }
  INLINE void raise(int i, int keys) {
    V largest = load<V>(shares[i]);
    for (int k = WIDTH; k < keys; k += WIDTH) {
      const V x = load<V>(shares[i] + k);
      largest = x > largest ? x : largest;
    }
    const float before = highest[i];
    for (int lane = 0; lane < WIDTH; lane++) highest[i] = largest[lane] > highest[i] ? largest[lane] : highest[i];
    factor[i] = exponential(broadcast_v(before - highest[i]))[0];
    sum[i] *= factor[i];
    for (int k = 0; k < keys; k += WIDTH) {
      const V share = exponential(load<V>(shares[i] + k) - highest[i]);
      store(shares[i] + k, share);
      sum[i] += share;
    }
  }
  INLINE void add_values(int tile, int keys) {
    for (int at = 0; at < op.dim; at += LANES)
      for (int g = 0; g < groups; g++)
        multiply_block<KEYS, 1>(
            shares[g * PIXELS], w.values + (int64_t(at) * w.tiles + tile * LANES) * LANES, keys,
            [&](int p, int j) __attribute__((always_inline)) {
              return load<V>(&y[g * PIXELS + p][at + j]) * factor[g * PIXELS + p];
            },
            [&](int p, int j, V v) __attribute__((always_inline)) { store(&y[g * PIXELS + p][at + j], v); });
  }
  INLINE void finish(int i) {
    float total = 0.0f, *out = op.out + w.at(op, row(i), column(i));
    for (int lane = 0; lane < WIDTH; lane++) total += sum[i][lane];
    for (int j = 0; j < op.dim; j++) out[j] = y[i][j] / total;
  }
};

void attend_grid(const GridOp& op, int chunk) {
  Queries queries(op, chunk);
  for (int tile = 0; tile < queries.w.tiles; tile += TILES) {
    const int tiles = min(TILES, queries.w.tiles - tile);
    for (int t = 0; t < tiles; t++) queries.score(tile + t, t);
    for (int i = 0; i < queries.groups * PIXELS; i++) queries.raise(i, tiles * LANES);
    queries.add_values(tile, tiles * LANES);
  }
  for (int i = 0; i < queries.count; i++) queries.finish(i);
}

void grid_work(const GridOp& op, int phase, int chunk) { phase ? attend_grid(op, chunk) : pack_window(op, chunk); }

}  // namespace
}  // namespace pentad
