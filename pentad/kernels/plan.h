// What crosses the border from Python (pentad/kernels/binding.py mirrors these structures field by field): a plan is a
// flat list of operations, and a step runs it for some rows of tokens. Nothing here owns memory.
#pragma once
#include <cstdint>

namespace pentad {

// How a weight's numbers are stored. The quantized types are ggml's blocks, repacked into the tiles of kernels.h; the
// float types are read where they lie, row after row. I8 is the cache's alone, with a scale for each token and head.
enum Type : int32_t { F32, BF16, F16, Q4_0, Q4_1, Q8_0, Q4_K, Q6_K, Q5_0, Q5_1, Q5_K, I8 };

struct Matrix {
  const uint8_t* data;  // of a quantized type: tiles, aligned to 64 bytes
  const float* bias;    // [rows], or null
  int64_t stride;       // of a stack, one for each expert: bytes from one matrix to the next
  int32_t type;
  int32_t rows, columns;
};

enum Kind : int32_t {
  EMBED,     // out = rows of w[0] by the step's ids
  NORM,      // out = in / rms(in) * weight (+ bias); CENTERED: less its mean first
  QUANTIZE,  // blocks = in, in int8
  MATMUL,    // out = activation(in x w[0]^T), the same of w[1], w[2], side by side
  GATED,     // out = silu(in x w[0]^T) * (in x w[1]^T), times in x w[2]^T if there are three
  ROTATE,    // RoPE on the queries and keys in `out` (after norms, if any); keys and values go to the cache
  ATTEND,    // out = attention of the queries in `in` over the cache
  MERGE,     // parts of ATTEND whose keys were split among threads are put together
  ROUTE,     // routes = the `count` largest of each row's scores in `in`: pairs of a row and an expert, by expert
  GATHER,    // out = rows of `in`, a copy for each pair
  COMBINE,   // out += each row's pairs in `in`, by their weights
};

enum Flag : int32_t {
  QUANTIZED = 1,   // NORM, GATHER: write int8 blocks too
  CENTERED = 2,    // NORM, ROTATE's norms: LayerNorm instead of RMSNorm
  ADD = 4,         // MATMUL: add to `out`
  WANTED = 8,      // only the wanted rows
  PAIRS = 16,      // rows are ROUTE's pairs; of MATMUL and GATED, each expert's by its own matrices
  NORMALIZED = 32, // ROUTE: a row's weights are those of a softmax over its largest scores, else of one over all
};

enum Activation : int32_t { LINEAR, GELU };  // GELU as GPT-2 approximates it, by tanh

struct Op {
  int32_t kind, flags;
  int32_t in, out;            // buffers
  int32_t in_width;           // floats a row of `in`: the matrices' columns, a router's experts
  int32_t out_width;          // floats a row of `out`
  int32_t count;              // matrices in use; of ROUTE, GATHER and COMBINE, experts of a row
  int32_t activation;         // of MATMUL
  int32_t layer;              // of the cache
  int32_t heads, kv_heads;    // of attention
  int32_t head_dim, window;   // window 0: all keys
  int32_t rotary_dim, ahead;  // ROTATE: numbers of a head that rotate; positions that a query alone is ahead by
  int32_t log_scale_after;    // ROTATE: tokens from which on queries grow with their place; 0: none
  int32_t experts;            // of PAIRS
  int32_t capacity;           // ROUTE: which of the step's limits holds; -1: none
  float eps, scale;           // of norms; of attention scores
  const float *weight, *bias; // NORM: [in_width]; ROTATE: of the queries' norm [head_dim]; null: none
  const float *weight2, *bias2;  // ROTATE: of the keys' norm
  Matrix w[3];
};

enum { BUFFERS = 11, BLOCKS_BUFFER = 8, PARTS_BUFFER = 9, ROUTES_BUFFER = 10 };  // the last three have a fixed use

struct Step {
  int32_t rows, wanted;     // N tokens; M rows whose logits are wanted
  int32_t sequences;        // B
  int32_t threads;
  int32_t fast;             // int8 activations in one term instead of two
  int32_t isa;              // index into isas()
  int32_t page_size;        // a multiple of 16
  int32_t cache_type;       // F32, BF16, F16 or I8
  int32_t padded_dim;       // numbers a head in the cache: head_dim rounded up to a multiple of 16
  int32_t table_width;
  const int32_t* ids;           // [N]
  const int32_t* positions;     // [N], absolute
  const int32_t* wanted_rows;   // [M]
  const int32_t* starts;        // [B + 1]: sequence b has rows starts[b] to starts[b + 1]
  const int32_t* lengths;       // [B]: tokens of the sequence, this step's included
  const int32_t* dropped;       // [B]: tokens before its first page
  const int32_t* tables;        // [B, table_width]: its pages
  const int32_t* limits;        // [capacities, B]: rows of a sequence that an expert takes at most
  const float* const* rotations;  // [B]: a table [positions][2][rotary_dim / 2] of cosines, then sines
  void* const* keys;            // [layers]: pools of pages
  void* const* values;
  void* buffers[BUFFERS];
};

// One instruction set's work. `chunks` says in how many pieces an operation may be done, in any order and by any
// thread; whatever the pieces, the numbers are the same bits. `reads` says where a piece's weights begin, at up to 3
// places, before its rows are known.
struct Kernels {
  const char* name;
  bool (*runs_here)();
  int (*chunks)(const Op&, const Step&);
  void (*work)(const Op&, const Step&, int chunk);
  int (*reads)(const Op&, const Step&, int chunk, const uint8_t** at);
};

extern const Kernels avx512_kernels, avx2_kernels, neon_dotprod_kernels, neon_kernels, portable_kernels;

}  // namespace pentad
