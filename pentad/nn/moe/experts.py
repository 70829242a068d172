"""Experts: many feed-forward layers of one shape, with stacked weights.

Legend: E experts, S rows sorted by expert, I input features, O output features, D width, H hidden width.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.nn.linear import QuantizedWeight, linear_map
from pentad.weights.quantized import QuantizedTensor

FEW_ROWS = 64  # per expert; up to this many rows a matmul is bound by reading the weight
SLAB_ROWS = 2048  # rows computed at a time, so that the hidden activations stay in a CPU's cache
SLAB_ROWS_16_BIT = 352  # up to this many rows W x^T is faster: x W^T first copies the weight into tiles
BLOCK_ROWS = 32  # 16-bit rows are padded to a multiple: compiling oneDNN's matmul for a new row count is slow
ALL = slice(None)


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
        nn.init.uniform_(self.weight, -bound, bound)  # like nn.Linear

    def forward(self, x_SI: Tensor, ends_E: Tensor, selected: slice = ALL) -> Tensor:
        """Multiply each expert's rows by its weight; weights of experts without rows are not read.

        Args:
            x_SI: rows sorted by expert.
            ends_E: int32, the end of each expert's rows.
            selected: the experts that `x_SI` and `ends_E` cover.

        Returns:
            [S, O].
        """
        return grouped_linear(x_SI, self.weight[selected], ends_E)

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

    def forward(self, x_SI: Tensor, ends_E: Tensor, selected: slice = ALL) -> Tensor:
        """See `GroupedLinear.forward`."""
        experts, ends = range(self.experts)[selected], ends_E.tolist()

        def per_expert(rows: Tensor, width: int, matmul: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            weight, parts, start = self.weight, [rows.new_empty(0, width)], 0
            for expert, end in zip(experts, ends, strict=True):
                if end > start:
                    matrix = weight.rows(expert * self.out_features, (expert + 1) * self.out_features)
                    parts.append(matmul(rows[start:end], matrix.dequantize(rows.dtype)))
                start = end
            return torch.cat(parts)

        return linear_map(
            x_SI,
            lambda x: per_expert(x, self.out_features, F.linear),
            lambda gradient: per_expert(gradient, self.in_features, torch.matmul),
        )


class Experts(nn.Module):
    """The experts of a mixture; a subclass implements `compute`.

    Args:
        count: E, the first dimension of every parameter.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x_SD: Tensor, ends_E: Tensor) -> Tensor:
        """Rows [S, D] sorted by expert, and int32 [E], the end of each expert's rows -> [S, D]."""
        learns = torch.is_grad_enabled() and (x_SD.requires_grad or any(p.requires_grad for p in self.parameters()))
        max_rows = SLAB_ROWS_16_BIT if x_SD.element_size() == 2 else SLAB_ROWS
        if learns or len(x_SD) <= max_rows or x_SD.device.type != "cpu":
            return self.compute(x_SD, ends_E, ALL)
        parts = []
        for start, stop, selected in _slabs(ends_E.tolist(), max_rows):
            parts.append(self.compute(x_SD[start:stop], (ends_E[selected] - start).clamp(max=stop - start), selected))
        return torch.cat(parts)

    def compute(self, x_SD: Tensor, ends_E: Tensor, selected: slice) -> Tensor:
        """Like `forward`, for the selected consecutive experts and their rows only."""
        raise NotImplementedError


def _slabs(ends: list[int], max_rows: int) -> Iterator[tuple[int, int, slice]]:
    """Split rows into slabs of at most `max_rows`, and yield each slab's start, end and experts.

    A slab has all rows of consecutive experts, or a part of one expert's rows. One expert's parts have similar sizes.
    """
    start, first = 0, 0
    for expert, end in enumerate(ends):
        parts = math.ceil((end - start) / max_rows)
        if parts > 1:  # then `first` is this expert
            rows = min(max_rows, math.ceil((end - start) / parts / BLOCK_ROWS) * BLOCK_ROWS)
            for part in range(start, end, rows):
                yield part, min(part + rows, end), slice(expert, expert + 1)
            start, first = end, expert + 1
        next_end = ends[expert + 1] if expert + 1 < len(ends) else math.inf
        if next_end - start > max_rows:
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

    def compute(self, x_SD: Tensor, ends_E: Tensor, selected: slice) -> Tensor:
        gate_SH, up_SH = self.gate_proj(x_SD, ends_E, selected), self.up_proj(x_SD, ends_E, selected)
        learns = gate_SH.requires_grad or up_SH.requires_grad
        # In place if no gradient needs the inputs: allocating new memory takes as long as the matmul.
        h_SH = F.silu(gate_SH) * up_SH if learns else F.silu(gate_SH, inplace=True).mul_(up_SH)
        y_SD: Tensor = self.down_proj(h_SH, ends_E, selected)
        return y_SD


