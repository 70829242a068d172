"""Draw docs/streams.png: when the tokens of 16 chats arrive that one server streams at once.

python docs/streams.py
"""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
from openai import AsyncOpenAI

CLIENTS = 16
PAUSE = 0.1  # seconds between the first requests of two clients
SYSTEM = "You are a helpful assistant. " * 40
QUESTIONS = ("Why is the sky blue?", "How does a bicycle stay upright?", "What is a prime number?", "Why do cats purr?")


async def chat(client: AsyncOpenAI, number: int, started: float) -> tuple[float, list[float]]:
    """The times of the request and of the reply's pieces, in seconds since the start."""
    await asyncio.sleep(number * PAUSE)
    asked = time.perf_counter() - started
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
    stream = await client.chat.completions.create(
        model="smollm2", messages=messages, max_tokens=40 + 5 * (number % 7), seed=number, stream=True
    )
    return asked, [time.perf_counter() - started async for chunk in stream if chunk.choices[0].delta.content]


async def all_chats(url: str) -> list[tuple[float, list[float]]]:
    client = AsyncOpenAI(base_url=url, api_key="none")
    warm = await client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "hi"}], max_tokens=2
    )
    assert warm.choices
    started = time.perf_counter()
    return await asyncio.gather(*(chat(client, number, started) for number in range(CLIENTS)))


def main() -> None:
    command = [sys.executable, "-m", "pentad", "serve", "--model", "smollm2", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            chats = asyncio.run(all_chats(json.loads(server.stdout.readline())["url"]))
        finally:
            server.terminate()
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for number, (asked, times) in enumerate(chats):
        axes.plot([asked, times[-1]], [number, number], color="#d8dee9", linewidth=5, solid_capstyle="butt", zorder=1)
        axes.scatter(times, [number] * len(times), s=5, color="#2e5f8a", zorder=2)
        axes.scatter([asked], [number], s=14, marker="|", color="#b04a2f", zorder=3)
    tokens, last = sum(len(times) for _, times in chats), max(times[-1] for _, times in chats)
    axes.set(
        xlabel="seconds",
        ylabel="client",
        yticks=range(0, CLIENTS, 5),
        xlim=(0, None),
        title=f"{CLIENTS} chats of one server: requests (red) and tokens; {tokens} tokens in {last:.1f} s",
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("streams.png"), dpi=130)


if __name__ == "__main__":
    main()
