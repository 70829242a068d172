"""What all decoder-only families share: config fields, the frame around the blocks, and attention from the config.

A family's file adds the config fields, the block and the key tables that its paper changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import nn

from pentad.errors import BadInput
from pentad.models.family import ModelConfig
from pentad.nn.attention import Attention
from pentad.nn.decoder import Decoder
from pentad.nn.rope import Rope
from pentad.nn.rope_scaling import DefaultRope, scaling
from pentad.weights.config import MAX_SIZE

if TYPE_CHECKING:
    from pentad.weights.checkpoint import Checkpoint

MAX_EXPERTS = 4096  # twice those of the largest published model; a larger number is a broken file


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """The fields that every decoder-only family reads, with Hugging Face's names and defaults."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # num_attention_heads
    head_dim: int = 0  # hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    initializer_range: float = 0.02

    ACTIVATIONS: ClassVar[tuple[str, ...]] = ("silu", "swish")
    """The values that `hidden_act` may have."""

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a head RoPE rotates."""
        return self.head_dim

    @property
    def rope_scaling(self) -> DefaultRope:
        """How RoPE's frequencies are stretched for long contexts."""
        return scaling(self.rope_parameters)

    def rope(self) -> Rope:
        """The rotary embedding that all layers share."""
        return Rope(self.rotary_dim, self.rope_theta, self.rope_scaling)

    def resolve(self, checkpoint: Checkpoint) -> Self:
        path, heads = checkpoint.path, self.num_attention_heads
        kv_heads = self.num_key_value_heads or heads
        head_dim = self.head_dim or self.hidden_size // heads
        if self.hidden_act not in self.ACTIVATIONS:
            raise BadInput(f"{path}: hidden_act is {self.hidden_act!r}; expected {' or '.join(self.ACTIVATIONS)}")
        if heads % kv_heads or head_dim % 2 or heads * head_dim > MAX_SIZE:
            raise BadInput(
                f"{path}: {heads} heads of {head_dim} numbers can't share {kv_heads} key/value heads, or are odd"
            )
        config = replace(self, num_key_value_heads=kv_heads, head_dim=head_dim)
        if not 0 < config.rotary_dim <= head_dim or config.rotary_dim % 2:
            raise BadInput(f"{path}: RoPE can't rotate {config.rotary_dim} of a head's {head_dim} numbers, in pairs")
        # Refuses unknown scalings, and frequency factors whose number differs from that of the frequencies.
        scaling(config.rope_parameters, path).frequencies(config.rope_theta, config.rotary_dim, 1)
        return config

    def published(self) -> dict[str, Any]:
        values = super().published()
        values["rope_scaling"] = _published_scaling(self, values.pop("rope_parameters"))
        return values


def _published_scaling(config: DecoderConfig, rope: Mapping[str, Any]) -> dict[str, Any] | None:
    name = rope.get("rope_type") or rope.get("type") or "default"
    if name == "default":
        return None
    if name == "divisors":  # GGUF's frequency factors: LongRoPE with the same factors for short and long sequences
        factors = list(rope["divisors"])
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config.max_position_embeddings,
        }
    return {**{key: value for key, value in rope.items() if value is not None}, "rope_type": name}


def check_experts(config: DecoderConfig, experts: int, top_k: int, path: object) -> None:
    """Raise BadInput if no mixture has `experts` experts, of which a token takes `top_k`."""
    if experts > MAX_EXPERTS or experts * config.hidden_size * config.intermediate_size > MAX_SIZE**2:
        raise BadInput(f"{path}: {experts} experts of that width are not possible")
    if top_k > experts:
        raise BadInput(f"{path}: a token can't go to {top_k} of {experts} experts")


class DecoderOnly(Decoder):
    """The frame: an embedding, blocks, a last norm, and a head that may be tied to the embedding.

    Args:
        config: gives the sizes of embedding and head.
        blocks: one a layer.
        norm: the last one.
        head_bias: whether the head has a bias.
    """

    def __init__(
        self, config: DecoderConfig, blocks: Iterable[nn.Module], norm: nn.Module, *, head_bias: bool = False
    ) -> None:
        super().__init__(
            nn.Embedding(config.vocab_size, config.hidden_size),
            blocks,
            norm,
            nn.Linear(config.hidden_size, config.vocab_size, bias=head_bias),
            tied=config.tie_word_embeddings,
            config=config,
        )


def self_attention(config: DecoderConfig, layer: int, rope: Rope, **options: Any) -> Attention:
    """Causal self-attention of a config's sizes; `options` are what a family adds, as `Attention` takes them."""
    return Attention(
        config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rope=rope,
        layer=layer,
        **options,
    )
