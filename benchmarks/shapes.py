"""Random weights in the sizes of published models' layers, few of them, as a GGUF that any engine reads.

All matrices are of one quantized type, and the tokenizer is another file's, so that prompts are text: its vocabulary
takes the place of the published one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pentad.weights
from pentad.weights.gguf_writer import write_gguf
from pentad.weights.quantized import BLOCKS, QuantizedTensor
from pentad.weights.writing import PendingTensor

SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama": {"embedding_length": 2048, "feed_forward_length": 5632, "heads": 32, "kv_heads": 4},
    "mistral": {"embedding_length": 4096, "feed_forward_length": 14336, "heads": 32, "kv_heads": 8},
    "mixtral": {"embedding_length": 4096, "feed_forward_length": 14336, "heads": 32, "kv_heads": 8, "experts": 8},
}
"""TinyLlama-1.1B, Mistral-7B, Mixtral-8x7B: of a layer."""

SCALES: dict[str, tuple[float, ...]] = {"q4_0": (1 / 4.6,), "q4_k": (1 / 250, 7.5 / 250)}
"""What a block's float16 numbers are at its begin, so that its numbers have about the variance 1 and the mean 0."""


def blocks(kind: str, shape: tuple[int, ...], seed: int) -> QuantizedTensor:
    """Random integers, with scales that keep a product's rows as large as they come."""
    size, nbytes = BLOCKS[kind]
    count = torch.Size(shape).numel() // size
    made = torch.empty(count, nbytes, dtype=torch.uint8).random_(256, generator=torch.Generator().manual_seed(seed))
    made.view(torch.float16)[:, : len(SCALES[kind])] = torch.tensor(SCALES[kind]) * shape[-1] ** -0.5
    return QuantizedTensor(made.view(-1, shape[-1] // size * nbytes), kind, shape)


def write(path: Path, shape: str, kind: str, layers: int, tokenizer: Path) -> Path:
    """Write it, and give its path again."""
    size, like = SHAPES[shape], pentad.weights.open(tokenizer).config
    width, hidden, heads, kv_heads = (size[n] for n in ("embedding_length", "feed_forward_length", "heads", "kv_heads"))
    experts = size.get("experts")
    vocabulary = len(like["tokenizer.ggml.tokens"])
    tensors: list[PendingTensor] = []

    def add(name: str, *shape: int, make: Callable[[], Any] | None = None) -> None:
        make = make or partial(blocks, kind, shape, len(tensors))
        tensors.append(PendingTensor(f"{name}.weight", shape, torch.float32 if len(shape) == 1 else kind, make))

    add("token_embd", vocabulary, width)
    add("output", vocabulary, width)
    add("output_norm", width, make=partial(torch.ones, width))
    for layer in range(layers):
        at = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            add(at + norm, width, make=partial(torch.ones, width))
        for part, rows in {"q": width, "k": width // heads * kv_heads, "v": width // heads * kv_heads}.items():
            add(f"{at}attn_{part}", rows, width)
        add(at + "attn_output", width, width)
        stack, end = ((experts,), "_exps") if experts else ((), "")
        add(f"{at}ffn_gate{end}", *stack, hidden, width)
        add(f"{at}ffn_up{end}", *stack, hidden, width)
        add(f"{at}ffn_down{end}", *stack, width, hidden)
        if experts:
            router = partial(torch.randn, experts, width, generator=torch.Generator().manual_seed(layer))
            tensors.append(PendingTensor(f"{at}ffn_gate_inp.weight", (experts, width), torch.float32, router))
    about = {
        "block_count": layers,
        "context_length": 4096,
        "embedding_length": width,
        "feed_forward_length": hidden,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": width // heads,
        "vocab_size": vocabulary,
        **({"expert_count": experts, "expert_used_count": 2} if experts else {}),
    }
    metadata = {
        "general.architecture": "llama",
        **{f"llama.{key}": value for key, value in about.items()},
        **{key: value for key, value in like.items() if key.startswith("tokenizer.")},
    }
    write_gguf(path, metadata, tensors)
    return path
