"""/v1/segment, /v1/detect and /v1/classify: what an image shows."""

import base64
import json
from typing import Annotated, Any

import python_multipart  # noqa: F401 - `Request.form` needs it
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile

from pentad.serve.errors import APIError
from pentad.serve.models import Model
from pentad.serve.openai import Body, ModelBody
from pentad.serve.streaming import unless_gone

MAX_PROMPTS = 256
MAX_LABELS = 1000
TEXT_FIELDS = ("model", "image", "mask", "text", "user")  # of a form; others are JSON

Row = Annotated[list[float], Field(max_length=4)]
Rows = Annotated[list[Row], Field(max_length=1024)]
Number = Annotated[float, Field(ge=0, le=1)]


class ImageBody(ModelBody):
    """The fields of every route for images."""

    image: str = Field(
        min_length=1, description="A file as a data URL or in base64, or the id that an earlier reply has given it."
    )


class RunLengths(Body):
    """COCO's run-length code of a mask."""

    size: Annotated[list[int], Field(min_length=2, max_length=2)]
    counts: str | list[int]


class EverythingSettings(Body):
    """Settings of `everything`, as in pentad.vision.automatic."""

    points_per_side: int | None = Field(None, ge=1, le=64)
    pred_iou_thresh: Number | None = None
    stability_score_thresh: Number | None = None
    min_mask_region_area: int | None = Field(None, ge=0, lt=2**31)


class SegmentBody(ImageBody):
    """The body of /v1/segment. Without a prompt the image is only embedded, for later requests."""

    points: Row | Rows | Annotated[list[Rows], Field(max_length=MAX_PROMPTS)] | None = Field(
        None, description="x, y of the points of one prompt, or of several prompts, in pixels."
    )
    labels: list[int] | Annotated[list[list[int]], Field(max_length=MAX_PROMPTS)] | None = Field(
        None, description="For each point 1 (in the object, the default) or 0 (outside)."
    )
    boxes: Row | Annotated[list[Row], Field(max_length=MAX_PROMPTS)] | None = Field(
        None, description="x0, y0, x1, y1; one for each prompt."
    )
    mask: str | RunLengths | None = Field(None, description="A mask to improve: the id of a former one, or any.")
    text: str | Annotated[list[str], Field(max_length=MAX_PROMPTS)] | None = Field(
        None, description="Words for an object, if the model was trained with them."
    )
    multimask: bool | None = Field(None, description="Three masks for each prompt; by default the best one.")
    everything: bool | EverythingSettings | None = Field(None, description="All masks of the image.")


class DetectBody(ImageBody):
    threshold: Number | None = None
    letterbox: bool | None = None
    classes: Annotated[list[str | int], Field(max_length=MAX_LABELS)] | None = None


class ClassifyBody(ImageBody):
    top_k: int | None = Field(None, ge=1)
    labels: Annotated[list[str], Field(min_length=1, max_length=MAX_LABELS)] | None = Field(
        None, description="For a CLIP: the classes to choose from."
    )
    template: str | None = Field(None, max_length=1000, description="For a CLIP: the text of a class, with {}.")


class MaskReply(BaseModel):
    id: str | None = Field(None, description="For the field `mask` of a request.")
    rle: RunLengths
    box: list[float]
    predicted_iou: float
    stability_score: float
    prompt: dict[str, Any]


class SegmentSeconds(BaseModel):
    embedding: float
    masks: float


class SegmentReply(BaseModel):
    image: str
    width: int
    height: int
    masks: list[MaskReply]
    seconds: SegmentSeconds


class DetectionReply(BaseModel):
    box: list[float]
    label: str
    label_id: int
    score: float
    mask: RunLengths | None = None


class DetectReply(BaseModel):
    image: str
    width: int
    height: int
    detections: list[DetectionReply]


class LabelReply(BaseModel):
    index: int
    label: str
    score: float


class ClassifyReply(BaseModel):
    image: str
    labels: list[LabelReply]


async def segment(model: Model, body: SegmentBody, request: Request) -> Response:
    """Reply with the masks that the prompts mean."""
    given = any(value is not None for value in (body.points, body.labels, body.boxes, body.mask, body.text))
    if body.everything and given:
        message = "everything is a prompt of its own; expected no points, boxes, mask or text"
        raise APIError(400, message, param="everything", code="invalid_value")
    return await _answer(model, body, request, "segment")


async def detect(model: Model, body: DetectBody, request: Request) -> Response:
    """Reply with the objects of an image."""
    return await _answer(model, body, request, "detect")


async def classify(model: Model, body: ClassifyBody, request: Request) -> Response:
    """Reply with the names of what an image shows."""
    return await _answer(model, body, request, "classify", "embed")


async def _answer(model: Model, body: ImageBody, request: Request, *tasks: str) -> Response:
    model.require(*tasks)
    call = model.submit([body.model_dump(exclude={"model", "user"}, exclude_none=True)])
    try:
        event = await unless_gone(request, call.next())
    finally:
        call.close()
    return JSONResponse(event.result)


async def read_form(request: Request) -> dict[str, Any]:
    """The fields of a form whose field `image` is a file; those that are no texts are JSON.

    Raises:
        APIError: a field is not JSON, or its file is not named `image`.
    """
    fields: dict[str, Any] = {}
    async with request.form(max_files=1, max_fields=32) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name != "image":
                    raise APIError(400, f"{name[:60]} is a file; expected the field image", param=name[:60])
                fields[name] = base64.b64encode(await value.read()).decode()
                continue
            try:
                fields[name] = value if name in TEXT_FIELDS and value[:1] != "{" else json.loads(value)
            except ValueError as error:
                message = f"{name[:60]} is not valid JSON: {error}"
                raise APIError(400, message, param=name[:60], code="invalid_value") from None
    return fields
