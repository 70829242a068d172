// Matrix products of activations and weights: the layout of both, and the loops in which a step spends its time.
//
// WEIGHTS. A quantized weight [rows, columns] is repacked into tiles of 16 rows, and a tile into blocks of 32 columns:
//
//     tile 0 (rows 0-15):  block 0 | block 1 | ...   tile 1 (rows 16-31):  block 0 | ...
//
//     A block's integers are unsigned, in 8 groups of 4 columns. In a group, lane r is row r:
//       8 bits:  group g      = 64 bytes: lane r has columns 4g to 4g+3 of row r
//       4 bits:  64 bytes g<4 = low nibbles: group g, high nibbles: group g+4
//       5 bits:  as 4 bits, then 64 bytes: bit g is the high bit of group g
//       6 bits:  as 4 bits, then 2 x 64 bytes: bits 2i and 2i+1 of half h are the high bits of group 4h+i
//     The scales follow: d of each of the 16 rows, then m of each if the type has a minimum. K types have two bytes per
//     row instead, factors of the d and m in the head (Q6_K: factors of d for the two halves of the columns).
//
// So one 64-byte register holds 4 columns of all 16 rows, and a dot product of 4 bytes per lane adds to 16 sums.
//
// ACTIVATIONS. A row is divided into blocks of 32 too. "Exact": 16-bit integers with one scale per block, each split into
// two bytes, x = scale * (256 * high + low). "Fast": one byte, with a scale for each half of a block.
//
// Products of integers are exact, and floats are always added in the order of the blocks. So a row's result is independent of
// the step's other rows, the chunk and the thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "formats.h"

