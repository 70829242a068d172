"""Norms, feed-forward layers, blocks, RoPE and Batch against their formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pentad.errors import BadInput
from pentad.nn.batch import Batch, SequenceLayout, pack
from pentad.nn.block import ExtraFeedforwardBlock, ParallelBlock, PreNormBlock
from pentad.nn.feedforward import GatedSwiGLU, GeluMLP, SwiGLU
from pentad.nn.moe.experts import GatedSwiGLUExperts
from pentad.nn.moe.layer import MixtureOfExperts
from pentad.nn.norm import LayerNorm, RMSNorm
from pentad.nn.rope import Rope
from pentad.nn.rope_scaling import SCALINGS, DefaultRope, Dynamic, DynamicSteps, inverse_frequencies, scaling

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = RMSNorm(32, eps=0.01).to(dtype)
    norm.weight.data = torch.randn(32).to(dtype)
    x = (3 * torch.randn(5, 32)).to(dtype)
    x[0] = 0
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 0.01).sqrt() * norm.weight.double()
    assert norm(x).dtype == dtype
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(norm(x).double(), expected, rtol=2 * ulp, atol=ulp)


def test_rms_norm_of_large_float16_values_does_not_overflow() -> None:
    norm = RMSNorm(16, eps=1e-5).to(torch.float16)
    x = torch.full((2, 16), 3000.0, dtype=torch.float16)
    torch.testing.assert_close(norm(x), torch.ones(2, 16, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_accepts_float32_and_returns_its_weights_dtype(dtype: torch.dtype) -> None:
    norm = LayerNorm(32, eps=0.01).to(dtype)
    norm.weight.data, norm.bias.data = torch.randn(32).to(dtype), torch.randn(32).to(dtype)
    x = 3 * torch.randn(5, 32) + 1000
    x[0] = 7
    wide = x.double() - x.double().mean(-1, keepdim=True)
    expected = wide / (wide.square().mean(-1, keepdim=True) + 0.01).sqrt() * norm.weight.double() + norm.bias.double()
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert torch.equal(norm(x)[0], norm.bias)
    assert norm(x.to(dtype)).dtype == dtype


@torch.inference_mode()
def test_gelu_mlp() -> None:
    layer, x = GeluMLP(8, 20), torch.randn(5, 8)
    z = layer.up_proj(x)
    gelu = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    torch.testing.assert_close(layer(x), layer.down_proj(gelu))
    assert layer.up_proj.bias is not None
    assert layer.down_proj.bias is not None


@torch.inference_mode()
def test_gated_swiglu_and_its_experts() -> None:
    layer, x = GatedSwiGLU(8, 20), torch.randn(5, 8)
    (a, b), up = layer.gate_proj(x).split(20, -1), layer.up_proj(x)
    y = layer(x)
    torch.testing.assert_close(y, layer.down_proj(a * b / (1 + (-b).exp()) * up))
    experts = GatedSwiGLUExperts(2, 8, 20)
    for part in ("gate_proj", "up_proj", "down_proj"):
        getattr(experts, part).weight[1] = getattr(layer, part).weight
    torch.testing.assert_close(experts(x, torch.tensor([0, 5], dtype=torch.int32)), y)
    assert not torch.allclose(experts(x, torch.tensor([5, 5], dtype=torch.int32)), y, atol=0.01)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
def test_swiglu(bias: bool) -> None:
    layer, x = SwiGLU(8, 20, bias=bias), torch.randn(5, 8)
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    torch.testing.assert_close(layer(x), layer.down_proj(gate / (1 + (-gate).exp()) * up))
    assert (layer.down_proj.bias is not None) == bias


class Times(torch.nn.Module):
    """A stand-in for a dense part of a block: multiplies by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, batch: Batch | None = None) -> Tensor:
        return x * self.factor


class RoutedTimes(MixtureOfExperts):
    """A stand-in for a mixture: multiplies by a factor."""

    def __init__(self, factor: float) -> None:
        torch.nn.Module.__init__(self)
        self.factor = factor

    def forward(self, x: Tensor, batch: Batch) -> tuple[Tensor, Any]:
        return x * self.factor, "routed"


def test_a_parallel_block_adds_attention_and_feedforward_to_the_residual() -> None:
    block = ParallelBlock(Times(2), Times(3), RoutedTimes(5))
    y, aux = block(torch.ones(1, 4), Batch.of(1))
    assert y.tolist() == [[1.0 + 6 + 10] * 4]
    assert aux == "routed"


def test_a_pre_norm_block_adds_to_the_residual() -> None:
    block = PreNormBlock(Times(2), Times(3), Times(5), RoutedTimes(7))
    y, aux = block(torch.ones(1, 4), Batch.of(1))
    assert y.tolist() == [[7.0 + 35 * 7.0] * 4]
    assert aux == "routed"


