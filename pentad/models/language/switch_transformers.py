"""Switch Transformers (arXiv:2101.03961): T5's encoder-decoder (arXiv:1910.10683) with mixtures of experts.

In some blocks the feed-forward layer is a mixture, and each token uses one expert. An expert has a capacity per
sequence, filled by position. Dropped tokens stay unchanged on the residual stream, as in the paper; transformers before
5.0 added them, scaled by their expert's probability. In a cached step the capacity counts only the step's tokens.
Without sparse layers the network is T5.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import nn

from pentad.errors import BadInput
from pentad.models.family import ArchitectureNames, Family, ModelConfig
from pentad.models.language.decoder_only import MAX_EXPERTS
from pentad.nn.attention import Attention
from pentad.nn.block import CrossAttentionBlock, PreNormBlock
from pentad.nn.decoder import Stack
from pentad.nn.encoder_decoder import EncoderDecoder, ScaledLinear
from pentad.nn.feedforward import ReluMLP
from pentad.nn.moe.experts import MLPExperts
from pentad.nn.moe.layer import MixtureOfExperts, Router
from pentad.nn.moe.routers import softmax_top_k
from pentad.nn.norm import RMSNorm
from pentad.nn.relative_bias import RelativeBias
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.config import MAX_LAYERS, MAX_SIZE
from pentad.weights.keytable import KeyTable, Rule, Stacked


@dataclass(frozen=True, kw_only=True)
class SwitchConfig(ModelConfig):
    """The fields of a published ``config.json`` that the network reads, with their defaults."""

    vocab_size: int = 32128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 12
    num_decoder_layers: int = 0  # num_layers
    num_heads: int = 12
    num_experts: int = 8
    expert_capacity: int = 64
    num_sparse_encoder_layers: int = field(default=3, metadata={"least": 0})
    num_sparse_decoder_layers: int = field(default=3, metadata={"least": 0})
    router_jitter_noise: float = field(default=0.01, metadata={"least": 0})
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dense_act_fn: str = "relu"
    tie_word_embeddings: bool = True
    decoder_start_token_id: int = field(default=0, metadata={"least": 0})
    n_positions: int = 512  # the training length, not a limit: positions are relative
    initializer_factor: float = 1.0

    @property
    def max_position_embeddings(self) -> int:
        """The training length."""
        return self.n_positions

    @property
    def context_length(self) -> int:
        return self.n_positions

    def resolve(self, checkpoint: Checkpoint) -> Self:
        path, layers = checkpoint.path, (self.num_layers, self.num_decoder_layers or self.num_layers)
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if max(layers) > MAX_LAYERS:
            raise BadInput(f"{path}: {layers[0]} and {layers[1]} layers are too many; expected at most {MAX_LAYERS}")
        if self.num_experts > MAX_EXPERTS or self.num_heads * self.d_kv > MAX_SIZE:
            raise BadInput(f"{path}: {self.num_experts} experts or {self.num_heads} heads of {self.d_kv} are too many")
        if buckets < 4 or buckets % 2 or distance <= buckets // 2:
            raise BadInput(f"{path}: {buckets} buckets can't cover distances up to {distance}")
        if self.dense_act_fn != "relu" or checkpoint.config.get("is_gated_act"):
            raise BadInput(f"{path}: dense_act_fn is {self.dense_act_fn!r}; expected relu, not gated")
        if self.decoder_start_token_id >= self.vocab_size:
            raise BadInput(f"{path}: decoder_start_token_id {self.decoder_start_token_id} is outside the vocabulary")
        return replace(self, num_decoder_layers=layers[1])

    def to_hf(self) -> dict[str, Any]:
        return {"is_encoder_decoder": True, **super().to_hf()}


def sparse_layers(layers: int, sparse: int) -> list[bool]:
    """For each block, true if transformers builds it with a mixture. The number of mixtures can differ from `sparse`.

    If `sparse` is 0, only the second block has a mixture; if it exceeds `layers`, no block has one.
    """
    interval = layers // sparse if sparse else layers
    return [interval == 1 or (interval > 1 and i % interval == 1) for i in range(layers)]


class SwitchTransformers(EncoderDecoder):
    """Attention with a relative position bias, and a ReLU layer or a mixture of them, each after an RMSNorm."""

    def __init__(self, config: SwitchConfig) -> None:
        c = config
        embed = nn.Embedding(c.vocab_size, c.d_model)
        encoder_embed = embed if c.tie_word_embeddings else nn.Embedding(c.vocab_size, c.d_model)
        scale = c.d_model**-0.5 if c.tie_word_embeddings else 1.0
        super().__init__(
            Stack(encoder_embed, _encoder_blocks(c), RMSNorm(c.d_model, c.layer_norm_epsilon)),
            embed,
            _decoder_blocks(c),
            RMSNorm(c.d_model, c.layer_norm_epsilon),
            ScaledLinear(c.d_model, c.vocab_size, scale=scale),
            tied=c.tie_word_embeddings,
            config=c,
            start_id=c.decoder_start_token_id,
        )


def _encoder_blocks(c: SwitchConfig) -> Iterator[nn.Module]:
    bias = _relative_bias(c, bidirectional=True)
    for sparse in sparse_layers(c.num_layers, c.num_sparse_encoder_layers):
        yield PreNormBlock(
            RMSNorm(c.d_model, c.layer_norm_epsilon),
            _attention(c, causal=False, position_bias=bias),
            RMSNorm(c.d_model, c.layer_norm_epsilon),
            _feedforward(c, sparse),
        )


def _decoder_blocks(c: SwitchConfig) -> Iterator[nn.Module]:
    bias = _relative_bias(c, bidirectional=False)
    for layer, sparse in enumerate(sparse_layers(c.num_decoder_layers, c.num_sparse_decoder_layers)):
        yield CrossAttentionBlock(
            RMSNorm(c.d_model, c.layer_norm_epsilon),
            _attention(c, layer=layer, position_bias=bias),
            RMSNorm(c.d_model, c.layer_norm_epsilon),
            _attention(c, layer=layer, context_dim=c.d_model),
            RMSNorm(c.d_model, c.layer_norm_epsilon),
            _feedforward(c, sparse),
        )


def _attention(c: SwitchConfig, **options: Any) -> Attention:
    """T5's attention: scores are not divided by sqrt(d_kv), and projections have no bias."""
    return Attention(c.d_model, heads=c.num_heads, head_dim=c.d_kv, scale=1.0, **options)


