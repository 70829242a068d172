// Checks the kernels through their C interface, for every instruction set of this CPU: results against loops in double,
// identical bits for any division of the work and any number of threads, and the thread pool under stress. Each buffer is
// a heap allocation of exactly the size that program.py reserves, so AddressSanitizer sees any access outside.
// `check quick` uses fewer shapes, and stresses the pool for a second. `check no-forks` is for runtimes that don't support
// threads after a fork. Returns 0 if every check passed.
#include <signal.h>

#include "check_attention.h"
#include "check_pool.h"

namespace {

// x times each weight's transpose, side by side.
Floats product(const Options& options, const Floats& x, const std::vector<Matrix>& weights) {
  const int columns = weights[0].columns;
  Plan plan(options);
  if (std::any_of(weights.begin(), weights.end(), [](const Matrix& m) { return m.type > F16; }))
    plan.add(QUANTIZE, RESIDUAL, columns, RESIDUAL, columns);
  plan.matmul(RESIDUAL, weights, LOGITS);
  plan.run(RESIDUAL, x, int(x.size() / columns));
  return plan.buffers[LOGITS];
}

// The exact products and their error bounds: quantizing a number of x is off by half a step of its block's integers, and
// float32 sums are off by a few units in the last place of the sum of absolute products.
struct Exact {
  Doubles y, bound;
  Exact(const Floats& x, const Weight& w, bool fast) {
    const int block = fast ? 16 : 32, columns = w.columns;
    Doubles steps(columns);
    for (size_t row = 0; row < x.size(); row += columns) {
      for (int k = 0; k < columns; k++) {
        double largest = 0;
        for (int i = k / block * block; i < std::min(columns, (k / block + 1) * block); i++)
          largest = std::max(largest, std::fabs(double(x[row + i])));
        steps[k] = w.format->quantized() ? 0.51 * largest / (fast ? 127 : 32512) + 1e-30 : 1e-40;
      }
      for (int m = 0; m < w.rows; m++) {
        const double* numbers = &w.numbers[size_t(m) * columns];
        double sum = 0, error = 0;
        for (int k = 0; k < columns; k++) {
          const double p = x[row + k] * numbers[k];
          sum += p;
          error += std::fabs(p) * 3e-6 + std::fabs(numbers[k]) * steps[k];
        }
        y.push_back(sum), bound.push_back(error);
      }
    }
  }
  bool near(const Floats& got) const {
    bool ok = got.size() == y.size();
    for (size_t i = 0; ok && i < y.size(); i++) ok = std::fabs(got[i] - y[i]) <= bound[i];
    return ok;
  }
};

void check_products(const Format& f, const Ints& isas, bool quick, Random& random) {
  struct Shape {
    int rows, columns;
  };
  std::vector<Shape> shapes = {{37, f.quantized() ? std::max(f.columns, 96) : 83}};
  if (!quick) shapes.insert(shapes.end(), {{1, f.columns}, {16, 256}, {130, 512}, {53, f.quantized() ? 5 * f.columns : 7}});
  for (const Shape& shape : shapes) {
    const int columns = shape.columns, max_rows = 130;
    const Weight w(f, shape.rows, columns, random);
    const Floats x = random.numbers(size_t(max_rows) * columns);
    for (int fast = 0; fast < 2; fast++) {
      const Exact exact(x, w, fast);
      for (int isa : isas) {
        Options options{isa, fast == 1};
        const std::string what = std::string(f.name) + " [" + std::to_string(w.rows) + ", " + std::to_string(columns) + "] ";
        const Floats whole = product(options, x, {w.matrix()});
        expect(exact.near(whole), what + "near double" + options);
        for (options.threads = 1; options.threads <= 5; options.threads += 2)
          expect(same(product(options, x, {w.matrix()}), whole), what + "any threads" + options);
        for (int n = 1; n < max_rows; n += n < 10 ? 1 : quick ? 40 : 7) {
          const int first = random.below(max_rows - n);
          options.threads = 1 + n % 3;
          expect(same(product(options, some_rows(x, columns, first, n), {w.matrix()}), some_rows(whole, w.rows, first, n)),
                 what + std::to_string(n) + " rows" + options);
        }
      }
    }
  }
}

void check_extremes(const Format& f, const Options& options, Random& random) {
  const int columns = 256, rows = 20, n = 5;
  const Weight w(f, rows, columns, random);
  const std::string what = std::string(f.name) + " ";
  for (float scale : {0.0f, 1e-42f, 1e-35f, 1e-28f, 1e28f}) {
    const Floats x = random.numbers(n * columns, scale);
    expect(Exact(x, w, options.fast).near(product(options, x, {w.matrix()})), what + "times " + std::to_string(scale) + options);
  }
  Floats x = random.numbers(n * columns);
  for (int i = 0; i < n; i++) x[i * columns + 17] = 1e4f;  // much larger than the rest of its block
  std::fill_n(&x[32], 32, 0.0f);
  const Floats y = product(options, x, {w.matrix()});
  expect(Exact(x, w, options.fast).near(y), what + "of uneven numbers" + options);
  for (float bad : {float(NAN), INFINITY, -INFINITY}) {
    Floats spoiled = x;
    spoiled[2 * columns + 40] = bad;
    const Floats z = product(options, spoiled, {w.matrix()});
    bool ok = same(some_rows(z, rows, 0, 2), some_rows(y, rows, 0, 2)) && same(some_rows(z, rows, 3, 2), some_rows(y, rows, 3, 2));
    for (float v : some_rows(z, rows, 2, 1)) ok &= !std::isfinite(v);
    expect(ok, what + "with a row that is not finite" + options);
  }
  if (!f.quantized()) return;
  Weight damaged = w;
  damaged.blocks[damaged.blocks.size() / rows * 3 + f.halves[0] + 1] = 0x7e;  // NaN
  damaged.pack();
  const Floats z = product(options, x, {damaged.matrix()});
  bool ok = true;
  for (size_t i = 0; i < z.size(); i++) ok &= i % rows == 3 ? std::isnan(z[i]) : z[i] == y[i];
  expect(ok, what + "with a scale that is not a number" + options);
  // All integers at the limits of their ranges: activations whose two bytes are 127 and 0, or 127 and -128.
  for (int fill : {0, 127, 128, 255}) {
    const Weight full(f, rows, columns, random, fill);
    for (float other : {1.0f, 32384.0f / 32512})
      for (float sign : {1.0f, -1.0f}) {
        for (size_t i = 0; i < x.size(); i++) x[i] = sign * (i % 16 ? other : 1.0f);
        expect(Exact(x, full, options.fast).near(product(options, x, {full.matrix()})), what + "at the ends" + options);
      }
  }
}

void check_rows(const Options& options, Random& random) {
  // Rows of a table of each type.
  for (const Format& f : formats) {
    const int columns = f.quantized() ? 256 : 21;
    const Weight table(f, 50, columns, random);
    Ints ids(60);
    for (int32_t& id : ids) id = random.below(50);
    ids[0] = 49;
    Plan plan(options);
    Op& op = plan.add(EMBED, 0, 0, LOGITS, columns);
    op.count = 1, op.w[0] = table.matrix();
    plan.step.ids = ids.data();
    plan.run(-1, {}, int(ids.size()));
    bool ok = true;
    for (size_t i = 0; i < plan.buffers[LOGITS].size(); i++)
      ok &= std::fabs(plan.buffers[LOGITS][i] - table.numbers[size_t(ids[i / columns]) * columns + i % columns]) <= 4e-5;
    expect(ok, std::string(f.name) + " rows of a table" + options);
  }
  // A norm of some rows, and products with its int8 blocks.
  for (int width : {8, 24, 96, 100, 576}) {
    const bool blocks = width % 32 == 0, centered = width % 3 == 0;
    const Floats x = random.numbers(40 * width), weight = random.numbers(width), bias = random.numbers(width);
    const Ints wanted = {39, 0, 5};
    const Weight w(formats[blocks ? 3 : 0], 33, width, random);
    Plan plan(options);
    Op& op = plan.add(NORM, RESIDUAL, width, NORMED, width, WANTED | (blocks ? QUANTIZED : 0) | (centered ? CENTERED : 0));
    op.weight = weight.data(), op.bias = centered ? bias.data() : nullptr, op.eps = 1e-5f;
    plan.matmul(NORMED, {w.matrix()}, LOGITS, WANTED);
    plan.run(RESIDUAL, x, 40, wanted);
    bool ok = true;
    for (size_t i = 0; i < wanted.size() * width; i++) {
      const float* row = &x[size_t(wanted[i / width]) * width];
      double sum = 0, squares = 0;
      for (int k = 0; centered && k < width; k++) sum += row[k];
      for (int k = 0; k < width; k++) squares += std::pow(row[k] - sum / width, 2);
      const double y = (row[i % width] - sum / width) / std::sqrt(squares / width + 1e-5) * weight[i % width];
      ok &= std::fabs(plan.buffers[NORMED][i] - (centered ? y + bias[i % width] : y)) <= 1e-5;
    }
    expect(ok, "norm of " + std::to_string(width) + options);
    expect(Exact(plan.buffers[NORMED], w, options.fast).near(plan.buffers[LOGITS]), "product after the norm" + options);
  }
  // x + down(silu(gate(x)) * up(x)) with biases; weights of several types side by side.
  const int n = 19, width = 64, middle = 96;
  const Weight gate(formats[4], middle, width, random), up(formats[5], middle, width, random), down(formats[1], width, middle, random);
  const Weight small(formats[2], 7, width, random);
  const Floats x = random.numbers(n * width);
  Plan plan(options);
  plan.add(QUANTIZE, RESIDUAL, width, RESIDUAL, width);
  plan.matmul(RESIDUAL, {gate.matrix(), up.matrix(true), small.matrix()}, PROJECTED);
  plan.matmul(RESIDUAL, {gate.matrix(), up.matrix(true)}, GATES, 0, GATED);
  plan.matmul(GATES, {down.matrix(true)}, RESIDUAL, ADD);
  plan.matmul(GATES, {down.matrix(true)}, LOGITS);
  plan.ops.back().activation = GELU;
  plan.run(RESIDUAL, x, n);
  const Floats gates = product(options, x, {gate.matrix()}), ups = product(options, x, {up.matrix()});
  const Floats smalls = product(options, x, {small.matrix()}), &beside = plan.buffers[PROJECTED];
  const Floats sums = product(options, plan.buffers[GATES], {down.matrix()});
  bool ok = true;
  for (int row = 0; row < n; row++) {
    const float* got = &beside[size_t(row) * (2 * middle + 7)];
    for (int i = 0; i < middle; i++) {
      const float g = gates[row * middle + i], u = ups[row * middle + i] + up.bias[i];
      ok &= got[i] == g && got[middle + i] == u;
      const double gated = g / (1 + std::exp(-double(g))) * u;
      ok &= std::fabs(plan.buffers[GATES][row * middle + i] - gated) <= 1e-6 + 1e-6 * std::fabs(gated);
    }
    for (int i = 0; i < 7; i++) ok &= got[2 * middle + i] == smalls[row * 7 + i];
    for (int i = 0; i < width; i++) {
      const float sum = sums[row * width + i] + down.bias[i];
      ok &= plan.buffers[RESIDUAL][row * width + i] == sum + x[row * width + i];
      const double gelu = sum / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (sum + 0.044715 * std::pow(sum, 3))));
      ok &= std::fabs(plan.buffers[LOGITS][row * width + i] - gelu) <= 2e-6 * (1 + std::fabs(sum));
    }
  }
  expect(ok, "gates, biases, sums, activations" + options);
}

