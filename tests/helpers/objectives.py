"""Steps of every objective on a tiny model, in one process or in several."""

import json
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pentad.train import processes
from pentad.train.loop import StepRecord
from pentad.train.objectives.catalog import OBJECTIVES
from pentad.train.recipe import Recipe, read_recipe
from pentad.train.run import TrainingRun, open_run

CASES = {
    **dict.fromkeys(OBJECTIVES, ""),
    "mixture": "objective={dpo = 1.0, sft = 0.2}",
    "smoothed": "objective={dpo = 1.0, simpo = 0.5, robust = 0.5}",
    "router": "objective=sft",
}
"""Every objective, and what else is to be independent of micro-batches: case -> setting."""


def user(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "add " + "1" * n}]


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


PAIRS = [
    {"prompt": user(n), "chosen": reply("x" * (1 + n % 3)), "rejected": reply("y" * (1 + n % 4)), "margin": n / 10}
    for n in range(1, 11)
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen" if n % 3 else "rejected"], "label": bool(n % 3)}
    for n, row in enumerate(PAIRS)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "documents": [{"text": "abc" * n} for n in range(1, 11)],
    "replies": [{"messages": [*user(n), *reply("x" * (1 + n % 3))]} for n in range(1, 11)],
    "pairs": PAIRS,
    "unpaired": LABELLED,
}
"""What an objective learns from -> rows."""


def write_rows(folder: Path) -> None:
    """Write `ROWS` as KIND.jsonl."""
    for kind, rows in ROWS.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_inputs(folder: Path) -> None:
    """Write the rows, a Llama ("dense") and a Mixtral ("router")."""
    from tests.helpers.tiny import talking_checkpoint  # imports transformers, which spawned processes don't need

    write_rows(folder)
    talking_checkpoint(folder / "dense")
    talking_checkpoint(folder / "router", family="mixtral", num_local_experts=4, num_experts_per_tok=2)


def recipe_of(folder: Path, case: str, *overrides: str) -> Recipe:
    """The recipe of a case, with 8 sequences a step."""
    file = folder / f"{case}-{os.getpid()}.toml"
    model, kind = ("router" if case == "router" else "dense"), OBJECTIVES.get(case, "pairs")
    kind = "replies" if case == "router" else kind
    file.write_text(
        f'objective = "{case}"\n[model]\nbase = "{folder}/{model}"\n[data]\ntrain = "{folder}/{kind}.jsonl"\n[run]\n'
        f'out = "{folder}/run-{case}"\nsteps = 2\nbatch_size = 8\nsequence_length = 64\n[optimizer]\nlr = 1e-3\n'
    )
    settings = [CASES.get(case, "")] if CASES.get(case) else []
    if case == "router":
        settings.append("model.router_aux_loss_coef=0.5")
    return read_recipe(file, [*settings, *overrides])


class Recorder:
    """An optimizer that keeps the gradients and changes nothing."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.gradients: dict[str, Tensor] = {}

    def step(self, lr: float) -> None:
        self.gradients = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}


class Step(NamedTuple):
    record: StepRecord
    gradients: Mapping[str, Tensor]
    run: TrainingRun
    network: Any


def first_step(recipe: Recipe, *, noise: float = 0.1) -> Step:
    """Compute the first step's gradients, of a network that differs from the reference by `noise`."""
    torch.manual_seed(0)
    run = open_run(recipe)
    loop = run.loop()
    with torch.no_grad():
        for parameter in loop.network.parameters():
            parameter += noise * torch.randn(parameter.shape)
    recorder = Recorder(loop.network)
    loop = replace(loop, optimizers=recorder, max_grad_norm=math.inf)  # type: ignore[arg-type]
    return Step(loop.step(0), recorder.gradients, run, loop.network)


def in_two_processes(rank: int, folder: Path, port: int) -> None:
    """Write the gradients of all cases; the second process computes half of each step."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with processes.joined():
        for case in CASES:
            step = first_step(recipe_of(folder, case))
            if rank == 0:
                save_file(dict(step.gradients), folder / f"{case}.safetensors")
                (folder / f"{case}.json").write_text(json.dumps({"loss": step.record.loss, **step.record.metrics}))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
