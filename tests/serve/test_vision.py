"""/v1/segment, /v1/detect and /v1/classify: the runners' answers, from one upload for many prompts."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

import pentad
from pentad.media.images import read_image, write_image
from pentad.serve.vision_worker import VisionWorker
from tests.helpers.clip_files import write_clip
from tests.helpers.sam import meta_sam
from tests.models.test_vit import saved
from tests.serve.conftest import Server, eventually, serving
from tests.vision.test_segmenter import photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    meta_sam(folder / "sam.pth")
    saved(folder / "vit", id2label=dict(enumerate("abcde")))
    write_clip(folder / "clip")
    write_image(folder / "photo.png", photo(40, 60))
    return folder


@pytest.fixture(scope="module")
def vision(folder: Path) -> Iterator[Server]:
    models = [part for name in ("sam.pth", "vit", "clip") for part in ("--model", folder / name)]
    with serving(*models, "--threads", 1) as started:
        yield started


@pytest.fixture(scope="module")
def picture(folder: Path) -> str:
    return base64.b64encode((folder / "photo.png").read_bytes()).decode()


def form(fields: dict[str, Any], data: bytes) -> tuple[bytes, str]:
    """A form with a file, and its Content-Type."""
    parts = [(f'name="{name}"', value.encode()) for name, value in fields.items()]
    parts.append(('name="image"; filename="photo.png"', data))
    lines = [b"--xyz\r\nContent-Disposition: form-data; " + h.encode() + b"\r\n\r\n" + v + b"\r\n" for h, v in parts]
    return b"".join(lines) + b"--xyz--\r\n", "multipart/form-data; boundary=xyz"


def test_one_upload_serves_many_prompts(vision: Server, folder: Path, picture: str) -> None:
    embedded: Any = pentad.load(folder / "sam.pth").image(folder / "photo.png")  # type: ignore[union-attr]

    def ask(**fields: Any) -> Any:
        reply = vision.request("/v1/segment", {"model": "sam", **fields})
        assert reply.status == 200, reply.body
        return reply.json

    def same(masks: list[Any], expected: list[Any]) -> bool:
        return [(m["rle"], m["box"], m["prompt"]) for m in masks] == [(m.rle, list(m.box), m.prompt) for m in expected]

    first = ask(image=f"data:image/png;base64,{picture}")
    assert (first["width"], first["height"], first["masks"]) == (60, 40, [])
    assert ask(image=picture)["image"] == first["image"]
    image = {"image": first["image"]}
    clicked = ask(**image, points=[[30, 20], [3, 4.5]], labels=[1, 0])
    expected = embedded.masks(points=[[30, 20], [3, 4.5]], labels=[1, 0])
    assert same(clicked["masks"], expected)
    assert clicked["masks"][0]["predicted_iou"] == pytest.approx(expected[0].predicted_iou)
    boxes = [[1, 2, 30, 30], [20, 10, 60, 40]]
    assert same(ask(**image, boxes=boxes)["masks"], embedded.masks(boxes=boxes))
    assert same(ask(**image, points=[30, 20], multimask=True)["masks"], embedded.masks(points=[30, 20], multimask=True))
    better = ask(**image, points=[30, 20], mask=clicked["masks"][0]["id"])["masks"]
    assert same(better, embedded.masks(points=[30, 20], mask=expected[0]))
    rough = ask(**image, mask=clicked["masks"][0]["rle"])["masks"]
    assert same(rough, embedded.masks(mask=expected[0].mask))
    settings = {"points_per_side": 3, "pred_iou_thresh": 0, "stability_score_thresh": 0}
    everything = ask(**image, everything=settings)["masks"]
    found = embedded.segmenter.everything(read_image(folder / "photo.png"), **settings)
    assert everything
    assert same(everything, found)


class Lines:
    """A pipe to a worker: what the front process sends by the worker's next look at it, and the events."""

    def __init__(self, *sent: list[dict[str, Any]]) -> None:
        self.sent, self.events = list(sent), list[dict[str, Any]]()

    def receive(self, seconds: float | None) -> list[str] | None:
        if self.sent:
            return [json.dumps(message) for message in self.sent.pop(0)]
        return None if seconds is None else []

    def send(self, message: dict[str, Any]) -> None:
        self.events += message["events"]


def test_a_click_does_not_wait_for_everything(folder: Path, picture: str) -> None:
    settings = {"points_per_side": 2, "pred_iou_thresh": 0, "stability_score_thresh": 0}
    long = {"id": 1, "image": picture, "everything": settings}
    click = {"id": 3, "image": picture, "points": [[30, 20]]}
    gone = {"id": 4, "image": picture, "everything": True}
    pipe: Any = Lines([long], [{**long, "id": 2}, click], [], [gone], [{"cancel": 4}])
    VisionWorker(pentad.load(folder / "sam.pth"), pipe).run()  # type: ignore[arg-type]
    assert [event["id"] for event in pipe.events] == [3, 1, 2]
    assert len(pipe.events[0]["result"]["masks"]) == 1
    assert pipe.events[1]["result"]["masks"] == pipe.events[2]["result"]["masks"] != []


