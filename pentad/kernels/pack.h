// From ggml's blocks to the tiles of kernels.h.
#pragma once
#include <cstdint>

namespace pentad {

// Bytes that a weight takes in tiles; 0 where the type isn't quantized, or the columns aren't whole blocks.
int64_t packed_bytes(int type, int rows, int columns);

// Packs tile after tile, 16 rows each; the last one's missing rows become zeros.
void pack_tile(int type, const uint8_t* blocks, int rows, int columns, int tile, uint8_t* tiles);

}  // namespace pentad
