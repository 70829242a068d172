// Convolutions of float32 images whose channels lie side by side (NHWC), with bias, activation and a sum in one pass.
//
// WEIGHTS of a convolution: tiles of 16 outputs, in each [taps][inputs][16 outputs]; the last tile is padded with zeros.
// Depthwise: [taps][channels], padded to a multiple of 16 channels.
//
// A block of PIXELS outputs is computed at once: each weight that is loaded is multiplied by one number of each pixel. For
// each tap of the filter there is a pointer to each pixel's inputs, or to zeros outside of the image. The order of a sum
// doesn't depend on blocks, chunks or threads.
#pragma once
#include <cstdint>
#include <cstring>

#include "plan.h"
#include "products.h"

namespace pentad {
namespace {

constexpr int WIDTH = sizeof(V) / sizeof(float);
constexpr int REGISTERS = LANES / WIDTH;         // of a tile
constexpr int PIXELS = Isa::PIXELS;              // a block's; REGISTERS * PIXELS sums stay in registers

#define UNROLL_PIXELS _Pragma("GCC unroll 16")

INLINE V broadcast_v(float x) { return x - V{}; }

INLINE F activate(F x, int activation) {
  switch (activation) {
    case LEAKY: return x > 0.0f ? x : x * 0.1f;
    case RELU: return x > 0.0f ? x : F{};
    case SWISH: return x / (exponential(-x) + 1.0f);
    case LOGISTIC: return 1.0f / (exponential(-x) + 1.0f);
    case MISH: {  // x tanh(log(1 + e^x)) = x n / (n + 2), n = e^x (e^x + 2)
      const F e = exponential(x < 20.0f ? x : broadcast(20.0f)), n = e * (e + 2.0f);
      return x * n / (n + 2.0f);
    }
    default: return x;
  }
}

// An activation that is not inlined where convolutions end.
__attribute__((noinline)) void activate_slowly(float* x, int activation) {
  F wide = {};
  std::memcpy(&wide, x, sizeof(V));
  wide = activate(wide, activation);
  std::memcpy(x, &wide, sizeof(V));
}

INLINE V activate_v(V x, int activation) {
  if (activation == NONE) return x;
  if (activation == LEAKY) {
    const V small = x * 0.1f;
    return x > small ? x : small;
  }
  if (activation == RELU) return x > 0.0f ? x : V{};
  float memory[WIDTH];
  std::memcpy(memory, &x, sizeof x);
  activate_slowly(memory, activation);
  return load<V>(memory);
}

// The last steps of one register of results: activation, the other summand, and the store.
INLINE void finish(const ConvOp& op, V x, int64_t pixel, int channel) {
  x = activate_v(x, op.activation);
  if (op.add) x = activate_v(x + load<V>(op.add + pixel * op.add_stride + channel), op.add_activation);
  float* out = op.out + pixel * op.out_stride + channel;
  const int count = op.out_channels - channel;
  if (count >= WIDTH) return store(out, x);
  float memory[WIDTH];
  std::memcpy(memory, &x, sizeof x);
  int done = 0;
  for (; done + 4 <= count; done += 4) std::memcpy(out + done, memory + done, 16);
  for (; done < count; done++) out[done] = memory[done];
}

// `finish` for COUNT pixels; the usual activations and sums without branches.
template <int COUNT> INLINE void finish_all(const ConvOp& op, V (&x)[COUNT], int64_t pixel, int channel) {
  const bool usual = op.activation <= LEAKY && op.out_channels - channel >= WIDTH && (!op.add || op.add_activation == NONE);
  if (!usual) {
    UNROLL_PIXELS
    for (int i = 0; i < COUNT; i++) finish(op, x[i], pixel + i, channel);
    return;
  }
  const float slope = op.activation == LEAKY ? 0.1f : 1.0f;
  float* out = op.out + pixel * op.out_stride + channel;
  UNROLL_PIXELS
  for (int i = 0; i < COUNT; i++) {
    const V small = x[i] * slope;
    x[i] = x[i] > small ? x[i] : small;
  }
  if (op.add) {
    const float* add = op.add + pixel * op.add_stride + channel;
    UNROLL_PIXELS
    for (int i = 0; i < COUNT; i++) x[i] += load<V>(add + i * int64_t(op.add_stride));
  }
  UNROLL_PIXELS
  for (int i = 0; i < COUNT; i++) store(out + i * int64_t(op.out_stride), x[i]);
}

// A place in the output, and the part of a window around it that is inside of the image.
struct Place {
  int image, y, x;
  int top, left;                       // the window's first row and column in the input
  int first_ky, last_ky, first_kx, last_kx;
  const float* in;                     // the window's first number, also if that is outside

