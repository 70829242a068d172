"""The page of `pentad segment --view` and `pentad data annotate --view`: photos, and masks that a person accepts."""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import Field, ValidationError

from pentad.errors import BadInput
from pentad.serve.errors import APIError, refused_body
from pentad.serve.openai import Body
from pentad.serve.vision import RunLengths
from pentad.weights.atomic import replace_text

MAX_MASKS = 10_000
SHOWN_BY_BROWSERS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp")
T = TypeVar("T")


class Accepted(Body):
    rle: RunLengths
    label: Annotated[str, Field(min_length=1, max_length=200)]
    predicted_iou: float | None = None
    stability_score: float | None = None
    prompt: dict[str, Any] | None = None
    source: Literal["clicks", "brush", "detector", "everything"] = "clicks"


class AcceptedBody(Body):
    """What the page has of an image: all of its masks, and what they have cost."""

    masks: Annotated[list[Accepted], Field(max_length=MAX_MASKS)]
    number: Annotated[int, Field(ge=0)] = 0
    clicks: Annotated[int, Field(ge=0, lt=2**31)] = 0
    annotator_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    computing_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    done: bool = False
    skipped: bool = False


class Shown(Protocol):
    """What the page shows, and where it saves.

    Attributes:
        file: where masks are saved, in COCO's format.
    """

    file: Path

    def describe(self) -> dict[str, Any]:
        """The image at hand: its number and name, and its masks."""
        ...

    def photo(self, number: int) -> bytes:
        """A file of an image that browsers can show."""
        ...

    def save(self, number: int, masks: Sequence[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any] | None:
        """Write the masks of an image, at once or not at all; returns what a photo's file has."""
        ...


@dataclass
class View:
    """One photo, whose masks are saved beside it.

    Attributes:
        path: the photo.
        width, height: in pixels.
        model: its name in the API.
        file: where the masks are saved.
        masks: those that the file has.
    """

    path: Path
    width: int
    height: int
    model: str
    file: Path
    masks: list[dict[str, Any]] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        return {"number": 0, "name": self.path.name, "model": self.model, "file": str(self.file), "masks": self.masks}

    def photo(self, number: int) -> bytes:
        return for_browsers(self.path)

    def save(self, number: int, masks: Sequence[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
        from pentad.vision.annotations import coco_of

        size = {"width": self.width, "height": self.height}
        coco = coco_of([{"image": self.path.name, **size, "masks": masks}])
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.file, json.dumps(coco))
        self.masks = [*masks]
        return coco


def for_browsers(path: Path) -> bytes:
    """The file, or a PNG of it if browsers can't show its format."""
    if path.suffix.lower() in SHOWN_BY_BROWSERS:
        return path.read_bytes()
    from pentad.media.images import read_image, to_pil

    content = BytesIO()
    to_pil(read_image(path)).save(content, "PNG")
    return content.getvalue()


@cache
def page() -> tuple[str, str]:
    """The page, and a Content-Security-Policy under which only its own script and style run."""
    text = (files("pentad.serve") / "page.html").read_text("utf-8")
    hashes = []
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes.append(f"{tag}-src 'sha256-{digest}'")
    own = "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return text, "; ".join(["default-src 'none'", *hashes, own])


def add_page(app: FastAPI, view: Shown) -> None:
    """Add the page, and the routes that it uses; those below /v1 ask for the API key."""

    @app.get("/", include_in_schema=False)
    def show() -> Response:
        text, policy = page()
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        return HTMLResponse(text, headers={**headers, "X-Content-Type-Options": "nosniff"})

    @app.get("/v1/view", include_in_schema=False)
    def describe() -> dict[str, Any]:
        return view.describe()

    @app.get("/v1/view/photo/{number}", include_in_schema=False)
    def photo(number: int) -> Response:
        content = _answered(lambda: view.photo(number))
        return Response(content, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    lock = asyncio.Lock()

    @app.post("/v1/view/annotations", include_in_schema=False)
    async def annotate(request: Request) -> dict[str, Any]:
        fields = frozenset({*Accepted.model_fields, *AcceptedBody.model_fields, "size", "counts"})
        try:
            body = AcceptedBody.model_validate_json(await request.body())
        except ValidationError as error:
            raise refused_body(error, fields) from None
        masks = [one.model_dump(exclude_none=True) for one in body.masks]
        facts = body.model_dump(exclude={"masks", "number"})
        async with lock:  # the last of several saves wins
            coco = await asyncio.to_thread(_answered, lambda: view.save(body.number, masks, facts))
        return {"file": str(view.file), "coco": coco, "next": view.describe() if body.done else None}


def _answered(action: Callable[[], T]) -> T:
    """What an action returns; its errors are the client's or the disk's."""
    try:
        return action()
    except BadInput as error:
        raise APIError(400, str(error), code="invalid_value") from None
    except OSError as error:
        raise APIError(500, f"{error.filename} can't be read or written: {error.strerror}") from error
