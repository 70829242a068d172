"""Qwen's first generation (arXiv:2309.16609): Qwen-1.8B, 7B, 14B and 72B.

Llama's block with multi-head attention and biases on queries, keys and values. For texts longer than the training
length the config has two extras: RoPE's base grows with the text (dynamic NTK), and queries are scaled by the logarithm
of their position (log-n).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from pentad.errors import BadInput
from pentad.models.family import ArchitectureNames, Family
from pentad.models.language import key_rules
from pentad.models.language.decoder_only import PreNormConfig, PreNormDecoder, rotary_share, self_attention
from pentad.nn.feedforward import SwiGLU
from pentad.nn.rope_scaling import DefaultRope, DynamicSteps
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import Concat, KeyTable, Rule


@dataclass(frozen=True, kw_only=True)
class QwenConfig(PreNormConfig):
    """Qwen's fields beyond the shared ones.

    Attributes:
        intermediate_size: twice the feed-forward's width, as published.
        seq_length: the training length; longer texts use the two extras.
    """

    rotary_pct: float = 1.0
    no_bias: bool = True
    seq_length: int | None = None
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True

    HF_NAMES: ClassVar[Mapping[str, str]] = {
        "layer_norm_epsilon": "rms_norm_eps",
        "kv_channels": "head_dim",
        "rotary_emb_base": "rope_theta",
    }
    OLD_HF_NAMES: ClassVar[Mapping[str, str]] = {
        "n_embd": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
    }
    """The names in the first files (August 2023)."""

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_pct + 1e-6)  # a share read from a GGUF is rounded

    @property
    def rope_scaling(self) -> DefaultRope:
        return DynamicSteps(self.seq_length) if self.use_dynamic_ntk and self.seq_length else DefaultRope()

    def to_hf(self) -> dict[str, Any]:
        absent = ("num_key_value_heads", "hidden_act", "rope_scaling")
        return {name: value for name, value in super().to_hf().items() if name not in absent}

    def resolve(self, checkpoint: Checkpoint) -> Self:
        config = super().resolve(checkpoint)
        if checkpoint.format == "gguf":  # GGUF can't store the extras
            share = rotary_share(config, checkpoint, "qwen.rope.dimension_count")
            return replace(config, rotary_pct=share, use_dynamic_ntk=False, use_logn_attn=False)
        if (self.use_dynamic_ntk or self.use_logn_attn) and (self.seq_length or 0) < 2:
            raise BadInput(f"{checkpoint.path}: use_dynamic_ntk and use_logn_attn need a seq_length of at least 2")
        return config


class Qwen(PreNormDecoder):
    """Multi-head attention with biased q, k and v, and SwiGLU, each after an RMSNorm."""

    def __init__(self, config: QwenConfig) -> None:
        bias = not config.no_bias
        log_scale_after = config.seq_length if config.use_logn_attn else None
        super().__init__(
            config,
            lambda layer, rope: self_attention(
                config, layer, rope, bias=True, output_bias=bias, log_scale_after=log_scale_after
            ),
            lambda: SwiGLU(config.hidden_size, config.intermediate_size // 2, bias=bias),
        )


def _qkv(config: QwenConfig, theirs: str) -> Rule:
    width = config.num_attention_heads * config.head_dim
    return Rule(tuple(f"layers.*.attention.{p}_proj" for p in "qkv"), theirs, Concat((width,) * 3))


def _hf(config: QwenConfig) -> list[KeyTable]:
    layer = "transformer.h.*"
    rules = [
        Rule("embed", "transformer.wte"),
        Rule("layers.*.attention_norm", f"{layer}.ln_1"),
        _qkv(config, f"{layer}.attn.c_attn"),
        Rule("layers.*.attention.o_proj", f"{layer}.attn.c_proj"),
        Rule("layers.*.feedforward_norm", f"{layer}.ln_2"),
        Rule("layers.*.feedforward.gate_proj", f"{layer}.mlp.w2"),  # not w1
        Rule("layers.*.feedforward.up_proj", f"{layer}.mlp.w1"),
        Rule("layers.*.feedforward.down_proj", f"{layer}.mlp.c_proj"),
        Rule("norm", "transformer.ln_f"),
        Rule("head", "lm_head"),
    ]
    return [KeyTable(rules, key_rules.hf_ignored(config))]


def init_std(config: QwenConfig, name: str) -> float:
    """GPT-2's rule: projections back to the residual stream shrink with the depth (modeling_qwen.py)."""
    residual = "o_proj" in name or "down_proj" in name
    return config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if residual else 1)


FAMILY = Family(
    QwenConfig,
    Qwen,
    key_tables={"hf": _hf, "gguf": lambda config: [key_rules.gguf_table(config, _qkv(config, "blk.*.attn_qkv"))]},
    names=ArchitectureNames("qwen", "QWenLMHeadModel", gguf="qwen"),
    init_std=init_std,
)