  INLINE Place(const ConvOp& op, int64_t pixel) {
    const int64_t row = pixel / op.out_width;
    image = int(row / op.out_height), y = int(row % op.out_height), x = int(pixel % op.out_width);
    at_row(op), at_column(op);
  }
  INLINE void move(const ConvOp& op, int pixels) {
    x += pixels;
    if (x >= op.out_width) {
      x = 0;
      if (++y == op.out_height) y = 0, image++;
      at_row(op);
    }
    at_column(op);
  }
  INLINE void at_row(const ConvOp& op) {
    top = y * op.stride - op.pad_top;
    first_ky = max(0, -top), last_ky = min(op.size, op.in_height - top);
  }
  INLINE void at_column(const ConvOp& op) {
    left = x * op.stride - op.pad_left;
    first_kx = max(0, -left), last_kx = min(op.size, op.in_width - left);
    in = op.in + ((int64_t(image) * op.in_height + top) * op.in_width + left) * op.in_stride;
  }
  INLINE bool inside(const ConvOp& op) const { return last_ky - first_ky == op.size && last_kx - first_kx == op.size; }
};

template <int N> INLINE void multiply(const float* const (&in)[PIXELS], int inputs, const float* w, V (&sums)[REGISTERS][PIXELS]) {
  for (int c = 0; c < inputs; c++, w += LANES) {
    V weights[N];
    UNROLL
    for (int j = 0; j < N; j++) weights[j] = load<V>(w + j * WIDTH);
    UNROLL_PIXELS
    for (int i = 0; i < PIXELS; i++) {
      const V x = broadcast_v(in[i][c]);
      UNROLL
      for (int j = 0; j < N; j++) sums[j][i] = Isa::fma_v(x, weights[j], sums[j][i]);
    }
  }
}

// A block of pixels times one tile of weights, of which N registers are used. Each of the `taps` has `inputs` numbers.
template <int N>
void convolve_block(const ConvOp& op, const float* const* pointers, int taps, int inputs, int64_t pixel, int pixels, int tile) {
  const float* w = op.weight + int64_t(tile) * taps * inputs * LANES;
  V sums[REGISTERS][PIXELS];
  UNROLL
  for (int j = 0; j < N; j++) {
    const V bias = load<V>(op.bias + tile * LANES + j * WIDTH);
    UNROLL_PIXELS
    for (int i = 0; i < PIXELS; i++) sums[j][i] = bias;
  }
  for (int tap = 0; tap < taps; tap++, w += int64_t(inputs) * LANES) {
    const float* in[PIXELS];
    UNROLL_PIXELS
    for (int i = 0; i < PIXELS; i++) in[i] = pointers[tap * PIXELS + i];
    multiply<N>(in, inputs, w, sums);
  }
  UNROLL
  for (int j = 0; j < N; j++) {
    const int channel = tile * LANES + j * WIDTH;
    if (pixels == PIXELS) {
      finish_all(op, sums[j], pixel, channel);
    } else {
      UNROLL_PIXELS
      for (int i = 0; i < PIXELS; i++)
        if (i < pixels) finish(op, sums[j][i], pixel + i, channel);
    }
  }
}

// Which tiles and pixels a chunk has: heavy weights are divided by tiles, others by pixels.
struct Part { int first_tile, last_tile; int64_t first, last; };

constexpr int TARGET_CHUNKS = 32;
constexpr int64_t HEAVY = 1 << 16;  // floats

INLINE int tiles_of(const ConvOp& op) { return ceil_div(op.out_channels, LANES); }
INLINE int64_t pixels_of(const ConvOp& op) { return int64_t(op.batch) * op.out_height * op.out_width; }
INLINE bool is_heavy(const ConvOp& op) {
  const int64_t weights = int64_t(op.size) * op.size * op.in_channels * op.out_channels;
  return op.kind == CONVOLVE && weights > HEAVY && tiles_of(op) >= 4;
}
INLINE int64_t pixels_per_chunk(const ConvOp& op) {
  const int64_t each = (pixels_of(op) + TARGET_CHUNKS - 1) / TARGET_CHUNKS;
  return (each + PIXELS - 1) / PIXELS * PIXELS;
}

int conv_chunks(const ConvOp& op) {
  return is_heavy(op) ? tiles_of(op) : int((pixels_of(op) + pixels_per_chunk(op) - 1) / pixels_per_chunk(op));
}

INLINE Part part_of(const ConvOp& op, int chunk) {
  if (is_heavy(op)) return {chunk, chunk + 1, 0, pixels_of(op)};
  const int64_t first = chunk * pixels_per_chunk(op), last = first + pixels_per_chunk(op);
  return {0, tiles_of(op), first, last < pixels_of(op) ? last : pixels_of(op)};
}

void convolve(const ConvOp& op, Part part) {
  const float* pointers[MAX_CONV_SIZE * MAX_CONV_SIZE * PIXELS];
  const bool dense = op.in_stride == op.in_channels || op.size == 1;
  const int64_t step = int64_t(op.stride) * op.in_stride, row = int64_t(op.in_width) * op.in_stride;
  Place place(op, part.first);
  for (int64_t pixel = part.first; pixel < part.last; pixel += PIXELS) {
    const int pixels = part.last - pixel < PIXELS ? int(part.last - pixel) : PIXELS;
    const int right = place.left + (PIXELS - 1) * op.stride + op.size;  // the end of the last window, in this row
    int taps = op.size * op.size, inputs = op.in_channels;
    if (dense && place.x + PIXELS <= op.out_width && place.inside(op) && right <= op.in_width) {
      // No window crosses the border, so a row of a window is one tap.
      taps = op.size, inputs = op.size * op.in_channels;
      for (int ky = 0; ky < op.size; ky++) {
        UNROLL_PIXELS
        for (int i = 0; i < PIXELS; i++) pointers[ky * PIXELS + i] = place.in + ky * row + i * step;
      }
      place.move(op, PIXELS);
    } else {
      for (int i = 0; i < PIXELS; i++) {  // pixels beyond the last one repeat it
        const float* in = place.in;
        for (int ky = 0, tap = i; ky < op.size; ky++, in += row) {
          const bool inside = ky >= place.first_ky && ky < place.last_ky;
          for (int kx = 0; kx < op.size; kx++, tap += PIXELS)
            pointers[tap] = inside && kx >= place.first_kx && kx < place.last_kx ? in + kx * int64_t(op.in_stride) : op.zeros;
        }
        if (i < pixels - 1 || (i == PIXELS - 1 && pixel + PIXELS < part.last)) place.move(op, 1);
      }
    }
    for (int tile = part.first_tile; tile < part.last_tile; tile++) {
      const int registers = min(REGISTERS, ceil_div(op.out_channels - tile * LANES, WIDTH));
      if (registers == 1) convolve_block<1>(op, pointers, taps, inputs, pixel, pixels, tile);
      else if (registers == 2 && REGISTERS > 2) convolve_block<REGISTERS < 2 ? 1 : 2>(op, pointers, taps, inputs, pixel, pixels, tile);
      else convolve_block<REGISTERS>(op, pointers, taps, inputs, pixel, pixels, tile);
    }
  }
}

// COUNT neighboring outputs of one register of channels, all of whose windows are inside of the image.
template <int COUNT> INLINE void depthwise_inside(const ConvOp& op, const float* in, int64_t padded, int64_t pixel, int channel) {
  V sums[COUNT];
  UNROLL
  for (int i = 0; i < COUNT; i++) sums[i] = load<V>(op.bias + channel);
  const float* w = op.weight + channel;
  const int64_t step = int64_t(op.stride) * op.in_stride, row = int64_t(op.in_width) * op.in_stride;
  for (int ky = 0; ky < op.size; ky++, in += row) {
    const float* x = in + channel;
    for (int kx = 0; kx < op.size; kx++, w += padded, x += op.in_stride) {
      const V weight = load<V>(w);
      UNROLL
      for (int i = 0; i < COUNT; i++) sums[i] = Isa::fma_v(load<V>(x + i * step), weight, sums[i]);
    }
  }
  finish_all(op, sums, pixel, channel);
}

void depthwise(const ConvOp& op, Part part) {
  constexpr int AT_ONCE = 8;
  const int64_t padded = ceil_div(op.out_channels, LANES) * LANES;
  Place p(op, part.first);
  for (int64_t pixel = part.first; pixel < part.last;) {
    const int right = p.left + (AT_ONCE - 1) * op.stride + op.size;  // the end of the last window
    if (pixel + AT_ONCE <= part.last && p.x + AT_ONCE <= op.out_width && p.inside(op) && right <= op.in_width) {
      for (int channel = 0; channel < op.out_channels; channel += WIDTH)
        depthwise_inside<AT_ONCE>(op, p.in, padded, pixel, channel);
      pixel += AT_ONCE, p.move(op, AT_ONCE);
      continue;
    }
    for (int channel = 0; channel < op.out_channels; channel += WIDTH) {
      V sum = load<V>(op.bias + channel);
      for (int ky = p.first_ky; ky < p.last_ky; ky++)
        for (int kx = p.first_kx; kx < p.last_kx; kx++) {
          const V x = load<V>(p.in + (int64_t(ky) * op.in_width + kx) * op.in_stride + channel);
          sum = Isa::fma_v(x, load<V>(op.weight + (ky * op.size + kx) * padded + channel), sum);
        }
      finish(op, sum, pixel, channel);
    }
    pixel++, p.move(op, 1);
  }
}

void pool_maximum(const ConvOp& op, Part part) {
  Place p(op, part.first);
  for (int64_t pixel = part.first; pixel < part.last; pixel++, p.move(op, 1))
    for (int channel = 0; channel < op.out_channels; channel += WIDTH) {
      V largest = broadcast_v(-__builtin_inff());
      for (int ky = p.first_ky; ky < p.last_ky; ky++)
        for (int kx = p.first_kx; kx < p.last_kx; kx++) {
          const V x = load<V>(p.in + (int64_t(ky) * op.in_width + kx) * op.in_stride + channel);
          largest = x > largest ? x : largest;
        }
      finish(op, largest, pixel, channel);
    }
}

// Each input pixel becomes a square of `size` times `size` outputs; with size 1 a copy, or a sum.
void repeat(const ConvOp& op, Part part) {
  for (int64_t pixel = part.first; pixel < part.last; pixel++) {
    const int64_t row = pixel / op.out_width, image = row / op.out_height;
    const int64_t source = (image * op.in_height + row % op.out_height / op.size) * op.in_width + pixel % op.out_width / op.size;
    const float* in = op.in + source * op.in_stride;
    for (int channel = 0; channel < op.out_channels; channel += WIDTH) finish(op, load<V>(in + channel), pixel, channel);
  }
}

void conv_work(const ConvOp& op, int chunk) {
  const Part part = part_of(op, chunk);
  switch (op.kind) {
    case CONVOLVE: return convolve(op, part);
    case DEPTHWISE: return depthwise(op, part);
    case MAXPOOL: return pool_maximum(op, part);
    case REPEAT: return repeat(op, part);
  }
}

}  // namespace
}  // namespace pentad