namespace pentad {
namespace {

using F = float __attribute__((vector_size(64)));
using I = int32_t __attribute__((vector_size(64)));
using B = uint8_t __attribute__((vector_size(64)));
using S16 = int8_t __attribute__((vector_size(16)));
using H16 = uint16_t __attribute__((vector_size(32)));
using V = typename Isa::V;                       // one native register
constexpr int PARTS = sizeof(F) / sizeof(V);     // registers in an F, which GCC keeps in memory if there are several

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")  // keeps small arrays in registers

constexpr int ROWS_PER_PASS = Isa::ROWS;  // rows of activations per pass over a tile; queries per pass over the keys
constexpr int PREFETCH_BYTES = 3072;      // how far ahead weights are prefetched

template <class V> INLINE V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> INLINE void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
INLINE F broadcast(float x) { return x - F{}; }
INLINE I broadcast(int32_t x) { return x - I{}; }
INLINE I as_integers(F x) { return (I)x; }
INLINE F as_floats(I x) { return (F)x; }
INLINE I shorts(const void* p) { return __builtin_convertvector(load<H16>(p), I); }
INLINE F to_floats(I x) { return __builtin_convertvector(x, F); }
INLINE F max(F a, F b) { return a > b ? a : b; }
INLINE F load_part(const float* p, int count) {
  F v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int min(int a, int b) { return a < b ? a : b; }
constexpr int max(int a, int b) { return a > b ? a : b; }

template <class R> INLINE R multiply_add(R a, R b, R c) {  // of F, or of one native register
  if constexpr (sizeof(R) == sizeof(F)) return Isa::fma(a, b, c);
  else return Isa::fma_v(a, b, c);
}

// e^x to about 2 units in the last place; 0 below -87; NaN stays NaN.
template <class R> INLINE R exponential(R x) {
  using Integers = decltype(x < x);
  const auto all = [](float number) __attribute__((always_inline)) { return number - R{}; };
  const R bounded = x < -87.0f ? all(-87.0f) : x > 88.0f ? all(88.0f) : x;
  const R magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to integers
  const R shifted = multiply_add(bounded, all(1.44269504f), magic);
  const R n = shifted - magic;
  R r = multiply_add(n, all(-0.693359375f), bounded);
  r = multiply_add(n, all(2.12194440e-4f), r);
  R p = all(1.9875691500e-4f);  // Cephes' polynomial
  p = multiply_add(p, r, all(1.3981999507e-3f));
  p = multiply_add(p, r, all(8.3334519073e-3f));
  p = multiply_add(p, r, all(4.1665795894e-2f));
  p = multiply_add(p, r, all(1.6666665459e-1f));
  p = multiply_add(p, r, all(5.0000001201e-1f));
  p = multiply_add(p, r * r, r + 1.0f);
  const R power = (R)(((Integers)shifted - (Integers)magic + 127) << 23);
  return x < -87.0f ? R{} : p * power;
}

// ---- Activations in int8 ----

template <bool Exact> struct Activations;
template <> struct Activations<true> {
  int8_t high[BLOCK], low[BLOCK];
  float scale[1];         // of high * 256 + low
  int32_t negative_half_sums[2];  // -1 times the sums of the first and the last 16 integers
  int32_t negative_sum_;
  float total;  // the sum of the dequantized numbers
  int32_t negative_sum() const { return negative_sum_; }
};
template <> struct Activations<false> {
  int8_t low[BLOCK];
  float scale[2];  // of the first and the last 16
  int32_t negative_half_sums[2];
  float total;
  int32_t negative_sum() const { return 0; }
};

// Computes integers n with |n| <= Limit and returns a scale, so that x is about n * scale. If x isn't finite, the scale
// isn't finite either, and n is 0.
template <int Limit, int N> INLINE float to_integers(const F (&x)[N], I (&n)[N]) {
  I largest = as_integers(x[0]) & 0x7fffffff;
  for (int i = 1; i < N; i++) {
    const I size = as_integers(x[i]) & 0x7fffffff;  // bit patterns of absolute values sort like the values, NaN above infinity
    largest = size > largest ? size : largest;
  }
  const int32_t max_bits = Isa::max_lanes(largest);
  float amax;
  std::memcpy(&amax, &max_bits, 4);
  const float inverse = amax < 1e-30f ? 0.0f : Limit / amax;  // smaller numbers count as 0
  const F magic = broadcast(12582912.0f);
  for (int i = 0; i < N; i++) n[i] = max_bits < 0x7f800000 ? as_integers(x[i] * inverse + magic) - as_integers(magic) : I{};
  return amax < 1e-30f ? 0.0f : amax * (1.0f / Limit);
}

INLINE void quantize_block(const float* x, Activations<true>& out) {
  const F in[2] = {load<F>(x), load<F>(x + LANES)};
  I n[2];
  out.scale[0] = to_integers<32512>(in, n);  // 127 * 256, so that the high byte never exceeds 127
  for (int i = 0; i < 2; i++) {
    const I high = (n[i] + 128) >> 8;
    store(out.high + i * LANES, __builtin_convertvector(high, S16));
    store(out.low + i * LANES, __builtin_convertvector(n[i] - (high << 8), S16));
    out.negative_half_sums[i] = -Isa::sum_lanes(n[i]);
  }
  out.negative_sum_ = out.negative_half_sums[0] + out.negative_half_sums[1];
  out.total = -out.scale[0] * float(out.negative_sum_);
}

INLINE void quantize_block(const float* x, Activations<false>& out) {
  out.total = 0;
  for (int i = 0; i < 2; i++) {
    const F in[1] = {load<F>(x + i * LANES)};
    I n[1];
    out.scale[i] = to_integers<127>(in, n);
    store(out.low + i * LANES, __builtin_convertvector(n[0], S16));
    out.negative_half_sums[i] = -Isa::sum_lanes(n[0]);
    out.total -= out.scale[i] * float(out.negative_half_sums[i]);
  }
}

// ---- Blocks of weights ----

struct Scales {
  F d, m;         // number = d * integer + m
  F first, last;  // Format::halves: factors of d for columns 0-15 and 16-31
};

template <int T> INLINE void integers(const uint8_t* block, B (&w)[8]) {
  if constexpr (T == Q8_0) {
    UNROLL
    for (int g = 0; g < 8; g++) w[g] = load<B>(block + 64 * g);
  } else {
    UNROLL
    for (int g = 0; g < 4; g++) {
      const B v = load<B>(block + 64 * g);
      w[g] = v & 15;
      w[g + 4] = Isa::shift_right<4>(v) & 15;
    }
    if constexpr (T == Q5_0 || T == Q5_1 || T == Q5_K) {
      const B h = load<B>(block + 256);
      w[0] |= Isa::shift_left<4>(h) & 16, w[4] |= h & 16;
      w[1] |= Isa::shift_left<3>(h) & 16, w[5] |= Isa::shift_right<1>(h) & 16;
      w[2] |= Isa::shift_left<2>(h) & 16, w[6] |= Isa::shift_right<2>(h) & 16;
      w[3] |= Isa::shift_left<1>(h) & 16, w[7] |= Isa::shift_right<3>(h) & 16;
    }
    if constexpr (T == Q6_K) {
      const B a = load<B>(block + 256), b = load<B>(block + 320);
      w[0] |= Isa::shift_left<4>(a & 3), w[4] |= Isa::shift_left<4>(b & 3);
      w[1] |= Isa::shift_left<2>(a & 12), w[5] |= Isa::shift_left<2>(b & 12);
      w[2] |= a & 48, w[6] |= b & 48;
      w[3] |= Isa::shift_right<2>(a & 192), w[7] |= Isa::shift_right<2>(b & 192);
    }
  }
}

template <int T> INLINE Scales scales(const uint8_t* head, const uint8_t* block) {
  const uint8_t* after = block + Format<T>::block;
  if constexpr (T == Q4_1 || T == Q5_1) return {Isa::half(after - 64), Isa::half(after - 32), F{}, F{}};
  if constexpr (T == Q4_K || T == Q5_K) {
    const I pairs = shorts(after - 32);
    return {Isa::half(head) * to_floats(pairs & 255), -Isa::half(head + 32) * to_floats(pairs >> 8), F{}, F{}};
  }
  if constexpr (T == Q6_K) {
    const I pairs = shorts(after - 32);
    return {Isa::half(head), F{}, to_floats(pairs << 24 >> 24), to_floats(pairs << 16 >> 24)};
  }
  return {Isa::half(after - 32), F{}, F{}, F{}};
}

// ---- Matrix products ----

template <bool Wide> INLINE I dot(I sum, B w, const int8_t* x) {
  return Isa::template dot<Wide>(sum, w, load<int32_t>(x));
}

// v[r] = the integer product of groups First to Last with row r of activations. Integer sums are exact in any order, so
// the loop alternates between rows, and no addition has to wait for the previous one.
template <int T, bool Exact, int R, int First, int Last>
INLINE void products(const B (&w)[8], const Activations<Exact>* x, ptrdiff_t stride, F (&v)[R]) {
  constexpr bool wide = T == Q8_0;
  I high[R], low[R];
  UNROLL
  for (int r = 0; r < R; r++) {
    high[r] = low[r] = I{};
    if constexpr (Format<T>::shift > 0)
      low[r] = broadcast(Last - First == 8 ? x[r * stride].negative_sum() : x[r * stride].negative_half_sums[First / 4]) << Format<T>::shift;
  }
  UNROLL
  for (int g = First; g < Last; g++)
    UNROLL
    for (int r = 0; r < R; r++) {
      if constexpr (Exact) high[r] = dot<wide>(high[r], w[g], x[r * stride].high + 4 * g);
      low[r] = dot<wide>(low[r], w[g], x[r * stride].low + 4 * g);
    }
  UNROLL
  for (int r = 0; r < R; r++) v[r] = to_floats(Exact ? (high[r] << 8) + low[r] : low[r]);
}

// 16 rows of a weight times R rows of activations; out[r] holds the 16 results of row r.
template <int T, bool Exact, int R>
INLINE void multiply_tile(const uint8_t* tile, int blocks, const Activations<Exact>* x, ptrdiff_t stride, F* out) {
  using Fmt = Format<T>;
  F sums[R];
  UNROLL
  for (int r = 0; r < R; r++) sums[r] = F{};
  const uint8_t* block = tile;
  for (int b = 0; b < blocks; b += Fmt::span) {
    const uint8_t* head = block;
    block += Fmt::head;
    for (int i = 0; i < Fmt::span; i++, block += Fmt::block, x++) {
      UNROLL
      for (int line = 0; line < Fmt::block; line += 64) __builtin_prefetch(block + PREFETCH_BYTES + line);
      B w[8];
      integers<T>(block, w);
      const Scales s = scales<T>(head, block);
      F v[R];
      if constexpr (Exact && !Fmt::halves) {
        products<T, Exact, R, 0, 8>(w, x, stride, v);
        UNROLL
        for (int r = 0; r < R; r++) v[r] *= x[r * stride].scale[0];
      } else {
        F last[R];
        products<T, Exact, R, 0, 4>(w, x, stride, v);
        products<T, Exact, R, 4, 8>(w, x, stride, last);
        UNROLL
        for (int r = 0; r < R; r++) {
          if constexpr (Fmt::halves) v[r] *= s.first, last[r] *= s.last;
          if constexpr (Exact) v[r] = (v[r] + last[r]) * x[r * stride].scale[0];
          else v[r] = Isa::fma(last[r], broadcast(x[r * stride].scale[1]), v[r] * x[r * stride].scale[0]);
        }
      }
      UNROLL
      for (int r = 0; r < R; r++) {
        sums[r] = Isa::fma(v[r], s.d, sums[r]);
        if constexpr (Fmt::minimum) sums[r] = Isa::fma(s.m, broadcast(x[r * stride].total), sums[r]);
      }
    }
  }
  UNROLL
  for (int r = 0; r < R; r++) out[r] = sums[r];
}

template <int T> INLINE F floats(const uint8_t* p) {
  if constexpr (T == F32) return load<F>(p);
  if constexpr (T == F16) return Isa::half(p);
  if constexpr (T == I8) return __builtin_convertvector(__builtin_convertvector(load<S16>(p), I), F);
  return as_floats(shorts(p) << 16);  // BF16
}
constexpr int size_of(int type) { return type == F32 ? 4 : 2; }

template <int T> INLINE F floats_part(const uint8_t* p, int count) {
  uint8_t whole[64] = {};
  std::memcpy(whole, p, count * size_of(T));
  return floats<T>(whole);
}

// Native registers of 16 floats.
INLINE V part_of(const F& x, int part) { return load<V>((const uint8_t*)&x + part * sizeof(V)); }
template <int T> INLINE V floats_at(const uint8_t* p, int part) {
  if constexpr (T == F32) return load<V>(p + part * sizeof(V));
  using Short = uint16_t __attribute__((vector_size(sizeof(V) / 2)));
  using Int = int32_t __attribute__((vector_size(sizeof(V))));
  if constexpr (T == BF16) return (V)(__builtin_convertvector(load<Short>(p + part * sizeof(Short)), Int) << 16);
  return part_of(floats<T>(p), part);
}

// The same for up to 16 `rows` of a float weight. Each result is a sum over 16 lanes; as many pairs of rows are computed at
// once as there are registers for sums: if there are too few for whole F, the loop over columns runs once for each part.
template <int T, int R>
INLINE void multiply_rows(const uint8_t* w, int rows, int columns, const float* x, ptrdiff_t stride, F* out) {
  constexpr int AT_ONCE = R >= 8 || (R >= 4 && PARTS == 2) ? 2 : 4;
  constexpr int PARTS_AT_ONCE = R * AT_ONCE * PARTS <= 8 ? PARTS : 1;
  const ptrdiff_t row_bytes = ptrdiff_t(columns) * size_of(T);
  const int whole = columns / LANES * LANES;
  float results[R][LANES] = {};
  for (int first = 0; first < rows; first += AT_ONCE) {
    const uint8_t* from[AT_ONCE];
    UNROLL
    for (int j = 0; j < AT_ONCE; j++) from[j] = w + min(first + j, rows - 1) * row_bytes;
    F totals[AT_ONCE * R];
    for (int part = 0; part < PARTS; part += PARTS_AT_ONCE) {
      V sums[PARTS_AT_ONCE][AT_ONCE * R] = {};
      const auto add = [&](auto weights, auto activations) __attribute__((always_inline)) {
        UNROLL
        for (int p = 0; p < PARTS_AT_ONCE; p++) {
          V wk[AT_ONCE];
          UNROLL
          for (int j = 0; j < AT_ONCE; j++) wk[j] = weights(from[j], part + p);
          UNROLL
          for (int r = 0; r < R; r++) {
            const V xk = activations(x + r * stride, part + p);
            UNROLL
            for (int j = 0; j < AT_ONCE; j++) sums[p][r * AT_ONCE + j] = Isa::fma_v(wk[j], xk, sums[p][r * AT_ONCE + j]);
          }
        }
      };
      for (int k = 0; k < whole; k += LANES)
        add([&](const uint8_t* p, int i) { return floats_at<T>(p + ptrdiff_t(k) * size_of(T), i); },
            [&](const float* p, int i) { return load<V>((const uint8_t*)(p + k) + i * sizeof(V)); });
      if (whole < columns)
        add([&](const uint8_t* p, int i) { return part_of(floats_part<T>(p + ptrdiff_t(whole) * size_of(T), columns - whole), i); },
            [&](const float* p, int i) { return part_of(load_part(p + whole, columns - whole), i); });
      UNROLL
      for (int p = 0; p < PARTS_AT_ONCE; p++)
        for (int i = 0; i < AT_ONCE * R; i++) store((uint8_t*)&totals[i] + (part + p) * sizeof(V), sums[p][i]);
    }
    float each[AT_ONCE * R];
    Isa::template sum_lanes_of<AT_ONCE * R>(totals, each);
    for (int r = 0; r < R; r++)
      for (int j = 0; j < AT_ONCE && first + j < rows; j++) results[r][first + j] = each[r * AT_ONCE + j];
  }
  for (int r = 0; r < R; r++) out[r] = load<F>(results[r]);
}

template <int T> INLINE const uint8_t* tile_at(const Matrix& m, int tile) {
  if constexpr (T <= F16) return m.data + ptrdiff_t(tile) * LANES * m.columns * size_of(T);
  else return m.data + tile_bytes<T>(m.columns) * tile;
}

struct Inputs {  // rows of activations, as int8 blocks and as floats
  const void* blocks;
  const float* floats;
  int width;
};

template <int T, int R> void multiply(const Matrix& m, int tile, const Inputs& in, int row, bool fast, F* out) {
  if constexpr (T <= F16) {
    multiply_rows<T, R>(tile_at<T>(m, tile), min(LANES, m.rows - tile * LANES), m.columns,
                        in.floats + ptrdiff_t(row) * in.width, in.width, out);
  } else {
    const int blocks = m.columns / BLOCK;
    const uint8_t* data = tile_at<T>(m, tile);
    if (fast)
      multiply_tile<T, false, R>(data, blocks, (const Activations<false>*)in.blocks + ptrdiff_t(row) * blocks, blocks, out);
    else
      multiply_tile<T, true, R>(data, blocks, (const Activations<true>*)in.blocks + ptrdiff_t(row) * blocks, blocks, out);
  }
}

using Multiply = void (*)(const Matrix&, int, const Inputs&, int, bool, F*);
template <int R> constexpr Multiply multiply_by_type[] = {
    multiply<F32, R>,  multiply<BF16, R>, multiply<F16, R>,  multiply<Q4_0, R>,
    multiply<Q4_1, R>, multiply<Q8_0, R>, multiply<Q4_K, R>, multiply<Q6_K, R>,
    multiply<Q5_0, R>, multiply<Q5_1, R>, multiply<Q5_K, R>};

using TileAt = const uint8_t* (*)(const Matrix&, int);
constexpr TileAt tile_at_by_type[] = {tile_at<F32>,  tile_at<BF16>, tile_at<F16>,  tile_at<Q4_0>, tile_at<Q4_1>, tile_at<Q8_0>,
                                      tile_at<Q4_K>, tile_at<Q6_K>, tile_at<Q5_0>, tile_at<Q5_1>, tile_at<Q5_K>};

// One tile of a weight times `rows` rows, starting at `row`: R rows at a time, and the remainder by R / 2, R / 4, ...
template <int R> INLINE void multiply_some(const Matrix& m, int tile, const Inputs& in, int row, int rows, bool fast, F* out) {
  for (; rows >= R; rows -= R, row += R, out += R) multiply_by_type<R>[m.type](m, tile, in, row, fast, out);
  if constexpr (R > 1) multiply_some<R / 2>(m, tile, in, row, rows, fast, out);
}

}  // namespace
}  // namespace pentad
