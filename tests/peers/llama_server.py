"""A pytest plugin for llama.cpp's server tests: a `pentad serve` is what their `ServerProcess` starts.

It serves $PEERS_MODEL, whatever the tests ask for, so texts are not compared. Tests with the same settings share a
server.
"""

import contextlib
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tests.serve.conftest import Server, serving

sys.modules.setdefault("wget", ModuleType("wget"))  # they download models with it
import utils  # noqa: E402 - llama.cpp's

ROUTES = ("/chat/completions", "/completions", "/embeddings", "/models", "/responses")  # theirs have no /v1, too
SLOTS = 2  # most tests divide the context by this number


class Shared:
    """The server of the current settings, and the source of the current test."""

    settings: tuple[Any, ...] = ()
    server: Server
    source = ""
    stack = contextlib.ExitStack()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Function) -> None:
    Shared.source = inspect.getsource(item.function)


def pytest_unconfigure() -> None:
    Shared.stack.close()


def start(self: utils.ServerProcess, timeout_seconds: int = 0) -> None:
    """Start a server, or find that of the last test. The model's name is the one that the test asks for, if any."""
    asked = re.search(r'model="([^"]+)"', Shared.source)
    self.model_alias = asked[1] if asked else "gpt-3.5-turbo-instruct"
    settings = (self.model_alias, (self.n_ctx or 512) // SLOTS, self.api_key)
    if settings != Shared.settings:
        Shared.stack.close()
        Shared.server, Shared.settings = Shared.stack.enter_context(serve(*settings)), settings
    self.server_port = int(Shared.server.root.rpartition(":")[2])


@contextlib.contextmanager
def serve(name: str, context: int, key: str | None) -> Any:
    """Run `pentad serve`."""
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as keys:
        keys.write(key or "")
        keys.flush()
        options = ["--api-key-file", keys.name] if key else []
        with serving("--model", f"{name}={os.environ['PEERS_MODEL']}", "--context", context, *options) as server:
            yield server


def adapted(request: Callable[..., Any]) -> Callable[..., Any]:
    """Add what their requests leave out."""

    def send(self: utils.ServerProcess, method: str, path: str, data: Any = None, *args: Any, **options: Any) -> Any:
        path = f"/v1{path}" if path in ROUTES else path
        if isinstance(data, dict):
            pooling = {"pooling": self.pooling} if self.pooling and path.endswith("embeddings") else {}
            data = {"model": self.model_alias, **pooling, **data}
        return request(self, method, path, data, *args, **options)

    return send


utils.ServerProcess.start = start
utils.ServerProcess.stop = lambda self: None
utils.ServerProcess.make_request = adapted(utils.ServerProcess.make_request)
utils.ServerProcess.make_stream_request = adapted(utils.ServerProcess.make_stream_request)
utils.ServerPreset.load_all = staticmethod(lambda: None)
utils.match_regex = lambda regex, text: isinstance(text, str) and text != ""
