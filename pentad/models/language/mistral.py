"""Mistral 7B (arXiv:2310.06825), and models with its architecture: Zephyr, OpenHermes.

Llama's block with the paper's three ideas (section 2):

* Grouped-query attention: `num_attention_heads` query heads share `num_key_value_heads` key/value heads.
* A sliding window: a token attends to `sliding_window` keys, its own included. Over k layers information reaches k
  windows back.
* A rolling buffer: the cache (`pentad.nn.cache`) frees a page when it is outside every `Attention.window`. A sequence
  of any length stores O(window) tokens, and prompts longer than the window run in chunks.
"""

from dataclasses import dataclass
from typing import Any, Self

from pentad.models.family import ArchitectureNames, Family
from pentad.models.language import llama
from pentad.models.language.decoder_only import PreNormConfig, PreNormDecoder, check_layer_types, self_attention
from pentad.nn.feedforward import SwiGLU
from pentad.weights.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class MistralConfig(PreNormConfig):
    """Mistral's fields beyond the shared ones."""

    num_key_value_heads: int = 8
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None  # of Ministral, where some layers have no window

    def window(self, layer: int) -> int | None:
        """A layer's window."""
        return self.sliding_window if not self.layer_types or "sliding" in self.layer_types[layer] else None

    def resolve(self, checkpoint: Checkpoint) -> Self:
        check_layer_types(self.layer_types, self.num_hidden_layers, checkpoint.path)
        return super().resolve(checkpoint)

    def to_hf(self) -> dict[str, Any]:
        values = super().to_hf()
        if self.layer_types is None:
            del values["layer_types"]  # the key alone makes transformers load a Ministral
        return values


class Mistral(PreNormDecoder):
    """Grouped-query attention over a sliding window, and SwiGLU, each after an RMSNorm."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(
            config,
            lambda layer, rope: self_attention(config, layer, rope, window=config.window(layer)),
            lambda: SwiGLU(config.hidden_size, config.intermediate_size),
        )


def recognizes(checkpoint: Checkpoint) -> bool:
    """Among dense models only Mistral's params.json has hidden_dim. Mistral's GGUF files are read as "llama"."""
    config = checkpoint.config
    if checkpoint.format == "consolidated":
        return "hidden_dim" in config and not config.get("moe") and "num_experts" not in config
    return checkpoint.format == "hf" and config.get("model_type") in ("mistral", "ministral")


FAMILY = Family(
    MistralConfig,
    Mistral,
    key_tables=llama.FAMILY.key_tables,
    names=ArchitectureNames("mistral", "MistralForCausalLM", gguf="llama"),
    recognizes=recognizes,
)
