"""Training runs of a tiny model."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pentad.train.loop import StepRecord
from pentad.train.recipe import Recipe, read_recipe
from pentad.train.run import open_run
from tests.helpers.tiny import byte_pipeline

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROWS = [
    {"messages": [{"role": "user", "content": "add " + "1" * n}, {"role": "assistant", "content": "x" * (2 + n % 3)}]}
    for n in range(1, 12)
]
PAIRS = [
    {"prompt": [{"role": "user", "content": "add " + "1" * n}],
     "chosen": [{"role": "assistant", "content": "x" * (1 + n % 3)}],
     "rejected": [{"role": "assistant", "content": "y" * (1 + n % 4)}]}
    for n in range(1, 9)
]  # fmt: skip


def write_base(folder: Path) -> Path:
    """Write a random Llama with one token a byte."""
    byte_pipeline("<|im_start|>", "<|im_end|>").save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def recipe(tmp_path: Path, base: Path, *overrides: str) -> Recipe:
    """A recipe of six steps, with overrides of `--set`."""
    data = tmp_path / "train.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = tmp_path / "recipe.toml"
    file.write_text(
        f'objective = "sft"\n[model]\nbase = "{base}"\n[data]\ntrain = "{data}"\n'
        f'[run]\nout = "{tmp_path}/run"\nsteps = 6\nbatch_size = 4\nsequence_length = 64\ncheckpoint_every = 2\n'
        "[optimizer]\nlr = 1e-2\n"
    )
    return read_recipe(file, overrides)


class Killed(BaseException):
    pass


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def train(recipe: Recipe, *, resume: bool = False, kill_after: int | None = None) -> tuple[Path, list[StepRecord]]:
    records: list[StepRecord] = []

    def report(record: StepRecord) -> None:
        records.append(record)
        if record.step == kill_after:
            raise Killed

    try:
        final = open_run(recipe).train(resume=resume, note=lambda _: None, report=report)
    except Killed:
        final = Path()
    return final, records