def test_an_extra_feedforward_reads_the_first_ones_output() -> None:
    block = ExtraFeedforwardBlock(Times(2), Times(3), Times(5), RoutedTimes(7), Times(11), Times(13))
    y, aux = block(torch.ones(1, 4), Batch.of(1))
    before = 7.0 + 35 * 7.0
    assert y.tolist() == [[before + 143 * before] * 4]
    assert aux == "routed"


def rotate(x: Tensor, position: int, frequencies: Tensor, attention_factor: float = 1.0) -> Tensor:
    """Rotate one head's pairs as complex numbers: RoFormer, equation 34."""
    half = len(x) // 2
    pairs = torch.complex(x[:half].double(), x[half:].double())
    turned = pairs * torch.polar(torch.ones(half).double(), position * frequencies.double())
    return torch.cat((turned.real, turned.imag)) * attention_factor


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rope_rotates_pairs(theta: float) -> None:
    x, batch = torch.randn(7, 3, 16), Batch.of(4, 3)
    y = Rope(16, theta)(x, batch)
    frequencies = torch.tensor([theta ** (-2 * i / 16) for i in range(8)])
    for n, position in enumerate([0, 1, 2, 3, 0, 1, 2]):
        for head in range(3):
            expected = rotate(x[n, head], position, frequencies)
            torch.testing.assert_close(y[n, head].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(y[0], x[0])


def test_a_partial_rope_keeps_the_other_dimensions() -> None:
    x, batch = torch.randn(5, 3, 20), Batch.of(5)
    y = Rope(8)(x, batch)
    assert torch.equal(y[..., :8], Rope(8)(x[..., :8].contiguous(), batch))
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert not torch.equal(y[1:, :, :8], x[1:, :, :8])


def test_rope_applies_the_attention_factor_and_keeps_the_dtype() -> None:
    parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    scaled = scaling(parameters)
    x, batch = torch.randn(3, 1, 16), Batch.of(3)
    y = Rope(16, scaling=scaled)(x, batch)
    attention_factor = 0.1 * math.log(4) + 1
    frequencies = scaled.frequencies(10000.0, 16, 3)
    expected = rotate(x[2, 0], 2, frequencies, attention_factor)
    torch.testing.assert_close(y[2, 0].double(), expected, rtol=1e-5, atol=1e-5)
    assert Rope(16)(x.bfloat16(), batch).dtype == torch.bfloat16


def test_rope_is_computed_once_for_all_layers() -> None:
    class Cosines(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func is torch.ops.aten.cos.default
            return func(*args, **(kwargs or {}))

    rope, batch, x = Rope(8), Batch.of(5), torch.randn(5, 2, 8)
    with Cosines() as cosines:
        for _ in range(4):
            rope(x, batch)
        assert cosines.count == 1
        Rope(8, 77.0)(x, batch)  # cosines depend on the base
        assert cosines.count == 2
        rope(x, Batch.of(5))
        assert cosines.count == 3


def test_a_batch_from_cu_seqlens_equals_one_from_lengths() -> None:
    """RoPE is equal too, even if its frequencies depend on each sequence's length."""
    packed, batch = Batch.packed(torch.tensor([0, 20, 20, 25])), Batch.of(20, 0, 5)
    assert torch.equal(packed.positions, batch.positions)
    assert packed.layout == batch.layout
    x = torch.randn(25, 2, 8)
    for rope_scaling in (DefaultRope(), Dynamic(2.0, 16), DynamicSteps(16)):
        rope = Rope(8, scaling=rope_scaling)
        assert torch.equal(rope(x, packed), rope(x, batch))


def test_each_sequence_of_a_batch_rotates_by_its_own_length() -> None:
    rope = Rope(8, scaling=Dynamic(2.0, 16))
    long, short = list(range(20)), list(range(5))
    x = torch.randn(25, 2, 8)
    together = rope(x, Batch.of(len(long), len(short)))
    torch.testing.assert_close(together[:20], rope(x[:20], Batch.of(len(long))))
    torch.testing.assert_close(together[20:], rope(x[20:], Batch.of(len(short))))
    assert not torch.allclose(together[1], Rope(8)(x[:20], Batch.of(len(long)))[1])


def test_frequencies_of_dynamic_ntk() -> None:
    stretch = 2.0 * 40 / 16 - 1
    expected = inverse_frequencies(10000.0 * stretch ** (8 / 6), 8)
    torch.testing.assert_close(Dynamic(2.0, 16).frequencies(10000.0, 8, 40), expected)
    torch.testing.assert_close(Dynamic(2.0, 16).frequencies(10000.0, 8, 16), inverse_frequencies(10000.0, 8))


def test_frequencies_of_dynamic_ntk_in_steps() -> None:
    """Qwen's formula, for every length up to slightly more than four times the trained one."""
    steps = DynamicSteps(32)
    for n in range(1, 140):
        alpha = max(1, 2 ** math.ceil(math.log2(n / 32) + 1) - 1)
        assert steps.scaling_key(n) == alpha
        expected = inverse_frequencies(10000.0 * alpha ** (8 / 6), 8)
        torch.testing.assert_close(steps.frequencies(10000.0, 8, n), expected)
    assert [steps.scaling_key(n) for n in (0, 1, 32, 33, 64, 65, 128, 129)] == [1, 1, 1, 3, 3, 7, 7, 15]


@pytest.mark.parametrize("rope_scaling", [Dynamic(2.0, 16), DynamicSteps(16)])
def test_dynamic_ntk_does_not_scale_a_single_pair(rope_scaling: Dynamic | DynamicSteps) -> None:
    assert rope_scaling.frequencies(10000.0, 2, 100).tolist() == [1.0]


def test_divisors_divide_frequencies() -> None:
    rope = scaling({"rope_type": "divisors", "divisors": [1.0, 2.0, 4.0, 8.0]})
    expected = inverse_frequencies(10000.0, 8) / torch.tensor([1.0, 2.0, 4.0, 8.0])
    torch.testing.assert_close(rope.frequencies(10000.0, 8, 1), expected)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "spiral"}, f"'spiral'; known scalings: {', '.join(SCALINGS)}"),
        ({"type": "linear"}, "RoPE scaling 'linear': the config lacks factor"),
        ({"rope_type": "linear", "factor": "four"}, "factor is 'four', not of type float"),
        ({"rope_type": "linear", "factor": 0}, "factor is 0, which is not a possible size"),
        ({"rope_type": "linear", "factor": math.nan}, "factor is nan, which is not a possible size"),
        ({"rope_type": "linear", "factor": math.inf}, "factor is inf, which is not a possible size"),
        ({"rope_type": "linear", "factor": [2.0]}, "factor is '[2.0]', not of type float"),
        ({"rope_type": "linear", "factor": True}, "factor is 'True', not of type float"),
        ({"rope_type": ["linear"]}, "unknown RoPE scaling"),
    ],
    ids=str,
)
def test_an_invalid_scaling_is_refused(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput) as raised:
        Rope(8, scaling=scaling(parameters))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_divisors_of_another_head_dim_are_refused() -> None:
    divisors = scaling({"rope_type": "divisors", "divisors": [1.0, 2.0]})
    with pytest.raises(BadInput, match=r"2 divisors.* 8 frequencies"):
        Rope(16, scaling=divisors)


