"""Mistral 7B (arXiv:2310.06825), and what has its architecture: Zephyr, OpenHermes.

Llama's block with the paper's three ideas of section 2:

* grouped-query attention: `num_key_value_heads` keys and values serve all `num_attention_heads` queries;
* a sliding window: a token sees `sliding_window` keys, its own included, and so, over k layers, k windows far back;
* a rolling buffer: `Attention.window` lets the cache (`pentad.nn.cache`) take a page back once no window reaches it, so
  that a sequence holds O(window) tokens however long it gets. A prompt longer than that is run in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pentad.models.language import llama
from pentad.models.language.config import ArchitectureNames, DecoderConfig, read_decoder_config, written_values
from pentad.nn.attention import Attention
from pentad.nn.block import PreNormBlock
from pentad.nn.decoder import Decoder
from pentad.nn.feedforward import SwiGLU
from pentad.nn.norm import RMSNorm
from pentad.nn.rope import Rope
from pentad.nn.rope_scaling import scaling
from pentad.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """What the forward pass reads of a published ``config.json``, under its names there and with their defaults."""

    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-6
    sliding_window: int | None = None


class Mistral(Decoder):
    """Grouped-query attention over a sliding window, and SwiGLU, each behind an RMSNorm."""

    def __init__(self, config: MistralConfig) -> None:
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
                        window=c.sliding_window,
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


def config_from(checkpoint: Checkpoint) -> MistralConfig:
    """The config of a checkpoint, from ``config.json`` or ``params.json``; in GGUF files Mistral is called "llama"."""
    return read_decoder_config(MistralConfig, checkpoint)


key_tables = llama.key_tables  # the modules have Llama's names in every kind of file


def write_config(config: MistralConfig, format: str) -> dict[str, Any]:
    """The config as files of a format spell it."""
    return written_values(config, format, ArchitectureNames("mistral", "MistralForCausalLM", gguf="llama"))


build = Mistral
