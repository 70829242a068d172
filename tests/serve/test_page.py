"""`pentad segment --view`: the page's server; tests/peers/test_page.py has the page in a browser."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pentad.media.images import write_image
from tests.helpers.sam import meta_sam
from tests.serve.conftest import Reply, Server
from tests.vision.test_segmenter import photo

MASK = {"rle": {"size": [40, 60], "counts": [100, 50, 2250]}, "label": "dog"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view")
    meta_sam(folder / "sam.pth")
    write_image(folder / "photo.png", photo(40, 60))
    return folder


@pytest.fixture(scope="module")
def view(folder: Path) -> Iterator[Any]:
    """A function that sends a request, with the address's key."""
    command = ["segment", folder / "photo.png", "-m", folder / "sam.pth", "--view", "--no-browser", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "pentad", *map(str, command), "--out", str(folder / "out")], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        root, key = json.loads(process.stdout.readline())["url"].split("/#")
        client: Any = type("Client", (), {"api_key": key})
        server = Server(process, {"url": root + "/v1"}, client)  # type: ignore[arg-type]
        yield server.request
        process.terminate()


def test_the_page_is_one_file_that_fetches_nothing_else(view: Any) -> None:
    reply: Reply = view("/", Authorization="")
    policy = reply.headers["Content-Security-Policy"]
    assert reply.status == 200
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = reply.body.decode()
    assert not re.search(r"https?://|<(script|link)[^>]* src|@import|url\(|style=|onclick=\"", text)


def test_the_photo_asks_for_the_key(view: Any, folder: Path) -> None:
    for path in ("/v1/view", "/v1/view/photo", "/v1/models"):
        assert view(path, Authorization="Bearer wrong").status == 401
    assert view("/v1/view/photo").body == (folder / "photo.png").read_bytes()
    assert view("/v1/view").json["name"] == "photo.png"


def test_accepted_masks_are_saved_as_coco(view: Any, folder: Path) -> None:
    masks = [MASK, MASK | {"label": "cat", "predicted_iou": 0.9, "prompt": {"points": [[1, 2]]}}]
    reply = view("/v1/view/annotations", {"masks": masks})
    saved = json.loads((folder / "out/photo-coco.json").read_text())
    assert reply.json["coco"] == saved
    assert [one["name"] for one in saved["categories"]] == ["dog", "cat"]
    first, second = saved["annotations"]
    assert (first["bbox"], first["area"], first["category_id"]) == ([2, 0, 2, 40], 50, 1)
    assert (second["predicted_iou"], second["prompt"]) == (0.9, {"points": [[1, 2]]})
    assert view("/v1/view").json["masks"][1]["label"] == "cat"
    for wrong, named in (
        ({"masks": [MASK | {"rle": {"size": [40, 61], "counts": [2440]}}]}, "[40, 61]; expected [40, 60]"),
        ({"masks": [MASK | {"label": ""}]}, "masks.0.label"),
        ({"masks": [MASK], "file": "/etc/passwd"}, "file is not supported"),
    ):
        refused = view("/v1/view/annotations", wrong)
        assert (refused.status, named in refused.error["message"]) == (400, True)
    assert json.loads((folder / "out/photo-coco.json").read_text()) == saved
    assert [path.name for path in (folder / "out").iterdir()] == ["photo-coco.json"]
