"""``pentad data``."""

from pathlib import Path

import pytest

from tests.helpers.labeled_images import coco_content, write_coco


def test_scenes_are_written_converted_and_checked(pentad, tmp_path: Path) -> None:
    made = pentad("data", "scenes", "--out", tmp_path / "scenes", "--images", 3, "--size", 64, "--objects", 1, "--json")
    assert made.code == 0
    assert made.json["images"] == 3
    assert made.json["names"][7] == "7"
    assert len(list((tmp_path / "scenes" / "images").iterdir())) == 3
    converted = pentad("data", "convert", tmp_path / "scenes", "--out", tmp_path / "voc", "--format", "voc", "--json")
    assert converted.json == {"path": str(tmp_path / "voc"), "format": "voc", "images": 3, "objects": 3, "skipped": []}
    checked = pentad("data", "check", tmp_path / "voc", "--json")
    assert checked.code == 0
    assert sum(checked.json["classes"].values()) == 3


def test_malformed_records_are_listed(pentad, tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0]["bbox"] = [1, 2, 0, 3]
    content["annotations"][1]["category_id"] = 99
    file = write_coco(tmp_path, content)
    done = pentad("data", "check", file, "--json")
    assert done.code == 2
    assert len(done.json["skipped"]) == 2
    assert "annotation 1: the box" in done.err
    assert "annotation 2: category_id is 99" in done.err
    refused = pentad("data", "convert", file, "--out", tmp_path / "out")
    assert refused.code == 2
    assert "annotation 1" in refused.error
    assert not (tmp_path / "out").exists()
    kept = pentad("data", "convert", file, "--out", tmp_path / "out", "--skip-bad", "--json")
    assert (kept.code, kept.json["objects"]) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["scenes"], "Missing option '--out'"),
        (["scenes", "--out", "x", "--images", "0"], "--images is 0; expected a whole number from 1"),
        (["scenes", "--out", "x", "--images", "1", "--videos", "2"], "--videos is 2; expected at most --images"),
        (["convert", "nothing", "--out", "x"], "nothing is not there"),
        (["convert", "nothing", "--out", "x", "--format", "csv"], "--format"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused(pentad, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = pentad("data", *arguments)
    assert done.code == 2
    assert message in done.error
