// Attention over paged caches, against loops in double.
#pragma once
#include "check.h"

namespace {

struct Heads {
  int heads, kv_heads, dim, window;  // window 0: all keys
  bool norms;                        // of queries and keys
  int width() const { return (heads + 2 * kv_heads) * dim; }
  int padded() const { return (dim + 15) / 16 * 16; }
};

struct Sequence {
  int length;
  Floats rows, rotation;  // queries, keys and values; a table of cosines and sines for each position
  Ints pages = {};
  int past = 0, dropped = 0;
  Floats out = {};

  Sequence(const Heads& h, int length_, Random& random, float scale = 1)
      : length(length_), rows(random.numbers(size_t(length) * h.width(), scale)), rotation(size_t(length) * h.dim) {
    const int half = h.dim / 2;
    for (int i = 0; i < half * length; i++) {
      const double angle = i / half * std::pow(100.0 + length, -double(i % half) / half);
      rotation[i / half * h.dim + i % half] = float(std::cos(angle));
      rotation[i / half * h.dim + half + i % half] = float(std::sin(angle));
    }
  }
};

// Attention of a whole sequence, by its definition.
Doubles exact_attention(const Heads& h, const Sequence& s, const Floats& q_norm, const Floats& k_norm) {
  Doubles x(s.rows.begin(), s.rows.end()), out(size_t(s.length) * h.heads * h.dim);
  const int half = h.dim / 2;
  for (int n = 0; n < s.length; n++)
    for (int head = 0; head < h.heads + h.kv_heads; head++) {
      double* p = &x[size_t(n) * h.width() + head * h.dim];
      double squares = 0;
      for (int i = 0; i < h.dim; i++) squares += p[i] * p[i];
      for (int i = 0; h.norms && i < h.dim; i++)
        p[i] *= (head < h.heads ? q_norm : k_norm)[i] / std::sqrt(squares / h.dim + 1e-6);
      for (int i = 0; i < half; i++) {
        const double a = p[i], b = p[i + half], cosine = s.rotation[n * h.dim + i], sine = s.rotation[n * h.dim + half + i];
        p[i] = a * cosine - b * sine, p[i + half] = b * cosine + a * sine;
      }
    }
  for (int n = 0; n < s.length; n++)
    for (int head = 0; head < h.heads; head++) {
      const double* q = &x[size_t(n) * h.width() + head * h.dim];
      const int from = h.window ? std::max(0, n + 1 - h.window) : 0;
      const int kv = h.heads + head / (h.heads / h.kv_heads);
      Doubles scores;
      for (int j = from; j <= n; j++) {
        double score = 0;
        for (int i = 0; i < h.dim; i++) score += q[i] * x[size_t(j) * h.width() + kv * h.dim + i];
        scores.push_back(score / std::sqrt(h.dim));
      }
      const double highest = *std::max_element(scores.begin(), scores.end());
      double sum = 0, *y = &out[(size_t(n) * h.heads + head) * h.dim];
      for (double& score : scores) sum += score = std::exp(score - highest);
      for (int j = from; j <= n; j++)
        for (int i = 0; i < h.dim; i++)
          y[i] += scores[j - from] / sum * x[size_t(j) * h.width() + (kv + h.kv_heads) * h.dim + i];
    }
  return out;
}

// Runs sequences in a new cache, in steps of up to `max_rows` rows of each. Pages are in random order, and pages that left
// the window are reused. Memory that was never written is NaN.
void attend(const Options& options, const Heads& h, Type type, int page_size, int max_rows, std::vector<Sequence>& sequences,
            const Floats& q_norm, const Floats& k_norm, Random& random) {
  const size_t page_bytes = size_t(page_size) * h.kv_heads * (type == I8 ? h.padded() + 4 : h.padded() * (type == F32 ? 4 : 2));
  Ints free;
  for (const Sequence& s : sequences)
    for (int i = 0; i < s.length; i += page_size) free.push_back(int(free.size()));
  for (size_t i = free.size(); i > 1; i--) std::swap(free[i - 1], free[random.below(int(i))]);
  Bytes keys(free.size() * page_bytes, 0xff), values = keys;
  void *const key_pools[] = {nullptr, keys.data()}, *const value_pools[] = {nullptr, values.data()};

  for (;;) {
    Plan plan(options);
    for (OpKind kind : {ROTATE, ATTEND, MERGE}) {
      Op& op = kind == ROTATE ? plan.add(kind, 0, 0, PROJECTED, h.width())
                              : plan.add(kind, PROJECTED, h.width(), ATTENDED, h.heads * h.dim);
      op.layer = 1;
      op.heads = h.heads, op.kv_heads = h.kv_heads, op.head_dim = h.dim, op.window = h.window;
      op.rotary_dim = h.dim;
      op.scale = float(1 / std::sqrt(h.dim)), op.eps = 1e-6f;
      if (kind == ROTATE && h.norms) op.weight = q_norm.data(), op.weight2 = k_norm.data();
    }
    Floats rows;
    Ints positions, starts = {0}, lengths, dropped, tables;
    std::vector<const float*> rotations;
    std::vector<Sequence*> active;
    size_t width = 0;
    for (Sequence& s : sequences) {
      const int count = std::min(s.length - s.past, max_rows < s.length ? random.below(max_rows + 1) : max_rows);
      if (count == 0) continue;
      for (; h.window && s.dropped + page_size <= s.past + 1 - h.window; s.dropped += page_size) {
        std::memset(&keys[s.pages[0] * page_bytes], 0xff, page_bytes);
        std::memset(&values[s.pages[0] * page_bytes], 0xff, page_bytes);
        free.insert(free.begin(), s.pages[0]);
        s.pages.erase(s.pages.begin());
      }
      for (int i = 0; i < count; i++) positions.push_back(s.past + i);
      const Floats next = some_rows(s.rows, h.width(), s.past, count);
      rows.insert(rows.end(), next.begin(), next.end());
      s.past += count;
      for (; s.dropped + int(s.pages.size()) * page_size < s.past; free.pop_back()) s.pages.push_back(free.back());
      starts.push_back(int(positions.size()));
      lengths.push_back(s.past), dropped.push_back(s.dropped), rotations.push_back(s.rotation.data());
      active.push_back(&s);
      width = std::max(width, s.pages.size());
    }
    if (active.empty()) {
      if (std::all_of(sequences.begin(), sequences.end(), [](const Sequence& s) { return s.past == s.length; })) return;
      continue;
    }
    for (const Sequence* s : active) {
      tables.insert(tables.end(), s->pages.begin(), s->pages.end());
      tables.resize(tables.size() + width - s->pages.size());
    }
    Step& step = plan.step;
    step.sequences = int(active.size()), step.block_table_width = int(width);
    step.page_size = page_size, step.cache_type = type, step.padded_dim = h.padded();
    step.positions = positions.data(), step.cu_seqlens = starts.data(), step.lengths = lengths.data();
    step.dropped = dropped.data(), step.block_tables = tables.data(), step.rotations = rotations.data();
    step.keys = key_pools, step.values = value_pools;
    plan.run(PROJECTED, rows, int(positions.size()));
    for (size_t b = 0; b < active.size(); b++) {
      const Floats y = some_rows(plan.buffers[ATTENDED], h.heads * h.dim, starts[b], starts[b + 1] - starts[b]);
      active[b]->out.insert(active[b]->out.end(), y.begin(), y.end());
    }
  }
}

void check_attention(const Heads& h, const Ints& isas, bool quick, Random& random) {
  const Floats q_norm = random.numbers(h.dim), k_norm = random.numbers(h.dim);
  std::vector<Sequence> fresh;
  for (int length : {quick ? 150 : 290, 1, 40, 133}) fresh.emplace_back(h, length, random);
  fresh.emplace_back(h, 20, random, 0.0f);
  fresh.emplace_back(h, 20, random, h.norms ? 1.0f : 1e3f);
  std::vector<Doubles> exact;
  for (const Sequence& s : fresh) exact.push_back(exact_attention(h, s, q_norm, k_norm));
  Sequence damaged(h, 40, random);
  damaged.rows[7 * h.width()] = NAN;
  fresh.push_back(damaged);

  for (int isa : isas)
    for (Type type : {F32, F16, BF16, I8}) {
      const double bound = type == F32 ? 1e-5 : type == F16 ? 8e-3 : type == BF16 ? 6e-2 : 0.2;
      const std::string what = std::to_string(h.heads) + "/" + std::to_string(h.kv_heads) + " heads of " + std::to_string(h.dim) +
                               ", window " + std::to_string(h.window) + ", cache " + (type == I8 ? "i8" : formats[type].name);
      std::vector<Sequence> whole = fresh;
      attend({isa, false, 1}, h, type, 32, 1000, whole, q_norm, k_norm, random);
      for (size_t b = 0; b < exact.size(); b++) {
        double error = 0, size = 1;
        bool ok = whole[b].out.size() == exact[b].size() && finite(whole[b].out);
        for (float v : whole[b].rows) size = std::max(size, std::fabs(double(v)) / 2);
        // the error of large scores is that of their last bits
        if (size > 10 && type != F32) continue;
        for (size_t i = 0; ok && i < exact[b].size(); i++) error = std::max(error, std::fabs(whole[b].out[i] - exact[b][i]));
        expect(ok && error <= bound * size, what + ": near double" + Options{isa, false, 1});
      }
      struct Steps {
        int page_size, max_rows, threads;
      };
      std::vector<Steps> ways = {{16, 9, 3}};
      if (!quick) ways.insert(ways.end(), {{32, 70, 2}, {128, 4, 5}});
      for (const Steps& steps : ways) {
        std::vector<Sequence> again = fresh;
        const Options options{isa, false, steps.threads};
        attend(options, h, type, steps.page_size, steps.max_rows, again, q_norm, k_norm, random);
        for (size_t b = 0; b < exact.size(); b++) expect(same(again[b].out, whole[b].out), what + ": same bits in parts" + options);
      }
    }
}

}  // namespace
