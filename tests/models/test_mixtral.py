"""Mixtral: routing, Hugging Face folders, sizes and errors. test_mixtral_files.py tests other files.

test_parity.py compares logits with transformers; test_invariants.py tests caching and batching.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pentad
import pentad.weights
from pentad.errors import PentadError
from pentad.nn.batch import pack
from pentad.nn.moe.losses import mixtral_balance_loss
from tests.helpers.commands import show
from tests.helpers.gguf_file import write_file
from tests.helpers.tiny import (
    assert_equal_logits,
    contains,
    edit_json,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    refused,
    talking_checkpoint,
    tiny_checkpoint,
    tiny_peer,
)

MIXTRAL = {"family": "mixtral", "num_local_experts": 4, "hidden_size": 64, "intermediate_size": 96}
PUBLISHED = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
PUBLISHED_PARAMS = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}


# --- routing --------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("experts", [{}, {"num_local_experts": 5, "num_experts_per_tok": 3}], ids=str)
def test_router_logits_and_balance_loss(tmp_path: Path, experts: dict[str, int]) -> None:
    tiny, ids = tiny_checkpoint(tmp_path, **MIXTRAL | experts), random_ids(60)
    network = network_of(tmp_path)
    _, routings = network.forward_with_routing(*pack(ids))
    theirs = tiny.peer(torch.tensor([ids]), use_cache=False, output_router_logits=True)
    assert len(routings) == len(theirs.router_logits) == 2
    for ours, logits in zip(routings, theirs.router_logits, strict=True):
        assert_equal_logits(ours.logits, logits)
        weights, chosen = logits.softmax(-1).topk(experts.get("num_experts_per_tok", 2))
        assert torch.equal(ours.experts, chosen)
        torch.testing.assert_close(ours.weights, weights / weights.sum(-1, keepdim=True))
        assert ours.kept.all()
        assert len(ours.experts.unique()) > 3
    torch.testing.assert_close(mixtral_balance_loss(routings), theirs.aux_loss)


@torch.inference_mode()
def test_the_loss_of_packed_sequences_equals_that_of_a_masked_batch(tmp_path: Path) -> None:
    tiny, sequences = tiny_checkpoint(tmp_path, **MIXTRAL), [random_ids(30), random_ids(11, seed=1)]
    _, routings = network_of(tmp_path).forward_with_routing(*pack(*sequences))
    padded = torch.tensor([sequences[0], sequences[1] + [0] * 19])
    mask = torch.tensor([[1] * 30, [1] * 11 + [0] * 19])
    theirs = tiny.peer(padded, attention_mask=mask, use_cache=False, output_router_logits=True)
    torch.testing.assert_close(mixtral_balance_loss(routings), theirs.aux_loss)


# --- Hugging Face's folders -----------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_published_and_fused_names(tmp_path: Path, fused: bool) -> None:
    """transformers 5 fuses experts in memory, and on request also writes them fused."""
    tiny = tiny_checkpoint(tmp_path, **MIXTRAL)
    if fused:
        tiny.peer.save_pretrained(tmp_path, save_original_format=False)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("model.layers.1.mlp.experts.gate_up_proj" in names) is fused
    assert ("model.layers.1.block_sparse_moe.experts.3.w2.weight" in names) is not fused
    ids = random_ids(40)
    assert_equal_logits(logits_of(network_of(tmp_path), ids), peer_logits(tiny.peer, ids))


def test_stacked_experts_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, **MIXTRAL).peer.save_pretrained(tmp_path, save_original_format=False)
    experts = network_of(tmp_path).layers[0].feedforward.experts
    gate, up = experts.gate_proj.weight, experts.up_proj.weight
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    assert up.data_ptr() - gate.data_ptr() == 96 * 64 * 4


# --- published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PUBLISHED, PUBLISHED_PARAMS], ids=["config.json", "params.json"])
def test_a_token_uses_a_quarter_of_the_experts(tmp_path: Path, config: dict[str, Any]) -> None:
    facts = show(tmp_path, config)
    assert facts["family"] == "mixtral"
    assert facts["parameters"] == 46_702_792_704
    assert facts["active_parameters"] == 12_879_925_248


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"num_experts_per_tok": 5}, "top_k is 5 with 4 experts"),
        ({"num_local_experts": 3}, "not used: model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        ({"num_local_experts": 5}, "missing: model.layers.0.block_sparse_moe.experts.4.w1.weight"),
        ({"num_local_experts": 10**7}, "10000000 experts of"),
        ({"num_local_experts": 4096, "hidden_size": 2**26, "intermediate_size": 2**26}, "4096 experts of"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"num_experts_per_tok": "two"}, "num_experts_per_tok is 'two'…int"),
        ({"intermediate_size": 98}, "experts.0.w1.weight is [96, 64]…[98, 64]"),
    ],
    ids=str,
)
def test_invalid_configs_are_refused(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    tiny_checkpoint(tmp_path, **MIXTRAL)
    edit_json(tmp_path / "config.json", **edit)
    assert contains(refused(tmp_path), message)


def test_missing_experts_are_named(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, **MIXTRAL)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = [f"model.layers.1.block_sparse_moe.experts.2.w{i}.weight" for i in (1, 2, 3)]
    for name in gone:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = refused(tmp_path)
    assert "3 missing" in message
    assert all(name in message for name in gone)
    assert "not used" not in message


def test_a_layer_in_another_layout(tmp_path: Path) -> None:
    """If a file mixes two layouts, the one with more tensors is used, and the error names the others."""
    tiny = tiny_checkpoint(tmp_path, **MIXTRAL, num_hidden_layers=3)
    tensors = load_file(tmp_path / "model.safetensors")
    tiny.peer.save_pretrained(tmp_path, save_original_format=False)
    fused = load_file(tmp_path / "model.safetensors")
    mixed = {name: tensor for name, tensor in tensors.items() if "layers.0.block_sparse_moe" not in name}
    mixed |= {name: tensor for name, tensor in fused.items() if "layers.0.mlp" in name}
    save_file(mixed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = refused(tmp_path)
    assert "13 missing: model.layers.0.block_sparse_moe.gate.weight" in message
    assert "3 not used: model.layers.0.mlp" in message


def test_other_mixtures_in_gguf_are_refused(tmp_path: Path) -> None:
    peer = tiny_peer(family="qwen2")
    write_file(
        tmp_path / "m.gguf",
        "qwen2",
        {"expert_count": 4, "block_count": 2},
        {"token_embd.weight": peer.get_input_embeddings().weight.detach().numpy()},
        "F32",
    )
    assert contains(refused(tmp_path / "m.gguf"), "mixture…qwen2…llama (Mixtral)")


def test_a_nan_router_is_reported_when_generating(tmp_path: Path) -> None:
    tiny = talking_checkpoint(tmp_path, **MIXTRAL)
    tiny.peer.model.layers[1].mlp.gate.weight.data.fill_(torch.nan)
    tiny.peer.save_pretrained(tmp_path)
    model = pentad.load(tmp_path)
    for use in (model.complete, model.score):
        with pytest.raises(PentadError, match=r"not numbers .*damaged"):
            use("text")
