"""Qwen3 (arXiv:2505.09388): Llama's block with an RMSNorm on each head's queries and keys."""

from dataclasses import dataclass

from pentad.models.family import ArchitectureNames, Family
from pentad.models.language import key_rules
from pentad.models.language.decoder_only import PreNormDecoder, self_attention
from pentad.models.language.qwen2 import Qwen2Config
from pentad.nn.attention import Attention
from pentad.nn.feedforward import SwiGLU
from pentad.nn.norm import RMSNorm
from pentad.nn.rope import Rope
from pentad.weights.keytable import KeyTable, Rule


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Qwen2Config):
    """Qwen3's fields beyond Qwen2's."""

    head_dim: int = 128
    attention_bias: bool = False


class Qwen3(PreNormDecoder):
    """Grouped-query attention with normalized queries and keys, and SwiGLU, each after an RMSNorm."""

    def __init__(self, config: Qwen3Config) -> None:
        def attention(layer: int, rope: Rope) -> Attention:
            bias, window = config.attention_bias, config.window(layer)
            q_norm, k_norm = (RMSNorm(config.head_dim, config.rms_norm_eps) for _ in range(2))
            options = {"bias": bias, "output_bias": bias, "q_norm": q_norm, "k_norm": k_norm}
            return self_attention(config, layer, rope, window=window, **options)

        super().__init__(config, attention, lambda: SwiGLU(config.hidden_size, config.intermediate_size))


def _gguf(config: Qwen3Config) -> list[KeyTable]:
    """No layout for models with attention_bias: llama.cpp's Qwen3 has no bias on attention's output."""
    rules = (Rule(f"layers.*.attention.{p}_norm", f"blk.*.attn_{p}_norm") for p in "qk")
    return [] if config.attention_bias else [key_rules.gguf_table(config, *rules)]


FAMILY = Family(
    Qwen3Config,
    Qwen3,
    key_tables={
        "hf": key_rules.hf(*(Rule(f"layers.*.attention.{p}_norm", f"model.layers.*.self_attn.{p}_norm") for p in "qk")),
        "gguf": _gguf,
    },
    names=ArchitectureNames("qwen3", "Qwen3ForCausalLM", gguf="qwen3"),
)
