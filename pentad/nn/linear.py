"""Layers whose weights stay in quantized blocks, and heads, whose outputs are float32.

Legend: N rows, I input features, O output features, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import is_not
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.weights.quantized import AFFINE4, QuantizedTensor

FEW_ROWS = 128  # with more rows, a bfloat16 matmul with the dequantized weight is faster than torch's 4-bit operator


MAX_CONVERTED = 2**20  # numbers of a head's weight that are converted to float32 at a time, for a CPU's cache


class Derived:
    """A value computed from tensors and cached until one of them is replaced or written to.

    Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self._cached: tuple[Sequence[Tensor], list[int], Any] = (), [], None

    def get(self, sources: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        versions = [0 if source.is_inference() else source._version for source in sources]
        cached_sources, cached_versions, value = self._cached
        if versions != cached_versions or any(map(is_not, sources, cached_sources)):
            value = compute()
            self._cached = sources, versions, value
        return value

    def __reduce__(self) -> tuple[type[Derived], tuple[()]]:
        return Derived, ()


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, multiply: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor]
    ) -> Any:
        ctx.transposed = transposed
        return multiply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.transposed(*gradients), None, None


def linear_map(x: Tensor, multiply: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor]) -> Tensor:
    """``multiply(x)``, a linear function; in backward the gradient of x is ``transposed(gradient)``.

    Autograd saves no tensor, so forward frees the dequantized weight and backward dequantizes it again.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _LinearMap.apply(x, multiply, transposed)  # type: ignore[no-untyped-call]
        return y
    return multiply(x)


class QuantizedWeight(nn.Module):
    """A layer with a frozen weight in quantized blocks.

    The blocks are a buffer, so that they move, copy, save and load with the layer; ``.to(dtype)`` leaves them alone.
    Blocks of a mapped file stay mapped.

    Args:
        weight: the blocks; the layer shares their memory.

    Attributes:
        blocks: uint8 [stored rows, bytes a row].
        row_order: int64, the index in `blocks` of each row of the weight; None if the order is the same.
        quantization: the blocks' type, a key of `pentad.weights.quantized.BLOCKS`.
        shape: the shape of the dequantized weight.
    """

    blocks: Tensor
    row_order: Tensor | None

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.quantization = weight.type
        self.shape = weight.shape
        self.register_buffer("blocks", weight.stored)
        self.register_buffer("row_order", weight.order)
        self._mapped_blocks = weight.stored if weight.mapped else None

    @property
    def weight(self) -> QuantizedTensor:
        """The weight, as a view of the buffers."""
        mapped = self.blocks is self._mapped_blocks
        return QuantizedTensor(self.blocks, self.quantization, self.shape, self.row_order, mapped)

    def sources(self) -> list[Tensor]:
        """The buffers; values derived from the weight are valid until one of them changes."""
        return [buffer for buffer in self._buffers.values() if buffer is not None]

    def get_extra_state(self) -> Tensor:
        """The type of the blocks, because block types of equal size can't be told apart by shape."""
        return torch.tensor(list(self.quantization.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to do: `_load_from_state_dict` has compared the types."""

    def __getstate__(self) -> dict[str, Any]:
        buffers = dict(self._buffers)
        for name, buffer in buffers.items():
            if buffer is not None and buffer.untyped_storage().nbytes() > buffer.nbytes:
                buffers[name] = buffer.clone()  # a view would be pickled and deep-copied with all of its storage
        return {**vars(self), "_buffers": buffers, "_mapped_blocks": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        found: Tensor | None = state_dict.get(f"{prefix}_extra_state")
        if found is not None and found.tolist() != self.get_extra_state().tolist():
            errors = arguments[-1]
            errors.append(f"{prefix}blocks are {bytes(found.tolist()).decode()}; expected {self.quantization}")
            return
        if f"{prefix}blocks" in state_dict and self.blocks is self._mapped_blocks:
            self.blocks = self.blocks.clone()  # a mapped file is not written to
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"shape={list(self.shape)}, {self.quantization}"


class QuantizedLinear(QuantizedWeight):
    """x W^T + b. On a CPU, a few bfloat16 rows use torch's own 4-bit operator if the weight is Q4_0, Q4_1 or Q4_K.

    Args:
        weight: [O, I].
        bias: [O] or None.
    """

    bytes_per_weight = 0.625  # packed for the operator: half a byte, and two bfloat16 per 32 weights

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed = Derived()  # may hold the weights of several layers, see `fused_forward`
        self._dequantized = Derived()
        self._cached_dtype: torch.dtype | None = None

    @staticmethod
    def has_operator(quantization: str | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> bool:
        """True if torch has a fast operator for such a weight: bfloat16 on a CPU, rows in tiles of 16."""
        fits = len(shape) == 2 and shape[0] % 16 == 0 and shape[1] % 32 == 0
        return quantization in AFFINE4 and fits and dtype == torch.bfloat16 and device.type == "cpu"

    def forward(self, x_NI: Tensor) -> Tensor:
        if self._uses_operator(x_NI):
            y_NO = _multiply_packed((self,), x_NI)
        elif torch.is_grad_enabled() and x_NI.requires_grad:
            y_NO = linear_map(
                x_NI, lambda x: F.linear(x, self.dequantized(x.dtype)), partial(_multiply_transposed, (self,))
            )
        else:
            bias = None if self.bias is None else self.bias.to(x_NI.dtype)
            return F.linear(x_NI, self.dequantized(x_NI.dtype), bias)
        return y_NO if self.bias is None else y_NO + self.bias

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight; cached in the dtype of the last `cache_dequantized`."""
        if dtype != self._cached_dtype:
            return self.weight.dequantize(dtype)
        numbers: Tensor = self._dequantized.get(self.sources(), lambda: self.weight.dequantize(dtype))
        return numbers

    def dequantized_bytes(self, dtype: torch.dtype) -> int:
        """Size of the weight when dequantized; 0 if torch has an operator that reads the blocks."""
        if self.has_operator(self.quantization, self.shape, dtype, self.blocks.device):
            return 0
        return math.prod(self.shape) * dtype.itemsize

    def cache_dequantized(self, dtype: torch.dtype) -> None:
        """Dequantize the weight once instead of in every call, if torch has no operator that reads the blocks."""
        if self.dequantized_bytes(dtype):
            self._cached_dtype = dtype
            self.dequantized(dtype)
            self.weight.release()

    def fused_forward(self, x_NI: Tensor, linears: tuple[nn.Module, ...]) -> Sequence[Tensor] | None:
        """The outputs of `linears`, computed by one matmul; this layer is the first of them.

        Returns:
            None if a layer has another type, a bias or hooks, or if torch has no operator for it.
        """
        layers = []
        for linear in linears:
            if type(linear) is not QuantizedLinear or linear.bias is not None or not linear._uses_operator(x_NI):
                return None
            if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:
                return None
            if linear._backward_pre_hooks or "forward" in vars(linear):
                return None
            layers.append(linear)
        y = _multiply_packed(layers, x_NI)
        return torch.split_with_sizes(y, [layer.out_features for layer in layers], -1)

    def _uses_operator(self, x_NI: Tensor) -> bool:
        few = x_NI.shape[0] <= FEW_ROWS
        return few and self.has_operator(self.quantization, self.shape, x_NI.dtype, x_NI.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._packed, self._dequantized = Derived(), Derived()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class QuantizedHead(QuantizedLinear):
    """A language model's head with a quantized weight. As in `HeadLinear`, the outputs are float32."""

    def forward(self, x_NI: Tensor) -> Tensor:
        return super().forward(x_NI.float())

    def dequantized_bytes(self, dtype: torch.dtype) -> int:
        return super().dequantized_bytes(torch.float32)

    def cache_dequantized(self, dtype: torch.dtype) -> None:
        super().cache_dequantized(torch.float32)


def _multiply_packed(layers: Sequence[QuantizedLinear], x_NI: Tensor) -> Tensor:
    """[N, sum of the layers' O]; the first layer caches the packed weights of all layers."""
    if torch.is_grad_enabled() and x_NI.requires_grad:
        return linear_map(x_NI, partial(_multiply_packed, layers), partial(_multiply_transposed, layers))
    sources = [buffer for layer in layers for buffer in layer._buffers.values() if buffer is not None]
    nibbles, scales = layers[0]._packed.get(sources, lambda: _pack(layers))
    return torch._weight_int4pack_mm_for_cpu(x_NI, nibbles, 32, scales)


def _multiply_transposed(layers: Sequence[QuantizedLinear], y_NO: Tensor) -> Tensor:
    parts = torch.split_with_sizes(y_NO, [layer.out_features for layer in layers], -1)
    products = [part @ layer.dequantized(part.dtype) for part, layer in zip(parts, layers, strict=True)]
    return reduce(torch.add, products)


def _pack(layers: Sequence[QuantizedLinear]) -> tuple[Tensor, Tensor]:
    """Nibbles in the operator's order, and bfloat16 [I / 32, O, 2]: each block's scale, and the value of nibble 8."""
    parts = zip(*(layer.weight.affine4() for layer in layers), strict=True)
    nibbles, scale, minimum = (torch.cat(part) for part in parts)
    packed = torch._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    return packed, torch.stack((scale, minimum + 8 * scale), -1).transpose(0, 1).contiguous().bfloat16()


def project(x_NI: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    """``[linear(x) for linear in linears]``, by one matmul if all layers are quantized and rows are few.

    In that case the first layer caches the packed weights of all layers.
    """
    first = linears[0]
    if type(first) is QuantizedLinear:
        outputs = first.fused_forward(x_NI, linears)
        if outputs is not None:
            return outputs
    return [linear(x_NI) for linear in linears]


def cache_dequantized(network: nn.Module, dtype: torch.dtype, max_bytes: float) -> str:
    """Dequantize weights once instead of in every step, if all of them together take at most `max_bytes`.

    Returns:
        A sentence for the user; empty if torch has an operator for all quantized weights.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, QuantizedLinear)]
    nbytes = sum(layer.dequantized_bytes(dtype) for layer in layers)
    if nbytes == 0:
        return ""
    if nbytes > max_bytes:
        again = "quantized weights are dequantized again in every step"
        return f"{again}: keeping them dequantized would take {nbytes / 1e6:.0f} MB"
    for layer in layers:
        layer.cache_dequantized(dtype)
    return f"quantized weights are kept dequantized, which takes {nbytes / 1e6:.0f} MB"


class QuantizedEmbedding(QuantizedWeight):
    """An embedding with a quantized weight; its output is float32.

    Args:
        weight: [vocabulary, D].
    """

    bytes_per_weight = QuantizedLinear.bytes_per_weight

    def forward(self, ids_N: Tensor) -> Tensor:
        return self.weight.take_rows(ids_N).dequantize()


def float32_linear(x_NI: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, accumulated and returned in float32 for a weight of any dtype: bfloat16 would make near logits equal.

    Without gradients, no float32 copy of the whole weight is made: CUDA's operator needs none, and elsewhere parts that
    fit a CPU's cache are converted one at a time.
    """
    learns = torch.is_grad_enabled() and (x_NI.requires_grad or weight.requires_grad)
    if learns or weight.dtype == torch.float32 or x_NI.dtype != weight.dtype:
        return F.linear(x_NI, weight, bias).float()
    if weight.is_cuda:
        y_NO = torch.mm(x_NI, weight.T, out_dtype=torch.float32)
    else:
        x_NI, y_NO = x_NI.float(), x_NI.new_empty(len(x_NI), len(weight), dtype=torch.float32)
        parts = max(1, MAX_CONVERTED // weight.shape[1])
        for rows, out in zip(weight.split(parts), y_NO.split(parts, 1), strict=True):  # type: ignore[no-untyped-call]
            torch.mm(x_NI, rows.float().T, out=out)
    return y_NO if bias is None else y_NO + bias


class HeadLinear(nn.Linear):
    """A language model's head: a linear layer with float32 outputs."""

    def forward(self, x_NI: Tensor) -> Tensor:
        return float32_linear(x_NI, self.weight, self.bias)
