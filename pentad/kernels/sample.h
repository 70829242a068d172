// Sampling: one token of a row of logits. Temperature, top-k, top-p and min-p apply in this order, as in transformers.
#pragma once
#include <algorithm>

#include "rows.h"

namespace pentad {
namespace {

constexpr int SPAN = 1024;             // weights that are added up as floats; their sums are doubles
constexpr int BUCKETS = 0x3f8 + 1;     // of weights, by exponent and 3 bits of the fraction; the first has the weight 1

struct Candidate {
  float weight;
  int32_t token;
};

INLINE int bucket_of(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, 4);
  return max(0, BUCKETS - 1 - int(bits >> 20));
}
INLINE float least_of(int bucket) {
  const uint32_t bits = uint32_t(BUCKETS - 1 - bucket) << 20;
  float weight;
  std::memcpy(&weight, &bits, 4);
  return weight;
}

// NaN if there is one.
INLINE float largest_of(const float* x, int count) {
  F most = broadcast(-__builtin_inff());
  I nan = {};
  int i = 0;
  for (F v; i + LANES <= count; i += LANES) v = load<F>(x + i), most = max(v, most), nan |= v != v;
  F rest = broadcast(-__builtin_inff());
  std::memcpy(&rest, x + i, (count - i) * sizeof(float));
  most = max(rest, most), nan |= rest != rest;
  return Isa::max_lanes(-nan) ? __builtin_nanf("") : Isa::max_lanes(most);
}

INLINE float span_sum(const float* weights, int start, int count) {
  F sum = {};
  for (int i = start; i < min(count, start + SPAN); i += LANES) sum += load<F>(weights + i);
  return Isa::sum_lanes(sum);
}

// exp((x - largest) / temperature), 0 if below `least`; padded with zeros. Returns the sum.
INLINE double weigh(const float* x, int count, float largest, float temperature, float least, float* weights) {
  for (int i = 0; i < count; i += LANES) {
    F w = exponential((load_from(x, i, count) - largest) / temperature);
    for (int j = count - i; j < LANES; j++) w[j] = 0;
    store(weights + i, w < least ? F{} : w);
  }
  double total = 0;
  for (int i = 0; i < count; i += SPAN) total += span_sum(weights, i, count);
  return total;
}

// The first token at which the running sum exceeds `target`; else the last with a weight.
INLINE int32_t invert(const float* weights, int count, double target) {
  int start = 0;
  for (float sum; start + SPAN < count && target >= (sum = span_sum(weights, start, count)); start += SPAN) target -= sum;
  int32_t token = 0;
  for (int i = start; i < count; i++)
    if (weights[i] > 0) {
      token = i;
      if (target < weights[i]) break;
      target -= weights[i];
    }
  return token;
}

// The tokens that top-k, or the sum `enough`, may keep, and perhaps some more; the heaviest first.
INLINE int select(const float* weights, int count, int top_k, double enough, Candidate* found) {
  int32_t counts[BUCKETS] = {};
  double sums[BUCKETS] = {};
  for (int i = 0; i < count; i++)
    if (weights[i] > 0) {
      const int bucket = bucket_of(weights[i]);
      counts[bucket]++, sums[bucket] += weights[i];
    }
  int bucket = 0, tokens = 0;
  double sum = 0;
  for (;; bucket++) {
    tokens += counts[bucket], sum += sums[bucket];
    if (bucket == BUCKETS - 1 || (top_k ? tokens >= top_k : sum >= enough)) break;
  }
  const float least = least_of(bucket);
  int n = 0;
  for (int32_t i = 0; i < count; i++)
    if (weights[i] > 0 && weights[i] >= least) found[n++] = {weights[i], i};
  std::sort(found, found + n, [](const Candidate& a, const Candidate& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
  });
  return n;
}

INLINE int32_t draw(const Draw& d, int count, float* weights, Candidate* found) {
  const bool filtered = d.top_k || d.top_p < 1;
  double total = weigh(d.logits, count, d.largest, d.temperature, filtered ? 0 : d.min_p, weights);
  if (!filtered) return invert(weights, count, d.uniform * total);
  int n = select(weights, count, d.top_k, d.top_p * total, found);
  if (d.top_k) {
    n = min(n, d.top_k), total = 0;
    for (int i = 0; i < n; i++) total += found[i].weight;
  }
  double kept = found[0].weight;
  int end = 1;
  for (; end < n && kept < d.top_p * total && found[end].weight >= d.min_p; end++) kept += found[end].weight;
  double target = d.uniform * kept;
  int at = 0;
  for (; at < end - 1 && target >= found[at].weight; at++) target -= found[at].weight;
  return found[at].token;
}

// Fills in the results. The scratch has room for a row's weights and candidates.
void sample(Draw* draws, int rows, int count, float* scratch) {
  auto* found = (Candidate*)(scratch + ceil_div(count, LANES) * LANES);
  for (Draw* d = draws; d < draws + rows; d++) {
    d->largest = largest_of(d->logits, count), d->token = 0;
    if (!(d->largest - d->largest == 0)) continue;  // NaN or infinite
    if (d->temperature > 0) d->token = draw(*d, count, scratch, found);
    else while (d->logits[d->token] != d->largest) d->token++;
  }
}

}  // namespace
}  // namespace pentad
