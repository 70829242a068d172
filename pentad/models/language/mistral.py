"""Mistral 7B (arXiv:2310.06825), and what has its architecture: Zephyr, OpenHermes.

Llama's block with the paper's three ideas of section 2:

* grouped-query attention: `num_key_value_heads` keys and values serve all `num_attention_heads` queries;
* a sliding window: a token sees `sliding_window` keys, its own included, and so, over k layers, k windows back;
* a rolling buffer: because of `Attention.window` the cache (`pentad.nn.cache`) frees a page once no window reaches it,
  so a sequence of any length holds O(window) tokens. Prompts longer than the window run in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pentad.models.family import ArchitectureNames, Family
from pentad.models.language import llama
from pentad.models.language.decoder_only import DecoderConfig, DecoderOnly, self_attention
from pentad.nn.block import PreNormBlock
from pentad.nn.feedforward import SwiGLU
from pentad.nn.norm import RMSNorm


@dataclass(frozen=True, kw_only=True)
class MistralConfig(DecoderConfig):
    """Mistral's fields beyond the shared ones."""

    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-6
    sliding_window: int | None = None


class Mistral(DecoderOnly):
    """Grouped-query attention over a sliding window, and SwiGLU, each behind an RMSNorm."""

    def __init__(self, config: MistralConfig) -> None:
        c, rope = config, config.rope()
        blocks = (
            PreNormBlock(
                RMSNorm(c.hidden_size, c.rms_norm_eps),
                self_attention(c, layer, rope, window=c.sliding_window),
                RMSNorm(c.hidden_size, c.rms_norm_eps),
                SwiGLU(c.hidden_size, c.intermediate_size),
            )
            for layer in range(c.num_hidden_layers)
        )
        super().__init__(c, blocks, RMSNorm(c.hidden_size, c.rms_norm_eps))


def recognizes(format: str, config: Mapping[str, Any]) -> bool:
    """Only Mistral's params.json has the feed-forward width, and mixtures' too. Its GGUF files say "llama"."""
    if format == "consolidated":
        return "hidden_dim" in config and not config.get("moe") and "num_experts" not in config
    return format == "hf" and config.get("model_type") == "mistral"


FAMILY = Family(
    MistralConfig,
    Mistral,
    key_tables=llama.FAMILY.key_tables,
    names=ArchitectureNames("mistral", "MistralForCausalLM", gguf="llama"),
    recognizes=recognizes,
)
