"""Server-sent events, and work that ends when its client has gone."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pentad.serve.errors import APIError, ClientGone

T = TypeVar("T")
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # `json.dumps` makes an encoder each time


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Run `work`, and cancel it if the client closes the connection.

    Raises:
        ClientGone: the client has closed it.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class EventStream(StreamingResponse):
    """A reply of server-sent events.

    Args:
        chunks: JSON objects. The first has been awaited, so that an error before it has its own status.
        first: the first of them.
        close: is called when the reply has ended, or the client has gone.
        named: each object's "type" is also the name of its event, as in /v1/responses.
    """

    def __init__(
        self,
        first: dict[str, Any],
        chunks: AsyncIterator[dict[str, Any]],
        close: Callable[[], None],
        *,
        named: bool = False,
    ) -> None:
        super().__init__(
            _lines(first, chunks, named), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _lines(first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]], named: bool) -> AsyncIterator[bytes]:
    try:
        yield _line(first, named)
        async for chunk in chunks:
            yield _line(chunk, named)
        if not named:
            yield b"data: [DONE]\n\n"
    except APIError as error:  # the status has been sent; clients look for this object
        yield _line(error.body)


def _line(chunk: dict[str, Any], named: bool = False) -> bytes:
    name = b"event: " + chunk["type"].encode() + b"\n" if named else b""
    return name + b"data: " + _to_json(chunk).encode() + b"\n\n"
