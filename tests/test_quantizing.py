"""Float checkpoints that are quantized while they are loaded."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pentad
import pentad.weights
from pentad.build import quantized_type
from pentad.convert import convert
from pentad.errors import BadInput
from pentad.generate import EncoderDecoderModel, LanguageModel
from pentad.loading import check_quantize
from pentad.models import families
from pentad.nn.linear import QuantizedHead
from pentad.weights.quantized import QuantizedTensor
from pentad.weights.quantizer import quantize
from tests.helpers.conversions import WIDE
from tests.helpers.gguf_llama import write_gguf
from tests.helpers.programs import needs_kernels
from tests.helpers.tiny import (
    assert_equal_logits,
    network_of,
    random_ids,
    talking_checkpoint,
    tiny_checkpoint,
    tiny_peer,
)
from tests.helpers.tiny_openmoe import openmoe_checkpoint
from tests.helpers.tiny_qwen import qwen_checkpoint
from tests.helpers.tiny_switch import switch_checkpoint

TYPES = ("q8_0", "q4_0", "q4_k")
SIZES = {"hidden_size": 256, "intermediate_size": 96}  # q4_k becomes q5_0 in rows of 96
GGUF_FAMILIES: dict[str, Callable[[Path], Any]] = {
    "llama": partial(tiny_checkpoint, **SIZES),
    "llama, tied, bfloat16": partial(tiny_checkpoint, tie_word_embeddings=True, dtype=torch.bfloat16, **SIZES),
    "mistral": partial(tiny_checkpoint, family="mistral", **SIZES),
    "qwen": qwen_checkpoint,  # rows of 48, which stay floats
    "qwen2": partial(tiny_checkpoint, family="qwen2", **SIZES),
    "qwen3": partial(tiny_checkpoint, family="qwen3", **SIZES),
    "phi": partial(tiny_checkpoint, family="phi", **SIZES),
    "mixtral": partial(tiny_checkpoint, family="mixtral", num_local_experts=3, **SIZES),
}
OTHER_FAMILIES: dict[str, Callable[[Path], Any]] = {
    "openmoe": partial(openmoe_checkpoint, hidden_size=64, intermediate_size=96),
    "switch_transformers": partial(switch_checkpoint, d_model=64, d_ff=96),
}


def test_every_family_is_tested() -> None:
    tested = {name.split(",")[0] for name in (*GGUF_FAMILIES, *OTHER_FAMILIES)}
    assert tested == {family.names.family for family in families() if family.task == "language"}


def logits(model: LanguageModel | EncoderDecoderModel) -> Tensor:
    ids = random_ids(30)
    return model.logits(ids) if isinstance(model, LanguageModel) else model.logits(ids, [0, *ids[:9]])


@needs_kernels
@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_the_logits_have_the_bits_of_a_converted_file(family: str, type_name: str, tmp_path: Path) -> None:
    GGUF_FAMILIES[family](tmp_path / "floats")
    convert(tmp_path / "floats", tmp_path / "q.gguf", to="gguf", quantize=type_name)
    model, file = pentad.load(tmp_path / "floats", quantize=type_name), pentad.load(tmp_path / "q.gguf")
    assert model.step.backend == file.step.backend
    assert model.step.backend.startswith("by the kernels")
    assert torch.equal(logits(model), logits(file))


@pytest.mark.parametrize("family", [*OTHER_FAMILIES, "llama", "mixtral"])
def test_plain_torch_gives_the_logits_of_the_quantized_numbers(family: str, tmp_path: Path) -> None:
    (GGUF_FAMILIES | OTHER_FAMILIES)[family](tmp_path)
    exact = pentad.load(tmp_path, dtype="float32")
    quantized = 0
    with torch.no_grad():
        for name, weight in exact.network.named_parameters():
            stays = "head" in name or "embed" in name if family == "switch_transformers" else False
            if not stays and (type_name := quantized_type(name, weight.shape, "q4_0")):
                blocks = quantize(weight, type_name).flatten(0, -2)
                weight.copy_(QuantizedTensor(blocks, type_name, tuple(weight.shape)).dequantize())
                quantized += 1
    assert quantized > 10
    model = pentad.load(tmp_path, quantize="q4_0", dtype="float32")
    assert_equal_logits(logits(model), logits(exact))


def test_without_kernels_the_weights_stay_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path, **WIDE)
    network = pentad.load(tmp_path, quantize="q8_0").network
    monkeypatch.setattr("pentad.kernels.isas", dict)
    monkeypatch.setattr("pentad.kernels.reason", lambda: "nobody built them")
    model = pentad.load(tmp_path, quantize="q8_0")
    assert "nobody built them (quantized weights are kept dequantized" in model.step.backend
    assert type(model.network.head) is type(network.head) is QuantizedHead
    assert torch.equal(model.network.head.blocks, network.head.blocks)


def test_a_published_layout_with_transposed_experts(tmp_path: Path) -> None:
    """OpenMoE's files store experts transposed: the rows of the network's matrices are quantized, not the file's."""
    OTHER_FAMILIES["openmoe"](tmp_path)
    floats, network = network_of(tmp_path), network_of(tmp_path, quantized="q8_0")
    name = next(name for name, _ in floats.named_parameters() if name.endswith("experts.up_proj.weight"))
    weight, part = floats.get_parameter(name), network.get_submodule(name.removesuffix(".weight"))
    assert torch.equal(part.weight.blocks, quantize(weight, "q8_0").flatten(0, 1))


