"""The page of `pentad segment --view`: a photo, and the masks that a person accepts."""

import asyncio
import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import Field, ValidationError

from pentad.errors import BadInput
from pentad.serve.errors import APIError, refused_body
from pentad.serve.openai import Body
from pentad.serve.vision import RunLengths

MAX_MASKS = 10_000


@dataclass
class View:
    """What the page shows, and where it saves.

    Attributes:
        name: of the photo's file.
        photo: its content, which browsers can show.
        width, height: in pixels.
        model: its name in the API.
        file: where the masks are saved, in COCO's format.
        masks: those that the file has.
    """

    name: str
    photo: bytes
    width: int
    height: int
    model: str
    file: Path
    masks: list[dict[str, Any]] = field(default_factory=list)

    def save(self, masks: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Write the masks; the file is replaced at once, or not at all."""
        from pentad.vision.annotations import coco_of

        coco = coco_of({"image": self.name, "width": self.width, "height": self.height}, masks)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".{self.file.name}.part")
        temporary.write_text(json.dumps(coco))
        os.replace(temporary, self.file)
        self.masks = [*masks]
        return coco


class Accepted(Body):
    rle: RunLengths
    label: Annotated[str, Field(min_length=1, max_length=200)]
    predicted_iou: float | None = None
    stability_score: float | None = None
    prompt: dict[str, Any] | None = None


class AcceptedBody(Body):
    masks: Annotated[list[Accepted], Field(max_length=MAX_MASKS)]


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


def add_page(app: FastAPI, view: View) -> None:
    """Add the page, and the routes that it uses; those below /v1 ask for the API key."""

    @app.get("/", include_in_schema=False)
    def show() -> Response:
        text, policy = page()
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        return HTMLResponse(text, headers={**headers, "X-Content-Type-Options": "nosniff"})

    @app.get("/v1/view", include_in_schema=False)
    def describe() -> dict[str, Any]:
        return {"name": view.name, "model": view.model, "file": str(view.file), "masks": view.masks}

    @app.get("/v1/view/photo", include_in_schema=False)
    def photo() -> Response:
        return Response(view.photo, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})

    lock = asyncio.Lock()

    @app.post("/v1/view/annotations", include_in_schema=False)
    async def annotate(request: Request) -> dict[str, Any]:
        fields = frozenset({*Accepted.model_fields, "masks", "size", "counts"})
        try:
            body = AcceptedBody.model_validate_json(await request.body())
        except ValidationError as error:
            raise refused_body(error, fields) from None
        try:
            async with lock:  # the last of several saves wins
                coco = await asyncio.to_thread(view.save, [one.model_dump(exclude_none=True) for one in body.masks])
        except BadInput as error:
            raise APIError(400, str(error), param="masks", code="invalid_value") from None
        except OSError as error:
            raise APIError(500, f"{view.file} can't be written: {error.strerror}") from error
        return {"file": str(view.file), "coco": coco}
