"""Mixtral in Mistral's own files and in GGUF, and conversion between all formats."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pentad
import pentad.weights
from pentad.convert import convert
from pentad.models import family_of
from pentad.nn.linear import QuantizedLinear
from tests.helpers.gguf_file import stored, write_file
from tests.helpers.gguf_llama import NAMES, interleaved
from tests.helpers.tiny import (
    Tiny,
    assert_equal_logits,
    contains,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    refused,
    tiny_checkpoint,
    tiny_peer,
)

MIXTRAL = {"family": "mixtral", "num_local_experts": 4, "hidden_size": 64, "intermediate_size": 96}


# --- Mistral's own files --------------------------------------------------------------------------


def params_of(peer: PreTrainedModel) -> dict[str, Any]:
    c = peer.config
    return {
        "dim": c.hidden_size,
        "n_layers": c.num_hidden_layers,
        "head_dim": c.hidden_size // c.num_attention_heads,
        "hidden_dim": c.intermediate_size,
        "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads,
        "norm_eps": c.rms_norm_eps,
        "vocab_size": c.vocab_size,
        "rope_theta": c.rope_parameters["rope_theta"],
        "moe": {"num_experts_per_tok": c.num_experts_per_tok, "num_experts": c.num_local_experts},
    }


RENAMED = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{p}_proj": f"attention.w{p}" for p in "qkvo"},
}


def mistral_tensors(tiny: Tiny, *, stacked: bool) -> dict[str, Tensor]:
    """Rename a saved folder's tensors to Mistral's names, with separate experts, or with stacked ones."""
    c, out = tiny.peer.config, {}
    heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}
    state = load_file(tiny.folder / "model.safetensors")
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if not module.startswith("model.layers."):
            out[f"{RENAMED[module]}.{leaf}"] = tensor
            continue
        number, part = module.removeprefix("model.layers.").split(".", 1)
        if part in heads:
            tensor = interleaved(tensor, heads[part]).contiguous()
        if part in RENAMED:
            out[f"layers.{number}.{RENAMED[part]}.{leaf}"] = tensor
        elif not stacked:
            out[f"layers.{number}.{part.replace('block_sparse_moe', 'feed_forward')}.{leaf}"] = tensor
        elif part.endswith(".gate"):
            out[f"layers.{number}.{part}.{leaf}"] = tensor
    for number in range(c.num_hidden_layers if stacked else 0):
        for w in ("w1", "w2", "w3"):
            each = [
                state[f"model.layers.{number}.block_sparse_moe.experts.{e}.{w}.weight"]
                for e in range(c.num_local_experts)
            ]
            out[f"layers.{number}.block_sparse_moe.{w}"] = torch.cat([x.T if w == "w2" else x for x in each])
    return out


def write_consolidated(folder: Path, tiny: Tiny, *, stacked: bool, files: int = 1, **params: Any) -> Path:
    folder.mkdir()
    edited = {name: value for name, value in (params_of(tiny.peer) | params).items() if value is not None}
    (folder / "params.json").write_text(json.dumps(edited))
    tensors = mistral_tensors(tiny, stacked=stacked)
    for i in range(files):
        part = {name: tensors[name] for name in sorted(tensors)[i::files]}
        if stacked:
            torch.save(part, folder / f"consolidated.{i:02}.pt")
        else:
            torch.save(part, folder / f"consolidated.{i:02}.pth")
    return folder


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("stacked", [False, True])
def test_consolidated(tmp_path: Path, stacked: bool, files: int) -> None:
    tiny, ids = tiny_checkpoint(tmp_path / "a", **MIXTRAL), random_ids(40)
    network = network_of(write_consolidated(tmp_path / "b", tiny, stacked=stacked, files=files))
    assert_equal_logits(logits_of(network, ids), peer_logits(tiny.peer, ids))
    (down,) = {tuple(layer.feedforward.experts.down_proj.weight.shape) for layer in network.layers}
    assert down == (4, 64, 96)


@pytest.mark.parametrize(
    ("fields", "theta"),
    [
        ({"moe": None, "num_experts": 4, "num_experts_per_tok": 2}, 10000.0),
        ({"rope_theta": None}, 1e6),  # the first release has no rope_theta
        ({"max_seq_len": 64}, 10000.0),
    ],
    ids=str,
)
def test_params(tmp_path: Path, fields: dict[str, Any], theta: float) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    tiny, ids = tiny_checkpoint(tmp_path / "a", **MIXTRAL, **rope), random_ids(40)
    network = network_of(write_consolidated(tmp_path / "b", tiny, stacked=False, **fields))
    assert_equal_logits(logits_of(network, ids), peer_logits(tiny.peer, ids))


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 6}, "top_k is 6…4 experts"),
        (["num_experts", 4], "params.json: moe is \"['num_experts', 4]\""),
        ({"num_experts": "4"}, "num_local_experts is '4'…int"),
    ],
    ids=str,
)
def test_invalid_params_are_refused(tmp_path: Path, moe: object, message: str) -> None:
    tiny = tiny_checkpoint(tmp_path / "a", **MIXTRAL)
    assert contains(refused(write_consolidated(tmp_path / "b", tiny, stacked=False, moe=moe)), message)


# --- GGUF -----------------------------------------------------------------------------------------


def write_gguf(path: Path, peer: PreTrainedModel, type_name: str = "F32", *, stacked: bool = True, **more: int) -> None:
    """Write a GGUF as llama.cpp's converter does, with stacked experts, or with separate ones as until March 2024.

    `peer` then has the dequantized weights.
    """
    c = peer.config
    heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}
    tensors: dict[str, np.ndarray] = {}
    for name, array in stored(peer, type_name).items():
        module = name.removesuffix(".weight")
        number, _, part = module.removeprefix("model.layers.").partition(".")
        if "mlp.experts" in part:
            matrices = (
                {"down": array} if "down" in part else dict(zip(("gate", "up"), np.split(array, 2, 1), strict=True))
            )
            for role, stack in matrices.items():
                if stacked:
                    tensors[f"blk.{number}.ffn_{role}_exps.weight"] = np.ascontiguousarray(stack)
                else:
                    each = {f"blk.{number}.ffn_{role}.{e}.weight": matrix for e, matrix in enumerate(stack)}
                    tensors |= {name: np.ascontiguousarray(matrix) for name, matrix in each.items()}
        elif part in heads:
            rows = interleaved(torch.from_numpy(array), heads[part]).contiguous()
            tensors[f"blk.{number}.{NAMES[part]}.weight"] = rows.numpy()
        elif module.startswith("model.layers."):
            tensors[f"blk.{number}.{(NAMES | {'mlp.gate': 'ffn_gate_inp'})[part]}.weight"] = array
        else:
            tensors[f"{NAMES[module]}.weight"] = array
    metadata: dict[str, int | float] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "block_count": c.num_hidden_layers,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_parameters["rope_theta"],
        "expert_count": c.num_local_experts,
        "expert_used_count": c.num_experts_per_tok,
    }
    write_file(path, "llama", metadata | more, tensors, type_name)


@pytest.mark.parametrize("type_name", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("stacked", [True, False])
def test_gguf_logits_match_transformers(tmp_path: Path, stacked: bool, type_name: str) -> None:
    file, peer, ids = tmp_path / "m.gguf", tiny_peer(**MIXTRAL), random_ids(40)
    write_gguf(file, peer, type_name, stacked=stacked)
    assert family_of(pentad.weights.open(file)).names.family == "mixtral"
    assert_equal_logits(logits_of(network_of(file), ids), peer_logits(peer, ids))


def test_all_matrices_but_experts_and_head_stay_quantized(tmp_path: Path) -> None:
    file, peer = tmp_path / "m.gguf", tiny_peer(**MIXTRAL)
    write_gguf(file, peer, "Q4_0")
    network, ids = network_of(file, torch.bfloat16), random_ids(40)
    kept = {name for name, part in network.named_modules() if isinstance(part, QuantizedLinear)}
    assert kept == {f"layers.{i}.attention.{p}_proj" for i in range(2) for p in "qkvo"}
    for logits in (logits_of(network, ids), pentad.load(file).logits(ids)):
        assert float((logits - peer_logits(peer, ids)).abs().mean()) < 0.1


# --- conversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hf", "gguf", "mistral"])
@pytest.mark.parametrize("source", ["published", "fused", "consolidated", "stacked", "gguf", "gguf, one by one"])
def test_converting_any_format_to_any_other_and_back(tmp_path: Path, source: str, to: str) -> None:
    """The final hf folder has the original bits, and transformers reads it."""
    tiny, ids = tiny_checkpoint(tmp_path / "hf", **MIXTRAL), random_ids(40)
    original = load_file(tmp_path / "hf/model.safetensors")
    start = tmp_path / "hf"
    if source == "fused":
        tiny.peer.save_pretrained(start, save_original_format=False)
    elif source in ("consolidated", "stacked"):
        start = write_consolidated(tmp_path / "mistral", tiny, stacked=source == "stacked")
    elif source.startswith("gguf"):
        write_gguf(start := tmp_path / "m.gguf", tiny.peer, stacked=source == "gguf")
    there = convert(start, tmp_path / ("there.gguf" if to == "gguf" else "there"), to=to)
    assert there.family == "mixtral"
    assert not there.notes
    assert_equal_logits(logits_of(network_of(there.path), ids), peer_logits(tiny.peer, ids))
    back = convert(there.path, tmp_path / "back", to="hf")
    tensors = load_file(back.path / "model.safetensors")
    assert tensors.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(tensor, tensors[name]), name
    peer = AutoModelForCausalLM.from_pretrained(back.path, attn_implementation="eager")
    assert_equal_logits(peer_logits(peer, ids), peer_logits(tiny.peer, ids))


def test_converted_configs_have_the_numbers_of_experts(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a", **MIXTRAL)
    convert(tmp_path / "a", tmp_path / "b", to="mistral")
    assert json.loads((tmp_path / "b/params.json").read_text())["moe"] == {"num_experts": 4, "num_experts_per_tok": 2}
    convert(tmp_path / "a", tmp_path / "m.gguf", to="gguf")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    values = {key: fields[f"llama.{key}"].contents() for key in ("expert_count", "expert_used_count")}
    assert values == {"expert_count": 4, "expert_used_count": 2}
    assert fields["general.architecture"].contents() == "llama"


@pytest.mark.parametrize("stacked", [True, False])
def test_quantized_blocks_are_copied_unchanged(tmp_path: Path, stacked: bool) -> None:
    """Stacking separate experts doesn't change their blocks either."""
    write_gguf(tmp_path / "a.gguf", tiny_peer(**MIXTRAL), "Q4_1", stacked=stacked)
    write_gguf(tmp_path / "stacked.gguf", tiny_peer(**MIXTRAL), "Q4_1")
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", to="gguf")
    ours, theirs = (
        {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in GGUFReader(path).tensors}
        for path in (tmp_path / "b.gguf", tmp_path / "stacked.gguf")
    )
    assert ours == theirs


def test_quantizing(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a", **MIXTRAL)
    convert(tmp_path / "a", tmp_path / "m.gguf", to="gguf", quantize="q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.1.ffn_down_exps.weight"] == types["blk.0.attn_q.weight"] == "Q8_0"
    ids = random_ids(30)
    exact, quantized = (logits_of(network_of(tmp_path / name), ids) for name in ("a", "m.gguf"))
    assert 0 < float((quantized - exact).abs().mean()) < 0.05