def test_only_matrices_are_quantized_and_embedding_and_head_get_8_bits() -> None:
    assert quantized_type("layers.0.attention.q_proj.weight", (64, 256), "q4_k") == "q4_k"
    assert quantized_type("layers.0.attention.q_proj.weight", (64, 96), "q4_k") == "q5_0"
    assert quantized_type("layers.0.feedforward.experts.up_proj.weight", (4, 8, 64), "q4_0") == "q4_0"
    for name in ("embed.weight", "head.weight"):
        assert quantized_type(name, (96, 64), "q4_0") == "q8_0"
    for name, shape in {
        "layers.0.attention.q_proj.bias": (64,),
        "norm.weight": (64,),
        "layers.0.feedforward.router.weight": (8, 64),
        "layers.0.attention.position_bias.weight": (32, 64),
        "layers.0.feedforward.up_proj.weight": (64, 48),
    }.items():
        assert quantized_type(name, shape, "q4_0") is None


def test_nothing_is_left_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path / "floats", **WIDE)
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "cache"))
    model = pentad.load(tmp_path / "floats", quantize="q8_0")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "floats" / "config.json"))  # a file where the folder should be
    in_memory = pentad.load(tmp_path / "floats", quantize="q8_0")
    assert torch.equal(logits(in_memory), logits(model))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_blocks_are_in_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "cache"))
    tiny_checkpoint(tmp_path / "floats", **WIDE)
    model = pentad.load(tmp_path / "floats", quantize="q8_0")
    assert f"{tmp_path}/cache/" in Path("/proc/self/maps").read_text()
    assert model.network.head.weight.mapped


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with torch.no_grad():
        write_gguf(tmp_path / "q.gguf", tiny_peer(**WIDE), "Q8_0")
    tiny = tiny_checkpoint(tmp_path / "nan", **WIDE)
    tiny.peer.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    tiny.peer.save_pretrained(tmp_path / "nan")
    cases = {
        ("q.gguf", "q4_0"): r"q\.gguf is quantized already; --quantize q4_0 is for float weights",
        ("nan", "q4_k"): r"layers\.1\.feedforward\.up_proj\.weight.* holds nan",
        ("nan", "Q9"): "quantize is 'Q9'; expected one of q4_0, .*q8_0, or none",
    }
    for (name, type_name), message in cases.items():
        with pytest.raises(BadInput, match=message) as raised:
            pentad.load(tmp_path / name, quantize=type_name)
        assert "\n" not in str(raised.value)
    with pytest.raises(BadInput, match="'q8_0', which is for the CPU; the device is cuda"):
        check_quantize("q8_0", torch.device("cuda"))


PEAK = """
import json, re, sys
import torch

def status_bytes(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
import gguf.quants
import pentad.loading
before = status_bytes("VmRSS")
model = pentad.load(sys.argv[1], quantize="q4_0", threads=1)
print(json.dumps({"peak": status_bytes("VmHWM") - before, "now": status_bytes("VmRSS") - before}))
"""


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_quantized_weights_and_one_float_tensor(tmp_path: Path) -> None:
    """The float weights take 153 MB, the quantized ones 22 MB, and the largest float tensor 8 MB."""
    talking_checkpoint(tmp_path / "floats", hidden_size=1024, intermediate_size=2048, num_hidden_layers=4)
    environment = {**os.environ, "PENTAD_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "floats"], capture_output=True, text=True, check=True, env=environment
    )
    memory = json.loads(run.stdout)
    weights = [entry.nbytes for entry in pentad.weights.open(tmp_path / "floats").tensors.values()]
    assert sum(weights) > 150e6
    assert memory["now"] <= 0.15 * sum(weights) + 30e6
    assert memory["peak"] <= 0.15 * sum(weights) + max(weights) + 40e6
