"""Qwen3 (arXiv:2505.09388): Llama's block with an RMSNorm on each head's queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

from pentad.models.family import ArchitectureNames, Family
from pentad.models.language import key_rules
from pentad.models.language.decoder_only import DecoderOnly, self_attention
from pentad.models.language.qwen2 import Qwen2Config
from pentad.nn.block import PreNormBlock
from pentad.nn.feedforward import SwiGLU
from pentad.nn.norm import RMSNorm
from pentad.weights.keytable import KeyTable, Rule


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """Qwen3's fields beyond Qwen2's."""

    head_dim: int = 128
    attention_bias: bool = False


class Qwen3(DecoderOnly):
    """Grouped-query attention with normalized queries and keys, and SwiGLU, each behind an RMSNorm."""

    def __init__(self, config: Qwen3Config) -> None:
        c, rope = config, config.rope()
        blocks = (
            PreNormBlock(
                RMSNorm(c.hidden_size, c.rms_norm_eps),
                self_attention(
                    c,
                    layer,
                    rope,
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
        )
        super().__init__(c, blocks, RMSNorm(c.hidden_size, c.rms_norm_eps))


def _gguf(config: Qwen3Config) -> list[KeyTable]:
    """llama.cpp's Qwen3 has no bias on attention's output, so no layout for models with attention_bias."""
    rules = (Rule(f"layers.*.attention.{p}_norm", f"blk.*.attn_{p}_norm") for p in "qk")
    return [] if config.attention_bias else key_rules.gguf(*rules)(config)


FAMILY = Family(
    Qwen3Config,
    Qwen3,
    key_tables={
        "hf": key_rules.hf(*(Rule(f"layers.*.attention.{p}_norm", f"model.layers.*.self_attn.{p}_norm") for p in "qk")),
        "gguf": _gguf,
    },
    names=ArchitectureNames("qwen3", "Qwen3ForCausalLM", gguf="qwen3"),
)
