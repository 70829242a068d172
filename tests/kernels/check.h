// Shared by check.cpp and its parts: reports, random numbers, weights in ggml's blocks, plans and their buffers.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../pentad/kernels/plan.h"

using namespace pentad;

extern "C" {
const char* pentad_isa(int index);
int64_t pentad_packed_bytes(int type, int rows, int columns);
void pentad_pack(int type, const uint8_t* blocks, int rows, int columns, uint8_t* tiles, int threads);
void pentad_buffer_sizes(const Op* ops, int count, const Step* step, int64_t* floats);
void pentad_run(const Op* ops, int count, const Step* step);
}

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Bytes = std::vector<uint8_t>;
using Ints = std::vector<int32_t>;

// ---- Reporting ----

std::atomic<int> checks{0}, failures{0}, seconds_without_progress{0};

void expect(bool ok, const std::string& what) {
  checks++;
  seconds_without_progress = 0;
  if (!ok && failures++ < 20) std::printf("FAILED: %s\n", what.c_str());
}

// Ends the process after a minute without a check: it hangs. Time doesn't count while the process is stopped.
void watch(int) {
  constexpr char message[] = "FAILED: no progress for a minute\n";
  if (++seconds_without_progress < 60) alarm(1);
  else _exit(write(1, message, sizeof message - 1) > 0 ? 3 : 4);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t bits() {  // SplitMix64's upper half
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return uint32_t(z >> 32);
  }
  int below(int n) { return int(bits() % uint32_t(n)); }
  float number() { return float(bits() * 0x1p-30 - 2); }  // -2 to 2
  Floats numbers(size_t count, float scale = 1) {
    Floats x(count);
    for (float& v : x) v = number() * scale;
    return x;
  }

 private:
  uint64_t state_;
};

// ---- Weights, and ggml's blocks dequantized (dequantize_row_* in ggml-quants.c) ----

