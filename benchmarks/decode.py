"""pentad, llama.cpp and transformers on one GGUF: the same prompts, context and threads, turn by turn.

    make bench                                      # SmolLM2, 2 threads
    python benchmarks/decode.py --threads 4 --repeats 5 --model FILE.gguf

Speed is stated as a ratio of medians within the run; the answers are checked in the same run, against float32 on the
dequantized weights, by the bounds that docs/benchmarks.md states.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import engines

ENGINES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "pentad": (engines.Pentad, {}),
    "pentad --fast": (engines.Pentad, {"fast": True}),
    "llama.cpp": (engines.LlamaCpp, {}),
    "transformers": (engines.Transformers, {}),
}
# Of the logits' rms, of the worst greedy token, of the perplexity: see docs/benchmarks.md.
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
LENGTH = 8  # tokens of each of these prompts that are used


def serve(name: str, path: str, context: int, threads: int, options: dict[str, Any], pipe: Connection) -> None:
    """An engine's process: answer calls until the pipe closes."""
    kind, defaults = ENGINES[name]
    engine = kind(path, context, threads, **{**defaults, **options})
    pipe.send(engine.load_seconds)
    while (call := pipe.recv()) is not None:
        method, *arguments = call
        pipe.send(memory() if method == "memory" else getattr(engine, method)(*arguments))


def spin() -> None:
    """A process that wants a core for itself."""
    while True:
        pass


