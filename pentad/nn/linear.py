"""Linear layers whose weight stays in its file's quantized blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.weights.quantized import AFFINE4, QuantizedTensor

FEW_ROWS = 128  # up to here torch's 4-bit kernel beats dequantizing the weight for one large bfloat16 product


class QuantizedLinear(nn.Module):
    """x W^T + b with W of one scale and minimum a block of 32 (Q4_0, Q4_1, Q4_K), by torch's own operators on a CPU.

    Args:
        weight: [out, in], mapped blocks; what torch's 4-bit kernel needs is packed from them when it is first called.
        bias: [out] or None.
    """

    bytes_per_weight = 0.625  # packed: half a byte, and two bfloat16 for 32

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight: Final = weight
        self.bias = bias
        self._packed: tuple[Tensor, Tensor] | None = None
        self._packed_with: tuple[nn.Module, ...] = ()  # whose weights `_packed` holds, this one's first
        self._numbers: Tensor | None = None

    @staticmethod
    def takes(quantization: str | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> bool:
        """Whether torch has an operator for such a weight that is fast: bfloat16 on a CPU, rows in tiles of 16."""
        fits = len(shape) == 2 and shape[0] % 16 == 0 and shape[1] % 32 == 0
        return quantization in AFFINE4 and fits and dtype == torch.bfloat16 and device.type == "cpu"

    def forward(self, x_ND: Tensor) -> Tensor:
        if x_ND.shape[0] > FEW_ROWS or not self._has_operator(x_ND):
            numbers = self._numbers
            if numbers is None or numbers.dtype != x_ND.dtype:
                numbers = self.weight.dequantize(x_ND.dtype)
            return F.linear(x_ND, numbers, self.bias)
        if self._packed is None or len(self._packed_with) > 1:
            self._pack([self])
        y = torch._weight_int4pack_mm_for_cpu(x_ND, self._packed[0], 32, self._packed[1])  # type: ignore[index]
        return y if self.bias is None else y + self.bias

    def number_bytes(self, dtype: torch.dtype) -> int:
        """What the weight takes dequantized; 0 if torch has an operator that takes it as it is."""
        if self.takes(self.weight.type, self.weight.shape, dtype, self.weight.stored.device):
            return 0
        return math.prod(self.weight.shape) * dtype.itemsize

    def cache_dequantized(self, dtype: torch.dtype) -> None:
        """Dequantize the weight for good, if torch has no operator for it."""
        if self.number_bytes(dtype) and (self._numbers is None or self._numbers.dtype != dtype):
            self._numbers = self.weight.dequantize(dtype)
            self.weight.release()

    def _has_operator(self, x_ND: Tensor) -> bool:
        return self.takes(self.weight.type, self.weight.shape, x_ND.dtype, x_ND.device)

    def fused_forward(self, x_ND: Tensor, linears: tuple[nn.Module, ...]) -> Sequence[Tensor] | None:
        """The outputs of `linears`, this one the first of them, by one product; None where they aren't all alike."""
        widths = []
        for linear in linears:
            if type(linear) is not QuantizedLinear or linear.bias is not None:
                return None
            if linear._forward_hooks or linear._forward_pre_hooks or not linear._has_operator(x_ND):
                return None
            widths.append(linear.out_features)
        if self._packed is None or self._packed_with != linears:
            self._pack(linears)  # type: ignore[arg-type]
        y = torch._weight_int4pack_mm_for_cpu(x_ND, self._packed[0], 32, self._packed[1])  # type: ignore[index]
        return torch.split_with_sizes(y, widths, -1)

    def _pack(self, linears: Sequence[QuantizedLinear]) -> None:
        """Put weights in the kernel's order of nibbles, with [in / 32, out, 2] of (scale, the value of nibble 8)."""
        parts = zip(*(linear.weight.affine4() for linear in linears), strict=True)
        nibbles, scale, minimum = (torch.cat(part) for part in parts)
        packed = torch._convert_weight_to_int4pack_for_cpu(nibbles, 1)
        values = torch.stack((scale, minimum + 8 * scale), -1).transpose(0, 1).contiguous().bfloat16()
        self._packed, self._packed_with = (packed, values), tuple(linears)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.weight.type}"


def project(x_ND: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    """``[linear(x) for linear in linears]``, by one product where all are quantized and rows are few.

    Then the first layer holds the packed weights of all.
    """
    first = linears[0]
    if type(first) is QuantizedLinear and x_ND.shape[0] <= FEW_ROWS:
        outputs = first.fused_forward(x_ND, linears)
        if outputs is not None:
            return outputs
    return [linear(x_ND) for linear in linears]


def cache_dequantized(network: nn.Module, dtype: torch.dtype, most: float) -> str:
    """Have layers dequantize once what they would dequantize in every step, if all of it takes at most `most` bytes.

    Returns:
        What became of its weights, in words; nothing where no layer must dequantize.
    """
    parts = [part for part in network.modules() if isinstance(part, QuantizedLinear)]
    megabytes = sum(part.number_bytes(dtype) for part in parts) / 1e6
    if megabytes == 0:
        return ""
    if megabytes > most / 1e6:
        return f"its quantized weights become numbers anew in each step, as they would take {megabytes:.0f} MB"
    for part in parts:
        part.cache_dequantized(dtype)
    return f"its quantized weights are now {megabytes:.0f} MB of numbers"


class QuantizedEmbedding(nn.Module):
    """Rows of a weight that stays in its file's blocks, by their ids, as float32.

    Args:
        weight: [vocabulary, width]; mapped blocks.
    """

    bytes_per_weight = QuantizedLinear.bytes_per_weight

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.weight: Final = weight

    def forward(self, ids_N: Tensor) -> Tensor:
        return self.weight.take_rows(ids_N).dequantize()


class RowwiseInt8Linear(nn.Module):
    """A language model's head in bfloat16, and in int8 with one scale a row where one or two rows come.

    Reading the head's weight is what a small model's step waits for. For heads that are quantized in their file; the
    second rounding takes the root mean square error of SmolLM2's logits from 0.11 to 0.13 (docs/benchmarks.md).
    """

    bytes_per_weight = 3.0  # both forms

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight  # [out, in], most often the embedding's
        self.bias = bias  # [out]
        self._int8: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def takes(dtype: torch.dtype, device: torch.device) -> bool:
        """Whether torch has an operator for this that is fast: bfloat16 on a CPU."""
        return dtype == torch.bfloat16 and device.type == "cpu"

    def forward(self, x_ND: Tensor) -> Tensor:
        if x_ND.shape[0] > 2:
            return F.linear(x_ND, self.weight, self.bias)
        if self._int8 is None:
            slabs = [_int8_rows(rows) for rows in self.weight.split(4096)]  # type: ignore[no-untyped-call]
            self._int8 = torch.cat([values for values, _ in slabs]), torch.cat([scale for _, scale in slabs])
        y = torch._weight_int8pack_mm(x_ND, *self._int8)
        return y if self.bias is None else y + self.bias


def _int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [rows, in] and bfloat16 [rows], such that their product is near `weight`."""
    values = weight.float()
    scale = (torch.linalg.vector_norm(values, math.inf, 1) / 126.5).clamp(min=1e-30).bfloat16()  # no value passes 127
    return (values / scale.float()[:, None]).round_().to(torch.int8), scale
