"""The routes of the API."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

import pentad
from pentad.serve import openai
from pentad.serve.chat import chat
from pentad.serve.errors import APIError, ClientGone, refused_body
from pentad.serve.models import Model, Models
from pentad.serve.openai import Body, ChatBody

FIELDS = frozenset(
    name
    for body in vars(openai).values()
    if isinstance(body, type) and issubclass(body, Body)
    for name in body.model_fields
)
B = TypeVar("B", bound=Body)


def body_of(kind: type[B]) -> Callable[[Request], Awaitable[B]]:
    """A dependency that reads and checks a request's body."""

    async def read(request: Request) -> B:
        media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise APIError(415, f"Content-Type is {media_type[:60]!r}; expected application/json")
        try:
            return kind.model_validate_json(await request.body())
        except ValidationError as error:
            raise refused_body(error, FIELDS) from None

    return read


def make_app(models: Models) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="pentad", version=pentad.__version__, docs_url=None, redoc_url=None)

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe(model) for model in models.by_name.values()]}

    @app.get("/v1/models/{name:path}")
    def get_model(name: str) -> dict[str, Any]:
        return _describe(models.get(name))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: Annotated[ChatBody, Depends(body_of(ChatBody))]) -> Response:
        return await chat(models.get(body.model), body, request)

    @app.get("/health")
    def health() -> JSONResponse:
        states = {model.name: {"state": model.state, **model.load} for model in models.by_name.values()}
        ok = any(model.state == "ready" for model in models.by_name.values())
        return JSONResponse({"status": "ok" if ok else "unavailable", "models": states}, 200 if ok else 503)

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> Response:
        return error.response()

    @app.exception_handler(ClientGone)
    async def client_gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return JSONResponse(APIError(error.status_code, message).body, error.status_code, error.headers)

    return app


def _describe(model: Model) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "pentad"}
