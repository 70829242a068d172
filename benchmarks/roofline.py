"""The time of each operation of a step, compared with the machine's memory bandwidth and int8 throughput.

    python benchmarks/roofline.py                       # SmolLM2, 2 threads: decode of 1 and 8, prefill of 512
    python benchmarks/roofline.py --fast --plot out.png

Every step runs three times, with the same result each time: as one call; operation by operation, each as a separate
call in the plan's order, so that CPU caches are in the same state as in a step; and as empty calls, whose time is
subtracted. Each byte of weights, keys, values and input rows is counted once.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))
from hardware import machine, products, streaming
from operations import bytes_read, multiply_adds, name, operations, token_bytes

import pentad
from pentad.kernels import program
from pentad.kernels.binding import COp, CStep, library

OPERATIONS = 2  # per multiply-add


@dataclass
class Timed:
    """A stand-in for the kernel library that times every call."""

    whole: list[float] = field(default_factory=list)
    empty: list[float] = field(default_factory=list)
    by_op: list[list[float]] = field(default_factory=list)
    ops: list[COp] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    multiply_adds: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)

    def pentad_run(self, ops: ctypes.Array[COp], count: int, step: CStep) -> None:
        def run(first_op: Any, number: int) -> float:
            started = time.perf_counter()
            library().pentad_run(first_op, number, step)
            return time.perf_counter() - started

        first = not self.ops
        if first:
            self.ops, self.by_op = list(ops), [[] for _ in ops]
        self.whole.append(run(ops, count))
        for op, seconds in zip(ops, self.by_op, strict=True):
            seconds.append(run(ctypes.byref(op), 1))
            self.empty.append(run(ops, 0))
            if first:
                self.bytes.append(bytes_read(op, step))
                self.multiply_adds.append(multiply_adds(op, step))
                self.chunks.append(library().pentad_chunks(ctypes.byref(op), ctypes.byref(step)))

    def pentad_buffer_sizes(self, *arguments: Any) -> None:
        library().pentad_buffer_sizes(*arguments)

    @contextmanager
    def replacing_library(self) -> Iterator[None]:
        with mock.patch.object(program, "library", return_value=self):
            yield


@dataclass
class Part:
    """The operations of one name: their number and their totals in one step."""

    name: str
    count: int = 0
    seconds: float = 0.0
    bytes: int = 0
    multiply_adds: int = 0
    parallel: int = 0  # operations that run on several threads


def parts(timed: Timed) -> list[Part]:
    found: dict[str, Part] = {}
    empty = median(timed.empty)
    for op, seconds, nbytes, work, chunks in zip(
        timed.ops, timed.by_op, timed.bytes, timed.multiply_adds, timed.chunks, strict=True
    ):
        part = found.setdefault(name(op), Part(name(op)))
        part.count += 1
        part.seconds += max(0.0, median(seconds) - empty)
        part.bytes += nbytes
        part.multiply_adds += work
        part.parallel += chunks > 1
    return list(found.values())


def measure(model: pentad.LanguageModel, past: int, sequences: int, tokens: int, repeats: int) -> Timed:
    """Time steps of `sequences` sequences that each have `past` tokens and add `tokens`."""
    step, timed = model.step, Timed()
    opened = [step.cache.open(past + tokens) for _ in range(sequences)]
    ids = [[100 + (7 * i + 1) * j % 5000 for j in range(past + tokens)] for i in range(sequences)]

    def repeat() -> None:
        for sequence in opened:
            step.cache.truncate(sequence, past)
        work = [(sequence, each[past:]) for sequence, each in zip(opened, ids, strict=True)]
        step(work, [tokens * (i + 1) - 1 for i in range(sequences)])

    for sequence, each in zip(opened, ids, strict=True):
        if past:
            step([(sequence, each[:past])], [past - 1])
    repeat()  # warm-up
    with timed.replacing_library():
        for _ in range(repeats):
            repeat()
    for sequence in opened:
        step.cache.close(sequence)
    return timed


def show(title: str, timed: Timed, bandwidth: float, int8: float) -> list[Part]:
    found, whole = parts(timed), median(timed.whole)
    print(f"\n{title}: {whole * 1e3:.2f} ms")
    print(f"{'':16}{'times':>6}{'µs':>9}{'share':>7}{'MB read':>9}{'GB/s':>7}{'of peak':>8}{'GOP/s':>8}{'of peak':>8}")
    rest = Part("overhead", seconds=whole - sum(part.seconds for part in found))
    total = Part("in one call", seconds=whole, bytes=sum(p.bytes for p in found))
    total.multiply_adds, total.count = sum(p.multiply_adds for p in found), len(timed.ops)
    for part in (*found, rest, total):
        times = f"{part.count}" if part.count else ""
        line = f"{part.name:16}{times:>6}{part.seconds * 1e6:9.1f}{part.seconds / whole:7.1%}"
        if part.seconds > 0 and part.bytes:
            rate = part.bytes / part.seconds
            line += f"{part.bytes / 1e6:9.2f}{rate / 1e9:7.1f}{rate / bandwidth:8.0%}"
            if part.multiply_adds:
                rate = OPERATIONS * part.multiply_adds / part.seconds
                line += f"{rate / 1e9:8.0f}" + (f"{rate / int8:8.0%}" if part.name != "attend" else "")
        print(line)
    parallel = sum(part.parallel for part in found)
    print(f"{parallel} of {len(timed.ops)} operations run on several threads; an empty call takes "
          f"{median(timed.empty) * 1e6:.2f} µs")  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a model that the kernels run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--past", type=int, default=64, help="tokens before the decoded ones")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--fast", action="store_true", help="one int8 term for activations instead of two")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also write a plot")
    args = parser.parse_args()
    model = pentad.load(args.model, threads=args.threads, fast=args.fast)
    nbytes = token_bytes(operations(model.step))
    if not nbytes:
        parser.error(f"{args.model} runs in plain torch; expected a model that the kernels run")
    # The hardware multiplies bytes. In the exact form each multiply-add of the model takes two such products.
    terms = 1 if args.fast else 2
    vnni = OPERATIONS * products(args.threads, "int8", "AVX512_CORE_VNNI")
    float32 = OPERATIONS * products(args.threads, "float32")
    stream, streams = streaming(nbytes), list[float]()
    measured: dict[str, Timed] = {}
    for title, past, sequences, tokens, repeats in (
        ("decode, batch 1", args.past, 1, 1, args.repeats),
        ("decode, batch 8", args.past, 8, 1, args.repeats),
        ("prefill of 512", 0, 1, 512, max(3, args.repeats // 10)),
    ):
        streams += [stream() for _ in range(3)]
        measured[title] = measure(model, past, sequences, tokens, repeats)
        streams += [stream() for _ in range(3)]
    bandwidth = nbytes / min(streams)
    form = "one int8 term" if args.fast else "two int8 terms"
    caption = f"{args.model}, {args.threads} threads, activations in {form}; {nbytes / 1e6:.0f} MB of weights a token"
    print(f"{machine('torch')}\n{caption}")
    print(
        f"memory bandwidth {bandwidth / 1e9:.1f} GB/s (as many bytes, read by torch), compute"
        f" {vnni / terms / 1e9:.0f} GOP/s in {form} and {float32 / 1e9:.0f} in float32 (oneDNN, without AMX)"
    )
    shown = {title: show(title, timed, bandwidth, vnni / terms) for title, timed in measured.items()}
    if args.plot:
        import roofline_plot

        roofs = {"one int8 term (--fast)": vnni, "two int8 terms": vnni / 2, "float32 (attention)": float32}
        roofline_plot.draw(args.plot, shown, bandwidth, roofs, "Roofline of each operation of a step", caption)


if __name__ == "__main__":
    main()
