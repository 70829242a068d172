"""``pentad evaluate``."""

from pathlib import Path

import pytest

from tests.helpers.darknet_files import v4, write
from tests.helpers.labeled_images import coco_content, write_coco


def test_the_command_reports_coco(pentad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, v4())
    (tmp_path / "tiny.names").write_text("dog\ncat\ncar\n")
    content = coco_content()
    write_coco(tmp_path / "data", content)
    done = pentad("evaluate", "tiny.cfg", "data", "--json")
    assert done.code == 0
    assert (done.json["images"], done.json["objects"], done.json["masks"]) == (2, 3, None)
    assert 0 <= done.json["boxes"]["ap"] <= 1
    assert "box AP50" in pentad("evaluate", "tiny.cfg", "data").out
    content["annotations"][0]["bbox"][2] = 0
    write_coco(tmp_path / "bad", content)
    assert "annotation 1: the box" in pentad("evaluate", "tiny.cfg", "bad").error
    assert pentad("evaluate", "tiny.cfg", "bad", "--skip-bad", "--json").json["objects"] == 2
    assert pentad("evaluate", "tiny.cfg", "missing").code == 2
