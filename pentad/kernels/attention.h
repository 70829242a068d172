// RoPE, the KV cache, and attention.
//
// A page of the cache holds `page_size` tokens of one layer, head after head. Values are stored as [tokens][dims]. Keys are
// stored in tiles of 16 tokens as [dims][16], so that one register holds one dimension of 16 keys, and scores need no sum
// over lanes. I8 stores integers from -127 to 127; one float scale per token follows the head's integers.
#pragma once
#include <cmath>

#include "rows.h"

namespace pentad {
namespace {

template <int T> struct Element { using type = uint16_t; };
template <> struct Element<F32> { using type = float; };
template <> struct Element<I8> { using type = int8_t; };

// Converts to the cache's type.
template <int T> INLINE auto narrow(F x) {
  if constexpr (T == F32) {
    return x;
  } else if constexpr (T == F16) {
    return Isa::to_halves(x);
  } else {
    const I u = as_integers(x), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;  // rounding a NaN could give infinity, or overflow
    return __builtin_convertvector((u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 64 : rounded, H16);
  }
}

template <int T> struct Cache {  // one head of one sequence
  using E = typename Element<T>::type;
  const int32_t* table;
  int dropped, page_size, dims;
  E *keys, *values;               // the head in page 0
  ptrdiff_t page_stride, scales;  // from one page to the next; from the head's numbers to its scales

  Cache(const Op& op, const Step& s, int sequence, int head)
      : table(s.block_tables + ptrdiff_t(sequence) * s.block_table_width), dropped(s.dropped[sequence]), page_size(s.page_size),
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

// Converts a head to integers from -127 to 127, and returns their scale.
INLINE float to_bytes(const float* x, int dim, int8_t* out) {
  F in[MAX_HEAD_DIM / LANES] = {};
  I n[MAX_HEAD_DIM / LANES];
  for (int i = 0; i < dim; i += LANES) in[i / LANES] = load_from(x, i, dim);
  const float scale = to_integers<127>(in, n);
  for (int i = 0; i < dim; i++) out[i] = int8_t(n[i / LANES][i % LANES]);
  return scale;
}

INLINE int sequence_of(const Step& s, int row) {
  int b = 0;
  while (s.cu_seqlens[b + 1] <= row) b++;
  return b;
}

template <class V> INLINE void rotate_lanes(float* x, const float* cosines, int half) {
  const V a = load<V>(x), b = load<V>(x + half), c = load<V>(cosines), s = load<V>(cosines + half);
  store(x, a * c - b * s);
  store(x + half, b * c + a * s);
}
INLINE void rotate_head(float* x, const float* cosines, int half) {
  int i = 0;
  for (; i + LANES <= half; i += LANES) rotate_lanes<F>(x + i, cosines + i, half);
  for (; i < half; i++) rotate_lanes<float>(x + i, cosines + i, half);
}

// Writes a token's key and value to the cache.
template <int T> INLINE void write_to_cache(const Cache<T>& cache, int position, const float* k, const float* v, int dim) {
  auto* keys = cache.key_tile(position & -LANES) + position % LANES;
  auto* values = cache.value(position);
  if constexpr (T == I8) {
    int8_t bytes[MAX_HEAD_DIM];
    *cache.scale(cache.keys, position) = to_bytes(k, dim, bytes);
    for (int i = 0; i < dim; i++) keys[i * LANES] = bytes[i];
    *cache.scale(cache.values, position) = to_bytes(v, dim, values);
    for (int i = dim; i < cache.dims; i++) values[i] = 0;
  } else {
    for (int i = 0; i < dim; i += LANES) {
      const auto lanes = narrow<T>(load_from(k, i, dim));
      for (int j = 0; j < min(LANES, dim - i); j++) keys[(i + j) * LANES] = lanes[j];
      store(values + i, narrow<T>(load_from(v, i, dim)));  // the padding becomes zeros
    }
  }
}

// The factor by which a query grows with its position (log_scale_after).
INLINE float log_scale(const Op& op, int position) {
  return op.log_scale_after && position + 1 > op.log_scale_after
             ? float(std::log(double(position + 1)) / std::log(double(op.log_scale_after)))
             : 1.0f;
}

template <int T> void rotate_rows(const Op& op, const Step& s, int chunk) {
  const int dim = op.head_dim, half = op.rotary_dim / 2;
  const bool centered = op.flags & CENTERED;
  for (int row = chunk * rows_per_chunk(op); row < last_row_of(op, s, chunk); row++) {
    const int b = sequence_of(s, row), position = s.positions[row];
    const float* cosines = s.rotations[b] + ptrdiff_t(position) * op.rotary_dim;
    const float factor = op.scale * log_scale(op, position);
    float* x = buffer(s, op.out) + ptrdiff_t(row) * op.out_width;
    for (int h = 0; h < op.heads; h++, x += dim) {
      if (op.weight) normalize(x, op.weight, op.bias, centered, op.eps, dim, x);
      rotate_head(x, cosines, half);
      for (int i = 0; i < dim; i++) x[i] *= factor;
    }
    for (int g = 0; g < op.kv_heads; g++, x += dim) {
      if (op.weight2) normalize(x, op.weight2, op.bias2, centered, op.eps, dim, x);
      rotate_head(x, cosines, half);
      write_to_cache<T>(Cache<T>(op, s, b, g), position, x, x + op.kv_heads * dim, dim);
    }
  }
}

constexpr int KEYS_PER_SPLIT = 128;   // one partial softmax covers this many keys
constexpr int MAX_SPLIT_QUERIES = 4;  // a sequence with more queries divides queries, not keys, among threads

// A partial softmax: one query of one head over some of the keys.
struct PartialSoftmax {
  float max, sum;
  float y[MAX_HEAD_DIM];  // the sum of values, weighted by e^(score - max)
};
constexpr int partial_floats(int dims) { return 2 + dims; }

INLINE void merge(PartialSoftmax& total, float max, float sum, const float* y, int dims) {
  if (max == -__builtin_inff() && sum == 0) return;  // none of these keys was visible
  const float new_max = max > total.max ? max : total.max;
  const float old_factor = exponential(broadcast(total.max - new_max))[0], factor = exponential(broadcast(max - new_max))[0];
  total.max = new_max;
  total.sum = total.sum * old_factor + sum * factor;
  for (int i = 0; i < dims; i += LANES) store(total.y + i, load<F>(total.y + i) * old_factor + load<F>(y + i) * factor);
}
INLINE void clear(PartialSoftmax& partial, int dims) {
  partial.max = -__builtin_inff();
  partial.sum = 0;
  std::memset(partial.y, 0, dims * sizeof(float));
}

struct Query {
  const float* q;
  int from, to;  // positions of the visible keys
};

// Scores of N tiles of 16 keys; those of hidden keys are -infinity.
template <int T, int R, int N>
INLINE void score(const Cache<T>& cache, const Query* queries, int position, int dim, float (*scores)[KEYS_PER_SPLIT]) {
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
      for (int r = 0; r < R; r++) sums[r][n] = Isa::fma(k, broadcast(queries[r].q[i]), sums[r][n]);
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
        x = ((p >= queries[r].from) & (p < queries[r].to)) ? x : broadcast(-__builtin_inff());
      store(scores[r] + at % KEYS_PER_SPLIT, x);
    }
  }
}

// Adds p * value for keys `from` to `to` of one split, for N registers of dimensions.
template <int T, int R, int N>
INLINE void add_values(const Cache<T>& cache, int from, int to, int dim, const float (*p)[KEYS_PER_SPLIT], PartialSoftmax* partials) {
  F y[R][N];
  UNROLL
  for (int r = 0; r < R; r++) {
    UNROLL
    for (int n = 0; n < N; n++) y[r][n] = F{};
  }
  for (int start = from; start < to;) {
    const int stop = min(to, (start & -LANES) + LANES);
    const typename Cache<T>::E* v = cache.value(start) + dim;
    for (int at = start; at < stop; at++, v += cache.dims) {
      F vs[N];
      UNROLL
      for (int n = 0; n < N; n++) vs[n] = floats<T>((const uint8_t*)(v + n * LANES));
      UNROLL
      for (int r = 0; r < R; r++) {
        const F weight = broadcast(p[r][at % KEYS_PER_SPLIT]);
        UNROLL
        for (int n = 0; n < N; n++) y[r][n] = Isa::fma(vs[n], weight, y[r][n]);
      }
    }
    start = stop;
  }
  UNROLL
  for (int r = 0; r < R; r++) {
    UNROLL
    for (int n = 0; n < N; n++) store(partials[r].y + dim + n * LANES, y[r][n]);
  }
}

// Computes the partial softmaxes of R queries over one split of the keys.
template <int T, int R>
void attend_split(const Cache<T>& cache, const Query* queries, int split, int dim, PartialSoftmax* partials) {
  int from = queries[0].from, to = queries[0].to;
  for (int r = 1; r < R; r++) from = min(from, queries[r].from), to = max(to, queries[r].to);
  from = max(from, split * KEYS_PER_SPLIT);
  to = min(to, (split + 1) * KEYS_PER_SPLIT);
  float scores[R][KEYS_PER_SPLIT];
  const int first = from & -LANES;
  constexpr int AT_ONCE = R <= 4 ? 2 : 1;
  int at = first;
  for (; at + (AT_ONCE - 1) * LANES < to; at += AT_ONCE * LANES) score<T, R, AT_ONCE>(cache, queries, at, dim, scores);
  for (; at < to; at += LANES) score<T, R, 1>(cache, queries, at, dim, scores);
  for (int r = 0; r < R; r++) {
    F highest = broadcast(-__builtin_inff());
    for (at = first; at < to; at += LANES) highest = max(load<F>(scores[r] + at % KEYS_PER_SPLIT), highest);
    partials[r].max = Isa::max_lanes(highest);
    const float base = partials[r].max == -__builtin_inff() ? 0.0f : partials[r].max;
    F sum = {};
    for (at = first; at < to; at += LANES) {
      F p = exponential(load<F>(scores[r] + at % KEYS_PER_SPLIT) - base);
      sum += p;
      if constexpr (T == I8) p *= load<F>(cache.scale(cache.values, at));
      store(scores[r] + at % KEYS_PER_SPLIT, p);
    }
    partials[r].sum = Isa::sum_lanes(sum);
  }
  constexpr int WIDE = R <= 4 ? 4 : 2;
  int i = 0;
  for (; i + WIDE * LANES <= cache.dims; i += WIDE * LANES) add_values<T, R, WIDE>(cache, from, to, i, scores, partials);
  for (; i < cache.dims; i += LANES) add_values<T, R, 1>(cache, from, to, i, scores, partials);
}

// One chunk of ATTEND: some queries of a sequence, one key/value head, and one split of the keys or all keys.
struct KeySplit {
  int sequence, head;
  int first, last;     // queries, relative to the sequence
  int split;           // -1: all
  ptrdiff_t partials;  // index of the sequence's first partial softmax
  int first_split, splits;
};
INLINE int queries_per_chunk(const Op& op) { return max(1, 64 * op.kv_heads / op.heads); }

// A sequence's queries, and the splits of the keys visible to them.
struct AttentionRange {
  int queries, past, first_split, splits;
  bool split_keys;  // divide keys, not queries, among threads
  int64_t partials(const Op& op) const { return split_keys ? int64_t(queries) * op.heads * splits : 0; }
};
INLINE AttentionRange attention_range(const Op& op, const Step& s, int b) {
  AttentionRange x;
  x.queries = s.cu_seqlens[b + 1] - s.cu_seqlens[b];
  x.past = s.lengths[b] - x.queries;
  const int from = op.window ? max(0, x.past + 1 - op.window) : 0;
  x.first_split = from / KEYS_PER_SPLIT;
  x.splits = ceil_div(s.lengths[b], KEYS_PER_SPLIT) - x.first_split;
  x.split_keys = x.queries <= MAX_SPLIT_QUERIES && x.splits > 1;
  return x;
}
INLINE int chunks_of(const Op& op, const AttentionRange& x) {
  return op.kv_heads * (x.split_keys ? x.splits : ceil_div(x.queries, queries_per_chunk(op)));
}
// The floats that ATTEND needs in PARTIALS.
INLINE int64_t partials_size(const Op& op, const Step& s) {
  int64_t count = 0;
  for (int b = 0; b < s.sequences; b++) count += attention_range(op, s, b).partials(op);
  return count * partial_floats(s.padded_dim);
}
INLINE KeySplit key_split(const Op& op, const Step& s, int chunk) {
  ptrdiff_t partials = 0;
  for (int b = 0;; b++) {
    const AttentionRange x = attention_range(op, s, b);
    const int count = chunks_of(op, x);
    if (chunk >= count) {
      chunk -= count;
      partials += x.partials(op);
      continue;
    }
    if (x.split_keys)
      return {b, chunk / x.splits, 0, x.queries, chunk % x.splits + x.first_split, partials, x.first_split, x.splits};
    const int each = queries_per_chunk(op), blocks = ceil_div(x.queries, each);
    const int first = chunk % blocks * each;
    return {b, chunk / blocks, first, min(x.queries, first + each), -1, partials, x.first_split, x.splits};
  }
}

template <int T, int R = ROWS_PER_PASS>
INLINE void attend_queries(const Cache<T>& cache, const Query* queries, int count, int split, int dim, PartialSoftmax* partials) {
  if constexpr (R > 1)
    if (count < R) return attend_queries<T, R - 1>(cache, queries, count, split, dim, partials);
  attend_split<T, R>(cache, queries, split, dim, partials);
}

template <int T> void attend_rows(const Op& op, const Step& s, int chunk) {
  const KeySplit w = key_split(op, s, chunk);
  const AttentionRange x = attention_range(op, s, w.sequence);
  const Cache<T> cache(op, s, w.sequence, w.head);
  const int group = op.heads / op.kv_heads, dims = s.padded_dim, dim = op.head_dim;
  const int rows = (w.last - w.first) * group;
  for (int start = 0; start < rows; start += ROWS_PER_PASS) {
    const int count = min(ROWS_PER_PASS, rows - start);
    Query queries[ROWS_PER_PASS];
    float* out[ROWS_PER_PASS];
    ptrdiff_t partial_index[ROWS_PER_PASS];
    int from = s.lengths[w.sequence], to = 0;
    for (int r = 0; r < count; r++) {
      const int query = w.first + (start + r) / group, head = w.head * group + (start + r) % group;
      const int row = s.cu_seqlens[w.sequence] + query, position = x.past + query;
      queries[r].q = buffer(s, op.in) + ptrdiff_t(row) * op.in_width + head * dim;
      queries[r].from = op.window ? max(0, position + 1 - op.window) : 0;
      queries[r].to = position + 1;
      out[r] = buffer(s, op.out) + ptrdiff_t(row) * op.out_width + head * dim;
      partial_index[r] = w.partials + (ptrdiff_t(query) * op.heads + head) * w.splits;
      from = min(from, queries[r].from), to = max(to, queries[r].to);
    }
    PartialSoftmax partials[ROWS_PER_PASS];
    if (w.split >= 0) {
      attend_queries(cache, queries, count, w.split, dim, partials);
      for (int r = 0; r < count; r++) {
        float* at = buffer(s, PARTIALS) + (partial_index[r] + w.split - w.first_split) * partial_floats(dims);
        std::memcpy(at, &partials[r], partial_floats(dims) * sizeof(float));
      }
      continue;
    }
    PartialSoftmax sums[ROWS_PER_PASS];
    for (int r = 0; r < count; r++) clear(sums[r], dims);
    for (int split = from / KEYS_PER_SPLIT; split * KEYS_PER_SPLIT < to; split++) {
      attend_queries(cache, queries, count, split, dim, partials);
      for (int r = 0; r < count; r++) merge(sums[r], partials[r].max, partials[r].sum, partials[r].y, dims);
    }
    for (int r = 0; r < count; r++)
      for (int i = 0; i < dim; i++) out[r][i] = sums[r].y[i] / sums[r].sum;
  }
}

void merge_partials(const Op& op, const Step& s, int chunk) {
  ptrdiff_t at = 0;
  for (int b = 0; b < s.sequences; b++) {
    const AttentionRange x = attention_range(op, s, b);
    if (!x.split_keys) continue;
    if (chunk-- > 0) {
      at += x.partials(op);
      continue;
    }
    for (int query = 0; query < x.queries; query++)
      for (int head = 0; head < op.heads; head++) {
        PartialSoftmax sum;
        clear(sum, s.padded_dim);
        for (int split = 0; split < x.splits; split++, at++) {
          const float* partial = buffer(s, PARTIALS) + at * partial_floats(s.padded_dim);
          merge(sum, partial[0], partial[1], partial + 2, s.padded_dim);
        }
        float* out = buffer(s, op.out) + ptrdiff_t(s.cu_seqlens[b] + query) * op.out_width + head * op.head_dim;
        for (int i = 0; i < op.head_dim; i++) out[i] = sum.y[i] / sum.sum;
      }
    return;
  }
}

}  // namespace
}  // namespace pentad
