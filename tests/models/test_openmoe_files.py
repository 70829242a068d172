"""OpenMoE: file layouts, conversion, published sizes and errors."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pentad
import pentad.weights
from pentad.convert import convert
from pentad.errors import BadInput, PentadError
from pentad.models import family_of
from pentad.models.language import openmoe
from tests.helpers.commands import show
from tests.helpers.tiny import (
    add_tokenizer,
    assert_equal_logits,
    contains,
    edit_json,
    logits_of,
    network_of,
    random_ids,
    refused,
)
from tests.helpers.tiny_openmoe import PUBLISHED, openmoe_checkpoint, shapes

OPENMOE_8B = {  # openmoe_8b_config.json of the same folder
    "architectures": ["OpenMoeForCausalLM"],
    "intermediate_size": 8192,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "head_dim": 128,
    "num_attention_heads": 24,
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-06,
    "vocab_size": 256384,
    "hidden_act": "swiglu",
    "num_experts": 32,
    "topk": 2,
    "capacity_factor_train": 1.25,
    "capacity_factor_eval": 2.0,
    "min_capacity": 4,
    "noisy_policy": None,
    "drop_tks": True,
    "expert_parallel": None,
    "gated": True,
    "moe_layer_interval": 6,
}
OPENMOE_34B = PUBLISHED | {  # openmoe_34b_config.json
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_attention_heads": 24,
    "num_experts": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 24,
}


# --- folders --------------------------------------------------------------------------------------


def rewritten(tiny_folder: Path, folder: Path) -> Path:
    """Save a model in the layout of OpenMoE's port without ColossalAI, which stores experts separately."""
    folder.mkdir()
    config = json.loads((tiny_folder / "config.json").read_text())
    config |= {"architectures": ["HFOpenMoeForCausalLM"], "model_type": "openmoe"}
    (folder / "config.json").write_text(json.dumps(config))
    out = {}
    for name, tensor in load_file(tiny_folder / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        ours = {"wi_gate": "gate_proj", "wi_up": "up_proj", "wo": "down_proj"}.get(part)
        if ours:
            out |= {f"{module}.{e}.{ours}.weight": matrix.T.contiguous() for e, matrix in enumerate(tensor)}
        else:
            out[name.replace("gate_weight", "gate.weight")] = tensor
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["published", "rewritten"])
def test_converting_both_layouts_to_the_published_one(tmp_path: Path, source: str, dtype: torch.dtype) -> None:
    """The tensors keep their bits."""
    tiny, ids = openmoe_checkpoint(tmp_path / "published", dtype=dtype), random_ids(40)
    start = tiny.folder if source == "published" else rewritten(tiny.folder, tmp_path / "rewritten")
    assert family_of(pentad.weights.open(start)).names.family == "openmoe"
    done = convert(start, tmp_path / "out", to="hf")
    assert (done.family, done.notes) == ("openmoe", [])
    tensors = load_file(done.path / "model.safetensors")
    assert tensors.keys() == tiny.tensors.keys()
    for name, tensor in tiny.tensors.items():
        assert tensors[name].dtype == dtype
        assert torch.equal(tensor, tensors[name]), name
    written = json.loads((done.path / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("llama", ["OpenMoeForCausalLM"])
    common = set(tiny.config) & set(written)
    assert {name: written[name] for name in common} == {name: tiny.config[name] for name in common}
    assert_equal_logits(logits_of(network_of(done.path), ids), logits_of(network_of(start), ids))


def test_stacked_experts_are_used_without_a_copy(tmp_path: Path) -> None:
    openmoe_checkpoint(tmp_path)
    experts = network_of(tmp_path).layers[1].feedforward.experts
    assert experts.gate_proj.weight.shape == (8, 96, 32)
    assert experts.gate_proj.weight.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("to", ["gguf", "mistral"])
def test_formats_without_openmoe_are_refused(tmp_path: Path, to: str) -> None:
    openmoe_checkpoint(tmp_path / "a")
    with pytest.raises(BadInput, match="openmoe"):
        convert(tmp_path / "a", tmp_path / ("m.gguf" if to == "gguf" else "b"), to=to)


def test_a_llama_is_not_taken_for_openmoe(tmp_path: Path) -> None:
    """OpenMoE's model_type is "llama"; only its class in `architectures` distinguishes it."""
    openmoe_checkpoint(tmp_path)
    for architectures in (["LlamaForCausalLM"], None, "OpenMoeForCausalLM", [3]):
        edit_json(tmp_path / "config.json", architectures=architectures)
        assert family_of(pentad.weights.open(tmp_path)).names.family == "llama"


def test_older_names_of_config_fields(tmp_path: Path) -> None:
    openmoe_checkpoint(tmp_path, router_capacity_factor_eval=0.5, router_min_capacity=1)
    expected = logits_of(network_of(tmp_path), random_ids(40))
    names = openmoe.OpenMoeConfig.OLD_HF_NAMES
    config = json.loads((tmp_path / "config.json").read_text())
    edit_json(tmp_path / "config.json", **{old: config[new] for old, new in names.items()}, model_type=None)
    edit_json(tmp_path / "config.json", **dict.fromkeys(names.values()))
    assert torch.equal(logits_of(network_of(tmp_path), random_ids(40)), expected)


# --- published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parameters", "active"),
    [
        (PUBLISHED, 799_663_104, 535_421_952),
        (OPENMOE_8B, 11_855_046_656, 3_801_982_976),
        (OPENMOE_34B, 46_270_737_408, 10_031_950_848),
    ],
    ids=["base", "8B", "34B"],
)
def test_parameters(tmp_path: Path, config: dict[str, Any], parameters: int, active: int) -> None:
    """Counts the models that the code builds from ColossalAI's configs, with gates of twice the width and an untied
    head. The sizes in the models' names are smaller: they assume three equal matrices in a feed-forward layer and no
    head."""
    facts = show(tmp_path, {**config, "model_type": "llama"})
    assert facts["family"] == "openmoe"
    assert (facts["parameters"], facts["active_parameters"]) == (parameters, active)
    full = {**config, "num_key_value_heads": config["num_attention_heads"], "tie_word_embeddings": False}
    sizes = {name: math.prod(shape) for name, shape in shapes(full).items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert sum(sizes.values()) == parameters
    assert experts * (config["num_experts"] - 2) // config["num_experts"] == parameters - active


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"router_topk": 9}, "top_k is 9…8 experts"),
        ({"num_experts": 7}, "model.layers.1.mlp.gate_weight is [8, 32]…[7, 32]"),
        ({"num_experts": None}, "the config lacks num_experts"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": 10**7}, "10000000 experts of"),
        ({"moe_layer_interval": None}, "the config lacks moe_layer_interval"),
        ({"moe_layer_interval": 4}, "not used: model.layers.1"),
        ({"moe_layer_interval": 0}, "moe_layer_interval is 0"),
        ({"router_min_capacity": 0}, "router_min_capacity is 0"),
        ({"router_capacity_factor_eval": 0}, "router_capacity_factor_eval is 0"),
        ({"router_capacity_factor_train": -1.5}, "router_capacity_factor_train is -1.5"),
        ({"router_drop_tks": "no"}, "router_drop_tks is 'no'…bool"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"mlp_gated": False}, "mlp_gated is false"),
        ({"head_dim": 11}, "heads of 11 dimensions"),
        ({"head_dim": 8}, "model.layers.0.self_attn.q_proj.weight is [48, 32]…[32, 32]"),
    ],
    ids=str,
)
def test_invalid_configs_are_refused(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    openmoe_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", **edit)
    assert contains(refused(tmp_path), message)


def test_missing_experts_are_named(tmp_path: Path) -> None:
    tiny = openmoe_checkpoint(tmp_path / "a")
    del tiny.tensors["model.layers.3.mlp.experts.wo"]
    save_file(tiny.tensors, tmp_path / "a/model.safetensors", metadata={"format": "pt"})
    assert "1 missing: model.layers.3.mlp.experts.wo" in refused(tmp_path / "a")
    openmoe_checkpoint(tmp_path / "a")
    folder = rewritten(tmp_path / "a", tmp_path / "b")
    tensors = load_file(folder / "model.safetensors")
    gone = [f"model.layers.1.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up", "down")]
    for name in gone:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(folder)
    assert "3 missing" in message
    assert all(name in message for name in gone)
    assert "not used" not in message


def test_a_layer_in_the_other_layout(tmp_path: Path) -> None:
    openmoe_checkpoint(tmp_path / "a", num_hidden_layers=6)
    folder = rewritten(tmp_path / "a", tmp_path / "b")
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    stacked = load_file(tmp_path / "a/model.safetensors")
    mixed |= {name: tensor for name, tensor in stacked.items() if "layers.1.mlp" in name}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(folder)
    assert "25 missing: model.layers.1.mlp.gate.weight" in message
    assert "4 not used: model.layers.1.mlp" in message


def test_a_nan_router_is_reported_when_generating(tmp_path: Path) -> None:
    tiny = openmoe_checkpoint(tmp_path, vocab_size=264)
    tiny.tensors["model.layers.3.mlp.gate_weight"].fill_(torch.nan)
    save_file(tiny.tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    add_tokenizer(tmp_path)
    model = pentad.load(tmp_path)
    for use in (model.complete, model.score):
        with pytest.raises(PentadError, match=r"not numbers .*damaged"):
            use("text")
    with pytest.raises(PentadError, match=r"not numbers .*damaged"):
        model.chat([{"role": "user", "content": "text"}])
