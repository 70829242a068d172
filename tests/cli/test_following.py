"""`pentad segment` on a video."""

import json
from pathlib import Path

import pytest
import torch

from pentad.media.images import read_image
from pentad.media.video import VideoWriter, read_video
from pentad.vision import follow
from pentad.vision.masks import decode
from tests.helpers.sam import meta_sam
from tests.vision.test_segmenter import photo


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a clip of four frames, a network, and an object that is hard to lose."""
    meta_sam(tmp_path / "sam.pth")
    with VideoWriter(tmp_path / "clip.mp4", 10) as writer:
        for shift in range(4):
            writer.write(photo(40, 60).roll(shift, 2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(follow, "reason", lambda mask, last, how: "")
    return tmp_path


def segment(pentad, *arguments: str):
    return pentad("segment", "clip.mp4", "--model", "sam.pth", *arguments)


def test_masks_of_all_frames(pentad, folder: Path) -> None:
    done = segment(pentad, "--point", "30,20", "--out", "found", "--json")
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["frame"], row["width"], row["height"]) for row in rows] == [(i, 60, 40) for i in range(4)]
    assert [row["time"] for row in rows] == pytest.approx([0, 0.1, 0.2, 0.3])
    [track] = json.loads((folder / "found/clip-coco.json").read_text())["annotations"]
    for row, code, area in zip(rows, track["segmentations"], track["areas"], strict=True):
        assert row["masks"][0]["rle"] == code
        image = read_image(folder / f"found/clip-mask-{row['frame']:06}.png")
        assert torch.equal(image[0] == 255, decode(code))
        assert area == int((image[0] == 255).sum())
    assert len(list(read_video("found/clip-masks.mp4"))) == 4
    assert segment(pentad, "--point", "30,20").out == "clip.mp4  60 x 40  followed through 4 frames\n"


def test_a_lost_object_is_said(pentad, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "reason", lambda mask, last, how: "" if last is None else "it is gone")
    done = segment(pentad, "--box", "10,10,40,30", "--out", "found")
    assert done.out.splitlines() == [
        "clip.mp4  60 x 40  followed through 1 frame",
        "  lost in frame 1 (0.10 s): it is gone",
    ]
    [track] = json.loads((folder / "found/clip-coco.json").read_text())["annotations"]
    assert [code is None for code in track["segmentations"]] == [False, True]
    assert [len(found) for found in (list(read_video("found/clip-masks.mp4")), list(folder.glob("found/*.png")))] == [
        2,
        1,
    ]
    last = json.loads(segment(pentad, "--box", "10,10,40,30", "--json").out.splitlines()[-1])
    assert (last["masks"], last["lost"]) == ([], "it is gone")


def test_a_damaged_end_keeps_what_was_found(pentad, folder: Path) -> None:
    whole = (folder / "clip.mp4").read_bytes()
    at = whole.rindex(b"mdat") + (len(whole) - whole.rindex(b"mdat")) * 9 // 10
    (folder / "clip.mp4").write_bytes(whole[:at])
    done = segment(pentad, "--point", "30,20")
    assert done.code == 2
    assert "followed through" in done.out or "clip.mp4" in done.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--everything"], "clip.mp4 is a video; expected one object"),
        (["--box", "1,1,9,9", "--box", "1,1,8,8"], "is a video; expected one object"),
        (["--point", "99,2"], "outside of the image"),
        ([], "there is no prompt"),
    ],
)
def test_bad_input_is_one_line(pentad, folder: Path, arguments: list[str], message: str) -> None:
    done = segment(pentad, *arguments)
    assert done.code == 2
    assert message in done.error
