"""GGUF files of qwen2 and qwen3, written by ggml's package, against transformers on their dequantized weights.

test_loading_gguf.py tests llama, test_phi.py phi, and test_qwen.py the first Qwen.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pentad.nn.linear import QuantizedLinear
from tests.helpers.gguf_file import stored, write_file
from tests.helpers.gguf_llama import NAMES
from tests.helpers.tiny import (
    assert_equal_logits,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    refused,
    rms,
    tiny_checkpoint,
    tiny_peer,
)

WIDE = {"hidden_size": 64, "intermediate_size": 96}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2"},
    "qwen2, tied, mha": {"family": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen2, theta, eps": {"family": "qwen2", "rms_norm_eps": 0.01, "rope_parameters": {"rope_theta": 1e6}},
    "qwen3": {"family": "qwen3", "head_dim": 24},
    "qwen3, tied": {"family": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
}
MORE_NAMES = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


def write_gguf(path: Path, peer: PreTrainedModel, type_name: str = "F32", **metadata: int | float) -> None:
    """Write a GGUF as llama.cpp's converter does; rows of q and k are not permuted."""
    c, tensors, names = peer.config, {}, NAMES | MORE_NAMES
    for name, array in stored(peer, type_name).items():
        module, _, end = name.rpartition(".")
        if module.startswith("model.layers."):
            number, part = module.removeprefix("model.layers.").split(".", 1)
            tensors[f"blk.{number}.{names[part]}.{end}"] = array
        else:
            tensors[f"{names[module]}.{end}"] = array
    known = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "block_count": c.num_hidden_layers,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_parameters["rope_theta"],
    }
    if c.model_type == "qwen3":
        known |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    write_file(path, c.model_type, {**known, **metadata}, tensors, type_name)


@pytest.mark.parametrize("type_name", ["F32", "F16", "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gguf_logits_match_transformers(tmp_path: Path, shape: str, type_name: str) -> None:
    file, peer = tmp_path / "m.gguf", tiny_peer(**WIDE, **SHAPES[shape])
    before = peer.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    write_gguf(file, peer, type_name)
    assert torch.equal(before, peer.state_dict()["model.layers.0.self_attn.q_proj.weight"]) == (type_name == "F32")
    ids = random_ids(40)
    assert_equal_logits(logits_of(network_of(file), ids), peer_logits(peer, ids))


@pytest.mark.parametrize("shape", ["qwen2", "qwen3"])
def test_a_float32_gguf_gives_the_same_bits_as_the_folder(tmp_path: Path, shape: str) -> None:
    tiny = tiny_checkpoint(tmp_path / "hf", **WIDE, **SHAPES[shape])
    write_gguf(tmp_path / "m.gguf", tiny.peer)
    folder, file = network_of(tmp_path / "hf"), network_of(tmp_path / "m.gguf")
    for (name, ours), (_, theirs) in zip(folder.named_parameters(), file.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_weights_are_about_as_accurate_as_bfloat16(tmp_path: Path, shape: str) -> None:
    file, peer = tmp_path / "m.gguf", tiny_peer(**WIDE, **SHAPES[shape])
    write_gguf(file, peer, "Q4_0")
    kept = network_of(file, torch.bfloat16)
    plain = network_of(file, torch.bfloat16, quantized="none")
    assert any(isinstance(part, QuantizedLinear) for part in kept.modules())
    for tokens in (1, 40, 150):
        ids = random_ids(tokens)
        exact = peer_logits(peer, ids)
        assert rms(logits_of(kept, ids) - exact) < 2 * rms(logits_of(plain, ids) - exact) + 0.01


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    peer = tiny_peer(**WIDE, **SHAPES["qwen3"])
    write_gguf(tmp_path / "m.gguf", peer, block_count=3)
    message = refused(tmp_path / "m.gguf")
    assert "11 missing: blk.2.attn_norm.weight" in message
