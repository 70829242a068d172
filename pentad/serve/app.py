"""The routes of the API."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import pentad
from pentad.serve import openai, vision
from pentad.serve.chat import chat
from pentad.serve.completions import complete
from pentad.serve.document import described, documented
from pentad.serve.embeddings import embed
from pentad.serve.errors import APIError, ClientGone, refused_body
from pentad.serve.guard import Guard, local_hosts
from pentad.serve.metrics import Metrics
from pentad.serve.models import Model, Models
from pentad.serve.openai import Body, ChatBody, CompletionBody, EmbeddingBody, ModelBody, ResponseBody
from pentad.serve.page import Shown, add_page
from pentad.serve.replies import ChatCompletion, Completion, EmbeddingList, Health, ModelList, ModelReply, ResponseReply
from pentad.serve.responses import respond_statelessly
from pentad.serve.vision import (
    ClassifyBody,
    ClassifyReply,
    DetectBody,
    DetectReply,
    ImageBody,
    SegmentBody,
    SegmentReply,
    read_form,
)

FIELDS = frozenset(
    field.alias or name
    for body in [*vars(openai).values(), *vars(vision).values()]
    if isinstance(body, type) and issubclass(body, Body)
    for name, field in body.model_fields.items()
)
B = TypeVar("B", bound=ModelBody)


def make_app(
    models: Models,
    metrics: Metrics,
    *,
    host: str,
    keys: Sequence[bytes] = (),
    origins: Sequence[str] = (),
    view: Shown | None = None,
) -> ASGIApp:
    """The ASGI application.

    Args:
        models: the models.
        metrics: what /metrics reports.
        host: the address that the server listens on.
        keys: accepted API keys; none accepts every request.
        origins: of web pages that may use the API.
        view: photos that a page shows, by `pentad segment --view` or `pentad data annotate --view`.
    """
    app = FastAPI(title="pentad", version=pentad.__version__, docs_url=None, redoc_url=None)

    @app.get("/v1/models", **described(ModelList))
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe(model) for model in models.by_name.values()]}

    @app.get("/v1/models/{name:path}", **described(ModelReply))
    def get_model(name: str) -> dict[str, Any]:
        return _describe(models.get(name))

    def post(
        path: str, kind: type[B], reply: type[BaseModel], answer: Callable[[Model, B, Request], Awaitable[Response]]
    ) -> None:
        @app.post(path, **described(reply, kind, streams="stream" in kind.model_fields))
        async def route(request: Request) -> Response:
            body = await _read_body(request, kind)
            return await answer(models.ready(body.model), body, request)

    post("/v1/chat/completions", ChatBody, ChatCompletion, chat)
    post("/v1/completions", CompletionBody, Completion, complete)
    post("/v1/responses", ResponseBody, ResponseReply, respond_statelessly)
    post("/v1/embeddings", EmbeddingBody, EmbeddingList, embed)
    post("/v1/segment", SegmentBody, SegmentReply, vision.segment)
    post("/v1/detect", DetectBody, DetectReply, vision.detect)
    post("/v1/classify", ClassifyBody, ClassifyReply, vision.classify)

    @app.get("/metrics", response_class=PlainTextResponse)
    def report() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health", responses={200: {"model": Health}, 503: {"model": Health, "description": "Not all are ready"}})
    def health() -> JSONResponse:
        states = {model.name: {"state": model.state, **model.load} for model in models.by_name.values()}
        used = [model.state for model in models.by_name.values() if model.state != "unloaded"]
        ok = all(state == "ready" for state in used)
        return JSONResponse({"status": "ok" if ok else "unavailable", "models": states}, 200 if ok else 503)

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)  # uvicorn logs its traceback
    async def bug(request: Request, error: Exception) -> Response:
        return APIError(500, f"{type(error).__name__} in the server; its log has more").response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return JSONResponse(APIError(error.status_code, message).body, error.status_code, error.headers)

    if view is not None:
        add_page(app, view)
    app.openapi = documented(app, [*models.by_name])  # type: ignore[method-assign]
    guarded = Guard(app, metrics=metrics, hosts=local_hosts(host), keys=keys, origins=origins)
    return (
        CORSMiddleware(guarded, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]) if origins else guarded
    )


async def _read_body(request: Request, kind: type[B]) -> B:
    """Read and check a request's body."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    form = media_type == "multipart/form-data" and issubclass(kind, ImageBody)
    if media_type != "application/json" and not form:
        raise APIError(415, f"Content-Type is {media_type[:60]!r}; expected application/json")
    try:
        return kind.model_validate(await read_form(request)) if form else kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise refused_body(error, FIELDS) from None


def _describe(model: Model) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "pentad", **model.abilities}
