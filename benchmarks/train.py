"""Training against TRL and transformers: tokens per CPU-second, and memory.

The peers train SmolLM2's shapes in float32 on the same rows in the same order. Each runs in its own process with one
thread; rounds take turns, and each round starts from the same weights, so that losses can be compared.

    python benchmarks/train.py --model FOLDER [--tasks sft dpo equal] [--rounds 2] [--steps 2]

FOLDER has SmolLM2 as published: pentad convert smollm2 FOLDER --to hf
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from hardware import machine, memory
from processes import Remote
from results import report

DATA = Path(__file__).parents[2] / "shared" / "data" / "text"
LENGTH = 512
ROWS = 8  # sequences a step of SFT
PAIRS = 8  # pairs a step of DPO
FLOPS = 2 * 3 * 134_515_008  # a token, forward and backward, without attention


def write_data(folder: Path, rows: int) -> None:
    """GSM8K as conversations and, from models' correct and incorrect solutions, as pairs; documents of equal length."""
    with (DATA / "gsm8k_train.jsonl").open() as lines:
        problems = [json.loads(line) for line in lines][:rows]
    replies = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in problems
    ]
    chance, pairs = random.Random(0), []
    for row in replies:
        other = chance.choice(replies)["completion"]
        pairs.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": other})
    for name, values in (("replies", replies), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))


class Pentad:
    """A run of pentad, by its recipe."""

    def __init__(self, task: str, model: str, folder: str, steps: int, checkpointing: str = "none") -> None:
        import torch

        started = time.perf_counter()
        torch.set_num_threads(1)
        os.environ["PENTAD_CACHE"] = f"{folder}/cache"
        from pentad.train.recipe import Recipe
        from pentad.train.run import open_run

        pairs = task == "dpo"
        self.recipe = Recipe.model_validate(
            {
                "objective": "dpo" if pairs else "sft",
                "model": {"base": model},
                "data": {"train": f"{folder}/{'pairs' if pairs else 'replies'}.jsonl"},
                "run": {
                    "out": f"{folder}/run",
                    "steps": steps,
                    "batch_size": PAIRS if pairs else ROWS,
                    "sequence_length": LENGTH,
                    "checkpointing": checkpointing,
                },
                "optimizer": {"lr": 1e-4, "schedule": "constant", "warmup": 0.0},
            }
        )
        self.run = open_run(self.recipe)
        self.load_seconds = time.perf_counter() - started

    def rows(self) -> list[int]:
        """The numbers of the rows of all steps, in order."""
        return [number for step in range(self.recipe.run.steps) for _, number in self.run.data.examples(step)]

    def round(self) -> list[dict[str, float]]:
        loop, records = self.run.loop(), []
        for step in range(self.recipe.run.steps):
            started = time.process_time()
            record = loop.step(step)
            records.append({"cpu": time.process_time() - started, "tokens": record.tokens, "loss": record.loss})
        return records

    def memory(self) -> dict[str, int]:
        return memory()


