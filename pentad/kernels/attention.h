// RoPE, the cache, and attention over it.
//
// A page of the cache holds `page_size` tokens of one layer, head after head: values as [tokens][dims]; keys in tiles of
// 16 tokens as [dims][16], so that one register holds a dimension of 16 keys, and scores need no sum over lanes. In I8 each
// token's are whole numbers up to 127, and the page's scales, one float a token, lie behind them.
#pragma once
#include <cmath>

#include "rows.h"

namespace pentad {
namespace {

template <int T> struct Element { using type = uint16_t; };
template <> struct Element<F32> { using type = float; };
template <> struct Element<I8> { using type = int8_t; };

// Numbers as the cache has them.
template <int T> INLINE auto narrow(F x) {
  if constexpr (T == F32) {
    return x;
  } else if constexpr (T == F16) {
    return Isa::to_halves(x);
  } else {
    const I u = bits(x), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;  // of a NaN the sum might be infinite, or overflow
    return __builtin_convertvector((u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 64 : rounded, H16);
  }
}

template <int T> struct Cache {  // one head of one sequence
  using E = typename Element<T>::type;
  const int32_t* table;
  int dropped, page_size, dims;
  E *keys, *values;      // the head's place in page 0
  ptrdiff_t page_stride, scales;  // from one page to the next; from the head's place to its scales

  Cache(const Op& op, const Step& s, int sequence, int head)
      : table(s.tables + ptrdiff_t(sequence) * s.table_width), dropped(s.dropped[sequence]), page_size(s.page_size),
        dims(s.padded_dim) {
    scales = ptrdiff_t(page_size) * dims;
    const ptrdiff_t head_stride = scales + (T == I8 ? page_size * sizeof(float) : 0);
    page_stride = head_stride * op.kv_heads;
    keys = (E*)s.keys[op.layer] + head * head_stride;
    values = (E*)s.values[op.layer] + head * head_stride;
  }
  INLINE E* key_tile(int position) const {  // a multiple of 16
    const int at = position - dropped;
    return keys + table[at / page_size] * page_stride + ptrdiff_t(at % page_size) * dims;
  }
  INLINE E* value(int position) const {
    const int at = position - dropped;
    return values + table[at / page_size] * page_stride + ptrdiff_t(at % page_size) * dims;
  }
  INLINE float* scale(E* pool, int position) const {  // of I8
    const int at = position - dropped;
    return (float*)(pool + table[at / page_size] * page_stride + scales) + at % page_size;
  }
};

// A head's numbers as whole ones up to 127; their scale.
INLINE float to_bytes(const float* x, int dim, int8_t* out) {
  F in[MOST_DIMS / LANES] = {};
  I n[MOST_DIMS / LANES];
  for (int i = 0; i < dim; i += LANES) in[i / LANES] = load_from(x, i, dim);
  const float scale = to_integers<127>(in, n);
  for (int i = 0; i < dim; i++) out[i] = int8_t(n[i / LANES][i % LANES]);
  return scale;
}

INLINE int sequence_of(const Step& s, int row) {
  int b = 0;
  while (s.starts[b + 1] <= row) b++;
  return b;
}

template <class V> INLINE void rotate_some(float* x, const float* cosines, int half) {
  const V a = load<V>(x), b = load<V>(x + half), c = load<V>(cosines), s = load<V>(cosines + half);
  store(x, a * c - b * s);
  store(x + half, b * c + a * s);
}
INLINE void rotate_head(float* x, const float* cosines, int half) {
  int i = 0;
  for (; i + LANES <= half; i += LANES) rotate_some<F>(x + i, cosines + i, half);
  for (; i < half; i++) rotate_some<float>(x + i, cosines + i, half);
}

// A token's key and value go to the cache.
template <int T> INLINE void keep(const Cache<T>& cache, int position, const float* k, const float* v, int dim) {
  auto* keys = cache.key_tile(position & -LANES) + position % LANES;
  auto* values = cache.value(position);
  if constexpr (T == I8) {
    int8_t bytes[MOST_DIMS];
    *cache.scale(cache.keys, position) = to_bytes(k, dim, bytes);
    for (int i = 0; i < dim; i++) keys[i * LANES] = bytes[i];
    *cache.scale(cache.values, position) = to_bytes(v, dim, values);
    for (int i = dim; i < cache.dims; i++) values[i] = 0;
  } else {
    for (int i = 0; i < dim; i += LANES) {
      const auto some = narrow<T>(load_from(k, i, dim));
      for (int j = 0; j < least(LANES, dim - i); j++) keys[(i + j) * LANES] = some[j];
      store(values + i, narrow<T>(load_from(v, i, dim)));  // to the end of a padded row, with zeros
    }
  }
}

// What a query at a position is multiplied by, besides the scores' scale.
INLINE float log_scale(const Op& op, int position) {
  return op.log_scale_after && position + 1 > op.log_scale_after
             ? float(std::log(double(position + 1)) / std::log(double(op.log_scale_after)))
             : 1.0f;
}

template <int T> void rotate_rows(const Op& op, const Step& s, int chunk) {
  const int dim = op.head_dim, half = op.rotary_dim / 2;
  const bool centered = op.flags & CENTERED;
  for (int row = chunk * rows_a_chunk(op); row < last_row_of(op, s, chunk); row++) {
    const int b = sequence_of(s, row), position = s.positions[row];
    const float* cosines = s.rotations[b] + ptrdiff_t(position) * op.rotary_dim;
    const bool alone = s.starts[b + 1] - s.starts[b] == 1;
    const float* ahead = cosines + (alone ? ptrdiff_t(op.ahead) * op.rotary_dim : 0);
    const float factor = op.scale * log_scale(op, position);
    float* x = buffer(s, op.out) + ptrdiff_t(row) * op.out_width;
    for (int h = 0; h < op.heads; h++, x += dim) {
      if (op.weight) normalize(x, op.weight, op.bias, centered, op.eps, dim, x);
      rotate_head(x, ahead, half);
      for (int i = 0; i < dim; i++) x[i] *= factor;
    }
    for (int g = 0; g < op.kv_heads; g++, x += dim) {
      if (op.weight2) normalize(x, op.weight2, op.bias2, centered, op.eps, dim, x);
      rotate_head(x, cosines, half);
      keep<T>(Cache<T>(op, s, b, g), position, x, x + op.kv_heads * dim, dim);
    }
  }
}

// What is known of the softmax of some keys for one query of one head.
struct Part {
  float most, sum;
  float y[MOST_DIMS];  // the sum of values, weighted by e^(score - most)
};
constexpr int part_floats(int dims) { return 2 + dims; }

INLINE void merge(Part& all_, float most_, float sum, const float* y, int dims) {
  if (most_ == -__builtin_inff() && sum == 0) return;  // no key of this part was visible
  const float top = most_ > all_.most ? most_ : all_.most;
  const float keep = exponential(all(all_.most - top))[0], add = exponential(all(most_ - top))[0];
  all_.most = top;
  all_.sum = all_.sum * keep + sum * add;
  for (int i = 0; i < dims; i += LANES) store(all_.y + i, load<F>(all_.y + i) * keep + load<F>(y + i) * add);
}
INLINE void clear(Part& part, int dims) {
  part.most = -__builtin_inff();
  part.sum = 0;
  std::memset(part.y, 0, dims * sizeof(float));
}

struct Query {
  const float* q;
  int from, to;  // the keys it sees, by position
};

// Scores of N tiles of 16 keys, hidden ones -infinity.
template <int T, int R, int N>
INLINE void score(const Cache<T>& cache, const Query* queries, int position, int dim, float (*scores)[SPLIT]) {
  F sums[R][N];
  const typename Cache<T>::E *keys[N], *values[N];
  UNROLL
  for (int n = 0; n < N; n++) {
    keys[n] = cache.key_tile(position + n * LANES);
    values[n] = cache.value(position + n * LANES);
    UNROLL
    for (int r = 0; r < R; r++) sums[r][n] = F{};
  }
  constexpr int PER_LINE = 64 / (LANES * sizeof(typename Cache<T>::E));
  for (int i = 0; i < dim; i++) {
    if (i % PER_LINE == 0) {
      UNROLL
      for (int n = 0; n < N; n++) {
        __builtin_prefetch(keys[n] + i * LANES + N * LANES * cache.dims);
        __builtin_prefetch(values[n] + i * LANES);
      }
    }
    UNROLL
    for (int n = 0; n < N; n++) {
      const F k = floats<T>((const uint8_t*)(keys[n] + i * LANES));
      UNROLL
      for (int r = 0; r < R; r++) sums[r][n] = Isa::fma(k, all(queries[r].q[i]), sums[r][n]);
    }
  }
  const I lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  UNROLL
  for (int n = 0; n < N; n++) {
    const int at = position + n * LANES;
    const I p = lanes + at;
    UNROLL
    for (int r = 0; r < R; r++) {
      F x = sums[r][n];
      if constexpr (T == I8) x *= load<F>(cache.scale(cache.keys, at));
      if (at < queries[r].from || at + LANES > queries[r].to)
        x = ((p >= queries[r].from) & (p < queries[r].to)) ? x : all(-__builtin_inff());
      store(scores[r] + at % SPLIT, x);
    }
  }
}

// Adds p * value for keys `from` to `to` of one split, N registers of dimensions.
template <int T, int R, int N>
INLINE void weigh(const Cache<T>& cache, int from, int to, int dim, const float (*p)[SPLIT], Part* parts) {
  F y[R][N];
  UNROLL
  for (int r = 0; r < R; r++) {
    UNROLL
    for (int n = 0; n < N; n++) y[r][n] = F{};
  }
  for (int start = from; start < to;) {
    const int stop = least(to, (start & -LANES) + LANES);
    const typename Cache<T>::E* v = cache.value(start) + dim;
    for (int at = start; at < stop; at++, v += cache.dims) {
      F vs[N];
      UNROLL
      for (int n = 0; n < N; n++) vs[n] = floats<T>((const uint8_t*)(v + n * LANES));
      UNROLL
      for (int r = 0; r < R; r++) {
        const F weight = all(p[r][at % SPLIT]);
        UNROLL
        for (int n = 0; n < N; n++) y[r][n] = Isa::fma(vs[n], weight, y[r][n]);
      }
    }
    start = stop;
  }
  UNROLL
  for (int r = 0; r < R; r++) {
    UNROLL
    for (int n = 0; n < N; n++) store(parts[r].y + dim + n * LANES, y[r][n]);
  }
}

// One split of the keys for R queries: parts[r] is what they give.
template <int T, int R>
void attend_split(const Cache<T>& cache, const Query* queries, int split, int dim, Part* parts) {
  int from = queries[0].from, to = queries[0].to;
  for (int r = 1; r < R; r++) from = least(from, queries[r].from), to = greatest(to, queries[r].to);
  from = greatest(from, split * SPLIT);
  to = least(to, (split + 1) * SPLIT);
  float scores[R][SPLIT];
  const int first = from & -LANES;
  constexpr int AT_ONCE = R <= 4 ? 2 : 1;
  int at = first;
  for (; at + (AT_ONCE - 1) * LANES < to; at += AT_ONCE * LANES) score<T, R, AT_ONCE>(cache, queries, at, dim, scores);
  for (; at < to; at += LANES) score<T, R, 1>(cache, queries, at, dim, scores);
  for (int r = 0; r < R; r++) {
    F top = all(-__builtin_inff());
    for (at = first; at < to; at += LANES) top = most(load<F>(scores[r] + at % SPLIT), top);
    parts[r].most = Isa::max_lanes(top);
    const float base = parts[r].most == -__builtin_inff() ? 0.0f : parts[r].most;
    F sum = {};
    for (at = first; at < to; at += LANES) {
      F p = exponential(load<F>(scores[r] + at % SPLIT) - base);
      sum += p;
      if constexpr (T == I8) p *= load<F>(cache.scale(cache.values, at));
      store(scores[r] + at % SPLIT, p);
    }
    parts[r].sum = Isa::sum_lanes(sum);
  }
  constexpr int WIDE = R <= 4 ? 4 : 2;
  int i = 0;
  for (; i + WIDE * LANES <= cache.dims; i += WIDE * LANES) weigh<T, R, WIDE>(cache, from, to, i, scores, parts);
  for (; i < cache.dims; i += LANES) weigh<T, R, 1>(cache, from, to, i, scores, parts);
}

// What one chunk of ATTEND is: some queries of a sequence on one key/value head, with all keys or one split of them.
struct Share {
  int sequence, head;
  int first, last;   // queries, counted in the sequence
  int split;         // -1: all
  ptrdiff_t parts;   // where the sequence's parts begin, in parts
  int splits_from, splits;
};
INLINE int queries_a_chunk(const Op& op) { return greatest(1, 64 * op.kv_heads / op.heads); }

// The sequence's queries, and the splits that they see; `few`: whether the keys are shared out instead of the queries.
struct Sight {
  int queries, past, splits_from, splits;
  bool few;
};
INLINE Sight sight(const Op& op, const Step& s, int b) {
  Sight x;
  x.queries = s.starts[b + 1] - s.starts[b];
  x.past = s.lengths[b] - x.queries;
  const int from = op.window ? greatest(0, x.past + 1 - op.window) : 0;
  x.splits_from = from / SPLIT;
  x.splits = ceil_div(s.lengths[b], SPLIT) - x.splits_from;
  x.few = x.queries <= FEW_QUERIES && x.splits > 1;
  return x;
}
INLINE int chunks_of(const Op& op, const Sight& x) {
  return op.kv_heads * (x.few ? x.splits : ceil_div(x.queries, queries_a_chunk(op)));
}
INLINE Share share(const Op& op, const Step& s, int chunk) {
  ptrdiff_t parts = 0;
  for (int b = 0;; b++) {
    const Sight x = sight(op, s, b);
    const int count = chunks_of(op, x);
    if (chunk >= count) {
      chunk -= count;
      if (x.few) parts += ptrdiff_t(x.queries) * op.heads * x.splits;
      continue;
    }
    if (x.few) return {b, chunk / x.splits, 0, x.queries, chunk % x.splits + x.splits_from, parts, x.splits_from, x.splits};
    const int each = queries_a_chunk(op), blocks = ceil_div(x.queries, each);
    const int first = chunk % blocks * each;
    return {b, chunk / blocks, first, least(x.queries, first + each), -1, parts, x.splits_from, x.splits};
  }
}

template <int T, int R = MOST_ROWS>
INLINE void attend_some(const Cache<T>& cache, const Query* queries, int count, int split, int dim, Part* parts) {
  if constexpr (R > 1)
    if (count < R) return attend_some<T, R - 1>(cache, queries, count, split, dim, parts);
  attend_split<T, R>(cache, queries, split, dim, parts);
}

template <int T> void attend_rows(const Op& op, const Step& s, int chunk) {
  const Share w = share(op, s, chunk);
  const Sight x = sight(op, s, w.sequence);
  const Cache<T> cache(op, s, w.sequence, w.head);
  const int group = op.heads / op.kv_heads, dims = s.padded_dim, dim = op.head_dim;
  const int rows = (w.last - w.first) * group;
  for (int start = 0; start < rows; start += MOST_ROWS) {
    const int count = least(MOST_ROWS, rows - start);
    Query queries[MOST_ROWS];
    float* out[MOST_ROWS];
    ptrdiff_t part_at[MOST_ROWS];
    int from = s.lengths[w.sequence], to = 0;
    for (int r = 0; r < count; r++) {
      const int query = w.first + (start + r) / group, head = w.head * group + (start + r) % group;
      const int row = s.starts[w.sequence] + query, position = x.past + query;
      queries[r].q = buffer(s, op.in) + ptrdiff_t(row) * op.in_width + head * dim;
      queries[r].from = op.window ? greatest(0, position + 1 - op.window) : 0;
      queries[r].to = position + 1;
      out[r] = buffer(s, op.out) + ptrdiff_t(row) * op.out_width + head * dim;
      part_at[r] = w.parts + (ptrdiff_t(query) * op.heads + head) * w.splits;
      from = least(from, queries[r].from), to = greatest(to, queries[r].to);
    }
    Part parts[MOST_ROWS];
    if (w.split >= 0) {
      attend_some(cache, queries, count, w.split, dim, parts);
      for (int r = 0; r < count; r++) {
        float* at = buffer(s, PARTS_BUFFER) + (part_at[r] + w.split - w.splits_from) * part_floats(dims);
        std::memcpy(at, &parts[r], part_floats(dims) * sizeof(float));
      }
      continue;
    }
    Part sums[MOST_ROWS];
    for (int r = 0; r < count; r++) clear(sums[r], dims);
    for (int split = from / SPLIT; split * SPLIT < to; split++) {
      attend_some(cache, queries, count, split, dim, parts);
      for (int r = 0; r < count; r++) merge(sums[r], parts[r].most, parts[r].sum, parts[r].y, dims);
    }
    for (int r = 0; r < count; r++)
      for (int i = 0; i < dim; i++) out[r][i] = sums[r].y[i] / sums[r].sum;
  }
}

void merge_parts(const Op& op, const Step& s, int chunk) {
  ptrdiff_t at = 0;
  for (int b = 0; b < s.sequences; b++) {
    const Sight x = sight(op, s, b);
    if (!x.few) continue;
    if (chunk-- > 0) {
      at += ptrdiff_t(x.queries) * op.heads * x.splits;
      continue;
    }
    for (int query = 0; query < x.queries; query++)
      for (int head = 0; head < op.heads; head++) {
        Part sum;
        clear(sum, s.padded_dim);
        for (int split = 0; split < x.splits; split++, at++) {
          const float* part = buffer(s, PARTS_BUFFER) + at * part_floats(s.padded_dim);
          merge(sum, part[0], part[1], part + 2, s.padded_dim);
        }
        float* out = buffer(s, op.out) + ptrdiff_t(s.starts[b] + query) * op.out_width + head * op.head_dim;
        for (int i = 0; i < op.head_dim; i++) out[i] = sum.y[i] / sum.sum;
      }
    return;
  }
}

}  // namespace
}  // namespace pentad
