"""Layers of quantized blocks, against float32 on the dequantized weight; their state, copies and derivatives."""

import copy
import io
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import pentad.nn.linear
from pentad.nn.linear import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    RowwiseInt8Linear,
    cache_dequantized,
    project,
)
from pentad.nn.moe.experts import QuantizedGroupedLinear
from pentad.weights.mapped import map_file
from pentad.weights.quantized import BLOCKS, QuantizedTensor
from tests.helpers.blocks import random_blocks
from tests.helpers.tiny import rms

TYPES = ["q4_0", "q4_1", "q4_k"]


def random_x(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).bfloat16()


def frozen_bias(size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size).bfloat16(), requires_grad=False)


def assert_near(y: Tensor, exact: Tensor) -> None:
    """Within the rounding of weights, scales and sums to bfloat16."""
    assert y.dtype == torch.bfloat16
    assert y.shape == exact.shape
    assert rms(y.float() - exact) <= 0.01 * rms(exact)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 128, 129, 300])
@pytest.mark.parametrize("name", TYPES)
def test_is_the_product_with_the_dequantized_weight(name: str, rows: int, bias: bool) -> None:
    weight, x = random_blocks(name, 48, 256), random_x(rows, 256)
    added = frozen_bias(48) if bias else None
    layer = QuantizedLinear(weight, added)
    exact = F.linear(x.float(), weight.dequantize(), None if added is None else added.float())
    assert_near(layer(x), exact)
    assert_near(layer(x), exact)
    assert torch.equal(layer(x), layer(x))


def test_few_and_many_rows_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random_blocks("q4_1", 32, 128), random_x(20, 128)
    layer = QuantizedLinear(weight)
    few = layer(x)
    monkeypatch.setattr(pentad.nn.linear, "FEW_ROWS", 0)
    assert rms(layer(x).float() - few.float()) <= 0.01 * rms(few)


def test_no_rows() -> None:
    assert QuantizedLinear(random_blocks("q4_0", 32, 64))(random_x(0, 64)).shape == (0, 32)


def side_by_side(x: Tensor, *layers: nn.Module) -> Tensor:
    return torch.cat([*project(x, *layers)], -1)


def exact_project(x: Tensor, *weights: QuantizedTensor) -> Tensor:
    return torch.cat([F.linear(x.float(), weight.dequantize()) for weight in weights], -1)


@pytest.mark.parametrize("rows", [0, 1, 7, 200])
def test_project_is_each_alone_side_by_side(rows: int) -> None:
    weights = [random_blocks("q4_1", out, 128, seed=out) for out in (48, 16, 32)]
    x = random_x(rows, 128)
    together = side_by_side(x, *(QuantizedLinear(weight) for weight in weights))
    alone = torch.cat([QuantizedLinear(weight)(x) for weight in weights], -1)
    assert together.shape == (rows, 96)
    if rows:
        assert_near(together, exact_project(x, *weights))
        assert rms(together.float() - alone.float()) <= 0.01 * rms(alone)


def test_project_of_layers_that_do_not_join() -> None:
    """One layer is not quantized, or has a bias."""
    weight, x = random_blocks("q4_0", 16, 64), random_x(3, 64)
    layers = [QuantizedLinear(weight, frozen_bias(16)), QuantizedLinear(weight), nn.Linear(64, 8).bfloat16()]
    assert torch.equal(side_by_side(x, *layers), torch.cat([layer(x) for layer in layers], -1))
    a, b, z = nn.Linear(4, 2), nn.Linear(4, 3), torch.randn(5, 4)
    assert torch.equal(side_by_side(z, a, b), torch.cat((a(z), b(z)), -1))


