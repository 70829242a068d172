"""Benchmark pentad's server and llama.cpp's on one GGUF, with equal requests, context and threads.

    scripts/llama-server                            # compile llama.cpp's server
    python benchmarks/serve.py
    python benchmarks/serve.py --parts burst,steady --repeats 3

The servers take turns, and ratios are of medians within one run. The same run checks that each greedy reply of pentad's
server is the reply that the model gives alone. "Q4_0" is the same model, requantized by llama.cpp. Both of llama.cpp's
servers run with one slot per chat, a unified KV cache and the prompt cache.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from hardware import CALM, machine
from processes import Remote
from results import report
from servers import Message, Reply, Server, llama_server, pentad_server

ROOT = Path(__file__).parent.parent
PENTAD, LLAMA, BEST = "pentad", "llama.cpp", "llama.cpp Q4_0"
PEERS = (LLAMA, BEST)
PARTS = ("burst", "steady", "newcomer", "turns", "overhead")
CHATS, NEW = 16, 128
SYSTEM_TOKENS, LONG_TOKENS = 500, 2000
OTHERS, OTHERS_NEW, OTHERS_FIRST = 8, 200, 50  # chats beside a newcomer, their tokens, and those before it comes
STEADY, SHARE = 24, 0.6  # arrivals, and their rate as a share of what llama.cpp can serve
CONTEXT = 2304 * CHATS
TOPICS = (
    *("a lighthouse", "a fox", "a river", "a clockmaker", "a comet", "a baker", "a forest", "an old bridge"),
    *("a violin", "a whale", "a desert", "a library", "a storm", "a gardener", "a train", "an island"),
)
BURST, WARM, FIRST = "tokens/s, 16 chats, cold", "tokens/s, 16 chats, prompt cached", "p95 first token, 16 chats, cold"
ARRIVALS = "p95 first token, arrivals"
SERVED, ENGINE = "tokens/s, 16 chats, beside the engine", "tokens/s, the engine without server"
ONE, STREAM = "tokens/s, one chat", "tokens/s, model.stream"
GAP, GAPS = "longest gap beside a newcomer", "median gap before it"
COLD, SECOND = "first token of 2,000 tokens", "first token of the second turn"
AIMS = {WARM: ">= 4 / 2.2", BURST: ">= 4 / 2.2", FIRST: "<= 0.1", ARRIVALS: "<= 0.3"}
"""Row -> aim as a multiple of llama.cpp on the file / on Q4_0."""
RATIOS = [
    ("longest gap / median gap", GAP, GAPS, "<= 3"),
    ("second turn / cold prefill", SECOND, COLD, "<= 0.1"),
    ("server / engine, 16 chats", SERVED, ENGINE, ">= 0.9"),
    ("server / model.stream, one chat", ONE, STREAM, ">= 0.95"),
]
"""(label, row, row that it is divided by, aim), of pentad alone."""
Results = dict[str, dict[str, list[float]]]
"""Row -> server -> the values of each repeat."""


class Texts:
    """The servers' inputs.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        ids = tokenizer.encode((ROOT / "LICENSE").read_text())
        self._system = tokenizer.decode(ids[:SYSTEM_TOKENS])
        self._long = tokenizer.decode(ids[: LONG_TOKENS - 60])

    def chats(self, session: str) -> list[list[Message]]:
        """16 chats with one system prompt, which no other session has."""
        system = {"role": "system", "content": f"Session {session}. You know this license:\n{self._system}"}
        return [[system, user(f"Write a long and detailed story about {topic}.")] for topic in TOPICS]

    def long(self, session: str) -> list[Message]:
        """A chat that begins with 2,000 tokens."""
        return [user(f"Session {session}. Explain this license in detail:\n{self._long}")]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


class Bare:
    """The engine that the server runs, and `model.stream`, without a server."""

    def __init__(self, path: str, threads: int, cache_bytes: int) -> None:
        import torch  # noqa: F401 - imported first, so that load_seconds excludes the import

        import pentad
        from pentad.generate.engine import Engine, EngineConfig

        started = time.perf_counter()
        self.model = pentad.load(path, threads=threads)
        self.engine = Engine(pentad.load(path, threads=threads).step, EngineConfig(max_cache_bytes=cache_bytes))
        self.load_seconds = time.perf_counter() - started

    def burst(self, chats: Sequence[Sequence[Message]]) -> float:
        """Tokens per second of greedy replies to all chats together."""
        import torch

        from pentad.generate.requests import Generation

        sampling, ends = self.model.sampling.replace(temperature=0), frozenset(self.model.tokenizer.eos_ids)
        prompts = [self.model.chat_ids(chat) for chat in chats]
        started, count = time.perf_counter(), 0
        for ids in prompts:
            options = {"sampling": sampling, "generator": torch.Generator(), "max_tokens": NEW, "end_ids": ends}
            self.engine.submit(Generation(ids, **options))
        while self.engine.requests:
            count += sum(event.token_id is not None for event in self.engine.step())
        return count / (time.perf_counter() - started)

    def alone(self, chat: Sequence[Message]) -> tuple[str, float]:
        """The greedy reply to a chat, and its tokens per second after the first one."""
        with self.model.stream(chat, max_tokens=NEW, temperature=0) as stream:
            for _ in stream:
                pass
            done = stream.completion
        return done.text, (done.completion_tokens - 1) / done.seconds["decode"]


