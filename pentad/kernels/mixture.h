// Mixtures of experts: which rows go to which expert, and back. Between the two, a product's rows are pairs of a row and one
// of its experts, sorted by expert (rows.h).
#pragma once
#include "rows.h"

namespace pentad {
namespace {

// What a router decided for the step's rows, K experts each.
struct Routes {
  int32_t* ends;   // [experts]: where each one's pairs end
  int32_t* row;    // of each pair
  int32_t* place;  // [rows, K]: the pair of a row's k-th expert; -1 where it was dropped
  float* weight;   // [rows, K]
  int32_t* chosen; // [rows, K]: the experts
  int32_t* taken;  // [experts]: by a sequence
  Routes(const Op& op, const Step& s) {
    const ptrdiff_t pairs = ptrdiff_t(s.rows) * op.count;
    ends = (int32_t*)s.buffers[ROUTES_BUFFER], row = ends + op.experts, place = row + pairs;
    weight = (float*)(place + pairs), chosen = place + 2 * pairs, taken = chosen + pairs;
  }
};

// A row's K experts with the largest scores, the largest first, and their weights. NaN counts as the largest.
INLINE void choose(const Op& op, const float* scores, int32_t* chosen, float* weight) {
  for (int k = 0; k < op.count; k++) {
    int best = -1;
    for (int e = 0; e < op.experts; e++) {
      bool free = true;
      for (int i = 0; i < k; i++) free &= chosen[i] != e;
      if (free && (best < 0 || scores[e] > scores[best] || (scores[e] != scores[e] && scores[best] == scores[best]))) best = e;
    }
    chosen[k] = best;
  }
  const float most = scores[chosen[0]];
  float sum = 0;
  if (op.flags & NORMALIZED)
    for (int k = 0; k < op.count; k++) sum += exponential(all(scores[chosen[k]] - most))[0];
  else
    for (int e = 0; e < op.experts; e++) sum += exponential(all(scores[e] - most))[0];
  for (int k = 0; k < op.count; k++) weight[k] = exponential(all(scores[chosen[k]] - most))[0] / sum;
}

// One thread decides for all rows. Where an expert takes so many of a sequence's rows at most, all first choices, by
// position, come before all second ones.
void route(const Op& op, const Step& s) {
  const Routes r(op, s);
  const int K = op.count;
  std::memset(r.ends, 0, op.experts * sizeof(int32_t));
  for (int n = 0; n < s.rows; n++)
    choose(op, buffer(s, op.in) + ptrdiff_t(n) * op.in_width, r.chosen + ptrdiff_t(n) * K, r.weight + ptrdiff_t(n) * K);
  for (int b = 0; b < s.sequences; b++) {
    const int limit = op.capacity < 0 ? s.rows : s.limits[op.capacity * s.sequences + b];
    std::memset(r.taken, 0, op.experts * sizeof(int32_t));
    for (int k = 0; k < K; k++)
      for (ptrdiff_t n = s.starts[b]; n < s.starts[b + 1]; n++) {
        const int e = r.chosen[n * K + k];
        const bool kept = r.taken[e]++ < limit;
        r.ends[e] += kept;
        r.place[n * K + k] = kept ? 0 : -1;
      }
  }
  for (int e = 0, start = 0; e < op.experts; e++) {  // where each one's begin, which grows to where they end
    const int count = r.ends[e];
    r.ends[e] = start;
    start += count;
  }
  for (ptrdiff_t i = 0; i < ptrdiff_t(s.rows) * K; i++)
    if (r.place[i] >= 0) {
      r.place[i] = r.ends[r.chosen[i]]++;
      r.row[r.place[i]] = int(i / K);
    }
}

void gather(const Op& op, const Step& s, int chunk) {
  const Routes r(op, s);
  for (int pair = chunk * rows_a_chunk(op); pair < last_row_of(op, s, chunk); pair++) {
    const float* x = buffer(s, op.in) + ptrdiff_t(r.row[pair]) * op.in_width;
    std::memcpy(buffer(s, op.out) + ptrdiff_t(pair) * op.in_width, x, op.in_width * sizeof(float));
    if (op.flags & QUANTIZED) quantize_row(s, x, pair, op.in_width);
  }
}

void combine(const Op& op, const Step& s, int chunk) {
  const Routes r(op, s);
  for (ptrdiff_t row = chunk * rows_a_chunk(op); row < last_row_of(op, s, chunk); row++) {
    float* out = buffer(s, op.out) + row * op.out_width;
    for (int i = 0; i < op.out_width; i += LANES) {
      F sum = {};
      for (int k = 0; k < op.count; k++) {
        const ptrdiff_t place = r.place[row * op.count + k];
        if (place >= 0) sum = Isa::fma(load_from(buffer(s, op.in) + place * op.in_width, i, op.in_width), all(r.weight[row * op.count + k]), sum);
      }
      sum += load_from(out, i, op.out_width);
      std::memcpy(out + i, &sum, least(LANES, op.out_width - i) * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace pentad
