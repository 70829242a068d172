"""`pentad segment`."""

import json
from pathlib import Path

import pytest
import torch

import pentad as package
from pentad.media.images import read_image, write_image
from pentad.recipes import scenes_sam
from pentad.vision.masks import decode
from tests.helpers.sam import meta_sam
from tests.recipes.test_scenes_sam import TINY
from tests.vision.test_segmenter import photo


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    meta_sam(tmp_path / "sam.pth")
    write_image(tmp_path / "photo.png", photo(40, 60))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def segment(pentad, *arguments: str):
    return pentad("segment", "photo.png", "--model", "sam.pth", *arguments)


def test_json(pentad, folder: Path) -> None:
    facts = segment(pentad, "--point", "30,20", "--point", "3,4.5,0", "--json").json
    assert (facts["image"], facts["width"], facts["height"]) == ("photo.png", 60, 40)
    [mask] = facts["masks"]
    assert mask["prompt"] == {"points": [[30, 20], [3, 4.5]], "labels": [1, 0]}
    model = package.load("sam.pth")
    [expected] = model.image("photo.png").masks(points=[[30, 20], [3, 4.5]], labels=[1, 0])  # type: ignore[union-attr]
    assert (mask["rle"], mask["box"]) == (expected.rle, list(expected.box))
    assert mask["predicted_iou"] == pytest.approx(expected.predicted_iou)
    assert len(segment(pentad, "--point", "30,20", "--multimask", "--json").json["masks"]) == 3
    boxes = segment(pentad, "--box", "1,2,30,30", "--box", "20,10,60,40", "--json").json["masks"]
    assert [one["prompt"]["box"] for one in boxes] == [[1, 2, 30, 30], [20, 10, 60, 40]]


def test_files(pentad, folder: Path) -> None:
    done = segment(pentad, "--point", "30,20", "--multimask", "--out", "found/here")
    assert done.code == 0
    assert done.out.splitlines()[0] == "photo.png  60 x 40  3 masks"
    assert len(done.out.splitlines()) == 5
    names = ["photo-coco.json", *(f"photo-mask-{i}.png" for i in (1, 2, 3)), "photo-masks.jpg"]
    assert sorted(path.name for path in (folder / "found/here").iterdir()) == names
    rows = json.loads((folder / "found/here/photo-coco.json").read_text())["annotations"]
    for index, row in enumerate(rows, 1):
        image = read_image(folder / f"found/here/photo-mask-{index}.png")
        assert torch.equal(image[0] == 255, decode(row["segmentation"]))
        assert row["area"] == int((image[0] == 255).sum())
    assert read_image(folder / "found/here/photo-masks.jpg").shape == (3, 40, 60)


def test_everything(pentad, folder: Path) -> None:
    options = "--everything", "--points-per-side", "3", "--min-iou", "-100", "--min-stability", "0"
    facts = segment(pentad, *options, "--json", "--out", "found").json
    assert len(facts["masks"]) > 0
    assert all(one["prompt"]["labels"] == [1] for one in facts["masks"])
    rows = json.loads((folder / "found/photo-coco.json").read_text())["annotations"]
    assert [row["segmentation"] for row in rows] == [one["rle"] for one in facts["masks"]]
    assert segment(pentad, *options[:3], "--min-iou", "1").out.splitlines() == ["photo.png  60 x 40  0 masks"]


def test_a_rough_mask(pentad, folder: Path) -> None:
    rough = torch.zeros(3, 40, 60, dtype=torch.uint8)
    rough[:, 10:30, 20:50] = 255
    write_image("rough.png", rough)
    assert segment(pentad, "--mask", "rough.png", "--json").json["masks"][0]["prompt"] == {"mask": True}
    write_image("small.png", rough[:, :20, :20])
    assert "[20, 20]; expected [40, 60], the image's" in segment(pentad, "--mask", "small.png").error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt; expected --point"),
        (["--point", "a,b"], "--point is 'a,b'; expected X,Y or X,Y,LABEL"),
        (["--point", "1"], "--point is '1'; expected"),
        (["--point", "1,2,7"], "label is 7; expected 1"),
        (["--point", "61,2"], "point 61,2 is outside of the image; expected x and y within 60 x 40"),
        (["--point", "nan,2"], "not finite"),
        (["--box", "1,2,3"], "--box is '1,2,3'; expected X0,Y0,X1,Y1"),
        (["--box", "9,9,1,20"], "the box 9,9,1,20 has no area"),
        (["--box", "1,1,9,9", "--box", "1,1,8,8", "--point", "3,3"], "2 --box are 2 prompts"),
        (["--everything", "--point", "1,2"], "--everything is a prompt of its own"),
        (["--everything", "--points-per-side", "0"], "--points-per-side is 0; expected a whole number from 1 to 256"),
        (["--point", "1,2", "--min-area", "3"], "are for --everything"),
        (["--mask", "gone.png"], "gone.png is not there"),
        (["--point", "1,2", "--out", "sam.pth"], "--out sam.pth is a file"),
        (["--point", "1,2", "--view"], "--view asks for prompts on a page"),
        (["--view", "--out", "bad"], "photo-coco.json can't be continued"),
        (["--point", "1,2", "--model", "photo.png"], "photo.png: not a model but a picture"),
    ],
)
def test_bad_input_is_one_line(pentad, folder: Path, arguments: list[str], message: str) -> None:
    (folder / "bad").mkdir()
    (folder / "bad/photo-coco.json").write_text("{}")
    done = segment(pentad, *arguments)
    assert done.code == 2
    assert message in done.error


def test_other_commands_name_this_one(pentad, folder: Path) -> None:
    assert "use pentad segment" in pentad("detect", "photo.png", "--model", "sam.pth").error
    assert "use pentad segment" in pentad("chat", "hi", "--model", "sam.pth").error


def test_the_default_model_is_trained_when_it_is_first_used(
    pentad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path))
    monkeypatch.setattr(scenes_sam, "Size", lambda: TINY)
    assert pentad("data", "scenes", "--images", "1", "--out", tmp_path / "scenes").code == 0
    photo = next((tmp_path / "scenes/images").iterdir())
    done = pentad("segment", photo, "--point", "80,80", "--json")
    assert (done.code, len(done.json["masks"])) == (0, 1)
    assert "sam-scenes is trained on this machine" in done.err
    assert pentad("pull", "sam-scenes").out == f"{tmp_path / 'models/sam-scenes'}\n"
    assert "trained" not in pentad("segment", photo, "--box", "9,9,80,80").err
