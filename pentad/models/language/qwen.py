"""Qwen's first generation (arXiv:2309.16609): Qwen-1.8B, 7B, 14B and 72B.

Llama's block with multi-head attention and biases on queries, keys and values. For texts longer than it was trained on
its config asks for two extras: a base of RoPE that grows with the text, and queries that grow with their position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pentad.errors import BadInput
from pentad.models.language.config import ArchitectureNames, DecoderConfig, read_decoder_config, renamed, written_values
from pentad.models.language.key_rules import gguf_rules, hf_ignored
from pentad.nn.attention import Attention
from pentad.nn.block import PreNormBlock
from pentad.nn.decoder import Decoder
from pentad.nn.feedforward import SwiGLU
from pentad.nn.norm import RMSNorm
from pentad.nn.rope import Rope
from pentad.nn.rope_scaling import DefaultRope, DynamicSteps
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import Concat, KeyTable, Rule

NAMES = {"layer_norm_epsilon": "rms_norm_eps", "kv_channels": "head_dim", "rotary_emb_base": "rope_theta"}
"""What its ``config.json`` calls differently than others."""
OLDER_NAMES = {
    "n_embd": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}
"""What the first files, of August 2023, did too."""


@dataclass(frozen=True)
class QwenConfig(DecoderConfig):
    """What the forward pass reads of a published ``config.json``, with its defaults.

    Attributes:
        intermediate_size: as published, twice the feed-forward's width.
        seq_length: the length it was trained on, after which the two extras set in.
    """

    rms_norm_eps: float = 1e-6
    rotary_pct: float = 1.0
    no_bias: bool = True
    seq_length: int = 0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that RoPE rotates."""
        return int(self.head_dim * self.rotary_pct)


class Qwen(Decoder):
    """Multi-head attention with biased q, k and v, and SwiGLU, each behind an RMSNorm."""

    def __init__(self, config: QwenConfig) -> None:
        c = config
        rope = Rope(c.rotary_dim, c.rope_theta, DynamicSteps(c.seq_length) if c.use_dynamic_ntk else DefaultRope())
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
                        bias=True,
                        output_bias=not c.no_bias,
                        log_scale_after=c.seq_length if c.use_logn_attn else None,
                    ),
                    RMSNorm(c.hidden_size, c.rms_norm_eps),
                    SwiGLU(c.hidden_size, c.intermediate_size // 2, bias=not c.no_bias),
                )
                for layer in range(c.num_hidden_layers)
            ),
            RMSNorm(c.hidden_size, c.rms_norm_eps),
            nn.Linear(c.hidden_size, c.vocab_size, bias=False),
            tied=c.tie_word_embeddings,
            config=c,
        )


def config_from(checkpoint: Checkpoint) -> QwenConfig:
    """The config of a checkpoint, from ``config.json`` or GGUF metadata, which has no place for the extras."""
    off = {"use_dynamic_ntk": False, "use_logn_attn": False} if checkpoint.format == "gguf" else {}
    config = read_decoder_config(QwenConfig, renamed(checkpoint, NAMES | OLDER_NAMES), **off)
    if (config.use_dynamic_ntk or config.use_logn_attn) and config.seq_length < 2:
        raise BadInput(f"{checkpoint.path}: use_dynamic_ntk and use_logn_attn need a seq_length of at least 2")
    return config


def key_tables(config: QwenConfig, format: str) -> list[KeyTable]:
    """The names of the network's modules in Hugging Face folders and in GGUF files; w2 is the gate."""
    qkv = tuple(f"layers.*.attention.{p}_proj" for p in "qkv")
    joined = Concat((config.num_attention_heads * config.head_dim,) * 3)
    layer = "transformer.h.*"
    match format:
        case "hf":
            rules = [
                Rule("embed", "transformer.wte"),
                Rule("layers.*.attention_norm", f"{layer}.ln_1"),
                Rule(qkv, f"{layer}.attn.c_attn", joined),
                Rule("layers.*.attention.o_proj", f"{layer}.attn.c_proj"),
                Rule("layers.*.feedforward_norm", f"{layer}.ln_2"),
                Rule("layers.*.feedforward.gate_proj", f"{layer}.mlp.w2"),
                Rule("layers.*.feedforward.up_proj", f"{layer}.mlp.w1"),
                Rule("layers.*.feedforward.down_proj", f"{layer}.mlp.c_proj"),
                Rule("norm", "transformer.ln_f"),
                Rule("head", "lm_head"),
            ]
            return [KeyTable(rules, ignored=hf_ignored(config.tie_word_embeddings))]
        case "gguf":
            return [KeyTable([*gguf_rules(), Rule(qkv, "blk.*.attn_qkv", joined)])]
    return []


def write_config(config: QwenConfig, format: str) -> dict[str, Any]:
    """The config as files of a format spell it."""
    values = written_values(config, format, ArchitectureNames("qwen", "QWenLMHeadModel", gguf="qwen"))
    if format != "hf":
        return values
    published = {house: name for name, house in NAMES.items()}
    unknown = ["num_key_value_heads", "hidden_act", "rope_scaling", *([] if config.seq_length else ["seq_length"])]
    return {published.get(name, name): value for name, value in values.items() if name not in unknown}


build = Qwen
