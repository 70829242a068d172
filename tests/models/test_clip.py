"""CLIP equals transformers', from its folders and from state dicts with OpenAI's names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

import pentad
import pentad.models.vision.clip as ours
from pentad.build import build
from pentad.nn.batch import pack
from tests.helpers.images import assert_close, images, network_of, randomized

ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "projection_dim": 24,
}
TEXT = {**ENCODER, "vocab_size": 600, "bos_token_id": 598, "eos_token_id": 599}
VISION = {**ENCODER, "hidden_size": 128, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
IDS = [[598, 7, 300, 5, 599], [598, 599], [598, 4, 4, 299, 20, 1, 2, 599]]


def saved(
    folder: Path, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, *, width: int = 24
) -> Any:
    config = CLIPConfig(
        text_config={**TEXT, **(text or {})}, vision_config={**VISION, **(vision or {})}, projection_dim=width
    )
    peer = randomized(CLIPModel(config))
    peer.save_pretrained(folder)
    return peer


def padded(rows: list[list[int]] = IDS) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])


def openai_state(peer: CLIPModel) -> dict[str, torch.Tensor]:
    """The peer's tensors under OpenAI's names."""
    state = peer.state_dict()
    new = {
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        **{name: torch.tensor(3) for name in ("input_resolution", "context_length", "vocab_size")},
    }
    names = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    names |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    norms = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm"}
    norms |= {"visual.ln_post": "vision_model.post_layernorm"}
    for leaf in ("weight", "bias"):
        new |= {f"{name}.{leaf}": state[f"{theirs}.{leaf}"] for name, theirs in norms.items()}
        for prefix, theirs in (("", "text_model"), ("visual.", "vision_model")):
            for i in range(getattr(peer, theirs).config.num_hidden_layers):
                layer, block = f"{theirs}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
                qkv = [state[f"{layer}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
                new[f"{block}.attn.in_proj_{leaf}"] = torch.cat(qkv)
                new |= {f"{block}.{name}.{leaf}": state[f"{layer}.{hf}.{leaf}"] for hf, name in names.items()}
    return {name: tensor.contiguous() for name, tensor in new.items()}


@torch.no_grad()
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_embeddings_and_logits_equal_those_of_transformers(tmp_path: Path, act: str) -> None:
    peer, x = saved(tmp_path, {"hidden_act": act}, {"hidden_act": act}), images(2, 3, 32, 32)
    network = network_of(tmp_path)
    assert_close(network.embed_text(*pack(*IDS)), peer.get_text_features(padded()).pooler_output)
    assert_close(network.embed_images(x), peer.get_image_features(x).pooler_output)
    theirs = peer(padded(), x)
    assert_close(network(x, *pack(*IDS)), theirs.logits_per_image)
    hidden = network.text(*pack(*IDS))
    assert_close(hidden[: len(IDS[0])], theirs.text_model_output.last_hidden_state[0, : len(IDS[0])])
    wide = images(2, 3, 40, 56)
    features = peer.get_image_features(wide, interpolate_pos_encoding=True)
    assert_close(network.embed_images(wide), features.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize(
    "model", [CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModel, CLIPVisionModelWithProjection]
)
@pytest.mark.parametrize("prefix", [True, False])
def test_an_encoder_alone(tmp_path: Path, model: Any, prefix: bool) -> None:
    """transformers 4 writes an encoder's name in front of its tensors' names, transformers 5 not always."""
    is_text, projects = "Text" in model.__name__, "Projection" in model.__name__
    peer = randomized(model(CLIPTextConfig(**TEXT) if is_text else CLIPVisionConfig(**VISION)))
    peer.save_pretrained(tmp_path)
    if prefix and not projects:
        (tmp_path / "model.safetensors").unlink()
        name = "text_model" if is_text else "vision_model"
        state = {f"{name}.{key}": value for key, value in peer.state_dict().items()}
        state[f"{name}.embeddings.position_ids"] = torch.arange(77)[None]
        torch.save(state, tmp_path / "pytorch_model.bin")
    network = network_of(tmp_path)
    assert not hasattr(network, "image" if is_text else "text")
    out = peer(padded() if is_text else images(2, 3, 32, 32))
    expected = (out.text_embeds if is_text else out.image_embeds) if projects else out.pooler_output
    assert_close(network.embed_text(*pack(*IDS)) if is_text else network.embed_images(images(2, 3, 32, 32)), expected)


@torch.no_grad()
def test_state_dicts_with_the_names_of_openai(tmp_path: Path) -> None:
    peer, x = saved(tmp_path / "hf"), images(2, 3, 32, 32)
    torch.save(openai_state(peer), tmp_path / "ViT-B-32.pt")
    network = network_of(tmp_path / "ViT-B-32.pt")
    assert_close(network(x, *pack(*IDS)), peer(padded(), x).logits_per_image)
    assert network.config == network_of(tmp_path / "hf").config
    q, k = (network.text.layers[0].attention.get_parameter(f"{part}_proj.weight") for part in "qk")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()  # not copied


@torch.no_grad()
def test_state_dicts_of_openclip(tmp_path: Path) -> None:
    act = {"hidden_act": "gelu"}
    huge = {"hidden_size": 1280, "num_attention_heads": 16, "num_hidden_layers": 1}
    peer, x = saved(tmp_path / "hf", act, {**act, **huge}), images(2, 3, 32, 32)
    expected = peer(padded(), x).logits_per_image
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 24}}))
    save_file(openai_state(peer), tmp_path / "open_clip_model.safetensors")
    assert_close(network_of(tmp_path / "open_clip_model.safetensors")(x, *pack(*IDS)), expected)
    save_file(openai_state(peer), tmp_path / "hf" / "model.safetensors")
    assert_close(network_of(tmp_path / "hf")(x, *pack(*IDS)), expected)


def test_the_older_form_of_the_config(tmp_path: Path) -> None:
    """Early files have the encoders' sizes in text_config_dict, which transformers prefers."""
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"text_config_dict": config["text_config"], "text_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert network_of(tmp_path).config.text_config.hidden_size == 64
    assert CLIPConfig.from_pretrained(tmp_path).text_config.hidden_size == 64


