"""Vision models between transformers' folders and files with the names of the published code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor, SamModel, ViTForImageClassification, ViTImageProcessorPil

import pentad
from pentad.convert import convert
from pentad.weights import open as open_checkpoint
from tests.helpers.clip_files import write_clip, write_vocabulary
from tests.helpers.images import assert_close, images, network_of
from tests.helpers.sam import hf_sam, meta_sam
from tests.helpers.tiny import tiny_checkpoint
from tests.models.test_clip import IDS, openai_state, padded
from tests.models.test_vit import saved as saved_vit
from tests.models.test_vit import timm_state

WIDE: dict[str, Any] = {"hidden_size": 128, "layer_norm_eps": 1e-6}  # heads of 64, as a state dict's must be


def same_tensors(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@torch.no_grad()
def test_clip_to_openai_and_back(tmp_path: Path) -> None:
    peer, processor = write_clip(tmp_path / "hf")
    done = convert(tmp_path / "hf", tmp_path / "clip.pt", to="state_dict")
    assert (done.family, done.files) == ("clip", [tmp_path / "clip.pt"])
    assert any("tokenizer" in note for note in done.notes)
    state = openai_state(peer)
    same_tensors(tmp_path / "clip.pt", {name: t for name, t in state.items() if t.is_floating_point()})
    write_vocabulary(tmp_path, "openai")
    back = convert(tmp_path / "clip.pt", tmp_path / "back", to="hf")
    same_tensors(tmp_path / "back" / "model.safetensors", load_file(tmp_path / "hf" / "model.safetensors"))
    assert back.notes == []
    x = images(2, 3, 32, 32)
    again = CLIPModel.from_pretrained(tmp_path / "back")
    assert torch.equal(again(padded(), x).logits_per_image, peer(padded(), x).logits_per_image)
    new = CLIPProcessor.from_pretrained(tmp_path / "back", use_fast=False)
    assert new.tokenizer("a red cat").input_ids == processor.tokenizer("a red cat").input_ids
    assert new.image_processor.crop_size["height"] == 32


@torch.no_grad()
def test_vit_to_timm_and_back(tmp_path: Path) -> None:
    peer = saved_vit(tmp_path / "hf", **WIDE, id2label=dict(enumerate("abcde")))
    ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "hf")
    done = convert(tmp_path / "hf", tmp_path / "vit.safetensors", to="state_dict")
    assert [note.split("store ")[1] for note in done.notes] == [
        "id2label: it is left out",
        "how images are resized and normalized: it is left out",
    ]
    same_tensors(tmp_path / "vit.safetensors", timm_state(peer))
    convert(tmp_path / "vit.safetensors", tmp_path / "back", to="hf", dtype="float16")
    again = ViTForImageClassification.from_pretrained(tmp_path / "back", dtype=torch.float32)
    x = images(2, 3, 32, 32)
    assert_close(again(x).logits, peer(x).logits, 5e-3)
    assert open_checkpoint(tmp_path / "back").config["dtype"] == "float16"


def test_sam_both_ways(tmp_path: Path) -> None:
    peer = meta_sam(tmp_path / "sam.pth")
    convert(tmp_path / "sam.pth", tmp_path / "hf", to="hf")
    _, report = SamModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    convert(tmp_path / "hf", tmp_path / "again.pth", to="state_dict")
    same_tensors(tmp_path / "again.pth", dict(peer.state_dict()))
    hf_sam(tmp_path / "other")
    convert(tmp_path / "other", tmp_path / "other.pth", to="state_dict")
    network, one = network_of(tmp_path / "other.pth"), network_of(tmp_path / "other")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), one.parameters(), strict=True))


def test_an_encoder_of_texts_is_written_as_one(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    from pentad.nn.batch import pack
    from tests.models.test_clip import TEXT

    CLIPTextModel(CLIPTextConfig(**TEXT)).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "new", to="hf")
    again = CLIPTextModel.from_pretrained(tmp_path / "new").eval()
    with torch.no_grad():
        assert_close(network_of(tmp_path / "hf").embed_text(*pack(*IDS)), again(padded()).pooler_output)


def test_what_can_t_be_stored_is_refused(tmp_path: Path) -> None:
    saved_vit(tmp_path / "vit")
    tiny_checkpoint(tmp_path / "llama")
    for source, to, name, message in [
        ("vit", "state_dict", "x.pth", "state_dict files can't store num_attention_heads of this model"),
        ("vit", "state_dict", "x", "a name that ends in .pth, .pt, .safetensors"),
        ("vit", "gguf", "x.gguf", "gguf files can't store this vit model"),
        ("vit", "mistral", "x", "consolidated files can't store this vit model"),
        ("llama", "state_dict", "x.pth", "--to state_dict is for vision models; .* a language model"),
    ]:
        with pytest.raises(pentad.BadInput, match=message):
            convert(tmp_path / source, tmp_path / name, to=to)
        assert not (tmp_path / name).exists()
    (tmp_path / "x.pth").write_bytes(b"mine")
    saved_vit(tmp_path / "wide", **WIDE)
    with pytest.raises(pentad.BadInput, match="exists"):
        convert(tmp_path / "wide", tmp_path / "x.pth", to="state_dict")
    assert (tmp_path / "x.pth").read_bytes() == b"mine"
