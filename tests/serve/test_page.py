"""The server of the page of `pentad segment --view` and `pentad data annotate --view`; tests/peers/test_page.py has the
page in a browser."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pentad.datasets.object_folders import read_objects
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


@contextmanager
def served(*command: object) -> Iterator[tuple[Any, Any]]:
    """A process that serves a page, and a function that sends it a request, with the address's key."""
    command = ("-m", "pentad", *command, "--view", "--no-browser", "--json")
    with subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        root, key = json.loads(process.stdout.readline())["url"].split("/#")
        client: Any = type("Client", (), {"api_key": key})
        server = Server(process, {"url": root + "/v1"}, client)  # type: ignore[arg-type]
        yield process, server.request
        process.terminate()


@pytest.fixture(scope="module")
def view(folder: Path) -> Iterator[Any]:
    with served("segment", folder / "photo.png", "-m", folder / "sam.pth", "--out", folder / "out") as (_, request):
        yield request


def test_the_page_is_one_file_that_fetches_nothing_else(view: Any) -> None:
    reply: Reply = view("/", Authorization="")
    policy = reply.headers["Content-Security-Policy"]
    assert reply.status == 200
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = reply.body.decode()
    assert not re.search(r"https?://|<(script|link)[^>]* src|@import|url\(|style=|onclick=\"", text)


def test_the_photo_asks_for_the_key(view: Any, folder: Path) -> None:
    for path in ("/v1/view", "/v1/view/photo/0", "/v1/models"):
        assert view(path, Authorization="Bearer wrong").status == 401
    assert view("/v1/view/photo/0").body == (folder / "photo.png").read_bytes()
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


def test_a_person_annotates_images_one_after_the_other(folder: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for number in range(3):
        write_image(images / f"{number}.png", photo(40, 60 + number))
    command = ["data", "annotate", images, "-m", folder / "sam.pth", "--out", out, "--stage", "assisted"]
    facts = {"clicks": 3, "annotator_seconds": 5.0, "computing_seconds": 0.5}
    with served(*command) as (process, request):
        shown = request("/v1/view").json
        assert (shown["number"], shown["name"], shown["left"], shown["total"]) == (0, "0.png", 3, 3)
        body = {"masks": [MASK], "number": 0, **facts}
        assert request("/v1/view/annotations", body).json["next"] is None
        [row] = json.loads((out / "annotations.json").read_text())["annotations"]
        assert (row["area"], row["source"]) == (50, "clicks")
        following = request("/v1/view/annotations", body | {"done": True}).json["next"]
        assert (following["number"], following["masks"], following["left"]) == (1, [], 2)
        assert request("/v1/view/photo/1").body == (images / "1.png").read_bytes()
        for wrong, named in (
            (body, "0.png is done"),
            (body | {"number": 9}, "image 9"),
            (body | {"clicks": -1}, "clicks"),
        ):
            refused = request("/v1/view/annotations", wrong)
            assert (refused.status, named in refused.error["message"]) == (400, True)
        begun = {"rle": {"size": [40, 61], "counts": [100, 50, 2290]}, "label": "cat", "source": "everything"}
        request("/v1/view/annotations", body | {"number": 1, "masks": [begun]})
        process.kill()
    with served(*command) as (process, request):
        shown = request("/v1/view").json
        assert (shown["number"], shown["clicks"], shown["annotator_seconds"]) == (1, 3, 5.0)
        assert [(mask["rle"], mask["label"]) for mask in shown["masks"]] == [(begun["rle"], "cat")]
        request("/v1/view/annotations", body | {"number": 1, "masks": [begun], "done": True})
        last = request("/v1/view/annotations", body | {"number": 2, "masks": [], "done": True, "skipped": True})
        assert last.json["next"]["number"] is None
        report = json.loads(process.stdout.read())
        assert process.wait() == 0
    assert (report["images"], report["masks"], report["clicked"], report["proposed"]) == (2, 2, 1, 1)
    assert (report["seconds_per_mask"], report["clicks_per_mask"], report["computing_seconds"]) == (10.0, 6.0, 0.5)
    dataset = read_objects(out)
    assert [(image.path.name, len(image.objects)) for image in dataset.images] == [("0.png", 1), ("1.png", 1)]
    assert dataset.names == ("dog", "cat")
