"""Experts: many feed-forward layers of one shape, their weights in a stack.

Legend: E experts, S rows sorted by expert, I numbers of a row that come in, O that go out, D width, H hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.nn.linear import QuantizedWeight, linear_map
from pentad.weights.quantized import QuantizedTensor

FEW_ROWS = 64  # of each expert: up to here a product takes hardly longer than reading its weight
SLAB_ROWS = 2048  # computed at a time: what lies between products stays in memory that a CPU has at hand
SLAB_ROWS_16_BIT = 352  # up to here W x^T is faster, which reads the weight as it lies: x W^T puts it in tiles first
BLOCK_ROWS = 32  # of 16-bit numbers: for each new number of rows oneDNN compiles a product, longer than it computes it
EVERY = slice(None)


class GroupedLinear(nn.Module):
    """A linear layer for each expert, without biases.

    Args:
        experts: E.
        in_features, out_features: I and O.
    """

    def __init__(self, experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.experts = experts
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(experts, out_features, in_features))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)  # as nn.Linear's

    def forward(self, x_SI: Tensor, ends_E: Tensor, which: slice = EVERY) -> Tensor:
        """[S, I], the rows of the first expert first, and int32 [E], where each one's rows end -> [S, O].

        Weights of experts without rows are not read. `which`: the experts that there are rows of.
        """
        return grouped_linear(x_SI, self.weight[which], ends_E)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"


class QuantizedGroupedLinear(QuantizedWeight):
    """`GroupedLinear` with a weight in quantized blocks; only experts that have rows are dequantized.

    Args:
        weight: [E, O, I].
    """

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__(weight)
        self.experts, self.out_features, self.in_features = weight.shape

    def forward(self, x_SI: Tensor, ends_E: Tensor, which: slice = EVERY) -> Tensor:
        """As `GroupedLinear.forward`."""
        experts, ends = range(self.experts)[which], ends_E.tolist()

        def products(rows: Tensor, width: int, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            weight, parts, start = self.weight, [rows.new_empty(0, width)], 0
            for expert, end in zip(experts, ends, strict=True):
                if end > start:
                    matrix = weight.rows(expert * self.out_features, (expert + 1) * self.out_features)
                    parts.append(product(rows[start:end], matrix.dequantize(rows.dtype)))
                start = end
            return torch.cat(parts)

        return linear_map(
            x_SI,
            lambda x: products(x, self.out_features, F.linear),
            lambda gradient: products(gradient, self.in_features, torch.matmul),
        )


class Experts(nn.Module):
    """What a mixture asks of its experts, whatever they compute.

    Args:
        count: E. Every parameter's first dimension is that.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x_SD: Tensor, ends_E: Tensor) -> Tensor:
        """[S, D], the rows of expert 0 first, and int32 [E], where each one's rows end -> [S, D]."""
        learns = torch.is_grad_enabled() and (x_SD.requires_grad or any(p.requires_grad for p in self.parameters()))
        most = SLAB_ROWS_16_BIT if x_SD.element_size() == 2 else SLAB_ROWS
        if learns or len(x_SD) <= most or x_SD.device.type != "cpu":
            return self.compute(x_SD, ends_E, EVERY)
        parts = []
        for start, stop, which in _slabs(ends_E.tolist(), most):
            parts.append(self.compute(x_SD[start:stop], (ends_E[which] - start).clamp(max=stop - start), which))
        return torch.cat(parts)

    def compute(self, x_SD: Tensor, ends_E: Tensor, which: slice) -> Tensor:
        """The same of some experts, `which` are neighbors: only theirs are the rows."""
        raise NotImplementedError


def _slabs(ends: list[int], most: int) -> Iterator[tuple[int, int, slice]]:
    """Where some rows start and end, at most `most`, and whose they are: of neighboring experts, or a part of the many
    that one has, in parts of about the same size."""
    start, first = 0, 0
    for expert, end in enumerate(ends):
        parts = math.ceil((end - start) / most)
        if parts > 1:  # then `first` is this expert
            rows = min(most, math.ceil((end - start) / parts / BLOCK_ROWS) * BLOCK_ROWS)
            for part in range(start, end, rows):
                yield part, min(part + rows, end), slice(expert, expert + 1)
            start, first = end, expert + 1
        following = ends[expert + 1] if expert + 1 < len(ends) else math.inf
        if following - start > most:
            if end > start:
                yield start, end, slice(first, expert + 1)
            start, first = end, expert + 1


