"""Qwen3 (arXiv:2505.09388): Llama's block with an RMSNorm on each head's queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pentad.models.language.config import ArchitectureNames, read_decoder_config, written_values
from pentad.models.language.key_rules import gguf_rules, hf_ignored, hf_rules
from pentad.models.language.qwen2 import Qwen2Config, checked_layer_types
from pentad.nn.attention import Attention
from pentad.nn.block import PreNormBlock
from pentad.nn.decoder import Decoder
from pentad.nn.feedforward import SwiGLU
from pentad.nn.norm import RMSNorm
from pentad.nn.rope import Rope
from pentad.nn.rope_scaling import scaling
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import KeyTable, Rule


@dataclass(frozen=True)
class Qwen3Config(Qwen2Config):
    """What the forward pass reads of a published ``config.json``, under its names there and with their defaults."""

    head_dim: int = 128
    attention_bias: bool = False


class Qwen3(Decoder):
    """Grouped-query attention with normalized queries and keys, and SwiGLU, each behind an RMSNorm."""

    def __init__(self, config: Qwen3Config) -> None:
        c = config
        rope = Rope(c.head_dim, c.rope_theta, scaling(c.rope_parameters))
        super().__init__(
            nn.Embedding(c.vocab_size, c.hidden_size),
            (
                PreNormBlock(
                    RMSNorm(c.hidden_size, c.rms_norm_eps),
                    Attention(
                        c.hidden_size,
                        heads=c.num_attention_heads,
                        kv_heads=c.num_key_value_heads,
                        head_dim=c.head_dim,
                        rope=rope,
                        layer=layer,
                        window=c.window(layer),
                        bias=c.attention_bias,
                        output_bias=c.attention_bias,
                        q_norm=RMSNorm(c.head_dim, c.rms_norm_eps),
                        k_norm=RMSNorm(c.head_dim, c.rms_norm_eps),
                    ),
                    RMSNorm(c.hidden_size, c.rms_norm_eps),
                    SwiGLU(c.hidden_size, c.intermediate_size),
                )
                for layer in range(c.num_hidden_layers)
            ),
            RMSNorm(c.hidden_size, c.rms_norm_eps),
            nn.Linear(c.hidden_size, c.vocab_size, bias=False),
            tied=c.tie_word_embeddings,
            config=c,
        )


def config_from(checkpoint: Checkpoint) -> Qwen3Config:
    """The config of a checkpoint, from ``config.json`` or GGUF metadata."""
    return checked_layer_types(read_decoder_config(Qwen3Config, checkpoint), checkpoint)


def key_tables(config: Qwen3Config, format: str) -> list[KeyTable]:
    """The names of the network's modules in Hugging Face folders and in GGUF files."""
    norms = ("q_norm", "k_norm")
    match format:
        case "hf":
            rules = [Rule(f"layers.*.attention.{n}", f"model.layers.*.self_attn.{n}") for n in norms]
            return [KeyTable([*hf_rules(), *rules], ignored=hf_ignored(config.tie_word_embeddings))]
        case "gguf" if not config.attention_bias:  # llama.cpp has none on the way out of attention
            rules = [Rule(f"layers.*.attention.{n}", f"blk.*.attn_{n}") for n in norms]
            return [KeyTable([*gguf_rules(), *rules], ignored=[r"rope_freqs\.weight"])]
    return []


def write_config(config: Qwen3Config, format: str) -> dict[str, Any]:
    """The config as files of a format spell it."""
    return written_values(config, format, ArchitectureNames("qwen3", "Qwen3ForCausalLM", gguf="qwen3"))


build = Qwen3