def test_a_file_of_a_form(vision: Server, folder: Path, picture: str) -> None:
    fields = {"model": "sam", "points": "[[30, 20]]", "labels": "[1]"}
    body, kind = form(fields, (folder / "photo.png").read_bytes())
    reply = vision.request("/v1/segment", body, **{"Content-Type": kind})
    expected = vision.request("/v1/segment", {"model": "sam", "image": picture, "points": [[30, 20]]})
    assert reply.json["masks"][0]["rle"] == expected.json["masks"][0]["rle"]
    body, kind = form({"model": "sam", "points": "30,"}, b"x")
    refused = vision.request("/v1/segment", body, **{"Content-Type": kind})
    assert (refused.status, refused.error["param"]) == (400, "points")
    foreign = vision.request("/v1/segment", body, **{"Content-Type": kind, "Origin": "https://evil.example"})
    assert foreign.status == 403


def test_classes_of_an_image(vision: Server, folder: Path, picture: str) -> None:
    body = {"model": "vit", "image": picture, "top_k": 3}
    eventually(lambda: vision.request("/v1/classify", body).status == 200)  # loads it first
    model: Any = pentad.load(folder / "vit")
    found = vision.request("/v1/classify", body).json["labels"]
    assert [one["label"] for one in found] == [one.label for one in model.classify(folder / "photo.png", top_k=3)]
    refused = vision.request("/v1/classify", body | {"labels": ["a", "b"]})
    assert (refused.status, "CLIP" in refused.error["message"]) == (400, True)


def test_clip_classifies_by_the_labels_of_the_request(vision: Server, folder: Path, picture: str) -> None:
    body = {"model": "clip", "image": picture, "labels": ["a dog", "a cat"]}
    eventually(lambda: vision.request("/v1/classify", body).status == 200)  # loads it first
    model: Any = pentad.load(folder / "clip")
    expected = model.classify(folder / "photo.png", labels=["a dog", "a cat"])
    found = vision.request("/v1/classify", body).json["labels"]
    assert [one["label"] for one in found] == [one.label for one in expected]
    assert [one["score"] for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)
    refused = vision.request("/v1/classify", {"model": "clip", "image": picture})
    assert (refused.status, "labels" in refused.error["message"]) == (400, True)


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"image": "img-0123"}, 404, "upload the image again"),
        ({"image": "https://example.org/a.jpg"}, 400, "URL"),
        ({"image": "not base64!"}, 400, "base64"),
        ({"image": "aGVsbG8gd29ybGQ="}, 400, "not an image"),
        ({"image": ""}, 400, "image"),
        ({"points": [[61, 2]]}, 400, "point 61,2 is outside of the image"),
        ({"points": [[1, 2]], "labels": [7]}, 400, "label is 7"),
        ({"points": [[1, 2]], "labels": [1, 0]}, 400, "labels have the shape [2]"),
        ({"points": [[[1, 2]]] * 300}, 400, "points"),
        ({"boxes": [9, 9, 1, 20]}, 400, "no area"),
        ({"boxes": [[1, 2, 3]]}, 400, "boxes"),
        ({"mask": "mask-0123"}, 404, "mask"),
        ({"mask": {"size": [20, 20], "counts": [400]}}, 400, "[20, 20]; expected [40, 60]"),
        ({"mask": {"size": [20, 20], "counts": [-1]}}, 400, "counts"),
        ({"points": [[1, 2]], "everything": True}, 400, "everything"),
        ({"everything": {"points_per_side": 10**6}}, 400, "points_per_side"),
        ({"text": "the dog"}, 400, "takes no words"),
        ({"nonsense": 1}, 400, "nonsense"),
        ({"model": "nobody"}, 404, "nobody"),
    ],
)
def test_bad_input_is_one_line(vision: Server, picture: str, fields: dict[str, Any], status: int, named: str) -> None:
    reply = vision.request("/v1/segment", {"model": "sam", "image": picture} | fields)
    assert reply.status == status
    assert named in reply.error["message"]


def test_a_large_picture_is_refused_before_it_is_decoded(vision: Server, tmp_path: Path) -> None:
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    large = base64.b64encode((tmp_path / "large.png").read_bytes()).decode()
    reply = vision.request("/v1/segment", {"model": "sam", "image": large})
    assert (reply.status, "9000 x 9000" in reply.error["message"]) == (400, True)


def test_a_model_of_another_kind_is_named(vision: Server, server: Server, picture: str) -> None:
    chat = {"model": "sam", "messages": [{"role": "user", "content": "hi"}]}
    reply = vision.request("/v1/chat/completions", chat)
    assert (reply.status, reply.error["param"]) == (400, "model")
    assert "expected a language model" in reply.error["message"]
    reply = server.request("/v1/segment", {"model": "tiny", "image": picture})
    assert "expected a promptable segmenter" in reply.error["message"]
    assert "expected a detector" in vision.request("/v1/detect", {"model": "sam", "image": picture}).error["message"]


def test_it_is_described(vision: Server, picture: str) -> None:
    document = vision.request("/openapi.json").json
    reply = vision.request("/v1/segment", {"model": "sam", "image": picture, "boxes": [1, 2, 30, 30]})
    schema = document["paths"]["/v1/segment"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(reply.json, {**schema, "components": document["components"]})
    listed = {one["id"]: one for one in vision.request("/v1/models").json["data"]}["sam"]
    assert (listed["task"], listed["words"]) == ("segment", False)
    assert vision.ready["task"] == "segment"
    json.dumps(reply.json, allow_nan=False)
