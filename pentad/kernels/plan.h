// The interface between Python and C++ (pentad/kernels/binding.py): a plan is a flat list of operations, and a step runs
// it for some tokens of some sequences. api.cpp exports these enumerations and structures, and Python compares them with
// its own when it loads the library. Nothing here owns memory.
#pragma once
#include <cstdint>

namespace pentad {

// Storage types. The quantized types are ggml's blocks, repacked into the tiles of products.h; float weights are read in
// place, row by row. Only the KV cache uses I8, with one scale per token and head.
enum Type : int32_t { F32, BF16, F16, Q4_0, Q4_1, Q8_0, Q4_K, Q6_K, Q5_0, Q5_1, Q5_K, I8 };

constexpr int LANES = 16;                 // floats a register; rows a tile; page sizes are a multiple of it
constexpr int BLOCK = 32;                 // columns a block
constexpr int MAX_HEAD_DIM = 256;
constexpr int MAX_STEP_ROWS = 1 << 17;    // keeps an operation below 2^20 chunks
constexpr int64_t MAX_SIZE = 1 << 30;     // of rows or columns: sizes in bytes fit in 64 bits

struct Matrix {
  const uint8_t* data;  // quantized: tiles, aligned to 64 bytes
  const float* bias;    // [rows], or null
  int64_t stride;       // in a stack of experts' matrices: bytes from one matrix to the next
  int32_t type;
  int32_t rows, columns;
};

enum OpKind : int32_t {
  EMBED,     // out = rows of w[0], selected by the step's ids
  NORM,      // out = in / rms(in) * weight (+ bias); with CENTERED, the mean is subtracted first
  QUANTIZE,  // int8 blocks = in
  MATMUL,    // out = activation(in x w[0]^T), then those of w[1] and w[2], side by side
  GATED,     // out = silu(in x w[0]^T) * (in x w[1]^T), times in x w[2]^T if there are three matrices
  ROTATE,    // norms (if any) and RoPE on the queries and keys in `out`; writes keys and values to the cache
  ATTEND,    // out = attention of the queries in `in` over the cache
  MERGE,     // combines ATTEND's partial softmaxes, where keys were split among threads
  ROUTE,     // routes = the `count` largest scores of each row of `in`, as (row, expert) pairs sorted by expert
  GATHER,    // out = one copy of its row of `in` for each pair
  COMBINE,   // out += the weighted sum of each row's pairs in `in`
};

enum Flag : int32_t {
  QUANTIZED = 1,   // NORM, GATHER: also write int8 blocks
  CENTERED = 2,    // NORM, ROTATE's norms: LayerNorm instead of RMSNorm
  ADD = 4,         // MATMUL: add to `out`
  WANTED = 8,      // process only the wanted rows
  PAIRS = 16,      // the rows are ROUTE's pairs; MATMUL and GATED multiply each expert's rows by its matrices
  NORMALIZED = 32, // ROUTE: weights are a softmax over the chosen experts instead of all experts
};

enum Activation : int32_t { LINEAR, GELU };  // GELU: GPT-2's tanh approximation

// The first eight belong to the plan: residual stream, output of a norm, queries with keys and values, attention output,
// feed-forward hidden layer, logits, router logits, rows of pairs. The last three have a fixed use: int8 blocks, partial
// softmaxes, routes.
enum Buffer : int32_t { RESIDUAL, NORMED, PROJECTED, ATTENDED, GATES, LOGITS, SCORES, PAIRED, BLOCKS, PARTIALS, ROUTES };
constexpr int BUFFERS = ROUTES + 1;

struct Op {
  int32_t kind, flags;
  int32_t in, out;            // buffers
  int32_t in_width;           // floats a row of `in`: a matrix's columns; for ROUTE, the experts
  int32_t out_width;          // floats a row of `out`
  int32_t count;              // matrices in use; for ROUTE, GATHER and COMBINE, experts per row
  int32_t activation;         // of MATMUL
  int32_t layer;              // of the cache
  int32_t heads, kv_heads;
  int32_t head_dim, window;   // window 0: all keys
  int32_t rotary_dim;         // ROTATE: dimensions of a head that rotate
  int32_t log_scale_after;    // ROTATE: from this many tokens on, queries grow with log(position); 0: never
  int32_t experts;            // for PAIRS
  int32_t capacity;           // ROUTE: index into the step's limits; -1: unlimited
  float eps, scale;           // of norms; of attention scores
  const float *weight, *bias; // NORM: [in_width]; ROTATE: the query norm's [head_dim]; null: none
  const float *weight2, *bias2;  // ROTATE: the key norm's
  Matrix w[3];
};

struct Step {
  int32_t rows, wanted;     // N tokens; M rows whose logits are wanted
  int32_t sequences;        // B
  int32_t threads;
  int32_t fast;             // one int8 term for activations instead of two
  int32_t isa;              // index into isas()
  int32_t page_size;
  int32_t cache_type;       // F32, F16, BF16 or I8
  int32_t padded_dim;       // dimensions of a head in the cache: head_dim rounded up to a multiple of LANES
  int32_t block_table_width;
  const int32_t* ids;           // [N]
  const int32_t* positions;     // [N], absolute
  const int32_t* wanted_rows;   // [M]
  const int32_t* cu_seqlens;    // [B + 1]: sequence b has rows cu_seqlens[b] to cu_seqlens[b + 1]
  const int32_t* lengths;       // [B]: tokens of the sequence, including this step's
  const int32_t* dropped;       // [B]: tokens before its first page
  const int32_t* block_tables;  // [B, block_table_width]: its pages
  const int32_t* limits;        // [capacities, B]: most rows of the sequence that an expert accepts
  const float* const* rotations;  // [B]: a table [positions][2][rotary_dim / 2] of cosines, then sines
  void* const* keys;            // [layers]: pools of pages
  void* const* values;
  void* buffers[BUFFERS];
};

// A row of logits, and how to choose its token; see Draw in sampling.py.
struct Draw {
  const float* logits;  // [vocab]
  float temperature;
  int32_t top_k;
  float top_p, min_p;
  double uniform;
  float largest;  // the results
  int32_t token;
};

enum ConvKind : int32_t { CONVOLVE, DEPTHWISE, MAXPOOL, REPEAT };
enum ConvActivation : int32_t { NONE, LEAKY, RELU, MISH, SWISH, LOGISTIC };
constexpr int MAX_CONV_SIZE = 16;

// An operation on images [batch, height, width, channels]; see convolution.h. Reads of `in` and `add` may go up to 15 floats
// beyond the last channel.
struct ConvOp {
  int32_t kind, activation, add_activation;
  int32_t batch, in_height, in_width, in_channels;
  int32_t out_height, out_width, out_channels;
  int32_t size, stride, pad_top, pad_left;
  int32_t in_stride, out_stride, add_stride;  // floats from pixel to pixel
  const float *in, *add;                      // add: added after the activation; null for none
  float* out;
  const float *weight, *bias;
  const float* zeros;                         // [in_channels]
};

constexpr int MAX_GRID_SIDE = 64, MAX_GRID_DIM = 128;

// Attention within the windows of square images, for float32 rows [images * side * side, heads * dim]; see grid.h. Windows
// may reach beyond an image.
struct GridOp {
  int32_t images, side, window, heads;  // a window's side
  int32_t dim;                          // of a head: a multiple of LANES
  int32_t offsets;                      // 2 * window - 1, rounded up to a multiple of LANES
  float scale;                          // of queries times keys
  const float *q, *k, *v;
  float* out;
  const float *k_padding, *v_padding;   // of cells outside of the image, [heads * dim]
  const float* positions;               // [2][offsets / 16][dim][16]: for differences of rows and columns, last one first
  float* packed;                        // scratch
};

// The functions of one instruction set. An operation is divided into `chunks`, which threads may run in any order;
// the division doesn't change a bit of the results. `weight_addresses` gives the addresses (up to 3) where a chunk's
// weights begin, so that they can be prefetched. `buffer_sizes` gives the floats that a step needs in each buffer.
// `sample` chooses the tokens of rows.
struct Kernels {
  const char* name;
  bool (*runs_here)();
  int (*chunks)(const Op&, const Step&);
  void (*work)(const Op&, const Step&, int chunk);
  int (*weight_addresses)(const Op&, const Step&, int chunk, const uint8_t** addresses);
  void (*buffer_sizes)(const Op* ops, int count, const Step&, int64_t* floats);
  void (*sample)(Draw* draws, int rows, int vocab, float* scratch);
  int (*conv_chunks)(const ConvOp&);
  void (*conv_work)(const ConvOp&, int chunk);
  int (*grid_chunks)(const GridOp&, int phase);
  void (*grid_work)(const GridOp&, int phase, int chunk);
};

extern const Kernels avx512_kernels, avx2_kernels, neon_dotprod_kernels, neon_kernels, portable_kernels;

}  // namespace pentad