def test_a_hook_on_a_projected_layer_is_called() -> None:
    layers = [QuantizedLinear(random_blocks("q4_1", 16, 64, seed=i)) for i in range(2)]
    called: list[torch.Size] = []
    layers[1].register_forward_hook(lambda layer, inputs, y: called.append(y.shape))
    project(random_x(3, 64), *layers)
    assert called == [(3, 16)]
    layers[0].register_full_backward_hook(lambda layer, inputs, outputs: called.append(outputs[0].shape))
    project(random_x(5, 64).requires_grad_(), *layers)[0].sum().backward()
    assert called == [(3, 16), (5, 16), (5, 16)]


@pytest.mark.parametrize("alone_first", [True, False])
def test_a_projected_layer_can_still_be_called_alone(alone_first: bool) -> None:
    """In either order, as an adapter or a probe may do."""
    weights = [random_blocks("q4_1", out, 128, seed=out) for out in (48, 16)]
    layers, x = [QuantizedLinear(weight) for weight in weights], random_x(3, 128)
    if alone_first:
        layers[0](x)
    assert_near(side_by_side(x, *layers), exact_project(x, *weights))
    for layer, weight in zip(layers, weights, strict=True):
        assert_near(layer(x), exact_project(x, weight))
    assert_near(side_by_side(x, *layers), exact_project(x, *weights))


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "has_operator"),
    [
        ("q4_0", (32, 64), torch.bfloat16, True),
        ("q4_1", (16, 32), torch.bfloat16, True),
        ("q4_k", (16, 256), torch.bfloat16, True),
        ("q4_1", (16, 32), torch.float32, False),
        ("q4_1", (16, 32), torch.float16, False),
        ("q4_1", (24, 32), torch.bfloat16, False),
        ("q8_0", (32, 64), torch.bfloat16, False),
        ("q4_0", (4, 32, 64), torch.bfloat16, False),
        (None, (32, 64), torch.bfloat16, False),
    ],
)
def test_weights_that_torch_has_an_operator_for(
    name: str, shape: tuple[int, int], dtype: torch.dtype, has_operator: bool
) -> None:
    assert QuantizedLinear.has_operator(name, shape, dtype, torch.device("cpu")) == has_operator
    assert not QuantizedLinear.has_operator(name, shape, dtype, torch.device("meta"))


# Derivatives


def saved_by(compute: Callable[[], Tensor]) -> list[Tensor]:
    """The tensors that autograd keeps for the backward pass."""
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        compute()
    return saved


def assert_equal_gradients(ours: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == dtype
        assert rms((one - other).float()) <= (1e-6 if dtype == torch.float32 else 0.01) * rms(other.float())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 100, 200])
@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_the_derivative_is_the_dequantized_layers(name: str, rows: int, dtype: torch.dtype, bias: bool) -> None:
    weight, x = random_blocks(name, 48, 64), random_x(rows, 64).to(dtype).requires_grad_()
    added = nn.Parameter(torch.randn(48, dtype=dtype)) if bias else None
    layer, inputs = QuantizedLinear(weight, added), [x] if added is None else [x, added]
    direction = torch.randn(rows, 48, dtype=dtype)
    exact = torch.autograd.grad(F.linear(x, weight.dequantize(dtype), added), inputs, direction)
    assert_equal_gradients([*torch.autograd.grad(layer(x), inputs, direction)], [*exact], dtype)
    layer.cache_dequantized(dtype)
    assert_equal_gradients([*torch.autograd.grad(layer(x), inputs, direction)], [*exact], dtype)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False), inputs, direction)
    assert_equal_gradients([*again], [*exact], dtype)
    assert saved_by(lambda: layer(x)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 100, 200])