def memory() -> dict[str, int]:
    """This process's resident memory now and at its peak, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) // 1000 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": values["VmRSS"], "peak": values["VmHWM"]}


class Remote:
    """An engine in a process of its own."""

    def __init__(self, name: str, args: argparse.Namespace, **options: Any) -> None:
        self.name = name
        self._pipe, theirs = multiprocessing.Pipe()
        call = (name, str(args.model), args.context, args.threads, options, theirs)
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=call, daemon=True)
        self._process.start()
        theirs.close()
        self.load_seconds: float = self._pipe.recv()

    def __call__(self, *call: Any) -> Any:
        self._pipe.send(call)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def quality(engine: Remote, reference: Remote, texts: list[list[int]]) -> dict[str, float]:
    """How far an engine's logits are from float32's: their rms, the worst greedy token, the perplexity."""
    import numpy

    squares, margins, ours, theirs = [], [], 0.0, 0.0
    for ids in texts:
        logits, exact = engine("logits", ids), reference("logits", ids)
        squares.append(((logits - exact) ** 2).mean())
        margins.append((exact.max(-1) - exact[numpy.arange(len(ids)), logits.argmax(-1)]).max())
        for values, total in ((logits, "ours"), (exact, "theirs")):
            top = values.max(-1, keepdims=True)
            chosen = values[numpy.arange(len(ids) - 1), ids[1:]]
            loss = float((numpy.log(numpy.exp(values - top).sum(-1)) + top[:, 0])[:-1].sum() - chosen.sum())
            ours, theirs = (ours + loss, theirs) if total == "ours" else (ours, theirs + loss)
    count = sum(len(ids) - 1 for ids in texts)
    perplexity = 2.718281828 ** ((ours - theirs) / count) - 1
    return {"rms": float(numpy.mean(squares) ** 0.5), "margin": float(max(margins)), "perplexity": perplexity}


def processes(args: argparse.Namespace) -> dict[str, list[float]]:
    """Whole processes in turn: one token of chat, and the import of torch that it can't do without."""
    pentad = [sys.executable, "-m", "pentad", "chat", "hi", "--max-tokens", "1", "--temperature", "0"]
    commands = {
        "pentad chat hi --max-tokens 1": [*pentad, "--model", str(args.model), "--threads", str(args.threads)],
        'python -c "import torch"': [sys.executable, "-c", "import torch"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.repeats + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}  # the first warms the disk


def machine() -> str:
    """What it was measured on."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in lines.items()}
        flags = [flag for flag in ("avx2", "avx512_vnni", "amx_int8") if flag in named.get("flags", "").split()]
        cpu = f"{named.get('model name', cpu)} ({', '.join(flags)})"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "llama_cpp_python")]
    return f"{cpu}, {os.cpu_count()} CPUs; Python {platform.python_version()}, {', '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file of Llama's architecture; SmolLM2 by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engines", default=",".join(ENGINES), help="which, by name")
    parser.add_argument("--beside", type=int, default=0, metavar="N", help="keep N other processes busy meanwhile")
    parser.add_argument("--json", action="store_true", help="also print everything that was measured")
    args = parser.parse_args()
    from pentad.weights.registry import locate

    args.model = Path(args.model or locate("smollm2")).resolve()
    names = args.engines.split(",")

    reference = Remote("pentad", args, dtype="float32", quantize="none")
    import pentad.text
    import pentad.weights

    tokenizer = pentad.text.load(pentad.weights.open(args.model))
    assert tokenizer is not None
    long = tokenizer.encode((Path(__file__).parent.parent / "LICENSE").read_text())[:512]
    prompts = [tokenizer.encode(prompt)[:LENGTH] for prompt in PROMPTS]
    texts = [long[100:200], *(tokenizer.encode(prompt) for prompt in PROMPTS[:4])]

    running = [Remote(name, args) for name in names]
    print(machine())
    how = f"context {args.context}, {args.threads} threads, {args.repeats} repeats"
    print(f"{args.model.name}, {how}, beside {args.beside} busy processes\n")
    checked = {engine.name: quality(engine, reference, texts) for engine in running}
    reference.close()
    busy = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(args.beside)]
    for process in busy:
        process.start()
    calls = {
        "prefill, 512 tokens": (("prefill", long), len(long)),
        "decode, batch 1": (("decode", prompts[:1]), engines.NEW),
        "decode, batch 8": (("decode", prompts), 8 * engines.NEW),
    }
    speeds: dict[str, dict[str, list[float]]] = {what: {name: [] for name in names} for what in calls}
    for repeat in range(args.repeats + 1):
        for what, (call, tokens) in calls.items():
            for engine in running:
                seconds = engine(*call)
                if repeat:  # the first one warms
                    speeds[what][engine.name].append(tokens / seconds)
    print(f"{'tokens/s, median (best)':28}" + "".join(f"{name:>20}" for name in names))
    for what, by_name in speeds.items():
        cells = [f"{statistics.median(v):.0f} ({max(v):.0f})" for v in by_name.values()]
        print(f"{what:28}" + "".join(f"{cell:>20}" for cell in cells))
    print("\npentad's median against")
    for name in names[1:]:
        ratios = [
            f"{what}: {statistics.median(v['pentad']) / statistics.median(v[name]):.2f} x" for what, v in speeds.items()
        ]
        print(f"  {name:14} {', '.join(ratios)}")
    print("\nagainst float32 on the dequantized weights")
    for name, values in checked.items():
        print(
            f"  {name:14} rms of logits {values['rms']:.3f}, worst greedy token {values['margin']:.2f} logits below the"
            f" best, perplexity {values['perplexity']:+.2%}"
        )
    used = {engine.name: engine("memory") for engine in running}
    print("\nload and memory")
    for engine in running:
        print(
            f"  {engine.name:14} {engine.load_seconds:.2f} s, {used[engine.name]['now']} MB, at the peak"
            f" {used[engine.name]['peak']} MB"
        )
        engine.close()
    print("\nwhole processes")
    whole = processes(args)
    for name, values in whole.items():
        print(f"  {name:32} {statistics.median(values):.2f} s ({min(values):.2f})")
    if args.json:
        print(json.dumps({"tokens_per_second": speeds, "quality": checked, "memory": used, "processes": whole}))

    from pentad import kernels  # only now, and here: the engines' processes import this file too, some without torch

    for name, bounds in {"pentad": EXACT if kernels.isas() else STOCK, "pentad --fast": STOCK}.items():
        if name in checked:
            within = (abs(value) <= bound for value, bound in zip(checked[name].values(), bounds, strict=True))
            assert all(within), f"{name}: {checked[name]} exceed {bounds}"


if __name__ == "__main__":
    main()
