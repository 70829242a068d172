"""Run engines in separate processes, and time whole processes.

Two OpenMP runtimes in one process would compete for cores.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SPAWN = multiprocessing.get_context("spawn")


def serve(pipe: Connection, make: Callable[..., Any], arguments: Sequence[Any], options: dict[str, Any]) -> None:
    """Make an engine and answer calls until None arrives; runs in the engine's process."""
    engine = make(*arguments, **options)
    pipe.send(engine.load_seconds)
    while (call := pipe.recv()) is not None:
        method, *arguments = call
        pipe.send(getattr(engine, method)(*arguments))


class Remote:
    """An engine in a separate process."""

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        self.name = name
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=serve, args=(theirs, make, arguments, options), daemon=True)
        self._process.start()
        theirs.close()
        self.load_seconds: float = self._pipe.recv()

    def __call__(self, *call: Any) -> Any:
        self._pipe.send(call)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def in_a_process(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function in a new process, so that this process doesn't load its libraries.

    Raises:
        RuntimeError: the process failed.
    """
    process = SPAWN.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} failed")


def _spin() -> None:
    while True:
        pass


@contextmanager
def competitors(count: int) -> Iterator[None]:
    """Run `count` processes that each keep a core busy."""
    busy = [SPAWN.Process(target=_spin, daemon=True) for _ in range(count)]
    for process in busy:
        process.start()
    try:
        yield
    finally:
        for process in busy:
            process.kill()


CHAT = "pentad chat hi --max-tokens 1"
IMPORT = 'python -c "import torch"'


def time_commands(model: Path, threads: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of whole processes, which take turns: one token of chat, and importing torch, which chat includes."""
    pentad = [sys.executable, "-m", "pentad", "chat", "hi", "--max-tokens", "1", "--temperature", "0"]
    commands = {
        CHAT: [*pentad, "--model", str(model), "--threads", str(threads)],
        IMPORT: [sys.executable, "-c", "import torch"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}  # the first run fills the disk cache
