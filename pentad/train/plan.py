"""What a run would do: counted from its data, and measured by a few steps that change nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pentad.memory import available_memory, process_bytes
from pentad.nn.decoder import Decoder

if TYPE_CHECKING:
    from pentad.train.run import TextRun

_SAVED_BYTES = {"none": 90, "blocks": 5}
"""Activations a token, a layer and a unit of the width, in float32; measured with SmolLM2."""

_MEASURED_STEPS = 4


def least_bytes(run: TextRun, network: Decoder, checkpointing: str) -> int:
    """An estimate of the memory of a run: weights, gradients, the optimizer's state and the largest micro-batch.

    Args:
        run: the run.
        network: its network, which may be on the meta device.
        checkpointing: "none" or "blocks".
    """
    settings, parameters = run.recipe.run, sum(p.numel() for p in network.parameters())
    learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    tokens = max(settings.micro_batch_tokens, *(int(store.lengths.max()) for store in run.stores))
    tokens = min(tokens, settings.batch_size * max(int(store.lengths.max()) for store in run.stores))
    width, layers = network.embed.weight.shape[1], len(network.layers)
    kept = 4 + 4 * bool(settings.ema) + 8 + 4  # gradient, average, AdamW's moments, and a copy while saving
    return 4 * parameters + kept * learned + tokens * width * layers * _SAVED_BYTES[checkpointing]


def checkpointing(run: TextRun, network: Decoder) -> str:
    """The recipe's activation checkpointing; "auto" becomes "blocks" if memory would be short without."""
    if run.recipe.run.checkpointing != "auto":
        return run.recipe.run.checkpointing
    free = available_memory(run.device)
    return "blocks" if free is not None and least_bytes(run, network, "none") > free * 0.7 else "none"


def plan(run: TextRun, network: Decoder) -> dict[str, Any]:
    """Count the data, then run a few steps with a learning rate of 0.

    Args:
        run: a run that hasn't started; nothing is written to its folder.
        network: the run's network on the meta device.

    Returns:
        Among others `memory_bytes`, the peak of the process, and `seconds`, without loading, the first checkpoint of a
        reference model and saving. If memory is short, they are None.
    """
    facts, settings, data = [store.facts for store in run.stores], run.recipe.run, run.data
    steps = settings.steps
    micro_batches = [[data.length(group) for group in data.groups(step)] for step in range(steps)]
    tokens = [sum(lengths) for lengths in micro_batches]
    estimate = least_bytes(run, network, checkpointing(run, network))
    counted = {
        "rows": sum(fact["rows"] for fact in facts),
        "examples": sum(map(len, run.stores)),
        "tokens": sum(int(store.lengths.sum()) for store in run.stores),
        "target_tokens": sum(fact["targets"] for fact in facts),
        "truncated": sum(fact["truncated"] for fact in facts),
        "skipped": [line for fact in facts for line in fact["skipped"]],
        "sequences": data.units,
        "steps": steps,
        "epochs": steps * settings.batch_size / data.units,
        "trained_tokens": sum(tokens),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "trained_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
        "estimated_bytes": estimate,
        "memory_bytes": None,
        "seconds": None,
    }
    free = available_memory(run.device)
    if free is not None and estimate > free:
        return counted
    loop = run.loop(measures=True)
    largest = max(range(steps), key=lambda step: max(micro_batches[step]))
    loop.step(largest)  # the first step allocates, and needs the most memory
    measured = sorted({round(i * (steps - 1) / _MEASURED_STEPS) for i in range(_MEASURED_STEPS + 1)})
    started = time.perf_counter()
    for step in measured:
        loop.step(step)
    rate = (time.perf_counter() - started) / sum(tokens[step] for step in measured)
    saved = sum(tensor.nbytes for tensor in run.state(loop).values()) if settings.checkpoint_every < steps else 0
    saving = saved if settings.checkpoint_every else 0
    return {**counted, "memory_bytes": process_bytes(run.device) + saving, "seconds": rate * sum(tokens)}
