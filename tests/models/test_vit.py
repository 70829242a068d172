"""ViT equals transformers', from its folders and from files with the names of timm and MAE."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import pentad
import pentad.weights
from pentad.build import build
from pentad.models import family_of
from tests.helpers.images import assert_close, images, network_of, randomized

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}


def saved(folder: Path, model: type = ViTForImageClassification, **options: Any) -> Any:
    peer = randomized(model(ViTConfig(**{**SIZES, "num_labels": 5, **options})))
    peer.save_pretrained(folder)
    return peer


def timm_state(peer: Any) -> dict[str, torch.Tensor]:
    """The peer's tensors under timm's names."""
    state = peer.state_dict()
    new = {
        "cls_token": state["vit.embeddings.cls_token"],
        "pos_embed": state["vit.embeddings.position_embeddings"],
        "patch_embed.proj.weight": state["vit.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["vit.embeddings.patch_embeddings.projection.bias"],
    }
    names = {"attention.o_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names |= {"layernorm_before": "norm1", "layernorm_after": "norm2"}
    for leaf in ("weight", "bias"):
        new |= {f"norm.{leaf}": state[f"vit.layernorm.{leaf}"], f"head.{leaf}": state[f"classifier.{leaf}"]}
        for i in range(SIZES["num_hidden_layers"]):
            layer = f"vit.layers.{i}"
            qkv = [state[f"{layer}.attention.{part}_proj.{leaf}"] for part in "qkv"]
            new[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(qkv)
            new |= {f"blocks.{i}.{timm}.{leaf}": state[f"{layer}.{name}.{leaf}"] for name, timm in names.items()}
    return new


@torch.no_grad()
def test_logits_equal_those_of_transformers(tmp_path: Path) -> None:
    peer, x = saved(tmp_path, id2label=dict(enumerate("abcde"))), images(3, 3, 32, 32)
    network = network_of(tmp_path)
    assert_close(network(x), peer(x).logits)
    assert_close(network.features(x), peer.vit(x).last_hidden_state)
    wide = images(2, 3, 40, 56)
    assert_close(network(wide), peer(wide, interpolate_pos_encoding=True).logits)
    assert network.config.id2label["4"] == "e"


@torch.no_grad()
def test_a_model_without_a_head(tmp_path: Path) -> None:
    peer, x = saved(tmp_path, ViTModel), images(2, 3, 32, 32)
    network = network_of(tmp_path)
    assert network.config.num_labels == 0
    assert_close(network(x), peer(x).last_hidden_state[:, 0])


@torch.no_grad()
def test_files_with_the_names_of_timm(tmp_path: Path) -> None:
    peer = saved(tmp_path / "hf", hidden_size=128, layer_norm_eps=1e-6)
    state, x = timm_state(peer), images(2, 3, 32, 32)
    torch.save({"model": state}, tmp_path / "vit.pth")
    expected = peer(x).logits
    network = network_of(tmp_path / "vit.pth")
    assert_close(network(x), expected)
    q, k = (network.layers[0].attention.get_parameter(f"{part}_proj.weight") for part in "qk")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()  # not copied
    fine_tuned = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in state.items()
    }
    torch.save(fine_tuned, tmp_path / "mae_finetuned.pth")
    patches = peer.vit.layernorm(_last_rows(peer, x)[:, 1:].mean(1))
    assert_close(network_of(tmp_path / "mae_finetuned.pth")(x), peer.classifier(patches))


def _last_rows(peer: Any, x: torch.Tensor) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    hook = peer.vit.layernorm.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    peer(x)
    hook.remove()
    return rows[0]


@torch.no_grad()
def test_a_trained_network_is_written_as_transformers_reads_it(tmp_path: Path) -> None:
    peer = saved(tmp_path)
    checkpoint = pentad.weights.open(tmp_path)
    network = build(checkpoint)
    table = family_of(checkpoint).layouts(network.config, "hf")[0]
    tensors = dict(network.named_parameters())
    stored = {
        name: value
        for ours, theirs, operation in table.groups(tensors)
        for name, value in zip(theirs, operation.store([tensors[name] for name in ours]), strict=True)
    }
    published = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == published.keys()
    assert all(torch.equal(stored[name], published[name]) for name in stored)
    assert network.config.to_hf()["hidden_size"] == peer.config.hidden_size


def test_drop_path_leaves_out_whole_branches_of_whole_images(tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"drop_path_rate": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    network: Any = build(pentad.weights.open(tmp_path), trainable=True)
    assert [layer.drop_path for layer in network.layers] == [0, 0.25, 0.5]
    x = images(1, 3, 32, 32).expand(64, -1, -1, -1)
    torch.manual_seed(0)
    outputs = {tuple(row.tolist()) for row in network(x).detach().mul(1e3).round()}
    assert 8 <= len(outputs) <= 16  # two blocks of two branches each
    loss = network(x).sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert len(network.eval()(x).detach().mul(1e3).round().unique(dim=0)) == 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"num_attention_heads": 5}, "a width of 32 can't be divided into 5 heads"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected gelu"),
        ({"image_size": 36}, "image_size is 36; expected a multiple of 8"),
        ({"id2label": {"1": "a"}}, "id2label has keys"),
        ({"patch_size": -8}, "patch_size is -8"),
    ],
)
def test_configs_that_are_wrong(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", **SIZES, **edit}))
    with pytest.raises(pentad.BadInput, match=message):
        network_of(tmp_path)