def test_a_new_network_learns_in_every_part() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = ours.TextConfig(**sizes, vocab_size=600)
    config = ours.CLIPConfig(text_config=text, vision_config=ours.VisionConfig(**sizes, image_size=32, patch_size=8))
    network: Any = build(config, trainable=True, seed=1)
    logits = network(images(2, 3, 32, 32), *pack(*IDS))
    assert logits.abs().max() <= float(torch.tensor(2.6592).exp()) + 1e-4
    logits[0, 0].backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.endswith("k_proj.bias") for name in without)  # softmax ignores it


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"text_config": {"num_attention_heads": 5}}, "a width of 512 can't be divided into 5 heads"),
        ({"text_config": {"hidden_act": "relu"}}, "hidden_act is 'relu'; expected quick_gelu or gelu"),
        ({"vision_config": {"patch_size": 30}}, "image_size is 224; expected a multiple of 30"),
        ({"vision_config": {"hidden_size": "wide"}}, "vision_config: hidden_size is 'wide'"),
        ({"text_config": 3}, "text_config is '3', not of type TextConfig"),
    ],
)
def test_configs_that_are_wrong(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **edit}))
    with pytest.raises(pentad.BadInput, match=message):
        network_of(tmp_path)


def test_a_resnet_clip_is_refused(tmp_path: Path) -> None:
    state = {"visual.conv1.weight": torch.ones(4, 3, 3, 3), "visual.layer1.0.conv1.weight": torch.ones(4, 4, 1, 1)}
    state |= {"token_embedding.weight": torch.ones(9, 4), "text_projection": torch.ones(4, 4)}
    torch.save(state, tmp_path / "RN50.pt")
    with pytest.raises(pentad.BadInput, match=r"RN50.pt: the image encoder of this CLIP is no ViT"):
        network_of(tmp_path / "RN50.pt")
