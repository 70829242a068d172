"""Fine-tune SmolLM2 on GSM8K, then prefer its correct to its incorrect solutions: the pictures of docs/training.md.

    python docs/gsm8k.py DATA OUT

DATA is a folder with gsm8k_train.jsonl, gsm8k_test.jsonl and gsm8k_model_solutions.jsonl, as published by OpenAI
(grade-school-math). OUT receives the data, the recipes and the runs; a second call continues them. One thread takes an
hour.
"""

import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
HELD_OUT = 32
SFT = """
objective = "sft"
[model]
base = "smollm2"
[data]
train = "sft.jsonl"
validation = "sft_held_out.jsonl"
[run]
out = "sft"
steps = 24
validate_every = 8
checkpoint_every = 10
sequence_length = 768
[optimizer]
lr = 1e-4
"""
DPO = """
objective = "dpo"
[model]
base = "sft/final"
[data]
train = "pairs.jsonl"
validation = "pairs_held_out.jsonl"
[run]
out = "dpo"
steps = 6
validate_every = 3
checkpoint_every = 4
sequence_length = 768
[optimizer]
lr = 1e-5
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def messages(question: str, answer: str) -> dict[str, Any]:
    roles = {"user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": content} for role, content in roles.items()]}


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A correct and an incorrect solution of each problem that has both."""
    found = []
    for row in rows:
        solutions = [row[name] for name in row if name.startswith(("6b", "175b"))]
        correct, incorrect = (
            [s["solution"] for s in solutions if s["is_correct"] is wanted] for wanted in (True, False)
        )
        if correct and incorrect:
            prompt = [{"role": "user", "content": row["question"]}]
            replies = ([{"role": "assistant", "content": reply[0]}] for reply in (correct, incorrect))
            found.append({"prompt": prompt, **dict(zip(("chosen", "rejected"), replies, strict=True))})
    return found


def write_inputs(data: Path, out: Path) -> None:
    solved = pairs(lines(data / "gsm8k_model_solutions.jsonl"))
    files = {
        "sft": [messages(row["question"], row["answer"]) for row in lines(data / "gsm8k_train.jsonl")],
        "sft_held_out": [
            messages(row["question"], row["answer"]) for row in lines(data / "gsm8k_test.jsonl")[:HELD_OUT]
        ],
        "pairs": solved[HELD_OUT : HELD_OUT + 48],
        "pairs_held_out": solved[:24],
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, recipe in (("sft", SFT), ("dpo", DPO)):
        (out / f"{name}.toml").write_text(recipe)


def train(out: Path, name: str, *options: str) -> str:
    command = [sys.executable, "-m", "pentad", "train", f"{name}.toml", *options]
    return subprocess.run(command, cwd=out, check=True, stdout=subprocess.PIPE, text=True).stdout


def draw_curves(out: Path, picture: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for axis, name, title in zip(axes, ("sft", "dpo"), ("SFT on GSM8K", "then DPO"), strict=True):
        steps, held_out = lines(out / name / "log.jsonl"), lines(out / name / "validation.jsonl")
        axis.plot([r["step"] for r in steps], [r["loss"] for r in steps], label="training", linewidth=1)
        axis.plot([r["step"] for r in held_out], [r["loss"] for r in held_out], "o-", label="held out")
        axis.set(title=title, xlabel="step", ylabel="loss")
        axis.legend()
    figure.savefig(picture, dpi=110)


def draw_mask(shown: str, picture: Path) -> None:
    """`pentad train --show-mask` marks what is learned with [brackets]; the picture shows it in green."""
    console = Console(record=True, width=100, file=StringIO())
    text = Text()
    for number, piece in enumerate(shown.split("[")):
        learned, closed, rest = piece.partition("]")
        text.append(learned if number and closed else piece, "black on green" if number and closed else None)
        text.append(rest)
    console.print(text)
    drawn = console.export_svg(title="pentad train sft.toml --show-mask 1")
    picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))  # without web fonts


def main(data: Path, out: Path) -> None:
    write_inputs(data, out)
    draw_mask(train(out, "sft", "--show-mask", "1"), HERE / "mask.svg")
    for name in ("sft", "dpo"):
        if not (out / name / "final").exists():
            train(out, name, *(["--resume"] if (out / name / "log.jsonl").exists() else []))
        for row in lines(out / name / "validation.jsonl"):
            print(name, row)
    draw_curves(out, HERE / "gsm8k.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
