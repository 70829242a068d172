"""``pentad detect``: files, folders and patterns; JSON, pictures, errors."""

import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from pentad.media.images import read_image, write_image
from pentad.media.video import VideoWriter, read_video
from tests.helpers.darknet_files import v4, write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model and a folder of two photos."""
    write(tmp_path, v4())
    (tmp_path / "tiny.names").write_text("dog\ncat\ncar\n")
    (tmp_path / "photos").mkdir()
    for name, size in (("b.png", (40, 70)), ("a.jpg", (30, 30))):
        write_image(tmp_path / "photos" / name, torch.randint(0, 256, (3, *size), dtype=torch.uint8))
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def detect(pentad, *arguments: str):
    return pentad("detect", "--model", "tiny.cfg", *arguments)


def test_json_lines(pentad, folder: Path) -> None:
    done = detect(pentad, "photos", "--json", "--threshold", "0.4")
    first, second = map(json.loads, done.out.splitlines())
    assert (first["image"], first["width"], first["height"]) == ("photos/a.jpg", 30, 30)
    assert (second["image"], second["width"], second["height"]) == ("photos/b.png", 70, 40)
    assert {one["label"] for one in first["detections"]} <= {"dog", "cat", "car"}
    assert all(one["score"] > 0.4 and len(one["box"]) == 4 for one in first["detections"])
    assert first["detections"]
    batched = detect(pentad, "photos/*.*g", "--json", "--threshold", "0.4", "--batch-size", "2").out.splitlines()
    for line, alone in zip(batched, (first, second), strict=True):
        together = json.loads(line)
        assert [one["label"] for one in together["detections"]] == [one["label"] for one in alone["detections"]]
        assert together["detections"][0]["box"] == pytest.approx(alone["detections"][0]["box"], abs=1e-3)
    cats = detect(pentad, "photos/a.jpg", "--classes", "cat", "--json", "--threshold", "0.4").json["detections"]
    assert cats == [one for one in first["detections"] if one["label"] == "cat"]
    assert detect(pentad, "photos/b.png", "--letterbox", "--json").json != detect(pentad, "photos/b.png", "--json").json


def test_a_table_for_people(pentad, folder: Path) -> None:
    lines = detect(pentad, "photos/a.jpg", "--threshold", "0.4").out.splitlines()
    assert lines[0].startswith("photos/a.jpg  30 x 30  ")
    assert lines[1].split() == ["label", "score", "x0", "y0", "x1", "y1"]
    assert lines[2].split()[0] in ("dog", "cat", "car")
    assert "nothing found" in detect(pentad, "photos/a.jpg", "--threshold", "1").out


def test_pictures(pentad, folder: Path) -> None:
    assert detect(pentad, "photos", "photos/a.jpg", "--threshold", "0.4", "--out", "drawn/here").code == 0
    assert sorted(path.name for path in (folder / "drawn/here").iterdir()) == ["a-2.jpg", "a.jpg", "b.png"]
    before, after = read_image("photos/b.png"), read_image("drawn/here/b.png")
    assert before.shape == after.shape
    assert not torch.equal(before, after)


def test_coco(pentad, folder: Path) -> None:
    lines = detect(pentad, "photos", "--coco-out", "found.json", "--json", "--threshold", "0.4").out.splitlines()
    results = json.loads((folder / "found.json").read_text())
    assert [one["file_name"] for one in results["images"]] == ["photos/a.jpg", "photos/b.png"]
    assert results["categories"] == [{"id": i + 1, "name": name} for i, name in enumerate(("dog", "cat", "car"))]
    found = [one for line in lines for one in json.loads(line)["detections"]]
    assert len(results["annotations"]) == len(found)
    one, expected = results["annotations"][0], found[0]
    x0, y0, x1, y1 = expected["box"]
    assert one["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0])
    assert (one["category_id"], one["score"]) == (expected["label_id"] + 1, expected["score"])


def test_other_images_are_processed_after_a_broken_one(pentad, folder: Path) -> None:
    (folder / "photos/aa.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    done = detect(pentad, "photos", "--json")
    assert done.code == 2
    assert [json.loads(line)["image"] for line in done.out.splitlines()] == ["photos/a.jpg", "photos/b.png"]
    assert done.err.count("\n") == 1
    assert done.err.startswith("pentad: photos/aa.png is ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jpg"], "no such file or folder: 'none.jpg'"),
        (["*.jpg"], "*.jpg"),
        (["empty"], "empty has no images"),
        (["photos/notes.txt"], "photos/notes.txt is not an image"),
        (["https://example.org/dog.jpg"], "--allow-url"),
        (["photos/a.jpg", "--threshold", "2"], "--threshold is 2; expected"),
        (["photos/a.jpg", "--classes", "cat,dgo"], "class is 'dgo'; expected one of dog, cat, car"),
        (["photos/a.jpg", "--out", "tiny.cfg"], "tiny.cfg"),
        (["photos/a.jpg", "--out", "photos"], "photos/a.jpg would be replaced"),
        (["photos/a.jpg", "--model", "photos/a.jpg"], "photos/a.jpg: not a model but a picture"),
        (["photos/a.jpg", "--model", "none.cfg"], "no such file"),
    ],
)
def test_bad_input_is_one_line(pentad, folder: Path, arguments: list[str], message: str) -> None:
    (folder / "empty").mkdir()
    done = detect(pentad, *arguments)
    assert done.code == 2
    assert message in done.error


def test_coco_has_its_own_numbers(pentad, folder: Path) -> None:
    text = v4().replace("filters=24", "filters=255").replace("classes=3", "classes=80")
    write(folder, text, "coco")
    write_image(folder / "000000000139.png", torch.zeros(3, 20, 20, dtype=torch.uint8))
    done = pentad("detect", "--model", "coco.cfg", "000000000139.png", "--coco-out", "x.json", "--threshold", "0")
    assert done.code == 0
    results = json.loads((folder / "x.json").read_text())
    assert [one["id"] for one in results["images"]] == [139]
    names = {one["name"]: one["id"] for one in results["categories"]}
    assert (names["person"], names["stop sign"], names["toothbrush"]) == (1, 13, 90)
    assert len(names) == 80


@pytest.fixture
def clip(folder: Path) -> Path:
    with VideoWriter(folder / "clip.mp4", 10) as writer:
        for index in range(5):
            writer.write(torch.full((3, 32, 48), 40 * index, dtype=torch.uint8))
    return folder / "clip.mp4"


def test_videos(pentad, clip: Path) -> None:
    options = "clip.mp4", "--threshold", "0.4", "--out", "drawn", "--batch-size", "2"
    rows = [json.loads(line) for line in detect(pentad, *options, "--json").out.splitlines()]
    assert [row["frame"] for row in rows] == list(range(5))
    assert [row["time"] for row in rows] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert {row["image"] for row in rows} == {"clip.mp4"}
    frames = list(read_video("drawn/clip.mp4"))
    assert [frame.image.shape for frame in frames] == [(3, 32, 48)] * 5
    assert frames[0].image.float().std() > 20  # boxes on black
    (line,) = detect(pentad, *options).out.splitlines()
    assert line.startswith("clip.mp4  48 x 32  5 frames, ")


def test_a_damaged_video_is_processed_as_far_as_it_goes(pentad, clip: Path) -> None:
    content = clip.read_bytes()
    clip.write_bytes(content[:-40])
    (clip.parent / "photos/x.mp4").write_bytes(b"not a video")
    done = detect(pentad, "clip.mp4", "photos", "--json")
    assert done.code == 2
    assert [line.partition(" is ")[0] for line in done.err.splitlines()][-1:] == ["pentad: photos/x.mp4"]
    assert [json.loads(line)["image"] for line in done.out.splitlines()][-2:] == ["photos/a.jpg", "photos/b.png"]


def test_urls(pentad, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/photos/a.jpg"
        done = detect(pentad, url, "--allow-url", "--json", "--out", "drawn", "--threshold", "0.4")
        here = detect(pentad, "photos/a.jpg", "--json", "--threshold", "0.4").json
        assert done.json == here | {"image": url}
        assert (folder / "drawn/a.jpg").exists()
        assert "the server answers 404" in detect(pentad, url + "x", "--allow-url").error
        monkeypatch.setattr("pentad.cli.downloads.MAX_BYTES", 100)
        assert "more than 100 bytes" in detect(pentad, url, "--allow-url").error
        server.shutdown()
    done = detect(pentad, "http://127.0.0.1:9/a.jpg", "--allow-url")
    assert (done.code, "could not be downloaded" in done.error) == (1, True)