class Trl:
    """A run of TRL's trainer over the same rows."""

    def __init__(self, task: str, model: str, folder: str, steps: int, rows: list[int], **settings: Any) -> None:
        started = time.perf_counter()
        import datasets
        import torch
        import transformers
        import trl

        torch.set_num_threads(1)
        datasets.disable_progress_bars()
        transformers.utils.logging.set_verbosity_error()
        kind, name, batch = ("DPO", "pairs", PAIRS) if task == "dpo" else ("SFT", "replies", ROWS)
        values = [json.loads(line) for line in Path(f"{folder}/{name}.jsonl").read_text().splitlines()]
        self.data = datasets.Dataset.from_list([values[number] for number in rows])
        self.trainer = getattr(trl, f"{kind}Trainer")
        self.model = model
        self.settings = {"per_device_train_batch_size": batch, "max_steps": steps, **settings}
        self.config = getattr(trl, f"{kind}Config")
        self.folder = folder
        self.load_seconds = time.perf_counter() - started

    def round(self) -> list[dict[str, float]]:
        import transformers

        records: list[dict[str, float]] = []

        class Clock(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.started = time.process_time()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                records.append({"cpu": time.process_time() - self.started})

        config = self.config(
            output_dir=f"{self.folder}/trl",
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            max_length=LENGTH,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
            **{"gradient_checkpointing": False, **self.settings},
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        trainer = self.trainer(
            self.model, args=config, train_dataset=self.data, processing_class=tokenizer, callbacks=[Clock()]
        )
        trainer.train()
        seen = 0
        for record, line in zip(records, (x for x in trainer.state.log_history if "loss" in x), strict=True):
            record |= {"loss": line["loss"], "tokens": line["num_tokens"] - seen}
            seen = line["num_tokens"]
        return records

    def memory(self) -> dict[str, int]:
        return memory()


class Equal:
    """Steps on 2 x 512 random tokens: transformers, eager or compiled, and pentad."""

    def __init__(self, model: str, steps: int, form: str) -> None:
        import torch

        started = time.perf_counter()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.ids = torch.randint(0, 49152, (steps, 2, LENGTH))
        self.form, self.model = form, model
        self.load_seconds = time.perf_counter() - started

    def round(self) -> list[dict[str, float]]:
        import torch

        if self.form == "pentad":
            from pentad import build, weights
            from pentad.datasets.batches import collate
            from pentad.train.objectives.causal import CausalLM

            network = build.build(weights.open(Path(self.model)), trainable=True)
            objective = CausalLM()

            def loss_of(ids: Any) -> Any:
                targets = torch.ones(LENGTH, dtype=torch.uint8).numpy()
                batch = collate([(row.int().numpy(), targets) for row in ids])
                return objective(network, batch, objective.totals(network, batch)).share
        else:
            import transformers

            network = transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
            forward = torch.compile(network) if self.form == "compiled" else network

            def loss_of(ids: Any) -> Any:
                return forward(input_ids=ids, labels=ids, use_cache=False).loss

        network.train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        if self.form == "compiled":
            loss_of(self.ids[0]).backward()  # compiles
            optimizer.zero_grad()
        records = []
        for ids in self.ids:
            started = time.process_time()
            loss = loss_of(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            records.append({"cpu": time.process_time() - started, "tokens": ids.numel(), "loss": float(loss.detach())})
        return records

    def peak(self) -> float:
        """GFLOP/s of the matmuls of a block."""
        import torch

        x, rates = torch.randn(2 * LENGTH, 576), []
        for weight in (torch.randn(1536, 576), torch.randn(576, 576)):
            for _ in range(3):
                torch.nn.functional.linear(x, weight)
            started = time.process_time()
            for _ in range(20):
                torch.nn.functional.linear(x, weight)
            rates.append(20 * 2 * x.numel() * len(weight) / (time.process_time() - started) / 1e9)
        return max(rates)

    def memory(self) -> dict[str, int]:
        return memory()


def compare(task: str, contenders: dict[str, Remote], rounds: int, same: set[str]) -> None:
    """Run rounds in turns and print a table; contenders of `same` must have the first one's losses."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            results[name] += contender("round")
    first = next(iter(contenders))
    rates = {n: median(r["tokens"] / r["cpu"] for r in records) for n, records in results.items()}
    steps = {name: median(record["cpu"] for record in records) for name, records in results.items()}
    peaks = {name: contender("memory")["peak"] for name, contender in contenders.items()}
    print(f"\n| {task} | tokens per CPU-s | CPU-s a step | peak MB | pentad is | of its memory |")
    print("|---|---|---|---|---|---|")
    for name in contenders:
        ratio = steps[name] / steps[first] if task == "dpo" else rates[first] / rates[name]
        line = f"| {name} | {rates[name]:.1f} | {steps[name]:.2f} | {peaks[name] / 1e6:,.0f}"
        print(f"{line} | {ratio:.2f} x | {peaks[first] / peaks[name]:.2f} |")
        if not name.startswith("pentad"):
            report(f"training: {task}", name, ratio)
        if name in same:
            for ours, theirs in zip(results[first], results[name], strict=True):
                # TRL also learns the newline that the template writes after a reply.
                assert abs(ours["loss"] - theirs["loss"]) < 2e-2 * abs(theirs["loss"]), (name, ours, theirs)
    for name, records in results.items():
        print(f"losses of {name}:", *(round(record["loss"], 4) for record in records[: len(records) // rounds]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder of SmolLM2")
    parser.add_argument("--tasks", nargs="+", default=["equal", "sft", "dpo"], choices=["equal", "sft", "dpo"])
    parser.add_argument("--only", nargs="+", help="names of contenders")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    print(machine("torch", "transformers", "trl"))
    model, steps = str(Path(options.model).resolve()), options.steps
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), 64)
        for task in options.tasks:
            if task == "equal":
                contenders = {form: Remote(form, Equal, model, steps, form) for form in ("pentad", "eager", "compiled")}
                same = {"eager", "compiled"}
            else:
                pentad = Remote("pentad", Pentad, task, model, folder, steps)
                rows = pentad("rows")
                contenders = {"pentad": pentad}
                contenders["pentad, checkpointing"] = Remote("", Pentad, task, model, folder, steps, "blocks")
                contenders["TRL"] = Remote("TRL", Trl, task, model, folder, steps, rows)
                same = {"pentad, checkpointing", "TRL"}
                if task == "sft":
                    packing = {"packing": True, "per_device_train_batch_size": 3}
                    contenders["TRL, packing"] = Remote("TRL", Trl, task, model, folder, steps, rows, **packing)
                else:
                    precomputed = {"precompute_ref_log_probs": True}
                    contenders["TRL, precomputed"] = Remote("TRL", Trl, task, model, folder, steps, rows, **precomputed)
                    same.add("TRL, precomputed")
            if options.only:
                for name in set(contenders) - set(options.only):
                    contenders.pop(name).close()
            compare(task, contenders, options.rounds, same & set(contenders))
            if task == "equal" and "pentad" in contenders:
                peak = contenders["pentad"]("peak")
                print(f"matmuls of a block: {peak:.0f} GFLOP/s")
            for contender in contenders.values():
                contender.close()


if __name__ == "__main__":
    main()
