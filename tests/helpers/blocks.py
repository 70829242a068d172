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
"""Where each type's blocks have their float16 numbers."""


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0, scale: float = 0.02) -> QuantizedTensor:
    """Random integers, with scales around `scale`."""
    size, nbytes = BLOCKS[kind]
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (rows * columns // size, nbytes), generator=generator).to(torch.uint8)
    halves = blocks.view(torch.float16)
    for place in HALVES[kind]:
        halves[:, place] = (scale * (0.5 + torch.rand(len(blocks), generator=generator))).half()
    return QuantizedTensor(blocks.view(rows, -1), kind, (rows, columns))


def dequantized(weight: QuantizedTensor) -> Tensor:
    """float64 [rows, columns]."""
    return weight.dequantize().double()
