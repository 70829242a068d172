"""A fake Hugging Face hub with the HTTP endpoints that downloads need."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".bin", ".pth", ".onnx")  # files that a hub keeps in large-file storage


@dataclass
class HubServer:
    """Repositories by name, revision and path.

    Files at `damaged` paths are served with wrong bytes; for `cut_off` paths the connection closes before the body.
    """

    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_stand_in"
    damaged: set[str] = field(default_factory=set)
    cut_off: set[str] = field(default_factory=set)
    downloads: list[str] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)

    def add(self, repo: str, files: Mapping[str, bytes], revision: str = "main") -> None:
        self.repos.setdefault(repo, {})[revision] = dict(files)

    def commit(self, repo: str, revision: str) -> str | None:
        """The commit of a revision, which may be a commit itself; None if it does not exist."""
        commits = {name: git_id(f"{repo}@{name}".encode()) for name in self.repos[repo]}
        return commits.get(revision, revision if revision in commits.values() else None)

    def files(self, repo: str, commit: str) -> dict[str, bytes]:
        revisions = self.repos[repo]
        return next(revisions[name] for name in revisions if self.commit(repo, name) == commit)


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.agents.add(self.headers.get("User-Agent", ""))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repo, (verb, revision, *rest) = "/".join(parts[:2]), [*parts[2:], "", ""]
        if repo not in self.hub.repos:
            return self.refuse(404, "RepoNotFound")
        commit = self.hub.commit(repo, revision or "main")
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        if is_api:
            listing = self.info if verb in ("", "revision") else self.tree
            return self.send(json.dumps(listing(repo, commit)).encode())
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo in self.hub.gated and not allowed:
            return self.refuse(403, "GatedRepo")
        self.file(commit, "/".join(rest).rstrip("/"), self.hub.files(repo, commit))

    def info(self, repo: str, commit: str) -> object:
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": git_id(content)}
            | ({"lfs": pointer(content) | {"sha256": sha256(content)}} if is_large(path) else {})
            for path, content in self.hub.files(repo, commit).items()
        ]
        return {"id": repo, "sha": commit, "siblings": siblings}

    def tree(self, repo: str, commit: str) -> object:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
            | ({"lfs": pointer(content) | {"oid": sha256(content)}} if is_large(path) else {})
            for path, content in self.hub.files(repo, commit).items()
        ]

    def file(self, commit: str, path: str, files: Mapping[str, bytes]) -> None:
        if path not in files:
            return self.refuse(404, "EntryNotFound")
        content = files[path]
        etag = sha256(content) if is_large(path) else git_id(content)
        if self.command == "GET":
            self.hub.downloads.append(path)
        if path in self.hub.damaged:
            content = bytes(byte ^ 1 for byte in content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(content[start:], 206 if start else 200, headers, cut=path in self.hub.cut_off)

    def refuse(self, status: int, code: str) -> None:
        self.send(b"{}", status, {"X-Error-Code": code})

    def send(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut:
            self.close_connection = True
        else:
            self.wfile.write(body)


def is_large(path: str) -> bool:
    return path.endswith(LARGE)


def pointer(content: bytes) -> dict[str, object]:
    return {"size": len(content), "pointerSize": 134}


@contextmanager
def serve() -> Iterator[HubServer]:
    """Serve an empty hub on a free port until the block ends."""
    hub = HubServer()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub})) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