def _relative_bias(c: SwitchConfig, *, bidirectional: bool) -> RelativeBias:
    return RelativeBias(
        c.num_heads,
        buckets=c.relative_attention_num_buckets,
        max_distance=c.relative_attention_max_distance,
        bidirectional=bidirectional,
    )


def _feedforward(c: SwitchConfig, sparse: bool) -> nn.Module:
    if not sparse:
        return ReluMLP(c.d_model, c.d_ff)
    return MixtureOfExperts(
        Router(c.d_model, c.num_experts),
        MLPExperts(c.num_experts, c.d_model, c.d_ff),
        softmax_top_k,
        top_k=1,
        capacity=lambda tokens: c.expert_capacity,
        jitter=c.router_jitter_noise,
    )


def _hf(config: SwitchConfig) -> list[KeyTable]:
    rules = [*_stack_rules("encoder.", "encoder", config), *_stack_rules("", "decoder", config)]
    if config.tie_word_embeddings:
        copies = [r"(encoder|decoder)\.embed_tokens\.weight", r"lm_head\.weight"]
        rules.append(Rule("embed", "shared"))
    else:
        copies = [r"shared\.weight"]
        rules += [Rule("encoder.embed", "encoder.embed_tokens"), Rule("embed", "decoder.embed_tokens")]
        rules.append(Rule("head", "lm_head"))
    return [KeyTable(rules, ignored=copies)]


def _stack_rules(ours: str, theirs: str, config: SwitchConfig) -> list[Rule]:
    block, layers = f"{theirs}.block.*", f"{ours}layers.*"
    last = 1 if theirs == "encoder" else 2
    rules = [
        Rule(f"{layers}.attention_norm", f"{block}.layer.0.layer_norm"),
        Rule(f"{layers}.attention.position_bias", f"{block}.layer.0.SelfAttention.relative_attention_bias"),
        Rule(f"{layers}.feedforward_norm", f"{block}.layer.{last}.layer_norm"),
        Rule(f"{layers}.feedforward.router", f"{block}.layer.{last}.mlp.router.classifier"),
        Rule(f"{ours}norm", f"{theirs}.final_layer_norm"),
        Rule(f"{layers}.cross_attention_norm", f"{block}.layer.1.layer_norm"),
    ]
    for part in "qkvo":
        rules.append(Rule(f"{layers}.attention.{part}_proj", f"{block}.layer.0.SelfAttention.{part}"))
        rules.append(Rule(f"{layers}.cross_attention.{part}_proj", f"{block}.layer.1.EncDecAttention.{part}"))
    for part, t5_part in (("up_proj", "wi"), ("down_proj", "wo")):
        mlp = f"{block}.layer.{last}.mlp"
        separate = tuple(f"{mlp}.experts.expert_{e}.{t5_part}" for e in range(config.num_experts))
        rules.append(Rule(f"{layers}.feedforward.{part}", f"{mlp}.{t5_part}"))
        rules.append(Rule(f"{layers}.feedforward.experts.{part}", separate, Stacked()))
    return rules


def init_std(config: SwitchConfig, name: str) -> float:
    """As in transformers (`SwitchTransformersPreTrainedModel`), without the paper's factor of 0.1."""
    fan_in = config.d_model
    if name.endswith(("embed.weight", "head.weight", "router.weight")):
        fan_in = 1
    elif name.endswith("q_proj.weight"):
        fan_in = config.d_model * config.d_kv
    elif name.endswith("o_proj.weight"):
        fan_in = config.num_heads * config.d_kv
    elif name.endswith("down_proj.weight") and ".experts." not in name:
        fan_in = config.d_ff
    return float(config.initializer_factor * fan_in**-0.5)


FAMILY = Family(
    SwitchConfig,
    SwitchTransformers,
    key_tables={"hf": _hf},
    names=ArchitectureNames("switch_transformers", "SwitchTransformersForConditionalGeneration"),
    init_std=init_std,
)
