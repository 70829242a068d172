"""Llama (arXiv:2302.13971, 2307.09288, 2407.21783), and models with its architecture: TinyLlama, SmolLM2, Orca 2.

A pre-norm transformer: RMSNorm, grouped-query attention with RoPE, SwiGLU, and no biases in the published models.
"""

from dataclasses import dataclass

from pentad.models.family import ArchitectureNames, Family
from pentad.models.language import key_rules
from pentad.models.language.decoder_only import PreNormConfig, PreNormDecoder, self_attention
from pentad.nn.feedforward import SwiGLU
from pentad.weights.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(PreNormConfig):
    """Llama's fields beyond the shared ones."""

    attention_bias: bool = False
    mlp_bias: bool = False


class Llama(PreNormDecoder):
    """Grouped-query attention over all earlier tokens, and SwiGLU, each after an RMSNorm."""

    def __init__(self, config: LlamaConfig) -> None:
        bias = config.attention_bias
        super().__init__(
            config,
            lambda layer, rope: self_attention(config, layer, rope, bias=bias, output_bias=bias),
            lambda: SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias),
        )


def recognizes(checkpoint: Checkpoint) -> bool:
    """GGUF files of mixtures are "llama" too. Meta's params.json names no architecture, but has its own keys."""
    config = checkpoint.config
    match checkpoint.format:
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
        "consolidated": lambda config: [key_rules.consolidated_table(config)],
    },
    names=ArchitectureNames("llama", "LlamaForCausalLM", gguf="llama"),
    recognizes=recognizes,
)
