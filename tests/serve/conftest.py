"""Servers for tests: subprocesses that serve a tiny model."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from openai import OpenAI
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import talking_checkpoint

PATIENCE = 120  # seconds until a test gives up
PAGE_SIZE = 256


@dataclass(frozen=True)
class Reply:
    """The reply to a plain HTTP request."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The error, after checking that it has OpenAI's shape."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        return error


@dataclass(frozen=True)
class Server:
    """A running `pentad serve`, and the official client of it."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    client: OpenAI

    @property
    def url(self) -> str:
        return self.ready["url"]

    @property
    def port(self) -> int:
        return int(self.root.rpartition(":")[2])

    @property
    def model(self) -> str:
        """The name of the first model."""
        return self.ready["model"]

    @property
    def cache_pages(self) -> int:
        return self.ready["cache_tokens"] // PAGE_SIZE

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def request(self, path: str, body: Any = None, **headers: str) -> Reply:
        """Send a GET, or a POST of JSON, or of bytes as they are."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = Request(self.root + path, data, self._headers | headers)
        try:
            with urlopen(request, timeout=PATIENCE) as reply:
                return Reply(reply.status, reply.headers, reply.read())
        except HTTPError as error:
            with error:
                return Reply(error.code, error.headers, error.read())

    @property
    def _headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json", "Authorization": f"Bearer {self.client.api_key}"}

    def health(self) -> Any:
        return self.request("/health").json

    def open_sequences(self, model: str = "tiny") -> int:
        """The number of sequences that the worker runs."""
        return self.health()["models"][model]["open"]


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def serving(*arguments: object, key: str = "none") -> Iterator[Server]:
    """Run `pentad serve` until the end of the block."""
    command = [sys.executable, "-m", "pentad", "serve", "--port", "0", "--json", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            with OpenAI(base_url=ready["url"], api_key=key, max_retries=0, timeout=PATIENCE) as client:
                yield Server(process, ready, client)
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            finally:
                process.kill()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a long context that doesn't end its greedy replies, which therefore take a while."""
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    talking_checkpoint(folder, max_position_embeddings=8192)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][[2, 256]] = 0  # the end tokens' logits: other tokens have larger ones
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def server(tiny: Path) -> Iterator[Server]:
    """One server for all tests that leave it as it was."""
    with serving("--model", tiny, "--threads", 1) as started:
        yield started
