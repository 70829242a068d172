"""Random weights in ggml's blocks."""

import torch
from torch import Tensor

from pentad.weights.quantized import BLOCKS, QuantizedTensor

HALVES = {
    "q4_0": (0,),
    "q4_1": (0, 1),
    "q5_0": (0,),
    "q5_1": (0, 1),
    "q8_0": (0,),
    "q4_k": (0, 1),
    "q5_k": (0, 1),
    "q6_k": (104,),
}
"""The indices of the float16 scales and minimums in a block of each type, in units of 2 bytes."""


def random_blocks(type_name: str, rows: int, columns: int, seed: int = 0, scale: float = 0.02) -> QuantizedTensor:
    """Make random blocks with scales around `scale`."""
    size, nbytes = BLOCKS[type_name]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows * columns // size, nbytes), generator=generator).to(torch.uint8)
    halves = blocks.view(torch.float16)
    for index in HALVES[type_name]:
        halves[:, index] = (scale * (0.5 + torch.rand(len(blocks), generator=generator))).half()
    return QuantizedTensor(blocks.view(rows, -1), type_name, (rows, columns))


def dequantized(weight: QuantizedTensor) -> Tensor:
    """float64 [rows, columns]."""
    return weight.dequantize().double()
