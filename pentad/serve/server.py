"""The front process: it listens, and drains when it is told to stop."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from pentad.errors import PentadError
from pentad.serve.connections import Connection
from pentad.serve.loaded import LoadedModel
from pentad.serve.models import Model, Models


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        PentadError: the address can't be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PentadError(f"can't listen on {host} port {port}: {reason.lower()}") from error


class _Server(uvicorn.Server):
    """Drains at the first SIGINT or SIGTERM, and stops at the second."""

    told_to_stop = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = self.told_to_stop = True
        if self.force_exit:
            for connection in [*self.server_state.connections]:
                connection.transport.abort()


def serve(models: Models, app: ASGIApp, listening: socket.socket, ready: Callable[[Model, LoadedModel], None]) -> None:
    """Serve models until a signal.

    Args:
        models: the models; the first is loaded at once.
        app: the routes.
        listening: the socket.
        ready: is called when the first model is loaded.

    Raises:
        PentadError: the first model can't be loaded.
    """
    config = uvicorn.Config(app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False)
    asyncio.run(_serve(models, _Server(config), listening, ready))


async def _serve(
    models: Models, server: _Server, listening: socket.socket, ready: Callable[[Model, LoadedModel], None]
) -> None:
    async def start() -> None:
        try:
            ready(*await models.start())
        except BaseException:
            server.should_exit = True
            raise

    starting = asyncio.create_task(start())
    try:
        await server.serve([listening])
        if starting.done() and not server.told_to_stop:
            await starting
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await models.stop()
