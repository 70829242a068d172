"""A CUDA device: prefill, decoding and a training step against transformers, on random weights in TinyLlama's shapes.

    python benchmarks/gpu.py [--layers 22] [--repeats 5]

Both compute in bfloat16 from the same file, in one process, and take turns. The same run checks that both models'
logits are equally near to float32's, and that the losses of training are equal.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import pentad
from pentad import build, weights
from pentad.datasets.batches import collate
from pentad.generate.requests import Generation
from pentad.train.objectives.causal import CausalLM

VOCABULARY, CONTEXT = 32_000, 4096


def write_model(folder: Path, layers: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
    )
    with torch.device("cuda"):
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(name: str, tokens: int, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> None:
    """Run both in turns after a warm-up, and print tokens per second."""
    times: dict[str, list[float]] = {"pentad": [], "transformers": []}
    for _ in range(repeats + 1):
        times["pentad"].append(seconds(ours))
        times["transformers"].append(seconds(theirs))
    fast, slow = (median(values[1:]) for values in times.values())
    print(f"| {name} | {tokens / fast:,.0f} | {tokens / slow:,.0f} | {slow / fast:.2f} x |", flush=True)


def inference(folder: Path, repeats: int) -> None:
    model = pentad.load(folder, device="cuda", dtype="bfloat16")
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda").eval()
    ids = torch.randint(0, VOCABULARY, (1, 512), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = peer.float()(ids.cuda()).logits[0].cpu()
        theirs = peer.bfloat16()(ids.cuda()).logits[0].float().cpu()
    errors = [float((x - exact).square().mean().sqrt()) for x in (model.logits(ids[0].tolist()).cpu(), theirs)]
    print(f"\nrms of bfloat16 logits to float32: pentad {errors[0]:.4f}, transformers {errors[1]:.4f}\n")
    assert errors[0] <= 1.2 * errors[1]

    drawn = torch.Generator().manual_seed(1)

    def prompts(batch: int, length: int) -> Tensor:
        return torch.randint(
            0, VOCABULARY, (batch, length), generator=drawn
        )  # new ones: an engine keeps old ones' cache

    def ours(batch: int, length: int, new: int) -> None:
        greedy = replace(model.sampling, temperature=0.0)
        requests = [
            Generation(row, greedy, torch.Generator(), max_tokens=new, end_ids=frozenset())
            for row in prompts(batch, length).tolist()
        ]
        for request in requests:
            model._engine.submit(request)
        while any(request.finish_reason is None for request in requests):
            model._engine.step()
        assert all(len(request.generated) == new for request in requests)

    @torch.inference_mode()
    def generate(batch: int, length: int, new: int) -> None:
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        assert peer.generate(prompts(batch, length).cuda(), **options).shape[1] == length + new

    print("| tokens per second | pentad | transformers | ratio |\n|---|---|---|---|")
    cases = [("prefill", batch, 2048, 1) for batch in (1, 8)] + [("decode", batch, 16, 128) for batch in (1, 8, 32)]
    for kind, *case in cases:
        batch, length, new = case
        tokens = batch * (length if kind == "prefill" else new)
        name = f"{kind} {batch} x {length if kind == 'prefill' else new:,}"
        compare(name, tokens, partial(ours, *case), partial(generate, *case), repeats)


def training(folder: Path, repeats: int, sequences: int = 8, length: int = 512) -> None:
    """A step of AdamW on documents of equal length, which suits the peer: no padding."""
    ids = torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(1))
    network = build.build(weights.open(folder), device="cuda", trainable=True)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cuda").train()
    objective, learned = CausalLM(), torch.ones(length, dtype=torch.uint8).numpy()
    batch = collate([(row.int().numpy(), learned) for row in ids], device="cuda")
    losses: dict[str, list[float]] = {"pentad": [], "transformers": []}
    peaks = dict.fromkeys(losses, 0.0)

    models = {"pentad": network, "transformers": peer}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) for name, model in models.items()}

    def loss_of(name: str) -> Tensor:
        if name == "pentad":
            return objective(network, batch, objective.totals(network, batch)).share
        loss: Tensor = peer(input_ids=ids.cuda(), labels=ids.cuda(), use_cache=False).loss
        return loss

    def step(name: str) -> None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(name)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(models[name].parameters(), 1.0)
        optimizers[name].step()
        optimizers[name].zero_grad()
        losses[name].append(float(loss.detach()))
        peaks[name] = torch.cuda.max_memory_allocated() - before

    name = f"training step, {sequences} x {length}"
    compare(name, ids.numel(), partial(step, "pentad"), partial(step, "transformers"), repeats)
    for ours, theirs in zip(*losses.values(), strict=True):
        assert abs(ours - theirs) < 1e-2 * theirs, (ours, theirs)
    print("\nlosses of pentad:", *(round(loss, 4) for loss in losses["pentad"]))
    print("activations and gradients at the peak:", ", ".join(f"{n} {p / 1e9:.2f} GB" for n, p in peaks.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}, transformers {transformers.__version__}")
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args.layers)
        gc.collect()
        torch.cuda.empty_cache()
        inference(Path(folder), args.repeats)
        gc.collect()
        torch.cuda.empty_cache()
        training(Path(folder), args.repeats)


if __name__ == "__main__":
    main()
