"""Time limits of connections, on a server in this process with short limits."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

import pytest
import uvicorn
from fastapi import FastAPI, Request

from pentad.serve import connections, guard
from pentad.serve.connections import Connection
from pentad.serve.errors import APIError
from pentad.serve.guard import Guard
from pentad.serve.metrics import Metrics

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)


def talk(conversation: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
    """Run a conversation with a server that echoes bodies."""
    app = FastAPI()

    @app.post("/")
    async def echo(request: Request) -> str:
        return (await request.body()).decode()

    app.exception_handler(APIError)(lambda request, error: error.response())

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            guarded = Guard(app, metrics=Metrics(), hosts=None)
            server = uvicorn.Server(uvicorn.Config(guarded, http=Connection, lifespan="off", log_config=None))
            serving = asyncio.create_task(server.serve([listening]))
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            try:
                await conversation(reader, writer)
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
            server.should_exit = True
            await serving

    asyncio.run(run())


@pytest.mark.parametrize("start", [b"", b"P", b"POST / HTTP/1.1\r\nHost: a\r\n"])
def test_headers_that_do_not_arrive_close_the_connection(start: bytes) -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        with pytest.raises((ConnectionError, EOFError)):
            await reader.readexactly(1)

    talk(conversation)


def test_a_second_request_of_a_connection_has_the_same_limit() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhiPOST / HTTP/1.1\r\n")
        assert (await reader.readuntil(b'"hi"')).startswith(b"HTTP/1.1 200")
        with pytest.raises((ConnectionError, EOFError)):
            await reader.readexactly(1)

    talk(conversation)


def test_a_body_that_does_not_arrive_is_refused() -> None:
    async def conversation(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhi")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")

    talk(conversation)