class GatedSwiGLUExperts(Experts):
    """`pentad.nn.feedforward.GatedSwiGLU` for each expert, as OpenMoE has it."""

    def __init__(self, experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__(experts)
        self.gate_proj = GroupedLinear(experts, dim, 2 * hidden_dim)
        self.up_proj = GroupedLinear(experts, dim, hidden_dim)
        self.down_proj = GroupedLinear(experts, hidden_dim, dim)

    def compute(self, x_SD: Tensor, ends_E: Tensor, selected: slice) -> Tensor:
        a_SH, b_SH = self.gate_proj(x_SD, ends_E, selected).chunk(2, -1)
        y_SD: Tensor = self.down_proj(a_SH * F.silu(b_SH) * self.up_proj(x_SD, ends_E, selected), ends_E, selected)
        return y_SD


class MLPExperts(Experts):
    """down(activation(up(x))) for each expert; with ReLU the experts of Sparsely-Gated, GShard and Switch."""

    def __init__(
        self, experts: int, dim: int, hidden_dim: int, activation: Callable[[Tensor], Tensor] = F.relu
    ) -> None:
        super().__init__(experts)
        self.activation = activation
        self.up_proj = GroupedLinear(experts, dim, hidden_dim)
        self.down_proj = GroupedLinear(experts, hidden_dim, dim)

    def compute(self, x_SD: Tensor, ends_E: Tensor, selected: slice) -> Tensor:
        y_SD: Tensor = self.down_proj(self.activation(self.up_proj(x_SD, ends_E, selected)), ends_E, selected)
        return y_SD


def grouped_linear(x_SI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each expert's rows by its weight, with `grouped_mm` if it supports the tensors, else expert by expert.

    Args:
        x_SI: rows sorted by expert.
        weight_EOI: the stacked weights.
        ends_E: int32, the end of each expert's rows; the last is S.

    Returns:
        [S, O] in the weight's dtype.
    """
    if not _grouped_mm_supports(x_SI, weight_EOI):
        counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
        # The backward of `unbind` allocates the gradient of the stack once, that of weight[e] once per expert.
        parts = zip(torch.split(x_SI, counts), weight_EOI.unbind(), strict=True)
        return torch.cat([F.linear(rows_SI, weight_OI) for rows_SI, weight_OI in parts])
    if _reads_rows_of_weights(x_SI, weight_EOI):
        x_IS = x_SI.T if _aligned(x_SI.T) else _rows(x_SI).T  # already aligned if x_SI is this branch's output
        return F.grouped_mm(weight_EOI, x_IS, offs=ends_E).T
    x_SI = _rows(x_SI)
    y_SO = F.grouped_mm(x_SI, weight_EOI.transpose(1, 2), offs=ends_E)
    if y_SO.requires_grad:
        y_SO.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call] # its backward refuses expanded gradients
    return y_SO


def _grouped_mm_supports(x_SI: Tensor, weight_EOI: Tensor) -> bool:
    """True if `grouped_mm` of torch 2.10 to 2.13 supports these tensors.

    It needs one of three dtypes, at least one row, and rows aligned to 16 bytes. On CUDA devices without a kernel torch
    computes expert by expert.
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
    """`x_SI` with contiguous strides, also for a single row, whose stride can be arbitrary."""
    return x_SI.flatten().view(x_SI.shape)


def _aligned(x_IS: Tensor) -> bool:
    """True if rows are contiguous, and each is aligned to 16 bytes."""
    return x_IS.stride(1) == 1 and x_IS.stride(0) * x_IS.element_size() % 16 == 0


def _reads_rows_of_weights(x_SI: Tensor, weight_EOI: Tensor) -> bool:
    """True if W x^T is faster than x W^T: on a CPU, for a few rows of each expert. Inference only."""
    few = len(x_SI) <= FEW_ROWS * len(weight_EOI) or (x_SI.element_size() == 2 and len(x_SI) <= SLAB_ROWS_16_BIT)
    learns = torch.is_grad_enabled() and (x_SI.requires_grad or weight_EOI.requires_grad)
    return few and not learns and x_SI.device.type == "cpu" and weight_EOI.stride(-1) == 1