def p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20, method="inclusive")[-1]


async def together(server: Server, chats: Sequence[Sequence[Message]], delays: Sequence[float] = ()) -> list[Reply]:
    """Stream the replies to all chats, each sent after its delay."""

    async def one(chat: Sequence[Message], delay: float) -> Reply:
        await asyncio.sleep(delay)
        return await server.chat(chat, NEW)

    pauses = delays or [0.0] * len(chats)
    return [reply.parse() for reply in await asyncio.gather(*map(one, chats, pauses))]


async def beside(server: Server, chats: Sequence[Sequence[Message]], long: Sequence[Message]) -> tuple[float, float]:
    """The median gap of some chats before a long prompt comes, and their longest gap while it is prefilled."""
    tasks = [asyncio.create_task(server.chat(chat, OTHERS_NEW)) for chat in chats[:OTHERS]]
    pilot = asyncio.create_task(server.chat(chats[OTHERS], OTHERS_FIRST))
    await pilot
    newcomer = (await server.chat(long, 2)).parse()
    others = [(await task).parse() for task in tasks]
    gaps = [(start, end - start) for other in others for start, end in zip(other.times, other.times[1:], strict=False)]
    steady = median(gap for start, gap in gaps if newcomer.sent - 0.5 < start < newcomer.sent - gap)
    return steady, max(gap for start, gap in gaps if newcomer.sent - gap < start < newcomer.times[0])


def speed(replies: Sequence[Reply]) -> float:
    """Tokens per second of all replies together."""
    seconds = max(reply.times[-1] for reply in replies) - min(reply.sent for reply in replies)
    return sum(reply.tokens for reply in replies) / seconds


class Run:
    """The measurements.

    Args:
        servers: they take turns.
        bare: the engine without a server.
        texts: the inputs.
    """

    def __init__(self, servers: Sequence[Server], bare: Remote, texts: Texts) -> None:
        self.servers, self.bare, self.texts = servers, bare, texts
        self.results: Results = {}
        self.replies: dict[str, tuple[list[Message], str]] = {}  # pentad's, by session and chat

    def add(self, row: str, name: str, value: float) -> None:
        self.results.setdefault(row, {}).setdefault(name, []).append(value)

    def each(self, measure: Callable[[Server], None]) -> None:
        for server in self.servers:
            time.sleep(CALM)
            measure(server)

    def keep(self, server: Server, chats: Sequence[list[Message]], replies: Sequence[Reply]) -> None:
        if server.name == PENTAD:
            self.replies |= {str(c): (c, reply.text) for c, reply in zip(chats, replies, strict=True)}

    def burst(self, repeat: int) -> None:
        chats, cold = self.texts.chats(f"burst {repeat}"), {}

        def measure(server: Server) -> None:
            replies = asyncio.run(together(server, chats))
            self.keep(server, chats, replies)
            self.add(BURST if server.name not in cold else WARM, server.name, speed(replies))
            if server.name not in cold:
                self.add(FIRST, server.name, p95([reply.first for reply in replies]))
            cold[server.name] = True

        self.each(measure)
        self.each(measure)

    def steady(self, repeat: int) -> None:
        known = self.results.get(WARM, {}).get(LLAMA, [200.0])
        rate = SHARE * median(known) / NEW
        draws = random.Random(repeat)
        delays = [0.0]
        while len(delays) < STEADY:
            delays.append(delays[-1] + draws.expovariate(rate))
        chats = (self.texts.chats("steady") * 2)[:STEADY]

        def measure(server: Server) -> None:
            if not repeat:
                asyncio.run(together(server, chats[:1]))  # the system prompt is known
            replies = asyncio.run(together(server, chats, delays))
            self.keep(server, chats, replies)
            self.add(ARRIVALS, server.name, p95([reply.first for reply in replies]))

        self.each(measure)

    def newcomer(self, repeat: int) -> None:
        chats, long = self.texts.chats(f"others {repeat}"), self.texts.long(f"newcomer {repeat}")

        def measure(server: Server) -> None:
            steady, longest = asyncio.run(beside(server, chats, long))
            self.add(GAPS, server.name, steady)
            self.add(GAP, server.name, longest)

        self.each(measure)

    def turns(self, repeat: int) -> None:
        chat = self.texts.long(f"turns {repeat}")

        def measure(server: Server) -> None:
            (first,) = asyncio.run(together(server, [chat]))
            more = [*chat, {"role": "assistant", "content": first.text}, user("Thank you. Now write one sentence.")]
            (second,) = asyncio.run(together(server, [more]))
            self.add(COLD, server.name, first.first)
            self.add(SECOND, server.name, second.first)

        self.each(measure)

    def overhead(self, repeat: int) -> None:
        chats, server = self.texts.chats("overhead"), self.servers[0]
        if not repeat:
            asyncio.run(together(server, chats))
            self.bare("burst", chats)
        for _ in range(3):
            time.sleep(CALM)
            self.add(SERVED, PENTAD, speed(asyncio.run(together(server, chats))))
            time.sleep(CALM)
            self.add(ENGINE, PENTAD, self.bare("burst", chats))
            time.sleep(CALM)
            (reply,) = asyncio.run(together(server, chats[:1]))
            self.add(ONE, PENTAD, (reply.tokens - 1) / (reply.times[-1] - reply.times[0]))
            time.sleep(CALM)
            self.add(STREAM, PENTAD, self.bare("alone", chats[0])[1])

    def check(self) -> int:
        """Compare pentad's replies with those of the model alone; returns how many there were."""
        for chat, text in self.replies.values():
            alone, _ = self.bare("alone", chat)
            assert text == alone, f"the server's reply differs:\n{text!r}\n{alone!r}"
        return len(self.replies)