template <class T> T read(const uint8_t* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
double half(const uint8_t* p) {
  const int h = read<uint16_t>(p), exponent = h >> 10 & 31, fraction = h & 1023;
  const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                     : std::ldexp(exponent ? fraction + 1024 : fraction, std::max(exponent, 1) - 25);
  return h & 0x8000 ? -size : size;
}
int nibble(const uint8_t* q, int i, int apart) { return i < apart ? q[i] & 15 : q[i - apart] >> 4; }

int fifth_bit(const uint8_t* bits, int i) { return (bits[i / 8] >> i % 8 & 1) << 4; }

double q45_k(const uint8_t* b, int i, int integer) {
  const uint8_t* s = b + 4;
  const int j = i / 32, scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | s[j - 4] >> 6 << 4;
  const int minimum = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | s[j] >> 6 << 4;
  return half(b) * scale * integer - half(b + 2) * minimum;
}
double q4_k(const uint8_t* b, int i) { return q45_k(b, i, nibble(b + 16 + i / 64 * 32, i % 64, 32)); }
double q5_k(const uint8_t* b, int i) {
  return q45_k(b, i, nibble(b + 48 + i / 64 * 32, i % 64, 32) | (b[16 + i % 32] >> i / 32 & 1) << 4);
}
double q6_k(const uint8_t* b, int i) {
  const int part = i / 128, low = nibble(b + 64 * part, i % 128, 64), high = b[128 + 32 * part + i % 32] >> i % 128 / 32 * 2 & 3;
  return half(b + 208) * int8_t(b[192 + i / 16]) * ((low | high << 4) - 32);
}

struct Format {
  const char* name;
  Type type;
  int columns, bytes;       // of a block
  std::vector<int> halves;  // offsets of float16 numbers in a block
  double (*number)(const uint8_t* block, int i);
  bool quantized() const { return columns > 1; }
};
const std::vector<Format> formats = {
    {"f32", F32, 1, 4, {}, [](const uint8_t* b, int) { return double(read<float>(b)); }},
    {"bf16", BF16, 1, 2, {}, [](const uint8_t* b, int) {
       const uint8_t whole[4] = {0, 0, b[0], b[1]};
       return double(read<float>(whole));
     }},
    {"f16", F16, 1, 2, {0}, [](const uint8_t* b, int) { return half(b); }},
    {"q4_0", Q4_0, 32, 18, {0}, [](const uint8_t* b, int i) { return half(b) * (nibble(b + 2, i, 16) - 8); }},
    {"q4_1", Q4_1, 32, 20, {0, 2}, [](const uint8_t* b, int i) { return half(b) * nibble(b + 4, i, 16) + half(b + 2); }},
    {"q8_0", Q8_0, 32, 34, {0}, [](const uint8_t* b, int i) { return half(b) * int8_t(b[2 + i]); }},
    {"q4_k", Q4_K, 256, 144, {0, 2}, q4_k},
    {"q5_0", Q5_0, 32, 22, {0}, [](const uint8_t* b, int i) { return half(b) * ((nibble(b + 6, i, 16) | fifth_bit(b + 2, i)) - 16); }},
    {"q5_1", Q5_1, 32, 24, {0, 2}, [](const uint8_t* b, int i) { return half(b) * (nibble(b + 8, i, 16) | fifth_bit(b + 4, i)) + half(b + 2); }},
    {"q5_k", Q5_K, 256, 176, {0, 2}, q5_k},
    {"q6_k", Q6_K, 256, 210, {208}, q6_k},
};

struct Weight {
  const Format* format;
  int rows, columns;
  Bytes blocks, data;
  Floats bias;
  Doubles numbers;

  // `fill`: the bytes of the integers; -1: random
  Weight(const Format& f, int rows_, int columns_, Random& random, int fill = -1)
      : format(&f), rows(rows_), columns(columns_), blocks(size_t(rows) * columns / f.columns * f.bytes),
        bias(random.numbers(rows)) {
    for (uint8_t& b : blocks) b = uint8_t(fill < 0 ? random.bits() : fill);
    for (size_t b = 0; b < blocks.size(); b += f.bytes) {
      if (f.type == F32 || f.type == BF16) blocks[b + f.bytes - 1] = uint8_t(random.below(2) << 7 | 0x3e);  // sizes of 1/8 to 2
      for (int at : f.halves) blocks[b + at + 1] = uint8_t(0x24 + random.below(8));                       // 1/64 to 1/4
    }
    pack();
  }
  void pack() {
    data = blocks;
    if (format->quantized()) {
      data = Bytes(pentad_packed_bytes(format->type, rows, columns));
      pentad_pack(format->type, blocks.data(), rows, columns, data.data(), 3);
    }
    numbers.clear();
    for (size_t b = 0; b < blocks.size(); b += format->bytes)
      for (int i = 0; i < format->columns; i++) numbers.push_back(format->number(&blocks[b], i));
  }
  Matrix matrix(bool biased = false) const {
    Matrix m = {};
    m.data = data.data();
    m.bias = biased ? bias.data() : nullptr;
    m.type = format->type;
    m.rows = rows, m.columns = columns;
    return m;
  }
};

// ---- Plans ----

struct Options {
  int isa;
  bool fast = false;
  int threads = 2;
};

std::string operator+(const std::string& text, const Options& options) {
  return text + " by " + pentad_isa(options.isa) + (options.fast ? ", fast, " : ", ") + std::to_string(options.threads) + " threads";
}

struct Plan {
  Step step = {};
  std::vector<Op> ops;
  Floats buffers[BUFFERS];

  explicit Plan(const Options& options) { step.isa = options.isa, step.fast = options.fast, step.threads = options.threads; }

  // The caller must complete the operation before it adds the next one.
  Op& add(OpKind kind, int in, int in_width, int out, int out_width, int flags = 0) {
    Op op = {};
    op.kind = kind, op.flags = flags;
    op.in = in, op.in_width = in_width;
    op.out = out, op.out_width = out_width;
    ops.push_back(op);
    return ops.back();
  }
  void matmul(int in, const std::vector<Matrix>& weights, int out, int flags = 0, OpKind kind = MATMUL) {
    int width = 0;
    for (const Matrix& m : weights) width += m.rows;
    Op& op = add(kind, in, weights[0].columns, out, kind == GATED ? weights[0].rows : width, flags);
    op.count = int(weights.size());
    std::copy(weights.begin(), weights.end(), op.w);
  }

  // `input` is the content of the buffer `at`. Every buffer is exactly as large as program.py makes it.
  void run(int at, const Floats& input, int rows, const Ints& wanted = {}) {
    step.rows = rows, step.wanted = int(wanted.size()), step.wanted_rows = wanted.data();
    int64_t sizes[BUFFERS];
    pentad_buffer_sizes(ops.data(), int(ops.size()), &step, sizes);
    for (int i = 0; i < BUFFERS; i++) {
      if (i == at) buffers[i] = input;
      else buffers[i] = Floats(sizes[i], NAN);
      step.buffers[i] = buffers[i].data();
    }
    pentad_run(ops.data(), int(ops.size()), &step);
  }
};

bool same(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}
Floats some_rows(const Floats& x, int width, int first, int count) {
  return Floats(&x[size_t(first) * width], &x[size_t(first) * width] + size_t(count) * width);
}
bool finite(const Floats& x) {
  return std::all_of(x.begin(), x.end(), [](float v) { return std::isfinite(v); });
}

}  // namespace
