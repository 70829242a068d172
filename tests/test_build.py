"""`build`: networks initialized from a seed or loaded from a checkpoint, and configs read without tensor data."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, SwitchTransformersConfig
from transformers import SwitchTransformersForConditionalGeneration as SwitchPeer

import pentad.weights
from pentad.build import build, meta_network
from pentad.models import family_of
from pentad.models.language.config import read_family_config
from pentad.models.language.openmoe import OpenMoeConfig
from pentad.models.language.qwen import QwenConfig
from pentad.weights.checkpoint import Checkpoint, TensorEntry
from tests.helpers.gguf_llama import write_gguf
from tests.helpers.tiny import tiny_checkpoint
from tests.helpers.tiny_openmoe import openmoe_checkpoint
from tests.helpers.tiny_qwen import qwen_checkpoint
from tests.helpers.tiny_switch import switch_checkpoint

WIDE = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SWITCH = {
    "vocab_size": 1000,
    "d_model": 128,
    "d_ff": 192,
    "d_kv": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_experts": 4,
}


# --- from a config and a seed ---------------------------------------------------------------------


def config_of(folder: Path) -> Any:
    checkpoint = pentad.weights.open(folder)
    return read_family_config(family_of(checkpoint), checkpoint)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi", "mixtral", "switch_transformers"])
def test_initial_weights_are_distributed_as_transformers_draws_them(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    if family == "switch_transformers":
        peer = SwitchPeer(SwitchTransformersConfig(**SWITCH, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1))
    else:
        peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **WIDE, initializer_range=0.05))
    peer.save_pretrained(tmp_path)
    theirs = build(pentad.weights.open(tmp_path))
    ours = build(config_of(tmp_path), seed=3)
    shapes = {name: parameter.shape for name, parameter in ours.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = theirs.get_parameter(name)
        if parameter.dim() < 2:
            assert torch.equal(parameter, expected), name
        else:  # the standard deviation of n normal samples has a relative error of 1 / sqrt(2 n)
            tolerance = 6 * parameter.numel() ** -0.5
            assert parameter.std().item() == pytest.approx(expected.std().item(), rel=tolerance), name
            assert abs(parameter.mean().item()) < 6 * expected.std().item() * parameter.numel() ** -0.5, name


def test_published_initializations_that_transformers_lacks() -> None:
    """Qwen scales residual projections down with depth; OpenMoE initializes experts by their input width."""
    qwen = build(QwenConfig(**WIDE, seq_length=64), seed=0)
    down, up = qwen.get_parameter("layers.1.feedforward.down_proj.weight"), qwen.get_parameter("embed.weight")
    assert (down.std() / up.std()).item() == pytest.approx(0.5, rel=0.05)  # 1 / sqrt(2 * 2 layers)
    moe = build(OpenMoeConfig(**WIDE, num_experts=4, moe_layer_interval=2), seed=0)
    stds = {
        part: moe.get_parameter(f"layers.1.feedforward.experts.{part}.weight").std()
        for part in ("up_proj", "down_proj")
    }
    assert stds["up_proj"].item() == pytest.approx((0.1 / 128) ** 0.5, rel=0.05)
    assert stds["down_proj"].item() == pytest.approx((0.1 / 192) ** 0.5, rel=0.05)


def test_equal_seeds_give_equal_bits_and_tied_heads_stay_tied(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    config = config_of(tmp_path)
    one, two, other = (dict(build(config, seed=seed).named_parameters()) for seed in (5, 5, 6))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    network = build(config, seed=5, trainable=True, dtype=torch.bfloat16)
    assert network.head.weight is network.embed.weight
    assert network.embed.weight.dtype == torch.bfloat16
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


# --- from a checkpoint ------------------------------------------------------------------------------


def test_trainable_weights_do_not_write_into_the_file(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    before = (tmp_path / "model.safetensors").read_bytes()
    network = build(pentad.weights.open(tmp_path), trainable=True)
    assert network.head.weight is network.embed.weight
    with torch.no_grad():
        for parameter in network.parameters():
            assert parameter.requires_grad
            parameter.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    frozen = build(pentad.weights.open(tmp_path))
    assert torch.allclose(network.norm.weight - 1, frozen.norm.weight, atol=1e-6)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_trainable_network_of_a_quantized_file_is_dequantized(tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path / "hf", hidden_size=64, intermediate_size=96, head_dim=16)
    write_gguf(tmp_path / "gguf", tiny.peer, "Q4_0")
    network = build(pentad.weights.open(tmp_path / "gguf"), trainable=True)
    assert len(list(network.parameters())) == len(list(tiny.peer.parameters()))
    copied = copy.deepcopy(network)
    assert torch.equal(copied.head.weight, network.head.weight)


# --- configs are read from headers --------------------------------------------------------------------


def unreadable(checkpoint: Checkpoint) -> Checkpoint:
    """Copy a checkpoint so that reading any tensor fails."""

    def fail() -> torch.Tensor:
        raise AssertionError("tensor data was read")

    tensors: dict[str, TensorEntry] = {name: replace(entry, read=fail) for name, entry in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def gguf_checkpoint(folder: Path) -> object:
    return write_gguf(folder / "m.gguf", tiny_checkpoint(folder / "hf").peer, "F32")


MAKERS: dict[str, Callable[[Path], object]] = {
    "llama, tied in the config only": lambda folder: tiny_checkpoint(folder, edit={"tie_word_embeddings": True}),
    **{
        name: lambda folder, name=name: tiny_checkpoint(folder, family=name)  # type: ignore[misc]
        for name in ("mistral", "qwen2", "qwen3", "mixtral", "phi")
    },
    "qwen": qwen_checkpoint,
    "openmoe": openmoe_checkpoint,
    "switch_transformers": switch_checkpoint,
}


@pytest.mark.parametrize("family", MAKERS)
def test_a_config_is_read_without_tensor_data(tmp_path: Path, family: str) -> None:
    MAKERS[family](tmp_path)
    checkpoint = unreadable(pentad.weights.open(tmp_path))
    assert read_family_config(family_of(checkpoint), checkpoint).vocab_size > 0  # type: ignore[attr-defined]
    if "tied" not in family:
        assert meta_network(checkpoint).device.type == "meta"


def test_a_gguf_config_is_read_without_tensor_data(tmp_path: Path) -> None:
    gguf_checkpoint(tmp_path)
    checkpoint = unreadable(pentad.weights.open(tmp_path / "m.gguf"))
    assert read_family_config(family_of(checkpoint), checkpoint).vocab_size == 96  # type: ignore[attr-defined]


def test_the_pages_of_converted_tensors_are_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path, dtype=torch.float16)
    checkpoint, dropped = pentad.weights.open(tmp_path), 0

    def count(view: torch.Tensor) -> None:
        nonlocal dropped
        dropped += 1

    monkeypatch.setattr("pentad.build.drop_pages", count)
    build(checkpoint, dtype=torch.float16)
    assert dropped == 0  # the network's weights are views of the file
    build(checkpoint, trainable=True)
    assert dropped == len(checkpoint.tensors)
