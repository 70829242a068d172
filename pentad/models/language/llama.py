"""Llama (arXiv:2302.13971, 2307.09288, 2407.21783), and what has its architecture: TinyLlama, SmolLM2, Orca 2.

A pre-norm transformer: RMSNorm, grouped-query attention with rotary positions, SwiGLU, no biases as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pentad.models.family import ArchitectureNames, Family
from pentad.models.language import key_rules
from pentad.models.language.decoder_only import DecoderConfig, DecoderOnly, self_attention
from pentad.nn.block import PreNormBlock
from pentad.nn.feedforward import SwiGLU
from pentad.nn.norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Llama's fields beyond the shared ones."""

    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False


class Llama(DecoderOnly):
    """Grouped-query attention over all earlier tokens, and SwiGLU, each behind an RMSNorm."""

    def __init__(self, config: LlamaConfig) -> None:
        c, rope = config, config.rope()
        blocks = (
            PreNormBlock(
                RMSNorm(c.hidden_size, c.rms_norm_eps),
                self_attention(c, layer, rope, bias=c.attention_bias, output_bias=c.attention_bias),
                RMSNorm(c.hidden_size, c.rms_norm_eps),
                SwiGLU(c.hidden_size, c.intermediate_size, bias=c.mlp_bias),
            )
            for layer in range(c.num_hidden_layers)
        )
        super().__init__(c, blocks, RMSNorm(c.hidden_size, c.rms_norm_eps))


def recognizes(format: str, config: Mapping[str, Any]) -> bool:
    """Mixtures call themselves "llama" too. Meta's params.json names no architecture, but has a key of its own."""
    match format:
        case "consolidated":
            return "multiple_of" in config and "hidden_dim" not in config
        case "gguf":
            return config.get("general.architecture") == "llama" and not config.get("llama.expert_count")
    return config.get("model_type") == "llama"


FAMILY = Family(
    LlamaConfig,
    Llama,
    key_tables={
        "hf": key_rules.hf(),
        "gguf": key_rules.gguf(interleaved=True),
        "consolidated": key_rules.consolidated(),
    },
    names=ArchitectureNames("llama", "LlamaForCausalLM", gguf="llama"),
    recognizes=recognizes,
)