def show(run: Run, names: Sequence[str], printed: int) -> None:
    results = run.results
    print(f"{'median':38}" + "".join(f"{name:>17}" for name in names))
    for row, by_name in results.items():
        form = "{:.0f}" if row.startswith("tokens") else "{:.3f} s"
        cells = [form.format(median(by_name[name])) if name in by_name else "" for name in names]
        print(f"{row:38}" + "".join(f"{cell:>17}" for cell in cells))
    print(f"\n{'times llama.cpp on the file / on Q4_0':38}{'measured':>17}{'aim':>14}")
    for row, aim in AIMS.items():
        if row in results:
            ours = median(results[row][PENTAD])
            measured = " / ".join(f"{ours / median(results[row][peer]):.3g}" for peer in PEERS if peer in names)
            for peer in set(PEERS) & set(names):
                ratio = ours / median(results[row][peer])
                report(f"server: {row}", peer, ratio if row.startswith("tokens") else 1 / ratio)
            print(f"{row:38}{measured:>17}{aim:>14}")
    for label, above, below, aim in RATIOS:
        if above in results:
            pairs = zip(results[above][PENTAD], results[below][PENTAD], strict=True)
            print(f"{label:38}{median(a / b for a, b in pairs):>17.3f}{aim:>14}")
    peak = run.servers[0].peak()
    print(f"{'peak memory / announced':38}{peak / printed:>17.2f}{'<= 1.2':>14}")
    print(f"\npentad's server took {peak / 1e6:.0f} MB of {printed / 1e6:.0f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a GGUF file; SmolLM2 by default")
    parser.add_argument("--llama", type=Path, default=ROOT / "build/llama", help="the folder with llama-server")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", default="1GiB", help="pentad's memory")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--servers", default=",".join((PENTAD, *PEERS)), help="which; pentad is always one")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    import pentad.text
    import pentad.weights
    from pentad.weights.registry import locate

    path, names = Path(locate(args.model)).resolve(), args.servers.split(",")
    tokenizer = pentad.text.load(pentad.weights.open(path))
    print(machine("torch", "uvicorn"))
    print(f"{path.name}, {args.threads} threads, {args.repeats} repeats, {args.parts}\n", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = [stack.enter_context(pentad_server(PENTAD, path, args.threads, args.memory))]
        options = ("-np", str(CHATS), "-kvu", "-c", str(CONTEXT))
        if LLAMA in names:
            servers.append(
                stack.enter_context(llama_server(LLAMA, args.llama / "llama-server", path, args.threads, *options))
            )
        if BEST in names:
            requantize(args.llama, path, folder / "q4_0.gguf")
            server = llama_server(BEST, args.llama / "llama-server", folder / "q4_0.gguf", args.threads, *options)
            servers.append(stack.enter_context(server))
        run = Run(servers, Remote("bare", Bare, str(path), args.threads, 1 << 29), Texts(tokenizer))
        for repeat in range(args.repeats):
            for part in args.parts.split(","):
                getattr(run, part)(repeat)
        checked = run.check()
        show(run, [server.name for server in servers], servers[0].ready["memory_bytes"])
        print(f"{checked} greedy replies of pentad's server are those of the model alone")
        run.bare.close()


def requantize(folder: Path, source: Path, target: Path) -> None:
    command = [str(folder / "llama-quantize"), "--allow-requantize", str(source), str(target), "q4_0"]
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
