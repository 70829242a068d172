"""Compare attention with and without a sliding window, on random keys.

    python benchmarks/attention.py                        # 16,384 tokens, window 4,096; decoding at window 1,024
    python benchmarks/attention.py --heads 32 --kv-heads 8 --head-dim 128 --dtypes bfloat16

Prefill is reported as a ratio of medians within one run, in which the cases take turns, each at its best chunk size.
The same run checks rows against float64. Decoding measures one layer's cache and attention, not a model.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from pentad.nn.attention import attention
from pentad.nn.batch import SequenceLayout
from pentad.nn.cache import PagedCache

PAGE = 256
NEW = 32  # tokens decoded in one measurement
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # bounds of the largest difference
Inputs = tuple[Tensor, Tensor, Tensor]


def machine() -> str:
    """The machine's CPU, and the versions of Python and torch."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        cpu = {key.strip(): value.strip() for key, value in lines.items()}.get("model name", cpu)
    return f"{cpu}, {os.cpu_count()} CPUs; Python {platform.python_version()}, torch {torch.__version__}"


def random_rows(args: argparse.Namespace, tokens: int, dtype: torch.dtype) -> Inputs:
    """Queries [T, H, D], keys and values [T, G, D]."""
    heads = (args.heads, args.kv_heads, args.kv_heads)
    q, k, v = (torch.randn(tokens, count, args.head_dim, dtype=dtype) for count in heads)
    return q, k, v


def prefill(rows: Inputs, chunk: int, window: int | None) -> Tensor:
    """Compute a prompt's attention in chunks, each over all keys so far, as a model's layer does."""
    q, k, v = rows
    out = []
    for start in range(0, len(q), chunk):
        stop = min(start + chunk, len(q))
        queries, keys = SequenceLayout.of([stop - start]), SequenceLayout.of([stop])
        out.append(attention(q[start:stop], k[:stop], v[:stop], queries, keys, causal=True, window=window))
    return torch.cat(out)


def exact(q_HD: Tensor, k_KGD: Tensor, v_KGD: Tensor) -> Tensor:
    """Compute one query's attention over all keys in float64: [H, D]."""
    q_GRD = q_HD.double().unflatten(0, (k_KGD.shape[1], -1))
    scores_GRK = torch.einsum("grd,kgd->grk", q_GRD, k_KGD.double()) * q_HD.shape[-1] ** -0.5
    return torch.einsum("grk,kgd->grd", scores_GRK.softmax(-1), v_KGD.double()).flatten(0, 1)


def check(y_HD: Tensor, exact_HD: Tensor) -> None:
    difference = float((y_HD - exact_HD).abs().max())
    assert difference <= BOUNDS[y_HD.dtype], f"difference {difference}; expected at most {BOUNDS[y_HD.dtype]}"


