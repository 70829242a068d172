"""Many clients at once: long and short prompts, cancellations, slow readers. `make load` runs them on SmolLM2.

python -m tests.serve.load --seconds 300 --clients 200
"""

import argparse
import asyncio
import json
import math
import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.serve.conftest import Server, eventually, serving

KINDS = {"stream": 4, "whole": 3, "cancelled": 2, "slow": 1}
"""What clients do, and how often."""
SUBJECTS = ("ships", "birds", "stars", "stones", "songs")
GROWTH = 1.05  # of the memory, after the warm-up
SLACK = 8 << 20


@dataclass
class Load:
    """Clients that send one request after the other.

    Attributes:
        server: the server.
        longest: maximum number of characters of a prompt.
        seconds: how long clients begin requests once the KV cache has been full.
        outcomes: how many requests were complete, cancelled by the client, or refused by a full queue.
        memory: the resident memory of the server's processes since the cache has been full.
    """

    server: Server
    longest: int
    seconds: float
    outcomes: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    _end: float = math.inf

    def run(self, clients: int) -> None:
        asyncio.run(self._run(clients))

    async def _run(self, clients: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            for number in range(clients):
                tasks.create_task(self._client(random.Random(number)))

    @property
    def _running(self) -> bool:
        return time.monotonic() < self._end

    async def _watch(self) -> None:
        """Wait until no page is free for the first time, then record the memory."""
        while (await asyncio.to_thread(self._pages))["free"]:
            await asyncio.sleep(0.2)
        self._end = time.monotonic() + self.seconds
        while self._running:
            self.memory.append(await asyncio.to_thread(resident, self.server.process.pid))
            await asyncio.sleep(0.5)

    async def _client(self, draws: random.Random) -> None:
        while self._running:
            (kind,) = draws.choices([*KINDS], [*KINDS.values()])
            subject = draws.choice(SUBJECTS)  # prompts share their beginnings
            text = f"This is a story about {subject}. " * (self.longest // 30)
            prompt = text[: round(math.exp(draws.uniform(0, math.log(self.longest))))] + str(draws.random())
            limit = draws.randint(1, 100)
            body = {"model": self.server.model, "prompt": prompt, "max_tokens": limit, "stream": kind != "whole"}
            outcome = await self._request(kind, {**body, "stream_options": {"include_usage": True}}, draws)
            self.outcomes[outcome] += 1
            if outcome == "refused":
                await asyncio.sleep(draws.uniform(0.5, 1.5))

    async def _request(self, kind: str, body: dict[str, Any], draws: random.Random) -> str:
        if not body["stream"]:
            del body["stream_options"]
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port, limit=1 << 12)
        try:
            head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
            writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode() + data)
            if kind == "cancelled" and draws.random() < 0.3:
                await asyncio.sleep(draws.uniform(0, 0.5))
                return "cancelled"
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            status = int(head.split()[1])
            if status == 429:
                assert "retry-after: " in head
                return "refused"
            assert status == 200, head + (await reader.read()).decode()
            events = []
            async for line in reader:
                if body["stream"] and not line.startswith(b"data: "):
                    continue
                events.append(line.removeprefix(b"data: ").strip())
                if kind == "cancelled" and draws.random() < 0.1:
                    return "cancelled"
                if kind == "slow":
                    await asyncio.sleep(0.05)
        finally:
            writer.close()
        check(body, events)
        return "complete"

    def check_memory(self) -> None:
        """Fail if the memory has grown after the first quarter of the time."""
        first = len(self.memory) // 4
        assert max(self.memory[first:]) < GROWTH * max(self.memory[:first]) + SLACK, self.memory

    def check_pages(self) -> None:
        """Fail if a page of the idle server's KV cache is in use, or is neither kept nor free."""
        name = self.server.model
        eventually(lambda: self.server.open_sequences(name) == 0)
        eventually(lambda: self._pages()["used"] == 0)
        pages = self._pages()
        assert sum(pages.values()) == self.server.cache_pages, pages
        metrics = self.server.request("/metrics").body.decode()
        for gauge in ("waiting", "decoding"):
            assert f'pentad_{gauge}_sequences{{model="{name}"}} 0.0' in metrics

    def _pages(self) -> dict[str, int]:
        lines = self.server.request("/metrics").body.decode().splitlines()
        values = (line.split('state="')[1].split('"} ') for line in lines if line.startswith("pentad_cache_pages{"))
        return {state: int(float(value)) for state, value in values}


def check(body: dict[str, Any], events: list[bytes]) -> None:
    """Fail if a reply is not complete."""
    if body["stream"]:
        assert events.pop() == b"[DONE]"
        chunks = [json.loads(event) for event in events]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
    else:
        chunks = [json.loads(b"".join(events))]
        choices = chunks[0]["choices"]
    usage = chunks[-1]["usage"]
    finish = choices[-1]["finish_reason"]
    assert finish in ("stop", "length"), chunks[-1]
    assert (usage["completion_tokens"] == body["max_tokens"]) or finish == "stop", usage


def resident(front: int) -> int:
    """Bytes of the resident memory of a server's processes."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(front)], capture_output=True, text=True).stdout.split()
    statuses = (Path(f"/proc/{pid}/status").read_text().splitlines() for pid in (front, *children))
    return sum(int(line.split()[1]) * 1024 for lines in statuses for line in lines if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    args = parser.parse_args()
    with serving("--model", args.model, "--max-queue", args.clients * 3 // 4, "--memory", "800MiB") as server:
        load = Load(server, 6000, args.seconds)
        load.run(args.clients)
        print(f"{load.outcomes}; memory {load.memory[0] / 1e6:.0f} to {load.memory[-1] / 1e6:.0f} MB")
        load.check_memory()
        load.check_pages()
    print("nothing was lost, the memory did not grow, and no page leaked")


if __name__ == "__main__":
    main()