class SwiGLUExperts(Experts):
    """down(silu(gate(x)) * up(x)) for each expert (arXiv:2002.05202), as Mixtral has it."""

    def __init__(self, experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__(experts)
        self.gate_proj = GroupedLinear(experts, dim, hidden_dim)
        self.up_proj = GroupedLinear(experts, dim, hidden_dim)
        self.down_proj = GroupedLinear(experts, hidden_dim, dim)

    def compute(self, x_SD: Tensor, ends_E: Tensor, which: slice) -> Tensor:
        gate_SH, up_SH = self.gate_proj(x_SD, ends_E, which), self.up_proj(x_SD, ends_E, which)
        learns = gate_SH.requires_grad or up_SH.requires_grad
        # In place where it can be: fresh memory costs as much as the product.
        h_SH = F.silu(gate_SH) * up_SH if learns else F.silu(gate_SH, inplace=True).mul_(up_SH)
        y_SD: Tensor = self.down_proj(h_SH, ends_E, which)
        return y_SD


class GatedSwiGLUExperts(Experts):
    """`pentad.nn.feedforward.GatedSwiGLU` for each expert, as OpenMoE has it."""

    def __init__(self, experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__(experts)
        self.gate_proj = GroupedLinear(experts, dim, 2 * hidden_dim)
        self.up_proj = GroupedLinear(experts, dim, hidden_dim)
        self.down_proj = GroupedLinear(experts, hidden_dim, dim)

    def compute(self, x_SD: Tensor, ends_E: Tensor, which: slice) -> Tensor:
        a_SH, b_SH = self.gate_proj(x_SD, ends_E, which).chunk(2, -1)
        y_SD: Tensor = self.down_proj(a_SH * F.silu(b_SH) * self.up_proj(x_SD, ends_E, which), ends_E, which)
        return y_SD


class MLPExperts(Experts):
    """down(activation(up(x))) for each expert: with ReLU those of 2017, of GShard and of Switch."""

    def __init__(
        self, experts: int, dim: int, hidden_dim: int, activation: Callable[[Tensor], Tensor] = F.relu
    ) -> None:
        super().__init__(experts)
        self.activation = activation
        self.up_proj = GroupedLinear(experts, dim, hidden_dim)
        self.down_proj = GroupedLinear(experts, hidden_dim, dim)

    def compute(self, x_SD: Tensor, ends_E: Tensor, which: slice) -> Tensor:
        y_SD: Tensor = self.down_proj(self.activation(self.up_proj(x_SD, ends_E, which)), ends_E, which)
        return y_SD


def grouped_linear(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its weight, by `torch.nn.functional.grouped_mm`; where that refuses, expert by expert.

    Args:
        x_SI: [S, I], the rows of expert 0 first.
        weight_EOI: [E, O, I].
        ends_E: int32 [E], where each expert's rows end; the last is S.

    Returns:
        [S, O] in the weight's dtype.
    """
    if not _grouped_mm_takes(x_SI, weight_EOI):
        counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
        # `unbind` and not weight[e]: its backward makes one gradient for all, not one of the whole stack for each.
        parts = zip(torch.split(x_SI, counts), weight_EOI.unbind(), strict=True)
        return torch.cat([F.linear(rows_SI, weight_OI) for rows_SI, weight_OI in parts])
    if _reads_rows_of_weights(x_SI, weight_EOI):
        x_IS = x_SI.T if _aligned(x_SI.T) else _rows(x_SI).T  # what this very branch gave lies that way already
        return F.grouped_mm(weight_EOI, x_IS, offs=ends_E).T
    x_SI = _rows(x_SI)
    y_SO = F.grouped_mm(x_SI, weight_EOI.transpose(1, 2), offs=ends_E)
    if y_SO.requires_grad:
        y_SO.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call] # its backward refuses expanded gradients
    return y_SO


def _grouped_mm_takes(x_SI: Tensor, weight_EOI: Tensor) -> bool:
    """What torch 2.10 to 2.13 check, or fail to: rows that start at multiples of 16 bytes, some rows, and three dtypes.

    (Of CUDA devices without a kernel for it, torch itself goes expert by expert.)
    """
    return (
        len(x_SI) > 0
        and x_SI.device.type in ("cpu", "cuda")
        and x_SI.dtype == weight_EOI.dtype
        and x_SI.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and all(size * x_SI.element_size() % 16 == 0 for size in weight_EOI.shape[1:])
        and (x_SI.device.type == "cuda" or (x_SI.data_ptr() | weight_EOI.data_ptr()) % 16 == 0)
    )


def _rows(x_SI: Tensor) -> Tensor:
    """Contiguous, a single row too, whose stride may be anything."""
    return x_SI.flatten().view(x_SI.shape)


def _aligned(x_IS: Tensor) -> bool:
    """Whether rows lie one behind the other, each from a multiple of 16 bytes."""
    return x_IS.stride(1) == 1 and x_IS.stride(0) * x_IS.element_size() % 16 == 0


def _reads_rows_of_weights(x_SI: Tensor, weight_EOI: Tensor) -> bool:
    """Whether W x^T is faster than x W^T: on a CPU, for a few rows of each expert. Its backward is pickier."""
    few = len(x_SI) <= FEW_ROWS * len(weight_EOI) or (x_SI.element_size() == 2 and len(x_SI) <= SLAB_ROWS_16_BIT)
    learns = torch.is_grad_enabled() and (x_SI.requires_grad or weight_EOI.requires_grad)
    return few and not learns and x_SI.device.type == "cpu" and weight_EOI.stride(-1) == 1
