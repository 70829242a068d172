"""The description of the API that /openapi.json gives."""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pentad.serve.openai import ChatBody, CompletionBody, EmbeddingBody, ModelBody, ResponseBody
from pentad.serve.replies import Error
from pentad.serve.vision import ClassifyBody, DetectBody, SegmentBody

BODIES = (ChatBody, CompletionBody, ResponseBody, EmbeddingBody, SegmentBody, DetectBody, ClassifyBody)
SCHEMAS = "#/components/schemas/{model}"


def described(reply: type[BaseModel], body: type[ModelBody] | None = None, *, streams: bool = False) -> dict[str, Any]:
    """The options of a route that describe its replies, and the body that it reads."""
    schema = {"description": "Server-sent events, with JSON in their data."}  # tools differ in what they check here
    events: dict[str, Any] = {"content": {"text/event-stream": {"schema": schema}}} if streams else {}
    responses: dict[int | str, dict[str, Any]] = {
        200: {"model": reply, **events},
        "default": {"model": Error, "description": "An error"},
    }
    if body is None:
        return {"responses": responses}
    content = {"application/json": {"schema": {"$ref": SCHEMAS.format(model=body.__name__)}}}
    return {"responses": responses, "openapi_extra": {"requestBody": {"required": True, "content": content}}}


def documented(app: FastAPI, models: Sequence[str]) -> Callable[[], dict[str, Any]]:
    """A function that returns the document, which names the models."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = document["components"]["schemas"]
            schemas |= models_json_schema([(kind, "validation") for kind in BODIES], ref_template=SCHEMAS)[1]["$defs"]
            for kind in BODIES:
                schemas[kind.__name__]["properties"]["model"] = {"type": "string", "enum": [*models]}
            app.openapi_schema = document
        return app.openapi_schema

    return document