// x + the outputs of each row's two experts with the largest scores, weighted by the softmax of these scores. An expert
// accepts at most `limit` rows of a sequence, first choices before second choices.
void check_mixture(const Options& options, int limit, Random& random) {
  constexpr int experts = 5, K = 2, width = 64, middle = 32, n = 19;
  const Ints starts = {0, 7, n}, limits = {limit, limit};
  const Weight router(formats[0], experts, width, random), gate(formats[4], experts * middle, width, random);
  const Weight up(formats[3], experts * middle, width, random), down(formats[5], experts * width, middle, random);
  const auto stack = [](const Weight& w) {
    Matrix m = w.matrix();
    m.rows = w.rows / experts, m.stride = int64_t(w.data.size() / experts);
    return m;
  };
  const Floats x = random.numbers(n * width), ones(width, 1.0f);
  Plan plan(options);
  plan.step.sequences = 2, plan.step.cu_seqlens = starts.data(), plan.step.limits = limits.data();
  plan.add(NORM, RESIDUAL, width, NORMED, width).weight = ones.data();
  plan.matmul(NORMED, {router.matrix()}, SCORES);
  plan.add(ROUTE, SCORES, experts, SCORES, experts, NORMALIZED).count = K;
  plan.ops.back().capacity = 0;
  plan.add(GATHER, NORMED, width, PAIRED, width, PAIRS | QUANTIZED).count = K;
  plan.matmul(PAIRED, {stack(gate), stack(up)}, GATES, PAIRS, GATED);
  plan.add(QUANTIZE, GATES, middle, GATES, middle, PAIRS);
  plan.matmul(GATES, {stack(down)}, PAIRED, PAIRS);
  plan.add(COMBINE, PAIRED, width, RESIDUAL, width).count = K;
  for (Op& op : plan.ops) op.experts = experts;
  plan.run(RESIDUAL, x, n);

  Floats hidden;  // of each row by each expert
  const Floats gates = product(options, plan.buffers[NORMED], {gate.matrix()}), ups = product(options, plan.buffers[NORMED], {up.matrix()});
  for (size_t i = 0; i < gates.size(); i++) hidden.push_back(float(gates[i] / (1 + std::exp(-double(gates[i]))) * ups[i]));
  const Floats outs = product(options, hidden, {down.matrix()});
  Doubles expected(x.begin(), x.end());
  const Floats& scores = plan.buffers[SCORES];
  for (int b = 0; b < 2; b++) {
    Ints accepted(experts);
    for (int k = 0; k < K; k++)
      for (int row = starts[b]; row < starts[b + 1]; row++) {
        Ints order = {0, 1, 2, 3, 4};
        std::sort(order.begin(), order.end(), [&](int i, int j) { return scores[row * experts + i] > scores[row * experts + j]; });
        if (accepted[order[k]]++ >= limit) continue;
        const double weight = 1 / (1 + std::exp(scores[row * experts + order[1 - k]] - scores[row * experts + order[k]]));
        const float* out = &outs[size_t(row * experts + order[k]) * down.rows + order[k] * width];
        for (int i = 0; i < width; i++) expected[row * width + i] += weight * out[i];
      }
  }
  double size = 0, error = 0;
  for (int i = 0; i < n * width; i++) {
    size = std::max(size, std::fabs(expected[i]));
    error = std::max(error, std::fabs(plan.buffers[RESIDUAL][i] - expected[i]));
  }
  // the hidden layer is quantized again: a number between two steps may be rounded to either
  expect(error <= size * (options.fast ? 0.05 : 1e-3), "a mixture of experts" + options);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const auto given = [&](const char* option) { return std::count(arguments.begin(), arguments.end(), option) > 0; };
  const bool quick = given("quick");
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  signal(SIGALRM, watch);
  alarm(1);
  Random random(1);
  Ints isas;
  for (int isa = 0; pentad_isa(isa) == nullptr || *pentad_isa(isa); isa++)
    if (pentad_isa(isa)) isas.push_back(isa), std::printf("check: %s\n", pentad_isa(isa));
  for (const Format& f : formats) {
    check_products(f, isas, quick, random);
    for (int isa : isas)
      for (bool fast : {false, true}) check_extremes(f, {isa, fast}, random);
  }
  for (int isa : isas)
    for (bool fast : {false, true}) {
      check_rows({isa, fast}, random);
      for (int limit : {2, 100}) check_mixture({isa, fast, 3}, limit, random);
    }
  check_attention({6, 2, 32, 0, false}, isas, quick, random);
  check_attention({4, 1, 18, 50, true}, isas, quick, random);
  if (!quick) {
    check_attention({9, 3, 64, 0, true}, isas, quick, random);
    check_attention({5, 5, 80, 1, false}, isas, quick, random);
    check_attention({8, 1, 256, 140, false}, isas, quick, random);
  }
  clocks_lose_time = true;
  for (int callers : {1, 2, 3})
    for (int busy : {0, 1, 2}) stress(isas[0], callers, busy, quick ? 0.1 : 1);
  if (!given("no-forks")) check_forks(isas[0], quick ? 3 : 20);
  std::printf("check: %d checks, %d failed\n", checks.load(), failures.load());
  return failures > 0;
}
