"""GGUF files with random weights: a few layers, with the layer sizes of a published model.

All matrices have one quantized type. The tokenizer is copied from another GGUF, so that prompts can be text; its
vocabulary replaces the published one.
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
"""The layer sizes of TinyLlama-1.1B, Mistral-7B and Mixtral-8x7B."""

SCALES: dict[str, tuple[float, ...]] = {"q4_0": (1 / 4.6,), "q4_k": (1 / 250, 7.5 / 250)}
"""The float16 values at the start of a block with which dequantized weights have about mean 0 and variance 1."""


def blocks(type_name: str, shape: tuple[int, ...], seed: int) -> QuantizedTensor:
    """Make random blocks, with scales that preserve the variance of activations."""
    size, nbytes = BLOCKS[type_name]
    count = torch.Size(shape).numel() // size
    made = torch.empty(count, nbytes, dtype=torch.uint8).random_(256, generator=torch.Generator().manual_seed(seed))
    made.view(torch.float16)[:, : len(SCALES[type_name])] = torch.tensor(SCALES[type_name]) * shape[-1] ** -0.5
    return QuantizedTensor(made.view(-1, shape[-1] // size * nbytes), type_name, shape)


def write(path: Path, shape: str, type_name: str, layers: int, tokenizer: Path) -> Path:
    """Write a GGUF with the layer sizes of `shape` and the tokenizer of another GGUF; returns `path`."""
    size, tokenizer_config = SHAPES[shape], pentad.weights.open(tokenizer).config
    width, hidden, heads, kv_heads = (size[n] for n in ("embedding_length", "feed_forward_length", "heads", "kv_heads"))
    experts = size.get("experts")
    vocabulary = len(tokenizer_config["tokenizer.ggml.tokens"])
    tensors: list[PendingTensor] = []

    def add(name: str, *shape: int, make: Callable[[], Any] | None = None) -> None:
        make = make or partial(blocks, type_name, shape, len(tensors))
        tensors.append(PendingTensor(f"{name}.weight", shape, torch.float32 if len(shape) == 1 else type_name, make))

    add("token_embd", vocabulary, width)
    add("output", vocabulary, width)
    add("output_norm", width, make=partial(torch.ones, width))
    for layer in range(layers):
        prefix = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            add(prefix + norm, width, make=partial(torch.ones, width))
        for part, rows in {"q": width, "k": width // heads * kv_heads, "v": width // heads * kv_heads}.items():
            add(f"{prefix}attn_{part}", rows, width)
        add(prefix + "attn_output", width, width)
        stack, suffix = ((experts,), "_exps") if experts else ((), "")
        add(f"{prefix}ffn_gate{suffix}", *stack, hidden, width)
        add(f"{prefix}ffn_up{suffix}", *stack, hidden, width)
        add(f"{prefix}ffn_down{suffix}", *stack, width, hidden)
        if experts:
            router = partial(torch.randn, experts, width, generator=torch.Generator().manual_seed(layer))
            tensors.append(PendingTensor(f"{prefix}ffn_gate_inp.weight", (experts, width), torch.float32, router))
    sizes = {
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
        **{f"llama.{key}": value for key, value in sizes.items()},
        **{key: value for key, value in tokenizer_config.items() if key.startswith("tokenizer.")},
    }
    write_gguf(path, metadata, tensors)
    return path
