"""`pentad classify`."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.clip_files import write_clip
from tests.models.test_vit import saved

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(tmp_path / "model", id2label={i: f"class {i}" for i in range(5)})
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name, color in COLORS.items():
        Image.new("RGB", (40, 30), color).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / "more" / "gray.JPG").write_bytes((tmp_path / "photos" / "red.png").read_bytes())
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    return tmp_path


def test_one_image(pentad, folder: Path) -> None:
    done = pentad("classify", folder / "photos" / "red.png", "-m", folder / "model", "--top-k", 2)
    lines = done.out.splitlines()
    assert len(lines) == 2
    assert lines[0].split()[0].endswith("%")
    assert lines[0].split()[1] == "class"


def test_folders_and_patterns(pentad, folder: Path) -> None:
    arguments = ("-m", folder / "model", "--json", "--top-k", 1)
    rows = [json.loads(line) for line in pentad("classify", folder / "photos", *arguments).out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["blue.png", "green.png", "gray.JPG", "red.png"]
    assert rows[2]["labels"] == rows[3]["labels"]
    assert set(rows[0]["labels"][0]) == {"index", "label", "score"}
    some = pentad("classify", folder / "photos" / "[bg]*.png", *arguments).out.splitlines()
    assert [Path(json.loads(line)["image"]).name for line in some] == ["blue.png", "green.png"]


def test_an_image_that_is_damaged_does_not_stop_the_others(pentad, folder: Path) -> None:
    broken = folder / "photos" / "broken.png"
    broken.write_bytes((folder / "photos" / "red.png").read_bytes()[:60])
    done = pentad("classify", folder / "photos", "-m", folder / "model", "--json")
    assert (done.code, len(done.out.splitlines())) == (2, 4)
    assert "broken.png is damaged" in done.err
    assert done.err.count("\n") == 1


def test_bad_usage(pentad, folder: Path) -> None:
    assert "no such file or folder: 'gone.png'" in pentad("classify", "gone.png", "-m", folder / "model").error
    assert "model has no images" in pentad("classify", folder / "model", "-m", folder / "model").error
    assert "-m" in pentad("classify", folder / "photos").error
    assert "no such file or folder: './gone'" in pentad("classify", folder / "photos", "-m", "./gone").error
    error = pentad("chat", "hello", "-m", folder / "model").error
    assert "a classifier of images: use pentad classify" in error


def test_classes_of_clip(pentad, folder: Path) -> None:
    write_clip(folder / "clip")
    red = folder / "photos" / "red.png"
    done = pentad("classify", red, "-m", folder / "clip", "--labels", "red cat, dog,horse", "--json")
    assert {label["label"] for label in done.json["labels"]} == {"red cat", "dog", "horse"}
    assert sum(label["score"] for label in done.json["labels"]) == pytest.approx(1)
    other = pentad(
        "classify", red, "-m", folder / "clip", "--labels", "red cat,dog,horse", "--json", "--template", "{}"
    )
    assert other.json["labels"] != done.json["labels"]


def test_bad_usage_of_labels(pentad, folder: Path) -> None:
    write_clip(folder / "clip")
    photos, clip, vit = folder / "photos", ("-m", folder / "clip"), ("-m", folder / "model")
    assert "has no classes of its own; expected --labels" in pentad("classify", photos, *clip).error
    assert "--labels is for CLIP" in pentad("classify", photos, *vit, "--labels", "a,b").error
    assert "--template is for CLIP" in pentad("classify", photos, *vit, "--template", "{}").error
    for labels in ("", "a,,b", " "):
        assert "expected names with commas" in pentad("classify", photos, *clip, "--labels", labels).error
    assert "expected {} in it" in pentad("classify", photos, *clip, "--labels", "a", "--template", "x").error
    assert "expected at most 77" in pentad("classify", photos, *clip, "--labels", "dog " * 99).error
    assert "pentad classify with --labels" in pentad("chat", "hello", *clip).error
