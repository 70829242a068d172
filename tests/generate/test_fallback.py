"""The backend of a network and its reason; falling back to plain torch, which dequantizes weights once."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import pentad
from pentad.build import build
from pentad.errors import BadInput
from pentad.generate.plan_step import step_for
from pentad.nn.norm import RMSNorm
from pentad.weights.quantized import QuantizedTensor
from tests.helpers.blocks import random_blocks
from tests.helpers.gguf_llama import write_gguf
from tests.helpers.programs import needs_kernels
from tests.helpers.tiny import (
    assert_equal_logits,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    tiny_checkpoint,
    tiny_peer,
)


def write(folder: Path, type_name: str = "Q8_0") -> Path:
    """Write a tiny Llama whose matrices are quantized to `type_name`."""
    with torch.no_grad():
        write_gguf(folder / "m.gguf", tiny_peer(hidden_size=64, intermediate_size=96, num_hidden_layers=1), type_name)
    return folder / "m.gguf"


@needs_kernels
def test_the_backend_names_a_hook_and_weights_are_dequantized_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file, ids = write(tmp_path), random_ids(20)
    caplog.set_level(logging.INFO, "pentad")
    model = pentad.load(file)
    assert model.step.backend.startswith("by the kernels (")
    assert caplog.messages == [f"{file} runs {model.step.backend}"]
    calls = []
    model.network.layers[0].attention.register_forward_hook(lambda *_: calls.append(1))
    assert_equal_logits(model.logits(ids), logits_of(network_of(file, quantized="none"), ids))
    assert calls
    nbytes = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 96 * 64)
    backend = model.step.backend
    assert backend.startswith("as plain torch: a part has a hook (")
    assert f"kept dequantized, which takes {nbytes / 1e6:.0f} MB" in backend
    assert caplog.messages[1:] == [f"the network has changed: it runs {backend}"]
    dequantized = []
    once = QuantizedTensor.dequantize
    monkeypatch.setattr(
        QuantizedTensor, "dequantize", lambda self, *a: dequantized.append(self.shape) or once(self, *a)
    )
    model.logits(ids)
    assert dequantized == [(20, 64)]  # the embedding's rows


@needs_kernels
def test_weights_are_dequantized_in_every_step_if_memory_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, ids = write(tmp_path), random_ids(20)
    monkeypatch.setattr("pentad.generate.plan_step.physical_memory", lambda: 100_000)
    model = pentad.load(file)
    model.network.layers[0].attention.register_forward_hook(lambda *_: None)
    assert_equal_logits(model.logits(ids), logits_of(network_of(file, quantized="none"), ids))
    assert "dequantized again in every step" in model.step.backend


@pytest.mark.parametrize(
    ("options", "why"),
    [({"dtype": "float32"}, "a dtype was requested"), ({"quantize": "none"}, "dequantizing was requested")],
)
def test_what_was_asked_for_is_the_reason(tmp_path: Path, options: dict[str, str], why: str) -> None:
    assert pentad.load(write(tmp_path), **options).step.backend == f"as plain torch: {why}"


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_read_unquantized_weights_in_the_files_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_checkpoint(tmp_path / "folder", dtype=dtype)
    model = pentad.load(tmp_path / "folder")
    assert model.step.backend.startswith("by the kernels (")
    assert model.network.dtype == dtype
    assert model.step.cache.keys[0].dtype == (torch.float32 if dtype == torch.float32 else torch.float16)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights_differ_from_float32_by_the_rounding_of_the_cache(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_checkpoint(tmp_path, dtype=dtype)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    ids = random_ids(60)
    exact = peer_logits(peer, ids)
    assert_equal_logits(pentad.load(tmp_path, cache_dtype="float32").logits(ids), exact, 1e-5)
    assert_equal_logits(pentad.load(tmp_path).logits(ids), exact, 3e-3)


@needs_kernels
def test_an_int8_cache_needs_the_kernels(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "folder")
    assert pentad.load(tmp_path / "folder", cache_dtype="int8").step.cache.keys[0].dtype == torch.int8
    with pytest.raises(BadInput, match=r"int8.*kernels.*dtype"):
        pentad.load(tmp_path / "folder", cache_dtype="int8", dtype="float32")


def test_without_kernels_the_backend_names_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pentad.kernels.isas", dict)
    monkeypatch.setattr("pentad.kernels.reason", lambda: "nobody built them")
    model = pentad.load(write(tmp_path))
    assert model.step.backend == "as plain torch: there are no kernels: nobody built them"
    assert step_for(model.network).backend == model.step.backend


def test_only_matrices_stay_quantized(tmp_path: Path) -> None:
    """A norm's weight is dequantized even if the file has it quantized."""
    checkpoint = pentad.weights.open(write(tmp_path))
    name = "output_norm.weight"
    blocks = random_blocks("q8_0", 1, 64)
    norm = QuantizedTensor(blocks.blocks, "q8_0", (64,))
    tensors = {**checkpoint.tensors}
    tensors[name] = replace(tensors[name], dtype=None, quantization="q8_0", read=lambda: norm)
    network = build(replace(checkpoint, tensors=tensors), quantized="all")
    assert type(network.norm) is RMSNorm
    assert torch.equal(network.norm.weight, norm.dequantize())
