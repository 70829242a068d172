"""q4_k blocks, decoded by ggml's package. (The other types are compared with that package in test_writing.py.)"""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from pentad.weights import quantizer
from pentad.weights.quantizer import quantize
from tests.helpers.tiny import rms

SINES = torch.from_numpy(np.sin(np.arange(256.0) ** 2).astype(np.float32))[None]
GGML = bytes.fromhex(
    "74180d24fbfffdfdfefcffffeb95ecfd68ee625be52700a01f5304efc4e30f4000c7245ad1afb99fc1b9b48950e10f05"
    "038b6f2a5460129fba1df6efdf420f5fa3ffde1b4713bc0218e12e26eb060f8de3a8103f1d7f0003702f4519bbfe4fe5"
    "7fff059f2dcc1753fdc1e780fff88ee30cfd75c27cf1f710dfd81ee2fc48e3c2e12a0050aaf0b125160ae14f6cef90a2"
)
"""The block that llama.cpp's quantize_row_q4_K_ref makes of SINES (llama-cpp-python 0.3.36)."""


def decoded(value: Tensor) -> Tensor:
    blocks = quantize(value, "q4_k").numpy()
    return torch.from_numpy(np.array(dequantize(blocks.reshape(-1, blocks.shape[-1]), GGMLQuantizationType.Q4_K)))


def test_a_block_of_ggmls() -> None:
    assert quantize(SINES, "q4_k").numpy().tobytes() == GGML


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_on_normal_weights_is_ggmls(dtype: torch.dtype) -> None:
    """llama.cpp's error is 0.0714; rounding between the least and the greatest number of each group gives 0.078."""
    value = (0.02 * torch.randn(256, 1024)).to(dtype)
    assert rms(decoded(value) - value) < 0.072 * rms(value)


def test_groups_of_all_kinds() -> None:
    """Within a block scales differ from the exact ones by up to 1/126 of the largest, and a number by half a level."""
    value = torch.randn(8, 8, 32)
    value[0], value[1], value[2] = 0, 1, -1
    value[3], value[4] = value[3].abs() + 1, -value[4].abs() - 1
    value[5, ::2] = 0
    value[6] = (value[6] * 1e4).clamp(-65504, 65504)
    value[7] *= 1e-7  # too small for a float16 scale
    error = (decoded(value.view(8, 256)).view(8, 8, 32) - value).abs().amax((1, 2))
    span = value.amax((1, 2)).clamp(min=0) - value.amin((1, 2)).clamp(max=0)
    assert error[0] == 0
    assert (error <= 0.1 * span)[:7].all()
    assert error[7] <= span[7]


def test_slabs_and_threads_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.randn(3, 5, 512)
    whole = quantize(value, "q4_k")
    assert whole.shape == (3, 5, 288)
    monkeypatch.setattr(quantizer, "SLAB", 1)
    assert torch.equal(quantize(value.transpose(0, 1), "q4_k"), whole.transpose(0, 1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert torch.equal(quantize(value[1, 2:], "q4_k"), whole[1, 2:])
