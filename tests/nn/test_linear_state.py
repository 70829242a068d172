"""Copies, pickles, state dicts, dtypes and devices of quantized layers."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pentad.nn.linear import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from pentad.nn.moe.experts import QuantizedGroupedLinear
from pentad.weights.mapped import map_file
from pentad.weights.quantized import BLOCKS, QuantizedTensor
from tests.helpers.blocks import random_blocks
from tests.helpers.linear import assert_near, exact_project, frozen_bias, random_x, side_by_side
from tests.helpers.tiny import rms


def constructors() -> dict[str, tuple[Callable[[QuantizedTensor], QuantizedWeight], tuple[Tensor, ...]]]:
    """A constructor of each layer from a weight of 48 rows, and the arguments of a call."""
    ends = torch.tensor([1, 1, 3]).int()
    return {
        "linear": (QuantizedLinear, (random_x(3, 64),)),
        "experts": (
            lambda w: QuantizedGroupedLinear(QuantizedTensor(w.stored, w.type, (3, 16, 64), w.order, w.mapped)),
            (random_x(3, 64), ends),
        ),
        "embedding": (QuantizedEmbedding, (torch.tensor([40, 0, 40]),)),
    }


def pickle_copy(layer: nn.Module) -> nn.Module:
    made: nn.Module = pickle.loads(pickle.dumps(layer))
    return made


def torch_save_copy(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    made: nn.Module = torch.load(file, weights_only=False)
    return made


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle_copy, torch_save_copy])
@pytest.mark.parametrize("part", ["linear", "experts", "embedding"])
@pytest.mark.parametrize("name", ["q4_1", "q8_0"])
def test_copies_give_equal_outputs_and_exclude_caches(
    name: str, part: str, copied: Callable[[nn.Module], nn.Module]
) -> None:
    make, inputs = constructors()[part]
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
    make, inputs = constructors()[part]
    layer, other = (make(random_blocks("q4_1", 48, 64, seed=seed)) for seed in (0, 1))
    y, _ = layer(*inputs), other(*inputs)  # both fill their caches
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


def test_project_uses_blocks_loaded_after_the_first_call() -> None:
    weights = [random_blocks("q4_1", out, 128, seed=out) for out in (48, 16, 16)]
    layers, x = [QuantizedLinear(weight) for weight in weights[:2]], random_x(3, 128)
    side_by_side(x, *layers)
    layers[1].load_state_dict(QuantizedLinear(weights[2]).state_dict())
    assert_near(side_by_side(x, *layers), exact_project(x, weights[0], weights[2]))


def test_to_another_dtype_keeps_the_blocks() -> None:
    layer = QuantizedLinear(random_blocks("q4_1", 48, 64), frozen_bias(48))
    x, blocks = random_x(3, 64), layer.blocks.clone()
    y = layer(x)
    layer.to(torch.float32)
    assert torch.equal(layer.blocks, blocks)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float32
    assert rms(layer(x.float()) - y.float()) <= 0.01 * rms(y.float())


def test_to_another_device() -> None:
    layer = QuantizedLinear(random_blocks("q4_1", 48, 64).take_rows(torch.arange(48))).to("meta")
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}
    assert layer(random_x(200, 64).to("meta")).shape == (200, 48)


def test_blocks_of_a_file_stay_mapped_until_they_are_replaced(tmp_path: Path) -> None:
    source = random_blocks("q4_1", 4800, 64)
    (tmp_path / "file").write_bytes(source.blocks.numpy().tobytes())
    mapped = map_file(tmp_path / "file")
    weight = QuantizedTensor(mapped.view(4800, -1), "q4_1", (4800, 64), mapped=True)
    layer, x = QuantizedLinear(weight), random_x(3, 64)
    assert layer.blocks.data_ptr() == layer.weight.stored.data_ptr() == mapped.data_ptr()
    assert layer.weight.mapped
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle_copy(layer), QuantizedLinear(weight)):
        twin.load_state_dict(layer.state_dict())
        twin.weight.release()  # would zero the blocks if it treated memory without a file as mapped
        assert torch.equal(twin.blocks, source.blocks)
    part = QuantizedLinear(weight.rows(0, 16))
    assert len(pickle.dumps(part)) < 10_000  # a pickle contains the rows, not the whole file
    layer.load_state_dict(QuantizedLinear(random_blocks("q4_1", 4800, 64, seed=1)).state_dict())
    assert not layer.weight.mapped
    assert not torch.equal(layer(x), y)
    assert torch.equal(mapped, source.blocks.flatten())  # loading did not write into the mapping