def compare_prefill(args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Measure, check and print prefill; returns the speedup of the window."""
    rows, window = random_rows(args, args.tokens, dtype), args.window
    chunks = sorted({min(chunk, args.tokens) for chunk in args.chunks})
    cases = [(chunk, limit) for chunk in chunks for limit in (None, window)]
    times: dict[tuple[int, int | None], list[float]] = {case: [] for case in cases}
    for repeat in range(args.repeats + 1):
        for chunk, limit in cases:
            started = time.perf_counter()
            y = prefill(rows, chunk, limit)
            if repeat:
                times[chunk, limit].append(time.perf_counter() - started)
                continue
            q, k, v = rows  # the first repeat is a warm-up; check rows at the window's edge, in the middle, at the end
            for i in {0, 1, window - 1, window, len(q) // 2 + 1, len(q) - 1} & set(range(len(q))):
                visible = slice(max(0, i + 1 - (limit or len(q))), i + 1)
                check(y[i], exact(q[i], k[visible], v[visible]))
    print(f"\n| prefill of {args.tokens:,}, {name(dtype)}: seconds, median (best) | full | window {window:,} | ratio |")
    print("| --- | --- | --- | --- |")
    for chunk in chunks:
        print(f"| chunks of {chunk:,} {cells(times[chunk, None], times[chunk, window], 2)}")
    full, windowed = (min((times[chunk, limit] for chunk in chunks), key=statistics.median) for limit in (None, window))
    print(f"| each at its best chunk size {cells(full, windowed, 2)}")
    return statistics.median(full) / statistics.median(windowed)


def cells(full: list[float], windowed: list[float], digits: int) -> str:
    texts = [f"{statistics.median(x):.{digits}f} ({min(x):.{digits}f})" for x in (full, windowed)]
    return f"| {texts[0]} | {texts[1]} | {statistics.median(full) / statistics.median(windowed):.2f} |"


class Decoder:
    """One sequence of random tokens in a cache of one layer."""

    def __init__(self, args: argparse.Namespace, dtype: torch.dtype, window: int | None) -> None:
        self.window = window
        self.cache = PagedCache(1, args.kv_heads, args.head_dim, dtype=dtype, page_size=PAGE, window=window)
        self.sequence = self.cache.open()
        self.q, self.k, self.v = random_rows(args, NEW, dtype)
        self.tokens: list[int] = []  # the row of k and v of each cached token

    def step(self, rows: range) -> Tensor:
        """Append tokens, and compute the attention of the last one."""
        batch = self.cache.batch([(self.sequence, len(rows))])
        assert batch.kv is not None
        here = slice(rows.start, rows.stop)
        k, v = batch.kv.write(0, self.k[here], self.v[here])
        q = self.q[rows.stop - 1 : rows.stop]
        y = attention(q, k, v, SequenceLayout.of([1]), batch.kv, causal=True, window=self.window)
        self.cache.advance(self.sequence, len(rows))
        self.tokens += rows
        return y[0]

    def fill(self, length: int) -> None:
        while (count := min(NEW, length - self.sequence.length)) > 0:
            self.step(range(count))

    def decode(self) -> float:
        """Reserve, write and attend to NEW tokens one by one, and check the last; returns microseconds a token."""
        started = time.perf_counter()
        for i in range(NEW):
            y = self.step(range(i, i + 1))
        seconds = time.perf_counter() - started
        visible = self.tokens[-(self.window or 0) :]
        check(y, exact(self.q[-1], self.k[visible], self.v[visible]))
        return 1e6 * seconds / NEW


def compare_decoding(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print time and memory by the number of cached tokens; each measurement adds NEW tokens."""
    window = args.decode_window
    print(
        f"\n| decoding, {name(dtype)}, pages of {PAGE}: tokens before | full: µs a token, median (best) | window"
        f" {window:,} | ratio | full: cache, KiB | window | ratio |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    decoders = [Decoder(args, dtype, None), Decoder(args, dtype, window)]
    for tokens in (window // 4, *(window << i for i in range(4))):
        times: list[list[float]] = [[], []]
        for decoder in decoders:
            decoder.fill(tokens)
        sizes = [decoder.cache.nbytes // 1024 for decoder in decoders]
        for repeat in range(args.decode_repeats + 1):
            for decoder, measured in zip(decoders, times, strict=True):
                microseconds = decoder.decode()
                if repeat:  # the first repeat is a warm-up
                    measured.append(microseconds)
        ratio = f"{sizes[0]:,} | {sizes[1]:,} | {sizes[0] / sizes[1]:.2f} |"
        print(f"| {tokens:,} {cells(*times, 0)} {ratio}")


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def dtypes(text: str) -> list[torch.dtype]:
    return [getattr(torch, each) for each in text.split(",")]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384, help="of the prompt")
    parser.add_argument("--window", type=int, default=4096, help="at prefill")
    parser.add_argument("--chunks", type=numbers, default="512,4096,16384", help="of the prompt, in tokens")
    parser.add_argument("--decode-window", type=int, default=1024)
    parser.add_argument("--dtypes", type=dtypes, default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode-repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(machine())
    print(
        f"{args.heads} heads, {args.kv_heads} of keys and values, of {args.head_dim}; {args.threads} threads,"
        f" {args.repeats} repeats ({args.decode_repeats} of {NEW} tokens at decoding)"
    )
    ratios = {name(dtype): compare_prefill(args, dtype) for dtype in args.dtypes}
    for dtype in args.dtypes:
        compare_decoding(args, dtype)
    print(f"\nprefill with the window: {', '.join(f'{ratio:.2f} x as fast in {key}' for key, ratio in ratios.items())}")


if __name__ == "__main__":
    main()
