"""Run the benchmarks that have a peer, and print one table for this machine's CPU.

    make bench                                            # all of them, which takes hours on two CPUs
    make bench ARGS="--only decode,lookup"
    make bench ARGS="--only decode --into docs/benchmarks.md"    # replaces this CPU's table, or adds it

The table begins with what is slower than a peer. A benchmark that fails is named, and the others still run. Ratios come
from runs in which pentad and the peer take turns; each benchmark's own output has the absolute numbers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from hardware import machine
from results import VARIABLE

FOLDER = Path(__file__).parent
BENCHMARKS = {
    "decode": ["decode.py"],
    "tinyllama": ["decode.py", "--shape", "tinyllama"],
    "mistral": ["decode.py", "--shape", "mistral", "--type", "q4_k"],
    "mixtral": ["decode.py", "--shape", "mixtral", "--layers", "1"],
    "moe": ["moe.py"],
    "lookup": ["lookup.py", "smollm2"],
    "vision": ["vision.py", "vit", "darknet"],
    "train": ["train.py", "--model", "{hf}"],
    "serve": ["serve.py"],
}
"""Name -> script and arguments; {hf} is SmolLM2 as a Hugging Face folder. serve needs `scripts/llama-server` first."""


def section(cpu: str, date: str, results: Sequence[dict[str, object]], failed: Sequence[str]) -> str:
    """The Markdown section of a CPU: what is slower than a peer, then all ratios, the smallest first."""
    rows = sorted(results, key=lambda row: float(str(row["ratio"])))
    slower = [f"{row['what']} ({row['ratio']:.2f} x {row['peer']})" for row in rows if float(str(row["ratio"])) < 1]
    lines = [f"## {cpu}", "", f"{date}. Slower than a peer: {', '.join(slower) or 'nothing'}."]
    if failed:
        lines += ["", f"Not measured: {', '.join(failed)}."]
    lines += ["", "| | peer | pentad is |", "| --- | --- | --- |"]
    lines += [f"| {row['what']} | {row['peer']} | {row['ratio']:.2f} x |" for row in rows]
    return "\n".join(lines) + "\n"


def insert(document: str, new: str) -> str:
    """Replace the section with the same title in a document, or add it at the end."""
    title = re.escape(new.splitlines()[0])
    old = re.compile(rf"^{title}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if old.search(document):
        return old.sub(lambda _: new + "\n", document).rstrip("\n") + "\n"
    return f"{document.rstrip()}\n\n{new}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHMARKS), help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--into", type=Path, help="a Markdown file whose section of this CPU is replaced")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - BENCHMARKS.keys():
        parser.error(f"unknown benchmark {min(unknown)!r}; known: {', '.join(BENCHMARKS)}")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        results, hf = Path(folder) / "results.jsonl", Path(folder) / "hf"
        environment = {**os.environ, VARIABLE: str(results)}
        for name in names:
            script, *options = (part.format(hf=hf) for part in BENCHMARKS[name])
            print(f"\n{name}: {script} {' '.join(options)}", flush=True)
            if name == "train":
                subprocess.run(
                    [sys.executable, "-m", "pentad", "convert", "smollm2", str(hf), "--to", "hf"], check=True
                )
            if subprocess.run(
                [sys.executable, str(FOLDER / script), *options], env=environment, check=False
            ).returncode:
                failed.append(name)
        rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    made = section(machine("torch"), datetime.date.today().isoformat(), rows, failed)
    print(f"\n{made}")
    if arguments.into:
        arguments.into.write_text(insert(arguments.into.read_text(), made))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
