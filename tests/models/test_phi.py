"""phi's published file formats; test_parity.py tests its forward pass."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import pentad.weights
from pentad.models.language import phi
from pentad.models.language.config import read_family_config, write_family_config
from pentad.nn.linear import QuantizedLinear
from pentad.weights.checkpoint import Checkpoint
from tests.helpers.gguf_file import stored, write_file
from tests.helpers.tiny import (
    Tiny,
    assert_equal_logits,
    contains,
    edit_json,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    refused,
    rms,
    tiny_checkpoint,
    tiny_peer,
)

MHA = {"family": "phi", "num_key_value_heads": 4}

# --- the layouts of 2023 --------------------------------------------------------------------------

PARTS_OF_2023 = {
    "input_layernorm": "ln",
    "self_attn.q_proj": "mixer.Wqkv",
    "self_attn.dense": "mixer.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OUTSIDE_OF_2023 = {
    "phi-msft": {
        "model.embed_tokens": "transformer.embd.wte",
        "model.final_layernorm": "lm_head.ln",
        "lm_head": "lm_head.linear",
    },
    "mixformer-sequential": {
        "model.embed_tokens": "layers.0.wte",
        "model.final_layernorm": "layers.3.ln",
        "lm_head": "layers.3.linear",
    },
}


def state_of_2023(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Rename and fuse tensors as Microsoft's code did, and add the buffer that it saved."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if not module.startswith("model.layers."):
            out[f"{OUTSIDE_OF_2023[layout][module]}.{leaf}"] = tensor
            continue
        number, part = module.removeprefix("model.layers.").split(".", 1)
        prefix = f"layers.{int(number) + 1}" if layout == "mixformer-sequential" else f"transformer.h.{number}"
        if part == "self_attn.q_proj":
            qkv = [state[f"model.layers.{number}.self_attn.{p}_proj.{leaf}"] for p in "qkv"]
            tensor = torch.stack([x.unflatten(0, (4, 8)) for x in qkv]).flatten(0, 2)  # [3, heads, D, …]
            out[f"{prefix}.mixer.rotary_emb.inv_freq"] = torch.ones(2)
        if part in PARTS_OF_2023:
            out[f"{prefix}.{PARTS_OF_2023[part]}.{leaf}"] = tensor
    return {name: tensor.contiguous() for name, tensor in out.items()}


def checkpoint_of_2023(folder: Path, layout: str, **edit: Any) -> Tiny:
    tiny = tiny_checkpoint(folder, **MHA, intermediate_size=128)
    save_file(state_of_2023(load_file(folder / "model.safetensors"), layout), folder / "model.safetensors")
    config = {
        "model_type": layout,
        "vocab_size": 96,
        "n_positions": 256,
        "n_embd": 32,
        "n_layer": 2,
        "n_inner": None,
        "n_head": 4,
        "rotary_dim": 4,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "tie_word_embeddings": False,
        **edit,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return tiny


@pytest.mark.parametrize(
    ("layout", "edit"),
    [
        ("mixformer-sequential", {}),
        ("phi-msft", {"n_head_kv": None}),
        ("phi-msft", {"model_type": "phi"}),
        ("phi-msft", {"n_inner": 128}),
    ],
    ids=str,
)
def test_the_layouts_of_2023(tmp_path: Path, layout: str, edit: dict[str, Any]) -> None:
    tiny = checkpoint_of_2023(tmp_path, layout, **edit)
    network, ids = network_of(tmp_path), random_ids(60)
    assert_equal_logits(logits_of(network, ids), peer_logits(tiny.peer, ids))
    assert network.config.max_position_embeddings == 256


def test_grouped_keys_of_2023(tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path / "today", family="phi", intermediate_size=128)
    state = load_file(tiny.folder / "model.safetensors")
    for layer in "01":
        for leaf in ("weight", "bias"):
            prefix = f"model.layers.{layer}.self_attn"
            state[f"{prefix}.Wqkv.{leaf}"] = torch.cat([state.pop(f"{prefix}.{p}_proj.{leaf}") for p in "qkv"])
    state = {
        (name.replace("model.layers", "transformer.h").replace("self_attn.Wqkv", "mixer.Wqkv"))
        .replace("self_attn.dense", "mixer.out_proj")
        .replace("input_layernorm", "ln")
        .replace("model.embed_tokens", "transformer.embd.wte")
        .replace("lm_head", "lm_head.linear")
        .replace("model.final_layernorm", "lm_head.ln"): tensor
        for name, tensor in state.items()
    }
    checkpoint_of_2023(tmp_path / "then", "phi-msft", n_head_kv=2)
    save_file(state, tmp_path / "then" / "model.safetensors")
    ids = random_ids(30)
    assert_equal_logits(logits_of(network_of(tmp_path / "then"), ids), peer_logits(tiny.peer, ids))


def test_a_pickled_file_of_2023(tmp_path: Path) -> None:
    """phi-1 and phi-1.5 were first published in it."""
    tiny = checkpoint_of_2023(tmp_path, "mixformer-sequential")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    ids = random_ids(20)
    assert_equal_logits(logits_of(network_of(tmp_path), ids), peer_logits(tiny.peer, ids))


@pytest.mark.parametrize("layout", OUTSIDE_OF_2023)
def test_errors_use_the_names_of_the_2023_layout(tmp_path: Path, layout: str) -> None:
    checkpoint_of_2023(tmp_path, layout)
    state = load_file(tmp_path / "model.safetensors")
    second = "layers.2" if layout == "mixformer-sequential" else "transformer.h.1"
    state[f"{second}.mlp.fc3.weight"] = state.pop(f"{second}.mlp.fc1.weight")
    state[f"{second}.mixer.Wqkv.bias"] = state[f"{second}.mixer.Wqkv.bias"][:-1].clone()
    save_file(state, tmp_path / "model.safetensors")
    message = refused(tmp_path)
    assert f"1 missing: {second}.mlp.fc1.weight" in message
    assert f"1 not used: {second}.mlp.fc3.weight" in message
    assert contains(message, f"{second}.mixer.Wqkv.bias is [95]…[96]")


@pytest.mark.parametrize("layout", range(3))
def test_a_layout_reads_what_it_writes(tmp_path: Path, layout: int) -> None:
    """Storing and loading with the table restores every tensor bit by bit."""
    tiny_checkpoint(tmp_path, **MHA)
    network = network_of(tmp_path)
    table = phi.FAMILY.layouts(network.config, "hf")[layout]
    state = dict(network.named_parameters())
    seen = set()
    for ours, theirs, operation in table.groups(state):
        file = operation.store([state[name] for name in ours])
        assert len(file) == len(theirs)
        assert [tuple(t.shape) for t in file] == list(operation.shapes([tuple(state[name].shape) for name in ours]))
        for name, tensor in zip(ours, operation.load(file), strict=True):
            assert torch.equal(tensor, state[name])
        seen.update(ours)
    assert seen == set(state)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"n_embd": None}, "the config lacks hidden_size"),
        ({"n_embd": "wide"}, "hidden_size is 'wide'…int"),
        ({"rotary_dim": 3}, "rotary_dim is 3"),
        ({"rotary_dim": 0}, "rotary_dim is 0"),
        ({"rotary_dim": 10}, "rotary_dim is 10"),
        ({"rotary_dim": "4"}, "rotary_dim is 4"),
        ({"activation_function": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "phi3"}, "architecture 'phi3'"),
    ],
    ids=str,
)
def test_an_invalid_config_of_2023_is_refused(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    checkpoint_of_2023(tmp_path, "phi-msft", **edit)
    assert contains(refused(tmp_path), message)


@pytest.mark.parametrize("factor", [1.5, 0.01, "half"])
def test_an_invalid_partial_rotary_factor_is_refused(tmp_path: Path, factor: Any) -> None:
    tiny_checkpoint(tmp_path, **MHA)
    edit_json(tmp_path / "config.json", rope_parameters=None, partial_rotary_factor=factor)
    assert "rota" in refused(tmp_path)


@pytest.mark.parametrize(("width", "heads", "factor", "rotary"), [(2048, 32, 0.5, 32), (2560, 32, 0.4, 32)])
def test_published_heads_rotate_32_dimensions(width: int, heads: int, factor: float, rotary: int) -> None:
    fields = {"vocab_size": 8, "hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": heads, "partial_rotary_factor": factor}
    config = read_family_config(phi.FAMILY, Checkpoint(Path("somewhere"), "hf", fields, {}, {}))
    assert config.rotary_dim == rotary
    assert config.partial_rotary_factor == factor


# --- GGUF -----------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.final_layernorm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
WIDE = {**MHA, "hidden_size": 64, "intermediate_size": 256}


def write_phi(path: Path, peer: PreTrainedModel, type_name: str, *, fused: bool, **metadata: int | float) -> None:
    """Write a GGUF as llama.cpp's converter does, from today's files or from those of 2023 (`fused`)."""
    c, tensors = peer.config, {}
    for name, array in stored(peer, type_name).items():
        module, _, end = name.rpartition(".")
        if module.startswith("model.layers."):
            number, part = module.removeprefix("model.layers.").split(".", 1)
            tensors[f"blk.{number}.{GGUF_NAMES[part]}.{end}"] = array
        else:
            tensors[f"{GGUF_NAMES[module]}.{end}"] = array
    if fused:
        for layer in range(c.num_hidden_layers):
            for end in ("weight", "bias"):
                qkv = [tensors.pop(f"blk.{layer}.attn_{p}.{end}") for p in "qkv"]
                tensors[f"blk.{layer}.attn_qkv.{end}"] = np.concatenate(qkv)
    known = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "block_count": c.num_hidden_layers,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_attention_heads,
        "attention.layer_norm_epsilon": c.layer_norm_eps,
        "rope.dimension_count": int(c.rope_parameters["partial_rotary_factor"] * c.hidden_size) // 4,
    }
    write_file(
        path, "phi2", {**known, **{key.replace("__", "."): v for key, v in metadata.items()}}, tensors, type_name
    )


@pytest.mark.parametrize("type_name", ["F32", "F16", "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("fused", [True, False])
def test_gguf_logits_match_transformers(tmp_path: Path, fused: bool, type_name: str) -> None:
    file, peer = tmp_path / "m.gguf", tiny_peer(**WIDE, partial_rotary_factor=0.25, layer_norm_eps=0.01)
    write_phi(file, peer, type_name, fused=fused)
    network, ids = network_of(file), random_ids(60)
    assert_equal_logits(logits_of(network, ids), peer_logits(peer, ids))
    assert network.config.rotary_dim == 4
    assert network.config.partial_rotary_factor == 0.25


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_quantized_weights_are_about_as_accurate_as_bfloat16(
    tmp_path: Path, fused: bool, tied: bool, type_name: str
) -> None:
    file, peer = tmp_path / "m.gguf", tiny_peer(**WIDE, tie_word_embeddings=tied)
    write_phi(file, peer, type_name, fused=fused)
    kept = network_of(file, torch.bfloat16)
    plain = network_of(file, torch.bfloat16, quantized="none")
    blocks = [part for part in kept.modules() if isinstance(part, QuantizedLinear)]
    assert len(blocks) == (type_name == "Q4_0") * 2 * 6
    for tokens in (1, 40, 150):
        ids = random_ids(tokens)
        exact = peer_logits(peer, ids)
        assert rms(logits_of(kept, ids) - exact) < 2 * rms(logits_of(plain, ids) - exact) + 0.01


def test_a_float32_gguf_gives_the_same_bits_as_the_folder(tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path / "hf", **WIDE)
    write_phi(tmp_path / "m.gguf", tiny.peer, "F32", fused=True)
    folder, file = network_of(tmp_path / "hf"), network_of(tmp_path / "m.gguf")
    for (name, ours), (_, theirs) in zip(folder.named_parameters(), file.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_gguf_with_too_many_rotary_dimensions_is_refused(tmp_path: Path) -> None:
    write_phi(tmp_path / "m.gguf", tiny_peer(**WIDE), "F32", fused=False, rope__dimension_count=18)
    assert "phi2.rope.dimension_count is 18" in refused(tmp_path / "m.gguf")


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_written_config_reads_back(tmp_path: Path, format: str) -> None:
    tiny_checkpoint(tmp_path, **MHA, partial_rotary_factor=0.25, layer_norm_eps=0.01)
    checkpoint = pentad.weights.open(tmp_path)
    config = read_family_config(phi.FAMILY, checkpoint)
    written = write_family_config(phi.FAMILY, config, format)
    tensors = {"token_embd.weight": checkpoint.tensors["model.embed_tokens.weight"], "output.weight": None}
    again = read_family_config(
        phi.FAMILY, Checkpoint(tmp_path, format, written, {}, tensors if format == "gguf" else {})
    )
    assert {**vars(again), "rope_parameters": 0} == {**vars(config), "rope_parameters": 0}
