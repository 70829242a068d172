"""Benchmark pentad, llama.cpp and transformers on one GGUF, with equal prompts, context and threads.

    python benchmarks/decode.py                     # SmolLM2, 2 threads
    python benchmarks/decode.py --threads 4 --repeats 9 --model FILE.gguf
    python benchmarks/decode.py --shape mistral --type q4_k    # random weights of that model's layer sizes

Speed is reported as a ratio of medians within one run, in which the engines take turns. The same run checks logits
against float32 on the dequantized weights, within the bounds of docs/benchmarks.md. "Q4_0" is the same model,
requantized by llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import engines
import record
from hardware import CALM, machine
from processes import Remote, competitors, in_a_process, time_commands

ENGINES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "pentad": (engines.Pentad, {}),
    "pentad --fast": (engines.Pentad, {"fast": True}),
    "pentad Q4_0": (engines.Pentad, {}),
    "llama.cpp": (engines.LlamaCpp, {}),
    "llama.cpp Q4_0": (engines.LlamaCpp, {}),
    "transformers": (engines.Transformers, {}),
}
SHAPED = ["pentad", "pentad --fast", "llama.cpp"]  # the engines that run random weights
# Bounds of the logits' rms, of the worst greedy token's margin, of the perplexity: see docs/benchmarks.md.
EXACT, STOCK = (0.02, 0.1, 0.001), (0.2, 0.75, 0.01)
PROMPTS = [
    "The history of the Roman Empire begins with",
    "In the beginning of the nineteenth century the",
    "The recipe for a good vegetable soup starts",
    "A computer program is a list of instructions",
    "Music has always been a part of human",
    "The human heart pumps blood through the body",
    "Scientists have discovered that plants can respond to",
    "The capital of France is a city that",
]
LENGTH = 8  # tokens used of each prompt
LONG = 2000  # tokens of the longest prompt
NEW = 64  # decoded tokens
Speeds = dict[str, dict[str, list[float]]]
"""Row -> engine -> tokens a second of each repeat."""
Qualities = dict[str, dict[str, float]]
"""Engine -> the three differences of its logits from float32's."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: the row's title.
        call: an engine's method and arguments; it returns seconds.
        tokens: the number of tokens that the call processes.
        only: the engines that are measured; None means all.
    """

    name: str
    call: tuple[Any, ...]
    tokens: int
    only: Sequence[str] | None = None


@dataclass(frozen=True)
class Files:
    given: Path
    q4_0: Path

    def of(self, engine: str) -> Path:
        return self.q4_0 if engine.endswith("Q4_0") else self.given


def start(name: str, files: Files, context: int, threads: int, **more: Any) -> Remote:
    engine, options = ENGINES[name]
    return Remote(name, engine, str(files.of(name)), context, threads, **{**options, **more})


def measure(running: Sequence[Remote], rows: Sequence[Row], repeats: int, warmups: int = 1) -> Speeds:
    """Measure speeds: each repeat runs every row, and each row runs every engine."""
    speeds: Speeds = {row.name: {} for row in rows}
    for repeat in range(warmups + repeats):
        for row in rows:
            for engine in running:
                if row.only is None or engine.name in row.only:
                    time.sleep(CALM)  # other engines' threads spin for a while after their work
                    seconds = engine(*row.call)
                    if repeat >= warmups:
                        speeds[row.name].setdefault(engine.name, []).append(row.tokens / seconds)
    return speeds


def quality(engine: Remote, reference: Remote, texts: list[list[int]]) -> dict[str, float]:
    """Compare an engine's logits with float32's.

    Returns:
        "rms" of the differences; "margin", the largest gap between float32's best logit and float32's logit of the
        engine's greedy token; "perplexity", the relative difference.
    """
    import numpy

    squares, margins, ours, theirs = [], [], 0.0, 0.0
    for ids in texts:
        logits, exact = engine("logits", ids), reference("logits", ids)
        squares.append(((logits - exact) ** 2).mean())
        margins.append((exact.max(-1) - exact[numpy.arange(len(ids)), logits.argmax(-1)]).max())
        for values, side in ((logits, "ours"), (exact, "theirs")):
            top = values.max(-1, keepdims=True)
            chosen = values[numpy.arange(len(ids) - 1), ids[1:]]
            loss = float((numpy.log(numpy.exp(values - top).sum(-1)) + top[:, 0])[:-1].sum() - chosen.sum())
            ours, theirs = (ours + loss, theirs) if side == "ours" else (ours, theirs + loss)
    count = sum(len(ids) - 1 for ids in texts)
    perplexity = 2.718281828 ** ((ours - theirs) / count) - 1
    return {"rms": float(numpy.mean(squares) ** 0.5), "margin": float(max(margins)), "perplexity": perplexity}


def check(running: Sequence[Remote], files: Files, context: int, threads: int, texts: list[list[int]]) -> Qualities:
    """Compare each engine with float32 on the file that it runs."""
    found: Qualities = {}
    for path in dict.fromkeys(files.of(engine.name) for engine in running):
        exact = Remote("float32", engines.Pentad, str(path), context, threads, dtype="float32", quantize="none")
        found |= {engine.name: quality(engine, exact, texts) for engine in running if files.of(engine.name) == path}
        exact.close()
    return {engine.name: found[engine.name] for engine in running}


def load(
    names: Sequence[str], files: Files, args: argparse.Namespace, prompt: list[int]
) -> dict[str, dict[str, list[float]]]:
    """Measure load time, and memory after one short answer, in new processes with a context of one sequence."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for _ in range(args.repeats):
        for name in names:
            more = {"sequences": 1} if ENGINES[name][0] is engines.LlamaCpp else {}
            engine = start(name, files, args.context, args.threads, **more)
            engine("decode", [prompt], NEW)
            for key, value in {"seconds": engine.load_seconds, **engine("memory")}.items():
                found[name].setdefault(key, []).append(value)
            engine.close()
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file of Llama's architecture; SmolLM2 by default")
    parser.add_argument("--shape", choices=["tinyllama", "mistral", "mixtral"], help="random weights instead")
    parser.add_argument("--type", choices=["q4_0", "q4_k"], default="q4_0", help="of the random weights")
    parser.add_argument("--layers", type=int, default=2, help="of the random weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2304)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engines", help=f"which, of {', '.join(ENGINES)}; all by default")
    parser.add_argument("--json", action="store_true", help="also print all measurements as JSON")
    return parser.parse_args()


