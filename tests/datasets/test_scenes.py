"""Composed scenes: deterministic, exact, and as hard as they claim."""

import gzip
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pentad import BadInput
from pentad.datasets import sprites
from pentad.datasets.coco import read_coco
from pentad.datasets.scene_folders import write_scenes
from pentad.datasets.scenes import Scenes
from pentad.media.video import read_video


def same(one: tuple, other: tuple) -> bool:
    return all(map(torch.equal, one, other))


def test_a_scene_depends_on_the_seed_and_its_number_alone() -> None:
    scenes, again = Scenes(10, seed=3), Scenes(500, seed=3)
    backwards = [again[index] for index in reversed(range(10))][::-1]
    assert all(same(scenes[index], backwards[index]) for index in range(10))
    assert not same(scenes[0], scenes[1])
    assert not same(scenes[0], Scenes(10, seed=4)[0])
    assert not same(scenes[0], Scenes(10, seed=3, held_out=True)[0])
    with pytest.raises(IndexError):
        scenes[10]


def test_the_same_scenes_in_every_release() -> None:
    """Results of training are comparable only while this holds."""
    sample = Scenes(3, seed=1)[2]
    assert sample.labels.tolist() == [4, 1, 5, 6]
    assert sample.boxes.int().tolist() == [[26, 57, 58, 108], [68, 85, 94, 114], [112, 77, 144, 119], [25, 0, 61, 54]]
    assert sample.image.float().mean().item() == pytest.approx(114.07, abs=0.5)


def test_boxes_are_exactly_around_what_is_seen() -> None:
    scenes = Scenes(40, seed=5, size=96, objects=(2, 5))
    hidden = cut = 0
    for index in range(40):
        sample = scenes[index]
        assert sample.image.shape == (3, 96, 96)
        assert sample.image.dtype == torch.uint8
        assert sample.masks.sum(0).max() <= 1  # a pixel shows one object
        for box, mask in zip(sample.boxes, sample.masks, strict=True):
            x0, y0, x1, y1 = box.int().tolist()
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
            assert all(line.any() for line in (mask[y0], mask[y1 - 1], mask[:, x0], mask[:, x1 - 1]))
        boxes = sample.boxes
        overlap = (
            torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) > torch.maximum(boxes[:, None, :2], boxes[:, :2])
        ).all(2)
        hidden += int(overlap.sum()) > len(boxes)
        cut += bool((boxes == 0).any() or (boxes == 96).any())
    assert hidden > 10
    assert cut > 5


def test_captions_say_where_things_are() -> None:
    scenes = Scenes(30, seed=2, objects=(2, 2))
    checked = 0
    for index in range(30):
        scene = scenes.scene(index)
        if len(scene.tracks) != 2 or " to the left of " not in scene.caption:
            continue
        left, right = (part.split()[-1] for part in scene.caption.split(" to the left of "))
        centers = (scene.sample.boxes[:, 0] + scene.sample.boxes[:, 2]).tolist()
        named = [scenes.names[label] for label in scene.sample.labels[np.argsort(centers)]]
        assert named == [left, right]
        checked += 1
    assert checked > 3


def test_objects_of_a_video_move_and_keep_their_tracks() -> None:
    scenes = Scenes(4, seed=1, size=64)
    frames = list(scenes.video(0, 12))
    assert len(frames) == 12
    assert same(frames[0].sample, scenes[0])
    assert "moving" in frames[0].caption
    first, last = frames[0], frames[-1]
    for track in set(first.tracks) & set(last.tracks):
        one, other = first.tracks.index(track), last.tracks.index(track)
        assert first.sample.labels[one] == last.sample.labels[other]
        assert not torch.equal(first.sample.boxes[one], last.sample.boxes[other])


def test_a_folder_of_scenes_has_exact_annotations(tmp_path: Path) -> None:
    scenes = Scenes(5, seed=1, size=64)
    write_scenes(scenes, tmp_path / "out", videos=1, frames=6)
    dataset = read_coco(tmp_path / "out")
    assert list(dataset.names) == list(scenes.names)
    assert all(same(dataset[index], scenes[index]) for index in range(5))
    captions = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert captions[3] == {"image": "images/000003.png", "caption": scenes.scene(3).caption}
    assert len(list(read_video(tmp_path / "out" / "videos" / "000000.mp4"))) == 6
    videos = json.loads((tmp_path / "out" / "videos.json").read_text())
    assert len(videos["annotations"]) == len(scenes.scene(0).tracks)
    assert all(len(a["segmentations"]) == len(a["bboxes"]) == 6 for a in videos["annotations"])
    write_scenes(scenes, tmp_path / "again")
    for file in (tmp_path / "again").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "again")).read_bytes()


def idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    header = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, len(labels)) + labels.tobytes())


def test_clothes_come_from_a_folder_of_fashion_mnist(tmp_path: Path) -> None:
    images = np.zeros((3, 28, 28), np.uint8)
    images[:, 4:24, 8:20] = 200
    idx(tmp_path, "train", images, np.array([9, 1, 9], np.uint8))
    scenes = Scenes(20, seed=1, fashion_folder=tmp_path)
    assert scenes.names[9] == "ankle boot"
    assert {label for index in range(20) for label in scenes[index].labels.tolist()} == {1, 9}
    assert any(scenes.scene(index).caption.startswith("an ankle boot") for index in range(20))
    with pytest.raises(BadInput, match=r"t10k-images.*not there"):
        len(Scenes(2, held_out=True, fashion_folder=tmp_path).names)
    file = tmp_path / "train-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadInput, match=r"train-labels.*damaged"):
        Scenes(2, fashion_folder=tmp_path)[0]


@pytest.mark.parametrize(
    "options", [{"seed": -1}, {"size": 8}, {"size": 5000}, {"objects": (0, 1)}, {"objects": (3, 2)}]
)
def test_numbers_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(BadInput, match="expected"):
        Scenes(1, **options)


def test_scikit_learn_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    sprites.digits.cache_clear()
    with pytest.raises(BadInput, match=r"pip install 'pentad\[vision\]'"):
        Scenes(1)[0]
