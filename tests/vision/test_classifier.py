"""Classifiers give the classes that transformers gives, for photos on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil

import pentad
import pentad.weights
from pentad.media.images import read_image
from pentad.models.vision.config import Preprocessing
from pentad.vision.classifier import preprocess, read_preprocessing
from tests.helpers.images import assert_close
from tests.models.test_vit import saved

LABELS = dict(enumerate(["cat", "dog", "digit", "horse", "truck"]))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = torch.randint(0, 256, (53, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    Image.fromarray(pixels.numpy()).resize((140, 106)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 32, "width": 40}),
        ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], resample=3),
        ViTImageProcessorPil(
            size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 32}, do_normalize=False
        ),
        ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875),
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    ],
    ids=lambda processor: str(processor.size),
)
def test_preprocessing_equals_that_of_transformers(tmp_path: Path, photo: Path, processor: Any) -> None:
    saved(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    checkpoint = pentad.weights.open(tmp_path / "model")
    ours = preprocess(read_image(photo), read_preprocessing(checkpoint, Preprocessing(size=1)))
    theirs = processor(Image.open(photo), return_tensors="pt")["pixel_values"][0]
    assert_close(ours, theirs, 1e-6)


def test_the_classes_of_a_photo(tmp_path: Path, photo: Path) -> None:
    peer = saved(tmp_path / "model", id2label=LABELS)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "model")
    model: Any = pentad.load(tmp_path / "model")
    with torch.no_grad():
        expected = peer(**processor(Image.open(photo), return_tensors="pt")).logits.softmax(1)[0]
    found = model.classify(photo, top_k=9)
    assert [label.label for label in found] == [LABELS[i] for i in expected.argsort(descending=True).tolist()]
    assert [label.score for label in found] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)
    several = [photo, read_image(photo), photo.read_bytes()]
    assert [labels[0].index for labels in model.classify_many(several, top_k=1, batch_size=2)] == [found[0].index] * 3
    with pytest.raises(pentad.BadInput, match="top_k is 0; expected at least 1"):
        model.classify(photo, top_k=0)


def test_the_settings_of_timm(tmp_path: Path) -> None:
    timm = {"input_size": [3, 192, 192], "test_input_size": [3, 256, 256], "crop_pct": 0.9, "crop_mode": "squash"}
    timm |= {"interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", "pretrained_cfg": timm}))
    found = read_preprocessing(pentad.weights.open(tmp_path), Preprocessing(size=1))
    assert (found.size, found.crop, found.resample, found.std) == ((284, 284), 256, "bicubic", (0.2,) * 3)


@pytest.mark.parametrize(
    "settings", [{"size": {"width": 3}}, {"size": 10**9}, {"image_std": [0, 1, 1]}, {"size": "large"}, {"size": None}]
)
def test_settings_that_are_wrong(tmp_path: Path, settings: dict[str, Any]) -> None:
    saved(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(pentad.BadInput, match=r"preprocessor_config\.json: the preprocessing can't be read"):
        pentad.load(tmp_path)


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    from transformers import ViTModel

    saved(tmp_path, ViTModel)
    with pytest.raises(pentad.BadInput, match="has no head, so it names no classes"):
        pentad.load(tmp_path)
