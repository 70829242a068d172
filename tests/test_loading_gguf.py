"""Loading GGUF files that ggml's package writes: plain, quantized and invalid."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pentad.weights
from pentad.build import build
from pentad.errors import BadInput
from pentad.nn.linear import QuantizedHead, QuantizedLinear
from pentad.weights.checkpoint import Checkpoint
from tests.helpers.gguf_llama import write_gguf
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

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # whole blocks of 32
GGUF_SHAPES: dict[str, dict[str, Any]] = {
    "gqa": WIDE,
    "mha, tied": {**WIDE, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "biases": {**WIDE, "attention_bias": True, "mlp_bias": True},
    "wide heads": {**WIDE, "head_dim": 24, "num_key_value_heads": 1},
    "theta, eps": {**WIDE, "rms_norm_eps": 0.01, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("shape", GGUF_SHAPES)
def test_gguf_logits_match_transformers(tmp_path: Path, shape: str, type_name: str) -> None:
    file, peer = tmp_path / "m.gguf", tiny_peer(**GGUF_SHAPES[shape])
    before = peer.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    write_gguf(file, peer, type_name)
    after = peer.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(before, after) == (type_name == "F32")
    torch.testing.assert_close(before, after, rtol=0.02, atol=0.15)
    ids = random_ids(40)
    assert_equal_logits(logits_of(network_of(file), ids), peer_logits(peer, ids))


@pytest.mark.parametrize("shape", ["gqa", "mha, tied"])
def test_a_float32_gguf_gives_the_same_bits_as_the_folder(tmp_path: Path, shape: str) -> None:
    tiny = tiny_checkpoint(tmp_path / "hf", **GGUF_SHAPES[shape])
    write_gguf(tmp_path / "m.gguf", tiny.peer, "F32")
    folder, file = network_of(tmp_path / "hf"), network_of(tmp_path / "m.gguf")
    for (name, ours), (_, theirs) in zip(folder.named_parameters(), file.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    ids = random_ids(40)
    assert torch.equal(logits_of(folder, ids), logits_of(file, ids))


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize("shape", GGUF_SHAPES)
def test_quantized_weights_are_about_as_accurate_as_bfloat16(tmp_path: Path, shape: str, type_name: str) -> None:
    """Both run the dequantized weights, compared with float32."""
    file, peer = tmp_path / "m.gguf", tiny_peer(**GGUF_SHAPES[shape])
    write_gguf(file, peer, type_name)
    kept = network_of(file, torch.bfloat16)
    plain = network_of(file, torch.bfloat16, quantized="none")
    quantized = [part for part in kept.modules() if isinstance(part, QuantizedLinear)]
    assert quantized
    assert not any(isinstance(part, QuantizedLinear) for part in plain.modules())
    for tokens in (1, 40, 150):
        ids = random_ids(tokens)
        exact = peer_logits(peer, ids)
        assert rms(logits_of(kept, ids) - exact) < 2 * rms(logits_of(plain, ids) - exact) + 0.01


def test_an_untied_quantized_head_runs_on_no_rows(tmp_path: Path) -> None:
    """The head gets no rows while a long prompt is prefilled in chunks."""
    file = tmp_path / "m.gguf"
    write_gguf(file, tiny_peer(**WIDE), "Q4_0")
    network = network_of(file, torch.bfloat16, quantized="all")
    assert isinstance(network.head, QuantizedHead)
    assert network.head(torch.zeros(0, 64, dtype=torch.bfloat16)).shape == (0, 96)


@pytest.mark.parametrize(
    ("gguf_rope", "hf_rope"),
    [
        ({"type": "none"}, {"rope_type": "default"}),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
    ids=str,
)
def test_gguf_rope_scaling(tmp_path: Path, gguf_rope: dict[str, Any], hf_rope: dict[str, Any]) -> None:
    peer = tiny_peer(rope_parameters={"rope_theta": 10000.0, **hf_rope})
    write_gguf(tmp_path / "m.gguf", peer, rope=gguf_rope)
    ids = random_ids(60)
    assert_equal_logits(logits_of(network_of(tmp_path / "m.gguf"), ids), peer_logits(peer, ids))


def test_gguf_rope_freqs(tmp_path: Path) -> None:
    """llama.cpp's converter writes Llama 3's scaling as one divisor for each frequency."""
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    }
    peer, flat = tiny_peer(rope_parameters=rope), tiny_peer()
    plain = 1 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    divisors = (plain / peer.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    write_gguf(tmp_path / "m.gguf", peer, extra={"rope_freqs.weight": divisors})
    ids = random_ids(60)
    ours = logits_of(network_of(tmp_path / "m.gguf"), ids)
    assert_equal_logits(ours, peer_logits(peer, ids))
    assert not torch.allclose(ours, peer_logits(flat, ids), atol=1e-2)


def test_gguf_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    extra = {"blk.0.attn_q_norm.weight": np.zeros(8, np.float32)}
    write_gguf(file, tiny_peer(), skip=("output_norm.weight", "blk.1.ffn_up.weight"), extra=extra)
    message = refused(file)
    assert "2 missing: " in message
    assert "output_norm.weight" in message
    assert "blk.1.ffn_up.weight" in message
    assert "1 not used: blk.0.attn_q_norm.weight" in message


def test_a_gguf_of_an_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refused(tmp_path / "m.gguf")
    assert re.search(r"architecture 'gemma' .*supported: llama", message)


def test_a_mixture_other_than_mixtral_is_refused(tmp_path: Path) -> None:
    mixture = {"general.architecture": "qwen2", "qwen2.expert_count": 8}
    with pytest.raises(BadInput, match=r"mixture.*Mixtral"):
        build(Checkpoint(tmp_path / "m.gguf", "gguf", mixture, {}, {}))


@pytest.mark.parametrize(
    "key",
    [
        "llama.embedding_length",
        "llama.block_count",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.attention.layer_norm_rms_epsilon",
        "llama.rope.freq_base",
        "llama.rope.dimension_count",
        "llama.rope.scaling.type",
        "llama.rope.scaling.factor",
        "llama.expert_count",
    ],
)
def test_odd_gguf_metadata_is_accepted_or_bad_input(tmp_path: Path, key: str) -> None:
    """A value of the wrong type or size never raises another error."""
    file = tmp_path / "m.gguf"
    write_gguf(file, tiny_peer())
    checkpoint = pentad.weights.open(file)
    for value in (0, -1, 1.5, True, "x", [4, 4], [], math.nan, 2**63):
        odd = {**checkpoint.config, key: value}
        message = ""
        try:
            build(Checkpoint(file, "gguf", odd, {}, checkpoint.tensors))
        except BadInput as error:
            message = str(error)
        assert "\n" not in message


@pytest.mark.parametrize("dims", [0, 1, 7, 2**31 - 1])
def test_a_rotation_of_another_size_is_refused_with_key_and_value(tmp_path: Path, dims: int) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, tiny_peer())
    checkpoint = pentad.weights.open(file)
    config = {**checkpoint.config, "llama.rope.dimension_count": dims}
    with pytest.raises(BadInput, match=rf"llama\.rope\.dimension_count is {dims}; expected"):
        build(Checkpoint(file, "gguf", config, {}, checkpoint.tensors))
