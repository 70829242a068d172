// What crosses the border from Python (pentad/kernels/binding.py mirrors these structures field by field): a plan is a
// flat list of operations, and a step runs it for some rows of tokens. Nothing here owns memory.
#pragma once
#include <cstdint>

namespace pentad {

// How a weight's numbers are stored. The quantized types are ggml's blocks, repacked into the tiles of kernels.h; the
// float types are read where they lie, row after row.
enum Type : int32_t { F32, BF16, F16, Q4_0, Q4_1, Q8_0, Q4_K, Q6_K };

struct Matrix {
  const uint8_t* data;  // of a quantized type: tiles, aligned to 64 bytes
  const float* bias;    // [rows], or null
  int32_t type;
  int32_t rows, columns;
  int32_t reserved;
};

enum Kind : int32_t {
  EMBED,     // out = rows of w[0] by the step's ids
  NORM,      // out = in / rms(in) * weight; with `wanted`, of the wanted rows only
  QUANTIZE,  // blocks = in, in int8
  MATMUL,    // out = in x w[0]^T, w[1]^T, w[2]^T side by side; with `add`, added to what is there
  GATED,     // out = silu(in x w[0]^T) * (in x w[1]^T)
  ROTATE,    // RoPE on the queries and keys in `out` (after norms, if any); keys and values go to the cache
  ATTEND,    // out = attention of the queries in `in` over the cache
  MERGE,     // parts of ATTEND whose keys were split among threads are put together
};

enum Flag : int32_t {
  QUANTIZED = 1,  // NORM: write int8 blocks too. MATMUL, GATED: read them
  FLOATS = 2,     // NORM: write float32
  ADD = 4,        // MATMUL: add to `out`
  WANTED = 8,     // only the wanted rows
};

struct Op {
  int32_t kind, flags;
  int32_t in, out;          // buffers
  int32_t in_width;         // floats a row of `in`: the matrices' columns
  int32_t out_width;        // floats a row of `out`
  int32_t count;            // matrices in use
  int32_t layer;            // of the cache
  int32_t heads, kv_heads;  // of attention
  int32_t head_dim, window; // window 0: all keys
  float eps, scale;         // of norms; of attention scores
  const float* weight;      // NORM: [in_width]; ROTATE: of the queries' norm [head_dim], or null
  const float* weight2;     // ROTATE: of the keys' norm [head_dim], or null
  Matrix w[3];
};

enum { BUFFERS = 8, BLOCKS_BUFFER = 6, PARTS_BUFFER = 7 };  // two have a fixed use: int8 blocks; parts of ATTEND

struct Step {
  int32_t rows, wanted;     // N tokens; M rows whose logits are wanted
  int32_t sequences;        // B
  int32_t threads;
  int32_t fast;             // int8 activations in one term instead of two
  int32_t isa;              // index into isas()
  int32_t page_size;        // a multiple of 16
  int32_t cache_type;       // F32, BF16 or F16
  int32_t padded_dim;       // numbers a head in the cache: head_dim rounded up to a multiple of 16
  int32_t table_width;
  const int32_t* ids;           // [N]
  const int32_t* positions;     // [N], absolute
  const int32_t* wanted_rows;   // [M]
  const int32_t* starts;        // [B + 1]: sequence b has rows starts[b] to starts[b + 1]
  const int32_t* lengths;       // [B]: tokens of the sequence, this step's included
  const int32_t* dropped;       // [B]: tokens before its first page
  const int32_t* tables;        // [B, table_width]: its pages
  const float* const* rotations;  // [B]: a table [positions][2][head_dim / 2] of cosines, then sines
  void* const* keys;            // [layers]: pools of pages
  void* const* values;
  void* buffers[BUFFERS];
};

// One instruction set's work. `chunks` says in how many pieces an operation may be done, in any order and by any
// thread; whatever the pieces, the numbers are the same bits.
struct Kernels {
  const char* name;
  bool (*runs_here)();
  int (*chunks)(const Op&, const Step&);
  void (*work)(const Op&, const Step&, int chunk);
};

extern const Kernels avx512_kernels, avx2_kernels, portable_kernels;

}  // namespace pentad
