"""Words are prompts of a segmenter that was trained with a CLIP."""

from pathlib import Path
from typing import Any

import pytest
import torch

import pentad
from pentad.convert import convert
from pentad.models.vision.sam.prompt_encoder import Prompts
from pentad.vision.crops import object_crop
from tests.helpers.clip_files import write_clip
from tests.helpers.images import assert_close, network_of
from tests.helpers.sam import meta_sam
from tests.helpers.words import write_words_sam
from tests.vision.test_segmenter import photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "sam"
    write_words_sam(folder)
    return folder


@torch.no_grad()
def test_a_text_is_one_row_of_a_prompt(folder: Path) -> None:
    encoder = network_of(folder).prompt_encoder
    text = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    points = Prompts(torch.tensor([[[10.0, 20]], [[5, 60]]]), torch.ones(2, 1, dtype=torch.int64))
    rows, _ = encoder(Prompts(text_PE=text))
    assert_close(rows[:, 0], text @ encoder.text_projection.weight.T + encoder.text_projection.bias)
    mixed, dense = encoder(Prompts(points.points_PK2, points.labels_PK, text_PE=text))
    assert torch.equal(mixed, torch.cat([encoder(points)[0], rows], 1))
    assert torch.equal(dense, encoder(points)[1])


def test_texts_and_mixes(folder: Path) -> None:
    sam: Any = pentad.load(folder)
    embedded = sam.image(photo(40, 60))
    embedded.masks(points=[5, 5])
    assert "clip" not in vars(sam)  # it is loaded when words come
    [mask] = embedded.masks(text="a red cat")
    assert mask.prompt == {"text": "a red cat"}
    expected = pentad.load(folder / "clip").embed_text(["a red cat"])  # type: ignore[union-attr]
    logits, iou = sam.sam.decode(embedded.map_DSS, Prompts(text_PE=expected))
    assert torch.equal(mask.logits_UU, logits[0, iou[0].argmax()])
    assert len(embedded.masks(text="a red cat", multimask=True)) == 3
    found = embedded.masks(text=["a dog", "a red cat"])
    assert [one.prompt["text"] for one in found] == ["a dog", "a red cat"]
    assert_close(found[1].logits_UU, mask.logits_UU)
    assert not torch.equal(found[0].logits_UU, mask.logits_UU)
    [mixed] = embedded.masks(text="a dog", points=[[9, 9], [30, 2]], labels=[1, 0], boxes=[3, 3, 40, 30], mask=mask)
    assert mixed.prompt.keys() == {"text", "points", "labels", "box", "mask"}
    [without] = embedded.masks(points=[[9, 9], [30, 2]], labels=[1, 0], boxes=[3, 3, 40, 30], mask=mask)
    assert not torch.equal(mixed.logits_UU, without.logits_UU)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"text": ""}, "text is .*; expected words"),
        ({"text": []}, "text is .*; expected words"),
        ({"text": ["a", " "]}, "text is .*; expected words"),
        ({"text": ["a", "b"], "points": [1, 2]}, "prompts differ in number: points for 1, text for 2"),
        ({"text": "a dog " * 80}, "tokens with its start and end; expected at most 77"),
    ],
)
def test_texts_that_make_no_sense(folder: Path, prompts: dict[str, Any], message: str) -> None:
    with pytest.raises(pentad.BadInput, match=message):
        pentad.load(folder).image(photo(40, 60)).masks(**prompts)  # type: ignore[union-attr]


def test_a_model_without_words_says_what_to_do(tmp_path: Path) -> None:
    meta_sam(tmp_path / "sam.pth")
    with pytest.raises(pentad.BadInput, match=r"takes no words, .*: use points or boxes, or train one with"):
        pentad.load(tmp_path / "sam.pth").image(photo(40, 60)).masks(text="a dog")  # type: ignore[union-attr]


def test_a_clip_that_is_missing_or_another_one(tmp_path: Path) -> None:
    write_words_sam(tmp_path / "sam")
    (tmp_path / "sam/clip").rename(tmp_path / "clip")
    embedded: Any = pentad.load(tmp_path / "sam").image(photo(40, 60))  # type: ignore[union-attr]
    with pytest.raises(pentad.BadInput, match="clip is not there; expected the CLIP that"):
        embedded.masks(text="a dog")
    write_clip(tmp_path / "sam/clip", width=16)
    with pytest.raises(pentad.BadInput, match="clip: embeddings have 16 numbers; expected 24"):
        embedded.masks(text="a dog")


def test_conversion_keeps_words_and_folders_the_clip(tmp_path: Path, folder: Path) -> None:
    done = convert(folder, tmp_path / "words.pth", to="state_dict")
    assert any("the CLIP" in note for note in done.notes)
    convert(tmp_path / "words.pth", tmp_path / "back", to="hf")
    weights = [pentad.weights.open(path).tensors["prompt_encoder.text_projection.weight"].read()
               for path in (folder, tmp_path / "back")]  # fmt: skip
    assert torch.equal(*weights)
    convert(folder, tmp_path / "copy", to="hf")
    [[one], [other]] = [
        pentad.load(path).image(photo(40, 60)).masks(text="a dog")  # type: ignore[union-attr]
        for path in (folder, tmp_path / "copy")
    ]
    assert_close(one.logits_UU, other.logits_UU)


def test_crops_are_squares_around_objects() -> None:
    image = torch.arange(20.0 * 30).view(1, 20, 30).expand(3, -1, -1) % 251
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[4:8, 10:14] = True
    crop, inside = object_crop(image, mask, (10, 4, 14, 8), 2.0, 8)
    assert torch.equal(crop, image[:, 2:10, 8:16])
    assert torch.equal(inside, mask[2:10, 8:16])
    beyond, _ = object_crop(image, mask, (0, 0, 30, 20), 1.0, 30)
    assert torch.equal(beyond[:, 5:25], image)
    assert not beyond[:, :5].any()
    assert not beyond[:, 25:].any()
    assert object_crop(image, mask, (10, 4, 14, 8), 1.5, 32)[0].shape == (3, 32, 32)


@torch.no_grad()
def test_with_a_mask_clip_sees_the_object_only_in_its_last_layer(folder: Path) -> None:
    clip = network_of(folder / "clip")
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 32, 32, dtype=torch.bool)
    assert_close(clip.embed_images(image, mask), clip.embed_images(image))
    mask[1, :, 8:] = False
    found = clip.embed_images(image, mask)
    assert_close(found[0], clip.embed_images(image)[0])
    block, seen = clip.image.layers[-1], []
    hook = block.attention.k_proj.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    clip.embed_images(image, mask)
    hook.remove()
    assert seen[-1] == (16 + 1) + (4 + 1)
