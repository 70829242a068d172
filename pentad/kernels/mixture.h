// Mixtures of experts: routing rows to experts, and combining the results. In between, matmuls run on (row, expert)
// pairs, sorted by expert (rows.h).
#pragma once
#include "rows.h"

namespace pentad {
namespace {

// The routing of a step's rows, K experts each.
struct Routes {
  int32_t* ends;     // [experts]: where each expert's pairs end
  int32_t* row;      // [pairs]
  int32_t* pair;     // [rows, K]: the pair of a row's k-th expert; -1 if it was dropped
  float* weight;     // [rows, K]
  int32_t* experts;  // [rows, K]
  int32_t* counts;   // [experts]: rows of the current sequence
  Routes(const Op& op, const Step& s) {
    const ptrdiff_t pairs = ptrdiff_t(s.rows) * op.count;
    ends = (int32_t*)s.buffers[ROUTES], row = ends + op.experts, pair = row + pairs;
    weight = (float*)(pair + pairs), experts = pair + 2 * pairs, counts = experts + pairs;
  }
  static int64_t size(const Op& op, const Step& s) { return int64_t(s.rows) * op.count * 4 + 2 * op.experts; }
};

// Chooses the K experts with the largest scores, largest first, and their weights. NaN counts as the largest.
INLINE void choose(const Op& op, const float* scores, int32_t* experts, float* weight) {
  for (int k = 0; k < op.count; k++) {
    int best = -1;
    for (int e = 0; e < op.experts; e++) {
      bool free = true;
      for (int i = 0; i < k; i++) free &= experts[i] != e;
      if (free && (best < 0 || scores[e] > scores[best] || (scores[e] != scores[e] && scores[best] == scores[best]))) best = e;
    }
    experts[k] = best;
  }
  const float max_score = scores[experts[0]];
  float sum = 0;
  if (op.flags & NORMALIZED)
    for (int k = 0; k < op.count; k++) sum += exponential(broadcast(scores[experts[k]] - max_score))[0];
  else
    for (int e = 0; e < op.experts; e++) sum += exponential(broadcast(scores[e] - max_score))[0];
  for (int k = 0; k < op.count; k++) weight[k] = exponential(broadcast(scores[experts[k]] - max_score))[0] / sum;
}

// One thread routes all rows. With a capacity, all rows' first choices are routed, in order of position, before any
// second choice.
void route(const Op& op, const Step& s) {
  const Routes r(op, s);
  const int K = op.count;
  std::memset(r.ends, 0, op.experts * sizeof(int32_t));
  for (int n = 0; n < s.rows; n++)
    choose(op, buffer(s, op.in) + ptrdiff_t(n) * op.in_width, r.experts + ptrdiff_t(n) * K, r.weight + ptrdiff_t(n) * K);
  for (int b = 0; b < s.sequences; b++) {
    const int limit = op.capacity < 0 ? s.rows : s.limits[op.capacity * s.sequences + b];
    std::memset(r.counts, 0, op.experts * sizeof(int32_t));
    for (int k = 0; k < K; k++)
      for (ptrdiff_t n = s.cu_seqlens[b]; n < s.cu_seqlens[b + 1]; n++) {
        const int e = r.experts[n * K + k];
        const bool kept = r.counts[e]++ < limit;
        r.ends[e] += kept;
        r.pair[n * K + k] = kept ? 0 : -1;
      }
  }
  for (int e = 0, start = 0; e < op.experts; e++) {  // counts become starts, which the next loop advances to ends
    const int count = r.ends[e];
    r.ends[e] = start;
    start += count;
  }
  for (ptrdiff_t i = 0; i < ptrdiff_t(s.rows) * K; i++)
    if (r.pair[i] >= 0) {
      r.pair[i] = r.ends[r.experts[i]]++;
      r.row[r.pair[i]] = int(i / K);
    }
}

void gather(const Op& op, const Step& s, int chunk) {
  const Routes r(op, s);
  for (int pair = chunk * rows_per_chunk(op); pair < last_row_of(op, s, chunk); pair++) {
    const float* x = buffer(s, op.in) + ptrdiff_t(r.row[pair]) * op.in_width;
    std::memcpy(buffer(s, op.out) + ptrdiff_t(pair) * op.in_width, x, op.in_width * sizeof(float));
    if (op.flags & QUANTIZED) quantize_row(s, x, pair, op.in_width);
  }
}

void combine(const Op& op, const Step& s, int chunk) {
  const Routes r(op, s);
  for (ptrdiff_t row = chunk * rows_per_chunk(op); row < last_row_of(op, s, chunk); row++) {
    float* out = buffer(s, op.out) + row * op.out_width;
    for (int i = 0; i < op.out_width; i += LANES) {
      F sum = {};
      for (int k = 0; k < op.count; k++) {
        const ptrdiff_t pair = r.pair[row * op.count + k];
        if (pair >= 0) sum = Isa::fma(load_from(buffer(s, op.in) + pair * op.in_width, i, op.in_width), broadcast(r.weight[row * op.count + k]), sum);
      }
      sum += load_from(out, i, op.out_width);
      std::memcpy(out + i, &sum, min(LANES, op.out_width - i) * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace pentad