def test_the_derivative_of_a_fused_product(rows: int, dtype: torch.dtype) -> None:
    weights = [random_blocks("q4_1", out, 64, seed=out) for out in (48, 16, 32)]
    layers, x = [QuantizedLinear(weight) for weight in weights], random_x(rows, 64).to(dtype).requires_grad_()
    plain = [weight.dequantize(dtype) for weight in weights]
    direction = torch.randn(rows, 96, dtype=dtype)
    (exact,) = torch.autograd.grad(torch.cat([F.linear(x, part) for part in plain], -1), x, direction)
    (ours,) = torch.autograd.grad(side_by_side(x, *layers), x, direction)
    assert_equal_gradients([ours], [exact], dtype)
    (ours,) = torch.autograd.grad(checkpoint(lambda x: side_by_side(x, *layers), x, use_reentrant=False), x, direction)
    assert_equal_gradients([ours], [exact], dtype)
    assert saved_by(lambda: side_by_side(x, *layers)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_derivative_of_grouped_experts(dtype: torch.dtype) -> None:
    blocks = random_blocks("q4_1", 5 * 24, 64).blocks
    weight = QuantizedTensor(blocks, "q4_1", (5, 24, 64))
    layer, counts = QuantizedGroupedLinear(weight), [3, 0, 150, 0, 1]
    x, ends = random_x(154, 64).to(dtype).requires_grad_(), torch.tensor(counts).cumsum(0).int()
    experts = zip(torch.split(x, counts), weight.dequantize(dtype), strict=True)
    direction = torch.randn(154, 24, dtype=dtype)
    (exact,) = torch.autograd.grad(torch.cat([F.linear(rows, matrix) for rows, matrix in experts]), x, direction)
    (ours,) = torch.autograd.grad(layer(x, ends), x, direction)
    assert_equal_gradients([ours], [exact], dtype)
    assert saved_by(lambda: layer(x, ends)) == []
    (of_some,) = torch.autograd.grad(layer(x[3:153], ends[1:4] - 3, slice(1, 4)), x, direction[3:153])
    assert_equal_gradients([of_some[3:153]], [exact[3:153]], dtype)


@pytest.mark.parametrize("rows", [1, 2, 3, 200])
def test_the_derivative_of_an_int8_head(rows: int) -> None:
    weight, x = nn.Parameter(torch.randn(48, 64).bfloat16(), requires_grad=False), random_x(rows, 64)
    bias = nn.Parameter(torch.randn(48).bfloat16())
    layer, direction = RowwiseInt8Linear(weight, bias), torch.randn(rows, 48).bfloat16()
    inputs = [x.requires_grad_(), bias]
    exact = torch.autograd.grad(F.linear(x, weight, bias), inputs, direction)
    assert_equal_gradients([*torch.autograd.grad(layer(x), inputs, direction)], [*exact], torch.bfloat16)
    weight.requires_grad_()
    (ours,) = torch.autograd.grad(layer(x.detach()), weight, direction)
    assert_equal_gradients([ours], [direction.T @ x.detach()], torch.bfloat16)


def test_caches_from_inference_serve_training() -> None:
    layers, x = [QuantizedLinear(random_blocks("q4_1", 16, 64, seed=i)) for i in range(2)], random_x(3, 64)
    layers[1].cache_dequantized(torch.float32)
    with torch.inference_mode():
        y, z = side_by_side(x, *layers), layers[1](x.float())
    x.requires_grad_()
    assert torch.equal(side_by_side(x, *layers), y)
    (gradient,) = torch.autograd.grad(side_by_side(x, *layers).sum(), x)
    assert gradient.isfinite().all()
    assert torch.equal(layers[1](x.float()), z)
    torch.autograd.grad(layers[1](x.float()).sum(), x)


# State


def parts() -> dict[str, tuple[Callable[[QuantizedTensor], QuantizedWeight], tuple[Tensor, ...]]]:
    """Constructors of the layers from a weight of 48 rows, with the arguments of a call."""
    ends = torch.tensor([1, 1, 3]).int()
    return {
        "linear": (QuantizedLinear, (random_x(3, 64),)),
        "experts": (
            lambda w: QuantizedGroupedLinear(QuantizedTensor(w.stored, w.type, (3, 16, 64), w.order, w.mapped)),
            (random_x(3, 64), ends),
        ),
        "embedding": (QuantizedEmbedding, (torch.tensor([40, 0, 40]),)),
    }


def by_pickle(layer: nn.Module) -> nn.Module:
    made: nn.Module = pickle.loads(pickle.dumps(layer))
    return made


def by_torch_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    made: nn.Module = torch.load(file, weights_only=False)
    return made


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("part", ["linear", "experts", "embedding"])
@pytest.mark.parametrize("name", ["q4_1", "q8_0"])
def test_copies_compute_alike_and_hold_no_caches(
    name: str, part: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    make, inputs = parts()[part]
    layer = make(random_blocks(name, 48, 64).take_rows(torch.randperm(48)))
    before = len(pickle.dumps(layer))
    y = layer(*inputs)
    if isinstance(layer, QuantizedLinear):
        layer.cache_dequantized(torch.bfloat16)
        y = layer(*inputs)
    assert len(pickle.dumps(layer)) <= before + 100
    twin = copied(layer)
    assert torch.equal(twin(*inputs), y)
    assert dict(twin.named_buffers()).keys() == {"blocks", "row_order"}
    assert twin.blocks.data_ptr() != layer.blocks.data_ptr()
    twin.blocks.zero_()
    assert torch.equal(layer(*inputs), y)
    assert not torch.equal(twin(*inputs), y)


@pytest.mark.parametrize("part", ["linear", "experts", "embedding"])
def test_a_state_dict_is_saved_and_loaded(part: str, tmp_path: Path) -> None:
    make, inputs = parts()[part]
    layer, other = (make(random_blocks("q4_1", 48, 64, seed=seed)) for seed in (0, 1))
    y, _ = layer(*inputs), other(*inputs)  # their caches are filled
    state = layer.state_dict()
    assert [name for name in state if "extra_state" not in name] == ["blocks"]
    assert sum(tensor.nbytes for tensor in state.values()) <= layer.blocks.nbytes + 10
    torch.save(state, tmp_path / "state")
    other.load_state_dict(torch.load(tmp_path / "state"))
    assert torch.equal(other(*inputs), y)
    third = make(random_blocks("q4_1", 48, 64, seed=2))
    third.load_state_dict(state, assign=True)
    assert torch.equal(third(*inputs), y)


def test_a_state_dict_of_other_blocks_is_refused() -> None:
    state = QuantizedLinear(random_blocks("q4_0", 48, 64)).state_dict()
    assert BLOCKS["iq4_nl"] == BLOCKS["q4_0"]
    for other in (QuantizedTensor(state["blocks"], "iq4_nl", (48, 64)), random_blocks("q4_1", 48, 64)):
        network = nn.Sequential(QuantizedLinear(other))
        with pytest.raises(RuntimeError, match=rf"\b0\.blocks\b.* q4_0\b.* {other.type}"):
            network.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
    with pytest.raises(RuntimeError, match="blocks"):
        QuantizedLinear(random_blocks("q4_0", 64, 64)).load_state_dict(state)
    permuted = QuantizedLinear(random_blocks("q4_0", 48, 64).take_rows(torch.arange(48)))
    with pytest.raises(RuntimeError, match="row_order"):
        permuted.load_state_dict(state)


def test_projected_layers_notice_each_others_new_blocks() -> None:
    weights = [random_blocks("q4_1", out, 128, seed=out) for out in (48, 16, 16)]
    layers, x = [QuantizedLinear(weight) for weight in weights[:2]], random_x(3, 128)
    side_by_side(x, *layers)
    layers[1].load_state_dict(QuantizedLinear(weights[2]).state_dict())
    assert_near(side_by_side(x, *layers), exact_project(x, weights[0], weights[2]))


def test_another_dtype_leaves_blocks_alone() -> None:
    layer = QuantizedLinear(random_blocks("q4_1", 48, 64), frozen_bias(48))
    x, blocks = random_x(3, 64), layer.blocks.clone()
    y = layer(x)
    layer.to(torch.float32)
    assert torch.equal(layer.blocks, blocks)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float32
    assert rms(layer(x.float()) - y.float()) <= 0.01 * rms(y.float())


def test_another_device() -> None:
    layer = QuantizedLinear(random_blocks("q4_1", 48, 64).take_rows(torch.arange(48))).to("meta")
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}
    assert layer(random_x(200, 64).to("meta")).shape == (200, 48)
    head = RowwiseInt8Linear(nn.Parameter(torch.randn(48, 64).bfloat16(), requires_grad=False)).to("meta")
    assert head(random_x(1, 64).to("meta")).shape == (1, 48)


def test_blocks_of_a_file_stay_mapped_until_they_are_replaced(tmp_path: Path) -> None:
    source = random_blocks("q4_1", 4800, 64)
    (tmp_path / "file").write_bytes(source.blocks.numpy().tobytes())
    mapped = map_file(tmp_path / "file")
    weight = QuantizedTensor(mapped.view(4800, -1), "q4_1", (4800, 64), mapped=True)
    layer, x = QuantizedLinear(weight), random_x(3, 64)
    assert layer.blocks.data_ptr() == layer.weight.stored.data_ptr() == mapped.data_ptr()
    assert layer.weight.mapped
    y = layer(x)
    for twin in (copy.deepcopy(layer), by_pickle(layer), QuantizedLinear(weight)):
        twin.load_state_dict(layer.state_dict())
        twin.weight.release()  # on memory of no file, this would zero it
        assert torch.equal(twin.blocks, source.blocks)
    part = QuantizedLinear(weight.rows(0, 16))
    assert len(pickle.dumps(part)) < 10_000  # not the whole file
    layer.load_state_dict(QuantizedLinear(random_blocks("q4_1", 4800, 64, seed=1)).state_dict())
    assert not layer.weight.mapped
    assert not torch.equal(layer(x), y)
    assert torch.equal(mapped, source.blocks.flatten())  # loading did not write into the mapping


def test_an_int8_head_notices_a_new_weight() -> None:
    layer = RowwiseInt8Linear(nn.Parameter(torch.randn(48, 64).bfloat16(), requires_grad=False))
    x = random_x(2, 64)
    for _ in range(2):
        y, exact = layer(x), F.linear(x.float(), layer.weight.float())
        assert rms(y.float() - exact) <= 0.02 * rms(exact)
        assert not torch.equal(y, F.linear(x, layer.weight))  # so int8 rows were read
        layer.weight.mul_(-3)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert list(layer.state_dict()) == ["weight"]
    assert layer.float()(x.float()).dtype == torch.float32


# Dequantizing once


def test_weights_are_dequantized_once_or_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = QuantizedLinear(random_blocks("q8_0", 1024, 1024)), QuantizedLinear(random_blocks("q4_1", 32, 1024))
    network, x = nn.Sequential(*layers), random_x(3, 1024)
    y, calls, dequantize = network(x), [], QuantizedTensor.dequantize

    def counted(weight: QuantizedTensor, *dtype: torch.dtype) -> Tensor:
        calls.append(weight.shape)
        return dequantize(weight, *dtype)

    monkeypatch.setattr(QuantizedTensor, "dequantize", counted)
    nbytes = 1024 * 1024 * 2  # the other layer has an operator
    assert re.search("again .* 2 MB", cache_dequantized(network, torch.bfloat16, nbytes - 1))
    assert torch.equal(network(x), y)
    assert torch.equal(network(x), y)
    assert calls == [(1024, 1024)] * 2
    assert re.search("kept .* 2 MB", cache_dequantized(network, torch.bfloat16, nbytes))
    assert torch.equal(network(x), y)
    assert torch.equal(network(x), y)
    assert calls == [(1024, 1024)] * 3
    assert cache_dequantized(nn.Sequential(layers[1], nn.Linear(4, 4)), torch.bfloat16, sys.maxsize) == ""
