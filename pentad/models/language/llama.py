"""Llama (arXiv:2302.13971, 2307.09288, 2407.21783), and what has its architecture: TinyLlama, SmolLM2, Orca 2.

A pre-norm transformer: RMSNorm, grouped-query attention with rotary positions, SwiGLU, no biases as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pentad.models.language.config import ArchitectureNames, DecoderConfig, read_decoder_config, written_values
from pentad.models.language.key_rules import consolidated_rules, gguf_rules, hf_ignored, hf_rules
from pentad.nn.attention import Attention
from pentad.nn.block import PreNormBlock
from pentad.nn.decoder import Decoder
from pentad.nn.feedforward import SwiGLU
from pentad.nn.norm import RMSNorm
from pentad.nn.rope import Rope
from pentad.nn.rope_scaling import scaling
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import KeyTable, UnpermuteRope


@dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """What the forward pass reads of a published ``config.json``, under its names there and with their defaults."""

    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False


class Llama(Decoder):
    """Grouped-query attention over all that came before, and SwiGLU, each behind an RMSNorm."""

    def __init__(self, config: LlamaConfig) -> None:
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
                        bias=c.attention_bias,
                        output_bias=c.attention_bias,
                    ),
                    RMSNorm(c.hidden_size, c.rms_norm_eps),
                    SwiGLU(c.hidden_size, c.intermediate_size, bias=c.mlp_bias),
                )
                for layer in range(c.num_hidden_layers)
            ),
            RMSNorm(c.hidden_size, c.rms_norm_eps),
            nn.Linear(c.hidden_size, c.vocab_size, bias=False),
            tied=c.tie_word_embeddings,
            config=c,
        )


def config_from(checkpoint: Checkpoint) -> LlamaConfig:
    """The config of a checkpoint, from ``config.json``, GGUF metadata or Meta's ``params.json``."""
    return read_decoder_config(LlamaConfig, checkpoint)


def key_tables(config: LlamaConfig, format: str) -> list[KeyTable]:
    """The names of the network's modules in files of a format; those of GGUF and of Meta have interleaved RoPE."""
    queries, keys = UnpermuteRope(config.num_attention_heads), UnpermuteRope(config.num_key_value_heads)
    match format:
        case "gguf":
            return [KeyTable(gguf_rules(queries, keys), ignored=[r"rope_freqs\.weight"])]  # read by the config
        case "consolidated":
            return [KeyTable(consolidated_rules(queries, keys), ignored=[r"(.*\.)?rope\.freqs"])]
    return [KeyTable(hf_rules(), ignored=hf_ignored(config.tie_word_embeddings))]


def write_config(config: LlamaConfig, format: str) -> dict[str, Any]:
    """The config as files of a format spell it."""
    return written_values(config, format, ArchitectureNames("llama", "LlamaForCausalLM", gguf="llama"))


build = Llama
