"""Qwen1.5, Qwen2 (arXiv:2407.10671) and Qwen2.5: Llama's block with biases on queries, keys and values."""

from dataclasses import dataclass, field
from typing import Self

from pentad.models.family import ArchitectureNames, Family
from pentad.models.language import key_rules
from pentad.models.language.decoder_only import PreNormConfig, PreNormDecoder, check_layer_types, self_attention
from pentad.nn.feedforward import SwiGLU
from pentad.weights.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(PreNormConfig):
    """Qwen2's fields beyond the shared ones."""

    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = field(default=28, metadata={"least": 0})
    layer_types: tuple[str, ...] | None = None

    def window(self, layer: int) -> int | None:
        """A layer's window. Configs list the layers' types, or name the first layer with a window."""
        if self.layer_types:
            windowed = self.layer_types[layer : layer + 1] == ("sliding_attention",)
        else:
            windowed = layer >= self.max_window_layers
        return self.sliding_window if self.use_sliding_window and windowed else None

    def resolve(self, checkpoint: Checkpoint) -> Self:
        check_layer_types(self.layer_types, self.num_hidden_layers, checkpoint.path)
        return super().resolve(checkpoint)


class Qwen2(PreNormDecoder):
    """Grouped-query attention with biased q, k and v, and SwiGLU, each after an RMSNorm."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(
            config,
            lambda layer, rope: self_attention(config, layer, rope, window=config.window(layer), bias=True),
            lambda: SwiGLU(config.hidden_size, config.intermediate_size),
        )


FAMILY = Family(
    Qwen2Config,
    Qwen2,
    key_tables={"hf": key_rules.hf(), "gguf": key_rules.gguf()},
    names=ArchitectureNames("qwen2", "Qwen2ForCausalLM", gguf="qwen2"),
)
