"""Checks of every request before its route sees it: the Host header, the API key, the size of the body."""

import asyncio
import contextlib
import hmac
from collections.abc import Collection, Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pentad.serve.errors import APIError
from pentad.serve.metrics import Metrics

MAX_BODY_BYTES = 8 << 20
MAX_IMAGE_BYTES = 48 << 20  # of a body with an image, in base64
IMAGE_ROUTES = ("/v1/segment", "/v1/detect", "/v1/classify")
BODY_SECONDS = 60  # for the whole body
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def local_hosts(address: str) -> tuple[str, ...] | None:
    """The Host headers to accept: local names if the server listens on this machine only, else any (None).

    A web page whose name resolves to 127.0.0.1 (DNS rebinding) must not reach the server.
    """
    try:
        local = address == "localhost" or ip_address(address).is_loopback
    except ValueError:
        local = False
    return (*LOCAL_NAMES, address) if local else None


class Guard:
    """ASGI middleware.

    Args:
        app: the application.
        metrics: counts the requests.
        hosts: accepted Host headers, without a port; None accepts any.
        keys: accepted API keys for /v1; none accepts every request.
        origins: of web pages that may use the API.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        hosts: Collection[str] | None,
        keys: Sequence[bytes] = (),
        origins: Sequence[str] = (),
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._hosts = hosts
        self._keys = keys
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            self._check_origin(headers)
            limit = MAX_IMAGE_BYTES if scope["path"] in IMAGE_ROUTES else MAX_BODY_BYTES
            _check_size(headers, limit)
        except APIError as error:
            await _refuse(error, scope, receive, counted)
            return
        await self._app(scope, _limited(receive, limit), counted)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._hosts is not None and name not in self._hosts:
            raise APIError(403, f"Host is {host[:100]!r}; expected {' or '.join(LOCAL_NAMES)}")

    def _check_origin(self, headers: Headers) -> None:
        """Browsers send a form to any server, without asking it first."""
        origin, form = headers.get("origin"), headers.get("content-type", "").lower().startswith("multipart/")
        own = f"http://{headers.get('host')}", f"https://{headers.get('host')}"
        if form and origin is not None and not {origin, "*"} & {*self._origins, *own}:
            raise APIError(403, f"Origin is {origin[:100]!r}, whose pages may not use this server; see --allow-origin")

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._keys or not path.startswith("/v1"):
            return
        given = headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1", "replace")
        if not sum(hmac.compare_digest(given, key) for key in self._keys):  # compares with every key
            error = APIError(401, "the API key is missing or wrong", code="invalid_api_key")
            error.headers["WWW-Authenticate"] = "Bearer"
            raise error


async def _refuse(error: APIError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer at once, then discard the body: if the server closed the connection before, clients would not read."""

    async def unfinished(message: Message) -> None:
        more = {"more_body": True} if message["type"] == "http.response.body" else {}
        await send({**message, **more})

    await error.response()(scope, receive, unfinished)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BODY_SECONDS):
            while (await receive()).get("more_body"):
                pass
    await send({"type": "http.response.body"})


def _check_size(headers: Headers, limit: int) -> None:
    """Refuse a large body before it is read."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > limit:
        raise APIError(413, f"the body has {length[:20]} bytes; expected at most {limit}")


def _limited(receive: Receive, limit: int) -> Receive:
    """Limit the size of a body without Content-Length, and the time that a body takes."""
    read, complete = 0, False
    deadline = asyncio.get_running_loop().time() + BODY_SECONDS

    async def limited() -> Message:
        nonlocal read, complete
        if complete:  # waits for the client to disconnect
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise APIError(408, f"the body didn't arrive within {BODY_SECONDS} seconds") from None
        read += len(message.get("body", b""))
        complete = not message.get("more_body", False)
        if read > limit:
            raise APIError(413, f"the body has more than {limit} bytes")
        return message

    return limited
