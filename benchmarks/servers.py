"""Servers in their own processes, and a client of them that costs little, as it shares the CPUs with them."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

READY_SECONDS = 60
Message = dict[str, str]


@dataclass
class Reply:
    """A streamed reply.

    Attributes:
        sent: when the request was sent.
        lines: the server-sent events, and when they arrived.
    """

    sent: float
    lines: list[tuple[float, bytes]] = field(default_factory=list)

    def parse(self) -> Reply:
        """Decode the events; done at the end, because it would compete with the servers."""
        events = [(at, json.loads(line)) for at, line in self.lines if line != b"[DONE]"]
        assert not any("error" in event for _, event in events), self.lines[-1]
        pieces = [(at, event["choices"][0]["delta"].get("content")) for at, event in events if event["choices"]]
        self.times = [at for at, piece in pieces if piece]
        self.text = "".join(piece for _, piece in pieces if piece)
        self.tokens: int = events[-1][1]["usage"]["completion_tokens"]
        return self

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between two tokens."""
        return [end - start for start, end in pairwise(self.times)]


@dataclass
class Server:
    """A running server.

    Attributes:
        name: its name in the tables.
        port: where it listens on this machine.
        process: its process.
        ready: what it has printed when it was ready; empty for llama-server.
    """

    name: str
    port: int
    process: subprocess.Popen[str]
    ready: dict[str, Any]

    async def chat(self, messages: Sequence[Message], max_tokens: int) -> Reply:
        """Stream a greedy reply. The caller parses it."""
        options = {
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body = json.dumps({"model": self.name, "messages": messages, **options}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        reply = Reply(time.perf_counter())
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(f"{head}Content-Type: application/json\r\nConnection: close\r\n\r\n".encode() + body)
            status = await reader.readline()
            assert status.split()[1] == b"200", (status, await reader.read())
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    reply.lines.append((time.perf_counter(), line[6:].strip()))
        finally:
            writer.close()
        return reply

    def peak(self) -> int:
        """The peak memory of its processes in bytes (Linux)."""
        pid = str(self.process.pid)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", pid], capture_output=True, text=True).stdout.split()
        statuses = [Path(f"/proc/{one}/status").read_text().splitlines() for one in (pid, *children)]
        return sum(int(line.split()[1]) * 1024 for lines in statuses for line in lines if line.startswith("VmHWM"))


@contextmanager
def pentad_server(name: str, model: Path, threads: int, memory: str) -> Iterator[Server]:
    """Run `pentad serve` until the end of the block."""
    command = [sys.executable, "-m", "pentad", "serve", "--port", "0", "--json", "--model", f"{name}={model}"]
    command += ["--threads", str(threads), "--memory", memory]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            yield Server(name, int(ready["url"].split(":")[2].split("/")[0]), process, ready)
        finally:
            process.terminate()


@contextmanager
def llama_server(name: str, program: Path, model: Path, threads: int, *options: str) -> Iterator[Server]:
    """Run llama.cpp's server until the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(program), "-m", str(model), "--port", str(port), "-t", str(threads), "-tb", str(threads), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            deadline = time.monotonic() + READY_SECONDS
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{program} has not become ready")
                time.sleep(0.1)
            yield Server(name, port, process, {})
        finally:
            process.terminate()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
