"""``pentad bench``: how fast a model prefills and decodes on this machine, measured as llama-bench does."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.cli.paths import model_names
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.generate import LanguageModel
    from pentad.generate.step import Step
    from pentad.nn.cache import CachedSequence

ModelArgument = Annotated[
    str | None, Argument(metavar="MODEL", help="The same as --model MODEL.", autocompletion=model_names)
]
Prompt = Annotated[str, Option(metavar="N,…", help="Prefill prompts of N tokens; 0: skip.")]
Generate = Annotated[str, Option(metavar="N,…", help="Decode N tokens, one at a time; 0: skip.")]
BatchSizes = Annotated[str, Option(metavar="N,…", help="Run N sequences at once.")]
Depths = Annotated[str, Option(metavar="N,…", help="Begin with N tokens in the KV cache.")]
Repeat = Annotated[int, Option(min=1, max=1000, metavar="N", help="Measure N times.")]

_LINE = "{:8}{:>6}{:>7}{:>11}   {}"


@dataclass(frozen=True)
class Case:
    """One measurement: `batch` sequences of `depth` cached tokens each get `tokens` more."""

    prefill: bool
    tokens: int
    batch: int
    depth: int

    @property
    def name(self) -> str:
        """As llama-bench writes it: pp512, tg64."""
        return f"{'pp' if self.prefill else 'tg'}{self.tokens}"


@dataclass(frozen=True)
class Row:
    """A result, in tokens per second summed over the sequences."""

    model: str
    test: str
    batch: int
    depth: int
    tokens_per_second: float
    slowest: float
    fastest: float
    repeat: int
    threads: int
    dtype: str
    device: str
    runs: str


def bench(
    model_argument: ModelArgument = None,
    *,
    loading: o.Loading,
    prompt: Prompt = "512",
    generate: Generate = "128",
    batch: BatchSizes = "1",
    depth: Depths = "0",
    repeat: Repeat = 3,
    as_json: o.Json = False,
) -> None:
    """Measure how fast a model is on this machine.

    The tests have llama-bench's names and defaults: pp512 is a prefill of 512 tokens, tg128 decodes 128
    tokens one at a time. Speeds are tokens per second: the median, the slowest and the fastest run.

    --prompt, --generate, --batch and --depth take numbers separated by commas. Every combination is
    measured, after one warm-up run.

    JSON lines: model, test, batch, depth, tokens_per_second, slowest, fastest, repeat, threads,
    dtype, device, runs (by the kernels, or as plain torch and why).
    """
    lengths = [(True, n) for n in _numbers("--prompt", prompt, least=0) if n]
    lengths += [(False, n) for n in _numbers("--generate", generate, least=0) if n]
    grid = product(_numbers("--batch", batch, least=1), _numbers("--depth", depth, least=0), lengths)
    cases = [Case(prefill, tokens, size, deep) for size, deep, (prefill, tokens) in grid]
    if not cases:
        raise BadInput("there is nothing to measure: --prompt and --generate are both 0")
    loaded = replace(loading, model=model_argument or loading.model).load_decoder_only("be measured")
    longest = max(case.depth + case.tokens for case in cases)
    if longest > loaded.context_length:
        raise BadInput(f"{longest} tokens don't fit the context of {loaded.context_length}")
    _check_memory(loaded, cases)
    if not as_json:
        output.write(_LINE.format("test", "batch", "depth", "tokens/s", "slowest to fastest") + "\n")
    for row in _measure(loaded, cases, repeat):
        if as_json:
            output.write_json(asdict(row))
        else:
            _write_row(row)


def _check_memory(model: LanguageModel, cases: list[Case]) -> None:
    """Raise BadInput if a case needs more memory than there is, for its KV cache and logits."""
    from pentad.memory import available_memory

    available = available_memory(model.network.device)
    for case in cases:
        logits = 4 * model.network.config.vocab_size
        needed = case.batch * (model.step.cache.bytes_for(case.depth + case.tokens) + logits)
        if available is not None and needed > available:
            needs = f"{output.size(needed)} of KV cache and logits; {output.size(available)} of memory are available"
            raise BadInput(f"{case.name} with --batch {case.batch} needs {needs}")


def _numbers(option: str, text: str, *, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(n >= least for n in numbers):
        raise BadInput(f"{option} is {text!r}; expected whole numbers from {least}, separated by commas: 128,512")
    return numbers


def _write_row(row: Row) -> None:
    spread = f"{row.slowest:.1f} to {row.fastest:.1f}"
    columns = (row.test, row.batch, row.depth, f"{row.tokens_per_second:.1f}", spread)
    output.write(_LINE.format(*columns) + "\n")


def _measure(model: LanguageModel, cases: list[Case], repeat: int) -> Iterator[Row]:
    """Measure each case in turn, after a warm-up run."""
    import torch

    step = model.step
    vocabulary: int = model.network.config.vocab_size
    for case in cases:
        seconds = [_run(step, case, vocabulary) for _ in range(1 + repeat)][1:]
        tokens = case.batch * case.tokens
        yield Row(
            model=model.name,
            test=case.name,
            batch=case.batch,
            depth=case.depth,
            tokens_per_second=tokens / median(seconds),
            slowest=tokens / max(seconds),
            fastest=tokens / min(seconds),
            repeat=repeat,
            threads=torch.get_num_threads(),
            dtype=str(model.network.dtype).removeprefix("torch."),
            device=str(model.network.device),
            runs=step.backend,
        )


def _run(step: Step, case: Case, vocabulary: int) -> float:
    """Seconds that a case takes on random tokens, without the prefill of its depth."""
    random = Random(0)
    sequences = [step.cache.open(case.depth + case.tokens) for _ in range(case.batch)]
    for sequence in sequences:
        step.cache.reserve(sequence, case.depth + case.tokens)

    def draw(count: int) -> list[tuple[CachedSequence, list[int]]]:
        return [(sequence, random.choices(range(vocabulary), k=count)) for sequence in sequences]

    _prefill(step, draw(case.depth))
    work = draw(case.tokens)
    started = time.perf_counter()
    if case.prefill:
        _prefill(step, work)
    else:
        rows = range(case.batch)
        for i in range(case.tokens):
            step([(sequence, ids[i : i + 1]) for sequence, ids in work], rows).sum().item()
    seconds = time.perf_counter() - started
    for sequence in sequences:
        step.cache.close(sequence)
    return seconds


def _prefill(step: Step, prompts: list[tuple[CachedSequence, list[int]]]) -> None:
    """Run prompts in steps as large as the engine's; each prompt's last row gives logits."""
    max_tokens = step.batched_tokens
    waiting = deque((sequence, ids) for sequence, ids in prompts if ids)
    while waiting:
        work: list[tuple[CachedSequence, list[int]]] = []
        last_rows: list[int] = []
        row = 0
        while waiting and row < max_tokens:
            sequence, ids = waiting.popleft()
            now, later = ids[: max_tokens - row], ids[max_tokens - row :]
            work.append((sequence, now))
            row += len(now)
            if later:
                waiting.appendleft((sequence, later))
            else:
                last_rows.append(row - 1)
        step(work, last_rows).sum().item()  # waits for a GPU
