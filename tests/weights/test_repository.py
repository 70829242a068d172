"""Files of a GitHub repository, from a local stand-in of the server."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType

import pytest

from pentad.weights import registry, repository
from pentad.weights.published import PublishedFile
from pentad.weights.registry import KnownModel, locate
from pentad.weights.repository import Repository
from tests.helpers.packages import cached_files, refused
from tests.helpers.progress import Watcher

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CFG, WEIGHTS = b"[net]\nwidth=8\n", bytes(range(256)) * 8192


@pytest.fixture
def files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """What the server has, by path; `tiny` is a model of two of its files."""
    root = f"/owner/name/{COMMIT}/zoo"
    content = {f"{root}/tiny.cfg": CFG, f"{root}/tiny.weights": WEIGHTS}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = content.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            pass

    published = [
        PublishedFile(f"zoo/{name}", len(body), hashlib.sha256(body).hexdigest())
        for name, body in (("tiny.cfg", CFG), ("tiny.weights", WEIGHTS))
    ]
    tiny = KnownModel(Repository("owner/name", COMMIT, tuple(published)), "a model for tests", "Apache-2.0")
    monkeypatch.setattr(registry, "KNOWN", MappingProxyType({"tiny": tiny}))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(repository, "SERVER", f"http://127.0.0.1:{server.server_port}")
        yield content
        server.shutdown()


def test_a_model_is_pulled_once(cache: Path, files: dict[str, bytes]) -> None:
    watcher = Watcher()
    path = locate("tiny", progress=watcher)
    assert path.read_bytes() == CFG
    assert path.with_suffix(".weights").read_bytes() == WEIGHTS
    assert cached_files(cache) == ["models", "models/tiny.cfg", "models/tiny.weights"]
    assert watcher.counts == [len(CFG + WEIGHTS)] * 2
    files.clear()
    assert locate("tiny") == path


@pytest.mark.parametrize("damage", [WEIGHTS[:-1], WEIGHTS + b"x", WEIGHTS[:-1] + b"x", b""])
def test_a_file_with_another_hash_is_refused(cache: Path, files: dict[str, bytes], damage: bytes) -> None:
    files[f"/owner/name/{COMMIT}/zoo/tiny.weights"] = damage
    assert "zoo/tiny.weights of the repository owner/name differs from the published file" in refused("tiny")
    assert cached_files(cache) == ["models"]


def test_an_absent_file_or_server_is_one_line(
    cache: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    del files[f"/owner/name/{COMMIT}/zoo/tiny.weights"]
    message = refused("tiny")
    assert f"could not download tiny.weights from {repository.SERVER}/owner/name/{COMMIT}" in message
    assert "Not Found" in message
    monkeypatch.setattr(repository, "SERVER", "http://127.0.0.1:9")
    assert "refused" in refused("tiny")
    assert cached_files(cache) == ["models"]


def test_the_known_detectors_are_those_of_the_issue() -> None:
    hashes = {name: model.source.files[1].sha256[:8] for name, model in registry.KNOWN.items() if "yolo" in name}
    assert hashes == {"yolov3-tiny": "dccea06f", "yolo-fastest-1.1": "1c445c42", "yolo-fastest-1.1-xl": "fac5fb41"}
