"""The runner of CLIP gives the probabilities of transformers' CLIPProcessor and CLIPModel."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import pentad
from pentad.media.images import read_image
from tests.helpers.clip_files import write_clip, write_vocabulary
from tests.helpers.images import assert_close
from tests.models.test_clip import openai_state

LABELS = ["red cat", "dog", "horse"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = torch.randint(0, 256, (53, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    Image.fromarray(pixels.numpy()).resize((140, 106)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@torch.no_grad()
def test_zero_shot_classes(tmp_path: Path, photo: Path) -> None:
    peer, processor = write_clip(tmp_path / "model")
    model: Any = pentad.load(tmp_path / "model")
    texts = [f"a photo of a {label}." for label in LABELS]
    inputs = processor(text=texts, images=Image.open(photo), return_tensors="pt", padding=True)
    expected = peer(**inputs).logits_per_image.softmax(1)[0]
    found = model.classify(photo, LABELS, top_k=9)
    assert [one.label for one in found] == [LABELS[i] for i in expected.argsort(descending=True).tolist()]
    assert [one.score for one in found] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)
    several = [photo, read_image(photo), photo.read_bytes()]
    assert [one[0].index for one in model.classify_many(several, LABELS, batch_size=2)] == [found[0].index] * 3
    assert model.classify(photo, LABELS, template="{}") != found
    assert_close(model.embed_text(texts), torch.nn.functional.normalize(peer(**inputs).text_embeds))
    features = peer.get_image_features(inputs["pixel_values"]).pooler_output
    assert_close(model.embed_images([photo], normalize=False), features)


def test_ids_are_padded_as_by_transformers(tmp_path: Path) -> None:
    _, processor = write_clip(tmp_path)
    model: Any = pentad.load(tmp_path)
    texts = ["a dog", "", "a horse and a red cat"]
    expected = processor.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(model.tokenize(texts), expected)
    long = "a dog, " * 40
    with pytest.raises(pentad.BadInput, match=r"'a dog, .* has \d+ tokens .*; expected at most 77"):
        model.embed_text([long])
    cut = processor.tokenizer([long], truncation=True, return_tensors="pt").input_ids
    assert torch.equal(model.tokenize([long], truncate=True), cut)
    assert model.embed_text([long], truncate=True).shape == (1, 24)


def test_a_state_dict_of_openai_s_beside_its_vocabulary(tmp_path: Path, photo: Path) -> None:
    peer, _ = write_clip(tmp_path / "hf")
    torch.save(openai_state(peer), tmp_path / "ViT.pt")
    write_vocabulary(tmp_path, "openai")
    found = pentad.load(tmp_path / "ViT.pt").classify(photo, LABELS)  # type: ignore[union-attr, call-arg, arg-type]
    expected = pentad.load(tmp_path / "hf").classify(photo, LABELS)  # type: ignore[union-attr, call-arg, arg-type]
    assert [one.label for one in found] == [one.label for one in expected]
    assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-5)


def test_the_image_processor_of_2021(tmp_path: Path) -> None:
    """A single number is the shorter side, as in the published preprocessor_config.json."""
    write_clip(tmp_path)
    settings = {"crop_size": 30, "do_center_crop": True, "resample": 3, "size": 31, "do_normalize": False}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    model: Any = pentad.load(tmp_path)
    assert (model.preprocessing.size, model.preprocessing.crop, model.preprocessing.resample) == (31, 30, "bicubic")


def test_an_encoder_of_texts_alone(tmp_path: Path, photo: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    peer = write_vocabulary(tmp_path, "vocab.json")
    CLIPTextModel(CLIPTextConfig(hidden_size=32, num_attention_heads=2, vocab_size=len(peer))).save_pretrained(tmp_path)
    model: Any = pentad.load(tmp_path)
    assert model.embed_text(["a", "b"], normalize=False).shape == (2, 32)
    with pytest.raises(pentad.BadInput, match="has no image encoder"):
        model.classify(photo, LABELS)


def test_bad_input(tmp_path: Path, photo: Path) -> None:
    write_clip(tmp_path / "model")
    model: Any = pentad.load(tmp_path / "model")
    for labels in ([], ["cat", " "], "cat"):
        with pytest.raises(pentad.BadInput, match="expected a list of names, none of them empty"):
            model.classify(photo, labels)
    with pytest.raises(pentad.BadInput, match=r"the template is 'a photo'; expected \{\} in it"):
        model.classify(photo, LABELS, template="a photo")
    with pytest.raises(pentad.BadInput, match="top_k is 0; expected at least 1"):
        model.classify(photo, LABELS, top_k=0)
    with pytest.raises(pentad.BadInput, match="texts is 'cat'; expected a list of texts"):
        model.embed_text("cat")
    with pytest.raises(pentad.BadInput, match="expected a list of images"):
        model.embed_images(str(photo))
    (tmp_path / "model" / "tokenizer.json").unlink()
    untold: Any = pentad.load(tmp_path / "model")
    assert untold.embed_images([photo]).shape == (1, 24)
    with pytest.raises(pentad.BadInput, match=r"model has no tokenizer; expected tokenizer.json"):
        untold.embed_text(["cat"])