def test_sequence_layout() -> None:
    layout = SequenceLayout.of([3, 1, 2])
    assert layout.cu_seqlens == (0, 3, 4, 6)
    assert layout.lengths == (3, 1, 2)
    assert layout.spans == [(0, 3), (3, 1), (4, 2)]
    assert len(layout) == 3
    assert not layout.is_uniform
    assert SequenceLayout.of([2, 2]).is_uniform
    bounds = layout.cu_seqlens_on(torch.device("cpu"))
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 3, 4, 6]
    assert layout.cu_seqlens_on(torch.device("cpu")) is bounds
    assert layout == SequenceLayout.of([3, 1, 2]) == SequenceLayout(bounds)
    assert hash(layout) == hash(SequenceLayout(bounds))


def test_pack_whole_sequences() -> None:
    ids, batch = pack([5, 6, 7], [8])
    assert ids.tolist() == [5, 6, 7, 8]
    assert batch.positions.tolist() == [0, 1, 2, 0]
    assert batch.rope_lengths == (3, 1)
    assert batch.kv is None
    packed = Batch.packed(torch.tensor([0, 3, 4], dtype=torch.int32))
    assert packed.layout == batch.layout
    assert packed.positions.tolist() == batch.positions.tolist()


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_parts_with_a_backward_of_their_own(frozen: bool) -> None:
    torch.manual_seed(0)
    x_ND = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    for part in (RMSNorm(16, 1e-5).double(), SwiGLU(16, 24, bias=True).double()):
        named = dict(part.named_parameters())
        for parameter in named.values():
            parameter.data.normal_()
            parameter.requires_grad_(not frozen)

        def run(x_ND: Tensor, *values: Tensor, part: nn.Module = part, names: tuple[str, ...] = tuple(named)) -> Tensor:
            out_ND: Tensor = torch.func.functional_call(part, dict(zip(names, values, strict=True)), x_ND)
            return out_ND

        assert torch.autograd.gradcheck(run, (x_ND, *named.values()))


def test_a_gated_layer_keeps_two_tensors_of_its_width_for_backward() -> None:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    part, x_ND = SwiGLU(16, 640), torch.randn(32, 16)
    weights = {parameter.untyped_storage().data_ptr() for parameter in part.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        part(x_ND)
    assert [count for storage, count in kept.items() if count >= 32 * 640 and storage not in weights] == [32 * 640] * 2
