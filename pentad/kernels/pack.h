// Repacking of ggml's blocks into the tiles of products.h.
#pragma once
#include <cstdint>

namespace pentad {

// Bytes of a row in ggml's blocks; 0 if the type isn't quantized, or the columns aren't whole blocks.
int64_t row_bytes(int type, int columns);

// Bytes of a weight in tiles; 0 in the same cases.
int64_t packed_bytes(int type, int rows, int columns);

// Packs one tile of 16 rows. Rows that the last tile lacks become zeros.
void pack_tile(int type, const uint8_t* blocks, int rows, int columns, int tile, uint8_t* tiles);

}  // namespace pentad
