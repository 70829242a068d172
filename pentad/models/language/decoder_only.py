"""Shared code of decoder-only families: config fields, the network around the blocks, and attention from the config.

A family's file adds the config fields, parts and key tables that its paper changed.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import nn

from pentad.errors import BadInput
from pentad.models.family import ModelConfig
from pentad.nn.attention import Attention
from pentad.nn.block import PreNormBlock
from pentad.nn.decoder import Decoder
from pentad.nn.linear import HeadLinear
from pentad.nn.norm import RMSNorm
from pentad.nn.rope import Rope
from pentad.nn.rope_scaling import DefaultRope, scaling
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.config import MAX_SIZE

LAYER_TYPES = {"full_attention", "sliding_attention"}
MAX_EXPERTS = 4096  # twice as many as in the largest published model; more indicate a broken file


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """The config fields of every decoder-only family, with Hugging Face's names and defaults."""

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
    """The valid values of `hidden_act`."""

    @property
    def rotary_dim(self) -> int:
        """The number of dimensions of a head that RoPE rotates."""
        return self.head_dim

    @property
    def rope_scaling(self) -> DefaultRope:
        """The scaling of RoPE's frequencies for long contexts."""
        return scaling(self.rope_parameters)

    @property
    def context_length(self) -> int:
        """The longest sequence: `max_position_embeddings`, or more if RoPE's scaling extends it."""
        return self.rope_scaling.context_length(self.max_position_embeddings)

    def rope(self) -> Rope:
        """Make the rotary embedding for all layers."""
        return Rope(self.rotary_dim, self.rope_theta, self.rope_scaling)

    def resolve(self, checkpoint: Checkpoint) -> Self:
        path, heads = checkpoint.path, self.num_attention_heads
        kv_heads = self.num_key_value_heads or heads
        head_dim = self.head_dim or self.hidden_size // heads
        if self.hidden_act not in self.ACTIVATIONS:
            raise BadInput(f"{path}: hidden_act is {self.hidden_act!r}; expected {' or '.join(self.ACTIVATIONS)}")
        if heads % kv_heads or head_dim % 2 or heads * head_dim > MAX_SIZE:
            raise BadInput(
                f"{path}: {heads} heads of {head_dim} dimensions and {kv_heads} key/value heads are not possible;"
                " expected heads to be a multiple of key/value heads, and an even head dimension"
            )
        config = replace(self, num_key_value_heads=kv_heads, head_dim=head_dim)
        if not 0 < config.rotary_dim <= head_dim or config.rotary_dim % 2:
            raise BadInput(
                f"{path}: RoPE rotates {config.rotary_dim} of {head_dim} dimensions; expected an even number of them"
            )
        # Raises BadInput for an unknown scaling, or a wrong number of frequency factors.
        scaling(config.rope_parameters, path).frequencies(config.rope_theta, config.rotary_dim, 1)
        return config

    def to_hf(self) -> dict[str, Any]:
        values = super().to_hf()
        values["rope_scaling"] = _hf_rope_scaling(self, values.pop("rope_parameters"))
        return values


def _hf_rope_scaling(config: DecoderConfig, rope: Mapping[str, Any]) -> dict[str, Any] | None:
    name = rope.get("rope_type") or rope.get("type") or "default"
    if name == "default":
        return None
    if name == "divisors":  # GGUF's frequency factors, as LongRoPE with equal factors for short and long sequences
        factors = list(rope["divisors"])
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config.max_position_embeddings,
        }
    return {**{key: value for key, value in rope.items() if value is not None}, "rope_type": name}


def check_layer_types(types: Collection[str] | None, layers: int, path: object) -> None:
    """Raise BadInput unless the layers' types, if the config has them, are one known type per layer."""
    if types and (len(types) != layers or not LAYER_TYPES.issuperset(types)):
        known = " or ".join(sorted(LAYER_TYPES))
        raise BadInput(f"{path}: layer_types is wrong; expected {known} for each of the {layers} layers")


def rotary_share(config: DecoderConfig, checkpoint: Checkpoint, key: str) -> float:
    """The part of a head that RoPE rotates, if `key` of the file has it in dimensions.

    Raises:
        BadInput: it is not an even number from 2 to the head's size.
    """
    dims = checkpoint.config.get(key, config.rotary_dim)
    if not isinstance(dims, int) or not 0 < dims <= config.head_dim or dims % 2:
        expected = f"an even number up to {config.head_dim}"
        raise BadInput(f"{checkpoint.path}: {key} is {str(dims)[:40]}; expected {expected}")
    return dims / config.head_dim


def check_experts(config: DecoderConfig, experts: int, top_k: int, path: object) -> None:
    """Raise BadInput if a mixture can't have `experts` experts, or a token can't use `top_k` of them."""
    if experts > MAX_EXPERTS or experts * config.hidden_size * config.intermediate_size > MAX_SIZE**2:
        raise BadInput(f"{path}: {experts} experts of {config.intermediate_size} dimensions are too many")
    if top_k > experts:
        raise BadInput(f"{path}: top_k is {top_k} with {experts} experts; expected at most {experts}")


class DecoderOnly(Decoder):
    """An embedding, blocks, a final norm, and a head that may be tied to the embedding.

    Args:
        config: sizes of embedding and head.
        blocks: one per layer.
        norm: the final norm.
        head_bias: whether the head has a bias.
    """

    def __init__(
        self, config: DecoderConfig, blocks: Iterable[nn.Module], norm: nn.Module, *, head_bias: bool = False
    ) -> None:
        super().__init__(
            nn.Embedding(config.vocab_size, config.hidden_size),
            blocks,
            norm,
            HeadLinear(config.hidden_size, config.vocab_size, bias=head_bias),
            tied=config.tie_word_embeddings,
            config=config,
        )


@dataclass(frozen=True, kw_only=True)
class PreNormConfig(DecoderConfig):
    """The fields of families with an RMSNorm before each part."""

    rms_norm_eps: float = 1e-6


class PreNormDecoder(DecoderOnly):
    """Blocks of attention and a feed-forward part, each after an RMSNorm.

    Args:
        config: sizes and number of layers.
        attention: makes the attention of a layer, from its number and the shared RoPE.
        feedforward: makes the feed-forward part of a layer.
    """

    def __init__(
        self, config: PreNormConfig, attention: Callable[[int, Rope], nn.Module], feedforward: Callable[[], nn.Module]
    ) -> None:
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps)

        rope, layers = config.rope(), range(config.num_hidden_layers)
        blocks = (PreNormBlock(norm(), attention(layer, rope), norm(), feedforward()) for layer in layers)
        super().__init__(config, blocks, norm())


def self_attention(config: DecoderConfig, layer: int, rope: Rope, **options: Any) -> Attention:
    """Causal self-attention with a config's sizes; `options` are further arguments of `Attention`."""
    return Attention(
        config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rope=rope,
        layer=layer,
        **options,
    )
