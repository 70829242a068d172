"""Qwen1.5, Qwen2 (arXiv:2407.10671) and Qwen2.5: Llama's block with biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from pentad.errors import BadInput
from pentad.models.language.config import ArchitectureNames, DecoderConfig, read_decoder_config, written_values
from pentad.models.language.key_rules import gguf_rules, hf_ignored, hf_rules
from pentad.nn.attention import Attention
from pentad.nn.block import PreNormBlock
from pentad.nn.decoder import Decoder
from pentad.nn.feedforward import SwiGLU
from pentad.nn.norm import RMSNorm
from pentad.nn.rope import Rope
from pentad.nn.rope_scaling import scaling
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import KeyTable


@dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """What the forward pass reads of a published ``config.json``, under its names there and with their defaults."""

    rms_norm_eps: float = 1e-6
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = field(default=28, metadata={"least": 0})
    layer_types: tuple[str, ...] | None = None

    def window(self, layer: int) -> int | None:
        """How many keys a layer's queries see: published as a list, or as the first layer that has a window."""
        if self.layer_types:
            windowed = self.layer_types[layer : layer + 1] == ("sliding_attention",)
        else:
            windowed = layer >= self.max_window_layers
        return self.sliding_window if self.use_sliding_window and windowed else None


C = TypeVar("C", bound=Qwen2Config)


class Qwen2(Decoder):
    """Grouped-query attention with biased q, k and v, and SwiGLU, each behind an RMSNorm."""

    def __init__(self, config: Qwen2Config) -> None:
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
                        bias=True,
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


def config_from(checkpoint: Checkpoint) -> Qwen2Config:
    """The config of a checkpoint, from ``config.json`` or GGUF metadata."""
    return checked_layer_types(read_decoder_config(Qwen2Config, checkpoint), checkpoint)


def checked_layer_types(config: C, checkpoint: Checkpoint) -> C:
    """The config; BadInput where `layer_types` isn't a known kind of attention for each layer."""
    kinds = {"full_attention", "sliding_attention"}
    said = config.layer_types or ()
    if said and (len(said) != config.num_hidden_layers or not kinds.issuperset(said)):
        raise BadInput(
            f"{checkpoint.path}: layer_types is not one of {' and '.join(sorted(kinds))} for each of the "
            f"{config.num_hidden_layers} layers"
        )
    return config


def key_tables(config: Qwen2Config, format: str) -> list[KeyTable]:
    """The names of the network's modules in Hugging Face folders and in GGUF files."""
    match format:
        case "hf":
            return [KeyTable(hf_rules(), ignored=hf_ignored(config.tie_word_embeddings))]
        case "gguf":
            return [KeyTable(gguf_rules(), ignored=[r"rope_freqs\.weight"])]
    return []


def write_config(config: Qwen2Config, format: str) -> dict[str, Any]:
    """The config as files of a format spell it."""
    return written_values(config, format, ArchitectureNames("qwen2", "Qwen2ForCausalLM", gguf="qwen2"))


build = Qwen2
