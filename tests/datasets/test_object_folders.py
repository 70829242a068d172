"""YOLO's and Pascal VOC's folders, and all formats written and read."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from pentad import BadInput
from pentad.datasets.object_folders import read_objects, write_objects
from tests.helpers.labeled_images import write_coco


@pytest.mark.parametrize("layout", ["coco", "yolo", "yolo-segments", "voc"])
def test_what_is_written_is_read(layout: str, tmp_path: Path) -> None:
    dataset = read_objects(write_coco(tmp_path / "source"))
    write_objects(dataset, tmp_path / "out", layout)
    again = read_objects(tmp_path / "out")
    assert again.names[:2] == ("cat", "dog")
    assert [i.path.name for i in again.images] == ["a.png", "b.png"]
    assert all(torch.equal(before.image, after.image) for before, after in zip(dataset, again, strict=True))
    assert torch.allclose(again[0].boxes, dataset[0].boxes, atol=1e-4)
    assert again[0].labels.tolist() == [1, 0]
    if layout in ("coco", "yolo-segments"):
        assert torch.equal(again[0].masks, dataset[0].masks)
    crowds = [o.crowd for o in again.images[1].objects]
    assert crowds == ([] if layout.startswith("yolo") else [True])


def test_images_are_written_once_and_names_stay_apart(tmp_path: Path) -> None:
    dataset = read_objects(write_coco(tmp_path / "source"))
    other = read_objects(write_coco(tmp_path / "other"))
    dataset.images += other.images
    write_objects(dataset, tmp_path / "out", "yolo")
    assert len(list((tmp_path / "out" / "images").iterdir())) == 4
    with pytest.raises(BadInput, match="exists already"):
        write_objects(dataset, tmp_path / "out")
    with pytest.raises(BadInput, match="expected one of coco"):
        write_objects(dataset, tmp_path / "new", "tfrecord")
    assert not (tmp_path / "new").exists()


def yolo(folder: Path, lines: str, config: str | None = "train: images/train\nnames: [cat, dog]\n") -> Path:
    for part in ("images", "labels"):
        (folder / part / "train").mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(folder / "images" / "train" / "a.jpg")
    (folder / "labels" / "train" / "a.txt").write_text(lines)
    if config is not None:
        (folder / "data.yaml").write_text(config)
    return folder


CONFIGS = [
    "train: images/train\nnames: [cat, dog]",
    "path: .\ntrain: images\nnames: {0: cat, 1: dog}",
    "train: ../images/train\nnames: [cat, dog]",
    None,
]


@pytest.mark.parametrize("config", CONFIGS)
def test_yolos_lines_are_shares_of_the_image(config: str | None, tmp_path: Path) -> None:
    folder = yolo(tmp_path, "1 0.5 0.5 0.5 0.2\n\n0 0.1 0.1 0.5 0.1 0.5 0.5\n", config)
    if config is None:
        (folder / "classes.txt").write_text("cat\ndog\n")
    [sample] = read_objects(folder)
    assert torch.allclose(sample.boxes, torch.tensor([[10.0, 8, 30, 12], [4, 2, 20, 10]]), atol=1e-4)
    assert sample.labels.tolist() == [1, 0]
    assert sample.masks[0].sum() == 80
    assert 40 < sample.masks[1].sum() < 90


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("2 0.5 0.5 0.5 0.2", "class is 2; expected 0 to 1"),
        ("-1 0.5 0.5 0.5 0.2", "class is -1"),
        ("0 0.5 nan 0.5 0.2", "not finite"),
        ("0 0.5 0.5 0.5", "3 numbers"),
        ("0 a b c d", "not numbers"),
        ("0 0.5 0.5 -0.5 0.2", "no area"),
        ("0 0.9 0.5 0.5 0.2", "beyond the image"),
        ("0 0.5 0.5 0.5 0.2\n0 0.5 0.5 0.5 0.2", "repeats"),
    ],
)
def test_bad_lines_are_named(line: str, said: str, tmp_path: Path) -> None:
    folder = yolo(tmp_path, f"1 0.3 0.3 0.2 0.2\n{line}\n")
    with pytest.raises(BadInput, match=f"a.txt, line [23]: .*{said}"):
        read_objects(folder)
    dataset = read_objects(folder, skip_bad=True)
    assert len(dataset.skipped) == 1
    assert len(dataset.images[0].objects) == line.count("\n") + 1


def test_bad_folders_of_yolo_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="classes' names"):
        read_objects(yolo(tmp_path / "1", "", None))
    with pytest.raises(BadInput, match="0 to 1"):
        read_objects(yolo(tmp_path / "2", "", "train: images\nnames: {0: a, 2: b}"))
    with pytest.raises(BadInput, match="expected 0 to 1"):
        read_objects(yolo(tmp_path / "5", "", "train: images\nnames: {0: a, b: c}"))
    with pytest.raises(BadInput, match="not YAML"):
        read_objects(yolo(tmp_path / "3", "", "names: [a"))
    with pytest.raises(BadInput, match="no entry 'test'"):
        read_objects(yolo(tmp_path / "4", ""), "test")
    (tmp_path / "4" / "images" / "train" / "b.jpg").write_bytes(b"broken")
    with pytest.raises(BadInput, match=r"b\.jpg.*not an image"):
        read_objects(tmp_path / "4")
    with pytest.raises(BadInput, match="not there"):
        read_objects(tmp_path / "missing")


XML = """<annotation><filename>a.jpg</filename><size><width>40</width><height>20</height></size>
<object><name>dog</name><bndbox><xmin>11</xmin><ymin>3</ymin><xmax>20</xmax><ymax>8</ymax></bndbox></object>
<object><name>cat</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>20</ymax></bndbox></object></annotation>"""


def voc(folder: Path, xml: str = XML) -> Path:
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(folder / "JPEGImages" / "a.jpg")
    (folder / "Annotations" / "a.xml").write_text(xml)
    (folder / "ImageSets" / "Main" / "val.txt").write_text("a\n")
    return folder


def test_vocs_pixels_count_from_one(tmp_path: Path) -> None:
    dataset = read_objects(voc(tmp_path), "val")
    assert dataset.names == ("cat", "dog")
    assert dataset[0].boxes.tolist() == [[10, 2, 20, 8], [0, 0, 40, 20]]
    assert dataset[0].crowd.tolist() == [False, True]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<xmin>11", "<xmin>x", "object 1.*bndbox"),
        ("<xmin>11", "<xmin>nan", "object 1.*not finite"),
        ("<xmax>20", "<xmax>9", "object 1.*no area"),
        ("<xmax>20", "<xmax>99", "object 1.*beyond"),
        ("<name>dog", "<name>", "object 1.*no name"),
        ("<width>40", "<width>", "width and height"),
        ("a.jpg", "gone.jpg", "gone.jpg is not there"),
        ("<filename>", "<!DOCTYPE x [<!ENTITY e 'a'>]><filename>", "declarations"),
        ("</annotation>", "", "not XML"),
    ],
)
def test_bad_annotations_of_voc_are_named(old: str, new: str, said: str, tmp_path: Path) -> None:
    folder = voc(tmp_path, XML.replace(old, new, 1))
    with pytest.raises(BadInput, match=rf"a\.xml.*{said}"):
        read_objects(folder)
    assert len(read_objects(folder, skip_bad=True).skipped) == 1