@dataclass(frozen=True)
class Ids:
    """The engines' inputs.

    Attributes:
        long: the longest prompt.
        prompts: the prompts of a batch.
        texts: the texts on which logits are compared.
    """

    long: list[int]
    prompts: list[list[int]]
    texts: list[list[int]]


def prepare(args: argparse.Namespace, folder: Path) -> tuple[list[str], Files, Ids]:
    """Write the files that don't exist yet; returns the engines' names, their files and their inputs."""
    import pentad.text
    import pentad.weights
    from pentad.weights.registry import locate

    path = Path(args.model or locate("smollm2")).resolve()
    tokenizer = pentad.text.load(pentad.weights.open(path))
    assert tokenizer is not None
    names = args.engines.split(",") if args.engines else SHAPED if args.shape else list(ENGINES)
    if args.shape:
        import shapes

        path = shapes.write(folder / f"{args.shape}-{args.type}.gguf", args.shape, args.type, args.layers, path)
    files = Files(path, folder / "q4_0.gguf")
    if any(name.endswith("Q4_0") for name in names):
        in_a_process(engines.requantize, str(path), str(files.q4_0))
    long = tokenizer.encode((Path(__file__).parent.parent / "LICENSE").read_text())[:LONG]
    prompts = [tokenizer.encode(prompt)[:LENGTH] for prompt in PROMPTS]
    return names, files, Ids(long, prompts, [long[100:200], *map(tokenizer.encode, PROMPTS[:4])])


def measure_all(names: list[str], files: Files, ids: Ids, args: argparse.Namespace) -> tuple[Speeds, Qualities]:
    """Measure with all threads and, unless weights are random, beside a busy process and with one thread."""
    from pentad import kernels  # imported here: engines' processes import this file too, some without torch

    single = [Row(record.DECODE, ("decode", ids.prompts[:1], NEW), NEW)]
    if kernels.isas():
        single.append(Row(record.STREAM, ("stream",), 1, only=["pentad"]))
    rows = [
        Row(record.PREFILL, ("prefill", ids.long[:512]), 512),
        *single,
        Row(record.BATCH, ("decode", ids.prompts, NEW), len(ids.prompts) * NEW),
        Row(record.AFTER, ("decode", [ids.long], NEW), NEW),
    ]
    running = [start(name, files, args.context, args.threads) for name in names]
    checked = check(running, files, args.context, args.threads, ids.texts)
    speeds = measure(running, rows, args.repeats)
    if not args.shape:
        with competitors(1):
            row = Row(record.BESIDE, ("decode", ids.prompts[:1], NEW // 2), NEW // 2, only=without_slow(names))
            speeds |= measure(running, [row], 3, warmups=0)
    for engine in running:
        engine.close()
    if not args.shape:
        running = [start(name, files, args.context, 1) for name in without_slow(names) if name != "pentad --fast"]
        alone = measure(running, single, args.repeats)
        speeds |= {name + record.ALONE: by_name for name, by_name in alone.items()}
        for engine in running:
            engine.close()
    return speeds, checked


def without_slow(names: Sequence[str]) -> list[str]:
    """The engines without transformers, which takes minutes on measurements where it is of little interest."""
    return [name for name in names if name != "transformers"]


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        names, files, ids = prepare(args, Path(folder))
        print(machine("torch", "transformers", "llama_cpp_python"))
        print(
            f"{files.given.name}, context {args.context}, {args.threads} threads, {args.repeats} repeats\n", flush=True
        )
        speeds, checked = measure_all(names, files, ids, args)
        loads, processes = {}, {}
        if not args.shape:
            loads = load(without_slow(names), files, args, ids.prompts[0])
            processes = time_commands(files.given, args.threads, args.repeats)
    if args.json:
        print(json.dumps({"speeds": speeds, "quality": checked, "loads": loads, "processes": processes}))
    record.print_speeds(speeds, names)
    record.print_quality(checked)
    record.print_loads(loads, processes)
    record.print_record(speeds, loads, processes, file=files.given.stem, aims=not args.shape)

    from pentad import kernels

    exact = EXACT if kernels.isas() else STOCK
    for name, bounds in {"pentad": exact, "pentad Q4_0": exact, "pentad --fast": STOCK}.items():
        if name in checked:
            within = (abs(value) <= bound for value, bound in zip(checked[name].values(), bounds, strict=True))
            assert all(within), f"{name}: {checked[name]} exceed {bounds}"


if __name__ == "__main__":
    main()
